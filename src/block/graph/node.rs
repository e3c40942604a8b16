//! A node: a driver with what the engine does around every request.
//!
//! ```text
//!   request ─> gate ─> range and read-only checks ─> detect-zeroes, discard mode, writethrough
//!                  ─> alignment (read-modify-write under a range lock) ─> driver
//! ```
//!
//! What happens to a request inside of the gate is in `requests`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::{ArcSwap, ArcSwapOption};

use super::access::Access;
use super::counters::{Counters, RequestCount, RequestKind};
use super::edge::Edge;
use super::names::NodeName;
use super::quiesce::FlushesHeld;
use crate::driver::{Child, Driver, SnapshotSource, Snapshots};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Closed, Gate, RangeLock};
use crate::open::{CacheMode, DetectZeroes, DiscardMode, NodeOptions};

/// How a node behaves, whatever its driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Behaviour {
    /// Refuse everything that changes content or size.
    pub read_only: bool,
    /// What happens to discards.
    pub discard: DiscardMode,
    /// What happens to written zero bytes.
    pub detect_zeroes: DetectZeroes,
    /// Host caching; the node's part of it is `writethrough`.
    pub cache: CacheMode,
}

/// A layer below a node, and what the node needs of it.
#[derive(Debug, Clone)]
pub struct Link {
    /// `file`, `data-file`, `backing`, [`Link::IMAGE`] or [`Link::TARGET`].
    pub role: &'static str,
    /// Leads to the layer; the driver's `Child` is a handle on the same edge.
    pub edge: Edge,
    /// What the upper layer does to it.
    pub access: Access,
}

impl Link {
    /// The role of an image below a node that shows one of its internal snapshots. Such a node does not depend on what happens
    /// to the image otherwise.
    pub const IMAGE: &'static str = "image";

    /// The role of what a filter copies to.
    pub const TARGET: &'static str = "target";

    /// A new edge to `node`.
    pub fn new(role: &'static str, node: &Arc<Node>, access: Access) -> Self {
        Link {
            role,
            edge: Edge::new(node.clone()),
            access,
        }
    }

    /// Whether the node above shows what the one below holds: what is copied to it is not what it shows, and a snapshot stays as
    /// it is.
    pub(super) fn shows(&self) -> bool {
        !matches!(self.role, Link::TARGET | Link::IMAGE)
    }

    /// What the driver above is given to send requests to.
    pub fn child(&self) -> Child {
        Child::new(Arc::new(self.edge.clone()))
    }
}

/// A node of the graph. It is its own handle on the data path: give it to drivers above as a `Child`, to exports and jobs.
pub struct Node {
    pub(super) inner: Arc<Inner>,
}

/// Shared with requests under way, which outlive the node's place in the graph.
pub(super) struct Inner {
    pub(super) name: NodeName,
    pub(super) driver: Arc<dyn Driver>,
    pub(super) ranges: RangeLock,
    pub(super) gate: Arc<Gate>,
    /// What flushes, and writes that are durable when they are answered, enter before the gate: they take long, and others must not
    /// wait at a closed gate for them to end.
    pub(super) flushes: Arc<Gate>,
    pub(super) counters: Counters,
    /// Held by a resize, which waits inside of the gate until it is alone there.
    pub(super) resizing: tokio::sync::Mutex<()>,
    behaviour: ArcSwap<Behaviour>,
    options: ArcSwapOption<NodeOptions>,
    links: Mutex<Vec<Link>>,
    /// The driver has been closed: nothing reaches it any more.
    closed: AtomicBool,
}

/// Holds back new requests to a node, all earlier ones having been answered. Requests go on when it is dropped.
#[derive(Debug)]
#[must_use]
pub struct Quiesced {
    closed: Closed,
    flushes: Closed,
}

impl Quiesced {
    /// Whether it holds back the requests to this node.
    pub fn is_of(&self, node: &Node) -> bool {
        self.closed.is_of(&node.inner.gate)
    }

    /// Lets requests go on, but for flushes and writes that have to be durable when they are answered.
    pub fn into_flushes(self) -> FlushesHeld {
        FlushesHeld::one(self.flushes)
    }
}

impl Node {
    /// A node around an open driver. `links` are the driver's layers below, by role.
    pub fn new(
        name: NodeName,
        driver: Arc<dyn Driver>,
        behaviour: Behaviour,
        links: Vec<Link>,
    ) -> Arc<Self> {
        Arc::new(Node {
            inner: Arc::new(Inner {
                name,
                driver,
                ranges: RangeLock::default(),
                gate: Arc::default(),
                flushes: Arc::default(),
                counters: Counters::default(),
                resizing: tokio::sync::Mutex::default(),
                behaviour: ArcSwap::from_pointee(behaviour),
                options: ArcSwapOption::empty(),
                links: Mutex::new(links),
                closed: AtomicBool::new(false),
            }),
        })
    }

    /// Its name, given or made up.
    pub fn name(&self) -> &str {
        self.inner.name.as_str()
    }

    /// Whether a user named it.
    pub fn is_named(&self) -> bool {
        self.inner.name.is_given()
    }

    /// How it behaves.
    pub fn behaviour(&self) -> Behaviour {
        self.inner.behaviour()
    }

    /// What it was asked to be, where `open` made it; without what a layer inherits from the node that brings it along.
    pub fn options(&self) -> Option<Arc<NodeOptions>> {
        self.inner.options.load_full()
    }

    /// What it was asked to be is this.
    pub(crate) fn set_options(&self, options: Arc<NodeOptions>) {
        self.inner.options.store(Some(options));
    }

    /// The file at the bottom, as the user named it.
    pub fn filename(&self) -> String {
        let mut filename = self.driver().info().filename;
        let mut below = self.link("file");
        while let Some(file) = below.filter(|_| filename.is_empty()) {
            filename = file.driver().info().filename;
            below = file.link("file");
        }
        filename
    }

    /// The driver, for what is not a request: facts, snapshots. Requests go through the node.
    pub fn driver(&self) -> &dyn Driver {
        &*self.inner.driver
    }

    /// The disk that it shows: itself, or what is below it and the filters that follow.
    pub fn below_filters(self: &Arc<Self>) -> Arc<Node> {
        let mut node = self.clone();
        while node.driver().is_filter()
            && let Some(below) = node.link("file")
        {
            node = below;
        }
        node
    }

    /// The layers below.
    pub fn links(&self) -> Vec<Link> {
        self.inner.lock_links().clone()
    }

    /// The layer below that has this role.
    pub fn link(&self, role: &str) -> Option<Arc<Node>> {
        let links = self.inner.lock_links();
        let link = links.iter().find(|link| link.role == role)?;
        Some(link.edge.node())
    }

    pub(super) fn set_behaviour(&self, behaviour: Behaviour) {
        self.inner.behaviour.store(Arc::new(behaviour));
    }

    /// Changes what the node does to a layer, and what it lets others do there.
    pub(super) fn set_access(&self, role: &str, access: Access) {
        let mut links = self.inner.lock_links();
        for link in links.iter_mut().filter(|link| link.role == role) {
            link.access = access;
        }
    }

    pub(super) fn set_links(&self, links: Vec<Link>) {
        *self.inner.lock_links() = links;
    }

    /// The driver has one layer more.
    pub(super) fn add_link(&self, link: Link) {
        self.inner.lock_links().push(link);
    }

    /// What it has done so far.
    pub fn count(&self, kind: RequestKind) -> RequestCount {
        self.inner.counters.get(kind)
    }

    /// The offset behind the highest byte that somebody wanted to write.
    pub fn highest_write(&self) -> u64 {
        self.inner.counters.highest()
    }

    /// Holds back new requests and waits until those under way have been answered.
    ///
    /// What the driver itself sends to the layers below (a snapshot's metadata) goes on: their gates stay open.
    /// A request that waits for the quiesced section to end must not be awaited inside of it.
    /// Cancellation: requests go on.
    pub async fn quiesce(&self) -> Quiesced {
        let flushes = self.close_to_flushes().await;
        self.quiesce_behind(flushes).await
    }

    /// Holds back new flushes and waits until those under way have been answered; other requests go on.
    pub(super) async fn close_to_flushes(&self) -> Closed {
        self.inner.flushes.close().await
    }

    /// Holds back what is left when flushes are.
    pub(super) async fn quiesce_behind(&self, flushes: Closed) -> Quiesced {
        debug_assert!(flushes.is_of(&self.inner.flushes), "of another node");
        Quiesced {
            closed: self.inner.gate.close().await,
            flushes,
        }
    }

    /// Drains the node, lets the driver write back its state, and marks the image clean. Requests that come later
    /// fail. A second call does nothing.
    pub async fn close(&self) -> Result<()> {
        let _drained = self.inner.gate.close().await;
        if self.inner.closed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        self.inner.driver.close().await
    }
}

impl Inner {
    pub(super) fn behaviour(&self) -> Behaviour {
        **self.behaviour.load()
    }

    fn lock_links(&self) -> MutexGuard<'_, Vec<Link>> {
        #[cfg(test)]
        LOOKS.set(LOOKS.get() + 1);
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn check_open(&self) -> Result<()> {
        if self.closed.load(Ordering::SeqCst) {
            return Err(Error::new(
                ErrorKind::Io,
                format!("Node '{}' has been closed", self.name.as_str()),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
thread_local! {
    /// How often this thread has looked at the layers of a node: the steps of whatever goes through a graph.
    pub(super) static LOOKS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

impl AsRef<Gate> for Inner {
    fn as_ref(&self) -> &Gate {
        &self.gate
    }
}

impl SnapshotSource for Node {
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        self.driver().snapshots()
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("name", &self.name())
            .field("driver", &self.driver().info().driver)
            .finish_non_exhaustive()
    }
}
