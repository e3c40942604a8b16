//! A change of snapshots while requests are held back, and behind that: the steps that it was given, and how it becomes durable.
//!
//! What a step reads and writes nobody else can reach before the header points to it, so a change that is dropped before its
//! `commit` has only reservations to give back. The gate is closed while there are steps. A change that reverts nothing opens it when
//! all of them are known (`let_go`), with nothing written yet: what is taken is owed from that moment on, in memory, so that requests
//! copy what they would change of it. No metadata are written before the dirty bit is: from then on the refcounts and flags of the file
//! are worth nothing, whatever requests do until the switch.
//!
//! ```text
//! gate closed, steps: memory, gate open | H dirty | L1 copies, new table | write-back | H |
//!                            no write-back ^^^^^^^
//! ```
//!
//! Two ways to keep the counts right:
//! * *behind* the switch: the same header write sets the dirty bit, by which the refcounts of the file are worth nothing until
//!   everything is settled. What the change takes and drops is noted in memory only
//! * *before* the switch, for images without that bit and for refcounts that might become too narrow: what is taken is counted, and
//!   written, first. What is dropped is settled behind; a crash then leaves leaks

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::areas::without_copied;
use super::counting::{Counting, PassedOn};
use super::room::Room;
use super::settle::Expecting;
use super::settling::{self, activated, sum};
use super::table::SnapshotTable;
use crate::driver::{GoOn, HeaderHeld, HeaderSwitch, RequestsHeld};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::alloc::{Reserved, Run};
use crate::formats::qcow2::bitmaps::{Marked, Resize};
use crate::formats::qcow2::gate::Exclusive;
use crate::formats::qcow2::header::{Header, Incompatible, Version};
use crate::formats::qcow2::header_cell::{HeaderKept, HeaderLock};
use crate::formats::qcow2::image::Image;
use crate::formats::qcow2::l1::L1Table;
use crate::formats::qcow2::owners::Owner;
use crate::units::{ClusterIndex, HostOffset};

/// How far a change is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nobody knows of it.
    Steps,
    /// Requests go on, and owe for what is taken.
    LetGo,
    /// All that it needs is durable.
    Prepared,
    /// The header has been switched.
    Committed,
    /// What the header in the file says is unknown, or somebody else will put the old one back: everything that either state needs
    /// stays as it is.
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

/// What is there when requests have been held back.
pub(super) struct Ready {
    pub(super) room: Room,
    /// Where the change says how large the disk is.
    pub(super) size: Arc<AtomicU64>,
    pub(super) alone: Exclusive,
}

/// The change.
#[derive(Debug)]
pub(super) struct Staged {
    pub(super) image: Arc<Image>,
    phase: Phase,
    /// The header before.
    pub(super) old: Arc<Header>,
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
    pub(super) counting: Counting,
    /// Requests go on until the header has been switched: see `ahead`.
    pub(super) goes_ahead: bool,
    /// They have been held back then.
    pub(super) is_held: bool,
    /// References that have been counted already.
    pub(super) counted: Vec<settling::Change>,
    /// Those of them that were not, because a table that leaves passes them on.
    pub(super) passed_on: Vec<PassedOn>,
    /// L1 tables that nothing points to yet, and their places. They are written when all steps are known.
    pub(super) new_l1s: Vec<(Reserved, Arc<[u64]>)>,
    new_table: Option<Reserved>,
    /// Clusters for tables that have space in the file already.
    pub(super) room: Room,
    /// Areas that nothing points to after the switch.
    pub(super) replaced: Vec<Run>,
    /// Ids of the snapshots that are deleted.
    pub(super) deleted: BTreeSet<String>,
    /// Whether requests may go on before it is durable, once that is known. There is space for the tables then.
    may_let_go: Option<bool>,
    /// Requests go on already.
    is_let_go: bool,
    /// Keeps the header what `switch` has answered, while requests go on.
    header_lock: Option<HeaderLock>,
    /// Somebody has been told what the switch will write, and will make it or take it back where this does not.
    is_known: bool,
    /// The same, of a change that goes ahead.
    pub(super) kept: Option<HeaderKept>,
    /// Something is owed already, or is going to be.
    pub(super) expecting: Option<Expecting>,
    /// Last: requests go on when all else has been given back.
    pub(super) alone: Exclusive,
}

impl Staged {
    /// A change without steps, over what the image is now.
    pub(super) fn new(image: Arc<Image>, ready: Ready) -> Result<Staged> {
        let Ready { room, size, alone } = ready;
        let before = image.l1();
        let old = image.header.get();
        let table = SnapshotTable::clone(&image.snapshots.get());
        let old_table = Run {
            start: image.g.host_cluster(old.snapshots_offset),
            count: image.g.clusters_for(table.encoded_len()? as u64),
        };
        size.store(image.size(), Ordering::Release);
        Ok(Staged {
            phase: Phase::Steps,
            old,
            active: StagedL1 {
                offset: before.offset(),
                entries: without_copied(&before.entries()),
            },
            before,
            table,
            size,
            reverts: false,
            marked: None,
            changes: Vec::new(),
            counting: Counting::Before,
            goes_ahead: false,
            is_held: false,
            counted: Vec::new(),
            passed_on: Vec::new(),
            new_l1s: Vec::new(),
            new_table: None,
            room,
            // Whatever the steps are, the header gets a new table.
            replaced: Vec::from_iter((old_table.count > 0).then_some(old_table)),
            deleted: BTreeSet::new(),
            may_let_go: None,
            is_let_go: false,
            header_lock: None,
            is_known: false,
            kept: None,
            expecting: None,
            image,
            alone,
        })
    }

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

    /// Whether what is taken can be owed.
    async fn may_owe(&mut self) -> bool {
        self.changes = sum(std::mem::take(&mut self.changes));
        !self.image.settling.has_passed_on() && self.may_count_behind().await
    }

    /// Whether what is taken can be owed and the guest goes on seeing the same bytes.
    pub(super) async fn may_let_go(&mut self) -> Result<bool> {
        self.check_phase()?;
        if let Some(known) = self.may_let_go {
            return Ok(known);
        }
        let may = !self.reverts && self.may_owe().await;
        if may {
            self.ensure_space().await?;
        }
        self.may_let_go = Some(may);
        Ok(may)
    }

    /// Lets the gate be opened, where that is possible. Then the image is marked.
    pub(super) async fn let_go(&mut self, then: GoOn) -> Result<bool> {
        if !self.may_let_go().await? {
            return Ok(false);
        }
        let image = self.image.clone();
        self.counting = Counting::Behind;
        self.expecting = Some(Expecting::new(image.clone()));
        // Nobody is inside, so that nobody is writing back.
        let unmarked = image.commits.stop().await;
        image.alloc.lock().await.keep_blocks(true);
        let takes = self.takes();
        image
            .settling
            .apply(image.g, &takes, &self.before, &self.before);
        image.snapshots.set_leaving(self.deleted.clone());
        self.is_let_go = true;
        self.phase = Phase::LetGo;
        then(RequestsHeld::by(self.alone.hand_over()));
        // The other disks of a transaction come first, and their guests.
        tokio::task::yield_now().await;
        let marked = match takes.is_empty() {
            true => Ok(()),
            false => image.mark_dirty().await,
        };
        image.alloc.lock().await.keep_blocks(false);
        drop(unmarked);
        marked.map(|()| true)
    }

    /// What L1 tables will refer to that did not.
    pub(super) fn takes(&self) -> Vec<settling::Change> {
        let mut takes = self.changes.clone();
        takes.retain(|change| change.more > 0);
        takes
    }

    pub(super) async fn prepare(&mut self) -> Result<()> {
        if !self.is_let_go {
            self.check_phase()?;
        } else {
            self.expect(Phase::LetGo)?;
        }
        if self.goes_ahead {
            self.mark_ahead().await?;
        }
        self.write_l1s().await?;
        match &self.new_table {
            Some(area) => {
                let bytes = self.table.encode()?;
                let owner = Owner::SnapshotTable;
                self.image.write_area(owner, area, bytes).await?;
            }
            None => self.write_table().await?,
        }
        if !(self.is_let_go || self.goes_ahead) {
            self.count().await?;
        }
        // What the disk held, and the counters of the new tables.
        self.image.write_back().await?;
        self.phase = Phase::Prepared;
        Ok(())
    }

    /// What is owed needs space alone, which others have no part in: the gate opens. Counting is tried with the gate closed, as it is
    /// done.
    pub(super) async fn try_out(&mut self) -> Result<()> {
        self.check_phase()?;
        if !self.may_owe().await {
            return self.prepare().await;
        }
        self.alone.let_in();
        self.ensure_space().await
    }

    pub(super) async fn preview(&mut self) -> Result<Option<HeaderSwitch>> {
        self.expect(Phase::Prepared)?;
        if self.is_let_go && self.header_lock.is_none() {
            self.header_lock = Some(self.image.header.lock().await);
        }
        if self.goes_ahead {
            self.keep_header().await;
        }
        self.mark_bitmaps().await?;
        let new = self.new_fields();
        self.is_known = true;
        self.image.header.preview(|header| new.set(header)).await
    }

    /// Writes new L1 tables; nothing points to them yet.
    async fn write_l1s(&mut self) -> Result<()> {
        for (area, entries) in &self.new_l1s {
            self.write_l1(area, entries).await?;
        }
        Ok(())
    }

    async fn write_l1(&self, area: &Reserved, entries: &[u64]) -> Result<()> {
        let bytes = entries.iter().flat_map(|entry| entry.to_be_bytes());
        let image = &self.image;
        let bytes = bytes.collect();
        image.write_area(Owner::L1Table, area, bytes).await
    }

    /// Writes the table to free clusters; nothing points to it yet.
    async fn write_table(&mut self) -> Result<()> {
        if self.old.version == Version::V3 {
            self.table.complete(self.size());
        }
        let bytes = self.table.encode()?;
        if bytes.is_empty() {
            return Ok(());
        }
        // Given back first: it may be the last place that is no hole.
        self.room = Room::default();
        self.new_table = Some(self.image.write_snapshot_table(bytes).await?);
        Ok(())
    }

    /// Sees to it that the tables have space in the file: what is let go cannot be taken back without a trace, as a full disk must be.
    async fn ensure_space(&mut self) -> Result<()> {
        for (area, entries) in &self.new_l1s {
            if !self.room.has_space(area) {
                self.write_l1(area, entries).await?;
            }
        }
        self.table.complete(self.size());
        let len = self.table.encoded_len()?;
        let clusters = self.image.g.clusters_for(len as u64);
        match self.room.take_table(clusters, len) {
            Some(area) => self.new_table = Some(area),
            None => self.write_table().await?,
        }
        Ok(())
    }

    /// The L2 tables that are to be active and were not, at their places in the L1 table.
    pub(super) fn activated(&self) -> Vec<ClusterIndex> {
        if self.active.offset == self.before.offset() {
            return Vec::new();
        }
        let before = self.before.entries();
        let activated = activated(self.image.g, &before, &self.active.entries);
        activated.map(|(_, table)| table).collect()
    }

    /// Nothing is taken after all.
    fn give_up(&mut self) {
        if self.goes_ahead {
            return;
        }
        if !self.is_let_go {
            return self.uncount_takes();
        }
        let mut takes = self.takes();
        takes.iter_mut().for_each(|take| take.more *= -1);
        self.image.settling.drop_references(&takes);
    }

    /// The header stays what `preview` has answered while this lives.
    pub(super) fn take_header(&mut self) -> Option<HeaderHeld> {
        let kept = self.kept.take().map(HeaderHeld::by);
        kept.or_else(|| self.header_lock.take().map(HeaderHeld::by))
    }

    /// What the switch makes of the header.
    fn new_fields(&self) -> NewFields {
        let g = self.image.g;
        // A new L1 table has no flags.
        let settles = !self.changes.is_empty() || self.active.offset != self.before.offset();
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

    pub(super) async fn commit(&mut self) -> Result<()> {
        self.expect(Phase::Prepared)?;
        if self.goes_ahead {
            self.keep_header().await;
        }
        self.mark_bitmaps().await?;
        let new = self.new_fields();
        let switched = self.update_header(|header| new.set(header)).await;
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

    async fn update_header(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let header = &self.image.header;
        let kept = self.kept.as_ref().map(HeaderKept::lock);
        match kept.or(self.header_lock.as_ref()) {
            Some(lock) => header.update_with(lock, change).await,
            None => header.update(change).await,
        }
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

    pub(super) async fn roll_back(&mut self) -> Result<()> {
        if let Phase::Steps | Phase::LetGo | Phase::Prepared = self.phase {
            self.unmark_bitmaps().await;
            return Ok(());
        }
        self.expect(Phase::Committed)?;
        let mut switched = self.switch_back().await;
        if switched.is_err() && self.image.header.check().is_ok() {
            // The new header is there again; what has failed once may do at the second time.
            switched = self.switch_back().await;
        }
        match switched {
            Ok(()) => {
                self.phase = match self.is_let_go {
                    true => Phase::LetGo,
                    false => Phase::Steps,
                };
                self.unmark_bitmaps().await;
            }
            // Where it is the new one for certain, requests of a change that goes ahead have gone on with what was before.
            Err(_) if self.is_known || self.goes_ahead || self.image.header.check().is_err() => {
                self.image.header.give_up();
                self.phase = Phase::Unknown;
            }
            // The header is still the new one, and the change stands.
            Err(_) => {}
        }
        switched
    }

    /// Makes the header what it was.
    async fn switch_back(&self) -> Result<()> {
        let old = self.old.clone();
        let back = |header: &mut Header| {
            header.size = old.size;
            header.l1_size = old.l1_size;
            header.l1_table_offset = old.l1_table_offset;
            header.nb_snapshots = old.nb_snapshots;
            header.snapshots_offset = old.snapshots_offset;
        };
        self.update_header(back).await
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
        match self.goes_ahead {
            true => self.apply_ahead(),
            false => self.apply_changes(),
        }
        let image = &self.image;
        image.size.store(self.size(), Ordering::Release);
        image.settling.add_areas(self.replaced.drain(..));
        image.snapshots.set(std::mem::take(&mut self.table));
        image.commits.touch();
    }

    /// The L1 table that is to be active, if it is another one.
    pub(super) fn new_active(&self) -> Option<Arc<L1Table>> {
        if self.active.offset == self.before.offset() {
            return None;
        }
        let entries = self.active.entries.iter().copied();
        Some(Arc::new(L1Table::new(self.active.offset, entries)))
    }

    fn apply_changes(&mut self) {
        let image = &self.image;
        let mut changes = std::mem::take(&mut self.changes);
        if !self.counted.is_empty() {
            changes.retain(|change| change.more < 0);
        }
        let mut active = self.before.clone();
        if let Some(new) = self.new_active() {
            active = new;
            image.set_l1(active.clone());
        }
        for passed in self.passed_on.drain(..) {
            image.settling.pass_on(passed.from, passed.references);
        }
        match self.is_let_go {
            true => {
                changes.retain(|change| change.more < 0);
                image.settling.drop_references(&changes);
            }
            false => image
                .settling
                .apply(image.g, &changes, &self.before, &active),
        }
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        match self.phase {
            Phase::Committed if self.goes_ahead && !self.is_held => {
                // Nobody drops it here as long as the daemon lives. What guests wrote from now on would be lost.
                self.keep();
                self.image.header.give_up();
                log::error!(
                    "qcow2: a change of snapshots has happened, and the disk has not followed"
                );
            }
            Phase::Committed => self.apply(),
            Phase::Unknown => {
                self.keep();
                log::error!("qcow2: whether a change of snapshots has happened is unknown");
            }
            Phase::Steps | Phase::LetGo | Phase::Prepared => self.give_up(),
        }
        if self.is_let_go || self.goes_ahead {
            self.image.snapshots.set_leaving(BTreeSet::new());
        }
        self.image.wake_settler();
    }
}
