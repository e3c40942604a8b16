//! `copy-before-write`: shows the disk below, and saves what is about to be changed for a copy of it.
//!
//! What has to be done before a change, and when it may be left out, is decided in [`copy`](crate::copy). Reads go straight through.

use std::sync::Arc;

use crate::copy::BeforeChange;
use crate::driver::{
    BlockStatus, BoxFuture, Child, Driver, DriverInfo, GoOn, HeaderHeld, HeaderSwitch, NewSnapshot,
    Preallocation, RequestLimits, Requests, SnapshotChange, SnapshotInfo, SnapshotSelector,
    Snapshots, WriteFlags, ZeroFlags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::io::Data;

/// The filter above the source of a copy.
pub struct CopyBeforeWrite {
    file: Child,
    target: Child,
    before: BeforeChange,
    filename: String,
}

impl CopyBeforeWrite {
    /// A filter above `file`. `filename` is what queries show. Nothing is copied before the copy is activated.
    pub fn new(file: Child, target: Child, before: BeforeChange, filename: String) -> Self {
        CopyBeforeWrite {
            file,
            target,
            before,
            filename,
        }
    }

    fn inner(&self) -> Option<&dyn Snapshots> {
        self.before.source().snapshots()
    }
}

impl Requests for CopyBeforeWrite {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn limits(&self) -> RequestLimits {
        RequestLimits {
            growable: false,
            ..self.file.limits()
        }
    }

    fn read(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        self.file.read(offset, len)
    }

    fn write(&self, offset: u64, data: Data, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.before.ready(offset..offset + data.len()).await?;
            self.file.write(offset, data, flags).await
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.before.ready(offset..offset + len).await?;
            self.file.write_zeroes(offset, len, flags).await
        })
    }

    fn write_compressed(&self, offset: u64, data: Data) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.before.ready(offset..offset + data.len()).await?;
            self.file.write_compressed(offset, data).await
        })
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.before.ready(offset..offset + len).await?;
            self.file.discard(offset, len).await
        })
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        self.file.flush()
    }

    fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        self.file.block_status(offset, len)
    }

    /// Growing goes through: the copy ends where the disk ended at the point in time. `InUse` for cutting off what is still to be
    /// copied.
    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.before.check_shrink(size)?;
            self.file.resize(size, preallocation).await
        })
    }
}

impl Driver for CopyBeforeWrite {
    fn info(&self) -> DriverInfo {
        DriverInfo {
            driver: "copy-before-write",
            filename: self.filename.clone(),
            ..DriverInfo::default()
        }
    }

    fn is_filter(&self) -> bool {
        true
    }

    fn children(&self) -> Vec<(&'static str, Child)> {
        vec![("file", self.file.clone()), ("target", self.target.clone())]
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Those of the disk below, if it has any.
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        self.inner().map(|_| self as &dyn Snapshots)
    }
}

/// The snapshots of the disk below. A revert is refused while the copy reads the disk itself.
impl Snapshots for CopyBeforeWrite {
    fn check(&self) -> Result<()> {
        self.inner().ok_or_else(no_snapshots)?.check()
    }

    fn holds_requests(&self) -> bool {
        self.inner().is_none_or(Snapshots::holds_requests)
    }

    fn list(&self) -> Vec<SnapshotInfo> {
        self.inner().map(Snapshots::list).unwrap_or_default()
    }

    fn change(&self) -> BoxFuture<'_, Result<Box<dyn SnapshotChange>>> {
        Box::pin(async move {
            let inner = self.inner().ok_or_else(no_snapshots)?.change().await?;
            let before = self.before.clone();
            Ok(Box::new(Change { inner, before }) as Box<dyn SnapshotChange>)
        })
    }

    fn view(&self, which: SnapshotSelector) -> BoxFuture<'_, Result<Arc<dyn Driver>>> {
        Box::pin(async move { self.inner().ok_or_else(no_snapshots)?.view(which).await })
    }
}

fn no_snapshots() -> Error {
    Error::new(ErrorKind::Unsupported, "The disk has no internal snapshots")
}

/// A change of the snapshots below.
struct Change {
    inner: Box<dyn SnapshotChange>,
    before: BeforeChange,
}

impl SnapshotChange for Change {
    fn hold_flushes(&mut self) -> BoxFuture<'_, Result<()>> {
        self.inner.hold_flushes()
    }

    fn hold(&mut self) -> BoxFuture<'_, Result<()>> {
        self.inner.hold()
    }

    fn create(&mut self, new: NewSnapshot) -> BoxFuture<'_, Result<SnapshotInfo>> {
        self.inner.create(new)
    }

    fn delete(&mut self, which: SnapshotSelector) -> BoxFuture<'_, Result<SnapshotInfo>> {
        self.inner.delete(which)
    }

    fn revert(&mut self, which: SnapshotSelector) -> BoxFuture<'_, Result<SnapshotInfo>> {
        match self.before.check_revert() {
            Ok(()) => self.inner.revert(which),
            Err(error) => Box::pin(async { Err(error) }),
        }
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn may_let_go(&mut self) -> BoxFuture<'_, Result<bool>> {
        self.inner.may_let_go()
    }

    fn let_go(&mut self, then: GoOn) -> BoxFuture<'_, Result<bool>> {
        self.inner.let_go(then)
    }

    fn prepare(&mut self) -> BoxFuture<'_, Result<()>> {
        self.inner.prepare()
    }

    fn try_out(&mut self) -> BoxFuture<'_, Result<()>> {
        self.inner.try_out()
    }

    fn switch(&mut self) -> BoxFuture<'_, Result<Option<HeaderSwitch>>> {
        self.inner.switch()
    }

    fn commit(&mut self) -> BoxFuture<'_, Result<()>> {
        self.inner.commit()
    }

    fn roll_back(&mut self) -> BoxFuture<'_, Result<()>> {
        self.inner.roll_back()
    }

    fn finish(self: Box<Self>) -> HeaderHeld {
        self.inner.finish()
    }
}
