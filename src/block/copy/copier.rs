//! A copy: its life, and the workers that go through the disk.

use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::before::BeforeChange;
use super::crew::Crew;
use super::learnt::Holes;
use super::map::{Claim, Map};
use super::plan::{AtOnce, Content, Piece, Plan};
use super::shared::{Kept, Mode, Shared};
use super::{CopyHooks, CopyOptions, OnCopyError, PointInTime, Progress, Side, Source, SyncMode};
use crate::driver::Requests;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{BriefMutex, Data, Segment};
use crate::limits::{
    COPY_BACKGROUND_BYTES, COPY_CHUNK, COPY_CLUSTER, COPY_FLUSH_BYTES, COPY_MAX_CLUSTER,
    COPY_QUICK_CHUNK, COPY_QUICK_PIECES, COPY_RETRY_PAUSE,
};

/// A copy of a disk.
///
/// ```text
/// new ──> activate (guests stand still) ──> run, to its end or dropped ──> close
/// ```
pub struct Copier {
    shared: Arc<Shared>,
}

impl Copier {
    /// Prepares a copy; nothing happens before `activate`.
    ///
    /// `InvalidInput` for options that contradict each other, and a target that is smaller than the source. `Unsupported`
    /// when an internal snapshot is asked for and the source cannot take one.
    pub fn new(source: Source, target: Arc<dyn Requests>, options: CopyOptions) -> Result<Self> {
        let cluster = cluster_size(&options)?;
        if options.max_workers == 0 {
            return Err(invalid("A copy needs at least one worker"));
        }
        let size = source.disk.size();
        if target.size() < size {
            return Err(invalid(format!(
                "A target of {} bytes is too small for a source of {size}",
                target.size()
            )));
        }
        let unit = options.target_cluster.unwrap_or(0).max(COPY_CLUSTER);
        let map = Map::new(size, cluster.trailing_zeros());
        let shared = Shared::new(options, source, target, map, unit);
        if shared.options.point_in_time == PointInTime::InternalSnapshot {
            if shared.options.sync == SyncMode::None {
                return Err(invalid(
                    "A copy of what guests change cannot read from a snapshot",
                ));
            }
            shared.check_snapshots()?;
        }
        Ok(Copier {
            shared: Arc::new(shared),
        })
    }

    /// What the filter above the source needs.
    pub fn before_change(&self) -> BeforeChange {
        BeforeChange {
            shared: self.shared.clone(),
        }
    }

    /// The unit of the copy in bytes: guests' requests are widened to it.
    pub fn cluster_size(&self) -> u64 {
        self.shared.map.cluster_size()
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.shared.progress()
    }

    /// This moment is the point in time. No request to the source may be under way, and none may pass by the filter later.
    ///
    /// `InvalidInput` when the source has changed its size since `new`; nothing has happened then.
    pub fn activate(&self) -> Result<()> {
        let (prepared, now) = (self.shared.map.size(), self.shared.source.disk.size());
        if prepared != now {
            return Err(invalid(format!(
                "The source has changed its size from {prepared} to {now} bytes"
            )));
        }
        self.shared.set_mode(Mode::Copying);
        Ok(())
    }

    /// Copies until the target has everything, durably; with [`SyncMode::None`], until it is dropped. Once at most.
    ///
    /// Errors: what `hooks` did not want to be tried again, and what broke the copy in front of a guest's change. Guests pass when it
    /// has answered. Cancellation: safe, guests pass from then on. Requests to the target may still be under way: whoever
    /// closes it waits for them. In any case `close` follows.
    pub async fn run(&self, hooks: Arc<dyn CopyHooks>) -> Result<()> {
        let _over = LetPass(&self.shared);
        let chunk = chunk(&self.shared.options, self.cluster_size());
        let fitting = (COPY_BACKGROUND_BYTES / chunk).max(1) as usize;
        let most = fitting.min(self.shared.options.max_workers as usize);
        let run = Run {
            shared: self.shared.clone(),
            plan: Arc::default(),
            hooks,
            crew: Arc::new(Crew::new(most)),
            chunk,
            unflushed: Arc::default(),
            flush_due: Arc::default(),
        };
        let result = run.run().await;
        result.and(self.shared.check())
    }

    /// Lets guests pass, and deletes the temporary snapshot. Follows `run`, and a copy that never ran. A second call does
    /// nothing.
    pub async fn close(&self) -> Result<()> {
        self.shared.let_pass();
        self.shared.remove_snapshot().await
    }
}

/// Guests pass when the copy is over, whatever its end.
struct LetPass<'a>(&'a Shared);

impl Drop for LetPass<'_> {
    fn drop(&mut self) {
        self.0.let_pass();
    }
}

/// The copy's cluster size in bytes, which QEMU finds in the same way.
fn cluster_size(options: &CopyOptions) -> Result<u64> {
    let least = options.min_cluster_size;
    if least != 0 && !least.is_power_of_two() {
        return Err(invalid("min-cluster-size needs to be a power of 2"));
    }
    let target = options.target_cluster.unwrap_or(0);
    let cluster = least.max(target).max(COPY_CLUSTER);
    if cluster > COPY_MAX_CLUSTER || !cluster.is_power_of_two() {
        return Err(invalid(format!(
            "A copy cannot have clusters of {cluster} bytes; {COPY_MAX_CLUSTER} is the most"
        )));
    }
    Ok(cluster)
}

/// Bytes per request: whole clusters.
fn chunk(options: &CopyOptions, cluster: u64) -> u64 {
    let asked = match options.max_chunk {
        0 => COPY_CHUNK,
        asked => asked.min(COPY_BACKGROUND_BYTES),
    };
    (asked / cluster * cluster).max(cluster)
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

/// A copy that runs; what its tasks share.
#[derive(Clone)]
struct Run {
    shared: Arc<Shared>,
    plan: Arc<BriefMutex<Plan>>,
    hooks: Arc<dyn CopyHooks>,
    crew: Arc<Crew>,
    /// Bytes per request.
    chunk: u64,
    /// Bytes that the target was given.
    unflushed: Arc<AtomicU64>,
    flush_due: Arc<Notify>,
}

/// Why a worker has ended.
enum Shift {
    /// Nothing is left to do.
    Done,
    /// Fewer are wanted.
    Left,
}

impl Run {
    async fn run(self) -> Result<()> {
        // Tasks end with the set, and the set with this.
        let mut helpers = JoinSet::new();
        let run = self.clone();
        helpers.spawn(async move { run.take_kept().await });
        let run = self.clone();
        helpers.spawn(async move { run.flush_when_due().await });
        let run = self.clone();
        helpers.spawn(async move {
            if let Err(error) = run.shared.relieve().await {
                run.shared.fail(error);
            }
            pending().await
        });
        match self.shared.options.sync {
            SyncMode::None => self.watch_guests().await,
            SyncMode::Full => {}
            SyncMode::Top => {
                self.retried(None, Side::Source, || self.shared.drop_unallocated())
                    .await
            }
        }
        self.copy_all().await;
        self.all_kept_is_written().await;
        self.shared.check()?;
        if !self.shared.map.is_done() {
            return Err(Error::new(ErrorKind::Io, "A worker of the copy has died"));
        }
        self.retried(None, Side::Target, || self.shared.target.flush())
            .await;
        self.shared.check()
    }

    /// Does something until it succeeds, or the copy has failed with its error. A worker has a turn.
    async fn retried<F>(&self, mut turn: Option<&mut Turn<'_>>, side: Side, action: impl Fn() -> F)
    where
        F: Future<Output = Result<()>>,
    {
        while self.shared.check().is_ok() {
            let result = action().await;
            if side == Side::Target {
                self.shared.note_target(&result);
            }
            match result {
                Ok(()) => return,
                Err(error) => self.on_error(turn.as_deref_mut(), side, error).await,
            }
        }
    }

    /// Asks what to do, and does it: afterwards it is tried again, or the copy has failed.
    async fn on_error(&self, mut turn: Option<&mut Turn<'_>>, side: Side, error: Error) {
        if let Some(turn) = turn.as_deref_mut() {
            turn.rest();
        }
        match self.hooks.on_error(side, &error).await {
            OnCopyError::Retry => {}
            OnCopyError::Ignore => tokio::time::sleep(COPY_RETRY_PAUSE).await,
            OnCopyError::Fail => {
                self.shared.fail(error);
                return;
            }
        }
        if let Some(turn) = turn {
            turn.work(0).await;
        }
    }

    async fn copy_all(&self) {
        let mut workers = JoinSet::new();
        let mut ended = false;
        loop {
            while !ended && self.crew.join() {
                let (run, seat) = (self.clone(), self.hooks.seat());
                let thread = seat
                    .as_ref()
                    .map_or_else(Handle::current, |seat| seat.handle().clone());
                let work = async move {
                    let _seat = seat;
                    run.work().await
                };
                workers.spawn_on(work, &thread);
            }
            tokio::select! {
                worker = workers.join_next() => match worker {
                    Some(worker) => ended |= matches!(worker, Ok(Shift::Done)),
                    None => return,
                },
                () = self.crew.changed(), if !ended => {}
            }
        }
    }

    async fn work(&self) -> Shift {
        loop {
            let pieces = {
                let mut plan = self.plan.lock().await;
                let at_once = self.at_once();
                self.shared.next_pieces(&mut plan, at_once).await
            };
            if pieces.is_empty() {
                return Shift::Done;
            }
            self.copy(pieces).await;
            if self.crew.leave() {
                return Shift::Left;
            }
        }
    }

    async fn copy(&self, pieces: Vec<Piece>) {
        let mut turn = Turn::new(&*self.hooks);
        turn.work(pieces.iter().map(|piece| piece.data).sum()).await;
        for piece in pieces {
            if self.shared.check().is_err() {
                return;
            }
            // While the copy is paused guests' old content may take as long as that: nobody is at work who waits for it.
            while self.is_behind() {
                turn.rest();
                self.after_guests().await;
                turn.work(0).await;
            }
            match piece.content {
                Content::Zero => self.copy_zeroes(&mut turn, piece).await,
                Content::Data | Content::Mixed => self.copy_data(&mut turn, piece).await,
            }
        }
        self.hooks.progress(self.shared.progress());
    }

    /// What a worker takes on at once as long as it is as it is.
    fn at_once(&self) -> AtOnce {
        let cluster = self.shared.map.cluster_size();
        if let Some(bytes) = self.shared.in_place.piece() {
            return AtOnce {
                bytes,
                data: bytes,
                stretch: bytes,
                pieces: COPY_QUICK_PIECES,
            };
        }
        match self.crew.is_quick() {
            true => AtOnce {
                bytes: self.chunk.min(COPY_QUICK_CHUNK.max(cluster)),
                data: self.chunk,
                stretch: self.stretch(),
                pieces: COPY_QUICK_PIECES,
            },
            false => AtOnce {
                bytes: self.chunk,
                data: self.chunk,
                stretch: self.chunk,
                pieces: 1,
            },
        }
    }

    /// How much of a scattered disk is read at once: a request, if the client says how much that is.
    fn stretch(&self) -> u64 {
        match self.shared.options.max_chunk {
            0 => self.shared.learnt.stretch(self.chunk),
            _ => self.chunk,
        }
    }

    /// Old content of guests goes first when there is much of it.
    fn is_behind(&self) -> bool {
        self.shared.is_crowded() && self.shared.check().is_ok()
    }

    async fn after_guests(&self) {
        loop {
            let mut changed = pin!(self.shared.changed.notified());
            changed.as_mut().enable();
            if !self.is_behind() {
                return;
            }
            changed.await;
        }
    }

    async fn copy_zeroes(&self, turn: &mut Turn<'_>, piece: Piece) {
        while let Some(claim) = self.shared.map.claim(piece.bytes.clone(), u64::MAX) {
            let (offset, len) = (claim.offset(), claim.len());
            // There is nothing to read: guests need not wait for the target.
            claim.taken();
            let put = || self.shared.put_zeroes(offset, len);
            self.retried(Some(&mut *turn), Side::Target, put).await;
            if self.shared.check().is_err() {
                return;
            }
            self.shared.add_done(len);
        }
    }

    async fn copy_data(&self, turn: &mut Turn<'_>, piece: Piece) {
        let mut at_once = self.shared.in_place.piece();
        let mut admitted = piece.data;
        loop {
            let most = match piece.content {
                Content::Mixed => piece.bytes.end - piece.bytes.start,
                Content::Data | Content::Zero => at_once.unwrap_or(self.chunk),
            };
            let Some(claim) = self.shared.claim(piece.bytes.clone(), most).await else {
                return;
            };
            if at_once.is_some() {
                if !self.share(claim).await {
                    // It is pending again: guests shall not wait until so much has been read.
                    at_once = None;
                }
                continue;
            }
            let offset = claim.offset();
            let Some(data) = self.read(turn, claim).await else {
                return;
            };
            if piece.content == Content::Mixed {
                self.note_holes(&piece, offset, &data);
                self.admit_more(turn, &mut admitted, &data).await;
            }
            let ahead = piece.room.saturating_sub(offset + data.len());
            self.write(Some(&mut *turn), offset, data, ahead).await;
            if self.shared.check().is_err() {
                return;
            }
        }
    }

    /// Whether the hole behind the data of a mixed piece was read as a hole.
    fn note_holes(&self, piece: &Piece, offset: u64, data: &Data) {
        let unit = self.shared.unit;
        if piece.data == 0 || offset != piece.bytes.start || data.len() < piece.data + unit {
            return;
        }
        let behind = data.slice(piece.data, unit);
        if behind.is_known_zero() {
            self.shared.learnt.set_holes(Holes::Kept);
        } else if behind.reads_as_zeroes() {
            self.shared.learnt.set_holes(Holes::Lost);
        }
    }

    /// Learns how far apart data are. What was read from a mixed piece may be more data than the worker was let begin with.
    async fn admit_more(&self, turn: &mut Turn<'_>, admitted: &mut u64, data: &Data) {
        let bytes = |segment: &Segment| match segment {
            Segment::Bytes(bytes) => bytes.len() as u64,
            Segment::Zeroes(_) => 0,
        };
        let found = data.segments().iter().map(bytes).sum::<u64>();
        self.shared.learnt.scattered(found, data.len(), self.chunk);
        if found > *admitted {
            turn.work(found - *admitted).await;
        }
        *admitted = admitted.saturating_sub(found);
    }

    /// Has the target share what is claimed, which is pending again if that is not possible.
    async fn share(&self, claim: Claim) -> bool {
        if !self.shared.share(&claim).await {
            return false;
        }
        let len = claim.len();
        claim.taken();
        self.shared.add_done(len);
        self.shared.flush_to_share().await;
        true
    }

    /// Reads what is claimed. After an error it is pending again, and comes up once more.
    async fn read(&self, turn: &mut Turn<'_>, claim: Claim) -> Option<Data> {
        let reader = self.shared.reader();
        match reader.read(claim.offset(), claim.len()).await {
            Ok(data) => {
                claim.taken();
                Some(data)
            }
            Err(error) => {
                drop(claim);
                self.on_error(Some(turn), Side::Source, error).await;
                None
            }
        }
    }

    async fn write(&self, turn: Option<&mut Turn<'_>>, offset: u64, data: Data, ahead: u64) {
        let len = data.len();
        let put = || self.shared.put(offset, data.clone(), ahead);
        let begun = Instant::now();
        self.retried(turn, Side::Target, put).await;
        self.crew.note(begun.elapsed());
        if self.shared.check().is_ok() {
            self.shared.add_done(len);
            self.flush_behind(len);
        }
    }

    /// Has what was written made durable every now and then, so that the end need not wait for all of it, and guests find the host's
    /// memory free. An error comes up again at the end.
    fn flush_behind(&self, bytes: u64) {
        let before = self.unflushed.fetch_add(bytes, Ordering::Relaxed);
        if before / COPY_FLUSH_BYTES != (before + bytes) / COPY_FLUSH_BYTES {
            self.flush_due.notify_one();
        }
    }

    async fn flush_when_due(&self) {
        loop {
            self.flush_due.notified().await;
            if let Err(error) = self.shared.target.flush().await {
                log::debug!("copy: {error}");
            }
        }
    }

    /// Gives the target what guests have left in memory. All at once: their memory bounds it. It goes on when the copy is paused.
    async fn take_kept(&self) {
        let mut writes = JoinSet::new();
        loop {
            while let Some(kept) = self.shared.next_kept() {
                let run = self.clone();
                writes.spawn(async move { run.write_kept(kept).await });
            }
            tokio::select! {
                () = self.shared.keeping.notified() => {}
                Some(_) = writes.join_next() => {}
            }
        }
    }

    async fn write_kept(&self, kept: Kept) {
        let bytes = kept.data.len();
        self.write(None, kept.offset, kept.data.clone(), 0).await;
        drop(kept);
        self.hooks.progress(self.shared.progress());
        self.shared.kept_is_written(bytes);
    }

    async fn all_kept_is_written(&self) {
        loop {
            let mut changed = pin!(self.shared.changed.notified());
            changed.as_mut().enable();
            if self.shared.is_written() || self.shared.check().is_err() {
                return;
            }
            changed.await;
        }
    }

    /// Tells of what guests have the target given, until the copy has failed.
    async fn watch_guests(&self) {
        loop {
            let mut changed = pin!(self.shared.changed.notified());
            changed.as_mut().enable();
            if self.shared.check().is_err() {
                return;
            }
            self.hooks.progress(self.shared.progress());
            changed.await;
        }
    }
}

/// A worker's, with the owner of the copy: at work only with its consent, and at rest while it is asked.
struct Turn<'a> {
    hooks: &'a dyn CopyHooks,
    is_at_work: bool,
}

impl<'a> Turn<'a> {
    fn new(hooks: &'a dyn CopyHooks) -> Self {
        Turn {
            hooks,
            is_at_work: false,
        }
    }

    /// Waits until the worker may go on with so many bytes more.
    async fn work(&mut self, bytes: u64) {
        self.rest();
        self.hooks.admit(bytes).await;
        self.is_at_work = true;
    }

    fn rest(&mut self) {
        if std::mem::take(&mut self.is_at_work) {
            self.hooks.finished();
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.rest();
    }
}
