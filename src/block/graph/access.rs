//! Who uses a node, what for, and who may do so beside whom.

use std::sync::Arc;

use super::Graph;
use super::edge::Edge;
use super::node::{Link, Node};
use crate::error::{Error, ErrorKind, Result};

/// What a user of a node does to it, and what it lets other users do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// It writes or resizes.
    pub writes: bool,
    /// Others may.
    pub shares_writes: bool,
}

impl Access {
    /// What a node does to its backing: it reads, and what it reads must stay as it is.
    pub const BACKING: Access = Access {
        writes: false,
        shares_writes: false,
    };

    pub(super) fn conflicts(self, other: Access) -> bool {
        (self.writes && !other.shares_writes) || (other.writes && !self.shares_writes)
    }
}

/// Who uses a node from outside of the graph.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum User {
    /// An export, by its id.
    Export(String),
    /// A job, by its id.
    Job(String),
    /// A drive, by its id.
    Drive(String),
}

impl User {
    pub(super) fn describe(&self) -> String {
        match self {
            User::Export(id) => format!("export '{id}'"),
            User::Job(id) => format!("job '{id}'"),
            User::Drive(id) => format!("block device '{id}'"),
        }
    }

    /// Whether it goes on to the node that takes the place of the one it uses. A job is about the very node that it was given.
    pub(super) fn follows(&self) -> bool {
        match self {
            User::Export(_) | User::Drive(_) => true,
            User::Job(_) => false,
        }
    }
}

/// A use of a node from outside of the graph.
#[derive(Debug)]
pub(super) struct Use {
    pub(super) user: User,
    pub(super) access: Access,
    /// Leads to the node in whose entry this is.
    pub(super) edge: Edge,
}

impl Graph {
    /// Whether a new user may have this access beside those that a node has.
    pub(super) fn check_access(&self, node: &Arc<Node>, wanted: Access, user: &str) -> Result<()> {
        check(node, (user, wanted), &self.uses(node))
    }

    /// How a node is used at present, and by whom.
    pub(super) fn uses(&self, node: &Arc<Node>) -> Vec<(String, Access)> {
        let parents = self
            .parents(node)
            .map(|(parent, link)| (link_user(parent, &link), link.access));
        let outside = self.table.of(node).into_iter();
        let outside = outside.flat_map(|entry| &entry.users);
        parents
            .chain(outside.map(|user| (user.user.describe(), user.access)))
            .collect()
    }
}

/// Whether a new user may have this access beside others.
pub(super) fn check(
    node: &Node,
    (user, wanted): (&str, Access),
    uses: &[(String, Access)],
) -> Result<()> {
    match uses.iter().find(|(_, access)| access.conflicts(wanted)) {
        None => Ok(()),
        Some((other, _)) => Err(conflict(node, (user, wanted), other)),
    }
}

/// A node as the user of what is below it.
pub(super) fn link_user(parent: &Node, link: &Link) -> String {
    format!(
        "node '{}' (uses node as '{}' child)",
        parent.name(),
        link.role
    )
}

/// The error that somebody wants to use a node in a way that another excludes.
pub(super) fn conflict(node: &Node, (user, wanted): (&str, Access), other: &str) -> Error {
    let (writer, excluder) = if wanted.writes {
        (user, other)
    } else {
        (other, user)
    };
    Error::new(
        ErrorKind::InUse,
        format!(
            "Permission conflict on node '{}': writing by {writer} is excluded by {excluder}",
            node.name()
        ),
    )
}
