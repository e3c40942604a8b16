//! Whether guests run: one state for all drives, as all disks of a machine stop when one of them does.
//!
//! ```text
//!             a request fails, or `stop`
//!   running ─────────────────────────────> paused, or io-error      every drive's gate is closed
//!           <─────────────────────────────
//!                       `cont`
//! ```
//!
//! Requests stop the machine on their own, without asking the owner of the graph: the next one must not get through. What
//! has happened is told later, by whoever owns the graph ([`Machine::untold_stop`]).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::io::{Closed, Gate};

/// Whether guests run, and why not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RunState {
    /// They do.
    #[default]
    Running,
    /// A user has stopped them.
    Paused,
    /// A request has failed, and its drive's policy says stop.
    IoError,
}

/// The machine. Clones are the same one.
#[derive(Debug, Clone, Default)]
pub struct Machine(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    run: RunState,
    /// Users have been told that it stands still.
    told: bool,
    /// The gates of all drives.
    gates: Vec<Weak<Gate>>,
    /// While it stands still.
    closed: Vec<Closed>,
}

impl Machine {
    /// Plain data behind it, whole between any two statements.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it runs, and why not.
    pub fn state(&self) -> RunState {
        self.lock().run
    }

    /// Stops it: no request of a guest gets into a node from now on. Those that are inside end as they do. The first reason counts.
    pub fn stop(&self, why: RunState) {
        let mut state = self.lock();
        if state.run == RunState::Running && why != RunState::Running {
            state.run = why;
            let gates = state.gates.iter().filter_map(Weak::upgrade);
            state.closed = gates.map(|gate| gate.shut()).collect();
        }
    }

    /// Lets it go on. Answers whether it has stood still and users know: they are to be told that it goes on.
    pub fn go_on(&self) -> bool {
        let mut state = self.lock();
        state.run = RunState::Running;
        let closed = std::mem::take(&mut state.closed);
        let told = std::mem::take(&mut state.told);
        drop(state);
        drop(closed);
        told
    }

    /// Whether it stands still and users do not know. From now on they do.
    pub fn untold_stop(&self) -> bool {
        let mut state = self.lock();
        state.run != RunState::Running && !std::mem::replace(&mut state.told, true)
    }

    /// A new drive's gate.
    pub(super) fn admit(&self, gate: &Arc<Gate>) {
        let mut state = self.lock();
        state.gates.retain(|gate| gate.strong_count() > 0);
        state.gates.push(Arc::downgrade(gate));
        if state.run != RunState::Running {
            state.closed.push(gate.shut());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_gates_close_and_open_together_and_a_new_one_with_them() {
        let machine = Machine::default();
        let (old, new) = (Arc::new(Gate::default()), Arc::new(Gate::default()));
        machine.admit(&old);
        assert!(!machine.untold_stop());
        machine.stop(RunState::IoError);
        machine.stop(RunState::Paused);
        assert_eq!(machine.state(), RunState::IoError);
        machine.admit(&new);
        assert!(old.is_closed() && new.is_closed());
        assert!(machine.untold_stop());
        assert!(!machine.untold_stop());
        assert!(machine.go_on());
        assert!(!old.is_closed() && !new.is_closed());
        assert!(!machine.go_on());
        machine.stop(RunState::Paused);
        assert!(!machine.go_on(), "nobody has been told of this one");
    }
}
