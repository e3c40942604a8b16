//! Locks that are mostly held for a moment, by tasks on several threads that need them again and again.
//!
//! A task that sleeps for a lock is woken by another thread, which takes a system call and tens of microseconds. If the lock is its own
//! from the moment of that call, nobody has it until it runs, and whoever wants it meanwhile goes to sleep as well: once it has begun,
//! each is woken by the one before, and the lock is handed on at the pace of threads that wake. So it is tried for about as long
//! as it is mostly held before a task goes to sleep, and it is free while the task wakes: somebody else may have it then, and give it back.

use std::ops::{Deref, DerefMut};
use std::pin::pin;

use tokio::sync::{Mutex, MutexGuard, Notify};

/// How often a lock is tried: some microseconds, as long as it is held by who does no I/O meanwhile.
const TRIES: u32 = 200;

/// A task that was woken so often and found the lock taken gets it next.
const WAKES: u32 = 8;

/// A lock that is mostly held for a moment, and may be held while its owner waits.
#[derive(Debug, Default)]
pub(crate) struct BriefMutex<T> {
    inner: Mutex<T>,
    freed: Notify,
}

/// The lock is held. Dropped, it is free.
#[derive(Debug)]
pub(crate) struct BriefGuard<'a, T> {
    // Dropped in this order: who is told finds the lock free.
    guard: MutexGuard<'a, T>,
    _told: Told<'a>,
}

/// Wakes a task that waits for the lock when it is dropped.
#[derive(Debug)]
struct Told<'a>(&'a Notify);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl<T> BriefMutex<T> {
    pub(crate) fn new(value: T) -> Self {
        BriefMutex {
            inner: Mutex::new(value),
            freed: Notify::new(),
        }
    }

    /// Locks, and sleeps only if the lock is held for longer than a moment. Who has waited for long comes before who comes later.
    /// Cancellation: safe, nothing has happened.
    pub(crate) async fn lock(&self) -> BriefGuard<'_, T> {
        for _ in 0..TRIES {
            if let Some(guard) = self.try_lock() {
                return guard;
            }
            std::hint::spin_loop();
        }
        for _ in 0..WAKES {
            let mut freed = pin!(self.freed.notified());
            freed.as_mut().enable();
            if let Some(guard) = self.try_lock() {
                return guard;
            }
            freed.await;
        }
        self.guard(self.inner.lock().await)
    }

    fn try_lock(&self) -> Option<BriefGuard<'_, T>> {
        self.inner.try_lock().ok().map(|guard| self.guard(guard))
    }

    fn guard<'a>(&'a self, guard: MutexGuard<'a, T>) -> BriefGuard<'a, T> {
        BriefGuard {
            guard,
            _told: Told(&self.freed),
        }
    }
}

impl<T> Deref for BriefGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for BriefGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn who_holds_it_for_longer_is_waited_for() {
        let mutex = Arc::new(BriefMutex::new(1));
        let held = mutex.lock().await;
        let other = mutex.clone();
        let waiting = tokio::spawn(async move {
            *other.lock().await += 1;
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(held);
        waiting.await.unwrap();
        assert_eq!(*mutex.lock().await, 2);
    }

    #[tokio::test]
    async fn it_is_free_while_who_waits_wakes_but_not_for_ever() {
        let mutex = Arc::new(BriefMutex::new(()));
        let mut held = mutex.lock().await;
        let other = mutex.clone();
        let waiting = tokio::spawn(async move { drop(other.lock().await) });
        tokio::task::yield_now().await;
        let mut barged = 0;
        loop {
            // The task on this thread that is woken now runs later.
            drop(held);
            match mutex.try_lock() {
                Some(again) => held = again,
                None => break,
            }
            barged += 1;
            assert!(barged <= WAKES, "who waits comes to nothing");
            tokio::task::yield_now().await;
        }
        assert_eq!(barged, WAKES);
        waiting.await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn nobody_is_forgotten() {
        let mutex = Arc::new(BriefMutex::new(0));
        let tasks = (0..16).map(|number| {
            let mutex = mutex.clone();
            tokio::spawn(async move {
                for round in 0..200 {
                    let mut guard = mutex.lock().await;
                    *guard += 1;
                    if (number + round) % 7 == 0 {
                        tokio::task::yield_now().await;
                    }
                    // Some give up while they wait.
                    drop(guard);
                    if round % 5 == 0 {
                        let _ = tokio::time::timeout(Default::default(), mutex.lock()).await;
                    }
                }
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.unwrap();
        }
        assert_eq!(*mutex.lock().await, 16 * 200);
    }
}
