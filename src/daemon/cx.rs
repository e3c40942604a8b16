//! What a handler is given: the way to the control state, and the session that asks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use qapi::rt::QmpError;
use qapi::types::QMPCapability;
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::control::Control;
use crate::limits;
use crate::monitor::{Capability, Session};

/// What a handler acts on. It may await whatever it likes, and sees the control state in its looks and commits only.
#[derive(Debug, Clone)]
pub struct Cx {
    control: ControlHandle,
    session: Session,
    rights: Rights,
}

/// What a handler may do to the control state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rights {
    /// Look at it.
    Look,
    /// Change it, too.
    Change,
}

impl Cx {
    pub(super) fn new(control: ControlHandle, session: Session) -> Self {
        Cx {
            control,
            session,
            rights: Rights::Change,
        }
    }

    /// The context of a query.
    pub(super) fn looking(control: ControlHandle, session: Session) -> Self {
        Cx {
            control,
            session,
            rights: Rights::Look,
        }
    }

    #[cfg(test)]
    pub(super) fn as_query(&self) -> Self {
        Cx::looking(self.control.clone(), self.session.clone())
    }

    /// A context whose daemon is at its end: arguments are checked, and every commit fails. For fuzzing.
    pub fn detached(session: Session) -> Self {
        let (handle, _) = mpsc::channel(1);
        Cx::new(ControlHandle::new(handle), session)
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
    /// the next. Fails with what `change` fails with, when the daemon is ending, and in queries.
    pub async fn commit<R, F>(&self, change: F) -> Result<R, QmpError>
    where
        R: Send + 'static,
        F: FnOnce(&mut Control) -> Result<R, QmpError> + Send + 'static,
    {
        if self.rights == Rights::Look {
            // Nobody has waited for the command that is under way.
            log::error!("a query wants to change something");
            return Err(internal_error());
        }
        self.on_the_loop(change).await
    }

    /// Shows the state to `look`, on the control loop: as it is between two commits of whatever is under way.
    ///
    /// In a query, events of what happens from now on come behind the answer, and all that there have been before it: what a
    /// client is told last is what is so. Fails when the daemon is ending.
    pub async fn look<R, F>(&self, look: F) -> Result<R, QmpError>
    where
        R: Send + 'static,
        F: FnOnce(&Control) -> R + Send + 'static,
    {
        let session = (self.rights == Rights::Look).then(|| self.session.clone());
        self.on_the_loop(move |control| {
            // What guests' requests have done by themselves may not have been told yet.
            control.tell_of_machine();
            if let Some(session) = session {
                session.hold_events();
            }
            Ok(look(control))
        })
        .await
    }

    /// Waits for a place on the loop, behind those who came before. Fails when the daemon is ending.
    pub(super) async fn arrive(&self) -> Result<(), QmpError> {
        self.on_the_loop(|_| Ok(())).await
    }

    /// Does what takes the processor's time, or asks the kernel, where nobody else waits for it but others who do the same.
    pub(crate) async fn apart<R, F>(&self, work: F) -> Result<R, QmpError>
    where
        R: Send + 'static,
        F: FnOnce() -> R + Send + 'static,
    {
        // Never closed.
        let place = self.control.apart.clone().acquire_owned().await.ok();
        let done = tokio::task::spawn_blocking(move || {
            let _place = place;
            work()
        });
        done.await.map_err(|_| internal_error())
    }

    async fn on_the_loop<R, F>(&self, change: F) -> Result<R, QmpError>
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
        if self.control.commits.send(commit).await.is_err() {
            return Err(ending());
        }
        answered.await.unwrap_or_else(|_| Err(ending()))
    }
}

/// Sends commits to the loop.
#[derive(Debug, Clone)]
pub(super) struct ControlHandle {
    commits: mpsc::Sender<Commit>,
    /// Places for what is done [`Cx::apart`].
    apart: Arc<Semaphore>,
}

impl ControlHandle {
    pub(super) fn new(commits: mpsc::Sender<Commit>) -> Self {
        ControlHandle {
            commits,
            apart: Arc::new(Semaphore::new(limits::LONG_ANSWERS)),
        }
    }
}

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
