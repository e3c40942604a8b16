//! Tables of snapshots on their way into the file: areas of fresh clusters, written before anything points to them.

use std::sync::Arc;

use crate::error::{ErrorKind, Result};
use crate::formats::qcow2::alloc::Reserved;
use crate::formats::qcow2::entry::L1Entry;
use crate::formats::qcow2::image::Image;
use crate::formats::qcow2::owners::Owner;

/// Bytes that file systems allocate at a time, most of them: to write less saves no space.
const HOST_BLOCK: usize = 4096;

/// Places that are tried for a table on a full disk.
const MAX_HOLES: usize = 32;

impl Image {
    /// Writes a snapshot table to free clusters.
    ///
    /// On a full disk a free cluster may be a hole, which cannot be written, and another may not: after a creation there is the
    /// one that the table before was in. So several are tried: taking back a snapshot must not need space.
    pub(super) async fn write_snapshot_table(&self, bytes: Vec<u8>) -> Result<Reserved> {
        let clusters = self.g.clusters_for(bytes.len() as u64);
        // Kept until the end, so that each try gets another place.
        let mut holes = Vec::new();
        loop {
            let owner = Owner::SnapshotTable;
            let area = {
                let mut alloc = self.alloc.lock().await;
                alloc.allocate_metadata(clusters, owner).await?
            };
            match self.write_area(owner, &area, bytes.clone()).await {
                Err(error) if error.kind() == ErrorKind::NoSpace && holes.len() < MAX_HOLES => {
                    holes.push(area);
                }
                result => return result.map(|()| area),
            }
        }
    }

    /// Writes `bytes` to the start of an area, zeroes behind them up to the end of the host's block. No more: a cluster that
    /// a table was in then has space for a table of that length, also when the host's disk is full. Taking back a
    /// snapshot relies on it.
    pub(super) async fn write_area(
        &self,
        owner: Owner,
        area: &Reserved,
        mut bytes: Vec<u8>,
    ) -> Result<()> {
        let clusters = (area.run().count << self.g.cluster_bits()) as usize;
        bytes.resize(bytes.len().next_multiple_of(HOST_BLOCK).min(clusters), 0);
        let at = self.g.host_offset(area.run().start);
        self.metadata.write(owner, at, bytes.into()).await
    }
}

/// The entries of an L1 table as a snapshot has them.
pub(super) fn without_copied(entries: &[u64]) -> Arc<[u64]> {
    let entries = entries.iter();
    entries
        .map(|entry| L1Entry(*entry).with_copied(false).0)
        .collect()
}
