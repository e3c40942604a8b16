//! Snapshots of an open image: the contract of [`Snapshots`] around the operations on a quiet image.

use std::sync::{Arc, Mutex, PoisonError};

use super::delete::Discard;
use super::table::SnapshotTable;
use super::{Quiet, create, delete};
use crate::driver::{BoxFuture, Child, NewSnapshot, SnapshotInfo, SnapshotSelector, Snapshots};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::Qcow2;
use crate::formats::qcow2::alloc::Allocator;
use crate::formats::qcow2::geometry::ENTRY_SIZE;
use crate::formats::qcow2::header::Header;
use crate::formats::qcow2::image::Image;
use crate::formats::qcow2::l1::L1Table;
use crate::formats::qcow2::owners::{Owner, Owners};
use crate::limits;
use crate::units::HostOffset;

/// The snapshot table in memory: what the image's header points to. Changed under the closed gate only.
#[derive(Debug, Default)]
pub(in crate::formats::qcow2) struct SnapshotList(Mutex<Arc<SnapshotTable>>);

impl SnapshotList {
    /// Reads the table that the header points to.
    pub(in crate::formats::qcow2) async fn load(file: &Child, header: &Header) -> Result<Self> {
        let offset = header.snapshots_offset.0;
        let table = SnapshotTable::read(file, offset, header.nb_snapshots)
            .await
            .map_err(|error| error.context("Could not read snapshots"))?;
        Ok(SnapshotList(Mutex::new(Arc::new(table))))
    }

    /// Puts the clusters of the table and of the snapshots' L1 tables into the owner map.
    ///
    /// An L1 table that is out of bounds is left to the operation that would use it.
    pub(in crate::formats::qcow2) fn claim(&self, header: &Header, owners: &Owners) -> Result<()> {
        let g = header.geometry();
        let table = self.get();
        let bytes = table.encode()?.len() as u64;
        let start = g.host_cluster(header.snapshots_offset);
        owners.claim_alone(start, g.clusters_for(bytes), Owner::SnapshotTable)?;
        for entry in table.entries() {
            let bytes = u64::from(entry.l1_entries) * ENTRY_SIZE;
            if bytes <= limits::QCOW2_MAX_L1_BYTES && g.is_aligned(entry.l1_offset) {
                let start = g.host_cluster(HostOffset(entry.l1_offset));
                owners.claim_alone(start, g.clusters_for(bytes), Owner::L1Table)?;
            }
        }
        Ok(())
    }

    fn get(&self) -> Arc<SnapshotTable> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, table: SnapshotTable) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
    }
}

impl Image {
    async fn create_snapshot(&self, new: NewSnapshot) -> Result<SnapshotInfo> {
        let _alone = self.gate.close().await;
        self.make_quiet().await?;
        let old = self.snapshots.get();
        let mut allocator = self.alloc.lock().await;
        let l1 = self.l1();
        let mut quiet = self.quiet(&mut allocator, &l1);
        let created = create::create(&mut quiet, &old, &new).await;
        self.commits.touch();
        let table = created?;
        let info = table.entries().last().map(|entry| entry.info(self.size()));
        self.snapshots.set(table);
        info.ok_or_else(not_found)
    }

    async fn delete_snapshot(&self, which: SnapshotSelector) -> Result<SnapshotInfo> {
        let _alone = self.gate.close().await;
        let old = self.snapshots.get();
        let index = old.find(&which).ok_or_else(not_found)?;
        self.make_quiet().await?;
        let info = old.entries()[index].info(self.size());
        let discard = match self.pass_discard_snapshot {
            true => Discard::Yes,
            false => Discard::No,
        };
        let mut allocator = self.alloc.lock().await;
        let l1 = self.l1();
        let mut quiet = self.quiet(&mut allocator, &l1);
        let deleted = delete::delete(&mut quiet, &old, index, discard).await;
        self.commits.touch();
        self.snapshots.set(deleted?);
        Ok(info)
    }

    /// What the operations work on. Under the closed gate, after `make_quiet`.
    fn quiet<'a>(&'a self, allocator: &'a mut Allocator, l1: &'a L1Table) -> Quiet<'a> {
        Quiet {
            file: &self.file,
            header: &self.header,
            allocator,
            l1,
            l2: &self.l2,
        }
    }

    /// Under the closed gate: the image may be changed, and the file has all of its metadata.
    async fn make_quiet(&self) -> Result<()> {
        self.check_range(0, 0)?;
        self.prepare_metadata_change().await?;
        self.write_back_all().await
    }
}

impl Snapshots for Qcow2 {
    fn list(&self) -> Vec<SnapshotInfo> {
        let size = self.image.size();
        let table = self.image.snapshots.get();
        table
            .entries()
            .iter()
            .map(|entry| entry.info(size))
            .collect()
    }

    fn create(&self, new: NewSnapshot) -> BoxFuture<'_, Result<SnapshotInfo>> {
        Box::pin(self.run(|image| async move { image.create_snapshot(new).await }))
    }

    fn delete(&self, which: SnapshotSelector) -> BoxFuture<'_, Result<SnapshotInfo>> {
        Box::pin(self.run(|image| async move { image.delete_snapshot(which).await }))
    }
}

fn not_found() -> Error {
    Error::new(ErrorKind::NotFound, "Can't find the snapshot")
}
