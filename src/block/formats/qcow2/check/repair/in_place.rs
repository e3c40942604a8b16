//! Refcount blocks corrected where they lie; missing ones added.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::Mender;
use crate::driver::WriteFlags;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::check::Scan;
use crate::formats::qcow2::check::counts::{Bitmap, Counts};
use crate::formats::qcow2::check::report::{MAX_FINDINGS, Repair};
use crate::formats::qcow2::counters::CounterWidth;
use crate::formats::qcow2::geometry::ENTRY_SIZE;
use crate::formats::qcow2::runs::{changed_pieces, map_clusters};
use crate::units::HostOffset;

/// The refcount blocks after the repair.
pub(super) struct Plan {
    /// Those that exist, by offset, with their index in the table.
    existing: Vec<(HostOffset, u64)>,
    /// Those to be made, by offset.
    new: Vec<(HostOffset, u64)>,
}

impl Plan {
    /// Finds a place for every block that is missing, and counts `own`, the clusters of the structures that exist, and the new
    /// blocks. None where the table has no room for them: then nothing has been counted.
    pub(super) fn make(scan: &mut Scan<'_>, own: &Bitmap, what: Repair) -> Result<Option<Plan>> {
        let g = scan.g;
        let blocks = scan.refblocks.iter();
        let mut existing: Vec<_> = blocks.map(|block| (block.offset, block.index)).collect();
        let mut new = BTreeMap::new();
        if what == Repair::All {
            let Some(places) = places_of_missing(scan, own)? else {
                return Ok(None);
            };
            new = places;
        }
        for cluster in scan.structure_clusters() {
            scan.counts.add(cluster..cluster + 1, 1)?;
        }
        for cluster in new.keys() {
            scan.counts.add(*cluster..cluster + 1, 1)?;
        }
        existing.sort_unstable();
        let bits = g.cluster_bits();
        let new = new.into_iter();
        let new = new.map(|(cluster, index)| (HostOffset(cluster << bits), index));
        let new = new.collect();
        Ok(Some(Plan { existing, new }))
    }
}

/// Free clusters for the blocks that are missing, each with the block's index.
fn places_of_missing(scan: &Scan<'_>, own: &Bitmap) -> Result<Option<BTreeMap<u64, u64>>> {
    let per_block = scan.g.refcounts_per_block();
    let mut known: BTreeSet<u64> = scan.refblocks.iter().map(|block| block.index).collect();
    let mut missing = BTreeSet::new();
    let mut at = 0;
    while let Some(counted) = scan.counts.next_counted(at..scan.counts.end()) {
        missing.insert(counted / per_block);
        at = (counted / per_block + 1).saturating_mul(per_block);
    }
    missing.extend(scan.structure_clusters().map(|cluster| cluster / per_block));
    missing.retain(|index| !known.contains(index));
    let mut places = BTreeMap::new();
    let mut cursor = 1;
    while let Some(index) = missing.pop_first() {
        if index >= scan.refcount_table_entries() {
            return Ok(None);
        }
        known.insert(index);
        while scan.counts.get(cursor) > 0 || own.get(cursor) {
            cursor += 1;
        }
        let end = (cursor + 1) << scan.g.cluster_bits();
        if !scan.bounds.growable && end > scan.bounds.file_size {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "No space left on the device for missing refcounts",
            ));
        }
        places.insert(cursor, index);
        // A new block may be the first thing that its neighbourhood counts.
        if !known.contains(&(cursor / per_block)) {
            missing.insert(cursor / per_block);
        }
        cursor += 1;
    }
    Ok(Some(places))
}

/// What becomes of one refcount block.
#[derive(Default)]
struct Correction {
    /// What is written.
    pieces: Vec<(HostOffset, Bytes)>,
    leaks: u64,
    /// Clusters counted too low.
    low: u64,
    low_runs: Vec<Range<u64>>,
    freed: Vec<Range<u64>>,
    /// The first that were wrong: cluster, stored count, references.
    wrong: Vec<(u64, u64, u64)>,
}

/// What corrects blocks, on any thread.
#[derive(Clone)]
struct Corrector {
    counts: Arc<Counts>,
    width: CounterWidth,
    what: Repair,
    file_clusters: u64,
}

impl Corrector {
    /// The clusters that the `index`th block of so many bytes counts, and their true counts.
    fn truth(&self, index: u64, bytes: usize) -> (Range<u64>, Vec<u8>) {
        let per_block = self.width.per_bytes(bytes as u64);
        let clusters = index * per_block..(index + 1) * per_block;
        let mut block = vec![0; bytes];
        self.counts.encode(clusters.clone(), self.width, &mut block);
        (clusters, block)
    }

    /// Corrects the block at `offset`, the `index`th of the table.
    fn correct(&self, (offset, index): (HostOffset, u64), stored: &[u8]) -> Correction {
        let (clusters, mut wanted) = self.truth(index, stored.len());
        if wanted == stored {
            return Correction::default();
        }
        let mut correction = Correction::default();
        for (nth, cluster) in clusters.enumerate() {
            let was = self.width.get(stored, nth);
            let counted = self.width.get(&wanted, nth);
            if was == counted {
                continue;
            }
            if was < counted {
                correction.low += 1;
                if self.what == Repair::Leaks {
                    push(&mut correction.low_runs, cluster);
                    self.width.set(&mut wanted, nth, was);
                }
            } else if cluster < self.file_clusters {
                correction.leaks += 1;
                if counted == 0 {
                    push(&mut correction.freed, cluster);
                }
            } else {
                // Behind the end of the file there is nothing to leak.
                continue;
            }
            if correction.wrong.len() < MAX_FINDINGS {
                correction.wrong.push((cluster, was, counted));
            }
        }
        correction.pieces = changed_pieces(offset, stored, &wanted.into());
        correction
    }
}

/// Appends a cluster to ascending runs.
fn push(runs: &mut Vec<Range<u64>>, cluster: u64) {
    match runs.last_mut() {
        Some(last) if last.end == cluster => last.end += 1,
        _ => runs.push(cluster..cluster + 1),
    }
}

impl Mender<'_> {
    /// Corrects refcounts and flags.
    pub(super) async fn correct(&mut self, plan: &Plan) -> Result<()> {
        let mut low = Bitmap::default();
        self.correct_existing(plan, &mut low).await?;
        self.low = Arc::new(low);
        self.add_new(plan).await?;
        self.correct_flags().await?;
        self.finish().await
    }

    fn corrector(&self) -> Corrector {
        Corrector {
            counts: self.counts.clone(),
            width: CounterWidth::new(self.g.refcount_order()),
            what: self.what,
            file_clusters: self.bounds.file_clusters(),
        }
    }

    async fn correct_existing(&mut self, plan: &Plan, low: &mut Bitmap) -> Result<()> {
        for batch in plan.existing.chunks(self.batch()) {
            let offsets: Vec<HostOffset> = batch.iter().map(|(offset, _)| *offset).collect();
            let (corrector, blocks) = (self.corrector(), batch.to_vec());
            let work = move |nth: usize, stored: &[u8]| corrector.correct(blocks[nth], stored);
            let mut writes = Vec::new();
            let (file, cluster_size) = (self.file, self.g.cluster_size());
            map_clusters(file, &offsets, cluster_size, work, |_, correction| {
                for cluster in correction.low_runs.iter().cloned().flatten() {
                    low.set(cluster)?;
                }
                writes.extend(self.account(correction));
                Ok(())
            })
            .await?;
            self.write(&writes).await?;
        }
        Ok(())
    }

    /// Adds up what a correction does; answers what it writes.
    fn account(&mut self, correction: Correction) -> Vec<(HostOffset, Bytes)> {
        self.report.leaks_fixed += correction.leaks;
        match self.what {
            Repair::All => self.report.corruptions_fixed += correction.low,
            Repair::Leaks => self.left += correction.low,
        }
        for (cluster, stored, counted) in correction.wrong {
            let what = match (stored > counted, self.what) {
                (true, _) => "Leaked",
                (false, Repair::All) => "ERROR",
                (false, Repair::Leaks) => continue,
            };
            self.note(|| format!("{what} cluster {cluster} refcount={stored} reference={counted}"));
        }
        self.freed.extend(correction.freed);
        correction.pieces
    }

    /// Writes the blocks that were missing, and then the table's entries for them.
    async fn add_new(&mut self, plan: &Plan) -> Result<()> {
        if plan.new.is_empty() {
            return Ok(());
        }
        let corrector = self.corrector();
        let nothing = vec![0; self.g.cluster_size() as usize];
        for batch in plan.new.chunks(self.batch()) {
            let mut writes = Vec::new();
            for block in batch {
                self.account(corrector.correct(*block, &nothing));
                // All of it is written: the cluster may hold anything.
                let (_, bytes) = corrector.truth(block.1, nothing.len());
                writes.push((block.0, Bytes::from(bytes)));
            }
            self.write(&writes).await?;
        }
        // Blocks before what points to them, so that a crash leaves no entry without its block.
        self.file.flush().await?;
        for (offset, index) in &plan.new {
            let at = self.header.refcount_table_offset.0 + index * ENTRY_SIZE;
            let entry = offset.0.to_be_bytes().to_vec();
            self.file
                .write(at, entry.into(), WriteFlags::default())
                .await?;
        }
        Ok(())
    }
}
