//! Refcount blocks in memory: loading, eviction, writing back.

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
    pub(super) async fn make_room(&mut self) -> Result<()> {
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
        !self.dirty.is_empty() || !self.unlinked.is_empty()
    }

    /// The blocks that `write_blocks` is to be called with, a few at a time, so that all counters as they are now are in the file.
    pub(crate) fn dirty_blocks(&self) -> Vec<usize> {
        self.dirty.iter().copied().collect()
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
