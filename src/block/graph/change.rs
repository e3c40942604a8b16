//! Nodes that take the place of others while their users go on.
//!
//! What could be refused is looked at first; then edges are led elsewhere, which cannot fail. The node whose place is taken is held
//! quiesced meanwhile, as [`Edge`] tells.

use std::cell::LazyCell;
use std::collections::HashSet;
use std::sync::Arc;

use super::access::{Use, conflict};
use super::edge::Edge;
use super::node::{Node, Quiesced};
use super::table::place;
use super::{Access, Graph, Link, Opened, Removed, link_user, not_found};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::MAX_CHAIN_DEPTH;

/// The edges that lead to a node and are to follow to another.
struct Movers {
    from: Arc<Node>,
    to: Arc<Node>,
    /// Of nodes above, each with its node.
    links: Vec<(Arc<Node>, Edge)>,
    /// Of users outside of the graph.
    users: Vec<Edge>,
    /// How these use the node.
    wanted: Vec<(String, Access)>,
}

impl Graph {
    /// Takes a filter in, with what was opened for it, that is going to be put above `below`. Nobody uses it yet.
    ///
    /// Who uses `below` will use the filter, so that its access need not go with what the filter does to `below`; nor need that of
    /// others who come to use `below` before the filter is put above it. That of jobs, which stay, must. Errors as
    /// [`Graph::insert`], and as [`Graph::insert_above`] would have.
    pub fn insert_filter(&mut self, opened: Opened, below: &Arc<Node>) -> Result<Arc<Node>> {
        let nodes = opened.nodes.clone();
        let filter = self.insert_beside(opened, Some(below))?;
        let movers = self.movers(below, &filter);
        match movers.and_then(|movers| self.check_movers(&movers, None)) {
            Ok(()) => {
                if let Some(entry) = self.table.of_mut(&filter) {
                    entry.waits = true;
                }
                Ok(filter)
            }
            Err(error) => {
                nodes.iter().rev().for_each(|node| self.table.remove(node));
                self.settle(&nodes);
                Err(error)
            }
        }
    }

    /// Who stays when others follow.
    pub(super) fn uses_of_jobs(&self, node: &Arc<Node>) -> Vec<(String, Access)> {
        let entry = self.table.of(node).into_iter();
        let users = entry.flat_map(|entry| &entry.users);
        users
            .filter(|user| !user.user.follows())
            .map(|user| (user.user.describe(), user.access))
            .collect()
    }

    /// Puts `above`, which stands on `below`, between it and its users: they now use `above`. Jobs stay.
    ///
    /// `held` holds `below`. Refused, with nothing changed, when a user's access does not go with that of another of `above`, or
    /// when one that writes would come to a node that is read-only.
    pub fn insert_above(
        &mut self,
        below: &Arc<Node>,
        above: &Arc<Node>,
        held: &Quiesced,
    ) -> Result<()> {
        debug_assert!(reachable(above).contains(&place(below)), "stands elsewhere");
        self.replace(below, above, held)
    }

    /// Leads the users of `from` to `to`. What `to` stands on, and jobs, stay where they are. Errors as [`Graph::insert_above`].
    pub fn replace(&mut self, from: &Arc<Node>, to: &Arc<Node>, held: &Quiesced) -> Result<()> {
        assert!(held.is_of(from), "node '{}' is not held", from.name());
        let movers = self.movers(from, to)?;
        self.check_movers(&movers, None)?;
        self.lead(&movers);
        Ok(())
    }

    /// Whether the users of `from` may be led to `to`: what [`Graph::replace`] would refuse.
    pub fn check_replace(&self, from: &Arc<Node>, to: &Arc<Node>) -> Result<()> {
        self.check_movers(&self.movers(from, to)?, None)
    }

    /// Takes out a node that nobody uses, whoever asked for it, with what only it used. Empty while somebody does.
    pub fn remove_unused(&mut self, node: &Arc<Node>) -> Removed {
        let entry = self.table.of(node);
        if entry.is_none_or(|entry| !entry.users.is_empty()) || self.has_parent(node) {
            return Removed::nothing();
        }
        self.take_out(node)
    }

    /// Takes a filter out: its users go on to its layer of this role. The filter is handed back to be closed, with what only
    /// it used; what stays in the graph is as if it had never been there. `held` holds the filter.
    ///
    /// Refused, with nothing changed, while a job uses it, and as [`Graph::insert_above`].
    pub fn take_out_filter(
        &mut self,
        filter: &Arc<Node>,
        role: &str,
        held: &Quiesced,
    ) -> Result<Removed> {
        assert!(held.is_of(filter), "node '{}' is not held", filter.name());
        let below = filter.link(role).ok_or_else(|| not_found(filter.name()))?;
        if let Some(user) = self.users(filter).find(|user| !user.follows()) {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("Node '{}' is in use by {}", filter.name(), user.describe()),
            ));
        }
        let movers = self.movers(filter, &below)?;
        self.check_movers(&movers, Some(filter))?;
        self.lead(&movers);
        Ok(self.take_out(filter))
    }

    /// Whether so many overlays more can be put on a node: what is longer could not be opened again. It looks at the whole chain.
    pub fn check_chain(&self, node: &Arc<Node>, more: usize) -> Result<()> {
        let images = chain_len(node);
        match images + more <= MAX_CHAIN_DEPTH {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "The chain of '{}' has {images} images, and can have no more than {MAX_CHAIN_DEPTH}",
                    node.name()
                ),
            )),
        }
    }

    /// Whether [`Graph::append`] would do it.
    pub fn check_append(&self, below: &Arc<Node>, overlay: &Arc<Node>) -> Result<()> {
        self.appending(below, overlay).map(drop)
    }

    /// Makes `below` the backing of `overlay`, and its users those of `overlay`: an external snapshot. Both are held: it takes no more
    /// time for a long chain than for a short one, and leaves it to [`Graph::check_chain`], before, to refuse one that is too long.
    ///
    /// Refused, with nothing changed, when the overlay has a backing or can have none, when it would stand on itself, and as
    /// [`Graph::insert_above`].
    pub fn append(
        &mut self,
        below: &Arc<Node>,
        overlay: &Arc<Node>,
        held: [&Quiesced; 2],
    ) -> Result<()> {
        for (node, held) in [below, overlay].into_iter().zip(held) {
            assert!(held.is_of(node), "node '{}' is not held", node.name());
        }
        let movers = self.appending(below, overlay)?;
        self.lead(&movers);
        let link = Link::new("backing", below, Access::BACKING);
        overlay.driver().set_backing(Some(link.child()));
        overlay.add_link(link);
        self.table.stands(overlay, below);
        self.settle([overlay]);
        Ok(())
    }

    fn appending(&self, below: &Arc<Node>, overlay: &Arc<Node>) -> Result<Movers> {
        if overlay.link("backing").is_some() {
            let text = "The overlay already has a backing image";
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
        overlay.driver().check_backing()?;
        // What nothing stands on is below nothing.
        if self.has_parent(overlay) {
            check_no_cycle(overlay, below)?;
        }
        let movers = self.movers(below, overlay)?;
        self.check_movers(&movers, None)?;
        let stays = self.uses_but_for(below, |parent| movers.has(parent));
        let link = Link::new("backing", below, Access::BACKING);
        let user = link_user(overlay, &link);
        match stays.iter().find(|(_, has)| has.conflicts(link.access)) {
            None => Ok(movers),
            Some((other, _)) => Err(conflict(below, (&user, link.access), other)),
        }
    }

    /// Who is to follow from one node to another.
    fn movers(&self, from: &Arc<Node>, to: &Arc<Node>) -> Result<Movers> {
        for node in [from, to] {
            if self.table.of(node).is_none() {
                return Err(not_found(node.name()));
            }
        }
        // What is below `to` would come to stand on itself. Chains are long: it is looked for where anything may be.
        let below = LazyCell::new(|| reachable(to));
        let mut movers = Movers {
            from: from.clone(),
            to: to.clone(),
            links: Vec::new(),
            users: Vec::new(),
            wanted: Vec::new(),
        };
        for (parent, link) in self.parents(from) {
            // What shows a snapshot of an image is about that image.
            let follows = link.role != Link::IMAGE && !Arc::ptr_eq(parent, to);
            if follows && !below.contains(&place(parent)) {
                let user = link_user(parent, &link);
                movers.wanted.push((user, link.access));
                movers.links.push((parent.clone(), link.edge));
            }
        }
        let entry = self.table.of(from).into_iter();
        for Use { user, access, edge } in entry.flat_map(|entry| &entry.users) {
            if user.follows() {
                movers.wanted.push((user.describe(), *access));
                movers.users.push(edge.clone());
            }
        }
        Ok(movers)
    }

    /// Whether all may use the node that they are to follow to. What `leaving` does to its layers does not count, nor what filters do
    /// that are to be put above that node: all of these will use the filter.
    fn check_movers(&self, movers: &Movers, leaving: Option<&Arc<Node>>) -> Result<()> {
        let to = &movers.to;
        let there = self.uses_but_for(to, |user| match user {
            Placed::Parent(parent) => {
                let waits = self.table.of(parent).is_some_and(|entry| entry.waits);
                waits || leaving.is_some_and(|left| Arc::ptr_eq(left, parent))
            }
            Placed::Outside(_) => false,
        });
        for (user, access) in &movers.wanted {
            if access.writes && to.behaviour().read_only {
                return Err(Error::new(ErrorKind::ReadOnly, "Block node is read-only"));
            }
            if let Some((other, _)) = there.iter().find(|(_, has)| has.conflicts(*access)) {
                return Err(conflict(to, (user, *access), other));
            }
        }
        Ok(())
    }

    /// How a node is used, but for some.
    fn uses_but_for(
        &self,
        node: &Arc<Node>,
        is_left_out: impl Fn(Placed<'_>) -> bool,
    ) -> Vec<(String, Access)> {
        let parents = self
            .parents(node)
            .filter(|(parent, _)| !is_left_out(Placed::Parent(parent)))
            .map(|(parent, link)| (link_user(parent, &link), link.access));
        let entry = self.table.of(node).into_iter();
        let outside = entry
            .flat_map(|entry| &entry.users)
            .filter(|user| !is_left_out(Placed::Outside(&user.edge)))
            .map(|user| (user.user.describe(), user.access));
        parents.chain(outside).collect()
    }

    fn lead(&mut self, movers: &Movers) {
        let Movers {
            from,
            to,
            links,
            users,
            wanted: _,
        } = movers;
        for (parent, edge) in links {
            edge.lead(to);
            self.table.leaves(parent, from);
            self.table.stands(parent, to);
        }
        for edge in users {
            edge.lead(to);
        }
        let Some(entry) = self.table.of_mut(from) else {
            return;
        };
        let moves = |user: &Use| users.iter().any(|edge| edge.is_same(&user.edge));
        let (moved, stay) = std::mem::take(&mut entry.users)
            .into_iter()
            .partition(|user| moves(user));
        entry.users = stay;
        if let Some(entry) = self.table.of_mut(to) {
            entry.users.extend::<Vec<Use>>(moved);
            entry.waits = false;
        }
        self.settle([from, to]);
    }
}

/// A user of a node, from where it uses it.
enum Placed<'a> {
    Parent(&'a Arc<Node>),
    Outside(&'a Edge),
}

impl Movers {
    fn has(&self, user: Placed<'_>) -> bool {
        match user {
            Placed::Parent(node) => self.links.iter().any(|(own, _)| Arc::ptr_eq(own, node)),
            Placed::Outside(edge) => self.users.iter().any(|own| own.is_same(edge)),
        }
    }
}

/// Refuses a backing that stands on the node that it is to be the backing of.
pub(super) fn check_no_cycle(node: &Arc<Node>, backing: &Arc<Node>) -> Result<()> {
    match reachable(backing).contains(&place(node)) {
        false => Ok(()),
        true => Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "Making '{}' a backing child of '{}' would create a cycle",
                backing.name(),
                node.name()
            ),
        )),
    }
}

/// How many images the chain has whose active layer this is.
pub(super) fn chain_len(node: &Arc<Node>) -> usize {
    let below = |node: &Arc<Node>| node.link("backing").or_else(|| node.link("file"));
    let chain = std::iter::successors(Some(node.clone()), below);
    chain.filter(|node| node.link("file").is_some()).count()
}

/// The node and all that it stands on.
fn reachable(node: &Arc<Node>) -> HashSet<usize> {
    let mut seen = HashSet::from([place(node)]);
    let mut open = vec![node.clone()];
    while let Some(node) = open.pop() {
        for link in node.links() {
            let below = link.edge.node();
            if seen.insert(place(&below)) {
                open.push(below);
            }
        }
    }
    seen
}

#[cfg(test)]
mod tests;
