//! What a node has done so far, by kind of request.

use std::sync::atomic::{AtomicU64, Ordering};

/// Kinds of requests that are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestKind {
    /// Reads.
    Read,
    /// Writes of bytes.
    Write,
    /// Writes of zeroes.
    WriteZeroes,
    /// Discards.
    Discard,
    /// Flushes.
    Flush,
}

/// How many kinds there are.
const KINDS: usize = 5;

/// What has been done of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RequestCount {
    /// Requests that succeeded.
    pub done: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Requests that failed.
    pub failed: u64,
}

/// Running totals.
#[derive(Debug, Default)]
pub(super) struct Counters {
    kinds: [Counter; KINDS],
    /// The offset behind the highest byte that was to be written.
    highest: AtomicU64,
}

#[derive(Debug, Default)]
struct Counter {
    done: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
}

impl Counters {
    pub(super) fn count(&self, kind: RequestKind, bytes: u64, succeeded: bool) {
        let counter = &self.kinds[kind as usize];
        if succeeded {
            counter.done.fetch_add(1, Ordering::Relaxed);
            counter.bytes.fetch_add(bytes, Ordering::Relaxed);
        } else {
            counter.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Somebody wants to write up to this offset. Counted whether it succeeds or not: on a full device it is what is missing.
    pub(super) fn writes_up_to(&self, end: u64) {
        // Most writes are no new record, and reading is cheap.
        if end > self.highest.load(Ordering::Relaxed) {
            self.highest.fetch_max(end, Ordering::Relaxed);
        }
    }

    pub(super) fn highest(&self) -> u64 {
        self.highest.load(Ordering::Relaxed)
    }

    pub(super) fn get(&self, kind: RequestKind) -> RequestCount {
        let counter = &self.kinds[kind as usize];
        RequestCount {
            done: counter.done.load(Ordering::Relaxed),
            bytes: counter.bytes.load(Ordering::Relaxed),
            failed: counter.failed.load(Ordering::Relaxed),
        }
    }
}
