//! The nodes of a graph: found by name, and by what they stand on, without a look at all of them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::access::Use;
use super::directory::Directory;
use super::node::Node;

/// All nodes, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Table {
    entries: BTreeMap<u64, Entry>,
    numbers: HashMap<String, u64>,
    next: u64,
    /// Who stands on a node, each once.
    above: HashMap<usize, Vec<Arc<Node>>>,
    /// The nodes, and the drives on them, for others.
    pub(super) directory: Directory,
}

/// A node with what the graph knows of it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) node: Arc<Node>,
    /// It was asked for by name and not brought along by a node on it: it stays when that one goes.
    pub(super) owned: bool,
    /// Users that are not nodes.
    pub(super) users: Vec<Use>,
    /// It came in as a filter, and those whose requests are to go through it do not use it yet.
    pub(super) waits: bool,
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn nodes(&self) -> impl DoubleEndedIterator<Item = &Arc<Node>> {
        self.entries.values().map(|entry| &entry.node)
    }

    pub(super) fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(self.numbers.get(name)?)
    }

    /// The entry of this very node.
    pub(super) fn of(&self, node: &Arc<Node>) -> Option<&Entry> {
        self.get(node.name())
            .filter(|entry| Arc::ptr_eq(&entry.node, node))
    }

    pub(super) fn of_mut(&mut self, node: &Arc<Node>) -> Option<&mut Entry> {
        let number = self.numbers.get(node.name())?;
        let entry = self.entries.get_mut(number)?;
        Arc::ptr_eq(&entry.node, node).then_some(entry)
    }

    /// Adds a node whose name is free.
    pub(super) fn add(&mut self, node: &Arc<Node>, owned: bool) {
        let entry = Entry {
            node: node.clone(),
            owned,
            users: Vec::new(),
            waits: false,
        };
        self.entries.insert(self.next, entry);
        self.numbers.insert(node.name().to_owned(), self.next);
        self.next += 1;
        self.directory.add_node(node);
        for link in node.links() {
            self.stands(node, &link.edge.node());
        }
    }

    /// Takes a node out.
    pub(super) fn remove(&mut self, node: &Arc<Node>) {
        if self.of(node).is_none() {
            return;
        }
        if let Some(number) = self.numbers.remove(node.name()) {
            self.entries.remove(&number);
            self.directory.remove(node.name());
        }
        for link in node.links() {
            self.leaves(node, &link.edge.node());
        }
    }

    /// The nodes that stand on this one.
    pub(super) fn above(&self, node: &Arc<Node>) -> &[Arc<Node>] {
        self.above.get(&place(node)).map_or(&[], Vec::as_slice)
    }

    /// `node` has a link to `below` now.
    pub(super) fn stands(&mut self, node: &Arc<Node>, below: &Arc<Node>) {
        let above = self.above.entry(place(below)).or_default();
        if !above.iter().any(|other| Arc::ptr_eq(other, node)) {
            above.push(node.clone());
        }
    }

    /// `node` has no link to `below` any more.
    pub(super) fn leaves(&mut self, node: &Arc<Node>, below: &Arc<Node>) {
        let Some(above) = self.above.get_mut(&place(below)) else {
            return;
        };
        above.retain(|other| !Arc::ptr_eq(other, node));
        if above.is_empty() {
            self.above.remove(&place(below));
        }
    }
}

/// A node as something to look up, for as long as somebody has the node.
pub fn place(node: &Arc<Node>) -> usize {
    Arc::as_ptr(node).addr()
}
