//! Mutual exclusion by byte range: for read-modify-write, copy-on-write, and allocation of one cluster.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// How a range is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Together with other shared holders.
    Shared,
    /// Alone.
    Exclusive,
}

/// Locks on ranges of one address space.
///
/// Waiters are served in order of arrival where their ranges overlap, so that none starves.
#[derive(Debug, Default)]
pub struct RangeLock {
    entries: Mutex<Vec<Entry>>,
    released: Notify,
}

/// Holders and waiters, in order of arrival.
#[derive(Debug)]
struct Entry {
    id: u64,
    range: Range<u64>,
    access: Access,
}

/// A held range. It is given up on drop.
#[derive(Debug)]
#[must_use]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    id: u64,
}

impl RangeLock {
    /// Waits until the range can be held.
    ///
    /// A task that holds a range must not wait for another one that overlaps, nor take two in different
    /// orders: it would wait for itself or for one that waits for it. Cancellation: safe.
    pub async fn lock(&self, range: Range<u64>, access: Access) -> RangeGuard<'_> {
        // The guard exists from the start: dropping the future takes the waiter out of the list.
        let guard = self.enter(range, access);
        loop {
            let released = self.released.notified();
            if self.is_first(guard.id) {
                return guard;
            }
            released.await;
        }
    }

    /// Holds the range if nobody else that conflicts holds or waits for it.
    pub fn try_lock(&self, range: Range<u64>, access: Access) -> Option<RangeGuard<'_>> {
        let guard = self.enter(range, access);
        self.is_first(guard.id).then_some(guard)
    }

    fn enter(&self, range: Range<u64>, access: Access) -> RangeGuard<'_> {
        let mut entries = self.entries();
        let id = entries.last().map_or(0, |last| last.id + 1);
        entries.push(Entry { id, range, access });
        RangeGuard { lock: self, id }
    }

    /// Whether nobody who came earlier conflicts.
    fn is_first(&self, id: u64) -> bool {
        let entries = self.entries();
        let Some(place) = entries.iter().position(|entry| entry.id == id) else {
            unreachable!("a guard without entry");
        };
        let own = &entries[place];
        !entries[..place].iter().any(|other| other.conflicts(own))
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn conflicts(&self, other: &Entry) -> bool {
        let overlap = self.range.start < other.range.end && other.range.start < self.range.end;
        overlap && (self.access == Access::Exclusive || other.access == Access::Exclusive)
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.entries().retain(|entry| entry.id != self.id);
        self.lock.released.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Context, Waker};

    fn is_pending<T>(future: Pin<&mut impl Future<Output = T>>) -> bool {
        future
            .poll(&mut Context::from_waker(Waker::noop()))
            .is_pending()
    }

    #[test]
    fn only_conflicting_ranges_exclude_each_other() {
        let lock = RangeLock::default();
        let held = lock.try_lock(0..10, Access::Exclusive).unwrap();
        assert!(lock.try_lock(9..12, Access::Shared).is_none());
        assert!(lock.try_lock(10..12, Access::Exclusive).is_some());
        drop(held);
        let shared = lock.try_lock(0..10, Access::Shared).unwrap();
        assert!(lock.try_lock(0..10, Access::Shared).is_some());
        assert!(lock.try_lock(0..1, Access::Exclusive).is_none());
        drop(shared);
        assert!(lock.entries().is_empty());
    }

    #[tokio::test]
    async fn a_waiter_is_not_overtaken_by_later_ones() {
        let lock = RangeLock::default();
        let first = lock.try_lock(0..10, Access::Shared).unwrap();
        let mut waiting = std::pin::pin!(lock.lock(0..10, Access::Exclusive));
        assert!(is_pending(waiting.as_mut()));
        assert!(lock.try_lock(0..10, Access::Shared).is_none());
        drop(first);
        let _exclusive = waiting.await;
    }

    #[tokio::test]
    async fn a_cancelled_waiter_leaves_no_trace() {
        let lock = RangeLock::default();
        let first = lock.try_lock(0..10, Access::Shared).unwrap();
        {
            let mut waiting = std::pin::pin!(lock.lock(0..10, Access::Exclusive));
            assert!(is_pending(waiting.as_mut()));
        }
        assert!(lock.try_lock(0..10, Access::Shared).is_some());
        drop(first);
    }
}
