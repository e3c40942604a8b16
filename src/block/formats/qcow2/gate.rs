//! Who is inside the image: guest requests shared and cheaply, operations on the whole image exclusively.
//!
//! One atomic word counts the requests inside, in two groups (epochs). Entering is one compare-and-swap, leaving
//! one subtraction. A freed host cluster may be handed out again when every request that may have resolved to it has
//! left: `flip` starts a new group, and once the old group has drained everybody who was inside at the flip is gone.
//!
//! ```text
//! bit 63: closed | bit 62: present group | bits 31..62: requests of group 1 | bits 0..31: requests of group 0
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::{Mutex, Notify, OwnedMutexGuard};

use crate::io::{Closed, Entered, Gate as Flushes};

const CLOSED: u64 = 1 << 63;
const GROUP: u64 = 1 << 62;
const COUNT: u64 = (1 << 31) - 1;

fn one(group: u64) -> u64 {
    1 << (31 * group)
}

fn count(state: u64, group: u64) -> u64 {
    state >> (31 * group) & COUNT
}

/// The gate of one image.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: AtomicU64,
    /// Somebody has entered since `take_busy`.
    busy: AtomicBool,
    /// What is going to wait for the disk to make something durable enters here first: others must not wait at a closed gate for it to
    /// end.
    flushes: Arc<Flushes>,
    /// Serialises those who close the gate.
    exclusive: Arc<Mutex<()>>,
    /// Somebody is going to close the gate, and keeps others from it until then.
    reserved: AtomicBool,
    /// Told when the gate opens.
    opened: Notify,
    /// Told when the last request leaves a closed gate.
    emptied: Notify,
}

impl Gate {
    /// Enters as a guest request; waits while the gate is closed. Cancellation: safe.
    pub(super) async fn enter(&self) -> Inside<'_> {
        let inside = self.enter_unnoticed().await;
        // Mostly a read, which many threads can do at once.
        if !self.busy.load(Ordering::Relaxed) {
            self.busy.store(true, Ordering::Relaxed);
        }
        inside
    }

    /// Is known to take long, and enters the gate behind that. Waits while either is closed. Cancellation: safe.
    pub(super) async fn enter_flush(&self) -> Entered<&Flushes> {
        self.flushes.enter().await
    }

    /// As `enter_flush`, but not when somebody waits for what takes long to end.
    pub(super) fn try_enter_flush(&self) -> Option<Entered<&Flushes>> {
        self.flushes.try_enter()
    }

    /// Holds back what takes long, and waits until what has begun of it has ended. Others go on: the first half of `close`, for those
    /// who hold back others elsewhere in between.
    pub(super) async fn close_to_flushes(&self) -> Closed {
        self.flushes.close().await
    }

    /// Whether a guest request has entered since the last call.
    pub(super) fn take_busy(&self) -> bool {
        self.busy.swap(false, Ordering::Relaxed)
    }

    /// Enters as work of the image's own. Cancellation: safe.
    pub(super) async fn enter_unnoticed(&self) -> Inside<'_> {
        loop {
            if let Some(inside) = self.try_enter() {
                return inside;
            }
            let opened = self.opened.notified();
            tokio::pin!(opened);
            opened.as_mut().enable();
            if self.state.load(Ordering::SeqCst) & CLOSED != 0 {
                opened.await;
            }
        }
    }

    fn try_enter(&self) -> Option<Inside<'_>> {
        let mut state = self.state.load(Ordering::SeqCst);
        loop {
            if state & CLOSED != 0 {
                return None;
            }
            let group = state >> 62 & 1;
            debug_assert!(count(state, group) < COUNT);
            match self.state.compare_exchange_weak(
                state,
                state + one(group),
                Ordering::SeqCst,
                Ordering::SeqCst,
            ) {
                Ok(_) => return Some(Inside { gate: self, group }),
                Err(now) => state = now,
            }
        }
    }

    /// Starts a new group of requests, if the previous old group has drained. Answers whether it did.
    pub(super) fn flip(&self) -> bool {
        let flipped = self
            .state
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |state| {
                let old = (state >> 62 & 1) ^ 1;
                (count(state, old) == 0).then_some(state ^ GROUP)
            });
        flipped.is_ok()
    }

    /// Whether everybody who was inside at the last `flip` has left.
    pub(super) fn old_group_drained(&self) -> bool {
        let state = self.state.load(Ordering::SeqCst);
        count(state, (state >> 62 & 1) ^ 1) == 0
    }

    /// Closes the gate and waits until nobody is inside. Opens again when the answer is dropped.
    /// Cancellation: the gate opens again.
    pub(super) async fn close(self: &Arc<Self>) -> Exclusive {
        let mut exclusive = self.lock().await;
        exclusive.shut().await;
        exclusive
    }

    /// Keeps others from closing the gate until the answer is dropped, while requests go on. Cancellation: safe.
    pub(super) async fn reserve(self: &Arc<Self>) -> Exclusive {
        let exclusive = self.lock().await;
        self.reserved.store(true, Ordering::SeqCst);
        exclusive
    }

    /// Whether it is reserved: a request that waited until it can close the gate would keep it from being closed.
    pub(super) fn is_reserved(&self) -> bool {
        self.reserved.load(Ordering::SeqCst)
    }

    async fn lock(self: &Arc<Self>) -> Exclusive {
        Exclusive {
            gate: self.clone(),
            flushes: None,
            shut: None,
            lock: Arc::new(self.exclusive.clone().lock_owned().await),
        }
    }
}

/// A request inside; leaves when dropped.
#[derive(Debug)]
pub(super) struct Inside<'a> {
    gate: &'a Gate,
    group: u64,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let before = self.gate.state.fetch_sub(one(self.group), Ordering::SeqCst);
        let left = (before - one(self.group)) & !(CLOSED | GROUP);
        if before & CLOSED != 0 && left == 0 {
            self.gate.emptied.notify_waiters();
        }
    }
}

/// Alone in the image, or about to be; the gate opens when dropped.
#[derive(Debug)]
pub(super) struct Exclusive {
    gate: Arc<Gate>,
    /// Who takes long is held back already.
    flushes: Option<Closed>,
    /// `None` before requests have been held back, when they have been let in, and where somebody else does that.
    shut: Option<Shut>,
    lock: Arc<OwnedMutexGuard<()>>,
}

/// Holds the gate closed; it opens when dropped.
#[derive(Debug)]
pub(super) struct Shut {
    gate: Arc<Gate>,
    _flushes: Closed,
    /// Nobody else closes the gate before it has been opened.
    _lock: Arc<OwnedMutexGuard<()>>,
}

impl Exclusive {
    /// Closes the gate and waits until nobody is inside. Cancellation: it is open again when this is dropped.
    pub(super) async fn shut(&mut self) {
        let flushes = match self.flushes.take() {
            Some(flushes) => flushes,
            None => self.gate.flushes.close().await,
        };
        let gate = self.gate.clone();
        gate.state.fetch_or(CLOSED, Ordering::SeqCst);
        self.shut = Some(Shut {
            gate: gate.clone(),
            _flushes: flushes,
            _lock: self.lock.clone(),
        });
        loop {
            let emptied = gate.emptied.notified();
            tokio::pin!(emptied);
            emptied.as_mut().enable();
            if gate.state.load(Ordering::SeqCst) & !(CLOSED | GROUP) == 0 {
                return;
            }
            emptied.await;
        }
    }

    /// The first half of `shut`: holds back what takes long, and waits until what has begun of it has ended.
    pub(super) async fn shut_to_flushes(&mut self) {
        if self.flushes.is_none() {
            self.flushes = Some(self.gate.flushes.close().await);
        }
    }

    /// Lets requests in again. Nobody else closes the gate before this is dropped.
    pub(super) fn let_in(&mut self) {
        self.shut = None;
    }

    /// Lets requests in when the answer is dropped; `None` if they are in. Nobody else closes the gate before both are dropped.
    pub(super) fn hand_over(&mut self) -> Option<Shut> {
        self.shut.take()
    }
}

impl Drop for Exclusive {
    fn drop(&mut self) {
        self.gate.reserved.store(false, Ordering::SeqCst);
    }
}

impl Drop for Shut {
    fn drop(&mut self) {
        self.gate.state.fetch_and(!CLOSED, Ordering::SeqCst);
        self.gate.opened.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_flip_drains_when_those_inside_before_have_left() {
        let gate = Gate::default();
        let before = gate.enter().await;
        assert!(gate.flip());
        let after = gate.enter().await;
        assert!(!gate.old_group_drained());
        assert!(!gate.flip(), "two old groups are not told apart");
        drop(before);
        assert!(gate.old_group_drained());
        assert!(gate.flip());
        assert!(!gate.old_group_drained());
        drop(after);
        assert!(gate.old_group_drained());
    }

    #[tokio::test]
    async fn who_lets_requests_in_still_keeps_others_from_closing() {
        let gate = Arc::new(Gate::default());
        let mut first = gate.close().await;
        assert!(gate.try_enter().is_none());
        first.let_in();
        let _inside = gate.try_enter().unwrap();
        let second = tokio::time::timeout(Duration::from_millis(20), gate.close());
        assert!(second.await.is_err());
        assert!(gate.try_enter().is_some());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn an_exclusive_holder_is_alone() {
        let gate = Arc::new(Gate::default());
        let shared = Arc::new(AtomicU64::new(0));
        let mut tasks = Vec::new();
        for worker in 0..8 {
            let (gate, shared) = (gate.clone(), shared.clone());
            tasks.push(tokio::spawn(async move {
                for step in 0..200 {
                    if (step + worker) % 50 == 0 {
                        let _alone = gate.close().await;
                        assert_eq!(shared.load(Ordering::SeqCst), 0);
                        tokio::time::sleep(Duration::from_micros(50)).await;
                        assert_eq!(shared.load(Ordering::SeqCst), 0);
                    } else {
                        let _inside = gate.enter().await;
                        shared.fetch_add(1, Ordering::SeqCst);
                        tokio::task::yield_now().await;
                        shared.fetch_sub(1, Ordering::SeqCst);
                    }
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(gate.state.load(Ordering::SeqCst) & !GROUP, 0);
    }
}
