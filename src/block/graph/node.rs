//! A node: a driver with what the engine does around every request.
//!
//! ```text
//!   request ─> gate ─> range and read-only checks ─> detect-zeroes, discard mode, writethrough
//!                  ─> alignment (read-modify-write under a range lock) ─> driver
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Mutex;

use super::counters::{Counters, RequestCount, RequestKind};
use super::names::NodeName;
use crate::driver::{
    BlockStatus, BoxFuture, Driver, Preallocation, RequestLimits, Requests, WriteFlags, ZeroFlags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Closed, Data, Entered, Gate, RangeLock, RunToEnd};
use crate::limits::{MAX_DISK_SIZE, MAX_REQUEST};
use crate::open::{CacheMode, DetectZeroes, DiscardMode};

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
    /// `file`, `data-file`, `backing` or [`Link::IMAGE`].
    pub role: &'static str,
    /// The layer.
    pub node: Arc<Node>,
    /// What the upper layer does to it.
    pub access: Access,
}

impl Link {
    /// The role of an image below a node that shows one of its internal snapshots. Such a node does not depend on what happens
    /// to the image otherwise.
    pub const IMAGE: &'static str = "image";
}

/// What a user of a node does to it, and what it lets other users do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// It writes or resizes.
    pub writes: bool,
    /// Others may.
    pub shares_writes: bool,
}

impl Access {
    pub(super) fn conflicts(self, other: Access) -> bool {
        (self.writes && !other.shares_writes) || (other.writes && !self.shares_writes)
    }
}

/// A node of the graph. It is its own handle on the data path: give it to drivers above as a `Child`, to exports and jobs.
pub struct Node {
    inner: Arc<Inner>,
}

/// Shared with requests under way, which outlive the node's place in the graph.
pub(super) struct Inner {
    pub(super) name: NodeName,
    pub(super) driver: Arc<dyn Driver>,
    pub(super) behaviour: Behaviour,
    pub(super) ranges: RangeLock,
    links: Vec<Link>,
    gate: Arc<Gate>,
    counters: Counters,
    /// Two resizes at once would mix up what they restore on failure.
    resizing: Mutex<()>,
    /// The driver has been closed: nothing reaches it any more.
    closed: AtomicBool,
}

/// Holds back new requests to a node, all earlier ones having been answered. Requests go on when it is dropped.
#[derive(Debug)]
#[must_use]
pub struct Quiesced {
    _closed: Closed,
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
                behaviour,
                ranges: RangeLock::default(),
                links,
                gate: Arc::default(),
                counters: Counters::default(),
                resizing: Mutex::default(),
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
        self.inner.behaviour
    }

    /// The driver, for what is not a request: facts, snapshots. Requests go through the node.
    pub fn driver(&self) -> &dyn Driver {
        &*self.inner.driver
    }

    /// The layers below.
    pub fn links(&self) -> &[Link] {
        &self.inner.links
    }

    /// The layer below that has this role.
    pub fn link(&self, role: &str) -> Option<&Arc<Node>> {
        let link = self.inner.links.iter().find(|link| link.role == role)?;
        Some(&link.node)
    }

    /// What it has done so far.
    pub fn count(&self, kind: RequestKind) -> RequestCount {
        self.inner.counters.get(kind)
    }

    /// Holds back new requests and waits until those under way have been answered.
    ///
    /// What the driver itself sends to the layers below (a snapshot's metadata) goes on: their gates stay open.
    /// A request that waits for the quiesced section to end must not be awaited inside of it.
    /// Cancellation: requests go on.
    pub async fn quiesce(&self) -> Quiesced {
        Quiesced {
            _closed: self.inner.gate.close().await,
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

    fn run<T, F>(&self, request: impl FnOnce(Arc<Inner>) -> F) -> BoxFuture<'static, Result<T>>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        Box::pin(RunToEnd::new(request(self.inner.clone())))
    }
}

impl Inner {
    async fn enter(&self) -> Result<Entered<'_>> {
        let entered = self.gate.enter().await;
        self.check_open()?;
        Ok(entered)
    }

    fn check_open(&self) -> Result<()> {
        if self.closed.load(Ordering::SeqCst) {
            return Err(Error::new(
                ErrorKind::Io,
                format!("Node '{}' has been closed", self.name.as_str()),
            ));
        }
        Ok(())
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset.checked_add(len).filter(|end| *end <= MAX_DISK_SIZE);
        let inside = |end| end <= self.driver.size() || self.driver.limits().growable;
        if end.is_some_and(inside) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::OutOfRange,
            format!(
                "Request at {offset} of {len} bytes is outside of node '{}'",
                self.name.as_str()
            ),
        ))
    }

    fn check_writable(&self) -> Result<()> {
        if self.behaviour.read_only {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("Node '{}' is read only", self.name.as_str()),
            ));
        }
        Ok(())
    }

    async fn read(self: Arc<Self>, offset: u64, len: u64) -> Result<Data> {
        let _entered = self.enter().await?;
        self.check_range(offset, len)?;
        if len > MAX_REQUEST {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("A read of {len} bytes is more than the {MAX_REQUEST} allowed at once"),
            ));
        }
        self.counted(RequestKind::Read, len, self.read_aligned(offset, len))
            .await
    }

    async fn write(self: Arc<Self>, offset: u64, data: Data, flags: WriteFlags) -> Result<()> {
        let _entered = self.enter().await?;
        self.check_writable()?;
        self.check_range(offset, data.len())?;
        let flags = WriteFlags {
            fua: flags.fua || self.behaviour.cache.writethrough,
        };
        if self.behaviour.detect_zeroes != DetectZeroes::Off && data.reads_as_zeroes() {
            let flags = ZeroFlags {
                may_unmap: self.behaviour.detect_zeroes == DetectZeroes::Unmap
                    && self.behaviour.discard == DiscardMode::Unmap,
                fua: flags.fua,
                no_fallback: false,
            };
            let zero = self.zero_aligned(offset, data.len(), flags);
            return self.counted(RequestKind::Write, data.len(), zero).await;
        }
        let len = data.len();
        let write = self.write_aligned(offset, data, flags);
        self.counted(RequestKind::Write, len, write).await
    }

    async fn write_zeroes(self: Arc<Self>, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let _entered = self.enter().await?;
        self.check_writable()?;
        self.check_range(offset, len)?;
        let flags = ZeroFlags {
            may_unmap: flags.may_unmap && self.behaviour.discard == DiscardMode::Unmap,
            fua: flags.fua || self.behaviour.cache.writethrough,
            no_fallback: flags.no_fallback,
        };
        let zero = self.zero_aligned(offset, len, flags);
        self.counted(RequestKind::WriteZeroes, len, zero).await
    }

    async fn discard(self: Arc<Self>, offset: u64, len: u64) -> Result<()> {
        let _entered = self.enter().await?;
        self.check_writable()?;
        self.check_range(offset, len)?;
        if self.behaviour.discard == DiscardMode::Ignore {
            return Ok(());
        }
        let discard = self.discard_aligned(offset, len);
        self.counted(RequestKind::Discard, len, discard).await
    }

    async fn flush(self: Arc<Self>) -> Result<()> {
        let _entered = self.enter().await?;
        self.counted(RequestKind::Flush, 0, self.driver.flush())
            .await
    }

    async fn block_status(self: Arc<Self>, offset: u64, len: u64) -> Result<BlockStatus> {
        let _entered = self.enter().await?;
        self.check_range(offset, len)?;
        self.status_aligned(offset, len).await
    }

    async fn resize(self: Arc<Self>, size: u64, preallocation: Preallocation) -> Result<()> {
        self.check_writable()?;
        if size > MAX_DISK_SIZE {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("A disk of {size} bytes is larger than the {MAX_DISK_SIZE} allowed"),
            ));
        }
        let _one = self.resizing.lock().await;
        // Nobody may be writing to what is cut off.
        let _closed = self.gate.close().await;
        self.check_open()?;
        self.driver.resize(size, preallocation).await
    }

    async fn counted<T>(
        &self,
        kind: RequestKind,
        bytes: u64,
        request: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let result = request.await;
        self.counters.count(kind, bytes, result.is_ok());
        result
    }
}

impl Requests for Node {
    fn size(&self) -> u64 {
        self.inner.driver.size()
    }

    fn limits(&self) -> RequestLimits {
        RequestLimits {
            // Whatever the driver needs, the node takes anything.
            alignment: 1,
            ..self.inner.driver.limits()
        }
    }

    fn read(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        self.run(|inner| inner.read(offset, len))
    }

    fn write(&self, offset: u64, data: Data, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        self.run(|inner| inner.write(offset, data, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        self.run(|inner| inner.write_zeroes(offset, len, flags))
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        self.run(|inner| inner.discard(offset, len))
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        self.run(Inner::flush)
    }

    fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        self.run(|inner| inner.block_status(offset, len))
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        self.run(|inner| inner.resize(size, preallocation))
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
