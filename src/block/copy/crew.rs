//! How many workers a copy has.
//!
//! Where requests take the time that copying bytes in memory takes, few workers are fastest: more of them only push each other's
//! bytes out of the processor's caches. Where requests wait for something, more of them wait for it at once.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Notify;

/// Workers that are always wanted: what two processors keep busy.
const LEAST: usize = 3;

/// A write that takes longer than this has waited. Copying its bytes takes a tenth.
const SLOW: Duration = Duration::from_millis(5);

/// The number of workers, by how long their writes take.
#[derive(Debug)]
pub(super) struct Crew {
    most: usize,
    wanted: AtomicUsize,
    working: AtomicUsize,
    changed: Notify,
}

impl Crew {
    /// At most `most` workers; one is always wanted.
    pub(super) fn new(most: usize) -> Self {
        Crew {
            most: most.max(1),
            wanted: AtomicUsize::new(LEAST.min(most.max(1))),
            working: AtomicUsize::new(0),
            changed: Notify::new(),
        }
    }

    /// A worker may begin, if one more is wanted.
    pub(super) fn join(&self) -> bool {
        let wanted = self.wanted.load(Ordering::Relaxed);
        let joins = |working: usize| (working < wanted).then_some(working + 1);
        let joined = self
            .working
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, joins);
        joined.is_ok()
    }

    /// A worker has to end, if fewer are wanted.
    pub(super) fn leave(&self) -> bool {
        let wanted = self.wanted.load(Ordering::Relaxed);
        let leaves = |working: usize| (working > wanted).then(|| working - 1);
        let left = self
            .working
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, leaves);
        left.is_ok()
    }

    /// Whether nothing is slow.
    pub(super) fn is_quick(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) <= LEAST
    }

    /// A write has taken so long.
    pub(super) fn note(&self, time: Duration) {
        let change = |wanted: usize| match time > SLOW {
            true => (wanted < self.most).then_some(wanted + 1),
            false => (wanted > LEAST).then(|| wanted - 1),
        };
        let changed = self
            .wanted
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
        if changed.is_ok() && time > SLOW {
            self.changed.notify_one();
        }
    }

    /// Answers when more may be wanted.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_writes_make_more_workers_and_quick_ones_fewer() {
        let crew = Crew::new(5);
        let join_all = || std::iter::from_fn(|| crew.join().then_some(())).count();
        assert_eq!(join_all(), 3);
        for _ in 0..10 {
            crew.note(Duration::from_millis(100));
        }
        assert_eq!(join_all(), 2);
        assert!(!crew.leave() && !crew.is_quick());
        for _ in 0..10 {
            crew.note(Duration::from_micros(300));
        }
        assert!(crew.leave() && crew.leave() && !crew.leave() && crew.is_quick());
    }

    #[test]
    fn one_worker_is_one() {
        let crew = Crew::new(1);
        crew.note(Duration::from_secs(1));
        crew.note(Duration::ZERO);
        assert!(crew.join() && !crew.join() && !crew.leave());
    }
}
