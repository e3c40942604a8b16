//! Growth of the refcount table.

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

impl Allocator {
    /// Replaces the refcount table by a larger one that has an entry for `region`.
    ///
    /// The new blocks and the new table are written to the first clusters that the old table cannot count, and made durable;
    /// then one header write switches. On error nothing points to them.
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
        let offset = g.host_offset(area.start + growth.blocks);
        if let Err(error) = self.switch_table(area, &blocks, &table, offset).await {
            // Where the header may point there, nothing else is put.
            if self.header.check().is_ok() {
                self.owners.release(area.start, area.count);
            }
            return Err(error);
        }
        let old = Run {
            start: g.host_cluster(self.table_offset),
            count: g.clusters_for(old_entries as u64 * ENTRY_SIZE),
        };
        self.adopt(area, blocks, table, offset);
        self.free_old_table(old).await;
        Ok(())
    }

    /// Says what the area holds: the new blocks first, then the new table.
    fn claim_area(&self, area: Run, blocks: u64) -> Result<()> {
        self.owners
            .claim(area.start, blocks, Owner::RefcountBlock)?;
        let (table, clusters) = (area.start + blocks, area.count - blocks);
        self.owners.claim(table, clusters, Owner::RefcountTable)
    }

    /// Writes the new blocks and the new table, and makes the header point to it, durably.
    async fn switch_table(
        &mut self,
        area: Run,
        blocks: &[Counters],
        table: &[u64],
        offset: HostOffset,
    ) -> Result<()> {
        let g = self.g;
        let counters: Vec<u8> = blocks.iter().flat_map(|b| b.as_bytes()).copied().collect();
        let entries: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let at = g.host_offset(area.start);
        let metadata = &self.metadata;
        metadata
            .write(Owner::RefcountBlock, at, Data::from(counters))
            .await?;
        metadata
            .write(Owner::RefcountTable, offset, Data::from(entries))
            .await?;
        // The new table leads to all blocks, also to new ones whose clusters others count: those counters come first.
        self.write_back().await?;
        self.file.flush().await?;
        let clusters = (area.count - blocks.len() as u64) as u32;
        self.header
            .update(|header| {
                header.refcount_table_offset = offset;
                header.refcount_table_clusters = clusters;
            })
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

    fn adopt(&mut self, area: Run, blocks: Vec<Counters>, table: Vec<u64>, offset: HostOffset) {
        let first = self.table.len();
        self.table = table;
        self.table_offset = offset;
        self.unlinked.clear();
        for (index, counters) in blocks.into_iter().enumerate() {
            let host = self.g.host_offset(area.start + index as u64);
            self.insert_block(first + index, host, counters);
        }
        self.note_used(area);
    }

    /// The switch is durable and nobody else reads the table, so its clusters are free at once.
    async fn free_old_table(&mut self, old: Run) {
        match self.subtract(old, 1).await {
            Ok(freed) => {
                for run in freed {
                    self.owners.release(run.start, run.count);
                    self.add_free(run);
                }
            }
            Err(error) => log::warn!("qcow2: the old refcount table is leaked: {error}"),
        }
    }
}
