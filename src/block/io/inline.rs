//! Short writes on the thread that asks for them, while the page cache takes them quickly.
//!
//! A buffered write is mostly a copy of memory: less than the hand-off to another thread, which takes two wake-ups.
//! But it may also sleep, when too much is dirty or the file system commits, and many file systems cannot tell before
//! (`RWF_NOWAIT`). So it is tried by threads only that may be held up ([`allow_inline_writes`]), and a file that has held
//! one up is left to the engine for a multiple of that time. How long a write may be, and what counts as slow, depends on what the
//! thread does.
//!
//! ```text
//!             slow, or slow for an unknown reason            took * INLINE_PAUSE_FACTOR
//!   inline ──────────────────────────────────────> paused ────────────────────────────> watched ──> inline
//!                                                     ^                                     │
//!                                                     └──────── slow, and it slept ─────────┘
//! ```
//! A thread that was only preempted looks slow too. While the file is watched its thread's switches are counted, which
//! tells the two apart; they are not counted always because that costs a system call per write.

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::sys;
use crate::limits::{
    INLINE_PAUSE_FACTOR, INLINE_WATCH, MAX_INLINE_COPY, MAX_INLINE_PAUSE, MAX_INLINE_WRITE,
    SLOW_INLINE_COPY, SLOW_INLINE_WRITE,
};

thread_local! {
    static THREAD: Cell<Option<InlineThread>> = const { Cell::new(None) };
}

/// What a thread does that may be held up by a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InlineThread {
    /// It serves guests.
    Guests,
    /// It moves much data, for nobody who waits for the single request: reading and writing in turn on one thread keeps them in the
    /// processor's cache.
    Copies,
}

impl InlineThread {
    /// The longest write in bytes.
    fn longest(self) -> u64 {
        match self {
            InlineThread::Guests => MAX_INLINE_WRITE,
            InlineThread::Copies => MAX_INLINE_COPY,
        }
    }

    /// A write that takes longer has waited for something.
    fn slow(self) -> Duration {
        match self {
            InlineThread::Guests => SLOW_INLINE_WRITE,
            InlineThread::Copies => SLOW_INLINE_COPY,
        }
    }

    /// Whether it writes although the engine is changing or syncing the file, and may have to wait for that.
    fn writes_beside_changes(self) -> bool {
        self == InlineThread::Copies
    }
}

/// Lets the calling thread run writes to the page cache itself, from now on: the kernel may hold it up in one, rarely and for a small
/// share of the time. Never for a thread that answers to control commands.
pub fn allow_inline_writes(thread: InlineThread) {
    THREAD.set(Some(thread));
}

/// Whether the calling thread may make short calls that mostly find what they need in memory, and otherwise wait for the disk.
pub(super) fn may_wait() -> bool {
    THREAD.get() == Some(InlineThread::Copies)
}

/// Whether the writes of one file are run inline.
#[derive(Debug)]
pub(crate) struct InlineWrites {
    /// Where the times below count from, in nanoseconds.
    epoch: Instant,
    /// Until then the file's writes go to the engine.
    paused_until: AtomicU64,
    /// Until then it is found out why a write is slow.
    watched_until: AtomicU64,
    /// Operations that the engine runs and that change or sync the file: they hold locks of the file system.
    changing: AtomicUsize,
}

/// An operation that changes or syncs the file is in the engine until this is dropped.
#[must_use]
pub(crate) struct Changing<'a>(&'a InlineWrites);

impl InlineWrites {
    pub(crate) fn new() -> Self {
        InlineWrites {
            epoch: Instant::now(),
            paused_until: AtomicU64::new(0),
            watched_until: AtomicU64::new(0),
            changing: AtomicUsize::new(0),
        }
    }

    /// Accounts for an operation in the engine that changes or syncs the file.
    pub(crate) fn changing(&self) -> Changing<'_> {
        self.changing.fetch_add(1, Ordering::Relaxed);
        Changing(self)
    }

    /// Runs a write here and now, if that is likely to be quick. Whole pages only: a part of one that is not in the
    /// page cache has to be read from the disk first.
    pub(crate) fn run<T>(
        &self,
        offset: u64,
        len: u64,
        write: impl FnOnce() -> io::Result<T>,
    ) -> Option<io::Result<T>> {
        let page = rustix::param::page_size() as u64;
        let thread = THREAD.get()?;
        let quick = len <= thread.longest()
            && (offset | len) & (page - 1) == 0
            && (thread.writes_beside_changes() || self.changing.load(Ordering::Relaxed) == 0);
        if !quick {
            return None;
        }
        let begun = Instant::now();
        let now = self.since_epoch(begun);
        if now < self.paused_until.load(Ordering::Relaxed) {
            return None;
        }
        let watched = now < self.watched_until.load(Ordering::Relaxed);
        let sleeps = watched.then(sys::sleeps_of_this_thread);
        let result = write();
        let took = begun.elapsed();
        if took > thread.slow() {
            let slept = sleeps.is_none_or(|before| sys::sleeps_of_this_thread() != before);
            self.slow(now, took, slept);
        }
        Some(result)
    }

    #[cold]
    fn slow(&self, begun: u64, took: Duration, slept: bool) {
        let pause = match slept {
            true => (took * INLINE_PAUSE_FACTOR).min(MAX_INLINE_PAUSE),
            false => Duration::ZERO,
        };
        let resume = begun + nanos(took + pause);
        self.paused_until.fetch_max(resume, Ordering::Relaxed);
        self.watched_until
            .fetch_max(resume + nanos(INLINE_WATCH), Ordering::Relaxed);
    }

    fn since_epoch(&self, time: Instant) -> u64 {
        nanos(time.saturating_duration_since(self.epoch))
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.changing.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Nanoseconds last for five centuries.
fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    const PAGE: u64 = 64 << 10;

    /// A write of this duration, and whether it was run inline.
    fn write(inline: &InlineWrites, time: Duration) -> bool {
        let sleep = || {
            thread::sleep(time);
            Ok(())
        };
        inline.run(0, PAGE, sleep).is_some()
    }

    /// On a thread of its own, as the permission stays with the thread.
    fn permitted(test: impl FnOnce() + Send + 'static) {
        let permitted = thread::spawn(|| {
            allow_inline_writes(InlineThread::Guests);
            test();
        });
        permitted.join().unwrap();
    }

    #[test]
    fn a_thread_writes_inline_only_when_it_has_been_allowed_to() {
        let quick = || InlineWrites::new().run(0, PAGE, || Ok(())).is_some();
        assert!(!quick());
        permitted(move || assert!(quick()));
        assert!(!quick(), "the permission is the other thread's");
    }

    #[test]
    fn what_may_wait_for_the_disk_or_for_a_lock_is_not_inline() {
        permitted(|| {
            let inline = InlineWrites::new();
            let runs = |offset, len| inline.run(offset, len, || Ok(())).is_some();
            assert!(runs(PAGE, PAGE));
            assert!(!runs(512, PAGE));
            assert!(!runs(PAGE, 512));
            assert!(!runs(0, MAX_INLINE_WRITE + PAGE));
            let changing = inline.changing();
            assert!(!runs(0, PAGE));
            drop(changing);
            assert!(runs(0, PAGE));
            allow_inline_writes(InlineThread::Copies);
            let _changing = inline.changing();
            assert!(runs(0, MAX_INLINE_COPY));
            assert!(!runs(0, MAX_INLINE_COPY + PAGE));
        });
    }

    #[test]
    fn a_slow_write_pauses_for_a_multiple_of_its_time() {
        permitted(|| {
            let inline = InlineWrites::new();
            let begun = Instant::now();
            let slow = SLOW_INLINE_WRITE * 4;
            assert!(write(&inline, slow));
            while !write(&inline, Duration::ZERO) {
                thread::yield_now();
            }
            let paused = begun.elapsed();
            assert!(paused >= slow * INLINE_PAUSE_FACTOR, "{paused:?}");
            // Watched now: one that sleeps again is still found.
            assert!(write(&inline, slow));
            assert!(!write(&inline, Duration::ZERO));
        });
    }

    #[test]
    fn a_thread_that_was_only_preempted_goes_on_inline_while_watched() {
        permitted(|| {
            let inline = InlineWrites::new();
            let watched = inline.since_epoch(Instant::now()) + nanos(INLINE_WATCH);
            inline.watched_until.store(watched, Ordering::Relaxed);
            let busy = || {
                let begun = Instant::now();
                while begun.elapsed() < SLOW_INLINE_WRITE * 2 {}
                Ok(())
            };
            assert!(inline.run(0, PAGE, busy).is_some());
            assert!(write(&inline, Duration::ZERO));
        });
    }

    #[test]
    fn no_pause_is_longer_than_the_longest() {
        let inline = InlineWrites::new();
        inline.slow(0, Duration::from_secs(3600), true);
        let resume = Duration::from_nanos(inline.paused_until.load(Ordering::Relaxed));
        assert_eq!(resume, Duration::from_secs(3600) + MAX_INLINE_PAUSE);
    }
}
