//! Write-back: what is dirty in memory becomes durable, in an order that leaves a sound image at any crash.
//!
//! ```text
//! copy L1 and L2 changes -> write refcounts -> fdatasync -> write the L2 and L1 copies -> fdatasync
//! ```
//!
//! New refcount blocks, which there are every 2 GiB or so, take one flush more: they are durable before the refcount table leads to them,
//! and that is durable before anything points to clusters that they count. So does a refcount table that has grown: it is durable before
//! the header leads to it.
//!
//! The copies are taken first. Whatever they point to was written before (guest data, new L2 tables) or is in the refcounts
//! that are written next, so the first fdatasync makes all of it durable before anything on disk points to it; it is one of
//! both files where guest data lie in an external one. That holds for a
//! power cut, and for a killed process, whose completed writes stay. What changes after the copy waits for the next write-back.
//! Freed clusters were taken before the copies: the second fdatasync makes their unlinking durable, and they move on
//! in the quarantine.
//!
//! On error everything that was taken is dirty again, and the next flush does it all over.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::try_join;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::alloc::{Run, TableSwitch};
use super::image::Image;
use super::l1::L1Table;
use super::l2::TakenTable;
use super::owners::Owner;
use super::parallel::run_all;
use super::quarantine::MAX_UNLINKED;
use crate::driver::BoxFuture;
use crate::error::Result;
use crate::io::Data;
use crate::units::HostOffset;

/// Refcount blocks that are written in one go.
const BLOCKS: usize = 16;

/// Which changes are durable, and who writes back.
#[derive(Debug, Default)]
pub(crate) struct Commits {
    /// Counts changes of metadata, after they are made.
    changes: AtomicU64,
    /// How many of them are durable.
    durable: AtomicU64,
    /// Write-backs started.
    started: AtomicU64,
    /// The last one that succeeded. Held over a write-back.
    done: Arc<tokio::sync::Mutex<u64>>,
}

/// While it lives, nothing is written back.
#[derive(Debug)]
pub(super) struct NoWriteBack {
    _done: tokio::sync::OwnedMutexGuard<u64>,
}

impl Commits {
    /// Metadata have changed in memory.
    pub(crate) fn touch(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Waits until nobody writes back, and keeps others from it.
    pub(super) async fn stop(&self) -> NoWriteBack {
        let _done = self.done.clone().lock_owned().await;
        NoWriteBack { _done }
    }

    /// Whether all metadata in memory are on disk.
    pub(crate) fn is_clean(&self) -> bool {
        self.durable.load(Ordering::SeqCst) == self.changes.load(Ordering::SeqCst)
    }
}

/// What a write-back has taken. Dropped before it is written, it goes back.
struct Taken<'i> {
    frees: Vec<Run>,
    tables: Vec<TakenTable>,
    l1: Vec<(Range<usize>, HostOffset, Vec<u8>)>,
    /// Where from.
    from: (&'i Image, &'i L1Table),
}

impl Taken<'_> {
    /// Nothing goes back. Answers what was freed before.
    fn written(&mut self) -> Vec<Run> {
        self.tables.clear();
        self.l1.clear();
        std::mem::take(&mut self.frees)
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let (image, l1) = self.from;
        l1.mark(self.l1.iter().flat_map(|(sectors, ..)| sectors.clone()));
        image.l2.put_back(&self.tables);
        image.quarantine.unlinked(std::mem::take(&mut self.frees));
    }
}

/// Who writes back early: a task of the image, on the runtime that has opened it. That of a request may end before the image does.
#[derive(Debug)]
pub(super) struct Early {
    runtime: Option<Handle>,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl Default for Early {
    fn default() -> Self {
        Early {
            runtime: Handle::try_current().ok(),
            task: Mutex::default(),
        }
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        let task = self.task.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = task {
            task.abort();
        }
    }
}

impl Image {
    /// Makes every change that was made before this call durable: guest data and metadata.
    ///
    /// Calls at the same time share one write-back. Cancellation: run to the end by the caller.
    pub(super) async fn write_back(&self) -> Result<()> {
        let before = self.commits.started.load(Ordering::SeqCst);
        let mut done = self.commits.done.lock().await;
        if *done > before {
            // One that began after this call has succeeded meanwhile.
            return Ok(());
        }
        let number = self.commits.started.fetch_add(1, Ordering::SeqCst) + 1;
        self.write_back_once().await?;
        *done = number;
        drop(done);
        if let Err(error) = self.advance_quarantine().await {
            log::warn!("qcow2: freeing clusters is postponed: {error}");
        }
        Ok(())
    }

    async fn write_back_once(&self) -> Result<()> {
        let changes = self.commits.changes.load(Ordering::SeqCst);
        let l1 = self.l1();
        // In this order: see the module's documentation.
        let mut taken = Taken {
            frees: self.quarantine.take_unlinked(),
            l1: l1.take_dirty(),
            tables: self.l2.take_dirty(),
            from: (self, &l1),
        };
        self.write_taken(&taken).await?;
        self.quarantine.durable(taken.written());
        self.commits.durable.fetch_max(changes, Ordering::SeqCst);
        Ok(())
    }

    async fn write_taken(&self, taken: &Taken<'_>) -> Result<()> {
        let (blocks, new) = {
            let mut alloc = self.alloc.lock().await;
            alloc.reclaim().await?;
            (alloc.dirty_blocks(), alloc.unlinked())
        };
        for piece in blocks.chunks(BLOCKS) {
            // Requests that allocate go on in between. What they count is made durable by the next write-back, as what they point to.
            self.alloc.lock().await.write_blocks(piece).await?;
        }
        self.link_blocks(&new).await?;
        if taken.tables.is_empty() && taken.l1.is_empty() {
            return self.flush_files().await;
        }
        self.flush_files().await?;
        for (_, at, bytes) in &taken.l1 {
            let data = Data::from(bytes.clone());
            self.metadata.write(Owner::L1Table, *at, data).await?;
        }
        let mut writes: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        for table in &taken.tables {
            writes.push(Box::pin(table.write(&self.metadata)));
        }
        run_all(writes).await?;
        self.file.flush().await
    }

    /// Leads the refcount table to new blocks that have been written. Each is durable before its entry is, and so is the entry of the block
    /// that counts its cluster; mostly all of them are linked behind the first flush. Requests that allocate go on.
    async fn link_blocks(&self, new: &[usize]) -> Result<()> {
        let switch = {
            let mut alloc = self.alloc.lock().await;
            if alloc.has_grown() && self.header.is_kept() {
                // Who keeps it waits for this to end. The image is marked dirty: nobody goes by counts before a later write-back.
                return Ok(());
            }
            alloc.begin_switch(new)
        };
        if let Some(switch) = switch {
            let switched = self.switch_table(&switch).await;
            return self.alloc.lock().await.end_switch(switch, switched).await;
        }
        loop {
            let next = self.alloc.lock().await.linkable(new);
            if next.is_empty() {
                return Ok(());
            }
            self.file.flush().await?;
            self.alloc.lock().await.link(&next).await?;
        }
    }

    /// Leads the header to a refcount table that has grown, and so to all blocks that have been written. Who allocates goes on.
    async fn switch_table(&self, switch: &TableSwitch) -> Result<()> {
        let Run { start, count } = switch.table();
        let at = self.g.host_offset(start);
        self.metadata
            .write(Owner::RefcountTable, at, switch.entries())
            .await?;
        self.file.flush().await?;
        self.header
            .update(|header| {
                header.refcount_table_offset = at;
                header.refcount_table_clusters = count as u32;
            })
            .await
    }

    /// Makes durable what was written: to the image's file, and to an external data file.
    async fn flush_files(&self) -> Result<()> {
        if self.data.is_external() {
            try_join(self.data.child().flush(), self.file.flush()).await?;
            return Ok(());
        }
        self.file.flush().await
    }

    /// Frees what has passed the quarantine. What cannot be freed now is tried again after the next write-back.
    async fn advance_quarantine(&self) -> Result<()> {
        let drained = self.quarantine.advance(&self.gate);
        if drained.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.punch(&drained).await {
            log::warn!("qcow2: freed clusters keep their space: {error}");
        }
        let mut alloc = self.alloc.lock().await;
        self.commits.touch();
        let dropped = alloc.drop_references(drained).await;
        self.quarantine.unlinked(dropped.rest);
        for run in dropped.freed {
            self.forget_tables(run);
            alloc.adopt_freed(run);
        }
        dropped.result
    }

    /// The clusters hold no L2 tables any more.
    fn forget_tables(&self, run: Run) {
        for cluster in (0..run.count).map(|offset| run.start + offset) {
            if self.owners.get(cluster).is_some() {
                self.l2.forget(self.g.host_offset(cluster));
            }
        }
    }

    /// Gives the host the space of clusters that nobody else refers to. Their refcount is still 1, so nobody gets them.
    async fn punch(&self, runs: &[Run]) -> Result<()> {
        if !self.tuning.pass_discard() {
            return Ok(());
        }
        for run in runs {
            let single = {
                let mut alloc = self.alloc.lock().await;
                alloc.seal(*run);
                alloc.greatest(*run).await? == 1
            };
            if single {
                let at = self.g.host_offset(run.start);
                let len = run.count << self.g.cluster_bits();
                self.file.discard(at.0, len).await?;
            }
        }
        Ok(())
    }

    /// Writes back everything until nothing is left: refcounts of freed clusters too. The gate is closed.
    pub(super) async fn write_back_all(&self) -> Result<()> {
        self.write_back().await?;
        // Nobody is inside, so one more round frees all that is unlinked, and another writes its refcounts. More
        // are needed only where storage fails, which ends this with its error.
        loop {
            let dirty = self.alloc.lock().await.is_dirty();
            if self.quarantine.is_empty() && !dirty && self.commits.is_clean() {
                return Ok(());
            }
            self.advance_quarantine().await?;
            self.write_back().await?;
        }
    }

    /// Whether it is time to write back.
    pub(super) fn has_much_unwritten(&self) -> bool {
        self.has_unwritten(1, 1)
    }

    /// Whether the limits are exceeded so many times.
    fn has_unwritten(&self, tables: usize, clusters: u64) -> bool {
        let unlinked = self.quarantine.waiting() << self.g.cluster_bits();
        self.l2.dirty_count() > tables * self.l2.dirty_limit() || unlinked > clusters * MAX_UNLINKED
    }

    /// As `relieve`, behind a request that has left the gate: a task writes back, and requests go on. They wait for it only where
    /// they outrun it by far.
    pub(super) async fn relieve_behind(self: &Arc<Self>) {
        if !self.has_much_unwritten() {
            return;
        }
        let Some(runtime) = &self.early.runtime else {
            return self.relieve_inside().await;
        };
        {
            let task = &self.early.task;
            let mut task = task.lock().unwrap_or_else(PoisonError::into_inner);
            if task.as_ref().is_none_or(JoinHandle::is_finished) {
                let image = self.clone();
                *task = Some(runtime.spawn(async move { image.relieve_inside().await }));
            }
        }
        // All tables of the cache are dirty, or much of the disk could be free and is not.
        if self.has_unwritten(2, 16) {
            self.relieve_inside().await;
        }
    }

    async fn relieve_inside(&self) {
        let Some(_flushing) = self.gate.try_enter_flush() else {
            // Another time: a change of the whole image is about to begin.
            return;
        };
        let _inside = self.gate.enter_unnoticed().await;
        if !self.is_closed() {
            self.relieve().await;
        }
    }

    /// Writes back early when much is dirty, so that neither memory nor unfreed space grow without bound. An error is left to the
    /// next flush, which meets it again.
    pub(super) async fn relieve(&self) {
        if self.has_much_unwritten()
            && let Err(error) = self.write_back().await
        {
            log::warn!("qcow2: write-back failed, a flush will try again: {error}");
        }
    }
}
