//! In-flight accounting: requests enter and leave, and somebody may close the gate and wait until all have left.

use std::ops::Deref;
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
    /// Told when a request leaves a closed gate.
    drained: Notify,
    /// Told when the gate opens.
    opened: Notify,
}

/// A request that has entered by way of `P`, a handle on what the gate belongs to. It leaves on drop.
#[derive(Debug)]
#[must_use]
pub struct Entered<P: Deref<Target: AsRef<Gate>>>(P);

/// Holds the gate closed. It opens when the last of these is dropped.
#[derive(Debug)]
#[must_use]
pub struct Closed(Arc<Gate>);

impl Gate {
    /// Enters, waiting while the gate is closed. Cancellation: safe, nothing has happened.
    pub async fn enter(&self) -> Entered<&Self> {
        Gate::enter_by(self).await
    }

    /// As [`Gate::enter`], by a handle that is held for as long as the request is inside.
    pub async fn enter_by<P: Deref<Target: AsRef<Gate>>>(mut place: P) -> Entered<P> {
        loop {
            match Gate::try_enter_by(place) {
                Ok(entered) => return entered,
                Err(outside) => place = outside,
            }
            let gate = place.deref().as_ref();
            let opened = gate.opened.notified();
            // Checked after registering, so that an opening in between is not missed.
            if gate.is_closed() {
                opened.await;
            }
        }
    }

    /// Enters if the gate is open.
    pub fn try_enter(&self) -> Option<Entered<&Self>> {
        Gate::try_enter_by(self).ok()
    }

    /// Whether somebody holds it closed.
    pub fn is_closed(&self) -> bool {
        self.state.load(Ordering::SeqCst) & CLOSED != 0
    }

    /// Enters if the gate is open; else gives the handle back.
    fn try_enter_by<P: Deref<Target: AsRef<Gate>>>(place: P) -> Result<Entered<P>, P> {
        let gate = place.deref().as_ref();
        if gate.state.fetch_add(ONE, Ordering::SeqCst) & CLOSED == 0 {
            return Ok(Entered(place));
        }
        gate.leave();
        Err(place)
    }

    fn leave(&self) {
        let before = self.state.fetch_sub(ONE, Ordering::SeqCst);
        if before & CLOSED != 0 {
            self.drained.notify_waiters();
        }
    }

    /// Closes the gate at once and waits until all that have entered have left.
    ///
    /// Cancellation: the gate opens again.
    pub async fn close(self: &Arc<Self>) -> Closed {
        self.close_to(0).await
    }

    /// As [`Gate::close`], by somebody who has entered and waits for the others.
    ///
    /// Two that have entered and wait like this wait for each other: the caller sees to it that there is one.
    pub async fn close_around<P: Deref<Target: AsRef<Gate>>>(
        self: &Arc<Self>,
        entered: &Entered<P>,
    ) -> Closed {
        debug_assert!(std::ptr::eq(entered.gate(), &**self), "entered elsewhere");
        self.close_to(1).await
    }

    async fn close_to(self: &Arc<Self>, left: usize) -> Closed {
        let closed = self.shut();
        loop {
            let drained = self.drained.notified();
            if self.in_flight() <= left {
                return closed;
            }
            drained.await;
        }
    }

    /// How many have entered and not left.
    pub fn in_flight(&self) -> usize {
        self.state.load(Ordering::SeqCst) / ONE
    }

    /// Closes the gate without waiting for those inside.
    pub fn shut(self: &Arc<Self>) -> Closed {
        let mut closers = self.closers.lock().unwrap_or_else(PoisonError::into_inner);
        *closers += 1;
        self.state.fetch_or(CLOSED, Ordering::SeqCst);
        Closed(self.clone())
    }
}

impl AsRef<Gate> for Gate {
    fn as_ref(&self) -> &Gate {
        self
    }
}

impl Closed {
    /// Whether it is this gate that is held closed.
    pub fn is_of(&self, gate: &Gate) -> bool {
        std::ptr::eq(&*self.0, gate)
    }
}

impl<P: Deref<Target: AsRef<Gate>>> Entered<P> {
    fn gate(&self) -> &Gate {
        self.0.deref().as_ref()
    }

    /// The handle by which it has entered.
    pub fn place(&self) -> &P {
        &self.0
    }
}

impl<P: Deref<Target: AsRef<Gate>>> Drop for Entered<P> {
    fn drop(&mut self) {
        self.gate().leave();
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
