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

    /// Takes clusters over whose refcounts in the file are 0 now, nobody uses and nothing durable points to.
    pub(crate) fn adopt_freed(&mut self, run: Run) {
        self.seal(run);
        self.owners.release(run.start, run.count);
        self.add_free(run);
    }
}
