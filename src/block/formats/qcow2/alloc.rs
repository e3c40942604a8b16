//! The allocator: refcount table and blocks, free clusters, and the run that a request owns until it is published.
//!
//! Clusters are handed out in this order: those that this process has freed, then those found by a scan from a hint
//! that only moves forward (a bounded number of counters per request), then the end of the image. So a request
//! usually gets one contiguous run.
//!
//! A run handed out has refcount 1 in memory. Until `Reserved::publish` it belongs to the request; dropped before, it is
//! given back. Giving back needs no order on disk, because nothing on disk ever pointed to the run.
//!
//! Refcount blocks are written back by `write_back` before any table that points to new clusters, which also leads the refcount table
//! to new blocks (`new_blocks`), or the header to a larger refcount table (`grow`).

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use super::geometry::{ENTRY_SIZE, Geometry};
use super::header_cell::HeaderCell;
use super::metadata::Metadata;
use super::owners::{Owner, Owners};
use super::tuning::Tuning;
use crate::driver::Child;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Data;
use crate::limits;
use crate::units::{ClusterIndex, HostOffset};

use block::Block;
use greatest::Greatest;
use grow::Grown;

pub(crate) use grow::TableSwitch;
pub(crate) use run::{Dropped, Reserved, Returned, Run, push_run};

mod block;
mod blocks;
mod greatest;
mod grow;
mod new_blocks;
mod run;
mod tables;

/// Refcount blocks that one allocation searches before it takes clusters at the end of the image.
const SCAN_BLOCKS: u64 = 4;
/// Free runs that are remembered; what is freed beyond is found by the next process.
const MAX_FREE_RUNS: usize = 1 << 20;

/// The refcounts of an image and its free clusters. One owner at a time, behind an async lock.
#[derive(Debug)]
pub(crate) struct Allocator {
    g: Geometry,
    file: Child,
    header: Arc<HeaderCell>,
    owners: Arc<Owners>,
    metadata: Metadata,
    /// The refcount table.
    table: Vec<u64>,
    /// Where it lies in the file, which the header leads to.
    live: Run,
    /// A larger one that takes its place with the next write-back.
    grown: Option<Grown>,
    /// The one that a write-back is about to lead the header to.
    switching: Option<Run>,
    /// Blocks that the table in the file does not lead to yet.
    unlinked: BTreeSet<usize>,
    blocks: HashMap<usize, Block>,
    /// Blocks in memory, oldest first, for eviction.
    order: VecDeque<usize>,
    dirty: BTreeSet<usize>,
    /// None is evicted.
    keeps_blocks: bool,
    tuning: Arc<Tuning>,
    /// Clusters below are not searched again.
    hint: u64,
    /// Clusters from here on are free unless their refcount says otherwise.
    end: u64,
    /// Clusters from here on were never written; `None` for files that do not grow.
    fresh_from: Option<u64>,
    /// Free clusters by start, none of them neighbours.
    free: BTreeMap<u64, u64>,
    returned: Returned,
    /// The cluster that takes the next compressed stream, and the offset of its free part.
    partial: Option<(ClusterIndex, u64)>,
    /// A cluster with this count takes no other stream.
    stream_limit: u64,
    greatest: Greatest,
}

impl Allocator {
    /// An allocator over the image's refcount table, whose entries have been checked.
    pub(super) fn new(
        metadata: Metadata,
        header: Arc<HeaderCell>,
        table: Vec<u64>,
        tuning: Arc<Tuning>,
    ) -> Self {
        let (g, file) = (metadata.g, metadata.file.clone());
        let growable = file.limits().growable;
        let last_block = table.iter().rposition(|entry| *entry != 0);
        let end = match growable {
            true => g.clusters_for(file.size()),
            // A device is mostly longer than its image: the search begins where the last counters are.
            false => last_block.unwrap_or(0) as u64 * g.refcounts_per_block(),
        };
        let live = Run {
            start: g.host_cluster(header.get().refcount_table_offset),
            count: g.clusters_for(table.len() as u64 * ENTRY_SIZE),
        };
        Allocator {
            fresh_from: growable.then_some(end),
            table,
            live,
            grown: None,
            switching: None,
            unlinked: BTreeSet::new(),
            blocks: HashMap::new(),
            order: VecDeque::new(),
            dirty: BTreeSet::new(),
            keeps_blocks: false,
            tuning,
            hint: 0,
            end,
            free: BTreeMap::new(),
            returned: Returned::default(),
            partial: None,
            stream_limit: g.refcount_max(),
            greatest: Greatest::default(),
            g,
            file,
            header,
            owners: metadata.owners.clone(),
            metadata,
        }
    }

    /// Blocks in memory from which on others make room for new ones.
    fn cache_limit(&self) -> usize {
        if self.keeps_blocks {
            return usize::MAX;
        }
        let bytes = self.tuning.refcount_cache_bytes();
        (bytes >> self.g.cluster_bits()).max(4) as usize
    }

    /// While this holds, counters are written by write-backs only, and not to make room for others.
    pub(crate) fn keep_blocks(&mut self, keep: bool) {
        self.keeps_blocks = keep;
    }

    /// Takes up to `want` contiguous clusters (at least one) for guest data. Errors: `NoSpace` when the refcount table
    /// cannot grow; I/O errors of refcount blocks.
    pub(crate) async fn allocate(&mut self, want: u64) -> Result<Reserved> {
        assert!(want > 0);
        self.reclaim().await?;
        if let Some(run) = self.take_free(want, 1)
            && let Some(reserved) = self.reserve_checked(run).await?
        {
            return Ok(reserved);
        }
        if let Some(run) = self.scan(want).await? {
            return self.reserve(run).await;
        }
        let run = self.find_at_end(want).await?;
        self.reserve(run).await
    }

    /// Takes exactly `count` contiguous clusters for metadata; says who owns them. The caller writes them before anything
    /// points to them.
    pub(crate) async fn allocate_metadata(&mut self, count: u64, owner: Owner) -> Result<Reserved> {
        assert!(count > 0);
        self.reclaim().await?;
        let mut found = None;
        if let Some(run) = self.take_free(count, count) {
            found = self.reserve_checked(run).await?;
        }
        let reserved = match found {
            Some(reserved) => reserved,
            None => {
                let run = self.find_at_end(count).await?;
                self.reserve(run).await?
            }
        };
        self.owners
            .claim(reserved.run().start, reserved.run().count, owner)?;
        Ok(reserved)
    }

    /// Takes `len` bytes, less than a cluster, for a compressed stream: behind the last stream where they fit, or where the next
    /// cluster is free too, for one more reference to its cluster; else at the start of a new cluster.
    pub(crate) async fn allocate_stream(&mut self, len: u64) -> Result<(HostOffset, Reserved)> {
        let size = self.g.cluster_size();
        assert!(len < size);
        self.reclaim().await?;
        let mut partial = self.partial;
        if let Some((cluster, _)) = partial {
            let count = self.count(cluster).await?;
            partial = partial.filter(|_| count > 0 && count < self.stream_limit);
        }
        let next = match partial {
            Some((_, used)) if used + len <= size => None,
            _ => Some(self.allocate(1).await?),
        };
        // The search for a cluster may have taken back the last use of this one.
        let partial = partial.filter(|(cluster, _)| {
            let is_next = |next: &Reserved| next.run().start.0 == cluster.0 + 1;
            self.partial == partial && next.as_ref().is_none_or(is_next)
        });
        match (partial, next) {
            (Some((cluster, used)), next) => {
                let reserved = self.share(cluster, next).await?;
                let end = used + len;
                let last = ClusterIndex(cluster.0 + end / size);
                // One that is full takes nothing more.
                self.partial = (end != size).then_some((last, end % size));
                Ok((self.g.host_offset(cluster) + used, reserved))
            }
            (None, Some(next)) => {
                self.partial = Some((next.run().start, len));
                Ok((self.g.host_offset(next.run().start), next))
            }
            (None, None) => unreachable!("what fits nowhere has a cluster of its own"),
        }
    }

    /// One more reference to a cluster, joined with the cluster behind it.
    async fn share(&mut self, cluster: ClusterIndex, next: Option<Reserved>) -> Result<Reserved> {
        let mut run = Run {
            start: cluster,
            count: 1,
        };
        self.change(run, 1).await?;
        if let Some(mut next) = next {
            run.count += next.run().count;
            next.publish(next.run().count);
        }
        Ok(Reserved::counted(run, false, self.returned.clone()))
    }

    /// No compressed stream is added to these clusters any more.
    pub(crate) fn seal(&mut self, run: Run) {
        if let Some((partial, _)) = self.partial
            && run.start <= partial
            && partial.0 < run.end()
        {
            self.partial = None;
        }
    }

    /// The free runs that this process knows: at least `least`, at most `want` clusters of one of them.
    fn take_free(&mut self, want: u64, least: u64) -> Option<Run> {
        // A few tries for one that is large enough: the list may be long.
        let fitting = self.free.iter().take(32).find(|(_, count)| **count >= want);
        let (&start, &count) = match fitting {
            Some(found) => found,
            None => self.free.iter().take(32).find(|(_, n)| **n >= least)?,
        };
        self.free.remove(&start);
        let taken = count.min(want);
        if taken < count {
            self.free.insert(start + taken, count - taken);
        }
        Some(Run {
            start: ClusterIndex(start),
            count: taken,
        })
    }

    /// Reserves a run of the free list, unless its counters disagree.
    async fn reserve_checked(&mut self, run: Run) -> Result<Option<Reserved>> {
        let reserved = self.try_reserve(run).await;
        if reserved.is_err() {
            self.add_free(run);
        }
        reserved
    }

    async fn try_reserve(&mut self, run: Run) -> Result<Option<Reserved>> {
        for index in run.start.0..run.end() {
            if self.count(ClusterIndex(index)).await? != 0 || !self.may_hand_out(index) {
                log::error!("qcow2: host cluster {index} was freed, but is in use");
                return Ok(None);
            }
        }
        self.reserve(run).await.map(Some)
    }

    /// Whether a cluster with a refcount of 0 may be used: not if it holds metadata, which damage has left uncounted.
    fn may_hand_out(&self, index: u64) -> bool {
        let cluster = ClusterIndex(index);
        let Some(owner) = self.owners.get(cluster) else {
            return true;
        };
        let at = self.g.host_offset(cluster);
        let message = format!("Refcount of {} at {at} is 0", owner.name());
        self.metadata.damage.noticed(message, None);
        false
    }

    /// Searches a bounded number of counters from the hint on.
    async fn scan(&mut self, want: u64) -> Result<Option<Run>> {
        let per_block = self.g.refcounts_per_block();
        let stop = self
            .end
            .min((self.hint / per_block + SCAN_BLOCKS) * per_block);
        while self.hint < stop {
            let hint = ClusterIndex(self.hint);
            let region_start = self.hint - self.g.in_refblock(hint) as u64;
            let block_end = (self.hint / per_block + 1) * per_block;
            let first = self.g.in_refblock(hint);
            let Some(block) = self.block(self.g.refblock_of(hint)).await? else {
                // No block yet: what is free here is left to the free list and the end.
                self.hint = block_end.min(stop);
                continue;
            };
            let Some(zero) = block.counters.next_zero(first) else {
                self.hint = block_end.min(stop);
                continue;
            };
            let start = region_start + zero as u64;
            let max = want.min(stop.saturating_sub(start)) as usize;
            let found = block.counters.zero_run(zero, max) as u64;
            if start >= stop {
                self.hint = stop;
                break;
            }
            let usable = (start..start + found)
                .take_while(|&index| self.may_hand_out(index) && !self.is_known_free(index))
                .count() as u64;
            self.hint = start + usable.max(1);
            if usable > 0 {
                return Ok(Some(Run {
                    start: ClusterIndex(start),
                    count: usable,
                }));
            }
        }
        Ok(None)
    }

    /// Whether the free list has the cluster: what is in it is not found by the scan as well.
    fn is_known_free(&self, index: u64) -> bool {
        let below = self.free.range(..=index).next_back();
        below.is_some_and(|(start, count)| index < start + count)
    }

    /// Exactly `count` clusters at the end of the image, with refcount blocks that cover them.
    async fn find_at_end(&mut self, count: u64) -> Result<Run> {
        let per_block = self.g.refcounts_per_block();
        'search: loop {
            let start = self.end;
            self.check_end(start + count)?;
            for region in start / per_block..=(start + count - 1) / per_block {
                if !self.has_block(region as usize) {
                    self.make_block(region as usize).await?;
                    continue 'search;
                }
            }
            for index in start..start + count {
                if self.count(ClusterIndex(index)).await? != 0 || !self.may_hand_out(index) {
                    self.end = index + 1;
                    continue 'search;
                }
            }
            return Ok(Run {
                start: ClusterIndex(start),
                count,
            });
        }
    }

    fn check_end(&self, end: u64) -> Result<()> {
        let fits = |bytes: u64| end <= bytes >> self.g.cluster_bits();
        let fits = match self.fresh_from {
            Some(_) => fits(limits::QCOW2_MAX_HOST_OFFSET),
            // A volume is extended when it is full.
            None => fits(self.file.size()) || fits(self.file.size_by_now()),
        };
        if !fits {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "The image has no host clusters left: No space left on device",
            ));
        }
        Ok(())
    }

    /// Sets the counters of a free run to 1.
    async fn reserve(&mut self, run: Run) -> Result<Reserved> {
        let per_block = self.g.refcounts_per_block();
        for region in run.start.0 / per_block..=(run.end() - 1) / per_block {
            if !self.has_block(region as usize) {
                self.make_block(region as usize).await?;
            }
            // All are in memory before the first is changed, so that nothing below can fail.
            self.block(region as usize).await?;
        }
        self.change(run, 1).await?;
        let fresh = self.fresh_from.is_some_and(|from| run.start.0 >= from);
        self.note_used(run);
        Ok(Reserved::counted(run, fresh, self.returned.clone()))
    }

    fn note_used(&mut self, run: Run) {
        self.end = self.end.max(run.end());
        if let Some(from) = &mut self.fresh_from {
            *from = run.end().max(*from);
        }
    }

    /// Takes back what dropped reservations have returned.
    pub(crate) async fn reclaim(&mut self) -> Result<()> {
        let runs = {
            let mut returned = self.returned.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *returned)
        };
        let dropped = self.drop_references(runs).await;
        {
            let mut returned = self.returned.lock().unwrap_or_else(PoisonError::into_inner);
            returned.extend(dropped.rest);
        }
        for run in dropped.freed {
            self.adopt_freed(run);
        }
        dropped.result
    }

    /// Takes one reference from each cluster of `runs`; stops at the first error.
    pub(crate) async fn drop_references(&mut self, runs: Vec<Run>) -> Dropped {
        let mut dropped = Dropped {
            freed: Vec::new(),
            rest: Vec::new(),
            result: Ok(()),
        };
        for run in runs {
            // A part within one refcount block happens whole or not at all.
            for (_, part) in self.parts(run) {
                if dropped.result.is_err() {
                    dropped.rest.push(part);
                    continue;
                }
                match self.subtract(part, 1).await {
                    Ok(freed) => dropped.freed.extend(freed),
                    Err(error) => {
                        dropped.rest.push(part);
                        dropped.result = Err(error);
                    }
                }
            }
        }
        dropped
    }

    /// Makes clusters available. Their refcount is 0, nothing durable points to them and nobody uses them.
    pub(crate) fn add_free(&mut self, run: Run) {
        if self.free.len() >= MAX_FREE_RUNS || run.count == 0 {
            return;
        }
        let (mut start, mut end) = (run.start.0, run.end());
        if let Some((&before, &count)) = self.free.range(..start).next_back()
            && before + count == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(count) = self.free.remove(&end) {
            end += count;
        }
        self.free.insert(start, end - start);
    }

    /// Subtracts `less` from the refcounts of a run, and answers which clusters have reached 0. Those are *not* available
    /// yet: the caller passes them to `add_free` when nobody uses them any more.
    pub(crate) async fn subtract(&mut self, run: Run, less: u64) -> Result<Vec<Run>> {
        let mut freed = Vec::new();
        for (region, part) in self.parts(run) {
            let Some(block) = self.block(region).await? else {
                self.uncounted(part.start);
                continue;
            };
            let first = (part.start.0 % block.counters.len() as u64) as usize;
            let mut changed = false;
            let mut uncounted = None;
            for (offset, index) in (first..first + part.count as usize).enumerate() {
                let count = block.counters.get(index);
                let cluster = part.start + offset as u64;
                if count < less {
                    uncounted.get_or_insert(cluster);
                    continue;
                }
                changed = true;
                block.counters.set(index, count - less);
                if count == less {
                    let run = Run {
                        start: cluster,
                        count: 1,
                    };
                    push_run(&mut freed, run);
                }
            }
            if changed {
                self.mark_dirty(region, first, part.count as usize);
            }
            if let Some(cluster) = uncounted {
                self.uncounted(cluster);
            }
        }
        for run in &freed {
            self.seal(*run);
        }
        Ok(freed)
    }

    /// A cluster was in use and its refcount says that it was not. It stays free, if it is.
    fn uncounted(&self, cluster: ClusterIndex) {
        let at = self.g.host_offset(cluster);
        let message = format!("Refcount of the cluster at {at} is 0, but it was in use");
        self.metadata.damage.noticed(message, None);
    }

    /// The greatest refcount in a run.
    pub(crate) async fn greatest(&mut self, run: Run) -> Result<u64> {
        let mut greatest = 0;
        for (region, part) in self.parts(run) {
            let first = self.g.in_refblock(part.start);
            if let Some(block) = self.block(region).await? {
                let (_, most) = block.counters.bounds(first, part.count as usize);
                greatest = greatest.max(most);
            }
        }
        Ok(greatest)
    }

    /// The refcount of a cluster.
    pub(crate) async fn count(&mut self, cluster: ClusterIndex) -> Result<u64> {
        let index = self.g.in_refblock(cluster);
        match self.block(self.g.refblock_of(cluster)).await? {
            Some(block) => Ok(block.counters.get(index)),
            None => Ok(0),
        }
    }

    /// Adds to counters that were checked before. The blocks may have been evicted since, so this can fail with
    /// I/O errors; then what was changed is changed back.
    async fn change(&mut self, run: Run, more: u64) -> Result<()> {
        for (region, part) in self.parts(run) {
            let first = self.g.in_refblock(part.start);
            let count = part.count as usize;
            let done = match self.block(region).await {
                Ok(Some(block)) => {
                    block.counters.add(first, count, more);
                    Ok(block.counters.bounds(first, count).1)
                }
                Ok(None) => Err(Error::new(ErrorKind::Corrupt, "refcount block is missing")),
                Err(error) => Err(error),
            };
            let greatest = match done {
                Ok(greatest) => greatest,
                Err(error) => {
                    let undo = Run {
                        start: run.start,
                        count: part.start.0 - run.start.0,
                    };
                    if undo.count > 0 && self.subtract(undo, more).await.is_err() {
                        log::error!("qcow2: {undo:?} keep {more} references too many");
                    }
                    return Err(error);
                }
            };
            self.note_count(greatest);
            self.mark_dirty(region, first, count);
        }
        Ok(())
    }

    /// The run cut at the borders of refcount blocks, with the index of the block of each part.
    fn parts(&self, run: Run) -> impl Iterator<Item = (usize, Run)> + use<> {
        let per_block = self.g.refcounts_per_block();
        let mut at = run.start.0;
        std::iter::from_fn(move || {
            if at >= run.end() {
                return None;
            }
            let region = at / per_block;
            let end = run.end().min((region + 1) * per_block);
            let part = Run {
                start: ClusterIndex(at),
                count: end - at,
            };
            at = end;
            Some((region as usize, part))
        })
    }
}

/// The bytes of the runs of set bits of a mask over the 64ths of a cluster.
pub(super) fn dirty_ranges(mask: u64, cluster_size: usize) -> Vec<Range<usize>> {
    let slice = slice_size(cluster_size);
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for bit in (0..64).filter(|bit| mask >> bit & 1 != 0) {
        let start = bit * slice;
        let end = (start + slice).min(cluster_size);
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

/// Bytes of the piece of a table that one dirty bit stands for: never less than a sector.
pub(super) fn slice_size(cluster_size: usize) -> usize {
    (cluster_size / 64).max(512)
}

/// The dirty bits of a range of bytes.
pub(super) fn slice_mask(range: Range<usize>, cluster_size: usize) -> u64 {
    let slice = slice_size(cluster_size);
    let (first, last) = (range.start / slice, (range.end - 1) / slice);
    (u64::MAX >> (63 - (last - first))) << first
}

#[cfg(test)]
mod tests;
