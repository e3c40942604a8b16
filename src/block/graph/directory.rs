//! What names refer to, for those who are not where the graph is.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::edge::Edge;
use super::node::Node;

/// The nodes and drives of a graph by name, as they are whenever somebody looks. Clones show the same graph.
#[derive(Debug, Clone, Default)]
pub struct Directory {
    named: Arc<RwLock<HashMap<String, Named>>>,
}

#[derive(Debug)]
enum Named {
    Node(Arc<Node>),
    /// By its root.
    Drive(Edge),
}

impl Named {
    fn node(&self) -> Arc<Node> {
        match self {
            Named::Node(node) => node.clone(),
            Named::Drive(root) => root.node(),
        }
    }
}

impl Directory {
    /// What a name refers to: a node, or the root of the drive of that id.
    pub fn get(&self, name: &str) -> Option<Arc<Node>> {
        self.read().get(name).map(Named::node)
    }

    /// All names, in no order, with what they refer to.
    pub fn all(&self) -> Vec<(String, Arc<Node>)> {
        let named = self.read();
        let named = named.iter();
        named
            .map(|(name, named)| (name.clone(), named.node()))
            .collect()
    }

    /// Whether something is so of any node.
    pub fn any(&self, mut is_so: impl FnMut(&Arc<Node>) -> bool) -> bool {
        self.read().values().any(|named| match named {
            Named::Node(node) => is_so(node),
            // Its root is a node, too.
            Named::Drive(_) => false,
        })
    }

    pub(super) fn add_node(&self, node: &Arc<Node>) {
        let named = Named::Node(node.clone());
        self.write().insert(node.name().to_owned(), named);
    }

    pub(super) fn add_drive(&self, id: &str, root: &Edge) {
        self.write()
            .insert(id.to_owned(), Named::Drive(root.clone()));
    }

    pub(super) fn remove(&self, name: &str) {
        self.write().remove(name);
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<String, Named>> {
        self.named.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<String, Named>> {
        self.named.write().unwrap_or_else(PoisonError::into_inner)
    }
}
