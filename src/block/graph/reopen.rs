//! Nodes that go on otherwise: read-only or writable, with another behaviour, on other layers. All at once, or not at all.
//!
//! ```text
//!   Graph::reopen  checks the whole change          on the owner of the graph
//!     -> prepare   drivers do what can fail         requests go on, but where layers change
//!       -> Graph::reopened  checks again, makes it  on the owner of the graph
//! ```
//!
//! The file below a format becomes read-only with it, unless somebody else writes to it, and writable with it: then other programs
//! can read an image that nobody here writes to.

use std::collections::HashMap;
use std::sync::Arc;

use super::access::conflict;
use super::node::{Behaviour, Link, Node, Quiesced};
use super::quiesce::quiesce_all;
use super::table::place;
use super::{Access, Graph, Removed, link_user, not_found};
use crate::driver::{ReopenOptions, Reopening};
use crate::error::{Error, ErrorKind, Result};

/// What is to become of a node.
#[derive(Debug, Clone)]
pub struct NodeChange {
    /// The node.
    pub node: Arc<Node>,
    /// How it behaves then.
    pub behaviour: Behaviour,
    /// Layers that are others then, by role; `None` takes a backing away.
    pub layers: Vec<(&'static str, Option<Arc<Node>>)>,
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
        options(before) != options(self.behaviour)
    }
}

/// A change that was found possible, to be prepared.
#[derive(Debug)]
pub struct Reopen {
    changes: Vec<NodeChange>,
}

/// A change whose drivers are ready. Dropped, nothing has changed.
pub struct ReadyToReopen {
    ready: Vec<(NodeChange, Option<Box<dyn Reopening>>)>,
    held: Vec<Quiesced>,
}

impl Reopen {
    /// Has the drivers do all that can fail. Cancellation: nothing has changed.
    pub async fn prepare(self) -> Result<ReadyToReopen> {
        // Who reads through a layer that changes must not be in the middle of it.
        let mut still: Vec<Arc<Node>> = Vec::new();
        for change in self.changes.iter().filter(|one| !one.layers.is_empty()) {
            still.push(change.node.clone());
            let roles = change.layers.iter();
            still.extend(roles.filter_map(|(role, _)| change.node.link(role)));
        }
        let held = quiesce_all(&still).await;
        let mut ready = Vec::with_capacity(self.changes.len());
        for change in self.changes {
            let Behaviour {
                read_only, cache, ..
            } = change.behaviour;
            let reopening = match change.reopens_driver() {
                false => None,
                true => {
                    let options = ReopenOptions {
                        read_only,
                        direct: cache.direct,
                        no_flush: cache.no_flush,
                    };
                    Some(change.node.driver().reopen(options).await?)
                }
            };
            ready.push((change, reopening));
        }
        Ok(ReadyToReopen { ready, held })
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
            self.follow(change, &mut after);
        }
        self.check_reopen(&after)?;
        let After { changes, .. } = after;
        Ok(Reopen { changes })
    }

    /// Makes a change whose drivers are ready. Answers layers that nobody needs any more, to be closed when requests go on. Refused,
    /// with nothing changed, when something else has changed meanwhile so that it cannot be.
    pub fn reopened(&mut self, ready: ReadyToReopen) -> Result<Removed> {
        let ReadyToReopen { ready, held } = ready;
        let mut after = After::default();
        for (change, _) in &ready {
            after.add(change.clone());
        }
        self.check_reopen(&after)?;
        let mut left: Vec<Arc<Node>> = Vec::new();
        for (change, reopening) in ready {
            if let Some(reopening) = reopening {
                reopening.commit();
            }
            change.node.set_behaviour(change.behaviour);
            self.relink(&change, &mut left);
        }
        drop(held);
        let mut removed = Removed { nodes: Vec::new() };
        for node in left {
            let entry = self.table.of(&node);
            let unused = entry.is_some_and(|entry| entry.users.is_empty() && !entry.owned);
            if unused && !self.has_parent(&node) {
                removed.nodes.extend(self.take_out(&node).nodes);
            }
        }
        Ok(removed)
    }

    /// Adds a change, and what it means for the files below.
    fn follow(&self, change: NodeChange, after: &mut After) {
        let (node, read_only) = (change.node.clone(), change.behaviour.read_only);
        let flips = node.behaviour().read_only != read_only;
        let links = change.links();
        after.add(change);
        if !flips {
            return;
        }
        for (role, below, _) in links {
            let is_file = matches!(role, "file" | "data-file");
            if !is_file || after.has(&below) || below.behaviour().read_only == read_only {
                continue;
            }
            let uses = self.uses_after(&below, after);
            if !read_only || !uses.iter().any(|(_, access)| access.writes) {
                self.follow(NodeChange::read_only(&below, read_only), after);
            }
        }
    }

    fn check_reopen(&self, after: &After) -> Result<()> {
        for change in &after.changes {
            if self.table.of(&change.node).is_none() {
                return Err(not_found(change.node.name()));
            }
            after.check_cycles(change)?;
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
