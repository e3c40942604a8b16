//! The active L1 table in memory.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::entry::L1Entry;
use super::geometry::ENTRY_SIZE;
use crate::units::HostOffset;

/// Entries of a sector: what is written at once when one of them changes.
const PER_SECTOR: usize = 64;

/// An L1 table. Entries change in place; a table of another size or place is another `L1Table`.
#[derive(Debug)]
pub(crate) struct L1Table {
    offset: HostOffset,
    entries: Box<[AtomicU64]>,
    /// Sectors that differ from the disk.
    dirty: Mutex<BTreeSet<usize>>,
}

impl L1Table {
    /// A table as it lies at `offset`.
    pub(crate) fn new(offset: HostOffset, entries: impl IntoIterator<Item = u64>) -> Self {
        L1Table {
            offset,
            entries: entries.into_iter().map(AtomicU64::new).collect(),
            dirty: Mutex::default(),
        }
    }

    /// Where it lies.
    pub(crate) fn offset(&self) -> HostOffset {
        self.offset
    }

    /// How many entries it has.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The entry at `index`; no table where the index is beyond the end.
    pub(crate) fn get(&self, index: usize) -> L1Entry {
        let entry = self.entries.get(index);
        L1Entry(entry.map_or(0, |entry| entry.load(Ordering::Acquire)))
    }

    /// Changes an entry; it is written by the next write-back.
    ///
    /// # Panics
    /// When the index is beyond the end: a caller's error.
    pub(crate) fn set(&self, index: usize, entry: L1Entry) {
        self.entries[index].store(entry.0, Ordering::Release);
        self.mark([index / PER_SECTOR]);
    }

    /// Changes the entries for which there is another one; those are written by the next write-back.
    pub(crate) fn change(&self, new: impl Fn(L1Entry) -> Option<L1Entry>) {
        let mut sectors = BTreeSet::new();
        for (index, entry) in self.entries.iter().enumerate() {
            if let Some(new) = new(L1Entry(entry.load(Ordering::Acquire))) {
                entry.store(new.0, Ordering::Release);
                sectors.insert(index / PER_SECTOR);
            }
        }
        self.mark(sectors);
    }

    /// All entries.
    pub(crate) fn entries(&self) -> Vec<u64> {
        let load = |entry: &AtomicU64| entry.load(Ordering::Acquire);
        self.entries.iter().map(load).collect()
    }

    /// Takes the dirty sectors, neighbours together, as bytes to write at offsets of the file. What could not be written is
    /// marked again.
    pub(crate) fn take_dirty(&self) -> Vec<(Range<usize>, HostOffset, Vec<u8>)> {
        let sectors = {
            let mut dirty = self.dirty.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *dirty)
        };
        let mut runs: Vec<Range<usize>> = Vec::new();
        for sector in sectors {
            match runs.last_mut() {
                Some(run) if run.end == sector => run.end += 1,
                _ => runs.push(sector..sector + 1),
            }
        }
        let part = |run: Range<usize>| {
            let first = run.start * PER_SECTOR;
            let last = (run.end * PER_SECTOR).min(self.entries.len());
            let bytes = self.entries[first..last]
                .iter()
                .flat_map(|entry| entry.load(Ordering::Acquire).to_be_bytes())
                .collect();
            (run, self.offset + first as u64 * ENTRY_SIZE, bytes)
        };
        runs.into_iter().map(part).collect()
    }

    /// Marks sectors as different from the disk.
    pub(crate) fn mark(&self, sectors: impl IntoIterator<Item = usize>) {
        let mut dirty = self.dirty.lock().unwrap_or_else(PoisonError::into_inner);
        dirty.extend(sectors);
    }
}
