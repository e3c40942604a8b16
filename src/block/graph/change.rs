//! Nodes that take the place of others while their users go on.
//!
//! What could be refused is looked at first; then edges are led elsewhere, which cannot fail. The node whose place is taken is held
//! quiesced meanwhile, as [`Edge`](super::Edge) tells.

use std::collections::HashSet;
use std::sync::Arc;

use super::access::{Use, conflict};
use super::edge::Edge;
use super::node::{Node, Quiesced};
use super::{Access, Graph, Removed, link_user, not_found};
use crate::error::{Error, ErrorKind, Result};

/// The edges that lead to a node and are to follow to another.
struct Movers {
    from: Arc<Node>,
    to: Arc<Node>,
    /// Of nodes above.
    links: Vec<Edge>,
    /// Of users outside of the graph.
    users: Vec<Edge>,
}

impl Graph {
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
        let movers = self.movers(from, to, None)?;
        self.lead(&movers);
        Ok(())
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
        let movers = self.movers(filter, &below, Some(filter))?;
        self.lead(&movers);
        Ok(self.take_out(filter))
    }

    /// Who is to follow from one node to another, once it is sure that all may. What `leaving` does to its layers does not count.
    fn movers(
        &self,
        from: &Arc<Node>,
        to: &Arc<Node>,
        leaving: Option<&Arc<Node>>,
    ) -> Result<Movers> {
        for node in [from, to] {
            if !self.nodes().any(|known| Arc::ptr_eq(known, node)) {
                return Err(not_found(node.name()));
            }
        }
        // These would come to stand on themselves.
        let below = reachable(to);
        let mut wanted: Vec<(String, Access)> = Vec::new();
        let mut links = Vec::new();
        for (parent, link) in self.parents(from) {
            if !below.contains(&place(parent)) {
                wanted.push((link_user(parent, &link), link.access));
                links.push(link.edge);
            }
        }
        let mut users = Vec::new();
        let entry = self.entry(from.name()).into_iter();
        for Use { user, access, edge } in entry.flat_map(|entry| &entry.users) {
            if user.follows() {
                wanted.push((user.describe(), *access));
                users.push(edge.clone());
            }
        }
        let there = self.uses_without(to, leaving);
        for (user, access) in &wanted {
            if access.writes && to.behaviour().read_only {
                return Err(Error::new(ErrorKind::ReadOnly, "Block node is read-only"));
            }
            if let Some((other, _)) = there.iter().find(|(_, has)| has.conflicts(*access)) {
                return Err(conflict(to, (user, *access), other));
            }
        }
        Ok(Movers {
            from: from.clone(),
            to: to.clone(),
            links,
            users,
        })
    }

    fn uses_without(&self, node: &Arc<Node>, leaving: Option<&Arc<Node>>) -> Vec<(String, Access)> {
        let stays = |parent: &Arc<Node>| leaving.is_none_or(|left| !Arc::ptr_eq(left, parent));
        let parents = self
            .parents(node)
            .filter(|(parent, _)| stays(parent))
            .map(|(parent, link)| (link_user(parent, &link), link.access));
        let entry = self.entry(node.name()).into_iter();
        let outside = entry.flat_map(|entry| &entry.users);
        parents
            .chain(outside.map(|user| (user.user.describe(), user.access)))
            .collect()
    }

    fn lead(&mut self, movers: &Movers) {
        let Movers {
            from,
            to,
            links,
            users,
        } = movers;
        for edge in links.iter().chain(users) {
            edge.lead(to);
        }
        let Some(entry) = self.entry_mut(from) else {
            return;
        };
        let moves = |user: &Use| users.iter().any(|edge| edge.is_same(&user.edge));
        let (moved, stay) = std::mem::take(&mut entry.users)
            .into_iter()
            .partition(|user| moves(user));
        entry.users = stay;
        if let Some(entry) = self.entry_mut(to) {
            entry.users.extend::<Vec<Use>>(moved);
        }
    }
}

/// A node as something to compare.
pub(super) fn place(node: &Arc<Node>) -> *const Node {
    Arc::as_ptr(node)
}

/// The node and all that it stands on.
pub(super) fn reachable(node: &Arc<Node>) -> HashSet<*const Node> {
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
