//! What callers of a check or repair give and get.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Findings kept as text: enough to see the pattern, few enough for a log. A report with so many may have left some out.
pub const MAX_FINDINGS: usize = 100;

/// How an image is checked or repaired.
#[derive(Debug, Clone, Default)]
pub struct CheckOptions {
    /// Told how far the work is.
    pub progress: Option<Arc<Progress>>,
    /// Whether a repair punches holes into the file where it gives leaked clusters back. Without, they are used again later.
    pub discard_leaks: bool,
}

/// How far a check or repair is, for whoever wants to look.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
}

impl Progress {
    /// L2 tables gone through, of how many: the longest part of the work. A repair goes through those of the active layer twice.
    /// The total is 0 until the L1 tables have been read.
    pub fn get(&self) -> (u64, u64) {
        let total = self.total.load(Ordering::Relaxed);
        (self.done.load(Ordering::Relaxed).min(total), total)
    }

    /// There are so many tables more to go through.
    pub(super) fn expect(&self, tables: usize) {
        self.total.fetch_add(tables as u64, Ordering::Relaxed);
    }

    /// One table is done.
    pub(super) fn advance(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }
}

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

    /// Keeps a finding, if there is room.
    pub(super) fn note(&mut self, text: impl FnOnce() -> String) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(text());
        }
    }
}

/// What a repair may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Refcounts that are too high, and the COPIED flags that go with them: space is given back.
    Leaks,
    /// All refcounts, COPIED flags and refcount structures.
    All,
}

/// What a repair has changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RepairReport {
    /// Clusters whose refcount was too high.
    pub leaks_fixed: u64,
    /// Clusters whose refcount was too low, COPIED flags that were wrong, and damaged refcount structures.
    pub corruptions_fixed: u64,
    /// The first of what was wrong as text, for people.
    pub findings: Vec<String>,
}
