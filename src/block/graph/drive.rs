//! Drives: a node with the facts of a disk in a machine around it.

use std::collections::VecDeque;
use std::sync::Arc;

use super::device::{Client, Device, DriveStats, ErrorPolicy, GuestError, IoStatus};
use super::edge::Edge;
use super::node::Node;

/// A drive to add.
#[derive(Debug, Clone)]
pub struct NewDrive {
    /// Its id, in one name space with nodes.
    pub id: String,
    /// The uppermost layer; `None` without medium.
    pub root: Option<Arc<Node>>,
    /// What happens when requests of its guests fail.
    pub policy: ErrorPolicy,
}

impl NewDrive {
    /// A drive with the usual settings.
    pub fn new(id: impl Into<String>, root: Option<Arc<Node>>) -> Self {
        NewDrive {
            id: id.into(),
            root,
            policy: ErrorPolicy::default(),
        }
    }
}

/// What a guest sees as a disk, and what the commands of 2013 call a device.
#[derive(Debug)]
pub struct Drive {
    /// Its id, in one name space with nodes.
    pub id: String,
    /// The uppermost layer; `None` without medium.
    pub root: Option<Edge>,
    pub(super) device: Arc<Device>,
}

impl Drive {
    /// The node at its root; `None` without medium.
    pub fn node(&self) -> Option<Arc<Node>> {
        self.root.as_ref().map(Edge::node)
    }

    /// The data path for guests: requests are held while the machine stands still, and errors are treated by the drive's policy.
    pub fn client(&self) -> Arc<Client> {
        self.device.client()
    }

    /// How its last requests went; `None` for a drive that never stops the machine.
    pub fn io_status(&self) -> Option<IoStatus> {
        self.device.io_status()
    }

    /// The past is forgotten: the machine goes on.
    pub fn reset_io_status(&self) {
        self.device.reset_io_status();
    }

    /// What its guests have done.
    pub fn stats(&self) -> DriveStats {
        self.device.stats()
    }

    /// Errors of which users have not been told, the oldest first.
    pub fn take_untold_errors(&self) -> VecDeque<GuestError> {
        self.device.take_untold_errors()
    }
}
