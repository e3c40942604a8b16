//! Who uses a node, what for, and who may do so beside whom.

use std::collections::HashSet;
use std::sync::Arc;

use super::Graph;
use super::edge::Edge;
use super::node::{Link, Node};
use super::table::place;
use crate::error::{Error, ErrorKind, Result};
use crate::open::DriverOptions;

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

    /// As [`Access::BACKING`], where no guest minds: as long as nobody writes to the node but a job that keeps what is overwritten below.
    pub(super) const WRITTEN_BACKING: Access = Access {
        writes: false,
        shares_writes: true,
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

/// Who changes the size of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resizer<'a> {
    /// A command that is about nothing else. Exports and drives go on with the new size.
    Command,
    /// A job of this id, for which the node is mere space.
    Job(&'a str),
}

impl Resizer<'_> {
    fn describe(self) -> String {
        match self {
            Resizer::Command => "a command".to_owned(),
            Resizer::Job(id) => User::Job(id.to_owned()).describe(),
        }
    }
}

/// What a layer means to the node on it.
pub(super) enum Layer {
    /// The node shows it as it is.
    Filtered,
    /// It has the content and nothing else.
    Data,
    /// It has the node's own structures, content or not.
    Image,
    /// It is shown where the node has nothing.
    Backing,
    /// A snapshot in it is shown, which does not change.
    Snapshot,
    /// What the node shows is copied to it.
    Target,
}

/// What the layer of this role means to a node.
pub(super) fn layer(node: &Node, role: &str) -> Layer {
    match role {
        "backing" => Layer::Backing,
        "data-file" => Layer::Data,
        Link::TARGET => Layer::Target,
        Link::IMAGE => Layer::Snapshot,
        _ => match node.options().as_deref().map(|options| &options.driver) {
            Some(DriverOptions::Raw(raw)) if raw.offset.is_some() || raw.size.is_some() => {
                Layer::Data
            }
            Some(DriverOptions::Qcow2(_)) => Layer::Image,
            _ if node.driver().info().driver == "qcow2" => Layer::Image,
            _ => Layer::Filtered,
        },
    }
}

impl Graph {
    /// Refuses what would disturb a block job that has this node for itself: that it copies to, or by way of.
    pub fn check_no_block_job(&self, node: &Arc<Node>) -> Result<()> {
        let mut users = self.users(node);
        let is_way = node.driver().is_filter() && users.any(|user| !user.follows());
        match is_way || self.is_target(node) {
            false => Ok(()),
            true => Err(self.busy(node, Busy::BlockJob)),
        }
    }

    /// Refuses a node to which a job copies.
    pub fn check_no_target(&self, node: &Arc<Node>) -> Result<()> {
        match self.is_target(node) {
            false => Ok(()),
            true => Err(self.busy(node, Busy::BlockJob)),
        }
    }

    /// The error that a node is taken, as QEMU puts it. A drive's root goes by the drive's name.
    pub fn busy(&self, node: &Arc<Node>, reason: Busy<'_>) -> Error {
        let reason = match reason {
            Busy::BlockJob => "block device is in use by block job: backup".to_owned(),
            Busy::Backing(overlay) => format!("node is used as backing hd of '{}'", overlay.name()),
        };
        let drive = self.users(node).find_map(|user| match user {
            User::Drive(id) => Some(id.as_str()),
            User::Export(_) | User::Job(_) => None,
        });
        let name = drive.unwrap_or(node.name());
        Error::new(ErrorKind::InUse, format!("Node '{name}' is busy: {reason}"))
    }

    fn is_target(&self, node: &Arc<Node>) -> bool {
        let mut parents = self.parents(node);
        parents.any(|(parent, link)| link.role == Link::TARGET && parent.driver().is_filter())
    }

    /// Refuses other content for a node that a block job copies, or copies to, by way of whatever stands on it.
    pub(super) fn check_not_copied(&self, node: &Arc<Node>) -> Result<()> {
        match self
            .shown_by(node)
            .iter()
            .any(|above| self.check_no_block_job(above).is_err())
        {
            false => Ok(()),
            true => Err(self.busy(node, Busy::BlockJob)),
        }
    }

    /// The node, and all above it that show what it holds.
    fn shown_by(&self, node: &Arc<Node>) -> Vec<Arc<Node>> {
        let mut shown = vec![node.clone()];
        let mut seen = HashSet::from([place(node)]);
        let mut next = 0;
        while let Some(below) = shown.get(next).cloned() {
            next += 1;
            for (parent, link) in self.parents(&below) {
                if link.shows() && seen.insert(place(parent)) {
                    shown.push(parent.clone());
                }
            }
        }
        shown
    }

    /// Whether the size of a node may be changed beside those who use it: not below an image, nor what is being copied.
    pub fn check_resize(&self, node: &Arc<Node>, by: Resizer<'_>) -> Result<()> {
        self.check_no_target(node)?;
        let refused = |below: &Arc<Node>, other: &str| {
            Error::new(
                ErrorKind::InUse,
                format!(
                    "Permission conflict on node '{}': resizing by {} is excluded by {other}",
                    below.name(),
                    by.describe()
                ),
            )
        };
        let mut open = vec![node.clone()];
        while let Some(next) = open.pop() {
            for user in self.users(&next) {
                let shares = match (user, by) {
                    (User::Export(_) | User::Drive(_), Resizer::Command) => true,
                    (User::Job(_), Resizer::Command) => next.driver().is_filter(),
                    (User::Job(id), Resizer::Job(own)) => id == own,
                    (User::Export(_) | User::Drive(_), Resizer::Job(_)) => false,
                };
                if !shares {
                    return Err(refused(&next, &user.describe()));
                }
            }
            for (parent, link) in self.parents(&next) {
                match layer(parent, link.role) {
                    Layer::Snapshot => {}
                    Layer::Filtered if link.access.shares_writes => open.push(parent.clone()),
                    _ => return Err(refused(&next, &link_user(parent, &link))),
                }
            }
        }
        Ok(())
    }

    /// Whether a new user may have this access beside those that a node has.
    pub(super) fn check_access(&self, node: &Arc<Node>, wanted: Access, user: &str) -> Result<()> {
        check(node, (user, wanted), &self.uses(node))
    }

    /// Lets others write to the backing of nodes that no guest writes to.
    pub(super) fn share_as_backing(&self, node: &Arc<Node>) {
        for (overlay, link) in self.parents(node) {
            if link.role == "backing" && !self.has_guest(overlay) {
                overlay.set_access("backing", Access::WRITTEN_BACKING);
            }
        }
    }

    /// Whether a guest writes to a node, or to what shows it.
    fn has_guest(&self, node: &Arc<Node>) -> bool {
        self.shown_by(node).iter().any(|above| {
            let entry = self.table.of(above).into_iter();
            let mut users = entry.flat_map(|entry| &entry.users);
            users.any(|user| user.access.writes && user.user.follows())
        })
    }

    /// Refuses a guest for a node that shows what others write below it. From then on nobody else may.
    pub(super) fn keep_backings(&self, node: &Arc<Node>) -> Result<()> {
        let mut kept = Vec::new();
        let mut open = vec![node.clone()];
        while let Some(next) = open.pop() {
            for link in next.links().into_iter().filter(Link::shows) {
                let below = link.edge.node();
                if link.role == "backing" && link.access.shares_writes {
                    let user = link_user(&next, &link);
                    check(&below, (&user, Access::BACKING), &self.uses(&below))?;
                    kept.push(next.clone());
                }
                open.push(below);
            }
        }
        for node in kept {
            node.set_access("backing", Access::BACKING);
        }
        Ok(())
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

/// Why nobody else may have a node.
#[derive(Debug, Clone, Copy)]
pub enum Busy<'a> {
    /// A block job has it for itself.
    BlockJob,
    /// It is the backing of this one.
    Backing(&'a Node),
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
