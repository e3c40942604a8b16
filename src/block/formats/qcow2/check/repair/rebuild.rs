//! New refcount table and blocks next to the old ones, where those cannot be kept.
//!
//! The old table is never changed: the header is switched to the new one, so that a crash in the middle leaves the
//! image as it was.

use std::collections::BTreeSet;
use std::ops::Range;

use bytes::Bytes;

use super::{Mender, switch};
use crate::driver::WriteFlags;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::check::Scan;
use crate::formats::qcow2::check::counts::Bitmap;
use crate::formats::qcow2::counters::CounterWidth;
use crate::formats::qcow2::geometry::{ENTRY_SIZE, Geometry};
use crate::formats::qcow2::header::Incompatible;
use crate::formats::qcow2::runs::write_pieces;
use crate::limits;
use crate::units::{ClusterIndex, HostOffset};

/// Where the new refcount table and its blocks lie: one after another, in clusters that neither the image nor its
/// old refcounts use.
pub(super) struct Area {
    start: ClusterIndex,
    reftable_clusters: u64,
    /// Indexes of the refcount blocks that are needed, ascending.
    blocks: Vec<u64>,
}

impl Area {
    pub(super) fn find(scan: &Scan<'_>) -> Result<Area> {
        let old = old_structures(scan)?;
        let mut clusters = 2;
        loop {
            let start = free_run(scan, &old, clusters)?;
            let area = Area::at(scan, start, clusters);
            let needed = area.reftable_clusters + area.blocks.len() as u64;
            if needed <= clusters {
                return area.check(scan);
            }
            clusters = needed;
        }
    }

    /// What is needed when the structures occupy `clusters` clusters at `start`.
    fn at(scan: &Scan<'_>, start: u64, clusters: u64) -> Area {
        let per_block = scan.g.refcounts_per_block();
        let own = start / per_block..(start + clusters).div_ceil(per_block);
        let mut blocks: BTreeSet<u64> = own.collect();
        let mut at = 0;
        while let Some(counted) = scan.counts.next_counted(at..scan.counts.end()) {
            blocks.insert(counted / per_block);
            at = (counted / per_block + 1).saturating_mul(per_block);
        }
        let last = blocks.last().copied().unwrap_or(0);
        Area {
            start: ClusterIndex(start),
            reftable_clusters: scan.g.clusters_for((last + 1) * ENTRY_SIZE),
            blocks: blocks.into_iter().collect(),
        }
    }

    fn check(self, scan: &Scan<'_>) -> Result<Area> {
        let bits = scan.g.cluster_bits();
        if self.reftable_clusters << bits > limits::QCOW2_MAX_REFTABLE_BYTES {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "The image uses clusters that no refcount table of allowed size reaches",
            ));
        }
        Ok(self)
    }

    /// The clusters of the table and its blocks.
    fn clusters(&self) -> Range<u64> {
        let count = self.reftable_clusters + self.blocks.len() as u64;
        self.start.0..self.start.0 + count
    }

    fn block_offset(&self, g: Geometry, nth: usize) -> HostOffset {
        g.host_offset(self.start + self.reftable_clusters + nth as u64)
    }
}

/// Clusters of the old refcount table and blocks: in use until the header is switched.
pub(super) fn old_structures(scan: &Scan<'_>) -> Result<Bitmap> {
    let mut old = Bitmap::default();
    let table = scan.header.refcount_table_offset;
    let clusters = u64::from(scan.header.refcount_table_clusters);
    let first = scan.g.host_cluster(table).0;
    for cluster in first..first.saturating_add(clusters) {
        if cluster < scan.bounds.file_clusters() {
            old.set(cluster)?;
        }
    }
    for block in &scan.refblocks {
        let cluster = scan.g.host_cluster(block.offset).0;
        if cluster < scan.bounds.file_clusters() {
            old.set(cluster)?;
        }
    }
    Ok(old)
}

/// The first run of `len` clusters that nobody uses. A file has one behind its end at the latest. The cluster there may be in
/// use too: a truncated file ends in front of, or inside of, its last table.
pub(super) fn free_run(scan: &Scan<'_>, old: &Bitmap, len: u64) -> Result<u64> {
    let mut start = 1;
    let mut at = start;
    while at < start + len {
        if scan.counts.get(at) > 0 || old.get(at) {
            start = at + 1;
        }
        at += 1;
    }
    let end = (start + len) << scan.g.cluster_bits();
    if !scan.bounds.growable && end > scan.bounds.file_size {
        return Err(Error::new(
            ErrorKind::NoSpace,
            "No space left on the device for what the repair has to add",
        ));
    }
    Ok(start)
}

impl Mender<'_> {
    /// Writes new structures and true flags, and switches the header.
    pub(super) async fn rebuild(&mut self, area: &Area) -> Result<()> {
        self.write_refblocks(area).await?;
        self.write_reftable(area).await?;
        self.correct_flags().await?;
        self.file.flush().await?;
        let header = &mut self.header;
        header.refcount_table_offset = self.g.host_offset(area.start);
        header.refcount_table_clusters = area.reftable_clusters as u32;
        header.incompatible.0 &= !(Incompatible::DIRTY | Incompatible::CORRUPT);
        switch(self.file, header).await
    }

    async fn write_refblocks(&mut self, area: &Area) -> Result<()> {
        let g = self.g;
        let width = CounterWidth::new(g.refcount_order());
        let own = area.clusters();
        let batch = self.batch();
        for (nth, blocks) in area.blocks.chunks(batch).enumerate() {
            let mut writes = Vec::new();
            for (at, block) in blocks.iter().enumerate() {
                let mut bytes = vec![0; g.cluster_size() as usize];
                let first = block * g.refcounts_per_block();
                let clusters = first..first + g.refcounts_per_block();
                self.counts.encode(clusters.clone(), width, &mut bytes);
                let own = own.start.max(clusters.start)..own.end.min(clusters.end);
                if !own.is_empty() {
                    let own = (own.start - first) as usize..(own.end - first) as usize;
                    width.fill(&mut bytes, own, 1);
                }
                let offset = area.block_offset(g, nth * batch + at);
                writes.push((offset, Bytes::from(bytes)));
            }
            write_pieces(self.file, &writes).await?;
        }
        Ok(())
    }

    async fn write_reftable(&mut self, area: &Area) -> Result<()> {
        let bytes = area.reftable_clusters << self.g.cluster_bits();
        let mut table = vec![0; bytes as usize];
        for (nth, block) in area.blocks.iter().enumerate() {
            let at = (block * ENTRY_SIZE) as usize;
            let offset = area.block_offset(self.g, nth).0;
            table[at..at + 8].copy_from_slice(&offset.to_be_bytes());
        }
        let start = self.g.host_offset(area.start).0;
        self.file
            .write(start, table.into(), WriteFlags::default())
            .await
    }
}
