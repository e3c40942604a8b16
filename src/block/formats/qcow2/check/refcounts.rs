//! Stored refcounts against counted references.

use std::ops::Range;
use std::sync::Arc;

use super::Scan;
use super::counts::Bitmap;
use crate::error::Result;
use crate::formats::qcow2::counters::CounterWidth;
use crate::formats::qcow2::geometry::ENTRY_SIZE;
use crate::formats::qcow2::runs::read_clusters;
use crate::units::HostOffset;

/// Bits of a refcount table entry that must be 0.
const RESERVED: u64 = 0x1ff;

/// A refcount block as the table points to it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Refblock {
    /// Its index in the table.
    pub(super) index: u64,
    pub(super) offset: HostOffset,
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
    /// Whether nobody can say what the block counts.
    fn is_unknown(&self) -> bool {
        matches!(self.state, BlockState::Unaligned | BlockState::Impossible)
    }

    /// What is wrong with its table entry.
    fn wrong(&self) -> Option<&'static str> {
        match self.state {
            BlockState::Good => None,
            BlockState::Reserved => Some("refcount table entry has reserved bits set"),
            BlockState::Unaligned => Some("refcount block is not cluster aligned"),
            BlockState::Outside | BlockState::Impossible => Some("refcount block is outside image"),
        }
    }
}

/// What COPIED flags must agree with.
#[derive(Debug, Default)]
pub(super) struct StoredOnes {
    /// Clusters whose stored refcount is 1.
    ones: Bitmap,
    /// Clusters whose stored refcounts cannot be read, ascending; none in nearly every image.
    unknown: Vec<Range<u64>>,
}

impl StoredOnes {
    /// Whether the flag of an entry that points to the cluster is right.
    pub(super) fn agree(&self, cluster: u64, copied: bool) -> bool {
        copied == self.ones.get(cluster) || contains(&self.unknown, cluster)
    }
}

/// Whether one of the ranges has it. They ascend, and a hostile table makes many of them.
fn contains(ranges: &[Range<u64>], cluster: u64) -> bool {
    let after = ranges.partition_point(|range| range.start <= cluster);
    let candidate = after.checked_sub(1).and_then(|at| ranges.get(at));
    candidate.is_some_and(|range| range.contains(&cluster))
}

/// The refcount table and its blocks as a whole.
pub(super) enum Structure {
    /// They can be kept; the clusters that they lie in.
    Sound(Bitmap),
    /// They cannot; the first reason.
    Damaged(String),
}

impl Scan<'_> {
    /// Reads the refcount table.
    pub(super) async fn load_refcount_table(&mut self) -> Result<()> {
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
        Ok(())
    }

    /// Notes which clusters have a stored count of 1.
    pub(super) async fn load_stored_ones(&mut self) -> Result<()> {
        let mut stored = StoredOnes {
            ones: Bitmap::default(),
            unknown: self.unknown(),
        };
        let width = CounterWidth::new(self.g.refcount_order());
        self.each_block(|_, clusters, counters| {
            if counters.iter().all(|byte| *byte == 0) {
                return Ok(());
            }
            for (nth, cluster) in clusters.enumerate() {
                if width.get(counters, nth) == 1 {
                    stored.ones.set(cluster)?;
                }
            }
            Ok(())
        })
        .await?;
        self.stored = Some(Arc::new(stored));
        Ok(())
    }

    /// Clusters whose stored refcounts cannot be read.
    fn unknown(&self) -> Vec<Range<u64>> {
        let per_block = self.g.refcounts_per_block();
        let blocks = self.refblocks.iter().filter(|block| block.is_unknown());
        let ranges = blocks.map(|block| block.index * per_block..(block.index + 1) * per_block);
        ranges.collect()
    }

    fn refblock(&self, index: u64, entry: u64) -> Refblock {
        let offset = HostOffset(entry & !RESERVED);
        let state = if entry & RESERVED != 0 {
            BlockState::Reserved
        } else if !self.g.is_aligned(offset.0) {
            BlockState::Unaligned
        } else if offset.0 > i64::MAX as u64 {
            BlockState::Impossible
        } else if self.g.host_cluster(offset).0 >= self.bounds.file_clusters() {
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

    /// The clusters that the header gives to the refcount table, and their bytes.
    fn refcount_table(&self) -> (u64, u64) {
        let bytes = u64::from(self.header.refcount_table_clusters) << self.g.cluster_bits();
        (self.header.refcount_table_offset.0, bytes)
    }

    /// Counts the refcount table and its blocks, after everything else.
    pub(super) fn count_refcount_structures(&mut self) -> Result<()> {
        let (offset, bytes) = self.refcount_table();
        self.use_metadata("refcount table", offset, bytes)?;
        for block in self.refblocks.clone() {
            let Refblock { index, offset, .. } = block;
            let mut wrong = block.wrong();
            if wrong.is_none() {
                self.use_metadata("refcount block", offset.0, self.g.cluster_size())?;
                let alone = self.counts.get(self.g.host_cluster(offset).0) == 1;
                wrong = (!alone).then_some("refcount block is used by something else too");
            }
            if let Some(wrong) = wrong {
                self.report.corruptions += 1;
                self.report
                    .note(|| format!("ERROR {wrong}: block {index} at {offset}"));
            }
        }
        Ok(())
    }

    /// How many blocks the refcount table has room for.
    pub(super) fn refcount_table_entries(&self) -> u64 {
        self.refcount_table().1 / ENTRY_SIZE
    }

    /// The clusters of the refcount table and its blocks; for structures that are sound.
    pub(super) fn structure_clusters(&self) -> impl Iterator<Item = u64> + use<> {
        let (offset, bytes) = self.refcount_table();
        let table = self.bounds.clusters(offset, bytes).unwrap_or_default();
        let blocks: Vec<u64> = self
            .refblocks
            .iter()
            .map(|block| self.g.host_cluster(block.offset).0)
            .collect();
        table.chain(blocks)
    }

    /// Whether the refcount table and its blocks, which are not counted yet, have their places to themselves.
    pub(super) fn refcount_structure(&self) -> Result<Structure> {
        let (offset, bytes) = self.refcount_table();
        let mut own = Bitmap::default();
        let Some(table) = self.bounds.clusters(offset, bytes) else {
            let wrong = format!("refcount table at {offset:#x} lies behind the end of the file");
            return Ok(Structure::Damaged(wrong));
        };
        for cluster in table {
            own.set(cluster)?;
            if self.counts.get(cluster) > 0 {
                let wrong = format!("refcount table at {offset:#x} is used by something else too");
                return Ok(Structure::Damaged(wrong));
            }
        }
        for block in &self.refblocks {
            let Refblock { index, offset, .. } = block;
            let cluster = self.g.host_cluster(*offset).0;
            let wrong = match block.wrong() {
                None if !self.bounds.is_readable(*offset) => {
                    Some("refcount block is outside image")
                }
                None if own.set(cluster)? || self.counts.get(cluster) > 0 => {
                    Some("refcount block is used by something else too")
                }
                wrong => wrong,
            };
            if let Some(wrong) = wrong {
                return Ok(Structure::Damaged(format!(
                    "{wrong}: block {index} at {offset}"
                )));
            }
        }
        Ok(Structure::Sound(own))
    }

    /// Compares every cluster that is stored or counted.
    pub(super) async fn compare(&mut self) -> Result<()> {
        // Counts may reach into a last cluster that the file has in part only.
        let in_file = self.bounds.file_clusters();
        let clusters = in_file + 1;
        let width = CounterWidth::new(self.g.refcount_order());
        let unknown = self.unknown();
        let mut highest = 0;
        let mut done = 0;
        let mut expected = vec![0; self.g.cluster_size() as usize];
        self.each_block(|scan, range, counters| {
            highest = highest.max(scan.compare_uncounted(done..range.start, &unknown));
            done = range.end;
            expected.fill(0);
            scan.counts.encode(range.clone(), width, &mut expected);
            if expected == counters {
                let inside = range.start..range.end.min(in_file).max(range.start);
                highest = highest.max(scan.counts.last_counted(inside).unwrap_or(0));
                return Ok(());
            }
            for (nth, cluster) in range.enumerate().take_while(|(_, at)| *at < clusters) {
                let stored = width.get(counters, nth);
                highest = highest.max(scan.compare_cluster(cluster, stored));
            }
            Ok(())
        })
        .await?;
        // What lies further behind is lost, and that has been said.
        let end = self.counts.end().min(in_file);
        highest = highest.max(self.compare_uncounted(done..end, &unknown));
        self.report.image_end_offset = (highest + 1) << self.g.cluster_bits();
        let end = self.bounds.file_clusters();
        let unknown = unknown.iter();
        let unknown = unknown.map(|range| range.end.min(end) - range.start.min(end));
        self.report.check_errors += unknown.sum::<u64>();
        Ok(())
    }

    /// Clusters that no refcount block speaks about: counted ones are errors.
    fn compare_uncounted(&mut self, clusters: Range<u64>, unknown: &[Range<u64>]) -> u64 {
        let mut at = clusters.start;
        let mut highest = 0;
        while let Some(cluster) = self.counts.next_counted(at..clusters.end) {
            if !contains(unknown, cluster) {
                highest = self.compare_cluster(cluster, 0);
            }
            at = cluster + 1;
        }
        highest
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
            if cluster < self.bounds.file_clusters() {
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
        let (file, g, bounds) = (self.file, self.g, self.bounds);
        let blocks: Vec<Refblock> = self
            .refblocks
            .iter()
            .copied()
            .filter(|block| matches!(block.state, BlockState::Good | BlockState::Reserved))
            .filter(|block| g.is_aligned(block.offset.0) && block.offset.0 != 0)
            .filter(|block| bounds.is_readable(block.offset))
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
