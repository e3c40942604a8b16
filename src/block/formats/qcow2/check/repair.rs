//! New refcounts and COPIED flags, from the references that there are.
//!
//! The old refcount table is never changed: a new one is written next to it and the header switched, so that a crash in
//! the middle leaves the image as it was. COPIED is set only where the count is truly 1, which is right
//! before the switch as well as after it.

use std::collections::BTreeSet;
use std::ops::Range;

use bytes::Bytes;

use super::counts::Bitmap;
use super::refcounts::Refblock;
use super::{CheckReport, Scan};
use crate::driver::{Child, WriteFlags};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::counters::CounterWidth;
use crate::formats::qcow2::entry::{L1Entry, l2_entries};
use crate::formats::qcow2::geometry::ENTRY_SIZE;
use crate::formats::qcow2::header::Incompatible;
use crate::formats::qcow2::runs::{read_clusters, write_clusters};
use crate::limits;
use crate::units::{ClusterIndex, HostOffset};

/// Refcount blocks, or L2 tables, held in memory before they are written, in bytes.
const BATCH_BYTES: u64 = 16 << 20;

/// Rebuilds the refcounts and COPIED flags of the image in `file` and clears its dirty bit. Durable when it answers; the
/// image must not be in use.
///
/// `Corrupt` when tables are damaged in a way that counting does not cure: the image is left as it was.
/// Cancellation: the image is as before or repaired.
pub async fn repair(file: &Child) -> Result<()> {
    let mut scan = Scan::load(file).await?;
    if scan.report.check_errors > 0 {
        return Err(not_repairable(&scan.report));
    }
    scan.load_refcounts().await?;
    scan.count_references().await?;
    if scan.structural > 0 {
        return Err(not_repairable(&scan.report));
    }
    let area = Area::find(&scan)?;
    write_refblocks(&scan, &area).await?;
    write_reftable(&scan, &area).await?;
    write_copied_flags(&mut scan).await?;
    file.flush().await?;
    let header = &mut scan.header;
    header.refcount_table_offset = scan.g.host_offset(area.start);
    header.refcount_table_clusters = area.reftable_clusters as u32;
    header.incompatible = Incompatible(header.incompatible.0 & !Incompatible::DIRTY);
    let (at, bytes) = header.switch_bytes();
    file.write(at.0, bytes.into(), WriteFlags::default())
        .await?;
    file.flush().await
}

fn not_repairable(report: &CheckReport) -> Error {
    let first = report.findings.first();
    Error::new(
        ErrorKind::Corrupt,
        format!(
            "The image has errors that new refcounts do not cure ({}); try qemu-img check -r all",
            first.map_or("unknown", String::as_str)
        ),
    )
}

/// Where the new refcount table and its blocks lie: one after another, in clusters that neither the image nor its
/// old refcounts use.
struct Area {
    start: ClusterIndex,
    reftable_clusters: u64,
    /// Indexes of the refcount blocks that are needed, ascending.
    blocks: Vec<u64>,
}

impl Area {
    fn find(scan: &Scan<'_>) -> Result<Area> {
        let old = old_structures(scan)?;
        let mut clusters = 2;
        loop {
            let start = free_run(scan, &old, clusters);
            let area = Area::at(scan, start, clusters);
            let needed = area.reftable_clusters + area.blocks.len() as u64;
            if needed <= clusters {
                return area.check(scan, clusters);
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

    fn check(self, scan: &Scan<'_>, clusters: u64) -> Result<Area> {
        let bits = scan.g.cluster_bits();
        if self.reftable_clusters << bits > limits::QCOW2_MAX_REFTABLE_BYTES {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "The image uses clusters that no refcount table of allowed size reaches",
            ));
        }
        let end = (self.start.0 + clusters) << bits;
        if !scan.file.limits().growable && end > scan.file.size() {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "No space left on the device for new refcounts",
            ));
        }
        Ok(self)
    }

    /// The clusters of the table and its blocks.
    fn clusters(&self) -> Range<u64> {
        let count = self.reftable_clusters + self.blocks.len() as u64;
        self.start.0..self.start.0 + count
    }

    fn block_offset(&self, scan: &Scan<'_>, nth: usize) -> HostOffset {
        scan.g
            .host_offset(self.start + self.reftable_clusters + nth as u64)
    }
}

/// Clusters of the old refcount table and blocks: in use until the header is switched.
fn old_structures(scan: &Scan<'_>) -> Result<Bitmap> {
    let mut old = Bitmap::default();
    let table = scan.header.refcount_table_offset;
    let clusters = u64::from(scan.header.refcount_table_clusters);
    let first = scan.g.host_cluster(table).0;
    for cluster in first..first.saturating_add(clusters) {
        if cluster < scan.file_clusters {
            old.set(cluster)?;
        }
    }
    for offset in scan.refblocks.iter().filter_map(Refblock::offset_in_file) {
        old.set(scan.g.host_cluster(offset).0)?;
    }
    Ok(old)
}

/// The first run of `len` clusters that nobody uses. Always found: behind the end of the file. The cluster there may be in
/// use too: a truncated file ends in front of, or inside of, its last table.
fn free_run(scan: &Scan<'_>, old: &Bitmap, len: u64) -> u64 {
    let mut start = 1;
    let mut at = start;
    while at < start + len {
        if scan.counts.get(at) > 0 || old.get(at) {
            start = at + 1;
        }
        at += 1;
    }
    start
}

async fn write_refblocks(scan: &Scan<'_>, area: &Area) -> Result<()> {
    let g = scan.g;
    let width = CounterWidth::new(g.refcount_order());
    let own = area.clusters();
    let batch = (BATCH_BYTES / g.cluster_size()).max(1) as usize;
    for (nth, blocks) in area.blocks.chunks(batch).enumerate() {
        let mut writes = Vec::new();
        for (at, block) in blocks.iter().enumerate() {
            let mut bytes = vec![0; g.cluster_size() as usize];
            let first = block * g.refcounts_per_block();
            for index in 0..g.refcounts_per_block() {
                let cluster = first + index;
                let count = scan.counts.get(cluster) + u64::from(own.contains(&cluster));
                if count > 0 {
                    width.set(&mut bytes, index as usize, count);
                }
            }
            let offset = area.block_offset(scan, nth * batch + at);
            writes.push((offset, Bytes::from(bytes)));
        }
        write_clusters(scan.file, &writes, g.cluster_size()).await?;
    }
    Ok(())
}

async fn write_reftable(scan: &Scan<'_>, area: &Area) -> Result<()> {
    let bytes = area.reftable_clusters << scan.g.cluster_bits();
    let mut table = vec![0; bytes as usize];
    for (nth, block) in area.blocks.iter().enumerate() {
        let at = (block * ENTRY_SIZE) as usize;
        let offset = area.block_offset(scan, nth).0;
        table[at..at + 8].copy_from_slice(&offset.to_be_bytes());
    }
    let start = scan.g.host_offset(area.start).0;
    scan.file
        .write(start, table.into(), WriteFlags::default())
        .await
}

/// Makes COPIED say "counted once" in the active L1 table and its L2 tables.
async fn write_copied_flags(scan: &mut Scan<'_>) -> Result<()> {
    let g = scan.g;
    let len = u64::from(scan.header.l1_size) * ENTRY_SIZE;
    let at = scan.header.l1_table_offset.0;
    let mut l1 = scan.file.read(at, len).await?.to_bytes().to_vec();
    let mut offsets = Vec::new();
    let mut changed = false;
    for bytes in l1.as_chunks_mut().0 {
        let entry = L1Entry(u64::from_be_bytes(*bytes));
        let Some(l2) = entry.l2_offset() else {
            continue;
        };
        offsets.push(l2);
        let copied = scan.counts.get(g.host_cluster(l2).0) == 1;
        if copied != entry.is_copied() {
            *bytes = entry.with_copied(copied).0.to_be_bytes();
            changed = true;
        }
    }
    offsets.sort_unstable();
    offsets.dedup();
    let batch = (BATCH_BYTES / g.cluster_size()).max(1) as usize;
    for offsets in offsets.chunks(batch) {
        let mut writes = Vec::new();
        read_clusters(scan.file, offsets, g.cluster_size(), |nth, bytes| {
            if let Some(fixed) = with_true_flags(scan, bytes) {
                writes.push((offsets[nth], Bytes::from(fixed)));
            }
            Ok(())
        })
        .await?;
        write_clusters(scan.file, &writes, g.cluster_size()).await?;
    }
    if changed {
        scan.file
            .write(at, l1.into(), WriteFlags::default())
            .await?;
    }
    Ok(())
}

/// The L2 table with true COPIED flags, if any flag was wrong.
fn with_true_flags(scan: &Scan<'_>, table: &[u8]) -> Option<Vec<u8>> {
    let mut fixed: Option<Vec<u8>> = None;
    for (index, entry) in l2_entries(scan.g, table).enumerate() {
        let Some(host) = entry.host_cluster() else {
            continue;
        };
        let copied = scan.counts.get(scan.g.host_cluster(host).0) == 1;
        if copied != entry.is_copied() {
            let table = fixed.get_or_insert_with(|| table.to_vec());
            entry.with_copied(copied).put(scan.g, table, index);
        }
    }
    fixed
}
