//! A change of snapshots in steps: see [`SnapshotChange`].
//!
//! The gate is closed from the beginning to the end. What a step reads and writes nobody else can reach before the header points to
//! it, so a change that is dropped before its `commit` has only reservations to give back.
//!
//! Two ways to keep the counts right:
//! * *behind* the switch: the same header write sets the dirty bit, by which the refcounts of the file are worth nothing until
//!   everything is settled. What the change takes and drops is noted in memory only
//! * *before* the switch, for images without that bit and for refcounts that might become too narrow: what is taken is counted, and
//!   written, first. What is dropped is settled behind; a crash then leaves leaks

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Mutex;

use super::settling::{self, activated, sum};
use super::table::SnapshotTable;
use crate::driver::{
    BoxFuture, HeaderHeld, HeaderSwitch, NewSnapshot, SnapshotChange, SnapshotInfo,
    SnapshotSelector,
};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::alloc::{Reserved, Run};
use crate::formats::qcow2::bitmaps::{Marked, Resize};
use crate::formats::qcow2::gate::Exclusive;
use crate::formats::qcow2::geometry::Geometry;
use crate::formats::qcow2::header::{Header, Incompatible, Version};
use crate::formats::qcow2::image::Image;
use crate::formats::qcow2::l1::L1Table;
use crate::formats::qcow2::owners::Owner;
use crate::io::RunToEnd;
use crate::units::{ClusterIndex, HostOffset};

/// Bytes that file systems allocate at a time, most of them: to write less saves no space.
const HOST_BLOCK: usize = 4096;

/// Places that are tried for a table on a full disk.
const MAX_HOLES: usize = 32;

/// The handle on a change. The change itself lives on while a step runs to its end that nobody waits for.
#[derive(Debug)]
pub(super) struct Change {
    image: Arc<Image>,
    staged: Arc<Mutex<Staged>>,
    size: Arc<AtomicU64>,
}

/// When what a change takes is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Counting {
    /// Before the header's switch.
    Before,
    /// Behind it, under the dirty bit.
    Behind,
}

/// How far a change is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nobody knows of it.
    Steps,
    /// All that it needs is durable.
    Prepared,
    /// The header has been switched.
    Committed,
    /// What the header in the file says is unknown: everything that either state needs stays as it is.
    Unknown,
}

/// An L1 table as the change has it.
#[derive(Debug, Clone)]
pub(super) struct StagedL1 {
    pub(super) offset: HostOffset,
    /// Without COPIED.
    pub(super) entries: Arc<[u64]>,
}

/// The fields of the header that a change switches, as they will be.
struct NewFields {
    size: u64,
    l1_size: u32,
    l1_table_offset: HostOffset,
    nb_snapshots: u32,
    snapshots_offset: HostOffset,
    /// Refcounts are owed from then on.
    dirty: bool,
}

impl NewFields {
    fn set(&self, header: &mut Header) {
        header.size = self.size;
        header.l1_size = self.l1_size;
        header.l1_table_offset = self.l1_table_offset;
        header.nb_snapshots = self.nb_snapshots;
        header.snapshots_offset = self.snapshots_offset;
        if self.dirty {
            header.incompatible.0 |= Incompatible::DIRTY;
        }
    }
}

/// References that one L2 table takes over from another, so that no counter changes.
#[derive(Debug)]
struct PassedOn {
    from: ClusterIndex,
    to: ClusterIndex,
    references: Vec<Run>,
}

/// The change.
#[derive(Debug)]
pub(super) struct Staged {
    pub(super) image: Arc<Image>,
    phase: Phase,
    /// The header before.
    old: Arc<Header>,
    /// The active L1 table before.
    pub(super) before: Arc<L1Table>,
    pub(super) active: StagedL1,
    pub(super) table: SnapshotTable,
    /// Size of the disk in bytes.
    pub(super) size: Arc<AtomicU64>,
    /// The guest sees other bytes behind the switch.
    pub(super) reverts: bool,
    /// The bitmaps that are stale then have been marked.
    marked: Option<Marked>,
    /// What the steps change, one after the other.
    pub(super) changes: Vec<settling::Change>,
    counting: Counting,
    /// References that have been counted already.
    counted: Vec<settling::Change>,
    /// Those of them that were not, because a table that leaves passes them on.
    passed_on: Vec<PassedOn>,
    /// L1 tables that nothing points to yet, and their places. They are written when all steps are known.
    pub(super) new_l1s: Vec<(Reserved, Arc<[u64]>)>,
    new_table: Option<Reserved>,
    /// Areas that nothing points to after the switch.
    pub(super) replaced: Vec<Run>,
    /// Last: requests go on when all else has been given back.
    _alone: Exclusive,
}

impl Change {
    /// Closes the gate, with all metadata written to the file.
    pub(super) async fn begin(image: Arc<Image>) -> Result<Change> {
        {
            let _inside = image.gate.enter().await;
            image.check_range(0, 0)?;
            image.prepare_metadata_change().await?;
            look_for_greatest(&image).await?;
            // While requests go on, so that little is left when they wait.
            image.write_back().await?;
        }
        let alone = image.gate.close().await;
        image.check_range(0, 0)?;
        image.header.check()?;
        if let Err(error) = image.free_areas().await {
            log::warn!("qcow2: replaced tables keep their space for now: {error}");
        }
        // Data that are written in place are flushed with what is prepared.
        if !image.commits.is_clean() || image.alloc.lock().await.is_dirty() {
            image.write_back().await?;
        }
        let before = image.l1();
        let old = image.header.get();
        let table = SnapshotTable::clone(&image.snapshots.get());
        let old_table = Run {
            start: image.g.host_cluster(old.snapshots_offset),
            count: image.g.clusters_for(table.encode()?.len() as u64),
        };
        let size = Arc::new(AtomicU64::new(image.size()));
        let staged = Staged {
            phase: Phase::Steps,
            old,
            active: StagedL1 {
                offset: before.offset(),
                entries: without_copied(&before.entries()),
            },
            before,
            table,
            size: size.clone(),
            reverts: false,
            marked: None,
            changes: Vec::new(),
            counting: Counting::Before,
            counted: Vec::new(),
            passed_on: Vec::new(),
            new_l1s: Vec::new(),
            new_table: None,
            // Whatever the steps are, the header gets a new table.
            replaced: Vec::from_iter((old_table.count > 0).then_some(old_table)),
            image,
            _alone: alone,
        };
        Ok(Change {
            image: staged.image.clone(),
            staged: Arc::new(Mutex::new(staged)),
            size,
        })
    }

    /// Runs a step, to its end even when nobody waits for it any more.
    fn step<T: Send + 'static>(
        &self,
        step: impl for<'a> FnOnce(&'a mut Staged) -> BoxFuture<'a, Result<T>> + Send + 'static,
    ) -> BoxFuture<'_, Result<T>> {
        let staged = self.staged.clone();
        Box::pin(RunToEnd::new(async move {
            let mut staged = staged.lock_owned().await;
            step(&mut staged).await
        }))
    }
}

impl SnapshotChange for Change {
    fn create(&mut self, new: NewSnapshot) -> BoxFuture<'_, Result<SnapshotInfo>> {
        self.step(|staged| Box::pin(staged.create(new)))
    }

    fn delete(&mut self, which: SnapshotSelector) -> BoxFuture<'_, Result<SnapshotInfo>> {
        self.step(|staged| Box::pin(staged.delete(which)))
    }

    fn revert(&mut self, which: SnapshotSelector) -> BoxFuture<'_, Result<SnapshotInfo>> {
        self.step(|staged| Box::pin(staged.revert(which)))
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn prepare(&mut self) -> BoxFuture<'_, Result<()>> {
        self.step(|staged| Box::pin(staged.prepare()))
    }

    fn commit(&mut self) -> BoxFuture<'_, Result<()>> {
        self.step(|staged| Box::pin(staged.commit()))
    }

    fn roll_back(&mut self) -> BoxFuture<'_, Result<()>> {
        self.step(|staged| Box::pin(staged.roll_back()))
    }

    fn switch(&mut self) -> BoxFuture<'_, Result<Option<HeaderSwitch>>> {
        self.step(|staged| Box::pin(staged.preview()))
    }

    fn finish(self: Box<Self>) -> HeaderHeld {
        // The gate is closed: nobody is changing it. Dropping the change does the rest.
        self.image
            .header
            .hold()
            .map_or_else(HeaderHeld::not, HeaderHeld::by)
    }
}

impl Staged {
    /// Steps are over once the change has been prepared.
    pub(super) fn check_phase(&self) -> Result<()> {
        self.expect(Phase::Steps)
    }

    fn expect(&self, phase: Phase) -> Result<()> {
        if self.phase != phase {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("A change of snapshots is {:?} already", self.phase),
            ));
        }
        Ok(())
    }

    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    async fn prepare(&mut self) -> Result<()> {
        self.check_phase()?;
        self.write_l1s().await?;
        self.write_table().await?;
        self.changes = sum(std::mem::take(&mut self.changes));
        if self.image.settling.has_passed_on() {
            // Nothing else may be owed of those tables.
            let image = &self.image;
            image.settle_all(None, &image.stop_punching().await).await?;
        }
        match self.may_count_behind().await {
            true => self.counting = Counting::Behind,
            false => self.count_takes().await?,
        }
        // The counters of the new tables with them.
        self.image.write_back().await?;
        self.phase = Phase::Prepared;
        Ok(())
    }

    async fn preview(&mut self) -> Result<Option<HeaderSwitch>> {
        self.expect(Phase::Prepared)?;
        self.mark_bitmaps().await?;
        let new = self.new_fields();
        self.image.header.preview(|header| new.set(header)).await
    }

    /// Writes new L1 tables; nothing points to them yet.
    async fn write_l1s(&mut self) -> Result<()> {
        for (area, entries) in &self.new_l1s {
            let bytes = entries.iter().flat_map(|entry| entry.to_be_bytes());
            let image = &self.image;
            image
                .write_area(Owner::L1Table, area, bytes.collect())
                .await?;
        }
        Ok(())
    }

    /// Writes the table to free clusters; nothing points to it yet.
    async fn write_table(&mut self) -> Result<()> {
        if self.old.version == Version::V3 {
            self.table.complete(self.size());
        }
        let bytes = self.table.encode()?;
        if bytes.is_empty() {
            self.new_table = None;
            return Ok(());
        }
        self.new_table = Some(self.image.write_snapshot_table(bytes).await?);
        Ok(())
    }

    /// Whether no counter can become too narrow when what the change takes is counted behind it.
    async fn may_count_behind(&self) -> bool {
        if self.old.version == Version::V2 {
            return false;
        }
        let (g, burden) = (self.image.g, self.image.settling.burden());
        let more = self.changes.iter().map(|change| change.more).max();
        let lacking = burden.lacking + u64::try_from(more.unwrap_or(0)).unwrap_or(0);
        let mut alloc = self.image.alloc.lock().await;
        // Each L1 table counts a cluster once, or once for each compressed stream in it. One more for the quarantine.
        let tables = 1 + self.table.entries().len() as u64 + burden.drops;
        let by_tables = (tables + 1) * most_streams(g) <= g.refcount_max();
        // Each table that reaches a cluster has at least one reference in its count, and lacks so many at most.
        let by_counts = alloc
            .greatest_of_all()
            .is_some_and(|most| most.saturating_mul(lacking + 1) <= g.refcount_max());
        if by_tables || by_counts {
            alloc.limit_streams(g.refcount_max() / (lacking + 1));
        }
        by_tables || by_counts
    }

    /// The L2 tables that are to be active and were not, at their places in the L1 table.
    fn activated(&self) -> Vec<ClusterIndex> {
        if self.active.offset == self.before.offset() {
            return Vec::new();
        }
        let before = self.before.entries();
        let activated = activated(self.image.g, &before, &self.active.entries);
        activated.map(|(_, table)| table).collect()
    }

    /// Counts what the change takes, in memory and in the file, and takes the flags off what will be shared. On error the
    /// counts are undone; flags may go at any time.
    async fn count_takes(&mut self) -> Result<()> {
        let mut takes = self.changes.clone();
        takes.retain(|change| change.more > 0);
        let image = self.image.clone();
        // Also those that as many L1 tables have as before: nobody has kept up the flags of tables that only snapshots had.
        for table in self.activated() {
            image.clear_flags(table).await?;
            image.relieve().await;
        }
        if takes.is_empty() {
            return Ok(());
        }
        // What counters have to hold is known only when nothing is owed.
        image.settle_all(None, &image.stop_punching().await).await?;
        image
            .settling
            .apply(image.g, &takes, &self.before, &self.before);
        self.counted = takes.clone();
        let counted = async {
            for change in &takes {
                self.count_take(*change).await?;
                image.clear_flags(change.table).await?;
                image.relieve().await;
            }
            Ok(())
        };
        let counted = counted.await;
        if counted.is_err() {
            self.uncount_takes();
            if let Err(error) = image.settle_all(None, &image.stop_punching().await).await {
                log::warn!("qcow2: references of a failed snapshot are still counted: {error}");
            }
            if let Err(error) = image.write_back().await {
                log::warn!("qcow2: write-back failed, a flush will try again: {error}");
            }
        }
        counted
    }

    /// Counts what the change takes of one L2 table. Where a counter is too narrow for the time until the table that leaves this
    /// place is settled, that table passes on what both have.
    async fn count_take(&mut self, take: settling::Change) -> Result<()> {
        let image = self.image.clone();
        let error = match image.settle_table(take.table).await {
            Err(error) if error.kind() == ErrorKind::OutOfRange => error,
            result => return result,
        };
        let mut drops = self.changes.iter();
        let drop = drops.find(|change| change.slot == take.slot && change.more == -1);
        let (Some(drop), 1) = (drop, take.more) else {
            return Err(error);
        };
        let (from, to) = (drop.table, take.table);
        if self.passed_on.iter().any(|passed| passed.from == from) {
            return Err(error);
        }
        let references = image.common(from, to).await?;
        image.settle_table_but(to, &references).await?;
        self.passed_on.push(PassedOn {
            from,
            to,
            references,
        });
        Ok(())
    }

    fn uncount_takes(&mut self) {
        for passed in self.passed_on.drain(..) {
            self.image.settling.pass_on(passed.to, passed.references);
        }
        let mut changes = std::mem::take(&mut self.counted);
        changes.iter_mut().for_each(|change| change.more *= -1);
        let image = &self.image;
        let settling = &image.settling;
        settling.apply(image.g, &changes, &self.before, &self.before);
    }

    /// What the switch makes of the header.
    fn new_fields(&self) -> NewFields {
        let g = self.image.g;
        let settles = !self.changes.is_empty() || !self.activated().is_empty();
        NewFields {
            size: self.size(),
            l1_size: self.active.entries.len() as u32,
            l1_table_offset: self.active.offset,
            nb_snapshots: self.table.entries().len() as u32,
            snapshots_offset: match &self.new_table {
                Some(area) => g.host_offset(area.run().start),
                None => HostOffset(0),
            },
            dirty: self.counting == Counting::Behind && settles,
        }
    }

    async fn commit(&mut self) -> Result<()> {
        self.expect(Phase::Prepared)?;
        self.mark_bitmaps().await?;
        let new = self.new_fields();
        let switched = self.image.header.update(|header| new.set(header)).await;
        self.phase = match switched {
            Ok(()) => Phase::Committed,
            Err(_) if self.image.header.check().is_err() => Phase::Unknown,
            Err(_) => Phase::Prepared,
        };
        if self.phase == Phase::Prepared {
            self.unmark_bitmaps().await;
        }
        switched
    }

    /// Before the guest sees other bytes: marks the bitmaps that would say that nothing has changed, or have another size.
    async fn mark_bitmaps(&mut self) -> Result<()> {
        if self.reverts && self.marked.is_none() {
            let resize = Resize {
                old: self.image.size(),
                new: self.size(),
            };
            let Image {
                bitmaps, metadata, ..
            } = &*self.image;
            self.marked = Some(bitmaps.mark_resized(metadata, self.image.g, resize).await?);
        }
        Ok(())
    }

    async fn unmark_bitmaps(&mut self) {
        if let Some(marked) = self.marked.take() {
            let Image {
                bitmaps, metadata, ..
            } = &*self.image;
            bitmaps.unmark(metadata, marked).await;
        }
    }

    async fn roll_back(&mut self) -> Result<()> {
        if let Phase::Steps | Phase::Prepared = self.phase {
            self.unmark_bitmaps().await;
            return Ok(());
        }
        self.expect(Phase::Committed)?;
        let old = self.old.clone();
        let switched = self
            .image
            .header
            .update(|header| {
                header.size = old.size;
                header.l1_size = old.l1_size;
                header.l1_table_offset = old.l1_table_offset;
                header.nb_snapshots = old.nb_snapshots;
                header.snapshots_offset = old.snapshots_offset;
            })
            .await;
        match switched {
            Ok(()) => {
                self.phase = Phase::Steps;
                self.unmark_bitmaps().await;
            }
            Err(_) if self.image.header.check().is_err() => self.phase = Phase::Unknown,
            // The header is still the new one, and the change stands.
            Err(_) => {}
        }
        switched
    }

    /// What is reserved stays so: the header points to it, or may.
    fn keep(&mut self) {
        let l1s = self.new_l1s.iter_mut().map(|(area, _)| area);
        for area in l1s.chain(&mut self.new_table) {
            area.publish(area.run().count);
        }
    }

    /// Makes the image in memory what the header says.
    fn apply(&mut self) {
        self.keep();
        let image = &self.image;
        let mut changes = std::mem::take(&mut self.changes);
        if !self.counted.is_empty() {
            changes.retain(|change| change.more < 0);
        }
        let mut active = self.before.clone();
        if self.active.offset != self.before.offset() {
            let entries = self.active.entries.iter().copied();
            active = Arc::new(L1Table::new(self.active.offset, entries));
            image.set_l1(active.clone());
        }
        image.size.store(self.size(), Ordering::Release);
        for passed in self.passed_on.drain(..) {
            image.settling.pass_on(passed.from, passed.references);
        }
        image
            .settling
            .apply(image.g, &changes, &self.before, &active);
        image.settling.add_areas(self.replaced.drain(..));
        image.snapshots.set(std::mem::take(&mut self.table));
        image.commits.touch();
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        match self.phase {
            Phase::Committed => self.apply(),
            Phase::Unknown => {
                self.keep();
                log::error!("qcow2: whether a change of snapshots has happened is unknown");
            }
            Phase::Steps | Phase::Prepared => self.uncount_takes(),
        }
        self.image.wake_settler();
    }
}

impl Image {
    /// Writes a snapshot table to free clusters.
    ///
    /// On a full disk a free cluster may be a hole, which cannot be written, and another may not: after a creation there is the
    /// one that the table before was in. So several are tried: taking back a snapshot must not need space.
    pub(super) async fn write_snapshot_table(&self, bytes: Vec<u8>) -> Result<Reserved> {
        let clusters = self.g.clusters_for(bytes.len() as u64);
        // Kept until the end, so that each try gets another place.
        let mut holes = Vec::new();
        loop {
            let owner = Owner::SnapshotTable;
            let area = {
                let mut alloc = self.alloc.lock().await;
                alloc.allocate_metadata(clusters, owner).await?
            };
            match self.write_area(owner, &area, bytes.clone()).await {
                Err(error) if error.kind() == ErrorKind::NoSpace && holes.len() < MAX_HOLES => {
                    holes.push(area);
                }
                result => return result.map(|()| area),
            }
        }
    }

    /// Writes `bytes` to the start of an area, zeroes behind them up to the end of the host's block. No more: a cluster that
    /// a table was in then has space for a table of that length, also when the host's disk is full. Taking back a
    /// snapshot relies on it.
    pub(super) async fn write_area(
        &self,
        owner: Owner,
        area: &Reserved,
        mut bytes: Vec<u8>,
    ) -> Result<()> {
        let clusters = (area.run().count << self.g.cluster_bits()) as usize;
        bytes.resize(bytes.len().next_multiple_of(HOST_BLOCK).min(clusters), 0);
        let at = self.g.host_offset(area.run().start);
        self.metadata.write(owner, at, bytes.into()).await
    }
}

/// Looks for the greatest refcount where the number of snapshots alone does not say that all counters are wide enough.
async fn look_for_greatest(image: &Image) -> Result<()> {
    let g = image.g;
    let header = image.header.get();
    let tables = u64::from(header.nb_snapshots) + 2 + image.settling.burden().drops;
    if header.version == Version::V2 || (tables + 1) * most_streams(g) <= g.refcount_max() {
        return Ok(());
    }
    // A piece at a time: guests allocate in between.
    while !image.alloc.lock().await.look_for_greatest().await? {}
    Ok(())
}

/// How many compressed streams may lie in one host cluster: each is as long at least as that of a cluster of equal bytes,
/// by deflate (1032 bytes for one) or zstd (4 bytes for 128 KiB, and a header).
fn most_streams(g: Geometry) -> u64 {
    let size = g.cluster_size();
    let deflate = 5 + size / 1032;
    let zstd = 8 + 4 * size.div_ceil(128 << 10);
    size / deflate.min(zstd)
}

/// The entries of an L1 table as a snapshot has them.
pub(super) fn without_copied(entries: &[u64]) -> Arc<[u64]> {
    use crate::formats::qcow2::entry::L1Entry;
    let entries = entries.iter();
    entries
        .map(|entry| L1Entry(*entry).with_copied(false).0)
        .collect()
}
