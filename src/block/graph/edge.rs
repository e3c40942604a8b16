//! Edges: how users of nodes reach them, so that nodes can change under their users.
//!
//! ```text
//!   export ──edge──┐                     export ──edge──┐
//!   drive  ──edge──┼─> node     ~~~>     drive  ──edge──┼─> overlay ──edge──> node
//!   parent ──edge──┘                     parent ──edge──┘
//! ```
//!
//! A request loads where the edge leads, enters that node's gate, and looks again. So whoever holds the node quiesced may lead its
//! edges elsewhere: requests that wait at its gate find that they must go on to the new node, and none reaches the old one.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::ArcSwap;

use super::node::{Inner, Node};
use crate::io::{Entered, Gate};

/// A place from which a node is used: by a drive, an export, a job, or a node above. Clones are handles on the same place.
///
/// Requests go to whatever node the edge leads to when they are sent; those that wait there follow it elsewhere.
#[derive(Clone)]
pub struct Edge {
    place: Arc<Place>,
}

/// What the handles on an edge share.
pub(super) struct Place {
    target: ArcSwap<Node>,
    /// Where the target's inside is in memory: enough to see that the edge leads there still, which every request asks.
    address: AtomicUsize,
}

impl Place {
    fn inner(&self) -> Arc<Inner> {
        self.target.load().inner.clone()
    }
}

impl Edge {
    /// An edge to `node`.
    pub fn new(node: Arc<Node>) -> Self {
        let address = AtomicUsize::new(address(&node.inner));
        let target = ArcSwap::new(node);
        Edge {
            place: Arc::new(Place { target, address }),
        }
    }

    /// Where it leads at present.
    pub fn node(&self) -> Arc<Node> {
        self.place.target.load_full()
    }

    /// Whether both are handles on the same place.
    pub fn is_same(&self, other: &Edge) -> bool {
        Arc::ptr_eq(&self.place, &other.place)
    }

    /// Leads it elsewhere. The node that it has led to is quiesced, or nobody has had the edge yet.
    pub(super) fn lead(&self, node: &Arc<Node>) {
        self.place.target.store(node.clone());
        let address = address(&node.inner);
        self.place.address.store(address, Ordering::SeqCst);
    }

    pub(super) fn way(&self) -> Way {
        Way::Edge(self.place.clone())
    }

    /// Looks at the node where it leads at present.
    pub(super) fn look<T>(&self, look: impl FnOnce(&Inner) -> T) -> T {
        look(&self.place.target.load().inner)
    }
}

impl fmt::Debug for Edge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Edge").field(&self.node().name()).finish()
    }
}

impl Node {
    pub(super) fn way(&self) -> Way {
        Way::Node(self.inner.clone())
    }

    pub(super) fn look<T>(&self, look: impl FnOnce(&Inner) -> T) -> T {
        look(&self.inner)
    }
}

fn address(inner: &Arc<Inner>) -> usize {
    Arc::as_ptr(inner).addr()
}

/// A request inside of a node's gate.
pub(super) type Inside = Entered<Arc<Inner>>;

/// How a request gets to a node.
pub(super) enum Way {
    /// Straight.
    Node(Arc<Inner>),
    /// Wherever this leads.
    Edge(Arc<Place>),
}

impl Way {
    /// Where it leads at present.
    pub(super) fn target(&self) -> Arc<Inner> {
        match self {
            Way::Node(inner) => inner.clone(),
            Way::Edge(place) => place.inner(),
        }
    }

    /// Whether it leads there still. Who is inside of that node's gate can rely on it: an edge is changed behind a closed
    /// and empty gate only.
    pub(super) fn leads_to(&self, inner: &Arc<Inner>) -> bool {
        match self {
            Way::Node(_) => true,
            // What is at this address is this node for as long as we have it.
            Way::Edge(place) => place.address.load(Ordering::SeqCst) == address(inner),
        }
    }

    /// Enters the gate of the node at the way's end, waiting while it is closed.
    ///
    /// Cancellation: nothing has happened.
    pub(super) async fn enter(&self) -> Inside {
        loop {
            let inner = self.target();
            let inside = Gate::enter_by(inner).await;
            if self.leads_to(inside.place()) {
                return inside;
            }
        }
    }
}

#[cfg(test)]
mod tests;
