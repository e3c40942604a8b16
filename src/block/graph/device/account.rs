//! What a drive's guests have asked for, and how long it took.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Kinds of guest requests that are told apart. A write of zeroes is a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
    Discard,
    Flush,
}

const OPERATIONS: usize = 4;

/// What has been done of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Requests that the guest saw succeed.
    pub done: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Requests whose failure the guest was told of.
    pub failed: u64,
    /// Requests that made no sense: outside of the disk, or writes to a disk that is read-only.
    pub invalid: u64,
    /// The time that those that were done or failed took, from the request to the answer, without that for which the machine stood
    /// still.
    pub time: Duration,
}

/// What a drive has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DriveStats {
    /// Reads.
    pub read: Totals,
    /// Writes, of bytes and of zeroes.
    pub write: Totals,
    /// Discards.
    pub discard: Totals,
    /// Flushes.
    pub flush: Totals,
    /// The time since the last answer; `None` if there was none.
    pub idle: Option<Duration>,
}

/// Running totals.
#[derive(Debug)]
pub(super) struct Account {
    epoch: Instant,
    operations: [Counters; OPERATIONS],
    /// When the last request was answered: nanoseconds from the epoch, 0 for never.
    last: AtomicU64,
}

#[derive(Debug, Default)]
struct Counters {
    done: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
    nanoseconds: AtomicU64,
}

/// How a request ended.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ending {
    /// Well, with so many bytes.
    Done(u64),
    Failed,
    Invalid,
}

impl Account {
    pub(super) fn new() -> Self {
        Account {
            epoch: Instant::now(),
            operations: Default::default(),
            last: AtomicU64::new(0),
        }
    }

    /// A request that was begun then has ended now.
    pub(super) fn count(&self, operation: Operation, begun: Instant, ending: Ending) {
        let now = Instant::now();
        let counters = &self.operations[operation as usize];
        match ending {
            Ending::Done(bytes) => {
                add(&counters.done, 1);
                add(&counters.bytes, bytes);
            }
            Ending::Failed => add(&counters.failed, 1),
            Ending::Invalid => add(&counters.invalid, 1),
        }
        // As in QEMU: what made no sense took no time.
        if !matches!(ending, Ending::Invalid) {
            add(&counters.nanoseconds, nanoseconds(now - begun));
        }
        let last = nanoseconds(now - self.epoch).max(1);
        self.last.store(last, Ordering::Relaxed);
    }

    pub(super) fn totals(&self) -> DriveStats {
        let totals = |operation: Operation| {
            let counters = &self.operations[operation as usize];
            let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            Totals {
                done: get(&counters.done),
                bytes: get(&counters.bytes),
                failed: get(&counters.failed),
                invalid: get(&counters.invalid),
                time: Duration::from_nanos(get(&counters.nanoseconds)),
            }
        };
        let last = Some(self.last.load(Ordering::Relaxed)).filter(|last| *last > 0);
        let idle = |last| {
            let since_epoch = self.epoch.elapsed();
            since_epoch.saturating_sub(Duration::from_nanos(last))
        };
        DriveStats {
            read: totals(Operation::Read),
            write: totals(Operation::Write),
            discard: totals(Operation::Discard),
            flush: totals(Operation::Flush),
            idle: last.map(idle),
        }
    }
}

fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}

/// They last for five centuries.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
