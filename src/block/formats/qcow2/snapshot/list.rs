//! The snapshots of an open image.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::table::SnapshotTable;
use crate::driver::Child;
use crate::error::Result;
use crate::formats::qcow2::geometry::ENTRY_SIZE;
use crate::formats::qcow2::header::Header;
use crate::formats::qcow2::owners::{Owner, Owners};
use crate::limits;
use crate::units::HostOffset;

/// The snapshot table in memory: what the image's header points to. Changed under the closed gate only.
#[derive(Debug, Default)]
pub(in crate::formats::qcow2) struct SnapshotList {
    table: Mutex<Arc<SnapshotTable>>,
    /// How many views there are of a snapshot, by its id.
    views: Mutex<HashMap<String, usize>>,
}

impl SnapshotList {
    /// Reads the table that the header points to.
    pub(in crate::formats::qcow2) async fn load(file: &Child, header: &Header) -> Result<Self> {
        let offset = header.snapshots_offset.0;
        let table = SnapshotTable::read(file, offset, header.nb_snapshots)
            .await
            .map_err(|error| error.context("Could not read snapshots"))?;
        Ok(SnapshotList {
            table: Mutex::new(Arc::new(table)),
            views: Mutex::default(),
        })
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

    pub(super) fn get(&self) -> Arc<SnapshotTable> {
        self.table
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn set(&self, table: SnapshotTable) {
        *self.table.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
    }

    /// Another view of the snapshot exists.
    pub(super) fn hold(&self, id: &str) {
        *self.views().entry(id.to_owned()).or_default() += 1;
    }

    /// A view of the snapshot is gone.
    pub(super) fn release(&self, id: &str) {
        let mut views = self.views();
        if let Some(count) = views.get_mut(id) {
            *count -= 1;
            if *count == 0 {
                views.remove(id);
            }
        }
    }

    /// Whether a view of the snapshot exists.
    pub(super) fn is_held(&self, id: &str) -> bool {
        self.views().contains_key(id)
    }

    fn views(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.views.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
