//! New refcount blocks. Who allocates gets one at once, in memory and with its space in the file; the refcount table is led to it by the
//! next write-back, so that nobody who allocates waits for a flush.
//!
//! ```text
//! block, count of its own cluster | entry of the table | what points to clusters that the block counts
//! ```
//!
//! A block's own cluster may be counted by another block that is new too. Its entry then waits for one more flush: an entry that is durable
//! where the other one is lost leads to a cluster with a count of 0, which the next process would hand out.

use super::block::Counters;
use super::*;

impl Allocator {
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
        let own = Run::one(at);
        if home == region {
            counters.set(self.g.in_refblock(at), 1);
        } else {
            self.change(own, 1).await?;
        }
        // The caller has found that it holds nothing.
        self.owners.claim(at, 1, Owner::RefcountBlock)?;
        if let Err(error) = self.write_new_block(region, at, &counters).await {
            self.owners.release(at, 1);
            if home != region && self.subtract(own, 1).await.is_err() {
                log::error!("qcow2: host cluster {} is leaked", at.0);
            }
            return Err(error);
        }
        let host = self.g.host_offset(at);
        self.table[region] = host.0;
        self.unlinked.insert(region);
        self.insert_block(region, host, counters);
        self.note_used(own);
        Ok(())
    }

    /// Writes the block, and its entry of the table as it is: both have space in the file then, so that a full disk shows here and not
    /// when a guest flushes.
    async fn write_new_block(
        &self,
        region: usize,
        at: ClusterIndex,
        counters: &Counters,
    ) -> Result<()> {
        let bytes = Data::from(counters.as_bytes().to_vec());
        let host = self.g.host_offset(at);
        self.metadata
            .write(Owner::RefcountBlock, host, bytes)
            .await?;
        self.write_entry(region, 0).await
    }

    /// Writes an entry of the table in use. Where that has none, the one that takes its place has its space already.
    async fn write_entry(&self, region: usize, entry: u64) -> Result<()> {
        let place = region as u64 * ENTRY_SIZE;
        if place >= self.live.count * self.g.cluster_size() {
            return Ok(());
        }
        let at = self.g.host_offset(self.live.start) + place;
        let bytes = Data::from(entry.to_be_bytes().to_vec());
        self.metadata.write(Owner::RefcountTable, at, bytes).await
    }

    /// The blocks that the refcount table in the file does not lead to yet.
    pub(crate) fn unlinked(&self) -> Vec<usize> {
        self.unlinked.iter().copied().collect()
    }

    /// Those of `blocks` that the table may lead to once the file has been flushed: their counters are in the file, and so is the
    /// entry of the block that counts their own cluster. None when the table leads to all of them.
    pub(crate) fn linkable(&self, blocks: &[usize]) -> Vec<usize> {
        let home = |region: usize| {
            let at = self.g.host_cluster(HostOffset(self.table[region]));
            self.g.refblock_of(at)
        };
        let is_linkable = |region: &usize| {
            let home = home(*region);
            self.unlinked.contains(region) && (home == *region || !self.unlinked.contains(&home))
        };
        blocks.iter().copied().filter(is_linkable).collect()
    }

    /// Lets the table in use, which has entries for them, lead to blocks; durable after the file's next flush. On error those that were
    /// not written stay unlinked.
    pub(crate) async fn link(&mut self, blocks: &[usize]) -> Result<()> {
        for region in blocks {
            self.write_entry(*region, self.table[*region]).await?;
            self.unlinked.remove(region);
        }
        Ok(())
    }
}
