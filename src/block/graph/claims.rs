//! Files that are held ready for what is done to the nodes on them.
//!
//! ```text
//!   claim   a command makes ready what its users will need       waits, may be refused
//!   settle  the graph says what all users need by now            at once, cannot fail
//! ```
//!
//! A file without users has no locks, so that other programs may work on it. What shows the bytes of its file as they are, does to it
//! what is done to itself. An image is in use as long as it is open: it has metadata in memory.

use std::sync::Arc;

use super::Graph;
use super::node::Node;
use crate::driver::{Claim, Need};
use crate::error::Result;

/// Holds the files below a node ready for what somebody is going to do to it, until the graph has been told of him.
///
/// Errors: `InUse` when another program excludes it, and what opening for writing answers. Cancellation: nothing is held.
pub async fn claim(node: &Arc<Node>, need: Need) -> Result<Claim> {
    let mut claim = Claim::none();
    let mut next = Some(node.clone());
    while let Some(node) = next {
        if let Some(claims) = node.driver().claims() {
            claim.add(claims.claim(need).await?);
        }
        next = match node.driver().is_window() {
            true => node.link("file"),
            false => None,
        };
    }
    Ok(claim)
}

/// Holds the files right below nodes as they are held now.
pub(super) fn keep(nodes: &[Arc<Node>]) -> Claim {
    let mut claim = Claim::none();
    for file in nodes.iter().flat_map(files_around) {
        if let Some(claims) = file.driver().claims() {
            claim.add(claims.keep());
        }
    }
    claim
}

/// The files that are concerned when somebody comes to a node, or it comes to its layers.
fn files_around(node: &Arc<Node>) -> Vec<Arc<Node>> {
    let mut files = Vec::new();
    let mut open: Vec<Arc<Node>> = node.links().iter().map(|link| link.edge.node()).collect();
    open.push(node.clone());
    while let Some(node) = open.pop() {
        if node.driver().claims().is_some() {
            files.push(node);
        } else if node.driver().is_window() {
            open.extend(node.links().iter().map(|link| link.edge.node()));
        }
    }
    files
}

impl Graph {
    /// Tells the files around nodes what is needed of them.
    pub(super) fn settle<'a>(&self, nodes: impl IntoIterator<Item = &'a Arc<Node>>) {
        for node in nodes {
            for file in files_around(node) {
                // One that is out of the graph is being closed, by those who know when they are done with it.
                if let Some(claims) = file.driver().claims()
                    && self.table.of(&file).is_some()
                {
                    claims.set_need(self.need(&file));
                }
            }
        }
    }

    /// What all users of a node together do to its content.
    pub(super) fn need(&self, node: &Arc<Node>) -> Need {
        let of_access = |writes| match writes {
            true => Need::Writes,
            false => Need::Reads,
        };
        let mut need = Need::Nothing;
        let mut open = vec![node.clone()];
        while let Some(node) = open.pop() {
            let entry = self.table.of(&node).into_iter();
            for user in entry.flat_map(|entry| &entry.users) {
                need = need.max(of_access(user.access.writes));
            }
            for (parent, link) in self.parents(&node) {
                match link.role == "file" && parent.driver().is_window() {
                    true => open.push(parent.clone()),
                    false => need = need.max(of_access(link.access.writes)),
                }
            }
        }
        need
    }
}
