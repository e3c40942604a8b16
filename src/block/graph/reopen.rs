//! Nodes that go on otherwise: read-only or writable, with another behaviour, on other layers. All at once, or not at all.
//!
//! ```text
//!   Graph::reopen  checks the whole change          on the owner of the graph
//!     -> prepare   drivers do what can fail         requests go on, but where layers change
//!       -> Graph::reopened  checks again, makes it  on the owner of the graph
//! ```
//!
//! Drivers prepare from the top down, and each while the layers below it still answer: an image that becomes read-only is written back
//! through them. Only then are layers held from which others are to take over.
//!
//! The file below a format becomes read-only with it, unless somebody else writes to it, so that other programs can read an image
//! that nobody here writes to. It becomes writable with the format, unless the user wants it read-only.

use std::collections::HashMap;
use std::sync::Arc;

use super::access::conflict;
use super::claims::claim;
use super::node::{Behaviour, Link, Node, Quiesced};
use super::quiesce::{quiesce_all, uppermost_first};
use super::table::place;
use super::{Access, Graph, Removed, link_user, not_found};
use crate::driver::{
    Child, Claim, DriverSettings, Need, NewFile, ReopenOptions, Reopening, Requests as _,
};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::MAX_CHAIN_DEPTH;
use crate::open::NodeOptions;

/// What is to become of a node.
#[derive(Debug, Clone)]
pub struct NodeChange {
    /// The node.
    pub node: Arc<Node>,
    /// How it behaves then.
    pub behaviour: Behaviour,
    /// Layers that are others then, by role; `None` takes a backing away.
    pub layers: Vec<(&'static str, Option<Arc<Node>>)>,
    /// What only its driver has, if that changes.
    pub settings: Option<DriverSettings>,
    /// What it is asked to be then, if that is known.
    pub options: Option<Arc<NodeOptions>>,
}

impl NodeChange {
    /// Nothing but read-only or writable.
    pub fn read_only(node: &Arc<Node>, read_only: bool) -> Self {
        NodeChange {
            node: node.clone(),
            behaviour: Behaviour {
                read_only,
                ..node.behaviour()
            },
            layers: Vec::new(),
            settings: None,
            options: None,
        }
    }

    /// The node's links as they will be.
    fn links(&self) -> Vec<(&'static str, Arc<Node>, Access)> {
        let access = |link: &Link| match link.role {
            "file" | "data-file" => Access {
                writes: !self.behaviour.read_only,
                ..link.access
            },
            _ => link.access,
        };
        let changed = |role: &str| self.layers.iter().any(|(other, _)| *other == role);
        let links = self.node.links();
        let mut after: Vec<_> = links
            .iter()
            .filter(|link| !changed(link.role))
            .map(|link| (link.role, link.edge.node(), access(link)))
            .collect();
        for (role, below) in &self.layers {
            let Some(below) = below else { continue };
            let present = links.iter().find(|link| link.role == *role);
            let access = present.map_or(Access::BACKING, access);
            after.push((role, below.clone(), access));
        }
        after
    }

    fn reopens_driver(&self) -> bool {
        let before = self.node.behaviour();
        let options = |behaviour: Behaviour| {
            let Behaviour {
                read_only, cache, ..
            } = behaviour;
            (read_only, cache.direct, cache.no_flush)
        };
        let file_changes = self.layers.iter().any(|(role, _)| *role == "file");
        options(before) != options(self.behaviour) || self.settings.is_some() || file_changes
    }

    /// Whether the node may show something else then: no request may be inside of it when it changes.
    fn changes_content(&self) -> bool {
        let window = matches!(self.settings, Some(DriverSettings::Raw { .. }));
        window || !self.layers.is_empty()
    }

    fn driver_options(&self) -> ReopenOptions {
        let Behaviour {
            read_only, cache, ..
        } = self.behaviour;
        let mut files = self.layers.iter().filter(|(role, _)| *role == "file");
        let file = files.next().and_then(|(_, node)| node.as_ref());
        ReopenOptions {
            read_only,
            direct: cache.direct,
            no_flush: cache.no_flush,
            settings: self.settings,
            file: file.map(|node| NewFile {
                child: Child::new(node.clone()),
                filename: node.filename(),
            }),
        }
    }
}

/// A change that was found possible, to be prepared.
#[derive(Debug)]
pub struct Reopen {
    changes: Vec<NodeChange>,
    /// Layers, and what is going to be done to them.
    needs: Vec<(Arc<Node>, Need)>,
}

/// A change whose drivers are ready. Dropped, nothing has changed.
pub struct ReadyToReopen {
    ready: Vec<(NodeChange, Option<Box<dyn Reopening>>)>,
    held: Vec<Quiesced>,
    /// What the nodes will need of their files.
    claim: Claim,
}

impl Reopen {
    /// Has the drivers do all that can fail. Cancellation: nothing has changed.
    pub async fn prepare(self) -> Result<ReadyToReopen> {
        let mut all = Claim::none();
        for (node, need) in &self.needs {
            all.add(claim(node, *need).await?);
        }
        let order = uppermost_first(self.changes.iter().map(|change| &change.node));
        let mut changes: HashMap<usize, NodeChange> = HashMap::new();
        for change in self.changes {
            changes.insert(place(&change.node), change);
        }
        let mut held = Vec::new();
        let mut ready = Vec::with_capacity(order.len());
        for change in order.iter().filter_map(|node| changes.remove(&place(node))) {
            if change.changes_content() {
                if !change.node.behaviour().read_only {
                    change.node.flush().await?;
                }
                held.push(change.node.quiesce().await);
            }
            let reopening = match change.reopens_driver() {
                false => None,
                true => {
                    let driver = change.node.driver();
                    Some(driver.reopen(change.driver_options()).await?)
                }
            };
            ready.push((change, reopening));
        }
        // What the drivers do by themselves goes on to the new layers.
        let mut old: Vec<Arc<Node>> = Vec::new();
        for (change, _) in &ready {
            for node in change
                .layers
                .iter()
                .filter_map(|(role, _)| change.node.link(role))
            {
                let is_held = held.iter().any(|held| held.is_of(&node));
                if !is_held && !old.iter().any(|other| Arc::ptr_eq(other, &node)) {
                    old.push(node);
                }
            }
        }
        held.extend(quiesce_all(&old).await);
        Ok(ReadyToReopen {
            ready,
            held,
            claim: all,
        })
    }
}

impl std::fmt::Debug for ReadyToReopen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let changes = self.ready.iter().map(|(change, _)| change);
        f.debug_list().entries(changes).finish()
    }
}

impl Graph {
    /// Checks a change. Refused are cycles, access that another user excludes, and nodes that would be read-only below writers.
    pub fn reopen(&self, changes: Vec<NodeChange>) -> Result<Reopen> {
        let mut after = After::default();
        for change in changes {
            after.add(change);
        }
        // What was asked for wins over what follows.
        let mut next = 0;
        while let Some(change) = after.changes.get(next).cloned() {
            self.follow(&change, &mut after);
            next += 1;
        }
        self.check_reopen(&after)?;
        let mut needs = Vec::new();
        for change in &after.changes {
            let used = self.need(&change.node);
            for (role, below, access) in change.links() {
                let need = match (role, access.writes) {
                    ("file", _) if change.node.driver().is_window() => used,
                    (_, true) => Need::Writes,
                    (_, false) => Need::Reads,
                };
                needs.push((below, need));
            }
        }
        let After { changes, .. } = after;
        Ok(Reopen { changes, needs })
    }

    /// Makes a change whose drivers are ready. Answers layers that nobody needs any more, to be closed when requests go on. Refused,
    /// with nothing changed, when something else has changed meanwhile so that it cannot be.
    pub fn reopened(&mut self, ready: ReadyToReopen) -> Result<Removed> {
        let ReadyToReopen { ready, held, claim } = ready;
        let mut after = After::default();
        for (change, _) in &ready {
            after.add(change.clone());
        }
        self.check_reopen(&after)?;
        let mut left: Vec<Arc<Node>> = Vec::new();
        let changed: Vec<Arc<Node>> = ready
            .iter()
            .map(|(change, _)| change.node.clone())
            .collect();
        for (change, reopening) in ready {
            if let Some(reopening) = reopening {
                reopening.commit();
            }
            change.node.set_behaviour(change.behaviour);
            if let Some(options) = &change.options {
                change.node.set_options(options.clone());
            }
            self.relink(&change, &mut left);
        }
        drop(held);
        self.settle(changed.iter().chain(&left));
        drop(claim);
        let mut removed = Removed::nothing();
        for node in left {
            let entry = self.table.of(&node);
            let unused = entry.is_some_and(|entry| entry.users.is_empty() && !entry.owned);
            if unused && !self.has_parent(&node) {
                removed.add(self.take_out(&node));
            }
        }
        Ok(removed)
    }

    /// Adds what a change means for the files below.
    fn follow(&self, change: &NodeChange, after: &mut After) {
        let read_only = change.behaviour.read_only;
        if change.node.behaviour().read_only == read_only {
            return;
        }
        for (role, below, _) in change.links() {
            let is_file = matches!(role, "file" | "data-file");
            if !is_file || after.has(&below) || below.behaviour().read_only == read_only {
                continue;
            }
            let may_follow = match read_only {
                true => {
                    let uses = self.uses_after(&below, after);
                    !uses.iter().any(|(_, access)| access.writes)
                }
                false => !is_kept_read_only(&below),
            };
            if may_follow {
                after.add(NodeChange::read_only(&below, read_only));
            }
        }
    }

    fn check_reopen(&self, after: &After) -> Result<()> {
        for change in &after.changes {
            if self.table.of(&change.node).is_none() {
                return Err(not_found(change.node.name()));
            }
            after.check_cycles(change)?;
            self.check_depth(change, after)?;
            if change.changes_content() {
                self.check_not_copied(&change.node)?;
            }
            let read_only = change.behaviour.read_only;
            let uses = self.uses_after(&change.node, after);
            if read_only && uses.iter().any(|(_, access)| access.writes) {
                return Err(Error::new(
                    ErrorKind::InUse,
                    format!(
                        "Read-only block node '{}' cannot support read-write users",
                        change.node.name()
                    ),
                ));
            }
            for (role, below, access) in change.links() {
                if self.table.of(&below).is_none() {
                    return Err(not_found(below.name()));
                }
                if access.writes && after.behaviour(&below).read_only {
                    return Err(Error::new(ErrorKind::ReadOnly, "Block node is read-only"));
                }
                let own = describe(&change.node, role);
                let uses = self.uses_after(&below, after);
                let mut others = uses.iter().filter(|(user, _)| *user != own);
                if let Some((other, _)) = others.find(|(_, has)| has.conflicts(access)) {
                    return Err(conflict(&below, (&own, access), other));
                }
            }
        }
        Ok(())
    }

    /// Refuses a backing with which a chain would be longer than can be opened.
    fn check_depth(&self, change: &NodeChange, after: &After) -> Result<()> {
        let is_new = |(role, below): &(&str, Option<_>)| *role == "backing" && below.is_some();
        if !change.layers.iter().any(is_new) {
            return Ok(());
        }
        let mut images = after.chain_len(&change.node);
        let mut above = vec![change.node.clone()];
        while !above.is_empty() && images <= MAX_CHAIN_DEPTH {
            let mut next: Vec<Arc<Node>> = Vec::new();
            for (parent, link) in above.iter().flat_map(|node| self.parents(node)) {
                let known = next.iter().any(|other| Arc::ptr_eq(other, parent));
                if link.role == "backing" && !known {
                    next.push(parent.clone());
                }
            }
            images += usize::from(!next.is_empty());
            above = next;
        }
        match images <= MAX_CHAIN_DEPTH {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "A chain with '{}' in it would have more than {MAX_CHAIN_DEPTH} images",
                    change.node.name()
                ),
            )),
        }
    }

    /// How a node will be used.
    fn uses_after(&self, node: &Arc<Node>, after: &After) -> Vec<(String, Access)> {
        let unchanged = self
            .parents(node)
            .filter(|(parent, _)| !after.has(parent))
            .map(|(parent, link)| (link_user(parent, &link), link.access));
        let changed = after.changes.iter().flat_map(|change| {
            let links = change.links().into_iter();
            let links = links.filter(|(_, below, _)| Arc::ptr_eq(below, node));
            links.map(|(role, _, access)| (describe(&change.node, role), access))
        });
        let entry = self.table.of(node).into_iter();
        let outside = entry.flat_map(|entry| &entry.users);
        let outside = outside.map(|user| (user.user.describe(), user.access));
        unchanged.chain(changed).chain(outside).collect()
    }

    fn relink(&mut self, change: &NodeChange, left: &mut Vec<Arc<Node>>) {
        let node = &change.node;
        let after = change.links();
        let before = node.links();
        let mut links = Vec::with_capacity(after.len());
        for (role, below, access) in after {
            let present = before.iter().find(|link| link.role == role);
            let edge = match present {
                Some(link) => {
                    let old = link.edge.node();
                    if !Arc::ptr_eq(&old, &below) {
                        link.edge.lead(&below);
                        self.table.leaves(node, &old);
                        left.push(old);
                    }
                    link.edge.clone()
                }
                None => super::Edge::new(below.clone()),
            };
            self.table.stands(node, &below);
            let link = Link { role, edge, access };
            if present.is_none() {
                node.driver().set_backing(Some(link.child()));
            }
            links.push(link);
        }
        for gone in before {
            if !links.iter().any(|link| link.role == gone.role) {
                node.driver().set_backing(None);
                self.table.leaves(node, &gone.edge.node());
                left.push(gone.edge.node());
            }
        }
        node.set_links(links);
    }
}

/// Whether the user wants the node to be read-only, whatever stands on it.
fn is_kept_read_only(node: &Node) -> bool {
    let options = node.options();
    options.is_some_and(|options| options.read_only && !options.auto_read_only)
}

fn describe(node: &Arc<Node>, role: &str) -> String {
    format!("node '{}' (uses node as '{role}' child)", node.name())
}

/// The graph as it will be, where it changes.
#[derive(Default)]
struct After {
    changes: Vec<NodeChange>,
    places: HashMap<usize, usize>,
}

impl After {
    fn add(&mut self, change: NodeChange) {
        self.places.insert(place(&change.node), self.changes.len());
        self.changes.push(change);
    }

    fn of(&self, node: &Arc<Node>) -> Option<&NodeChange> {
        self.changes.get(*self.places.get(&place(node))?)
    }

    fn has(&self, node: &Arc<Node>) -> bool {
        self.of(node).is_some()
    }

    fn behaviour(&self, node: &Arc<Node>) -> Behaviour {
        self.of(node)
            .map_or_else(|| node.behaviour(), |change| change.behaviour)
    }

    fn below(&self, node: &Arc<Node>) -> Vec<Arc<Node>> {
        match self.of(node) {
            Some(change) => change
                .links()
                .into_iter()
                .map(|(_, below, _)| below)
                .collect(),
            None => node.links().iter().map(|link| link.edge.node()).collect(),
        }
    }

    /// How many images the chain will have whose active layer this is.
    fn chain_len(&self, node: &Arc<Node>) -> usize {
        let layer = |node: &Arc<Node>, wanted: &str| match self.of(node) {
            Some(change) => {
                let links = change.links().into_iter();
                let mut links = links.filter(|(role, ..)| *role == wanted);
                links.next().map(|(_, below, _)| below)
            }
            None => node.link(wanted),
        };
        let below = |node: &Arc<Node>| layer(node, "backing").or_else(|| layer(node, "file"));
        let chain = std::iter::successors(Some(node.clone()), below);
        // A cycle is not refused yet if there are several changes.
        let chain = chain.take(2 * MAX_CHAIN_DEPTH + 2);
        chain.filter(|node| layer(node, "file").is_some()).count()
    }

    /// Refuses layers that stand on the node.
    fn check_cycles(&self, change: &NodeChange) -> Result<()> {
        for (role, below) in &change.layers {
            let Some(below) = below else { continue };
            let mut seen = std::collections::HashSet::from([place(below)]);
            let mut open = vec![below.clone()];
            while let Some(next) = open.pop() {
                if Arc::ptr_eq(&next, &change.node) {
                    return Err(Error::new(
                        ErrorKind::InvalidInput,
                        format!(
                            "Making '{}' a {role} child of '{}' would create a cycle",
                            below.name(),
                            change.node.name()
                        ),
                    ));
                }
                let below = self.below(&next).into_iter();
                open.extend(below.filter(|node| seen.insert(place(node))));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
