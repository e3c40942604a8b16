//! The image checker, and the repair of refcounts.
//!
//! It reads the image through a [`Child`] and shares no state with the live driver, so that tests can hold the driver
//! against it. It counts as `qemu-img check` does, and in addition finds structures that share a cluster although
//! the refcounts agree with it.
//!
//! ```text
//! header, snapshot table -> refcount blocks (which clusters have a stored count of 1)
//!   -> L1 tables (how often is each L2 table used) -> L2 tables, each read once, by host offset
//!   -> refcount blocks again: stored against counted
//! ```
//!
//! An L2 table that is used by many snapshots is read once and counted many times. Memory is two bytes per
//! referenced host cluster, within [`crate::limits::QCOW2_MAX_CHECK_BYTES`].
//!
//! * `counts`: the counters in memory
//! * `walk`: L1 and L2 tables
//! * `refcounts`: stored counts against counted ones
//! * `bitmaps`: clusters of persistent bitmaps
//! * `repair`: new refcounts for a dirty image

mod bitmaps;
mod counts;
mod refcounts;
mod repair;
mod walk;

use counts::{Bitmap, Counts};
pub use repair::repair;

use super::geometry::Geometry;
use super::header::Header;
use super::snapshot::table::SnapshotTable;
use crate::driver::Child;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::QCOW2_MAX_CHECK_TABLE_BYTES;
use crate::units::HostOffset;

/// Findings kept as text: enough to see the pattern, few enough for a log.
const MAX_FINDINGS: usize = 100;

/// Bytes that surely hold what tells the header's length.
const HEADER_START: u64 = 512;

/// What a check found. Counts are those of `qemu-img check --output=json`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// End of the last cluster in use, in bytes.
    pub image_end_offset: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Clusters of the active layer that have a host cluster or a compressed stream.
    pub allocated_clusters: u64,
    /// Those of them that do not follow the one before.
    pub fragmented_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// Checks that could not be made.
    pub check_errors: u64,
    /// Errors that can lose data.
    pub corruptions: u64,
    /// Clusters that are counted more often than they are used: lost space, no lost data.
    pub leaks: u64,
    /// Clusters used by two structures that must not share one. Those that the refcounts contradict are
    /// among the corruptions as well; `qemu-img` does not count these.
    pub overlaps: u64,
    /// The first findings as text, for people.
    pub findings: Vec<String>,
}

impl CheckReport {
    /// Nothing at all was found.
    pub fn is_clean(&self) -> bool {
        !self.is_broken() && self.leaks == 0
    }

    /// Something was found that can lose data, or that hid parts of the image from the check.
    pub fn is_broken(&self) -> bool {
        self.corruptions + self.check_errors + self.overlaps > 0
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(text());
        }
    }
}

/// Checks the image in `file`. Changes nothing; the image should not be written meanwhile.
///
/// An error means that the check could not be made: an unreadable or unsupported header, a failed read, too many
/// clusters. What is wrong in the image is in the report. Cancellation: safe.
pub async fn check(file: &Child) -> Result<CheckReport> {
    let mut scan = Scan::load(file).await?;
    if scan.report.check_errors == 0 {
        scan.load_refcounts().await?;
        scan.count_references().await?;
        scan.count_refcount_structures()?;
        scan.compare().await?;
    }
    Ok(scan.report)
}

/// A check under way.
struct Scan<'a> {
    file: &'a Child,
    header: Header,
    g: Geometry,
    snapshots: SnapshotTable,
    /// Clusters of the file; the last may be there in part.
    file_clusters: u64,
    refblocks: Vec<refcounts::Refblock>,
    /// Clusters whose stored refcounts cannot be read; none in nearly every image.
    unknown: Vec<std::ops::Range<u64>>,
    /// Clusters whose stored refcount is 1.
    stored_ones: Bitmap,
    /// Clusters of metadata, of which each has one user (L2 tables may have many L1 tables).
    metadata: Bitmap,
    counts: Counts,
    report: CheckReport,
    /// Corruptions that new refcounts and COPIED flags do not cure.
    structural: u64,
    /// Bytes of L1, bitmap and refcount tables and refcount blocks read so far.
    table_bytes: u64,
}

impl<'a> Scan<'a> {
    async fn load(file: &'a Child) -> Result<Scan<'a>> {
        let header = read_header(file).await?;
        header.validate()?;
        let g = header.geometry();
        let mut report = CheckReport {
            total_clusters: g.clusters_for(header.size),
            ..CheckReport::default()
        };
        let table = SnapshotTable::read(file, header.snapshots_offset.0, header.nb_snapshots).await;
        let snapshots = match table {
            Ok(table) => table,
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                report.check_errors += 1;
                report.note(|| format!("ERROR {error}"));
                SnapshotTable::default()
            }
            Err(error) => return Err(error),
        };
        Ok(Scan {
            file,
            g,
            snapshots,
            file_clusters: g.clusters_for(file.size()),
            refblocks: Vec::new(),
            unknown: Vec::new(),
            stored_ones: Bitmap::default(),
            metadata: Bitmap::default(),
            counts: Counts::new(g.refcount_max()),
            report,
            structural: 0,
            table_bytes: 0,
            header,
        })
    }

    /// Counts everything but the refcount structures themselves.
    async fn count_references(&mut self) -> Result<()> {
        self.use_metadata("header", 0, self.g.cluster_size())?;
        self.count_incomplete_snapshots();
        self.walk_tables().await?;
        let bytes = self.snapshots.encode()?.len() as u64;
        self.use_metadata("snapshot table", self.header.snapshots_offset.0, bytes)?;
        self.count_bitmaps().await
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
        self.count(offset, bytes, 1)?;
        self.own(what, offset, bytes)
    }

    /// Marks clusters as metadata, and finds those that were before.
    fn own(&mut self, what: &str, offset: u64, bytes: u64) -> Result<()> {
        let Some(clusters) = self.clusters(offset, bytes) else {
            return Ok(());
        };
        for cluster in clusters {
            if self.metadata.set(cluster)? {
                self.report.overlaps += 1;
                self.structural += 1;
                self.report
                    .note(|| format!("ERROR {what} overlaps other metadata in cluster {cluster}"));
            }
        }
        Ok(())
    }

    /// Adds `times` references to every cluster that the range touches.
    fn count(&mut self, offset: u64, bytes: u64, times: u64) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let Some(clusters) = self.clusters(offset, bytes) else {
            self.report.corruptions += times;
            self.structural += times;
            self.report.note(|| {
                format!(
                    "ERROR counting reference for region exceeding the end of the file by one \
                     cluster or more: offset {offset:#x} size {bytes:#x}"
                )
            });
            return Ok(());
        };
        let lost = self.counts.add(clusters, times)?;
        if lost > 0 {
            self.report.corruptions += lost;
            self.structural += lost;
            self.report
                .note(|| format!("ERROR refcount overflow at offset {offset:#x}"));
        }
        Ok(())
    }

    /// The clusters of a range; `None` when it is empty or ends a cluster or more behind the end of the file.
    /// The last cluster of a file may be there in part.
    fn clusters(&self, offset: u64, bytes: u64) -> Option<std::ops::Range<u64>> {
        let end = offset.checked_add(bytes)?;
        let beyond = self.file.size().saturating_add(self.g.cluster_size());
        if bytes == 0 || end >= beyond {
            return None;
        }
        let bits = self.g.cluster_bits();
        Some(offset >> bits..((end - 1) >> bits) + 1)
    }

    /// Whether a whole cluster at `offset` can be read.
    fn is_readable(&self, offset: HostOffset) -> bool {
        let end = offset.0.checked_add(self.g.cluster_size());
        let file_end = self.file_clusters << self.g.cluster_bits();
        end.is_some_and(|end| end <= file_end)
            && (self.file.limits().growable || end.is_some_and(|end| end <= self.file.size()))
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
