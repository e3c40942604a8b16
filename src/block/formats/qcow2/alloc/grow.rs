//! Growth of the refcount table.
//!
//! Who allocates gets a larger table at once, in memory and with its space in the file. The header is led to it by the next write-back, so
//! that nobody who allocates waits for a flush:
//!
//! ```text
//! counters of blocks | the new table, without blocks whose counters are not written | flush | header | flush
//! ```
//!
//! What the table has no entry for yet is linked by a later write-back, as any new block. The table that it replaces is in use until the
//! header is durable, and free from then on.

use super::block::Counters;
use super::*;

/// The size of a grown table and of the area that it is written to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Growth {
    /// New blocks, which count the area itself.
    pub(super) blocks: u64,
    /// Clusters of the new table.
    pub(super) clusters: u64,
}

/// Plans a table that has an entry for `region`, with room to grow, and the blocks that count the new area.
pub(super) fn plan(g: Geometry, old_entries: u64, region: u64) -> Result<Growth> {
    let per_cluster = g.cluster_size() / ENTRY_SIZE;
    let most = limits::QCOW2_MAX_REFTABLE_BYTES >> g.cluster_bits();
    let old = old_entries.div_ceil(per_cluster);
    let mut clusters = (old * 2).min(most).max(1);
    loop {
        // Blocks count themselves too; each counts at least 64 clusters, so this ends.
        let mut blocks = 1;
        while blocks * g.refcounts_per_block() < blocks + clusters {
            blocks += 1;
        }
        let entries = (region + 1).max(old_entries + blocks);
        let needed = entries.div_ceil(per_cluster);
        if needed > most {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "The refcount table cannot grow further: the image is full",
            ));
        }
        if needed <= clusters {
            return Ok(Growth { blocks, clusters });
        }
        clusters = needed;
    }
}

/// A table that has space in the file, which the header does not lead to yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Grown {
    table: Run,
    /// The parts of the image that its clusters and those of the blocks in front of them lie in, all of them new.
    regions: Range<usize>,
}

/// The header is to lead to a grown table.
#[derive(Debug)]
pub(crate) struct TableSwitch {
    grown: Grown,
    /// The blocks that it leads to and the table in use does not.
    linked: Vec<usize>,
    entries: Vec<u8>,
}

impl TableSwitch {
    /// Where the table lies.
    pub(crate) fn table(&self) -> Run {
        self.grown.table
    }

    /// What is to be written there.
    pub(crate) fn entries(&self) -> Data {
        Data::from(self.entries.clone())
    }
}

impl Allocator {
    /// Makes the refcount table so large that it has an entry for `region`.
    ///
    /// The new blocks and the new table lie in the first clusters that the old table cannot count. On error nothing has changed.
    pub(super) async fn grow_table(&mut self, region: usize) -> Result<()> {
        let g = self.g;
        let old_entries = self.table.len();
        let growth = plan(g, old_entries as u64, region as u64)?;
        let area = Run {
            start: ClusterIndex(old_entries as u64 * g.refcounts_per_block()),
            count: growth.blocks + growth.clusters,
        };
        self.check_end(area.end())?;
        self.metadata.check_unused(area)?;
        self.claim_area(area, growth.blocks)?;
        let (blocks, table) = self.build(&growth, area);
        if let Err(error) = self.take_space(area, &blocks, &table).await {
            self.owners.release(area.start, area.count);
            return Err(error);
        }
        self.table = table;
        let regions = old_entries..old_entries + blocks.len();
        for (region, (at, counters)) in regions.clone().zip(area.clusters().zip(blocks)) {
            self.unlinked.insert(region);
            self.insert_block(region, g.host_offset(at), counters);
        }
        self.note_used(area);
        let grown = Grown {
            table: Run {
                start: area.start + growth.blocks,
                count: growth.clusters,
            },
            regions,
        };
        if let Some(smaller) = self.grown.replace(grown)
            && self.switching != Some(smaller.table)
        {
            self.free_table(smaller.table).await;
        }
        Ok(())
    }

    /// Says what the area holds: the new blocks first, then the new table.
    fn claim_area(&self, area: Run, blocks: u64) -> Result<()> {
        self.owners
            .claim(area.start, blocks, Owner::RefcountBlock)?;
        let (table, clusters) = (area.start + blocks, area.count - blocks);
        self.owners.claim(table, clusters, Owner::RefcountTable)
    }

    /// Writes the new blocks and the new table, so that a full disk shows here and not when a guest flushes.
    async fn take_space(&self, area: Run, blocks: &[Counters], table: &[u64]) -> Result<()> {
        let counters: Vec<u8> = blocks.iter().flat_map(|b| b.as_bytes()).copied().collect();
        let at = self.g.host_offset(area.start);
        let behind = at + counters.len() as u64;
        let metadata = &self.metadata;
        metadata
            .write(Owner::RefcountBlock, at, Data::from(counters))
            .await?;
        metadata
            .write(Owner::RefcountTable, behind, Data::from(to_bytes(table)))
            .await
    }

    fn build(&self, growth: &Growth, area: Run) -> (Vec<Counters>, Vec<u64>) {
        let g = self.g;
        let mut blocks = vec![Counters::zeroed(g); growth.blocks as usize];
        for offset in 0..area.count {
            let cluster = area.start + offset;
            let block = (offset / g.refcounts_per_block()) as usize;
            blocks[block].set(g.in_refblock(cluster), 1);
        }
        let mut table = self.table.clone();
        for index in 0..growth.blocks {
            table.push(g.host_offset(area.start + index).0);
        }
        let entries = growth.clusters * g.cluster_size() / ENTRY_SIZE;
        table.resize(entries as usize, 0);
        (blocks, table)
    }

    /// Whether the header is to be led to a larger table.
    pub(crate) fn has_grown(&self) -> bool {
        self.grown.is_some()
    }

    /// Begins to replace the table in the file, if it has grown. `blocks` are blocks whose counters have been written.
    ///
    /// The caller writes the new table, flushes the file, changes the header, and calls `end_switch`.
    pub(crate) fn begin_switch(&mut self, blocks: &[usize]) -> Option<TableSwitch> {
        let grown = self.grown.clone()?;
        self.switching = Some(grown.table);
        let mut linked = blocks.to_vec();
        linked.retain(|region| self.unlinked.contains(region));
        // Those that count the table were written when they were made.
        linked.extend(grown.regions.clone());
        let mut entries = self.table.clone();
        for region in &self.unlinked {
            if !linked.contains(region) {
                entries[*region] = 0;
            }
        }
        Some(TableSwitch {
            grown,
            linked,
            entries: to_bytes(&entries),
        })
    }

    /// The header leads to the table, durably, or does not after all.
    pub(crate) async fn end_switch(
        &mut self,
        switch: TableSwitch,
        switched: Result<()>,
    ) -> Result<()> {
        let TableSwitch { grown, linked, .. } = switch;
        self.switching = None;
        let is_last = self.grown.as_ref() == Some(&grown);
        let unused = match switched {
            Ok(()) => {
                for region in linked {
                    self.unlinked.remove(&region);
                }
                self.grown.take_if(|_| is_last);
                Some(std::mem::replace(&mut self.live, grown.table))
            }
            // Where the header may point there, nothing else is put.
            Err(_) => (!is_last && self.header.check().is_ok()).then_some(grown.table),
        };
        if let Some(table) = unused {
            self.free_table(table).await;
        }
        switched
    }

    /// Nothing durable leads to a table, and nobody else reads it, so its clusters are free at once.
    async fn free_table(&mut self, table: Run) {
        match self.subtract(table, 1).await {
            Ok(freed) => {
                for run in freed {
                    self.owners.release(run.start, run.count);
                    self.add_free(run);
                }
            }
            Err(error) => log::warn!("qcow2: an old refcount table is leaked: {error}"),
        }
    }
}

fn to_bytes(table: &[u64]) -> Vec<u8> {
    table.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}
