//! Refcounts changed in bulk: what a snapshot costs.
//!
//! ```text
//! L2 tables, by host offset, 2 MiB at a time -> runs of host clusters -> counters in memory -> blocks, by host offset
//! ```
//!
//! Nothing is written before every counter has taken its change, so an overflow or a damaged image is found while all is
//! as it was. What was in the blocks before is kept until the operation is over: taking back needs no reads.

use bytes::Bytes;

use crate::driver::Child;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::alloc::{Run, push_run};
use crate::formats::qcow2::counters::CounterWidth;
use crate::formats::qcow2::entry::{Mapping, l2_entries};
use crate::formats::qcow2::geometry::Geometry;
use crate::formats::qcow2::runs::{read_clusters, write_clusters};
use crate::limits::QCOW2_MAX_BULK_REFCOUNT_BYTES;
use crate::units::{ClusterIndex, HostOffset};

/// Bytes of L2 tables looked at between two loads of refcount blocks.
const BATCH_BYTES: u64 = 8 << 20;

/// Which way counters go, by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// A reference more.
    Up,
    /// A reference less.
    Down,
}

/// A refcount block while a change is under way.
#[derive(Debug)]
struct Block {
    offset: HostOffset,
    before: Bytes,
    after: Option<Vec<u8>>,
    was_changed: bool,
}

impl Block {
    fn counters(&self) -> &[u8] {
        self.after.as_deref().unwrap_or(&self.before)
    }

    fn counters_mut(&mut self) -> &mut [u8] {
        self.after.get_or_insert_with(|| self.before.to_vec())
    }
}

/// The refcounts of an image during one bulk change. Nobody else may change them meanwhile, and those in the file must
/// be up to date.
#[derive(Debug)]
pub(super) struct BulkRefcounts<'a> {
    file: &'a Child,
    g: Geometry,
    width: CounterWidth,
    /// Offsets of the refcount blocks, 0 for none, as in the refcount table.
    table: Vec<u64>,
    blocks: Vec<Option<Block>>,
    loaded_bytes: u64,
    freed: Vec<Run>,
}

impl<'a> BulkRefcounts<'a> {
    /// Nothing is read yet.
    pub(super) fn new(file: &'a Child, g: Geometry, table: Vec<u64>) -> Self {
        let mut blocks = Vec::new();
        blocks.resize_with(table.len(), || None);
        BulkRefcounts {
            file,
            g,
            width: CounterWidth::new(g.refcount_order()),
            table,
            blocks,
            loaded_bytes: 0,
            freed: Vec::new(),
        }
    }

    /// Changes, in memory, the counters of the L2 tables at `tables` (ascending) and of all that they point to.
    /// Answers which of the tables have a COPIED flag.
    ///
    /// `OutOfRange` when a counter is full, `Corrupt` when the tables and refcounts contradict each other. Counters in
    /// memory may have changed then; nothing in the file has.
    pub(super) async fn change_tables(
        &mut self,
        tables: &[HostOffset],
        step: Step,
    ) -> Result<Vec<bool>> {
        let (file, g) = (self.file, self.g);
        let mut with_copied = Vec::with_capacity(tables.len());
        let batch = (BATCH_BYTES / g.cluster_size()).max(1) as usize;
        for tables in tables.chunks(batch) {
            let mut runs = Vec::new();
            for table in tables {
                push_run(&mut runs, one(self.checked_table(*table)?));
            }
            read_clusters(file, tables, g.cluster_size(), |_, bytes| {
                with_copied.push(collect(g, bytes, &mut runs)?);
                Ok(())
            })
            .await?;
            self.change_runs(&runs, step).await?;
        }
        Ok(with_copied)
    }

    /// Changes, in memory, the counters of `runs`. Errors as `change_tables`.
    pub(super) async fn change_runs(&mut self, runs: &[Run], step: Step) -> Result<()> {
        self.load(runs).await?;
        for run in runs {
            self.change_run(*run, step)?;
        }
        Ok(())
    }

    /// The present count in memory of a cluster whose block is loaded; 0 where there is none.
    pub(super) fn count(&self, cluster: ClusterIndex) -> u64 {
        match self.blocks.get(self.g.refblock_of(cluster)) {
            Some(Some(block)) => {
                let index = self.g.in_refblock(cluster);
                self.width.get(block.counters(), index)
            }
            _ => 0,
        }
    }

    /// The clusters whose count has reached 0, in the order in which that happened.
    pub(super) fn freed(&self) -> &[Run] {
        &self.freed
    }

    /// Writes the changed blocks. Not durable before a flush.
    pub(super) async fn write(&self) -> Result<()> {
        self.write_blocks(|block| block.after.clone().map(Bytes::from))
            .await
    }

    /// Takes back the change in memory: `count` answers what it was before, and `write_old` writes that.
    pub(super) fn take_back(&mut self) {
        for block in self.blocks.iter_mut().flatten() {
            block.was_changed = block.after.take().is_some();
        }
        self.freed.clear();
    }

    /// After `take_back`: writes what was in the changed blocks before.
    pub(super) async fn write_old(&self) -> Result<()> {
        self.write_blocks(|block| block.was_changed.then(|| block.before.clone()))
            .await
    }

    async fn write_blocks(&self, bytes: impl Fn(&Block) -> Option<Bytes>) -> Result<()> {
        let blocks = self.blocks.iter().flatten();
        let mut writes: Vec<_> = blocks
            .filter_map(|block| Some((block.offset, bytes(block)?)))
            .collect();
        writes.sort_unstable_by_key(|(offset, _)| *offset);
        write_clusters(self.file, &writes, self.g.cluster_size()).await
    }

    /// The cluster of an L2 table, which must lie in the file.
    fn checked_table(&self, table: HostOffset) -> Result<ClusterIndex> {
        let cluster = self.g.host_cluster(table);
        let end = self.g.clusters_for(self.file.size());
        if !self.g.is_aligned(table.0) || cluster.0 >= end {
            return Err(corrupt(format!("an L2 table lies at {table}")));
        }
        Ok(cluster)
    }

    /// Reads the blocks that count the runs and are not in memory yet.
    async fn load(&mut self, runs: &[Run]) -> Result<()> {
        let per_block = self.g.refcounts_per_block();
        let mut missing = Vec::new();
        for run in runs {
            let start = run.start.0;
            for region in start / per_block..=(run.end() - 1) / per_block {
                let region = region as usize;
                let offset = self.table.get(region).copied().unwrap_or(0);
                if offset == 0 {
                    return Err(uncounted(start.max(region as u64 * per_block)));
                }
                if self.blocks[region].is_none() {
                    missing.push((HostOffset(offset), region));
                }
            }
        }
        missing.sort_unstable();
        missing.dedup();
        self.loaded_bytes += 2 * missing.len() as u64 * self.g.cluster_size();
        if self.loaded_bytes > QCOW2_MAX_BULK_REFCOUNT_BYTES {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "The image has too many refcounts to change at once; use larger clusters",
            ));
        }
        let offsets: Vec<HostOffset> = missing.iter().map(|(offset, _)| *offset).collect();
        let blocks = &mut self.blocks;
        read_clusters(self.file, &offsets, self.g.cluster_size(), |nth, bytes| {
            let (offset, region) = missing[nth];
            blocks[region] = Some(Block {
                offset,
                before: Bytes::copy_from_slice(bytes),
                after: None,
                was_changed: false,
            });
            Ok(())
        })
        .await
    }

    fn change_run(&mut self, run: Run, step: Step) -> Result<()> {
        let per_block = self.g.refcounts_per_block();
        let mut at = run.start.0;
        let end = run.end();
        while at < end {
            let region = at / per_block;
            let part_end = end.min((region + 1) * per_block);
            let range = (at % per_block) as usize..(at % per_block + part_end - at) as usize;
            let Some(Some(block)) = self.blocks.get_mut(region as usize) else {
                return Err(uncounted(at));
            };
            let counters = block.counters_mut();
            let first = region * per_block;
            match step {
                Step::Up => {
                    if let Some(zero) = self.width.find(counters, range.clone(), 0) {
                        return Err(uncounted(first + zero as u64));
                    }
                    let raised = self.width.increment(counters, range);
                    raised.map_err(|_| self.full())?;
                }
                Step::Down => {
                    let lowered = self.width.decrement(counters, range.clone());
                    lowered.map_err(|zero| uncounted(first + zero as u64))?;
                    let mut rest = range;
                    while let Some(zero) = self.width.find(counters, rest.clone(), 0) {
                        push_run(&mut self.freed, one(ClusterIndex(first + zero as u64)));
                        rest.start = zero + 1;
                    }
                }
            }
            at = part_end;
        }
        Ok(())
    }

    fn full(&self) -> Error {
        Error::new(
            ErrorKind::OutOfRange,
            format!(
                "Refcounts of {} bits cannot count another snapshot",
                self.g.refcount_bits()
            ),
        )
    }
}

/// A run of one cluster.
fn one(start: ClusterIndex) -> Run {
    Run { start, count: 1 }
}

/// Collects the host clusters that an L2 table points to; answers whether it has a COPIED flag.
fn collect(g: Geometry, table: &[u8], runs: &mut Vec<Run>) -> Result<bool> {
    let mut copied = false;
    for entry in l2_entries(g, table) {
        if entry.is_compressed() {
            let Ok(Mapping::Compressed(stream)) = entry.decode(g, true) else {
                return Err(corrupt(format!("an L2 entry is {entry}")));
            };
            let (first, last) = stream.clusters(g);
            // Streams in the same cluster count one by one, so their runs must not be joined.
            runs.extend((first.0..=last.0).map(|cluster| one(ClusterIndex(cluster))));
            continue;
        }
        if let Some(host) = entry.host_cluster() {
            if !g.is_aligned(host.0) {
                return Err(corrupt(format!("an L2 entry is {entry}")));
            }
            copied |= entry.is_copied();
            push_run(runs, one(g.host_cluster(host)));
        }
    }
    Ok(copied)
}

/// Rewrites COPIED flags of the L2 tables at `tables` (ascending): `wanted` says for a host cluster and its flag
/// what the flag shall be. Tables whose flags are right are not written. Answers which tables were. Not durable before a flush.
///
/// After an error any of the flags may have been rewritten.
pub(super) async fn rewrite_copied(
    file: &Child,
    g: Geometry,
    tables: &[HostOffset],
    wanted: impl Fn(ClusterIndex, bool) -> bool,
) -> Result<Vec<HostOffset>> {
    let mut written = Vec::new();
    let batch = (BATCH_BYTES / g.cluster_size()).max(1) as usize;
    for tables in tables.chunks(batch) {
        let mut writes: Vec<(HostOffset, Bytes)> = Vec::new();
        read_clusters(file, tables, g.cluster_size(), |nth, bytes| {
            let mut changed: Option<Vec<u8>> = None;
            for (index, entry) in l2_entries(g, bytes).enumerate() {
                let Some(host) = entry.host_cluster() else {
                    continue;
                };
                let copied = wanted(g.host_cluster(host), entry.is_copied());
                if entry.is_copied() != copied {
                    let table = changed.get_or_insert_with(|| bytes.to_vec());
                    entry.with_copied(copied).put(g, table, index);
                }
            }
            if let Some(changed) = changed {
                writes.push((tables[nth], changed.into()));
            }
            Ok(())
        })
        .await?;
        write_clusters(file, &writes, g.cluster_size()).await?;
        written.extend(writes.iter().map(|(offset, _)| *offset));
    }
    Ok(written)
}

fn uncounted(cluster: u64) -> Error {
    corrupt(format!("host cluster {cluster} is in use and not counted"))
}

fn corrupt(what: String) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("The image needs a repair (qemu-img check -r all): {what}"),
    )
}
