//! Reading a snapshot while the image goes on being written.
//!
//! A view is the image once more, opened read-only with a header that says that the snapshot's L1 table is the active one. What that
//! table reaches changes nowhere while the snapshot exists, and was durable before it did, so the two share nothing but
//! the file; that the snapshot goes on existing is what a view holds on to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::steps::SnapshotDisk;
use crate::driver::{
    BlockStatus, BoxFuture, Child, Driver, DriverInfo, Preallocation, RequestLimits, Requests,
    SnapshotInfo, SnapshotSelector, WriteFlags, ZeroFlags,
};
use crate::error::Result;
use crate::formats::qcow2::header::{Header, Incompatible};
use crate::formats::qcow2::image::Image;
use crate::formats::qcow2::open::OpenOptions;
use crate::formats::qcow2::{Opening, Qcow2};
use crate::io::Data;
use crate::limits::QCOW2_VIEW_CACHE_BYTES;
use crate::units::HostOffset;

/// A snapshot as a disk of its own. Its writes answer `ReadOnly`.
#[derive(Debug)]
struct View {
    snapshot: Arc<Qcow2>,
    held: Held,
}

/// Keeps a snapshot from being deleted, until it is released or dropped.
#[derive(Debug)]
struct Held {
    image: Arc<Image>,
    info: SnapshotInfo,
    released: AtomicBool,
}

impl Held {
    /// Nobody reads the snapshot any more.
    fn release(&self) {
        if !self.released.swap(true, Ordering::AcqRel) {
            self.image.snapshots.release(&self.info.id);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.release();
    }
}

/// The snapshot as a driver. It cannot be deleted until that is closed or dropped. Cancellation: safe.
pub(super) async fn view(image: Arc<Image>, which: SnapshotSelector) -> Result<Arc<dyn Driver>> {
    let (held, table, index) = {
        // No change of snapshots is under way.
        let _inside = image.gate.enter().await;
        image.check_range(0, 0)?;
        let table = image.snapshots.get();
        let index = table.index_of(&which)?;
        let info = table.entries()[index].info(image.size());
        image.snapshots.hold(&info.id)?;
        let held = Held {
            image: image.clone(),
            info,
            released: AtomicBool::new(false),
        };
        (held, table, index)
    };
    // Its L1 table stays where it is while the snapshot is held.
    let entry = &table.entries()[index];
    let disk = image.snapshot_disk(entry).await?;
    let header = header_of(&image.header.get(), entry.l1_offset, &disk);
    let options = OpenOptions {
        filename: image.tuning.filename(),
        read_only: true,
        l2_cache_bytes: QCOW2_VIEW_CACHE_BYTES,
        ..OpenOptions::default()
    };
    let opening = Opening::again(&image, header, options)?;
    let snapshot = opening.finish(image.backing().as_deref().cloned()).await?;
    Ok(Arc::new(View { snapshot, held }))
}

/// The header of an image whose disk is the snapshot's.
fn header_of(header: &Header, l1_offset: u64, disk: &SnapshotDisk) -> Header {
    let mut header = header.clone();
    header.size = disk.size;
    header.l1_size = disk.l1.len() as u32;
    header.l1_table_offset = HostOffset(l1_offset);
    header.nb_snapshots = 0;
    header.snapshots_offset = HostOffset(0);
    // The view reads neither refcounts nor bitmaps.
    header.incompatible.0 &= !Incompatible::DIRTY;
    header.autoclear.0 = 0;
    header
}

impl View {
    /// Once the image is closed its file may be anybody's.
    fn check(&self) -> Result<()> {
        self.held.image.check_range(0, 0)
    }
}

impl Requests for View {
    fn size(&self) -> u64 {
        self.snapshot.size()
    }

    fn limits(&self) -> RequestLimits {
        self.snapshot.limits()
    }

    fn read(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        Box::pin(async move {
            self.check()?;
            self.snapshot.read(offset, len).await
        })
    }

    fn write(&self, offset: u64, data: Data, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        self.snapshot.write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        self.snapshot.write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        self.snapshot.discard(offset, len)
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        self.snapshot.flush()
    }

    fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        Box::pin(async move {
            self.check()?;
            self.snapshot.block_status(offset, len).await
        })
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        self.snapshot.resize(size, preallocation)
    }
}

impl Driver for View {
    fn info(&self) -> DriverInfo {
        DriverInfo {
            snapshot: Some(self.held.info.clone()),
            // Those of the image, which changes.
            dirty: self.held.image.is_marked_dirty(),
            ..self.snapshot.info()
        }
    }

    fn children(&self) -> Vec<(&'static str, Child)> {
        self.snapshot.children()
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            // Behind it no request is under way, and none begins.
            let closed = self.snapshot.close().await;
            self.held.release();
            closed
        })
    }
}
