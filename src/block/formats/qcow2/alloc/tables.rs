//! Refcounts of whole L2 tables: many counters changed at once, all of them or none.
//!
//! The blocks that hold them are loaded first, whatever the cache's limit; from then on nothing waits. So an I/O error
//! comes before the first change, and a caller that is dropped leaves all or nothing.
//!
//! Clusters that were written in random order lie all over the file, and requests that allocate wait meanwhile. So callers give
//! runs in ascending order, each block is looked up once for all of its counters, and blocks are read ahead in pieces.

use super::block::Counters;
use super::*;
use crate::formats::qcow2::runs::read_clusters;
use crate::limits::QCOW2_MAX_SETTLE_REFCOUNT_BYTES;

/// Blocks that are read ahead in one go.
const AHEAD: usize = 16;

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
        let mut done = 0;
        let parts = self.all_parts(runs);
        for in_block in parts.chunk_by(same_block) {
            match self.raise_in_block(in_block, more) {
                Ok(healed) => uncounted += healed,
                Err(error) => {
                    for in_block in parts[..done].chunk_by(same_block) {
                        self.lower_in_block(in_block, more, &mut Lowered::default());
                    }
                    return Err(error);
                }
            }
            done += in_block.len();
        }
        Ok(uncounted)
    }

    /// Takes `less` references from each cluster of `runs`, once for each time that it is in there. On error nothing has
    /// changed. Cancellation: all or nothing.
    pub(crate) async fn lower(&mut self, runs: &[Run], less: u64) -> Result<Lowered> {
        self.load(runs).await?;
        let mut lowered = Lowered::default();
        for in_block in self.all_parts(runs).chunk_by(same_block) {
            self.lower_in_block(in_block, less, &mut lowered);
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
            push_run(&mut lowered.last, Run::one(ClusterIndex(index)));
        }
        for run in &lowered.last {
            self.seal(*run);
        }
        Ok(lowered)
    }

    /// Whether each of these clusters, which ascend, has exactly one reference.
    pub(crate) async fn singles(&mut self, clusters: &[ClusterIndex]) -> Result<Vec<bool>> {
        let mut runs = Vec::new();
        for cluster in clusters {
            push_run(&mut runs, Run::one(*cluster));
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

    /// The runs cut at the borders of refcount blocks, with the index of the block of each part.
    fn all_parts(&self, runs: &[Run]) -> Vec<(usize, Run)> {
        runs.iter().flat_map(|run| self.parts(*run)).collect()
    }

    /// Adds to counters of one block that is loaded; answers how many were 0. On error none has grown.
    fn raise_in_block(&mut self, parts: &[(usize, Run)], more: u64) -> Result<u64> {
        let (g, region) = (self.g, parts[0].0);
        let Some(block) = self.blocks.get_mut(&region) else {
            return Ok(parts.iter().map(|(_, part)| part.count).sum());
        };
        let (mut healed, mut greatest) = (0, 0);
        let mut result = Ok(());
        for (nth, (_, part)) in parts.iter().enumerate() {
            let (first, count) = (g.in_refblock(part.start), part.count as usize);
            let (least, most) = block.counters.bounds(first, count);
            // A cluster that is in use and not counted has its one reference besides.
            let after = most.max(1).checked_add(more);
            let Some(after) = after.filter(|after| *after <= g.refcount_max()) else {
                for (_, part) in &parts[..nth] {
                    let first = g.in_refblock(part.start);
                    block.counters.subtract(first, part.count as usize, more);
                }
                result = Err(too_narrow(g));
                break;
            };
            greatest = greatest.max(after);
            if least == 0 {
                for index in first..first + count {
                    if block.counters.get(index) == 0 {
                        block.counters.set(index, 1);
                        healed += 1;
                    }
                }
            }
            block.counters.add(first, count, more);
        }
        self.mark_parts(region, parts);
        result?;
        self.note_count(greatest);
        Ok(healed)
    }

    /// Takes from counters of one block that is loaded.
    fn lower_in_block(&mut self, parts: &[(usize, Run)], less: u64, lowered: &mut Lowered) {
        let (g, region) = (self.g, parts[0].0);
        let Some(block) = self.blocks.get_mut(&region) else {
            lowered.uncounted += parts.iter().map(|(_, part)| part.count).sum::<u64>();
            return;
        };
        for (_, part) in parts {
            let (first, count) = (g.in_refblock(part.start), part.count as usize);
            let (least, _) = block.counters.bounds(first, count);
            if least > less {
                block.counters.subtract(first, count, less);
                continue;
            }
            for (nth, index) in (first..first + count).enumerate() {
                match block.counters.get(index).checked_sub(less) {
                    None => lowered.uncounted += 1,
                    Some(0) => {
                        block.counters.set(index, 1);
                        push_run(&mut lowered.last, Run::one(part.start + nth as u64));
                    }
                    Some(left) => block.counters.set(index, left),
                }
            }
        }
        self.mark_parts(region, parts);
    }

    fn mark_parts(&mut self, region: usize, parts: &[(usize, Run)]) {
        let g = self.g;
        if let Some(block) = self.blocks.get_mut(&region) {
            for (_, part) in parts {
                let bytes = block
                    .counters
                    .byte_range(g.in_refblock(part.start), part.count as usize);
                block.dirty |= slice_mask(bytes, g.cluster_size() as usize);
            }
            self.dirty.insert(region);
        }
    }

    /// Brings some of the blocks that count the clusters of `runs` into memory; answers whether those were the last ones. Where
    /// not all of them fit into the cache none are: they would take the place of each other.
    pub(crate) async fn load_ahead(&mut self, runs: &[Run]) -> Result<bool> {
        let needed = self.needed(runs);
        if needed.len() > self.cache_limit() {
            return Ok(true);
        }
        let missing = needed
            .iter()
            .filter(|region| !self.blocks.contains_key(region));
        let mut missing: Vec<usize> = missing.copied().collect();
        let is_last = missing.len() <= AHEAD;
        missing.truncate(AHEAD);
        self.read_missing(missing, &needed).await?;
        Ok(is_last)
    }

    /// The blocks that count the clusters of `runs`, as far as there are any, ascending.
    fn needed(&self, runs: &[Run]) -> Vec<usize> {
        let mut needed: Vec<usize> = Vec::new();
        for (region, _) in runs.iter().flat_map(|run| self.parts(*run)) {
            if needed.last() != Some(&region) && self.has_block(region) {
                needed.push(region);
            }
        }
        needed.sort_unstable();
        needed.dedup();
        needed
    }

    /// Brings the blocks into memory that count the clusters of `runs`, as far as there are any.
    async fn load(&mut self, runs: &[Run]) -> Result<()> {
        let needed = self.needed(runs);
        if (needed.len() as u64) << self.g.cluster_bits() > QCOW2_MAX_SETTLE_REFCOUNT_BYTES {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "The clusters of an L2 table are scattered over too many refcount blocks",
            ));
        }
        let missing = needed
            .iter()
            .filter(|region| !self.blocks.contains_key(region));
        let missing = missing.copied().collect();
        self.read_missing(missing, &needed).await
    }

    /// Reads blocks that are not in memory, and keeps those that are `needed` with them, which ascend.
    async fn read_missing(&mut self, missing: Vec<usize>, needed: &[usize]) -> Result<()> {
        if missing.is_empty() {
            return Ok(());
        }
        let places = missing
            .iter()
            .map(|&region| (HostOffset(self.table[region]), region));
        let mut missing: Vec<(HostOffset, usize)> = places.collect();
        missing.sort_unstable();
        self.make_room_beside(needed, missing.len()).await?;
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
            if self.blocks.len() + more <= self.cache_limit() {
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

fn same_block(left: &(usize, Run), right: &(usize, Run)) -> bool {
    left.0 == right.0
}

fn too_narrow(g: Geometry) -> Error {
    let bits = g.refcount_bits();
    Error::new(
        ErrorKind::OutOfRange,
        format!("Refcounts of {bits} bits cannot count another snapshot"),
    )
}
