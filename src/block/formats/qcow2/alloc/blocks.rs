//! Refcount blocks in memory: loading, eviction, making new ones, writing back.

use super::block::Counters;
use super::*;
use crate::driver::BoxFuture;
use crate::formats::qcow2::parallel::run_all;

/// Bytes between two dirty parts of a block from which on they are written apart. A gap below has no block of the host's file system
/// for itself, so joining them takes no more space.
const GAP: usize = 4096;

impl Allocator {
    /// Whether the refcount table has a block for this part of the image.
    pub(super) fn has_block(&self, region: usize) -> bool {
        self.table.get(region).is_some_and(|entry| *entry != 0)
    }

    /// The block with this index of the refcount table; `None` where there is none, so all counters are 0.
    pub(super) async fn block(&mut self, region: usize) -> Result<Option<&mut Block>> {
        if !self.has_block(region) {
            return Ok(None);
        }
        if !self.blocks.contains_key(&region) {
            self.load_block(region).await?;
        }
        Ok(self.blocks.get_mut(&region))
    }

    async fn load_block(&mut self, region: usize) -> Result<()> {
        self.make_room().await?;
        let host = HostOffset(self.table[region]);
        let size = self.g.cluster_size();
        let data = self.file.read(host.0, size).await?;
        let mut bytes = vec![0; size as usize];
        data.copy_to(&mut bytes);
        let counters = Counters::from_bytes(bytes.into(), self.g);
        self.insert_block(region, host, counters);
        Ok(())
    }

    pub(super) fn insert_block(&mut self, region: usize, host: HostOffset, counters: Counters) {
        let block = Block {
            host,
            counters,
            dirty: 0,
        };
        self.blocks.insert(region, block);
        self.order.push_back(region);
    }

    /// Evicts blocks, the oldest first, down to the limit. A dirty block may be written at any time: counts go up before
    /// anything durable points to the cluster, and down only after nothing durable does.
    async fn make_room(&mut self) -> Result<()> {
        while self.blocks.len() >= self.cache_limit() {
            let Some(&oldest) = self.order.front() else {
                return Ok(());
            };
            self.write_block(oldest).await?;
            self.order.pop_front();
            self.blocks.remove(&oldest);
        }
        Ok(())
    }

    pub(super) fn mark_dirty(&mut self, region: usize, first: usize, count: usize) {
        let size = self.g.cluster_size() as usize;
        if let Some(block) = self.blocks.get_mut(&region) {
            block.dirty |= slice_mask(block.counters.byte_range(first, count), size);
            self.dirty.insert(region);
        }
    }

    /// Whether counters or table entries wait to be written.
    pub(crate) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty() || !self.unwritten_entries.is_empty()
    }

    /// Writes all dirty counters to the file; durable after the file's next flush. On error what was not written stays dirty.
    pub(crate) async fn write_back(&mut self) -> Result<()> {
        let blocks = self.begin_write_back().await?;
        self.write_blocks(&blocks).await
    }

    /// The blocks that `write_blocks` is to be called with, a few at a time, so that all counters as they are now are in the file.
    /// Writes entries of the refcount table that have to come first.
    pub(crate) async fn begin_write_back(&mut self) -> Result<Vec<usize>> {
        while let Some(&region) = self.unwritten_entries.first() {
            self.write_table_entry(region).await?;
        }
        Ok(self.dirty.iter().copied().collect())
    }

    /// Writes what is dirty of these blocks; durable after the file's next flush. On error all of them stay dirty.
    pub(crate) async fn write_blocks(&mut self, regions: &[usize]) -> Result<()> {
        let size = self.g.cluster_size() as usize;
        let mut writes: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        for block in regions.iter().filter_map(|region| self.blocks.get(region)) {
            for range in joined(dirty_ranges(block.dirty, size)) {
                let data = Data::from(block.counters.as_bytes()[range.clone()].to_vec());
                let at = block.host + range.start as u64;
                writes.push(Box::pin(self.metadata.write(
                    Owner::RefcountBlock,
                    at,
                    data,
                )));
            }
        }
        run_all(writes).await?;
        for region in regions {
            if let Some(block) = self.blocks.get_mut(region) {
                block.dirty = 0;
            }
            self.dirty.remove(region);
        }
        Ok(())
    }

    pub(super) async fn write_block(&mut self, region: usize) -> Result<()> {
        self.write_blocks(&[region]).await
    }

    async fn write_table_entry(&mut self, region: usize) -> Result<()> {
        let at = self.table_offset + region as u64 * ENTRY_SIZE;
        let bytes = self.table[region].to_be_bytes().to_vec();
        self.unwritten_entries.insert(region);
        let data = Data::from(bytes);
        self.metadata.write(Owner::RefcountTable, at, data).await?;
        self.unwritten_entries.remove(&region);
        Ok(())
    }

    /// Makes the block for a part of the image that has none. Takes a cluster at the end of the image.
    pub(super) async fn make_block(&mut self, region: usize) -> Result<()> {
        while !self.has_block(region) {
            let at = self.end;
            self.check_end(at + 1)?;
            let home = self.g.refblock_of(ClusterIndex(at));
            let beyond = region.max(home);
            if beyond >= self.table.len() {
                self.grow_table(beyond).await?;
                continue;
            }
            let used = self.count(ClusterIndex(at)).await? != 0;
            if used || !self.may_hand_out(at) {
                self.end = at + 1;
                continue;
            }
            // A part without a block gets its own first, which then counts itself.
            let target = if self.has_block(home) { region } else { home };
            self.place_block(target, ClusterIndex(at)).await?;
        }
        Ok(())
    }

    /// Puts a new block for `region` at the free cluster `at`, which itself or an existing block counts.
    async fn place_block(&mut self, region: usize, at: ClusterIndex) -> Result<()> {
        self.make_room().await?;
        let mut counters = Counters::zeroed(self.g);
        let home = self.g.refblock_of(at);
        let own = Run {
            start: at,
            count: 1,
        };
        if home == region {
            counters.set(self.g.in_refblock(at), 1);
        } else {
            self.change(own, 1).await?;
        }
        // The caller has found that it holds nothing.
        self.owners.claim(at, 1, Owner::RefcountBlock)?;
        if let Err(error) = self.write_new_block(home, at, &counters).await {
            self.owners.release(at, 1);
            if home != region && self.subtract(own, 1).await.is_err() {
                log::error!("qcow2: host cluster {} is leaked", at.0);
            }
            return Err(error);
        }
        let host = self.g.host_offset(at);
        self.table[region] = host.0;
        self.insert_block(region, host, counters);
        self.note_used(own);
        // The block is durable: should this write fail, it is done again before anything relies on it.
        self.write_table_entry(region).await
    }

    async fn write_new_block(
        &mut self,
        home: usize,
        at: ClusterIndex,
        counters: &Counters,
    ) -> Result<()> {
        self.write_block(home).await?;
        let bytes = Data::from(counters.as_bytes().to_vec());
        let host = self.g.host_offset(at);
        self.metadata
            .write(Owner::RefcountBlock, host, bytes)
            .await?;
        self.file.flush().await
    }
}

/// The ranges, which ascend, joined over small gaps.
pub(super) fn joined(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.dedup_by(|next, kept| {
        let near = next.start - kept.end < GAP;
        if near {
            kept.end = next.end;
        }
        near
    });
    ranges
}
