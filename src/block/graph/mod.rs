//! Nodes, drives, and who uses whom.
//!
//! The graph is plain data with one owner, the daemon's control task: no locks inside, no I/O in its methods.
//! Opening and closing happen outside: nodes are opened first (`open`) and inserted when nothing can fail any
//! more; removed nodes are handed back to be closed.
//!
//! * `node`: a driver with the engine's part of every request; `requests`, `align` and `counters` belong to it
//! * `edge`: how users reach nodes, and follow when others take their place
//! * `change`: nodes put above others, replaced, and taken out, while their users go on
//! * `reopen`: nodes that become read-only, writable, or stand on other layers
//! * `access`: who may write beside whom
//! * `claims`: files that are held ready for that
//! * `quiesce`: several nodes held still
//! * `table`: the nodes, found by name and by what they stand on
//! * `diagram`: the graph as a drawing
//! * `directory`: what names refer to, for those who are elsewhere
//! * `names`: given and made-up names
//! * `drive`: what the commands of 2013 call a device; `device` is what its guests see of it

mod access;
mod align;
mod change;
mod claims;
mod counters;
mod device;
mod diagram;
mod directory;
mod drive;
mod edge;
mod names;
mod node;
mod quiesce;
mod reopen;
mod requests;
mod table;
mod write_down;

use std::collections::HashMap;
use std::sync::Arc;

use crate::driver::Claim;
use crate::error::{Error, ErrorKind, Result};
use crate::events::EventSink;
use crate::limits::MAX_NODES;

pub use access::{Access, Busy, Resizer, User};
pub use claims::claim;
pub use counters::{RequestCount, RequestKind};
pub use device::{
    Client, DriveStats, ErrorAction, ErrorPolicy, GuestError, IoStatus, Machine, OnError, RunState,
    Totals,
};
pub use diagram::{Arrow, Diagram, Permissions, Vertex, VertexKind};
pub use directory::Directory;
pub use drive::{Drive, NewDrive};
pub use edge::Edge;
pub use names::{NameSource, NodeName, is_well_formed};
pub use node::{Behaviour, Link, Node, Quiesced};
pub use quiesce::{FlushesHeld, hold_flushes_within, quiesce_all, quiesce_all_within};
pub use reopen::{NodeChange, ReadyToReopen, Reopen};
pub use table::place;
pub use write_down::write_down;

use access::{Use, link_user};
use device::Device;
use table::Table;

/// All nodes and drives.
#[derive(Debug, Default)]
pub struct Graph {
    table: Table,
    drives: Vec<Drive>,
    /// Where each drive is among them, by its id.
    drive_places: HashMap<String, usize>,
    /// All drives are disks of one machine.
    machine: Machine,
    names: NameSource,
    events: EventSink,
}

/// Nodes that were opened and are not in the graph yet, layers below first. The last is the root.
///
/// Dropped, they close without a trace: nothing has been written through them.
#[derive(Debug)]
pub struct Opened {
    /// The new nodes.
    pub nodes: Vec<Arc<Node>>,
    /// What they need of the files that they are on.
    claim: Claim,
}

/// Nodes that were taken out of the graph, uppermost first. They must be closed.
#[derive(Debug)]
#[must_use]
pub struct Removed {
    nodes: Vec<Arc<Node>>,
    /// Files that stay, and are written until these are closed.
    claim: Claim,
}

impl Removed {
    /// Nothing to close.
    fn nothing() -> Self {
        Removed {
            nodes: Vec::new(),
            claim: Claim::none(),
        }
    }

    fn add(&mut self, other: Removed) {
        self.nodes.extend(other.nodes);
        self.claim.add(other.claim);
    }

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

impl From<Vec<Arc<Node>>> for Opened {
    /// Nodes that are on no file.
    fn from(nodes: Vec<Arc<Node>>) -> Self {
        Opened::new(nodes, Claim::none())
    }
}

impl Opened {
    /// Nodes for which this has been claimed.
    pub fn new(nodes: Vec<Arc<Node>>, claim: Claim) -> Self {
        Opened { nodes, claim }
    }

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

    /// What names refer to; for `open`.
    pub fn directory(&self) -> Directory {
        self.table.directory.clone()
    }

    /// All nodes, oldest first.
    pub fn nodes(&self) -> impl DoubleEndedIterator<Item = &Arc<Node>> {
        self.table.nodes()
    }

    /// All drives, in order of their creation.
    pub fn drives(&self) -> &[Drive] {
        &self.drives
    }

    /// The machine whose disks the drives are.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The node of this name.
    pub fn node(&self, name: &str) -> Option<&Arc<Node>> {
        self.table.get(name).map(|entry| &entry.node)
    }

    /// The drive of this id.
    pub fn drive(&self, id: &str) -> Option<&Drive> {
        self.drives.get(*self.drive_places.get(id)?)
    }

    /// What a command means by `device` and `node-name`: a drive's root for a drive's id, else a node.
    ///
    /// `NotFound` when neither exists, `InvalidInput` for a drive without medium.
    pub fn lookup(&self, device: Option<&str>, node_name: Option<&str>) -> Result<Arc<Node>> {
        if let Some(drive) = device.and_then(|id| self.drive(id)) {
            return drive.node().ok_or_else(|| {
                Error::new(
                    ErrorKind::InvalidInput,
                    format!("Device '{}' has no medium", drive.id),
                )
            });
        }
        let node = node_name.and_then(|name| self.node(name));
        node.cloned().ok_or_else(|| {
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
        self.insert_beside(opened, None)
    }

    /// As [`Graph::insert`], where all who use `left` and can follow are going to leave it.
    fn insert_beside(&mut self, opened: Opened, left: Option<&Arc<Node>>) -> Result<Arc<Node>> {
        let Some(root) = opened.root().cloned() else {
            return Err(Error::new(ErrorKind::InvalidInput, "No node was opened"));
        };
        if self.table.len() + opened.nodes.len() > MAX_NODES {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("There are {MAX_NODES} nodes already"),
            ));
        }
        let mut new_links: Vec<(String, Arc<Node>, Access)> = Vec::new();
        // Nodes whose backing is written by others.
        let mut over_written = Vec::new();
        for (place, node) in opened.nodes.iter().enumerate() {
            let earlier = &opened.nodes[..place];
            let taken = earlier.iter().any(|other| other.name() == node.name());
            // They share one name space.
            if self.drive(node.name()).is_some() {
                return Err(Error::name_of_drive(node.name()));
            }
            if taken || self.node(node.name()).is_some() {
                return Err(Error::name_of_node(node.name()));
            }
            for link in node.links() {
                let below = link.edge.node();
                let comes_along = earlier.iter().any(|other| Arc::ptr_eq(other, &below));
                if !comes_along && self.table.of(&below).is_none() {
                    return Err(not_found(below.name()));
                }
                let user = link_user(node, &link);
                for (other, earlier, access) in &new_links {
                    if Arc::ptr_eq(earlier, &below) && access.conflicts(link.access) {
                        return Err(access::conflict(&below, (&user, link.access), other));
                    }
                }
                if link.access.writes {
                    self.share_as_backing(&below);
                }
                let uses = match left.is_some_and(|left| Arc::ptr_eq(left, &below)) {
                    true => self.uses_of_jobs(&below),
                    false => self.uses(&below),
                };
                let refused = access::check(&below, (&user, link.access), &uses);
                if refused.is_err() && link.role == "backing" {
                    access::check(&below, (&user, Access::WRITTEN_BACKING), &uses)?;
                    over_written.push(node);
                } else {
                    refused?;
                }
                new_links.push((user, below, link.access));
            }
        }
        drop(new_links);
        for node in over_written {
            node.set_access("backing", Access::WRITTEN_BACKING);
        }
        for node in &opened.nodes {
            let owned = node.is_named() && Arc::ptr_eq(node, &root);
            self.table.add(node, owned);
        }
        self.settle(&opened.nodes);
        drop(opened.claim);
        Ok(root)
    }

    /// `blockdev-del`: takes a node out, with those below it that came with a node on them and that nobody else uses.
    pub fn remove(&mut self, name: &str) -> Result<Removed> {
        let Some(entry) = self.table.get(name) else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("Failed to find node with node-name='{name}'"),
            ));
        };
        let in_use = |message: String| Err(Error::new(ErrorKind::InUse, message));
        self.check_no_block_job(&entry.node)?;
        if !entry.users.is_empty() {
            return in_use(format!("Node {name} is in use"));
        }
        let node = entry.node.clone();
        let backed = self.parents(&node).find(|(_, link)| link.role == "backing");
        if let Some((parent, _)) = backed {
            return Err(self.busy(&node, Busy::Backing(parent)));
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
        self.drive_places.clear();
        let table = std::mem::take(&mut self.table);
        let nodes = quiesce::uppermost_first(table.nodes().rev());
        Removed {
            nodes,
            claim: Claim::none(),
        }
    }

    /// Registers an export, job or drive as a user of a node, so that the node stays. Answers the edge by which it is used: that
    /// leads to whatever takes the node's place.
    pub fn add_user(&mut self, node: &Arc<Node>, user: User, access: Access) -> Result<Edge> {
        let edge = Edge::new(node.clone());
        self.add_use(Use {
            user,
            access,
            edge: edge.clone(),
        })?;
        Ok(edge)
    }

    fn add_use(&mut self, new: Use) -> Result<()> {
        let node = new.edge.node();
        if new.access.writes && node.behaviour().read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "Block node is read-only"));
        }
        if new.access.writes {
            self.share_as_backing(&node);
        }
        self.check_access(&node, new.access, &new.user.describe())?;
        if new.access.writes && new.user.follows() {
            self.keep_backings(&node)?;
        }
        let Some(entry) = self.table.of_mut(&node) else {
            return Err(not_found(node.name()));
        };
        entry.users.push(new);
        self.settle([&node]);
        Ok(())
    }

    /// The user that has this edge is gone.
    pub fn remove_user(&mut self, edge: &Edge) {
        let node = edge.node();
        if let Some(entry) = self.table.of_mut(&node) {
            entry.users.retain(|user| !user.edge.is_same(edge));
            self.settle([&node]);
        }
    }

    /// Who uses a node from outside of the graph.
    pub fn users(&self, node: &Arc<Node>) -> impl Iterator<Item = &User> {
        let entry = self.table.of(node).into_iter();
        entry.flat_map(|entry| entry.users.iter().map(|user| &user.user))
    }

    /// All users from outside of the graph, node by node.
    fn uses_from_outside(&self) -> impl Iterator<Item = &Use> {
        self.nodes()
            .filter_map(|node| self.table.of(node))
            .flat_map(|entry| &entry.users)
    }

    /// The nodes that stand on this one, with the role it has for them.
    pub fn parents(&self, node: &Arc<Node>) -> impl Iterator<Item = (&Arc<Node>, Link)> {
        let above = self.table.above(node).iter();
        let links =
            above.flat_map(|parent| parent.links().into_iter().map(move |link| (parent, link)));
        links.filter(|(_, link)| Arc::ptr_eq(&link.edge.node(), node))
    }

    /// Adds a drive. Its root, if it has one, is in the graph and becomes used by it.
    pub fn add_drive(&mut self, new: NewDrive) -> Result<()> {
        let NewDrive { id, root, policy } = new;
        if !is_well_formed(&id) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("Invalid drive id: '{id}'"),
            ));
        }
        if self.drive(&id).is_some() {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("Duplicate ID '{id}' for drive"),
            ));
        }
        if self.node(&id).is_some() {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("Device with id '{id}' is a node's name already"),
            ));
        }
        let use_root = |root: Arc<Node>| {
            let access = Access {
                writes: !root.behaviour().read_only,
                shares_writes: true,
            };
            self.add_user(&root, User::Drive(id.clone()), access)
        };
        let root = root.map(use_root).transpose()?;
        let device = Device::new(&id, root.clone(), policy, &self.machine, &self.events);
        if let Some(root) = &root {
            self.table.directory.add_drive(&id, root);
        }
        self.drive_places.insert(id.clone(), self.drives.len());
        self.drives.push(Drive { id, root, device });
        Ok(())
    }

    /// Takes a drive out, and its root with what is below as far as it came with the root and nobody uses it.
    pub fn remove_drive(&mut self, id: &str) -> Result<Removed> {
        let Some(place) = self.drive_places.get(id).copied() else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("Device '{id}' not found"),
            ));
        };
        let own = User::Drive(id.to_owned());
        let others = |root: Arc<Node>| self.users(&root).any(|user| *user != own);
        if self.drives[place].node().is_some_and(others) {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("Device '{id}' is in use"),
            ));
        }
        let drive = self.drives.remove(place);
        let places = self.drives.iter().enumerate();
        self.drive_places = places
            .map(|(place, drive)| (drive.id.clone(), place))
            .collect();
        self.table.directory.remove(id);
        let Some(edge) = drive.root else {
            return Ok(Removed::nothing());
        };
        self.remove_user(&edge);
        let root = edge.node();
        if self.is_owned(&root) || self.has_parent(&root) {
            return Ok(Removed::nothing());
        }
        Ok(self.take_out(&root))
    }

    /// Takes out a node that nobody uses, and what only it used and came with a node on it.
    fn take_out(&mut self, node: &Arc<Node>) -> Removed {
        let mut nodes = Vec::new();
        let mut unused = vec![node.clone()];
        while let Some(node) = unused.pop() {
            self.table.remove(&node);
            for link in node.links() {
                let below = link.edge.node();
                let entry = self.table.of(&below);
                let free = entry.is_some_and(|entry| entry.users.is_empty() && !entry.owned);
                let queued = unused.iter().any(|other| Arc::ptr_eq(other, &below));
                if free && !queued && !self.has_parent(&below) {
                    unused.push(below);
                }
            }
            nodes.push(node);
        }
        let claim = claims::keep(&nodes);
        self.settle(&nodes);
        Removed { nodes, claim }
    }

    /// Whether the node was asked for by name.
    pub(crate) fn is_owned(&self, node: &Arc<Node>) -> bool {
        self.table.of(node).is_some_and(|entry| entry.owned)
    }

    /// The nodes that show a snapshot of this one.
    pub(crate) fn views(&self, node: &Arc<Node>) -> impl Iterator<Item = &Arc<Node>> {
        let parents = self.parents(node);
        parents.filter_map(|(parent, link)| (link.role == Link::IMAGE).then_some(parent))
    }

    fn has_parent(&self, node: &Arc<Node>) -> bool {
        self.parents(node).next().is_some()
    }
}

fn not_found(name: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("Cannot find device='{name}' nor node-name='{name}'"),
    )
}

#[cfg(test)]
mod tests;
