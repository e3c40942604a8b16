//! References counted in memory, sparse and within a budget.

use std::collections::HashMap;
use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::counters::CounterWidth;
use crate::limits::QCOW2_MAX_CHECK_BYTES;

/// Clusters per chunk: the unit of memory.
const CHUNK: u64 = 1 << 16;

/// Counts at this value continue in `Counts::large`.
const SATURATED: u16 = u16::MAX;

/// Single clusters of a chunk that wait to be counted together: a chunk fits the processor's cache, the whole does not.
const TOGETHER: usize = 4096;

/// The chunk of each part of a range, and the part.
fn parts(clusters: Range<u64>) -> impl DoubleEndedIterator<Item = (usize, Range<u64>)> {
    let chunks = clusters.start / CHUNK..clusters.end.div_ceil(CHUNK);
    chunks.map(move |chunk| {
        let start = clusters.start.max(chunk * CHUNK);
        (chunk as usize, start..clusters.end.min((chunk + 1) * CHUNK))
    })
}

/// How often each host cluster is referenced. Chunks without references take no memory.
#[derive(Debug, Default)]
pub(super) struct Counts {
    chunks: Vec<Option<Box<[u16]>>>,
    /// References that wait, per chunk: times and place, 16 bits each.
    waiting: Vec<Vec<u32>>,
    /// Counts that do not fit 16 bits. They need 65535 snapshots, or an image made to annoy.
    large: HashMap<u64, u64>,
    /// The greatest count that the image's refcounts can say.
    max: u64,
    /// The first cluster with more references than that.
    overflown: Option<u64>,
    budget: u64,
}

impl Counts {
    /// No references. Counts stop at `max`.
    pub(super) fn new(max: u64) -> Self {
        Counts {
            chunks: Vec::new(),
            waiting: Vec::new(),
            large: HashMap::new(),
            max,
            overflown: None,
            budget: QCOW2_MAX_CHECK_BYTES,
        }
    }

    /// The count of a cluster.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let chunk = self.chunks.get((cluster / CHUNK) as usize);
        match chunk.and_then(Option::as_ref) {
            None => 0,
            Some(chunk) => match chunk[(cluster % CHUNK) as usize] {
                SATURATED => self.large.get(&cluster).copied().unwrap_or(0),
                count => u64::from(count),
            },
        }
    }

    /// Adds `times` to each cluster of the range; answers how many references did not fit the refcount width.
    pub(super) fn add(&mut self, clusters: Range<u64>, times: u64) -> Result<u64> {
        let limit = u64::from(SATURATED).min(self.max.saturating_add(1));
        let mut lost = 0_u64;
        for (chunk, part) in parts(clusters) {
            let slots = self.ensure(chunk)?;
            let slots = &mut slots[inside(&part)];
            let simple = slots
                .iter()
                .all(|count| u64::from(*count).saturating_add(times) < limit);
            if simple {
                slots.iter_mut().for_each(|count| *count += times as u16);
            } else {
                for cluster in part {
                    lost = lost.saturating_add(self.add_one(cluster, times)?);
                }
            }
        }
        Ok(lost)
    }

    /// Adds `times` to a cluster alone, at the latest in `count_waiting`; answers as `add`, for any that waited.
    pub(super) fn add_soon(&mut self, cluster: u64, times: u64) -> Result<u64> {
        let chunk = (cluster / CHUNK) as usize;
        let (Some(Some(_)), Ok(short)) = (self.chunks.get(chunk), u16::try_from(times)) else {
            return self.add(cluster..cluster + 1, times);
        };
        if self.waiting.len() <= chunk {
            self.spend((chunk + 1 - self.waiting.len()) as u64 * 24)?;
            self.waiting.resize_with(chunk + 1, Vec::new);
        }
        if self.waiting[chunk].capacity() == 0 {
            self.spend(TOGETHER as u64 * 4)?;
            self.waiting[chunk].reserve_exact(TOGETHER);
        }
        let waiting = &mut self.waiting[chunk];
        waiting.push(u32::from(short) << 16 | (cluster % CHUNK) as u32);
        match waiting.len() < TOGETHER {
            true => Ok(0),
            false => self.count_chunk(chunk),
        }
    }

    /// Counts what waits; answers as `add`.
    pub(super) fn count_waiting(&mut self) -> Result<u64> {
        let mut lost = 0_u64;
        for chunk in 0..self.waiting.len() {
            lost = lost.saturating_add(self.count_chunk(chunk)?);
        }
        self.waiting = Vec::new();
        Ok(lost)
    }

    fn count_chunk(&mut self, chunk: usize) -> Result<u64> {
        let limit = u64::from(SATURATED).min(self.max.saturating_add(1));
        let mut waiting = std::mem::take(&mut self.waiting[chunk]);
        let mut lost = 0_u64;
        for reference in waiting.drain(..) {
            let (times, place) = (u64::from(reference >> 16), (reference & 0xffff) as usize);
            if let Some(Some(slots)) = self.chunks.get_mut(chunk)
                && u64::from(slots[place]) + times < limit
            {
                slots[place] += times as u16;
            } else {
                let cluster = chunk as u64 * CHUNK + place as u64;
                lost = lost.saturating_add(self.add_one(cluster, times)?);
            }
        }
        self.waiting[chunk] = waiting;
        Ok(lost)
    }

    /// The first cluster that had more references than fit.
    pub(super) fn overflown(&self) -> Option<u64> {
        self.overflown
    }

    /// The clusters that are referenced once.
    pub(super) fn ones(&self) -> Result<Bitmap> {
        let mut ones = Bitmap::default();
        for (chunk, slots) in self.chunks.iter().enumerate() {
            for (place, count) in slots.iter().flat_map(|slots| slots.iter().enumerate()) {
                if *count == 1 {
                    ones.set(chunk as u64 * CHUNK + place as u64)?;
                }
            }
        }
        Ok(ones)
    }

    /// The counts of the range as a refcount block has them: zeroes where nothing is written.
    pub(super) fn encode(&self, clusters: Range<u64>, width: CounterWidth, block: &mut [u8]) {
        let first = clusters.start;
        for (chunk, part) in parts(self.within(clusters)) {
            let Some(Some(slots)) = self.chunks.get(chunk) else {
                continue;
            };
            let at = (part.start - first) as usize;
            let slots = &slots[inside(&part)];
            if width.is_16_bits() {
                let (counters, _) = block[2 * at..].as_chunks_mut::<2>();
                for (counter, count) in counters.iter_mut().zip(slots) {
                    // 65535 is itself: such an image has no larger count.
                    *counter = count.to_be_bytes();
                }
                continue;
            }
            for (nth, count) in slots.iter().enumerate().filter(|(_, count)| **count != 0) {
                let count = match *count {
                    SATURATED => self.get(part.start + nth as u64),
                    count => u64::from(count),
                };
                width.set(block, at + nth, count);
            }
        }
    }

    /// The first counted cluster of the range.
    pub(super) fn next_counted(&self, clusters: Range<u64>) -> Option<u64> {
        parts(self.within(clusters)).find_map(|(chunk, part)| {
            let slots = self.chunks.get(chunk)?.as_ref()?;
            let found = slots[inside(&part)].iter().position(|count| *count != 0)?;
            Some(part.start + found as u64)
        })
    }

    /// The last counted cluster of the range.
    pub(super) fn last_counted(&self, clusters: Range<u64>) -> Option<u64> {
        parts(self.within(clusters))
            .rev()
            .find_map(|(chunk, part)| {
                let slots = self.chunks.get(chunk)?.as_ref()?;
                let found = slots[inside(&part)].iter().rposition(|count| *count != 0)?;
                Some(part.start + found as u64)
            })
    }

    /// The part of a range that can have counts.
    fn within(&self, clusters: Range<u64>) -> Range<u64> {
        clusters.start..clusters.end.min(self.end()).max(clusters.start)
    }

    /// The end of the last chunk that has counts, in clusters.
    pub(super) fn end(&self) -> u64 {
        self.chunks.len() as u64 * CHUNK
    }

    /// The counters of a chunk, made if need be.
    fn ensure(&mut self, index: usize) -> Result<&mut [u16]> {
        if self.chunks.len() <= index {
            self.spend((index + 1 - self.chunks.len()) as u64 * 16)?;
            self.chunks.resize_with(index + 1, || None);
        }
        if self.chunks[index].is_none() {
            self.spend(CHUNK * 2)?;
        }
        Ok(self.chunks[index].get_or_insert_with(|| vec![0; CHUNK as usize].into()))
    }

    fn add_one(&mut self, cluster: u64, times: u64) -> Result<u64> {
        let Some(Some(chunk)) = self.chunks.get_mut((cluster / CHUNK) as usize) else {
            return Ok(0);
        };
        let slot = &mut chunk[(cluster % CHUNK) as usize];
        let old = match *slot {
            SATURATED => self.large.get(&cluster).copied().unwrap_or(0),
            count => u64::from(count),
        };
        let new = old.saturating_add(times).min(self.max);
        if new >= u64::from(SATURATED) {
            *slot = SATURATED;
            if self.large.insert(cluster, new).is_none() {
                self.spend(64)?;
            }
        } else {
            *slot = new as u16;
        }
        if new - old < times {
            self.overflown.get_or_insert(cluster);
        }
        Ok(times - (new - old))
    }

    fn spend(&mut self, bytes: u64) -> Result<()> {
        self.budget = self
            .budget
            .checked_sub(bytes)
            .ok_or_else(too_large_to_check)?;
        Ok(())
    }
}

/// Where in its chunk a part of a range lies.
fn inside(part: &Range<u64>) -> Range<usize> {
    let start = (part.start % CHUNK) as usize;
    start..start + (part.end - part.start) as usize
}

/// One bit per host cluster, as sparse as the counts.
#[derive(Debug, Default)]
pub(super) struct Bitmap {
    chunks: Vec<Option<Box<[u64]>>>,
    bytes: u64,
}

impl Bitmap {
    /// Whether the cluster's bit is set.
    pub(super) fn get(&self, cluster: u64) -> bool {
        let chunk = self.chunks.get((cluster / CHUNK) as usize);
        let Some(Some(chunk)) = chunk else {
            return false;
        };
        let bit = cluster % CHUNK;
        chunk[(bit / 64) as usize] >> (bit % 64) & 1 != 0
    }

    /// Sets the cluster's bit; answers what it was.
    pub(super) fn set(&mut self, cluster: u64) -> Result<bool> {
        let index = (cluster / CHUNK) as usize;
        if self.chunks.len() <= index {
            self.spend((index + 1 - self.chunks.len()) as u64 * 16)?;
            self.chunks.resize_with(index + 1, || None);
        }
        if self.chunks[index].is_none() {
            self.spend(CHUNK / 8)?;
        }
        let chunk = self.chunks[index].get_or_insert_with(|| vec![0; CHUNK as usize / 64].into());
        let bit = cluster % CHUNK;
        let word = &mut chunk[(bit / 64) as usize];
        let mask = 1 << (bit % 64);
        let was = *word & mask != 0;
        *word |= mask;
        Ok(was)
    }

    /// How many clusters of the range have their bit set.
    pub(super) fn count(&self, clusters: Range<u64>) -> u64 {
        if clusters.end == clusters.start + 1 {
            return u64::from(self.get(clusters.start));
        }
        let mut found = 0;
        for (chunk, part) in parts(clusters) {
            let Some(Some(words)) = self.chunks.get(chunk) else {
                continue;
            };
            let inside = inside(&part);
            for word in inside.start / 64..inside.end.div_ceil(64) {
                // Runs are mostly long or single clusters: whole words but for the ends.
                let below = |end: usize| match end.saturating_sub(word * 64) {
                    bits @ 0..64 => (1 << bits) - 1,
                    _ => u64::MAX,
                };
                let wanted = below(inside.end) & !below(inside.start);
                found += u64::from((words[word] & wanted).count_ones());
            }
        }
        found
    }

    fn spend(&mut self, bytes: u64) -> Result<()> {
        self.bytes += bytes;
        match self.bytes <= QCOW2_MAX_CHECK_BYTES {
            true => Ok(()),
            false => Err(too_large_to_check()),
        }
    }
}

fn too_large_to_check() -> Error {
    Error::new(
        ErrorKind::Unsupported,
        "The image uses too many clusters to be checked in memory",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_pass_16_bits_and_stop_at_the_refcount_width() {
        let mut counts = Counts::new(70_000);
        assert_eq!(counts.add(3..5, 65_534).unwrap(), 0);
        assert_eq!(
            (counts.get(3), counts.get(2), counts.get(5)),
            (65_534, 0, 0)
        );
        assert_eq!(counts.add(4..5, 4_000).unwrap(), 0);
        assert_eq!((counts.get(3), counts.get(4)), (65_534, 69_534));
        assert_eq!(counts.add(4..5, 1_000).unwrap(), 534);
        assert_eq!(counts.get(4), 70_000);
        assert_eq!(counts.next_counted(0..100), Some(3));
        assert!(counts.next_counted(5..1 << 20).is_none());
    }

    #[test]
    fn clusters_that_are_counted_together_count_as_each_alone() {
        let mut random = fastrand::Rng::with_seed(1);
        let (mut together, mut alone) = (Counts::new(3), Counts::new(3));
        let mut lost = [0, 0];
        for _ in 0..4 * TOGETHER {
            let (cluster, times) = (random.u64(0..3 * CHUNK) / 13 * 13, random.u64(1..3));
            lost[0] += together.add_soon(cluster, times).unwrap();
            lost[1] += alone.add(cluster..cluster + 1, times).unwrap();
        }
        for times in [0x1_0000, 0xffff] {
            lost[0] += together.add_soon(5, times).unwrap();
            lost[1] += alone.add(5..6, times).unwrap();
        }
        lost[0] += together.count_waiting().unwrap();
        assert_eq!(lost[0], lost[1]);
        let ones = alone.ones().unwrap();
        for cluster in 0..3 * CHUNK {
            assert_eq!(together.get(cluster), alone.get(cluster), "{cluster}");
            assert_eq!(ones.get(cluster), alone.get(cluster) == 1, "{cluster}");
        }
    }

    #[test]
    fn a_range_may_cross_chunks() {
        let mut counts = Counts::new(1);
        let range = CHUNK - 2..2 * CHUNK + 2;
        assert_eq!(counts.add(range.clone(), 1).unwrap(), 0);
        assert_eq!(counts.add(range.clone(), 1).unwrap(), CHUNK + 4);
        assert!(range.clone().all(|cluster| counts.get(cluster) == 1));
        assert_eq!(counts.get(range.end), 0);
        let mut bits = Bitmap::default();
        assert!(!bits.set(CHUNK + 7).unwrap());
        assert!(bits.set(CHUNK + 7).unwrap());
        assert_eq!(bits.count(0..3 * CHUNK), 1);
        assert_eq!(bits.count(CHUNK + 7..CHUNK + 8), 1);
        assert_eq!(bits.count(CHUNK + 8..3 * CHUNK), 0);
        assert_eq!(bits.count(0..CHUNK + 7), 0);
        assert_eq!(counts.last_counted(0..9 * CHUNK), Some(range.end - 1));
        assert_eq!(counts.last_counted(0..range.start), None);
    }

    #[test]
    fn a_block_of_any_width_says_what_was_counted() {
        for order in 0..=6 {
            let width = CounterWidth::new(order);
            let mut counts = Counts::new(width.max());
            let large = width.max().min(100_000);
            counts.add(CHUNK - 3..CHUNK + 1, 1).unwrap();
            counts.add(CHUNK + 1..CHUNK + 2, large).unwrap();
            let mut block = vec![0; 64];
            let range = CHUNK - 4..CHUNK + 4;
            counts.encode(range.clone(), width, &mut block);
            for (nth, cluster) in range.enumerate() {
                let counted = counts.get(cluster);
                assert_eq!(width.get(&block, nth), counted, "order {order}, {nth}");
            }
        }
    }
}
