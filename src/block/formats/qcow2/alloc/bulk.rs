//! The doors for bulk changes, which read and write refcount blocks themselves while the image is quiet.

use super::*;

impl Allocator {
    /// Offsets of the refcount blocks, 0 for none, by their index in the refcount table.
    pub(crate) fn refcount_table(&self) -> &[u64] {
        &self.table
    }

    /// Forgets the blocks in memory: they are about to change, or have changed, in the file.
    ///
    /// # Panics
    /// When changes wait to be written: the caller has called `write_back`.
    pub(crate) fn forget_blocks(&mut self) {
        assert!(self.dirty.is_empty(), "refcounts that are not written");
        self.blocks.clear();
        self.order.clear();
    }

    /// Whether clusters that lost their last reference may go: what holds metadata stays, except where `may_go`.
    pub(crate) fn check_freed(
        &self,
        freed: &[Run],
        may_go: impl Fn(ClusterIndex, Owner) -> bool,
    ) -> Result<()> {
        for index in freed.iter().flat_map(|run| run.start.0..run.end()) {
            let cluster = ClusterIndex(index);
            if let Some(owner) = self.owners.get(cluster)
                && !may_go(cluster, owner)
            {
                self.owners.check_data(cluster, 1)?;
            }
        }
        Ok(())
    }

    /// Takes clusters over whose refcounts in the file are 0 now, nobody uses and nothing durable points to.
    pub(crate) fn adopt_freed(&mut self, run: Run) {
        self.seal(run);
        self.owners.release(run.start, run.count);
        self.add_free(run);
    }
}
