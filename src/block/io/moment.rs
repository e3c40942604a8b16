//! Locks that are mostly held for a moment: tried for about as long before the task goes to sleep.
//!
//! A task that sleeps for a lock is woken by another thread, which takes a system call and tens of microseconds, and the lock is its own
//! from the first of them. Threads that all need such a lock again and again are soon all asleep for it, each woken by the one before.

use tokio::sync::{Mutex, MutexGuard};

/// How often a lock is tried: some microseconds, as long as it is held by who does no I/O meanwhile.
const TRIES: u32 = 200;

/// Locks, and sleeps only if the lock is held for longer than a moment. Cancellation: safe, nothing has happened.
pub(crate) async fn lock_for_a_moment<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    for _ in 0..TRIES {
        if let Ok(guard) = mutex.try_lock() {
            return guard;
        }
        std::hint::spin_loop();
    }
    mutex.lock().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn who_holds_it_for_longer_is_waited_for() {
        let mutex = Arc::new(Mutex::new(1));
        let held = lock_for_a_moment(&mutex).await;
        let other = mutex.clone();
        let waiting = tokio::spawn(async move {
            *lock_for_a_moment(&other).await += 1;
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(held);
        waiting.await.unwrap();
        assert_eq!(*mutex.lock().await, 2);
    }
}
