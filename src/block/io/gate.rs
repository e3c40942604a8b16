//! In-flight accounting: requests enter and leave, and somebody may close the gate and wait until all have left.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

/// The lowest bit of the state: closed. The rest counts entered requests.
const CLOSED: usize = 1;
const ONE: usize = 2;

/// A gate. Entering costs one atomic addition while it is open.
///
/// Several may close it at once; it opens when the last of them lets go.
#[derive(Debug, Default)]
pub struct Gate {
    state: AtomicUsize,
    /// How many hold it closed. Changes of the CLOSED bit happen under this lock only.
    closers: Mutex<usize>,
    /// Told when the last request leaves a closed gate.
    drained: Notify,
    /// Told when the gate opens.
    opened: Notify,
}

/// A request that has entered. It leaves on drop.
#[derive(Debug)]
#[must_use]
pub struct Entered<'a>(&'a Gate);

/// Holds the gate closed. It opens when the last of these is dropped.
#[derive(Debug)]
#[must_use]
pub struct Closed(Arc<Gate>);

impl Gate {
    /// Enters, waiting while the gate is closed. Cancellation: safe, nothing has happened.
    pub async fn enter(&self) -> Entered<'_> {
        loop {
            if let Some(entered) = self.try_enter() {
                return entered;
            }
            let opened = self.opened.notified();
            // Checked after registering, so that an opening in between is not missed.
            if self.state.load(Ordering::SeqCst) & CLOSED != 0 {
                opened.await;
            }
        }
    }

    /// Enters if the gate is open.
    pub fn try_enter(&self) -> Option<Entered<'_>> {
        let entered = Entered(self);
        // Dropping `entered` on a closed gate takes the count back and tells a waiting closer.
        let before = self.state.fetch_add(ONE, Ordering::SeqCst);
        (before & CLOSED == 0).then_some(entered)
    }

    /// Closes the gate at once and waits until all that have entered have left.
    ///
    /// Cancellation: the gate opens again.
    pub async fn close(self: &Arc<Self>) -> Closed {
        let closed = self.shut();
        loop {
            let drained = self.drained.notified();
            if self.in_flight() == 0 {
                return closed;
            }
            drained.await;
        }
    }

    /// How many have entered and not left.
    pub fn in_flight(&self) -> usize {
        self.state.load(Ordering::SeqCst) / ONE
    }

    fn shut(self: &Arc<Self>) -> Closed {
        let mut closers = self.closers.lock().unwrap_or_else(PoisonError::into_inner);
        *closers += 1;
        self.state.fetch_or(CLOSED, Ordering::SeqCst);
        Closed(self.clone())
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let before = self.0.state.fetch_sub(ONE, Ordering::SeqCst);
        if before == ONE | CLOSED {
            self.0.drained.notify_waiters();
        }
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        let gate = &self.0;
        let mut closers = gate.closers.lock().unwrap_or_else(PoisonError::into_inner);
        *closers -= 1;
        if *closers == 0 {
            gate.state.fetch_and(!CLOSED, Ordering::SeqCst);
            gate.opened.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    const SHORT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn closing_waits_for_those_inside_and_holds_back_the_rest() {
        let gate = Arc::new(Gate::default());
        let inside = gate.enter().await;
        let closing = tokio::spawn({
            let gate = gate.clone();
            async move { gate.close().await }
        });
        while gate.state.load(Ordering::SeqCst) & CLOSED == 0 {
            tokio::task::yield_now().await;
        }
        assert!(timeout(SHORT, gate.enter()).await.is_err());
        assert!(!closing.is_finished());
        drop(inside);
        let closed = closing.await.unwrap();
        assert_eq!(gate.in_flight(), 0);
        drop(closed);
        assert!(timeout(SHORT, gate.enter()).await.is_ok());
    }

    #[tokio::test]
    async fn a_cancelled_close_opens_the_gate_again() {
        let gate = Arc::new(Gate::default());
        let inside = gate.enter().await;
        assert!(timeout(SHORT, gate.close()).await.is_err());
        assert!(timeout(SHORT, gate.enter()).await.is_ok());
        drop(inside);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nobody_is_inside_while_it_is_closed() {
        let gate = Arc::new(Gate::default());
        let busy = Arc::new(AtomicUsize::new(0));
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let (gate, busy) = (gate.clone(), busy.clone());
                tokio::spawn(async move {
                    for _ in 0..2000 {
                        let _entered = gate.enter().await;
                        busy.fetch_add(1, Ordering::SeqCst);
                        tokio::task::yield_now().await;
                        busy.fetch_sub(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        for _ in 0..200 {
            let _closed = gate.close().await;
            assert_eq!(busy.load(Ordering::SeqCst), 0);
            tokio::task::yield_now().await;
            assert_eq!(busy.load(Ordering::SeqCst), 0);
        }
        for worker in workers {
            worker.await.unwrap();
        }
    }
}
