//! Freed clusters on their way back to the allocator.
//!
//! A cluster that an entry no longer points to goes through three stations, so that it is never handed out while anything
//! old may still lead to it:
//!
//! ```text
//! unlinked --(write-back: the unlink is durable)--> durable --(gate: a new group)--> draining
//!          --(gate: everybody who was inside has left; hole punched)--> refcount down, free at 0
//! ```
//!
//! The refcount goes down last. A crash on the way leaves a leaked cluster and no more.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::alloc::{Run, push_run};
use super::gate::Gate;

/// Unlinked clusters that make somebody write back without waiting for the guest's flush, in bytes.
pub(super) const MAX_UNLINKED: u64 = 64 << 20;

/// The stations.
#[derive(Debug, Default)]
pub(crate) struct Quarantine {
    state: Mutex<State>,
    /// Clusters in `State::unlinked`; looked at by every change.
    waiting: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    unlinked: Vec<Run>,
    durable: Vec<Run>,
    draining: Vec<Run>,
}

impl Quarantine {
    /// One reference to each of these clusters is gone from the tables in memory.
    pub(crate) fn unlinked(&self, runs: impl IntoIterator<Item = Run>) {
        let mut state = self.state();
        for run in runs {
            self.waiting.fetch_add(run.count, Ordering::Relaxed);
            push_run(&mut state.unlinked, run);
        }
    }

    /// How many clusters wait for a write-back.
    pub(crate) fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Whether nothing is on its way.
    pub(crate) fn is_empty(&self) -> bool {
        let state = self.state();
        state.unlinked.is_empty() && state.durable.is_empty() && state.draining.is_empty()
    }

    /// Takes what is unlinked, before the tables are copied for a write-back.
    pub(crate) fn take_unlinked(&self) -> Vec<Run> {
        let mut state = self.state();
        self.waiting.store(0, Ordering::Relaxed);
        std::mem::take(&mut state.unlinked)
    }

    /// The write-back has made the unlinking durable.
    pub(crate) fn durable(&self, runs: Vec<Run>) {
        self.state().durable.extend(runs);
    }

    /// Moves what the gate allows, and answers the runs that nobody can reach any more.
    pub(crate) fn advance(&self, gate: &Gate) -> Vec<Run> {
        let mut state = self.state();
        let mut drained = Vec::new();
        // Twice: an idle image drains at once.
        for _ in 0..2 {
            if gate.old_group_drained() {
                drained.append(&mut state.draining);
                if !state.durable.is_empty() && gate.flip() {
                    state.draining = std::mem::take(&mut state.durable);
                }
            }
        }
        drained
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
