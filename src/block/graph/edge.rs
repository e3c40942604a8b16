//! Edges: how users of nodes reach them, so that nodes can change under their users.
//!
//! ```text
//!   export ──edge──┐                     export ──edge──┐
//!   drive  ──edge──┼─> node     ~~~>     drive  ──edge──┼─> overlay ──edge──> node
//!   parent ──edge──┘                     parent ──edge──┘
//! ```
//!
//! A request loads where the edge leads, enters that node's gate, and looks again. So whoever holds the node quiesced may lead its
//! edges elsewhere: requests that wait at its gate find that they must go on to the new node, and none reaches the old one.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::node::{Inner, Node};
use crate::io::{Entered, Gate};

/// A place from which a node is used: by a drive, an export, a job, or a node above. Clones are handles on the same place.
///
/// Requests go to whatever node the edge leads to when they are sent; those that wait there follow it elsewhere.
#[derive(Clone)]
pub struct Edge {
    target: Arc<ArcSwap<Node>>,
}

impl Edge {
    /// An edge to `node`.
    pub fn new(node: Arc<Node>) -> Self {
        Edge {
            target: Arc::new(ArcSwap::new(node)),
        }
    }

    /// Where it leads at present.
    pub fn node(&self) -> Arc<Node> {
        self.target.load_full()
    }

    /// Whether both are handles on the same place.
    pub fn is_same(&self, other: &Edge) -> bool {
        Arc::ptr_eq(&self.target, &other.target)
    }

    /// Leads it elsewhere. The node that it has led to is quiesced, or nobody has had the edge yet.
    pub(super) fn lead(&self, node: &Arc<Node>) {
        self.target.store(node.clone());
    }

    pub(super) fn way(&self) -> Way {
        Way::Edge(self.target.clone())
    }

    pub(super) fn target(&self) -> Arc<Inner> {
        self.target.load().inner.clone()
    }
}

impl fmt::Debug for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Edge").field(&self.node().name()).finish()
    }
}

impl Node {
    pub(super) fn way(&self) -> Way {
        Way::Node(self.inner.clone())
    }

    pub(super) fn target(&self) -> Arc<Inner> {
        self.inner.clone()
    }
}

/// A request inside of a node's gate.
pub(super) type Inside = Entered<Arc<Inner>>;

/// How a request gets to a node.
pub(super) enum Way {
    /// Straight.
    Node(Arc<Inner>),
    /// Wherever this leads.
    Edge(Arc<ArcSwap<Node>>),
}

impl Way {
    /// Where it leads at present.
    pub(super) fn target(&self) -> Arc<Inner> {
        match self {
            Way::Node(inner) => inner.clone(),
            Way::Edge(target) => target.load().inner.clone(),
        }
    }

    /// Whether it leads there still. Who is inside of that node's gate can rely on it: an edge is changed behind a closed
    /// and empty gate only.
    pub(super) fn leads_to(&self, inner: &Arc<Inner>) -> bool {
        match self {
            Way::Node(_) => true,
            Way::Edge(target) => Arc::ptr_eq(&target.load().inner, inner),
        }
    }

    /// Enters the gate of the node at the way's end, waiting while it is closed.
    ///
    /// Cancellation: nothing has happened.
    pub(super) async fn enter(&self) -> Inside {
        loop {
            let inner = self.target();
            let inside = Gate::enter_by(inner).await;
            if self.leads_to(inside.place()) {
                return inside;
            }
        }
    }
}

#[cfg(test)]
mod tests;
