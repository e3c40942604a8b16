//! Nodes, drives, and who uses whom.
//!
//! The graph is plain data with one owner, the daemon's control task: no locks inside, no I/O in its methods.
//! Opening and closing happen outside: nodes are opened first (`open`) and inserted when nothing can fail any
//! more; removed nodes are handed back to be closed.
//!
//! * `node`: a driver with the engine's part of every request; `align` and `counters` belong to it
//! * `names`: given and made-up names
//! * `drive`: what the commands of 2013 call a device

mod align;
mod counters;
mod drive;
mod names;
mod node;

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::events::EventSink;
use crate::limits::MAX_NODES;

pub use counters::{RequestCount, RequestKind};
pub use drive::{Drive, OnError};
pub use names::{NameSource, NodeName, is_well_formed};
pub use node::{Access, Behaviour, Link, Node, Quiesced};

/// All nodes and drives.
#[derive(Debug, Default)]
pub struct Graph {
    entries: Vec<Entry>,
    drives: Vec<Drive>,
    names: NameSource,
    events: EventSink,
}

#[derive(Debug)]
struct Entry {
    node: Arc<Node>,
    /// It was asked for by name and not brought along by a node on it: it stays when that one goes.
    owned: bool,
    /// Users that are not nodes: exports and jobs.
    users: Vec<(User, Access)>,
}

/// Who uses a node from outside of the graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum User {
    /// An export, by its id.
    Export(String),
    /// A job, by its id.
    Job(String),
    /// A drive, by its id.
    Drive(String),
}

/// Nodes that were opened and are not in the graph yet, layers below first. The last is the root.
///
/// Dropped, they close without a trace: nothing has been written through them.
#[derive(Debug)]
pub struct Opened {
    /// The new nodes.
    pub nodes: Vec<Arc<Node>>,
}

/// Nodes that were taken out of the graph, uppermost first. They must be closed.
#[derive(Debug)]
#[must_use]
pub struct Removed {
    nodes: Vec<Arc<Node>>,
}

impl Removed {
    /// Drains and closes them, uppermost first. All are closed whatever happens; the first error is answered.
    pub async fn close(self) -> Result<()> {
        let mut result = Ok(());
        for node in &self.nodes {
            let closed = node.close().await;
            if let Err(error) = &closed {
                log::error!("closing node '{}': {error}", node.name());
            }
            result = result.and(closed);
        }
        result
    }

    /// Whether there is nothing to close.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }
}

impl Opened {
    /// The uppermost node.
    pub fn root(&self) -> Option<&Arc<Node>> {
        self.nodes.last()
    }
}

impl Graph {
    /// An empty graph.
    pub fn new() -> Self {
        Graph::default()
    }

    /// An empty graph whose nodes report what happens to them.
    pub fn reporting(events: EventSink) -> Self {
        Graph {
            events,
            ..Graph::default()
        }
    }

    /// Where nodes report what happens to them; for `open`.
    pub fn events(&self) -> EventSink {
        self.events.clone()
    }

    /// Where made-up names come from; for `open`.
    pub fn names(&self) -> NameSource {
        self.names.clone()
    }

    /// All nodes, oldest first.
    pub fn nodes(&self) -> impl DoubleEndedIterator<Item = &Arc<Node>> {
        self.entries.iter().map(|entry| &entry.node)
    }

    /// All drives, in order of their creation.
    pub fn drives(&self) -> &[Drive] {
        &self.drives
    }

    /// The node of this name.
    pub fn node(&self, name: &str) -> Option<&Arc<Node>> {
        self.nodes().find(|node| node.name() == name)
    }

    /// The drive of this id.
    pub fn drive(&self, id: &str) -> Option<&Drive> {
        self.drives.iter().find(|drive| drive.id == id)
    }

    /// The drive of this id, to be changed.
    pub fn drive_mut(&mut self, id: &str) -> Option<&mut Drive> {
        self.drives.iter_mut().find(|drive| drive.id == id)
    }

    /// What a command means by `device` and `node-name`: a drive's root for a drive's id, else a node.
    ///
    /// `NotFound` when neither exists, `InvalidInput` for a drive without medium.
    pub fn lookup(&self, device: Option<&str>, node_name: Option<&str>) -> Result<&Arc<Node>> {
        if let Some(drive) = device.and_then(|id| self.drive(id)) {
            return drive.root.as_ref().ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidInput,
                    format!("Device '{}' has no medium", drive.id),
                )
            });
        }
        node_name.and_then(|name| self.node(name)).ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!(
                    "Cannot find device='{}' nor node-name='{}'",
                    device.unwrap_or_default(),
                    node_name.unwrap_or_default()
                ),
            )
        })
    }

    /// Takes opened nodes into the graph and answers the root. Atomic: on error the graph is as before.
    ///
    /// Refused are names that are taken by now, layers below that have been deleted meanwhile, and access that
    /// another user excludes.
    pub fn insert(&mut self, opened: Opened) -> Result<Arc<Node>> {
        let Some(root) = opened.root().cloned() else {
            return Err(Error::new(ErrorKind::InvalidInput, "No node was opened"));
        };
        if self.entries.len() + opened.nodes.len() > MAX_NODES {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("There are {MAX_NODES} nodes already"),
            ));
        }
        let mut new_links: Vec<(String, &Link)> = Vec::new();
        for (place, node) in opened.nodes.iter().enumerate() {
            let earlier = &opened.nodes[..place];
            let taken = earlier.iter().any(|other| other.name() == node.name());
            if taken || !self.is_free(node.name()) {
                return Err(duplicate(node.name()));
            }
            for link in node.links() {
                let mut known = earlier.iter().chain(self.nodes());
                if !known.any(|other| Arc::ptr_eq(other, &link.node)) {
                    return Err(not_found(link.node.name()));
                }
                let user = link_user(node, link);
                for (other, earlier) in &new_links {
                    if Arc::ptr_eq(&earlier.node, &link.node)
                        && earlier.access.conflicts(link.access)
                    {
                        return Err(conflict(&link.node, (&user, link.access), other));
                    }
                }
                self.check_access(&link.node, link.access, &user)?;
                new_links.push((user, link));
            }
        }
        drop(new_links);
        let entries = opened.nodes.into_iter().map(|node| Entry {
            owned: node.is_named() && Arc::ptr_eq(&node, &root),
            node,
            users: Vec::new(),
        });
        self.entries.extend(entries);
        Ok(root)
    }

    /// Whether a new node or drive may have this name: they share one name space.
    fn is_free(&self, name: &str) -> bool {
        self.node(name).is_none() && self.drive(name).is_none()
    }

    /// `blockdev-del`: takes a node out, with those below it that came with a node on them and that nobody else uses.
    pub fn remove(&mut self, name: &str) -> Result<Removed> {
        let Some(entry) = self.entry(name) else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("Failed to find node with node-name='{name}'"),
            ));
        };
        let in_use = |message: String| Err(Error::new(ErrorKind::InUse, message));
        if !entry.users.is_empty() {
            return in_use(format!("Node {name} is in use"));
        }
        let node = entry.node.clone();
        let backed = self.parents(&node).find(|(_, link)| link.role == "backing");
        if let Some((parent, _)) = backed {
            let parent = parent.name();
            return in_use(format!(
                "Node '{name}' is busy: node is used as backing hd of '{parent}'"
            ));
        }
        if !entry.owned {
            return in_use(format!("Node {name} is not owned by the monitor"));
        }
        if self.has_parent(&node) {
            return in_use(format!("Block device {name} is in use"));
        }
        Ok(self.take_out(&node))
    }

    /// Takes everything out, uppermost first: the end of the process. Whoever used the nodes is gone.
    pub fn remove_all(&mut self) -> Removed {
        self.drives.clear();
        let mut nodes: Vec<Arc<Node>> = self.entries.drain(..).map(|entry| entry.node).collect();
        // Layers below were inserted before what stands on them.
        nodes.reverse();
        Removed { nodes }
    }

    /// Registers an export or job as a user of a node, so that the node stays.
    pub fn add_user(&mut self, node: &Arc<Node>, user: User, access: Access) -> Result<()> {
        if access.writes && node.behaviour().read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "Block node is read-only"));
        }
        self.check_access(node, access, &user.describe())?;
        let Some(entry) = self.entry_mut(node) else {
            return Err(not_found(node.name()));
        };
        entry.users.push((user, access));
        Ok(())
    }

    /// The user is gone.
    pub fn remove_user(&mut self, node: &Arc<Node>, user: &User) {
        if let Some(entry) = self.entry_mut(node)
            && let Some(place) = entry.users.iter().position(|(other, _)| other == user)
        {
            entry.users.remove(place);
        }
    }

    /// Who uses a node from outside of the graph.
    pub fn users(&self, node: &Arc<Node>) -> impl Iterator<Item = &User> {
        self.entries
            .iter()
            .filter(|entry| Arc::ptr_eq(&entry.node, node))
            .flat_map(|entry| entry.users.iter().map(|(user, _)| user))
    }

    /// The nodes that stand on this one, with the role it has for them.
    pub fn parents(&self, node: &Arc<Node>) -> impl Iterator<Item = (&Arc<Node>, &Link)> {
        let links = self
            .nodes()
            .flat_map(|parent| parent.links().iter().map(move |link| (parent, link)));
        links.filter(move |(_, link)| Arc::ptr_eq(&link.node, node))
    }

    /// Adds a drive. Its root, if it has one, is in the graph and becomes used by it.
    pub fn add_drive(&mut self, drive: Drive) -> Result<()> {
        if !is_well_formed(&drive.id) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("Invalid drive id: '{}'", drive.id),
            ));
        }
        if self.drive(&drive.id).is_some() {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("Duplicate ID '{}' for drive", drive.id),
            ));
        }
        if self.node(&drive.id).is_some() {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("Device with id '{}' is a node's name already", drive.id),
            ));
        }
        if let Some(root) = drive.root.clone() {
            let access = Access {
                writes: !root.behaviour().read_only,
                shares_writes: true,
            };
            self.add_user(&root, User::Drive(drive.id.clone()), access)?;
        }
        self.drives.push(drive);
        Ok(())
    }

    /// Takes a drive out, and its root with what is below as far as it came with the root and nobody uses it.
    pub fn remove_drive(&mut self, id: &str) -> Result<Removed> {
        let Some(place) = self.drives.iter().position(|drive| drive.id == id) else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("Device '{id}' not found"),
            ));
        };
        let own = User::Drive(id.to_owned());
        let others = |root: &Arc<Node>| self.users(root).any(|user| *user != own);
        if self.drives[place].root.as_ref().is_some_and(others) {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("Device '{id}' is in use"),
            ));
        }
        let drive = self.drives.remove(place);
        let Some(root) = drive.root else {
            return Ok(Removed { nodes: Vec::new() });
        };
        self.remove_user(&root, &own);
        if self.is_owned(&root) || self.has_parent(&root) {
            return Ok(Removed { nodes: Vec::new() });
        }
        Ok(self.take_out(&root))
    }

    /// Takes out a node that nobody uses, and what only it used and came with a node on it.
    fn take_out(&mut self, node: &Arc<Node>) -> Removed {
        let mut nodes = Vec::new();
        let mut unused = vec![node.clone()];
        while let Some(node) = unused.pop() {
            self.entries
                .retain(|entry| !Arc::ptr_eq(&entry.node, &node));
            for link in node.links() {
                let below = &link.node;
                let free = self.entry(below.name()).is_some_and(|entry| {
                    Arc::ptr_eq(&entry.node, below) && entry.users.is_empty() && !entry.owned
                });
                let queued = unused.iter().any(|other| Arc::ptr_eq(other, below));
                if free && !queued && !self.has_parent(below) {
                    unused.push(below.clone());
                }
            }
            nodes.push(node);
        }
        Removed { nodes }
    }

    /// Whether the node was asked for by name.
    fn is_owned(&self, node: &Arc<Node>) -> bool {
        self.entry(node.name()).is_some_and(|entry| entry.owned)
    }

    fn has_parent(&self, node: &Arc<Node>) -> bool {
        self.parents(node).next().is_some()
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.node.name() == name)
    }

    fn entry_mut(&mut self, node: &Arc<Node>) -> Option<&mut Entry> {
        self.entries
            .iter_mut()
            .find(|entry| Arc::ptr_eq(&entry.node, node))
    }

    /// Whether a new user may have this access beside those that a node has.
    fn check_access(&self, node: &Arc<Node>, wanted: Access, user: &str) -> Result<()> {
        let parent = self
            .parents(node)
            .find(|(_, link)| link.access.conflicts(wanted))
            .map(|(parent, link)| link_user(parent, link));
        let outside = || {
            let entry = self.entry(node.name())?;
            let mut users = entry.users.iter();
            let (user, _) = users.find(|(_, access)| access.conflicts(wanted))?;
            Some(user.describe())
        };
        match parent.or_else(outside) {
            None => Ok(()),
            Some(other) => Err(conflict(node, (user, wanted), &other)),
        }
    }
}

fn link_user(parent: &Arc<Node>, link: &Link) -> String {
    format!(
        "node '{}' (uses node as '{}' child)",
        parent.name(),
        link.role
    )
}

fn conflict(node: &Arc<Node>, (user, wanted): (&str, Access), other: &str) -> Error {
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

impl User {
    fn describe(&self) -> String {
        match self {
            User::Export(id) => format!("export '{id}'"),
            User::Job(id) => format!("job '{id}'"),
            User::Drive(id) => format!("block device '{id}'"),
        }
    }
}

fn duplicate(name: &str) -> Error {
    Error::new(
        ErrorKind::AlreadyExists,
        format!("Duplicate nodes with node-name='{name}'"),
    )
}

fn not_found(name: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("Cannot find device='{name}' nor node-name='{name}'"),
    )
}

#[cfg(test)]
mod tests;
