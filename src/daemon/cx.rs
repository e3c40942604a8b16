//! What a handler is given: the way to the control state, and the session that asks.

use std::panic::{AssertUnwindSafe, catch_unwind};

use qapi::rt::QmpError;
use qapi::types::QMPCapability;
use tokio::sync::{mpsc, oneshot};

use super::control::Control;
use crate::monitor::{Capability, Session};

/// What a handler acts on. It may await whatever it likes, and sees the control state in its commits only.
#[derive(Debug, Clone)]
pub struct Cx {
    control: ControlHandle,
    session: Session,
}

impl Cx {
    pub(super) fn new(control: ControlHandle, session: Session) -> Self {
        Cx { control, session }
    }

    /// A context whose daemon is at its end: arguments are checked, and every commit fails. For fuzzing.
    pub fn detached(session: Session) -> Self {
        let (handle, _) = mpsc::channel(1);
        Cx::new(ControlHandle(handle), session)
    }

    /// Ends the negotiation of the client's session.
    pub fn negotiate(&self, enable: &[QMPCapability]) -> Result<(), QmpError> {
        let capability = |name: &QMPCapability| match name {
            QMPCapability::Oob => Capability::Oob,
        };
        let enable: Vec<Capability> = enable.iter().map(capability).collect();
        self.session.negotiate(&enable)
    }

    /// Runs `change` on the control loop, where it has the state to itself and cannot wait.
    ///
    /// Other events may come between two commits of a handler: what was looked up in one must be looked up again in
    /// the next. Fails with what `change` fails with, and when the daemon is ending.
    pub async fn commit<R, F>(&self, change: F) -> Result<R, QmpError>
    where
        R: Send + 'static,
        F: FnOnce(&mut Control) -> Result<R, QmpError> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let commit = Commit(Box::new(move |control| {
            // A handler that panics must not take the loop and with it every other disk down.
            let result = catch_unwind(AssertUnwindSafe(|| change(control)))
                .unwrap_or_else(|_| Err(internal_error()));
            // Nobody waits any more when the handler was dropped at shutdown.
            let _ = answer.send(result);
        }));
        if self.control.0.send(commit).await.is_err() {
            return Err(ending());
        }
        answered.await.unwrap_or_else(|_| Err(ending()))
    }
}

/// Sends commits to the loop.
#[derive(Debug, Clone)]
pub(super) struct ControlHandle(pub(super) mpsc::Sender<Commit>);

/// A change to the control state, on its way to the loop.
pub(super) struct Commit(pub(super) Box<dyn FnOnce(&mut Control) + Send>);

impl std::fmt::Debug for Commit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Commit")
    }
}

/// The answer to a command when the daemon is at its end.
pub(super) fn ending() -> QmpError {
    QmpError::generic("The daemon is shutting down")
}

/// The answer to a command whose handler failed where it should not. The panic's text is in the log.
pub(crate) fn internal_error() -> QmpError {
    QmpError::generic("Internal error, see the daemon's log")
}
