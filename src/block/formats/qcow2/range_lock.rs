//! Exclusive locks on ranges of numbers (guest clusters, L1 indices), in the order of asking.
//!
//! Few ranges are held at once (allocating requests in flight), so a list that is searched from front to back is
//! both simple and fast. A holder never asks for a second range of the same lock; with that there is no deadlock.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// A set of locked ranges.
#[derive(Debug, Default)]
pub(super) struct RangeLock {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// Held and awaited ranges, oldest first.
    queue: VecDeque<Entry>,
}

#[derive(Debug)]
struct Entry {
    ticket: u64,
    first: u64,
    last: u64,
    /// Made by the first who waits for this entry.
    released: Option<Arc<Notify>>,
}

impl RangeLock {
    /// Waits until nobody who asked earlier holds or wants a part of `range`. Cancellation: safe.
    pub(super) async fn lock(&self, range: RangeInclusive<u64>) -> Locked<'_> {
        let (first, last) = (*range.start(), *range.end());
        let ticket = {
            let mut state = self.state();
            let ticket = state.next;
            state.next += 1;
            state.queue.push_back(Entry {
                ticket,
                first,
                last,
                released: None,
            });
            ticket
        };
        let locked = Locked { lock: self, ticket };
        loop {
            let notify = {
                let mut state = self.state();
                let earlier = state
                    .queue
                    .iter_mut()
                    .take_while(|entry| entry.ticket < ticket)
                    .find(|entry| entry.first <= last && first <= entry.last);
                match earlier {
                    None => return locked,
                    Some(entry) => entry.released.get_or_insert_default().clone(),
                }
            };
            // The entry's owner takes it out of the queue before it stores a permit, and each waiter passes
            // the permit on, so none is missed.
            notify.notified().await;
            notify.notify_one();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A held range; free again when dropped.
#[derive(Debug)]
pub(super) struct Locked<'a> {
    lock: &'a RangeLock,
    ticket: u64,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let mut state = self.lock.state();
        let at = state
            .queue
            .iter()
            .position(|entry| entry.ticket == self.ticket);
        let entry = at.and_then(|at| state.queue.remove(at));
        drop(state);
        if let Some(released) = entry.and_then(|entry| entry.released) {
            released.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    async fn is_free(lock: &RangeLock, range: RangeInclusive<u64>) -> bool {
        tokio::time::timeout(Duration::from_millis(20), lock.lock(range))
            .await
            .is_ok()
    }

    #[tokio::test]
    async fn overlapping_ranges_wait_and_others_do_not() {
        let lock = RangeLock::default();
        let held = lock.lock(10..=19).await;
        assert!(is_free(&lock, 0..=9).await);
        assert!(is_free(&lock, 20..=20).await);
        assert!(!is_free(&lock, 5..=10).await);
        assert!(!is_free(&lock, 19..=30).await);
        drop(held);
        assert!(is_free(&lock, 0..=100).await);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn every_waiter_gets_its_turn_alone() {
        let lock = Arc::new(RangeLock::default());
        let cells = Arc::new((0..8).map(|_| Mutex::new(())).collect::<Vec<_>>());
        let mut tasks = Vec::new();
        for worker in 0..16_u64 {
            let (lock, cells) = (lock.clone(), cells.clone());
            tasks.push(tokio::spawn(async move {
                for step in 0..100 {
                    let first = (worker * 7 + step * 3) % 8;
                    let last = (first + step % 3).min(7);
                    let held = lock.lock(first..=last).await;
                    for cell in &cells[first as usize..=last as usize] {
                        drop(cell.try_lock().expect("nobody else is in the range"));
                    }
                    tokio::task::yield_now().await;
                    drop(held);
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert!(lock.state().queue.is_empty());
    }
}
