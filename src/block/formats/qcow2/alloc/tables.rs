//! Refcounts of whole L2 tables: many counters changed at once, all of them or none.
//!
//! The blocks that hold them are loaded first, whatever the cache's limit; from then on nothing waits. So an I/O error
//! comes before the first change, and a caller that is dropped leaves all or nothing.

use super::block::Counters;
use super::*;
use crate::formats::qcow2::runs::read_clusters;
use crate::limits::QCOW2_MAX_SETTLE_REFCOUNT_BYTES;

/// What has become of references that were taken from many clusters.
#[derive(Debug, Default)]
pub(crate) struct Lowered {
    /// Clusters, ascending, of which the last reference is gone. They keep a count of 1, so that nobody gets them yet.
    pub(crate) last: Vec<Run>,
    /// How many references could not be taken, because they were not counted.
    pub(crate) uncounted: u64,
}

impl Allocator {
    /// Adds `more` references to each cluster of `runs`, once for each time that it is in there. Answers how many were in use
    /// without being counted: those that have a counter are counted from now on.
    ///
    /// On error nothing has changed: `OutOfRange` when a counter is too narrow, I/O errors. Cancellation: all or nothing.
    pub(crate) async fn raise(&mut self, runs: &[Run], more: u64) -> Result<u64> {
        self.load(runs).await?;
        let mut uncounted = 0;
        let mut done: Vec<Run> = Vec::new();
        for part in self.all_parts(runs) {
            match self.raise_part(part, more) {
                Ok(healed) => uncounted += healed,
                Err(error) => {
                    for part in done {
                        self.lower_part(part, more, &mut Lowered::default());
                    }
                    return Err(error);
                }
            }
            done.push(part);
        }
        Ok(uncounted)
    }

    /// Takes `less` references from each cluster of `runs`, once for each time that it is in there. On error nothing has
    /// changed. Cancellation: all or nothing.
    pub(crate) async fn lower(&mut self, runs: &[Run], less: u64) -> Result<Lowered> {
        self.load(runs).await?;
        let mut lowered = Lowered::default();
        for part in self.all_parts(runs) {
            self.lower_part(part, less, &mut lowered);
        }
        let mut last: Vec<u64> = lowered
            .last
            .iter()
            .flat_map(|run| run.start.0..run.end())
            .collect();
        last.sort_unstable();
        last.dedup();
        lowered.last.clear();
        for index in last {
            push_run(&mut lowered.last, one(ClusterIndex(index)));
        }
        for run in &lowered.last {
            self.seal(*run);
        }
        Ok(lowered)
    }

    /// Whether each of these clusters has exactly one reference, in order.
    pub(crate) async fn singles(&mut self, clusters: &[ClusterIndex]) -> Result<Vec<bool>> {
        let mut runs = Vec::new();
        for cluster in clusters {
            push_run(&mut runs, one(*cluster));
        }
        self.load(&runs).await?;
        let mut present: Option<(usize, &Block)> = None;
        let single = |cluster: &ClusterIndex| {
            let region = self.g.refblock_of(*cluster);
            if present.is_none_or(|(other, _)| other != region) {
                present = self.blocks.get(&region).map(|block| (region, block));
            }
            let index = self.g.in_refblock(*cluster);
            present.is_some_and(|(at, block)| at == region && block.counters.get(index) == 1)
        };
        Ok(clusters.iter().map(single).collect())
    }

    /// Takes clusters over whose refcounts are 0 now, nobody uses and nothing durable points to.
    pub(crate) fn adopt_freed(&mut self, run: Run) {
        self.seal(run);
        self.owners.release(run.start, run.count);
        self.add_free(run);
    }

    fn all_parts(&self, runs: &[Run]) -> Vec<Run> {
        let parts = runs.iter().flat_map(|run| self.parts(*run));
        parts.map(|(_, part)| part).collect()
    }

    /// The counters of a part of one block that is loaded.
    fn part(&mut self, part: Run) -> Option<(usize, usize, &mut Block)> {
        let region = self.g.refblock_of(part.start);
        let first = self.g.in_refblock(part.start);
        let block = self.blocks.get_mut(&region)?;
        Some((region, first, block))
    }

    fn raise_part(&mut self, run: Run, more: u64) -> Result<u64> {
        let (most, count) = (self.g.refcount_max(), run.count as usize);
        let bits = self.g.refcount_bits();
        let Some((region, first, block)) = self.part(run) else {
            return Ok(run.count);
        };
        let (least, greatest) = block.counters.bounds(first, count);
        // A cluster that is in use and not counted has its one reference besides.
        let after = greatest.max(1).checked_add(more);
        if after.is_none_or(|after| after > most) {
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!("Refcounts of {bits} bits cannot count another snapshot"),
            ));
        }
        let mut healed = 0;
        if least == 0 {
            for index in first..first + count {
                if block.counters.get(index) == 0 {
                    block.counters.set(index, 1);
                    healed += 1;
                }
            }
        }
        block.counters.add(first, count, more);
        self.note_count(greatest.max(1) + more);
        self.mark_dirty(region, first, count);
        Ok(healed)
    }

    fn lower_part(&mut self, run: Run, less: u64, lowered: &mut Lowered) {
        let count = run.count as usize;
        let Some((region, first, block)) = self.part(run) else {
            lowered.uncounted += run.count;
            return;
        };
        let (least, _) = block.counters.bounds(first, count);
        if least > less {
            block.counters.subtract(first, count, less);
            return self.mark_dirty(region, first, count);
        }
        for (nth, index) in (first..first + count).enumerate() {
            let is = block.counters.get(index);
            match is.checked_sub(less) {
                None => lowered.uncounted += 1,
                Some(0) => {
                    block.counters.set(index, 1);
                    push_run(&mut lowered.last, one(run.start + nth as u64));
                }
                Some(left) => block.counters.set(index, left),
            }
        }
        self.mark_dirty(region, first, count);
    }

    /// Brings the blocks into memory that count the clusters of `runs`, as far as there are any.
    async fn load(&mut self, runs: &[Run]) -> Result<()> {
        let mut needed: Vec<usize> = Vec::new();
        for (region, _) in runs.iter().flat_map(|run| self.parts(*run)) {
            if needed.last() != Some(&region) && self.has_block(region) {
                needed.push(region);
            }
        }
        needed.sort_unstable();
        needed.dedup();
        if (needed.len() as u64) << self.g.cluster_bits() > QCOW2_MAX_SETTLE_REFCOUNT_BYTES {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "The clusters of an L2 table are scattered over too many refcount blocks",
            ));
        }
        let mut missing: Vec<(HostOffset, usize)> = needed
            .iter()
            .filter(|region| !self.blocks.contains_key(region))
            .map(|&region| (HostOffset(self.table[region]), region))
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        missing.sort_unstable();
        self.make_room_beside(&needed, missing.len()).await?;
        let offsets: Vec<HostOffset> = missing.iter().map(|(offset, _)| *offset).collect();
        let (file, g) = (self.file.clone(), self.g);
        read_clusters(&file, &offsets, g.cluster_size(), |nth, bytes| {
            let (offset, region) = missing[nth];
            let counters = Counters::from_bytes(bytes.into(), g);
            self.insert_block(region, offset, counters);
            Ok(())
        })
        .await
    }

    /// Evicts blocks until `more` have room, but none of `needed`, which ascend: rather the cache grows.
    async fn make_room_beside(&mut self, needed: &[usize], more: usize) -> Result<()> {
        for _ in 0..self.order.len() {
            if self.blocks.len() + more <= self.cache_limit {
                break;
            }
            let Some(&oldest) = self.order.front() else {
                break;
            };
            if needed.binary_search(&oldest).is_ok() {
                self.order.rotate_left(1);
                continue;
            }
            self.write_block(oldest).await?;
            self.order.pop_front();
            self.blocks.remove(&oldest);
        }
        Ok(())
    }
}

fn one(start: ClusterIndex) -> Run {
    Run { start, count: 1 }
}
