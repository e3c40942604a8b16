//! Running a script: the driver does it, the model follows, and what had been answered when is noted.

mod ahead;
mod let_go;
mod together;

use std::sync::Arc;
use std::time::Duration;

use super::audit::{Audit, with_bitmaps, with_old_snapshots};
use super::content::{Content, SECTOR, Versions, stamp};
use super::script::{Amendment, Case, End, Op, Step};
use crate::driver::{
    self, AmendOptions, BackingFile, Driver, NewSnapshot, Preallocation, Requests, SnapshotChange,
    SnapshotInfo, SnapshotSelector, Snapshots, WriteFlags, ZeroFlags,
};
use crate::error::{Error, ErrorKind};
use crate::formats::qcow2::create::{create, create_with_data_file};
use crate::formats::qcow2::{OpenOptions, Qcow2};
use crate::io::Data;
use crate::protocols::memory::Memory;

/// Why a run has failed, in words.
pub type Problem = String;

/// A snapshot of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The image's id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What it holds.
    pub content: Arc<Content>,
}

/// Everything that the image must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct World {
    /// In the order of the image's table.
    pub snapshots: Vec<Snapshot>,
    /// The disk.
    pub active: Arc<Content>,
}

impl World {
    /// What an image holds.
    pub fn of(audit: &Audit<'_>) -> Result<World, Problem> {
        let snapshots = audit.snapshots().iter().map(|snapshot| {
            Ok(Snapshot {
                id: snapshot.id.clone(),
                name: snapshot.name.clone(),
                content: Arc::new(audit.content(snapshot)?),
            })
        });
        Ok(World {
            snapshots: snapshots.collect::<Result<_, Problem>>()?,
            active: Arc::new(audit.active()?),
        })
    }

    /// How another world differs from this one, as text.
    pub fn difference(&self, other: &World) -> Option<Problem> {
        snapshots_differ(&self.snapshots, &other.snapshots)
            .or_else(|| self.active.difference(&other.active))
    }
}

/// How a list of snapshots differs from the one that is wanted, as text.
pub(super) fn snapshots_differ(wanted: &[Snapshot], is: &[Snapshot]) -> Option<Problem> {
    let names = |list: &[Snapshot]| -> Vec<String> {
        let named = |s: &Snapshot| format!("{} ({})", s.id, s.name);
        list.iter().map(named).collect()
    };
    if names(wanted) != names(is) {
        return Some(format!(
            "snapshots {:?} instead of {:?}",
            names(is),
            names(wanted)
        ));
    }
    wanted.iter().zip(is).find_map(|(wanted, is)| {
        let difference = wanted.content.difference(&is.content)?;
        Some(format!("snapshot {}: {difference}", wanted.name))
    })
}

/// An operation that has been answered.
#[derive(Debug, Clone)]
pub struct Moment {
    /// What it was.
    pub op: String,
    /// Records in the log when it was sent.
    pub begun: usize,
    /// Records in the log when it was answered.
    pub answered: usize,
    /// What it and its predecessors did is durable with the answer.
    pub durable: bool,
    /// How it changes the image.
    pub kind: Kind,
    /// The world behind it.
    pub after: World,
    /// A world that held for a time in its middle: a change that was made and taken back.
    pub passing: Option<World>,
    /// Other contents that the disk may have gone through: one request of several has happened.
    pub through: Vec<Arc<Content>>,
    /// Of several requests, those that are durable before all are answered.
    pub forced: Vec<Forced>,
}

/// A write that is durable when it is answered.
#[derive(Debug, Clone, Copy)]
pub struct Forced {
    /// Guest offset.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// Records in the log when it was answered.
    pub answered: usize,
}

/// What may be seen of an operation that was not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Each sector old or new.
    Sectors,
    /// Snapshots and size old or new, all at once.
    Structure,
    /// As `Structure`, with all of the disk's content.
    Everything,
}

/// An image in use, and the model of it.
pub struct Runner {
    /// Where the image lies. An external data file is the disk beside it.
    pub disk: Arc<Memory>,
    driver: Arc<Qcow2>,
    case: Case,
    /// The model.
    pub world: World,
    /// What has happened since the log began.
    pub moments: Vec<Moment>,
    next_stamp: u32,
}

/// What an operation has done.
struct Done {
    durable: bool,
    kind: Kind,
    passing: Option<World>,
    through: Vec<Arc<Content>>,
    forced: Vec<Forced>,
}

impl Done {
    fn sectors(durable: bool) -> Done {
        Done {
            durable,
            kind: Kind::Sectors,
            passing: None,
            through: Vec::new(),
            forced: Vec::new(),
        }
    }

    fn structure() -> Done {
        Done {
            kind: Kind::Structure,
            ..Done::sectors(true)
        }
    }

    /// Refused, or there was nothing to do.
    fn nothing() -> Done {
        Done::sectors(false)
    }
}

/// Opens the image as a case says.
pub async fn open(disk: &Arc<Memory>, case: &Case) -> Result<Arc<Qcow2>, Error> {
    let mut options = OpenOptions {
        pass_discard: case.discard,
        pass_discard_snapshot: case.discard,
        ..OpenOptions::default()
    };
    if case.small_caches {
        options.l2_cache_bytes = 0;
        options.refcount_cache_bytes = 0;
    }
    let data = disk.second().map(|data| data.child());
    let opening = Qcow2::open(disk.child(), options).await?;
    let base = case.base.as_ref().map(|base| base.child());
    opening.with_data_file(data).finish(base).await
}

impl Runner {
    /// A new image.
    pub async fn create(case: &Case) -> Result<Runner, Problem> {
        let (disk, options) = match case.has_data_file() {
            true => (Memory::pair(), case.options()),
            false => (Memory::new(0), case.options()),
        };
        let created = match disk.second() {
            Some(data) => create_with_data_file(&disk.child(), &data.child(), &options).await,
            None => create(&disk.child(), &options).await,
        };
        created.map_err(|error| format!("create: {error}"))?;
        if disk.size() < case.file_size {
            disk.resize(case.file_size, Preallocation::Off)
                .await
                .map_err(|error| format!("resize of the file: {error}"))?;
        }
        let world = World {
            snapshots: Vec::new(),
            active: Arc::new(case.empty()),
        };
        Runner::resume(&disk, case, world, 1).await
    }

    /// An image that exists and holds `world`. Stamps count from `next_stamp` on.
    pub async fn resume(
        disk: &Arc<Memory>,
        case: &Case,
        world: World,
        next_stamp: u32,
    ) -> Result<Runner, Problem> {
        let driver = open(disk, case)
            .await
            .map_err(|error| format!("open: {error}"))?;
        Ok(Runner {
            disk: disk.clone(),
            driver,
            case: case.clone(),
            world,
            moments: Vec::new(),
            next_stamp,
        })
    }

    /// The image is closed, gets what another program has left in it, if it has room for that, and is opened again.
    pub async fn get_what_others_left(&mut self) -> Result<(), Problem> {
        let change = match (self.case.bitmaps, self.case.old_snapshots) {
            (true, _) => with_bitmaps,
            (_, true) => with_old_snapshots,
            _ => return Ok(()),
        };
        self.close().await?;
        if let Some(bytes) = change(&self.disk.content())? {
            self.disk = Memory::with_content(&bytes);
        }
        self.driver = open(&self.disk, &self.case).await.map_err(text)?;
        Ok(())
    }

    /// The next stamp that nothing has been written with.
    pub fn next_stamp(&self) -> u32 {
        self.next_stamp
    }

    /// From here on everything is logged, and the present world is the first moment. Answers the disk as it is.
    pub fn start_log(&mut self) -> Arc<Memory> {
        let base = self.disk.fork();
        self.disk.start_log();
        self.moments = vec![Moment::start(&self.world)];
        base
    }

    /// Does one operation.
    pub async fn step(&mut self, op: &Op) -> Result<(), Problem> {
        let begun = self.disk.log_len();
        if let Op::Ahead { steps, ops, end } = op {
            let done = Box::pin(self.ahead(steps, ops, *end)).await;
            return done.map_err(|problem| format!("{op:?}: {problem}"));
        }
        let done = self.execute(op).await;
        let done = done.map_err(|problem| format!("{op:?}: {problem}"))?;
        self.moments.push(Moment {
            op: format!("{op:?}"),
            begun,
            answered: self.disk.log_len(),
            durable: done.durable,
            kind: done.kind,
            after: self.world.clone(),
            passing: done.passing,
            through: done.through,
            forced: done.forced,
        });
        Ok(())
    }

    /// Closes the image in order.
    pub async fn close(&self) -> Result<(), Problem> {
        let closed = self.driver.close().await;
        closed.map_err(|error| format!("close: {error}"))
    }

    /// The driver's own view of the disk, where the script writes.
    pub async fn read_windows(&self) -> Result<Vec<(u64, Vec<u8>)>, Problem> {
        let mut read = Vec::new();
        for window in &self.case.windows {
            let end = window.end.min(self.driver.size());
            if window.start >= end {
                continue;
            }
            let data = self.driver.read(window.start, end - window.start).await;
            let data = data.map_err(|error| format!("read: {error}"))?;
            read.push((window.start, data.to_bytes().to_vec()));
        }
        Ok(read)
    }

    /// A range cut to the disk's present size.
    fn cut(&self, at: u64, len: u64) -> (u64, u64) {
        let size = self.driver.size();
        let at = if at < size { at } else { at % size };
        (at, len.min(size - at))
    }

    fn stamp(&mut self, at: u64, len: u64) -> Vec<u8> {
        self.next_stamp += 1;
        stamp(at, len, self.next_stamp - 1)
    }

    fn active(&mut self) -> &mut Content {
        Arc::make_mut(&mut self.world.active)
    }

    async fn execute(&mut self, op: &Op) -> Result<Done, Problem> {
        match op {
            Op::Write { at, len, fua } => self.write(*at, *len, *fua).await,
            Op::Compress { at } => self.compress(*at).await,
            Op::Zero { at, len, unmap } => self.zero(*at, *len, *unmap).await,
            Op::Discard { at, len } => self.discard(*at, *len).await,
            Op::Flush => {
                self.driver.flush().await.map_err(text)?;
                Ok(Done::sectors(true))
            }
            Op::Create => self.create_snapshot().await,
            Op::Delete(nth) => self.delete_snapshot(*nth).await,
            Op::Change(steps, end) => self.change(steps, *end).await,
            Op::LetGo { steps, ops, end } => self.let_go(steps, ops, *end).await,
            Op::Ahead { .. } => Err("several operations cannot be part of one".to_owned()),
            Op::Resize(size) => self.resize(*size).await,
            Op::Reopen => {
                self.close().await?;
                self.driver = open(&self.disk, &self.case).await.map_err(text)?;
                Ok(Done::sectors(true))
            }
            Op::Together {
                ops,
                snapshot,
                seed,
            } => self.together(ops, *snapshot, *seed).await,
            Op::Amend(amendment) => self.amend(*amendment).await,
            Op::Idle(millis) => {
                tokio::time::sleep(Duration::from_millis(*millis)).await;
                Ok(Done::sectors(false))
            }
        }
    }

    async fn write(&mut self, at: u64, len: u64, fua: bool) -> Result<Done, Problem> {
        let (at, len) = self.cut(at, len);
        let bytes = self.stamp(at, len);
        let data = bytes.clone().into();
        let cluster = self.case.cluster_size();
        let written = match !fua && (at / cluster).is_multiple_of(2) {
            true => self.driver.write_pieces(pieces(at, data, cluster)).await,
            false => self.driver.write(at, data, WriteFlags::fua(fua)).await,
        };
        written.map_err(text)?;
        self.active().write(at, &bytes);
        Ok(Done::sectors(fua))
    }

    async fn compress(&mut self, at: u64) -> Result<Done, Problem> {
        let cluster = self.case.cluster_size();
        let (at, _) = self.cut(at, cluster);
        let at = at & !(cluster - 1);
        let (at, len) = self.cut(at, cluster);
        let bytes = self.stamp(at, len);
        let written = self.driver.write_compressed(at, bytes.clone().into()).await;
        written.map_err(text)?;
        self.active().write(at, &bytes);
        Ok(Done::sectors(false))
    }

    async fn zero(&mut self, at: u64, len: u64, may_unmap: bool) -> Result<Done, Problem> {
        let (at, len) = self.cut(at, len);
        let flags = ZeroFlags {
            may_unmap,
            ..ZeroFlags::default()
        };
        let zeroed = self.driver.write_zeroes(at, len, flags).await;
        zeroed.map_err(text)?;
        self.active().zero(at, len);
        Ok(Done::sectors(false))
    }

    /// A discarded sector may keep its bytes or lose them.
    async fn discard(&mut self, at: u64, len: u64) -> Result<Done, Problem> {
        let (at, len) = self.cut(at, len);
        self.driver.discard(at, len).await.map_err(text)?;
        let mut discarded = (*self.world.active).clone();
        discarded.zero(at, len);
        let versions = Versions::new([&*self.world.active, &discarded]);
        let from = at / SECTOR * SECTOR;
        let end = (at + len).next_multiple_of(SECTOR).min(self.driver.size());
        let data = self.driver.read(from, end - from).await.map_err(text)?;
        self.active().write(from, &data.to_bytes());
        match versions.violation(&self.world.active) {
            Some(problem) => Err(problem),
            None => Ok(Done::sectors(false)),
        }
    }

    fn named(&mut self) -> NewSnapshot {
        self.next_stamp += 1;
        NewSnapshot {
            name: format!("s{}", self.next_stamp - 1),
            date_sec: 1_700_000_000,
            date_nsec: 0,
            vm_clock_nsec: 0,
        }
    }

    fn add_snapshot(world: &mut World, info: SnapshotInfo) {
        world.snapshots.push(Snapshot {
            id: info.id,
            name: info.name,
            content: world.active.clone(),
        });
    }

    async fn create_snapshot(&mut self) -> Result<Done, Problem> {
        let new = self.named();
        match self.driver.create(new).await {
            Ok(info) => Runner::add_snapshot(&mut self.world, info),
            Err(error) => return self.refused(&error),
        }
        self.compare_list()?;
        Ok(Done::structure())
    }

    async fn delete_snapshot(&mut self, nth: usize) -> Result<Done, Problem> {
        let Some(index) = index_of(&self.world, nth) else {
            return Ok(Done::nothing());
        };
        let which = selector(&self.world.snapshots[index]);
        self.driver.delete(which).await.map_err(text)?;
        self.world.snapshots.remove(index);
        self.compare_list()?;
        Ok(Done::structure())
    }

    async fn change(&mut self, steps: &[Step], end: End) -> Result<Done, Problem> {
        let driver = self.driver.clone();
        let mut change = match driver.change().await {
            Ok(change) => change,
            Err(error) => return self.refused(&error),
        };
        let (world, kind) = self.stage(&mut *change, steps).await?;
        if end == End::Drop {
            drop(change);
            self.compare_list()?;
            return Ok(Done::nothing());
        }
        match async {
            change.prepare().await?;
            change.commit().await
        }
        .await
        {
            Err(error) => {
                drop(change);
                return self.refused(&error);
            }
            Ok(()) if end == End::RollBack => change.roll_back().await.map_err(text)?,
            Ok(()) => drop(change.finish()),
        }
        let passing = match end {
            End::RollBack => Some(world),
            _ => {
                self.world = world;
                None
            }
        };
        self.compare_list()?;
        Ok(Done {
            kind,
            passing,
            ..Done::structure()
        })
    }

    /// Does the steps of a change; answers what the world will be.
    pub(super) async fn stage(
        &mut self,
        change: &mut dyn SnapshotChange,
        steps: &[Step],
    ) -> Result<(World, Kind), Problem> {
        let mut world = self.world.clone();
        let mut kind = Kind::Structure;
        for step in steps {
            let result = match *step {
                Step::Create => {
                    let created = change.create(self.named()).await;
                    created.map(|info| Runner::add_snapshot(&mut world, info))
                }
                Step::Delete(nth) => match index_of(&world, nth) {
                    None => Ok(()),
                    Some(index) => {
                        let deleted = change.delete(selector(&world.snapshots[index])).await;
                        deleted.map(|_| drop(world.snapshots.remove(index)))
                    }
                },
                Step::Revert(nth) => match index_of(&world, nth) {
                    None => Ok(()),
                    Some(index) => {
                        let reverted = change.revert(selector(&world.snapshots[index])).await;
                        reverted.map(|_| {
                            kind = Kind::Everything;
                            world.active = world.snapshots[index].content.clone();
                        })
                    }
                },
            };
            if let Err(error) = result {
                self.refused(&error)?;
            }
        }
        Ok((world, kind))
    }

    async fn resize(&mut self, size: u64) -> Result<Done, Problem> {
        let same = size == self.driver.size();
        match self.driver.resize(size, Preallocation::Off).await {
            Ok(()) => self.active().resize(size),
            Err(error) => return self.refused(&error),
        }
        match self.driver.size() == self.world.active.size() {
            true if same => Ok(Done::nothing()),
            true => Ok(Done::structure()),
            false => Err(format!("the size is {}", self.driver.size())),
        }
    }

    /// The format changes and nothing that the image holds. What version 2 has no place for is refused.
    async fn amend(&mut self, amendment: Amendment) -> Result<Done, Problem> {
        let mut options = AmendOptions::default();
        match amendment {
            Amendment::Upgrade => options.compat = Some(driver::Compat::V1_1),
            Amendment::LazyRefcounts(on) => options.lazy_refcounts = Some(on),
            Amendment::Backing(name) => {
                options.backing = Some(BackingFile {
                    name: Some(name.name()),
                    format: Some("raw".to_owned()),
                });
            }
        }
        let refused = [ErrorKind::InvalidInput, ErrorKind::Unsupported];
        match self.driver.amend(options).await {
            Ok(()) => Ok(Done::sectors(false)),
            Err(error) if refused.contains(&error.kind()) => Ok(Done::nothing()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// What an image of this kind cannot do may be refused, and then nothing has happened.
    fn refused(&self, error: &Error) -> Result<Done, Problem> {
        let kind = error.kind();
        if kind != ErrorKind::Unsupported && kind != ErrorKind::OutOfRange {
            return Err(error.to_string());
        }
        if self.driver.size() != self.world.active.size() {
            return Err(format!("refused, but the size is {}", self.driver.size()));
        }
        self.compare_list()?;
        Ok(Done::nothing())
    }

    fn compare_list(&self) -> Result<(), Problem> {
        let is: Vec<String> = self.driver.list().into_iter().map(|info| info.id).collect();
        let wanted: Vec<&String> = self.world.snapshots.iter().map(|s| &s.id).collect();
        match is.iter().eq(wanted.iter().copied()) {
            true => Ok(()),
            false => Err(format!("snapshots {is:?} instead of {wanted:?}")),
        }
    }
}

fn index_of(world: &World, nth: usize) -> Option<usize> {
    nth.checked_rem(world.snapshots.len())
}

fn selector(snapshot: &Snapshot) -> SnapshotSelector {
    SnapshotSelector {
        id: Some(snapshot.id.clone()),
        name: Some(snapshot.name.clone()),
    }
}

fn text(error: Error) -> Problem {
    error.to_string()
}

/// A write cut at the borders of clusters.
fn pieces(mut at: u64, mut data: Data, cluster: u64) -> Vec<(u64, Data)> {
    let mut pieces = Vec::new();
    while !data.is_empty() {
        let len = data.len().min(cluster - at % cluster);
        pieces.push((at, data.split_to(len)));
        at += len;
    }
    pieces
}
