//! Stored refcounts against counted references.

use std::ops::Range;

use super::Scan;
use crate::error::Result;
use crate::formats::qcow2::counters::CounterWidth;
use crate::formats::qcow2::runs::read_clusters;
use crate::units::HostOffset;

/// Bits of a refcount table entry that must be 0.
const RESERVED: u64 = 0x1ff;

/// A refcount block as the table points to it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Refblock {
    /// Its index in the table.
    index: u64,
    offset: HostOffset,
    state: BlockState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BlockState {
    /// It can be read and counts as a user of its cluster.
    Good,
    /// Its table entry has reserved bits: read, but not counted.
    Reserved,
    /// Not at the start of a cluster: its counts are unknown.
    Unaligned,
    /// Not in the file: its counts are 0.
    Outside,
    /// Behind everything that a file can have: its counts are unknown.
    Impossible,
}

impl Refblock {
    /// Where it lies, when it lies in the file.
    pub(super) fn offset_in_file(&self) -> Option<HostOffset> {
        let inside = !matches!(self.state, BlockState::Outside | BlockState::Impossible);
        inside.then_some(self.offset)
    }

    /// Whether nobody can say what the block counts.
    fn is_unknown(&self) -> bool {
        matches!(self.state, BlockState::Unaligned | BlockState::Impossible)
    }
}

impl Scan<'_> {
    /// Reads the refcount table, and notes which clusters have a stored count of 1.
    pub(super) async fn load_refcounts(&mut self) -> Result<()> {
        let offset = self.header.refcount_table_offset.0;
        let bytes = u64::from(self.header.refcount_table_clusters) << self.g.cluster_bits();
        let end = offset.saturating_add(bytes).min(self.file.size());
        let len = end.saturating_sub(offset);
        let table = self.file.read(offset, len).await?.to_bytes();
        for (index, entry) in table.as_chunks().0.iter().enumerate() {
            let entry = u64::from_be_bytes(*entry);
            if entry != 0 {
                self.refblocks.push(self.refblock(index as u64, entry));
            }
        }
        let per_block = self.g.refcounts_per_block();
        self.unknown = self
            .refblocks
            .iter()
            .filter(|block| block.is_unknown())
            .map(|block| block.index * per_block..(block.index + 1) * per_block)
            .collect();
        let width = CounterWidth::new(self.g.refcount_order());
        self.each_block(|scan, clusters, counters| {
            if counters.iter().all(|byte| *byte == 0) {
                return Ok(());
            }
            for (nth, cluster) in clusters.enumerate() {
                if width.get(counters, nth) == 1 {
                    scan.stored_ones.set(cluster)?;
                }
            }
            Ok(())
        })
        .await
    }

    fn refblock(&self, index: u64, entry: u64) -> Refblock {
        let offset = HostOffset(entry & !RESERVED);
        let state = if entry & RESERVED != 0 {
            BlockState::Reserved
        } else if !self.g.is_aligned(offset.0) {
            BlockState::Unaligned
        } else if offset.0 > i64::MAX as u64 {
            BlockState::Impossible
        } else if self.g.host_cluster(offset).0 >= self.file_clusters {
            BlockState::Outside
        } else {
            BlockState::Good
        };
        Refblock {
            index,
            offset,
            state,
        }
    }

    /// Counts the refcount table and its blocks, after everything else.
    pub(super) fn count_refcount_structures(&mut self) -> Result<()> {
        let bytes = u64::from(self.header.refcount_table_clusters) << self.g.cluster_bits();
        let offset = self.header.refcount_table_offset.0;
        self.use_metadata("refcount table", offset, bytes)?;
        for block in self.refblocks.clone() {
            let Refblock { index, offset, .. } = block;
            let wrong = match block.state {
                BlockState::Reserved => Some("refcount table entry has reserved bits set"),
                BlockState::Unaligned => Some("refcount block is not cluster aligned"),
                BlockState::Outside | BlockState::Impossible => {
                    Some("refcount block is outside image")
                }
                BlockState::Good => {
                    self.use_metadata("refcount block", offset.0, self.g.cluster_size())?;
                    let alone = self.counts.get(self.g.host_cluster(offset).0) == 1;
                    (!alone).then_some("refcount block is used by something else too")
                }
            };
            if let Some(wrong) = wrong {
                self.report.corruptions += 1;
                self.report
                    .note(|| format!("ERROR {wrong}: block {index} at {offset}"));
            }
        }
        Ok(())
    }

    /// Compares every cluster that is stored or counted.
    pub(super) async fn compare(&mut self) -> Result<()> {
        // Counts may reach into a last cluster that the file has in part only.
        let clusters = self.file_clusters + 1;
        let width = CounterWidth::new(self.g.refcount_order());
        let mut highest = 0;
        let mut done = 0;
        self.each_block(|scan, range, counters| {
            highest = highest.max(scan.compare_uncounted(done..range.start));
            done = range.end;
            for (nth, cluster) in range.enumerate().take_while(|(_, at)| *at < clusters) {
                let stored = width.get(counters, nth);
                highest = highest.max(scan.compare_cluster(cluster, stored));
            }
            Ok(())
        })
        .await?;
        highest = highest.max(self.compare_uncounted(done..self.counts.end()));
        self.report.image_end_offset = (highest + 1) << self.g.cluster_bits();
        let unknown = self.unknown.iter();
        let unknown = unknown
            .map(|range| range.end.min(self.file_clusters) - range.start.min(self.file_clusters));
        self.report.check_errors += unknown.sum::<u64>();
        Ok(())
    }

    /// Clusters that no refcount block speaks about: counted ones are errors.
    fn compare_uncounted(&mut self, clusters: Range<u64>) -> u64 {
        let mut at = clusters.start;
        let mut highest = 0;
        while let Some(cluster) = self.counts.next_counted(at..clusters.end) {
            if !self.is_unknown(cluster) {
                highest = self.compare_cluster(cluster, 0);
            }
            at = cluster + 1;
        }
        highest
    }

    /// Whether the cluster's stored count cannot be read.
    pub(super) fn is_unknown(&self, cluster: u64) -> bool {
        // They ascend, and a hostile table makes many of them.
        let after = self.unknown.partition_point(|range| range.start <= cluster);
        let candidate = after.checked_sub(1).and_then(|at| self.unknown.get(at));
        candidate.is_some_and(|range| range.contains(&cluster))
    }

    /// Compares one cluster; answers its number when it is in use, else 0.
    fn compare_cluster(&mut self, cluster: u64, stored: u64) -> u64 {
        let counted = self.counts.get(cluster);
        if stored < counted {
            self.report.corruptions += 1;
            self.report
                .note(|| format!("ERROR cluster {cluster} refcount={stored} reference={counted}"));
        } else if stored > counted {
            // A stored count behind the end of the file is not a leak: there is nothing to give back.
            if cluster < self.file_clusters {
                self.report.leaks += 1;
                self.report.note(|| {
                    format!("Leaked cluster {cluster} refcount={stored} reference={counted}")
                });
            } else {
                return 0;
            }
        }
        match stored | counted {
            0 => 0,
            _ => cluster,
        }
    }

    /// Hands every readable block to `each`: the clusters that it counts, which ascend, and its counters.
    async fn each_block(
        &mut self,
        mut each: impl FnMut(&mut Self, Range<u64>, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let (file, g) = (self.file, self.g);
        let blocks: Vec<Refblock> = self
            .refblocks
            .iter()
            .copied()
            .filter(|block| matches!(block.state, BlockState::Good | BlockState::Reserved))
            .filter(|block| g.is_aligned(block.offset.0) && block.offset.0 != 0)
            .filter(|block| self.is_readable(block.offset))
            .collect();
        self.spend(blocks.len() as u64 * g.cluster_size())?;
        let per_block = g.refcounts_per_block();
        // In the table's order; blocks usually ascend in the file as well, and then many are read at once.
        for ascending in blocks.chunk_by(|a, b| a.offset < b.offset) {
            let offsets: Vec<HostOffset> = ascending.iter().map(|block| block.offset).collect();
            read_clusters(file, &offsets, g.cluster_size(), |nth, bytes| {
                let first = ascending[nth].index * per_block;
                each(self, first..first + per_block, bytes)
            })
            .await?;
        }
        Ok(())
    }
}
