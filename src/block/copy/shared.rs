//! What guests' requests and workers have in common.

use std::collections::VecDeque;
use std::ops::Range;
use std::pin::pin;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::in_place::InPlace;
use super::learnt::Learnt;
use super::map::{Claim, Map};
use super::relief::Relief;
use super::{CopyOptions, Progress, Source};
use crate::driver::Requests;
use crate::error::{Error, Result};
use crate::io::Data;
use crate::limits::{COPY_BACKGROUND_BYTES, COPY_CHUNK};

/// The unit in which memory is counted, so that all of it fits into a semaphore's number.
const ROOM: u64 = 4096;

/// More than any host has; less than a semaphore can count.
const MOST_ROOM: u64 = 1 << 40;

/// How guests' requests are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Mode {
    /// They pass: the copy has not begun, or is over, or reads from a snapshot.
    Passing,
    /// Old content is copied before they change it.
    Copying,
    /// A snapshot keeps what is old, but nobody can read it yet: guests are treated as in `Switching`, and nobody else may begin to look
    /// at the disk.
    Taken,
    /// A snapshot has been taken: they wait for the last looks at the disk itself, and copy nothing.
    Switching,
}

/// Old content on its way to the target, after a guest was let go.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) offset: u64,
    pub(super) data: Data,
    /// Its share of the guests' memory.
    pub(super) _room: OwnedSemaphorePermit,
}

/// The state of one copy.
pub(super) struct Shared {
    pub(super) options: CopyOptions,
    pub(super) source: Source,
    pub(super) target: Arc<dyn Requests>,
    pub(super) map: Arc<Map>,
    /// Zeroes are looked for in pieces of this many bytes, a power of two.
    pub(super) unit: u64,
    pub(super) in_place: InPlace,
    pub(super) learnt: Learnt,
    pub(super) relief: Relief,
    /// Where the content at the point in time is read: the source, or its snapshot.
    reader: RwLock<Arc<dyn Requests>>,
    mode: AtomicU8,
    /// Told when the mode, the failure or the trouble changes.
    pub(super) changed: Notify,
    /// What a guest copies at once, in bytes.
    pub(super) guest_chunk: u64,
    /// Free memory for guests' old content, in units of `ROOM`.
    room: Arc<Semaphore>,
    memory: u64,
    kept: Mutex<VecDeque<Kept>>,
    /// Told when something is kept.
    pub(super) keeping: Notify,
    /// Bytes of `Kept` that the target does not have yet, queued or under way.
    unwritten: AtomicU64,
    failure: Mutex<Option<Error>>,
    /// The target's last error, until it has taken something again.
    trouble: Mutex<Option<Error>>,
    done: AtomicU64,
    dropped: AtomicU64,
}

/// What may be shared: the copy's own requests are no larger than the client wants, in memory or out of it.
fn in_place(options: &CopyOptions, cluster: u64) -> InPlace {
    let most = match options.max_chunk {
        0 => COPY_BACKGROUND_BYTES,
        most => most.min(COPY_BACKGROUND_BYTES),
    };
    let most = (most / cluster * cluster).max(cluster);
    let least = COPY_CHUNK.clamp(cluster, most);
    InPlace::new(options.share && !options.compress, least, most)
}

impl Shared {
    pub(super) fn new(
        options: CopyOptions,
        source: Source,
        target: Arc<dyn Requests>,
        map: Arc<Map>,
        unit: u64,
    ) -> Self {
        let in_place = in_place(&options, map.cluster_size());
        // A format knows by itself where its file grows.
        let learnt = Learnt::new(options.target_cluster.is_none() && !options.compress);
        let memory = options.guest_memory.clamp(map.cluster_size(), MOST_ROOM);
        Shared {
            guest_chunk: COPY_CHUNK.min(memory),
            room: Arc::new(Semaphore::new(memory.div_ceil(ROOM) as usize)),
            memory,
            reader: RwLock::new(source.disk.clone()),
            options,
            source,
            target,
            map,
            unit,
            in_place,
            learnt,
            relief: Relief::default(),
            mode: AtomicU8::new(Mode::Passing as u8),
            changed: Notify::new(),
            kept: Mutex::default(),
            keeping: Notify::new(),
            unwritten: AtomicU64::new(0),
            failure: Mutex::default(),
            trouble: Mutex::default(),
            done: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        }
    }

    pub(super) fn mode(&self) -> Mode {
        match self.mode.load(Ordering::Acquire) {
            mode if mode == Mode::Copying as u8 => Mode::Copying,
            mode if mode == Mode::Taken as u8 => Mode::Taken,
            mode if mode == Mode::Switching as u8 => Mode::Switching,
            _ => Mode::Passing,
        }
    }

    pub(super) fn set_mode(&self, mode: Mode) {
        self.mode.store(mode as u8, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// Goes from one mode to another, unless the copy is over meanwhile.
    pub(super) fn advance(&self, from: Mode, to: Mode) {
        let (from, to) = (from as u8, to as u8);
        let advanced = self
            .mode
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
        if advanced.is_ok() {
            self.changed.notify_waiters();
            // Guests look at claims and at the mode.
            self.map.look_again();
        }
    }

    /// Waits until what is pending can be read, at the disk or in the snapshot.
    pub(super) async fn readable(&self) {
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.mode() != Mode::Taken {
                return;
            }
            changed.await;
        }
    }

    /// The first pending run in these bytes, at most `most` of them, as something that can be read now.
    pub(super) async fn claim(&self, bytes: Range<u64>, most: u64) -> Option<Claim> {
        loop {
            self.readable().await;
            let claim = self.map.claim(bytes.clone(), most)?;
            // A guest that has passed since then has changed what was not claimed.
            if self.mode() != Mode::Taken {
                return Some(claim);
            }
        }
    }

    /// The copy is over: guests pass, and what was kept for the target is dropped.
    pub(super) fn let_pass(&self) {
        self.set_mode(Mode::Passing);
        let dropped = std::mem::take(&mut *self.kept());
        let bytes = dropped.iter().map(|kept| kept.data.len()).sum();
        self.unwritten.fetch_sub(bytes, Ordering::AcqRel);
    }

    /// Where to read what has been claimed; asked for after claiming it.
    pub(super) fn reader(&self) -> Arc<dyn Requests> {
        let reader = self.reader.read().unwrap_or_else(PoisonError::into_inner);
        reader.clone()
    }

    pub(super) fn set_reader(&self, reader: Arc<dyn Requests>) {
        *self.reader.write().unwrap_or_else(PoisonError::into_inner) = reader;
    }

    /// Memory for `bytes` bytes of old content, if there is some.
    pub(super) fn try_room(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let room = self.room.clone();
        room.try_acquire_many_owned(rooms(bytes)).ok()
    }

    /// The same, waiting. Cancellation: safe.
    pub(super) async fn wait_room(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let room = self.room.clone();
        room.acquire_many_owned(rooms(bytes)).await.ok()
    }

    /// Whether guests' old content fills more than half of its memory: they come first then.
    pub(super) fn is_crowded(&self) -> bool {
        self.unwritten.load(Ordering::Acquire) > self.memory / 2
    }

    /// Leaves old content for the target.
    pub(super) fn keep(&self, kept: Kept) {
        self.unwritten.fetch_add(kept.data.len(), Ordering::AcqRel);
        self.kept().push_back(kept);
        self.keeping.notify_one();
        if self.is_crowded() {
            self.relief.wanted();
        }
    }

    pub(super) fn next_kept(&self) -> Option<Kept> {
        self.kept().pop_front()
    }

    /// The target has one that was kept.
    pub(super) fn kept_is_written(&self, bytes: u64) {
        self.unwritten.fetch_sub(bytes, Ordering::AcqRel);
        self.changed.notify_waiters();
    }

    /// Whether the target has everything that was kept.
    pub(super) fn is_written(&self) -> bool {
        self.unwritten.load(Ordering::Acquire) == 0
    }

    /// The copy cannot be completed. Guests pass from now on.
    pub(super) fn fail(&self, error: Error) {
        self.failure().get_or_insert(error);
        self.let_pass();
    }

    /// The error that the copy has failed with.
    pub(super) fn check(&self) -> Result<()> {
        self.failure().clone().map_or(Ok(()), Err)
    }

    /// Notes what the target answers to writes.
    pub(super) fn note_target(&self, result: &Result<()>) {
        let mut trouble = self.trouble();
        if trouble.is_some() || result.is_err() {
            *trouble = result.clone().err();
            drop(trouble);
            self.changed.notify_waiters();
        }
    }

    /// The error that the target has answered last, if it has not taken anything since.
    pub(super) fn target_trouble(&self) -> Option<Error> {
        self.trouble().clone()
    }

    /// Bytes of the disk that the target has got.
    pub(super) fn add_done(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes of the disk that need no copy.
    pub(super) fn add_dropped(&self, bytes: u64) {
        self.dropped.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn progress(&self) -> Progress {
        Progress {
            done: self.done.load(Ordering::Relaxed),
            total: self.map.size() - self.dropped.load(Ordering::Relaxed),
        }
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failure(&self) -> MutexGuard<'_, Option<Error>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn trouble(&self) -> MutexGuard<'_, Option<Error>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn rooms(bytes: u64) -> u32 {
    bytes.div_ceil(ROOM) as u32
}
