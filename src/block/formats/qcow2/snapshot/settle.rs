//! Settling: stored refcounts and COPIED flags are brought up to date behind snapshot operations.
//!
//! ```text
//! owed > 0: counts of the table and all below it up
//! owed < 0: counts down, but the last reference stays -> hole punched -> count 0, free
//!  behind both: COPIED of this L1 index says "counted once", in the active L1 table and its L2 table
//! ```
//!
//! The counts of a table change in one go, with nothing to wait for in between, under the lock of the allocator. Shared tables do
//! not change otherwise, so no other lock is needed. A flag is set under the range lock of its guest clusters (see `image`).
//!
//! Every step is inside the gate, as guest requests are, so snapshot operations never run beside one.

use std::sync::Arc;

use tokio::time::Instant;

use super::settling::Work;
use crate::driver::BoxFuture;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::alloc::{Allocator, Run, push_run};
use crate::formats::qcow2::entry::{L1Entry, L2Entry, Mapping};
use crate::formats::qcow2::geometry::GuestCluster;
use crate::formats::qcow2::header::{Header, Incompatible};
use crate::formats::qcow2::image::Image;
use crate::formats::qcow2::l2::L2Table;
use crate::formats::qcow2::owners::Owner;
use crate::formats::qcow2::parallel::collect;
use crate::io::Access;
use crate::limits::{QCOW2_SETTLE_PUNCH, QCOW2_SETTLE_PUNCH_TIME};
use crate::units::{ClusterIndex, HostOffset};

/// Who punches freed clusters: one at a time, and nobody else behind a closed image.
pub(in crate::formats::qcow2) type Punching<'a> = tokio::sync::MutexGuard<'a, ()>;

/// L2 tables that are read ahead of settling them.
const AHEAD: usize = 16;

/// What an L1 index and the entries of its table should say.
struct Flags {
    /// The entry of the active L1 table.
    l1: bool,
    /// Entries of the L2 table whose flag is to change, by index.
    entries: Vec<(usize, L2Entry)>,
}

impl Flags {
    /// Whether a flag is set that the tables do not have.
    fn gains(&self, entry: L1Entry) -> bool {
        self.l1 && !entry.is_copied() || self.entries.iter().any(|(_, old)| !old.is_copied())
    }
}

impl Image {
    /// Makes the counts right of a table that something is about to be changed through.
    pub(in crate::formats::qcow2) async fn settle_before_copy(
        &self,
        table: HostOffset,
    ) -> Result<()> {
        let cluster = self.g.host_cluster(table);
        if self.settling.owed(cluster) > 0 {
            self.settle_table(cluster).await?;
        }
        Ok(())
    }

    /// Pays what a table owes. On error it still owes all of it. Cancellation: all or nothing.
    pub(super) async fn settle_table(&self, cluster: ClusterIndex) -> Result<()> {
        let passed_on = self.settling.passed_on(cluster);
        self.settle_table_but(cluster, &passed_on).await
    }

    /// As `settle_table`, but leaves some references below it as they are: ascending, and the table has them all.
    pub(super) async fn settle_table_but(
        &self,
        cluster: ClusterIndex,
        passed_on: &[Run],
    ) -> Result<()> {
        let Some(slot) = self.settling.slot(cluster) else {
            return Ok(());
        };
        let host = self.g.host_offset(cluster);
        let table = self.l2.get(host).await?;
        let reached = match passed_on {
            [] => self.reached(&table),
            passed_on => without(&self.reached(&table), passed_on),
        };
        let active = self.active_table(slot).await?;
        // Requests that allocate go on in between.
        while !self.alloc.lock().await.load_ahead(&reached).await? {}
        let mut alloc = self.alloc.lock().await;
        let owed = self.settling.owed(cluster);
        if owed > 0 {
            let uncounted = alloc.raise(&reached, owed.unsigned_abs()).await?;
            self.report_uncounted(host, uncounted);
        } else if owed < 0 {
            let lowered = alloc.lower(&reached, owed.unsigned_abs()).await?;
            self.report_uncounted(host, lowered.uncounted);
            let freed = self.unused(lowered.last, active.as_deref(), host);
            if freed.iter().any(|run| contains(run, cluster)) {
                self.l2.forget(host);
            }
            self.settling.add_freed(freed);
        }
        self.settling.settled(cluster, slot, owed);
        self.commits.touch();
        Ok(())
    }

    /// Clusters of a table were in use without being counted: another program may have overwritten them.
    fn report_uncounted(&self, table: HostOffset, clusters: u64) {
        if clusters > 0 {
            let message = format!(
                "{clusters} clusters of the L2 table at {table} were in use, but not counted; run a check"
            );
            // Settling goes on: what it counts now nobody overwrites any more.
            self.damage
                .met(message, Some(self.bytes_of(self.cluster_run(table))));
        }
    }

    /// The cluster of a table and all host clusters below it, ascending, each as often as there are references. Entries that
    /// nobody can use refer to nothing.
    fn reached(&self, table: &L2Table) -> Vec<Run> {
        let mut runs = vec![self.cluster_run(table.host())];
        for entry in table.iter() {
            if entry.is_compressed() {
                if let Ok(Mapping::Compressed(stream)) = entry.decode(self.g, true) {
                    // Streams in the same cluster count one by one, so their runs must not be joined.
                    let (first, last) = stream.clusters(self.g);
                    runs.extend((first.0..=last.0).map(|index| Run::one(ClusterIndex(index))));
                }
            } else if let Some(host) = self.flagged_cluster(entry) {
                push_run(&mut runs, self.cluster_run(host));
            }
        }
        if !runs.is_sorted_by_key(|run| run.start) {
            runs.sort_unstable_by_key(|run| run.start);
        }
        let mut joined = Vec::with_capacity(runs.len());
        runs.into_iter().for_each(|run| push_run(&mut joined, run));
        joined
    }

    /// The references that two tables have in common, each as often as both have it.
    pub(super) async fn common(&self, one: ClusterIndex, other: ClusterIndex) -> Result<Vec<Run>> {
        let one = self.reached(&*self.l2.get(self.g.host_offset(one)).await?);
        let other = self.reached(&*self.l2.get(self.g.host_offset(other)).await?);
        Ok(without(&one, &without(&one, &other)))
    }

    /// The active table of an L1 index; none where nobody can use it.
    async fn active_table(&self, slot: usize) -> Result<Option<Arc<L2Table>>> {
        match self.table(slot).await {
            Err(error) if error.kind() == ErrorKind::Corrupt => Ok(None),
            table => table.map(|table| Some(table?.0)),
        }
    }

    /// Of clusters whose counts say that nobody uses them any more behind `table`, those that may go: a damaged image can say so
    /// of what it lives on.
    fn unused(&self, last: Vec<Run>, active: Option<&L2Table>, table: HostOffset) -> Vec<Run> {
        if last.is_empty() {
            return last;
        }
        let table = self.g.host_cluster(table);
        let runs = active.map_or_else(Vec::new, |active| self.reached(active));
        let clusters = runs.iter().flat_map(|run| run.start.0..run.end());
        let mut used: Vec<u64> = clusters.collect();
        used.sort_unstable();
        let mut freed = Vec::new();
        for index in last.iter().flat_map(|run| run.start.0..run.end()) {
            let cluster = ClusterIndex(index);
            let owner = self.owners.get(cluster);
            let is_own_table = cluster == table && owner == Some(Owner::L2Table);
            let is_used = used.binary_search(&index).is_ok();
            if is_used || !(owner.is_none() || is_own_table) {
                let message =
                    format!("Host cluster {index} is in use, but not counted; run a check");
                self.damage
                    .met(message, Some(self.bytes_of(Run::one(cluster))));
                continue;
            }
            push_run(&mut freed, Run::one(cluster));
        }
        freed
    }

    /// Makes the COPIED flags of an L1 index say what the stored counts say. Cancellation: any of the flags have changed.
    async fn refresh_flags(&self, slot: usize) -> Result<()> {
        let Some((table, entry)) = self.table(slot).await? else {
            return Ok(());
        };
        let Some(flags) = self.wanted_flags(&table).await? else {
            return Ok(());
        };
        if !flags.gains(entry) && flags.l1 == entry.is_copied() {
            // A flag may go at any time.
            self.set_flags(&table, &flags);
            return Ok(());
        }
        let span = self.g.l2_entries();
        let first = GuestCluster(slot as u64 * span);
        let last = GuestCluster(first.0 + span - 1);
        let _clusters = self.lock_clusters(first, last).await;
        let index = slot as u64..slot as u64 + 1;
        let _making = self.tables.lock(index, Access::Exclusive).await;
        let Some((table, entry)) = self.table(slot).await? else {
            return Ok(());
        };
        let Some(flags) = self.wanted_flags(&table).await? else {
            return Ok(());
        };
        self.set_flags(&table, &flags);
        if flags.l1 != entry.is_copied() {
            self.l1().set(slot, entry.with_copied(flags.l1));
        }
        self.commits.touch();
        Ok(())
    }

    /// What the flags of an active table should be; nothing yet where the table owes.
    async fn wanted_flags(&self, table: &L2Table) -> Result<Option<Flags>> {
        let own = self.g.host_cluster(table.host());
        if self.settling.postpone_flags(own) {
            return Ok(None);
        }
        let mut entries = Vec::new();
        for (index, entry) in table.iter().enumerate() {
            if let Some(host) = self.flagged_cluster(entry) {
                entries.push((self.g.host_cluster(host), index, entry));
            }
        }
        entries.sort_unstable_by_key(|(cluster, ..)| *cluster);
        let clusters: Vec<_> = entries.iter().map(|(cluster, ..)| *cluster).collect();
        let (l1, singles) = {
            let mut alloc = self.alloc.lock().await;
            let singles = alloc.singles(&clusters).await?;
            (alloc.count(own).await? == 1, singles)
        };
        let changes = entries.into_iter().zip(singles);
        Ok(Some(Flags {
            l1,
            entries: changes
                .filter(|((.., entry), single)| entry.is_copied() != *single)
                .map(|((_, index, entry), _)| (index, entry))
                .collect(),
        }))
    }

    /// The host cluster of an entry that can have the flag. Where it is not even aligned, nobody can use it.
    fn flagged_cluster(&self, entry: L2Entry) -> Option<HostOffset> {
        let host = entry.host_cluster();
        host.filter(|host| self.g.is_aligned(host.0))
    }

    fn set_flags(&self, table: &Arc<L2Table>, flags: &Flags) {
        for (index, old) in &flags.entries {
            let mut entry = *old;
            // Other bits may change meanwhile. One that points elsewhere has a flag of its own.
            while self.flagged_cluster(entry) == self.flagged_cluster(*old)
                && entry.is_copied() == old.is_copied()
            {
                let new = entry.with_copied(!entry.is_copied());
                if self.l2.replace(table, *index, entry, new) {
                    break;
                }
                entry = table.get(*index);
            }
        }
        self.commits.touch();
    }

    /// Takes all COPIED flags off a table that owes nothing and is shared.
    pub(super) async fn clear_flags(&self, cluster: ClusterIndex) -> Result<()> {
        let table = self.l2.get(self.g.host_offset(cluster)).await?;
        for (index, old) in table.iter().enumerate() {
            if old.is_copied() && self.flagged_cluster(old).is_some() {
                self.l2.replace(&table, index, old, old.with_copied(false));
            }
        }
        self.commits.touch();
        Ok(())
    }

    /// Frees tables that were replaced. They keep their space in the file: a table of the same length has a place then, on a
    /// full disk too.
    pub(super) async fn free_areas(&self) -> Result<()> {
        let areas = self.settling.take_areas();
        let mut alloc = self.alloc.lock().await;
        let result = self.free(&mut alloc, areas).await;
        result.map_err(|(rest, error)| {
            self.settling.add_areas(rest);
            self.settling.frees_failed();
            error
        })
    }

    /// Punches some of the clusters whose last reference was a snapshot's. Nobody reads them, and their count is still 1, so nobody
    /// gets them: this needs not be inside the gate, and snapshot operations do not wait for a file system that is busy with it.
    pub(super) async fn punch_freed(&self, _alone: &Punching<'_>) {
        let (runs, bytes) = match self.tuning.pass_discard_snapshot() {
            true => QCOW2_SETTLE_PUNCH,
            false => (usize::MAX, u64::MAX),
        };
        let clusters = (bytes >> self.g.cluster_bits()).max(1);
        let freed = self.settling.start_punching(runs, clusters);
        let started = Instant::now();
        let mut done = 0;
        for run in &freed {
            if done > 0 && started.elapsed() > QCOW2_SETTLE_PUNCH_TIME {
                break;
            }
            done += 1;
            let at = self.g.host_offset(run.start).0;
            let len = run.count << self.g.cluster_bits();
            if self.tuning.pass_discard_snapshot()
                && let Err(error) = self.file.discard(at, len).await
            {
                log::debug!("qcow2: freed clusters keep their space in the file: {error}");
            }
        }
        self.settling.end_punching(done);
    }

    /// Frees what has been punched.
    async fn free_punched(&self) -> Result<()> {
        let punched = self.settling.take_punched();
        let mut alloc = self.alloc.lock().await;
        let result = self.free(&mut alloc, punched).await;
        result.map_err(|(rest, error)| {
            self.settling.add_punched(rest);
            self.settling.frees_failed();
            error
        })
    }

    /// Takes the last reference of clusters; answers which were left, after an error.
    async fn free(
        &self,
        alloc: &mut Allocator,
        runs: Vec<Run>,
    ) -> std::result::Result<(), (Vec<Run>, Error)> {
        let dropped = alloc.drop_references(runs).await;
        for run in dropped.freed {
            alloc.adopt_freed(run);
        }
        self.commits.touch();
        dropped.result.map_err(|error| (dropped.rest, error))
    }

    /// Does one piece of work, except punching; answers whether there was any. After an error others go first, until all is tried again.
    pub(super) async fn settle_step(&self) -> Result<bool> {
        match self.settling.next() {
            None => return Ok(false),
            Some(Work::Areas) => self.free_areas().await?,
            Some(Work::Punched) => self.free_punched().await?,
            // The caller does this, where nobody waits for it.
            Some(Work::Freed) => {}
            Some(Work::Table(cluster)) => {
                let settled = self.settle_table(cluster).await;
                settled.inspect_err(|_| self.settling.table_failed(cluster))?;
            }
            Some(Work::Drops) => {
                let written = self.write_back().await;
                written.inspect_err(|_| self.settling.drops_failed())?;
                self.settling.drop_now();
            }
            Some(Work::Flags(slot)) => {
                self.settling.take_flags(slot);
                match self.refresh_flags(slot).await {
                    // Nobody can use the entry, whatever its flags.
                    Err(error) if error.kind() == ErrorKind::Corrupt => {
                        log::error!("qcow2: L1 index {slot}: {error}");
                    }
                    Err(error) => {
                        self.settling.flags_failed(slot);
                        return Err(error);
                    }
                    Ok(()) => {}
                }
            }
        }
        Ok(true)
    }

    /// Settles everything, as fast as it goes. Answers whether all of it is done by the deadline. The caller is inside the gate, or
    /// has closed it.
    pub(super) async fn settle_all(
        &self,
        deadline: Option<Instant>,
        alone: &Punching<'_>,
    ) -> Result<bool> {
        self.settling.try_again();
        let mut result = Ok(());
        let mut ahead = Vec::new();
        let mut settled = 0;
        loop {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(false);
            }
            if settled % AHEAD == 0 {
                ahead = self.read_ahead().await;
            }
            settled += 1;
            if self.settling.next() == Some(Work::Freed) {
                self.punch_freed(alone).await;
            }
            match self.settle_step().await {
                Ok(true) => self.relieve().await,
                Ok(false) => break,
                Err(error) => {
                    // One of them is enough to tell.
                    result = result.and(Err(error));
                }
            }
        }
        drop(ahead);
        result.map(|()| self.settling.is_empty())
    }

    /// Clears the dirty bit when nothing is left to be settled. The caller is inside the gate, or has closed it.
    pub(in crate::formats::qcow2) async fn mark_clean(&self) -> Result<()> {
        let unknown = self.header.check().is_err();
        let owes = || !self.settling.is_empty() || self.settling.is_expecting();
        if unknown || !self.is_marked_dirty() || owes() {
            return Ok(());
        }
        // Nothing can be owed again before the gate has been closed.
        self.write_back().await?;
        {
            let mut alloc = self.alloc.lock().await;
            alloc.limit_streams(self.g.refcount_max());
        }
        // Nor does anybody expect to: that begins behind the closed gate, too.
        let clean = |header: &mut Header| header.incompatible.0 &= !Incompatible::DIRTY;
        self.header.update(clean).await
    }

    /// Sets the dirty bit, durably.
    pub(super) async fn mark_dirty(&self) -> Result<()> {
        let dirty = |header: &mut Header| header.incompatible.0 |= Incompatible::DIRTY;
        self.header.update(dirty).await
    }

    /// Whether the refcounts in the file are worth nothing at the moment.
    pub(in crate::formats::qcow2) fn is_marked_dirty(&self) -> bool {
        let header = self.header.get();
        header.incompatible.has(Incompatible::DIRTY)
    }

    /// Reads the tables that come next, at once. What fails is met again when its turn comes.
    async fn read_ahead(&self) -> Vec<Arc<L2Table>> {
        let tables = self.settling.next_tables(AHEAD).into_iter();
        let reads = tables
            .map(|cluster| {
                let read = self.l2.get(self.g.host_offset(cluster));
                Box::pin(async move { Ok(read.await.ok()) }) as BoxFuture<'_, _>
            })
            .collect();
        let tables = collect(reads).await.unwrap_or_default();
        tables.into_iter().flatten().collect()
    }
}

/// Something is owed by a change that may be taken back yet: nobody clears the dirty bit.
#[derive(Debug)]
pub(super) struct Expecting(Arc<Image>);

impl Expecting {
    pub(super) fn new(image: Arc<Image>) -> Self {
        image.settling.expect(1);
        Expecting(image)
    }
}

impl Drop for Expecting {
    fn drop(&mut self) {
        self.0.settling.expect(-1);
        self.0.wake_settler();
    }
}

/// The clusters of `runs` as often as there are more of them than in `others`. All ascend.
fn without(runs: &[Run], others: &[Run]) -> Vec<Run> {
    let clusters = |runs: &[Run]| -> Vec<u64> {
        let clusters = runs.iter().flat_map(|run| run.start.0..run.end());
        clusters.collect()
    };
    let mut others = clusters(others).into_iter().peekable();
    let mut left = Vec::new();
    for cluster in clusters(runs) {
        while others.next_if(|other| *other < cluster).is_some() {}
        if others.next_if_eq(&cluster).is_none() {
            push_run(&mut left, Run::one(ClusterIndex(cluster)));
        }
    }
    left
}

fn contains(run: &Run, cluster: ClusterIndex) -> bool {
    run.start <= cluster && cluster.0 < run.end()
}
