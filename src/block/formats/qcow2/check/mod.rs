//! The image checker, and the repair of refcounts.
//!
//! It reads the image through a [`Child`] and shares no state with the live driver, so that tests can hold the driver
//! against it. It counts as `qemu-img check` does, and in addition finds structures that share a cluster although
//! the refcounts agree with it.
//!
//! ```text
//! header, snapshot table -> refcount blocks (which clusters have a stored count of 1; a repair leaves this out)
//!   -> L1 tables (how often is each L2 table used) -> L2 tables, each read once, by host offset
//!   -> refcount blocks again: stored against counted
//! ```
//!
//! Tables are read in large pieces, several at once, and worked through on other threads. An L2 table that is used by many
//! snapshots is read once and counted many times. Memory is two bytes per referenced host cluster, within
//! [`crate::limits::QCOW2_MAX_CHECK_BYTES`].
//!
//! * `report`: what callers give and get
//! * `counts`: the counters in memory
//! * `walk`: L1 tables, and what L2 tables add; `tables`: one L2 table
//! * `refcounts`: stored counts against counted ones
//! * `bitmaps`: clusters of persistent bitmaps
//! * `repair`: what is wrong put right

mod bitmaps;
mod counts;
mod refcounts;
mod repair;
mod report;
mod tables;
mod walk;

use std::ops::Range;
use std::sync::Arc;

use counts::{Bitmap, Counts};
pub use repair::repair;
pub use report::{CheckOptions, CheckReport, MAX_FINDINGS, Progress, Repair, RepairReport};

use super::geometry::Geometry;
use super::header::Header;
use super::snapshot::table::SnapshotTable;
use crate::driver::Child;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{QCOW2_MAX_CHECK_TABLE_BYTES, QCOW2_MAX_LOST_CLUSTERS};
use crate::units::HostOffset;

/// Bytes that surely hold what tells the header's length.
const HEADER_START: u64 = 512;

/// Checks the image in `file`. Changes nothing; the image should not be written meanwhile.
///
/// An error means that the check could not be made: an unreadable or unsupported header, a failed read, too many
/// clusters. What is wrong in the image is in the report. Cancellation: safe.
pub async fn check(file: &Child) -> Result<CheckReport> {
    check_with(file, &CheckOptions::default()).await
}

/// The same with options.
pub async fn check_with(file: &Child, options: &CheckOptions) -> Result<CheckReport> {
    let mut scan = Scan::load(file, options).await?;
    if scan.report.check_errors == 0 {
        scan.load_refcount_table().await?;
        scan.load_stored_ones().await?;
        scan.count_references().await?;
        scan.count_refcount_structures()?;
        scan.compare().await?;
    }
    Ok(scan.report)
}

/// What things in the file can be, as far as header and size tell.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    g: Geometry,
    file_size: u64,
    /// The file grows where it is written to behind its end.
    growable: bool,
}

impl Bounds {
    /// The clusters of a range; `None` when it is empty or ends a cluster or more behind the end of the file.
    /// The last cluster of a file may be there in part.
    fn clusters(&self, offset: u64, bytes: u64) -> Option<Range<u64>> {
        let end = offset.checked_add(bytes)?;
        let beyond = self.file_size.saturating_add(self.g.cluster_size());
        if bytes == 0 || end >= beyond {
            return None;
        }
        let bits = self.g.cluster_bits();
        Some(offset >> bits..((end - 1) >> bits) + 1)
    }

    /// A data cluster behind the end of the file, but so near that refcounts can reach it: it may be what a writer that ended
    /// uncleanly never put there.
    fn lost_cluster(&self, host: HostOffset) -> Option<u64> {
        let cluster = self.g.host_cluster(host).0;
        let reach = self.file_clusters() + QCOW2_MAX_LOST_CLUSTERS;
        (self.g.is_aligned(host.0) && cluster < reach).then_some(cluster)
    }

    /// Clusters of the file; the last may be there in part.
    fn file_clusters(&self) -> u64 {
        self.g.clusters_for(self.file_size)
    }

    /// Whether a whole cluster at `offset` can be read.
    fn is_readable(&self, offset: HostOffset) -> bool {
        let end = offset.0.checked_add(self.g.cluster_size());
        end.is_some_and(|end| end <= self.file_size)
    }
}

/// A check under way.
struct Scan<'a> {
    file: &'a Child,
    header: Header,
    g: Geometry,
    bounds: Bounds,
    snapshots: SnapshotTable,
    refblocks: Vec<refcounts::Refblock>,
    /// What refcounts say, for the comparison with COPIED flags; a repair makes new flags and does without.
    stored: Option<Arc<refcounts::StoredOnes>>,
    /// Clusters of metadata, of which each has one user (L2 tables may have many L1 tables).
    metadata: Bitmap,
    counts: Counts,
    report: CheckReport,
    /// The first thing found that new refcounts and COPIED flags do not cure.
    incurable: Option<String>,
    /// Bytes of L1, bitmap and refcount tables and refcount blocks read so far.
    table_bytes: u64,
    progress: Option<Arc<Progress>>,
}

impl<'a> Scan<'a> {
    async fn load(file: &'a Child, options: &CheckOptions) -> Result<Scan<'a>> {
        let header = read_header(file).await?;
        header.validate()?;
        let g = header.geometry();
        let mut scan = Scan {
            file,
            g,
            bounds: Bounds {
                g,
                file_size: file.size(),
                growable: file.limits().growable,
            },
            snapshots: SnapshotTable::default(),
            refblocks: Vec::new(),
            stored: None,
            metadata: Bitmap::default(),
            counts: Counts::new(g.refcount_max()),
            report: CheckReport {
                total_clusters: g.clusters_for(header.size),
                ..CheckReport::default()
            },
            incurable: None,
            table_bytes: 0,
            progress: options.progress.clone(),
            header,
        };
        let (offset, count) = (scan.header.snapshots_offset.0, scan.header.nb_snapshots);
        match SnapshotTable::read(file, offset, count).await {
            Ok(table) => scan.snapshots = table,
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                scan.report.check_errors += 1;
                scan.cannot_cure(|| format!("ERROR {error}"));
            }
            Err(error) => return Err(error),
        }
        Ok(scan)
    }

    /// Counts everything but the refcount structures themselves.
    async fn count_references(&mut self) -> Result<()> {
        self.use_metadata("header", 0, self.g.cluster_size())?;
        self.count_incomplete_snapshots();
        let bytes = self.snapshots.encoded_len()? as u64;
        self.use_metadata("snapshot table", self.header.snapshots_offset.0, bytes)?;
        self.count_bitmaps().await?;
        self.walk_tables().await
    }

    fn count_incomplete_snapshots(&mut self) {
        if self.header.version == super::header::Version::V2 {
            return;
        }
        let entries = self.snapshots.entries().iter();
        for (index, _) in entries.enumerate().filter(|(_, e)| e.is_incomplete()) {
            self.report.corruptions += 1;
            self.report
                .note(|| format!("ERROR snapshot table entry {index} is incomplete"));
        }
    }

    /// Accounts for tables about to be read. In a sound image they have their places to themselves, so the file's size
    /// bounds them; thousands that overlap in one place, or in a hole, would keep the check busy for days.
    fn spend(&mut self, bytes: u64) -> Result<()> {
        self.table_bytes = self.table_bytes.saturating_add(bytes);
        match self.table_bytes <= QCOW2_MAX_CHECK_TABLE_BYTES {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::Unsupported,
                "The image has too many tables to be checked",
            )),
        }
    }

    /// Counts a piece of metadata that must have its clusters to itself.
    fn use_metadata(&mut self, what: &str, offset: u64, bytes: u64) -> Result<()> {
        self.count(what, offset, bytes, 1)?;
        self.own(what, offset, bytes)
    }

    /// Marks clusters as metadata, and finds those that were before.
    fn own(&mut self, what: &str, offset: u64, bytes: u64) -> Result<()> {
        let Some(clusters) = self.bounds.clusters(offset, bytes) else {
            return Ok(());
        };
        for cluster in clusters {
            if self.metadata.set(cluster)? {
                self.report.overlaps += 1;
                self.cannot_cure(|| {
                    format!(
                        "ERROR {what} at {offset:#x} overlaps other metadata in cluster {cluster}"
                    )
                });
            }
        }
        Ok(())
    }

    /// Adds `times` references to every cluster that the range touches.
    fn count(&mut self, what: &str, offset: u64, bytes: u64, times: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let Some(clusters) = self.bounds.clusters(offset, bytes) else {
            self.corrupt(times, || {
                format!("ERROR {what} at {offset:#x} lies behind the end of the file")
            });
            return Ok(());
        };
        self.add(clusters, times)
    }

    /// Adds `times` references to clusters of the file.
    fn add(&mut self, clusters: Range<u64>, times: u64) -> Result<()> {
        let lost = self.counts.add(clusters, times)?;
        self.note_overflow(lost);
        Ok(())
    }

    /// Notes references that did not fit.
    fn note_overflow(&mut self, lost: u64) {
        if lost > 0 {
            let bits = self.g.refcount_bits();
            let cluster = self.counts.overflown().unwrap_or_default();
            self.corrupt(lost, || {
                format!(
                    "ERROR refcount overflow: more references than {bits} bits count, first in cluster {cluster}"
                )
            });
        }
    }

    /// Notes corruptions that no new refcounts cure.
    fn corrupt(&mut self, times: u64, text: impl FnOnce() -> String) {
        self.report.corruptions += times;
        self.cannot_cure(text);
    }

    /// Notes something that no new refcounts cure.
    fn cannot_cure(&mut self, text: impl FnOnce() -> String) {
        if self.incurable.is_some() {
            return self.report.note(text);
        }
        let text = text();
        self.report.note(|| text.clone());
        self.incurable = Some(text);
    }
}

/// Reads the header of the image in `file`. Not validated.
pub(super) async fn read_header(file: &Child) -> Result<Header> {
    let size = file.size();
    let start = file.read(0, HEADER_START.min(size)).await?.to_bytes();
    let needed = Header::bytes_needed(&start)?.min(size);
    Header::parse(&file.read(0, needed).await?.to_bytes())
}

#[cfg(test)]
mod tests;
