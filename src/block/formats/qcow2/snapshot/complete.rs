//! The snapshot table of an image that becomes one of version 3, which requires of each snapshot what programs before 2012 did not write.
//!
//! The completed table is written to free clusters, durably, and the header points to it with the very write that says version 3.

use std::sync::Arc;

use super::table::SnapshotTable;
use crate::error::Result;
use crate::formats::qcow2::alloc::{Reserved, Run};
use crate::formats::qcow2::image::Image;
use crate::units::HostOffset;

/// A completed table that the header does not point to yet. Dropped, its place is free again.
pub(in crate::formats::qcow2) struct CompleteTable {
    table: SnapshotTable,
    area: Reserved,
    /// Where the header's table lies.
    replaced: Run,
}

impl Image {
    /// Writes a completed table, if a snapshot lacks anything. The disk is as large as it was when they were taken: an image of
    /// version 2 with snapshots is not resized. Nobody is inside the gate.
    pub(in crate::formats::qcow2) async fn complete_snapshots(
        &self,
    ) -> Result<Option<CompleteTable>> {
        let old = self.snapshots.get();
        if !old.entries().iter().any(|entry| entry.is_incomplete()) {
            return Ok(None);
        }
        let replaced = Run {
            start: self.g.host_cluster(self.header.get().snapshots_offset),
            count: self.g.clusters_for(old.encoded_len()? as u64),
        };
        let mut table = SnapshotTable::clone(&old);
        table.complete(self.size());
        let area = self.write_snapshot_table(table.encode()?).await?;
        // The table, and the counters of its clusters.
        self.write_back().await?;
        Ok(Some(CompleteTable {
            table,
            area,
            replaced,
        }))
    }

    /// The header points to the table, durably.
    pub(in crate::formats::qcow2) fn adopt_snapshots(
        self: &Arc<Self>,
        mut complete: CompleteTable,
    ) {
        complete.keep();
        self.snapshots.set(complete.table);
        self.settling.add_areas([complete.replaced]);
        self.commits.touch();
        self.wake_settler();
    }
}

impl CompleteTable {
    /// Where it lies.
    pub(in crate::formats::qcow2) fn offset(&self, image: &Image) -> HostOffset {
        image.g.host_offset(self.area.run().start)
    }

    /// Its place stays taken: the header may point to it.
    pub(in crate::formats::qcow2) fn keep(&mut self) {
        self.area.publish(self.area.run().count);
    }
}
