//! The entries of an L2 table in memory: read without locks, replaced one by one.
//!
//! A standard entry is one atomic word. An extended entry is two words that belong together: who replaces one holds the
//! table's mutex and makes a sequence counter odd meanwhile, and a reader that sees the counter odd or changed
//! reads again.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Mutex, PoisonError};

use super::super::entry::{L2Entry, l2_entries};
use super::super::geometry::Geometry;

/// How often a reader tries before it waits for the writers: one of them may have been interrupted half way.
const TRIES: usize = 32;

/// All entries of a table.
#[derive(Debug)]
pub(super) enum Entries {
    /// One word each.
    Standard(Box<[AtomicU64]>),
    /// Two words each.
    Extended(Pairs),
}

/// Entries of two words.
#[derive(Debug)]
pub(super) struct Pairs {
    /// Descriptor and bitmap.
    pairs: Box<[[AtomicU64; 2]]>,
    /// Odd while an entry is being replaced.
    sequence: AtomicU64,
    /// Held while an entry is being replaced.
    replacing: Mutex<()>,
}

impl Entries {
    /// Entries that are all empty.
    pub(super) fn empty(g: Geometry) -> Self {
        let none = std::iter::repeat_n(L2Entry::default(), g.l2_entries() as usize);
        Self::collect(g, none)
    }

    /// The entries of a table as it lies in the file.
    pub(super) fn parse(g: Geometry, table: &[u8]) -> Self {
        Self::collect(g, l2_entries(g, table))
    }

    /// These entries.
    pub(super) fn collect(g: Geometry, entries: impl Iterator<Item = L2Entry>) -> Self {
        if g.has_extended_l2() {
            let pair = |entry: L2Entry| [entry.descriptor, entry.bitmap].map(AtomicU64::new);
            return Entries::Extended(Pairs {
                pairs: entries.map(pair).collect(),
                sequence: AtomicU64::new(0),
                replacing: Mutex::new(()),
            });
        }
        let word = |entry: L2Entry| AtomicU64::new(entry.descriptor);
        Entries::Standard(entries.map(word).collect())
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        match self {
            Entries::Standard(words) => words.len(),
            Entries::Extended(pairs) => pairs.pairs.len(),
        }
    }

    /// The entry at `index`.
    pub(super) fn get(&self, index: usize) -> L2Entry {
        match self {
            Entries::Standard(words) => L2Entry::standard(words[index].load(Ordering::Acquire)),
            Entries::Extended(pairs) => pairs.get(index),
        }
    }

    /// Some of the entries as they go to the file.
    pub(super) fn to_bytes(&self, range: Range<usize>) -> Vec<u8> {
        match self {
            Entries::Standard(words) => words[range]
                .iter()
                .flat_map(|word| word.load(Ordering::Acquire).to_be_bytes())
                .collect(),
            Entries::Extended(pairs) => range
                .map(|index| pairs.get(index))
                .flat_map(|entry| [entry.descriptor, entry.bitmap])
                .flat_map(u64::to_be_bytes)
                .collect(),
        }
    }

    /// Replaces the entry at `index` by `new` if it is `old`; answers whether it was.
    pub(super) fn replace(&self, index: usize, old: L2Entry, new: L2Entry) -> bool {
        match self {
            Entries::Standard(words) => {
                debug_assert_eq!(new.bitmap, 0, "a standard entry has one word");
                let (old, new) = (old.descriptor, new.descriptor);
                words[index]
                    .compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
                    .is_ok()
            }
            Entries::Extended(pairs) => pairs.replace(index, old, new),
        }
    }
}

impl Pairs {
    fn get(&self, index: usize) -> L2Entry {
        let pair = &self.pairs[index];
        for _ in 0..TRIES {
            let before = self.sequence.load(Ordering::Acquire);
            let entry = load(pair);
            // Both words were read before the counter is read again.
            fence(Ordering::Acquire);
            if before.is_multiple_of(2) && self.sequence.load(Ordering::Relaxed) == before {
                return entry;
            }
            std::hint::spin_loop();
        }
        let _alone = self
            .replacing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        load(pair)
    }

    fn replace(&self, index: usize, old: L2Entry, new: L2Entry) -> bool {
        let pair = &self.pairs[index];
        let _alone = self
            .replacing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if load(pair) != old {
            return false;
        }
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence + 1, Ordering::Relaxed);
        // Whoever sees one of the words below sees the odd counter as well.
        fence(Ordering::Release);
        pair[0].store(new.descriptor, Ordering::Relaxed);
        pair[1].store(new.bitmap, Ordering::Relaxed);
        self.sequence.store(sequence + 2, Ordering::Release);
        true
    }
}

fn load(pair: &[AtomicU64; 2]) -> L2Entry {
    L2Entry {
        descriptor: pair[0].load(Ordering::Relaxed),
        bitmap: pair[1].load(Ordering::Relaxed),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_reader_never_sees_half_of_an_extended_entry() {
        let g = Geometry::new(14, 4).with_extended_l2();
        let entries = Arc::new(Entries::empty(g));
        let entry = |value: u64| L2Entry {
            descriptor: value,
            bitmap: !value,
        };
        let first = entry(1);
        assert!(entries.replace(7, L2Entry::default(), first));
        let readers: Vec<_> = (0..2)
            .map(|_| {
                let entries = entries.clone();
                std::thread::spawn(move || {
                    let mut last = 0;
                    while last < 20_000 {
                        let seen = entries.get(7);
                        assert_eq!(seen.bitmap, !seen.descriptor);
                        assert!(seen.descriptor >= last);
                        last = seen.descriptor;
                    }
                })
            })
            .collect();
        for value in 1..20_000 {
            assert!(entries.replace(7, entry(value), entry(value + 1)));
            assert!(!entries.replace(7, entry(value), entry(value)));
        }
        for reader in readers {
            reader.join().unwrap();
        }
    }
}
