//! The snapshots of an open image.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::steps::damaged;
use super::table::SnapshotTable;
use crate::driver::Child;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::entry::L1Entry;
use crate::formats::qcow2::geometry::{ENTRY_SIZE, Geometry};
use crate::formats::qcow2::header::Header;
use crate::formats::qcow2::open::read_table;
use crate::formats::qcow2::owners::{Owner, Owners};
use crate::limits;
use crate::units::{ClusterIndex, HostOffset};

/// What a read counts at least, in bytes: snapshots of an empty disk are small and may be many.
const MIN_READ: u64 = 4096;

/// The snapshot table in memory: what the image's header points to. Changed under the closed gate only.
#[derive(Debug, Default)]
pub(in crate::formats::qcow2) struct SnapshotList {
    table: Mutex<Arc<SnapshotTable>>,
    users: Mutex<Users>,
}

/// Who uses snapshots, by their ids.
#[derive(Debug, Default)]
struct Users {
    /// How many views there are of one.
    views: HashMap<String, usize>,
    /// Those that are being deleted.
    leaving: BTreeSet<String>,
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
            users: Mutex::default(),
        })
    }

    /// Puts the clusters of the table, of the snapshots' L1 tables, and of their L2 tables into the owner map: the last one to do
    /// so when an image is opened.
    ///
    /// An L1 table that is out of bounds is left to the operation that would use it.
    pub(in crate::formats::qcow2) async fn claim(
        &self,
        file: &Child,
        header: &Header,
        owners: &Owners,
    ) -> Result<()> {
        let g = header.geometry();
        let table = self.get();
        let bytes = table.encoded_len()? as u64;
        let start = g.host_cluster(header.snapshots_offset);
        owners.claim_alone(start, g.clusters_for(bytes), Owner::SnapshotTable)?;
        for entry in table.entries() {
            let bytes = u64::from(entry.l1_entries) * ENTRY_SIZE;
            if bytes <= limits::QCOW2_MAX_L1_BYTES && g.is_aligned(entry.l1_offset) {
                let start = g.host_cluster(HostOffset(entry.l1_offset));
                owners.claim_alone(start, g.clusters_for(bytes), Owner::L1Table)?;
            }
        }
        self.claim_l2_tables(file, g, owners).await;
        Ok(())
    }

    /// Puts the L2 tables of the snapshots into the owner map, as many as a bounded part of their L1 tables leads to.
    ///
    /// What is damaged is left to the operation that would use it: the disk is more than its snapshots.
    async fn claim_l2_tables(&self, file: &Child, g: Geometry, owners: &Owners) {
        let table = self.get();
        // Equal L1 tables are read once.
        let tables: BTreeSet<(u64, u32)> = table
            .entries()
            .iter()
            .map(|entry| (entry.l1_offset, entry.l1_entries))
            .collect();
        let mut budget = limits::QCOW2_MAX_OPENED_L1_BYTES;
        for (offset, entries) in tables {
            let bytes = u64::from(entries) * ENTRY_SIZE;
            if check_l1(g, file, offset, entries).is_err() {
                continue;
            }
            // A read costs something however short it is.
            let Some(left) = budget.checked_sub(bytes.max(MIN_READ)) else {
                log::warn!(
                    "qcow2: the L2 tables of some snapshots are protected by refcounts only"
                );
                return;
            };
            budget = left;
            let at = (HostOffset(offset), entries.into());
            let taken = match read_table(file, g, "Snapshot L1 table", at).await {
                Ok(l1) => owners.claim_unowned(l2_tables(g, file, &l1), Owner::L2Table),
                Err(error) => {
                    log::warn!("qcow2: L1 table of a snapshot: {error}");
                    continue;
                }
            };
            if let Some((cluster, other)) = taken {
                log::error!(
                    "qcow2: an L2 table of a snapshot lies in host cluster {}, which holds {}; run a check",
                    cluster.0,
                    other.name()
                );
            }
        }
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

    /// Another view of the snapshot exists. `InUse` while it is being deleted.
    pub(super) fn hold(&self, id: &str) -> Result<()> {
        let mut users = self.users();
        if users.leaving.contains(id) {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("The snapshot with id '{id}' is being deleted"),
            ));
        }
        *users.views.entry(id.to_owned()).or_default() += 1;
        Ok(())
    }

    /// A view of the snapshot is gone.
    pub(super) fn release(&self, id: &str) {
        let views = &mut self.users().views;
        if let Some(count) = views.get_mut(id) {
            *count -= 1;
            if *count == 0 {
                views.remove(id);
            }
        }
    }

    /// Whether a view of the snapshot exists.
    pub(super) fn is_held(&self, id: &str) -> bool {
        self.users().views.contains_key(id)
    }

    /// These are being deleted while requests go on: nobody begins to view them. None, when that is over.
    pub(super) fn set_leaving(&self, ids: BTreeSet<String>) {
        self.users().leaving = ids;
    }

    fn users(&self) -> MutexGuard<'_, Users> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Holds the place of a snapshot's L1 table against the limits and the file.
pub(super) fn check_l1(g: Geometry, file: &Child, offset: u64, entries: u32) -> Result<()> {
    let bytes = u64::from(entries) * ENTRY_SIZE;
    let end = offset.checked_add(bytes);
    if bytes > limits::QCOW2_MAX_L1_BYTES
        || !g.is_aligned(offset)
        || (bytes > 0 && offset == 0)
        || end.is_none_or(|end| g.clusters_for(end) > g.clusters_for(file.size()))
    {
        return Err(damaged("the snapshot's L1 table is out of bounds"));
    }
    Ok(())
}

/// Those L2 tables of an L1 table that can be: aligned, without reserved bits, in the file.
fn l2_tables<'a>(
    g: Geometry,
    file: &Child,
    l1: &'a [u64],
) -> impl Iterator<Item = ClusterIndex> + use<'a> {
    let end = g.clusters_for(file.size());
    l1.iter().filter_map(move |entry| {
        let host = L1Entry(*entry).checked(g).ok().flatten()?;
        let cluster = g.host_cluster(host);
        (cluster.0 < end).then_some(cluster)
    })
}
