//! Drives: a node with the facts of a disk in a machine around it.

use std::sync::Arc;

use super::edge::Edge;
use super::node::Node;

/// What a guest sees as a disk, and what the commands of 2013 call a device.
#[derive(Debug, Clone)]
pub struct Drive {
    /// Its id, in one name space with nodes.
    pub id: String,
    /// The uppermost layer; `None` without medium.
    pub root: Option<Edge>,
    /// What happens when a write fails.
    pub write_error: OnError,
    /// What happens when a read fails.
    pub read_error: OnError,
}

impl Drive {
    /// A drive with the usual settings.
    pub fn new(id: impl Into<String>, root: Option<Arc<Node>>) -> Self {
        Drive {
            id: id.into(),
            root: root.map(Edge::new),
            write_error: OnError::Enospc,
            read_error: OnError::Report,
        }
    }

    /// The node at its root; `None` without medium.
    pub fn node(&self) -> Option<Arc<Node>> {
        self.root.as_ref().map(Edge::node)
    }
}

/// What happens when a guest request fails. Data for queries: exports report every error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnError {
    /// The guest sees the error.
    Report,
    /// The guest sees success.
    Ignore,
    /// The machine stops when space is short; other errors are reported.
    Enospc,
    /// The machine stops.
    Stop,
}
