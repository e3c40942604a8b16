//! The control loop: waits for one event, applies it, and does so until the daemon is to stop.
//!
//! ```text
//!   monitors --Command--> +--------+ --spawns--> handler (one at a time)
//!   handler  --Commit---> | select |                |
//!   handler  --Ended----> | apply  | <--------------+
//!   exports  --Export---> |        |
//!   nodes    --Node-----> +--------+
//!   system   --Signal--------^
//! ```
//!
//! `select` may wait, `apply` may not. Guest I/O never comes by here.

use block::events::NodeEvent;
use qapi::rt::{QmpError, Value};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinError, JoinHandle};

use super::control::{Control, StopCause};
use super::cx::{Commit, ControlHandle, Cx, internal_error};
use super::service::{self, Queued};
use crate::exports::ExportEvent;

/// All that can happen to the control state.
#[derive(Debug)]
pub(super) enum Event {
    /// A client's command is next.
    Command(Queued),
    /// The running handler wants to look at the state or change it.
    Commit(Commit),
    /// The running handler has ended.
    Ended(Result<Result<Value, QmpError>, JoinError>),
    /// An export has something to tell.
    Export(ExportEvent),
    /// Something has happened to a node.
    Node(NodeEvent),
    /// The system wants the daemon to end.
    Signal,
}

/// What is left when the loop has ended.
pub(super) struct Finished {
    /// The state, to be taken apart.
    pub(super) control: Control,
    /// Exports that end from now on report here.
    pub(super) exports: mpsc::UnboundedReceiver<ExportEvent>,
    /// What happens to nodes until they are closed.
    pub(super) nodes: mpsc::Receiver<NodeEvent>,
    /// Whether the command line could be followed.
    pub(super) startup: Result<(), QmpError>,
}

/// The receiving ends of what the loop waits for.
pub(super) struct Inputs {
    pub(super) commands: mpsc::Receiver<Queued>,
    pub(super) commits: mpsc::Receiver<Commit>,
    pub(super) exports: mpsc::UnboundedReceiver<ExportEvent>,
    pub(super) nodes: mpsc::Receiver<NodeEvent>,
    pub(super) signals: Signals,
}

/// The handler that runs, and who waits for it.
struct Slot {
    task: JoinHandle<Result<Value, QmpError>>,
    /// `None` for the start-up, which nobody asked for over a socket.
    reply: Option<oneshot::Sender<Result<Value, QmpError>>>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The owner of the control state.
pub(super) struct ControlLoop {
    control: Control,
    inputs: Inputs,
    handle: ControlHandle,
    slot: Option<Slot>,
    startup: Option<QmpError>,
}

impl ControlLoop {
    pub(super) fn new(control: Control, inputs: Inputs, handle: ControlHandle) -> Self {
        ControlLoop {
            control,
            inputs,
            handle,
            slot: None,
            startup: None,
        }
    }

    /// Follows `startup`, then commands, until something stops the daemon.
    pub(super) async fn run(
        mut self,
        startup: impl Future<Output = Result<(), QmpError>> + Send + 'static,
    ) -> Finished {
        self.slot = Some(Slot {
            task: tokio::spawn(async { startup.await.map(|()| Value::Null) }),
            reply: None,
        });
        while self.control.stop_cause().is_none() || self.slot.is_some() {
            let event = self.select().await;
            log::trace!("{event:?}");
            self.apply(event);
        }
        Finished {
            control: self.control,
            exports: self.inputs.exports,
            nodes: self.inputs.nodes,
            startup: self.startup.map_or(Ok(()), Err),
        }
    }

    /// Waits for the next event. Commits and exports come before the end of the handler that caused them.
    async fn select(&mut self) -> Event {
        let is_idle = self.slot.is_none();
        let ended = async {
            match &mut self.slot {
                Some(slot) => (&mut slot.task).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.inputs.signals.next() => Event::Signal,
            Some(commit) = self.inputs.commits.recv() => Event::Commit(commit),
            Some(event) = self.inputs.exports.recv() => Event::Export(event),
            Some(event) = self.inputs.nodes.recv() => Event::Node(event),
            ended = ended => Event::Ended(ended),
            Some(queued) = self.inputs.commands.recv(), if is_idle => Event::Command(queued),
        }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Command(queued) => {
                let cx = Cx::new(self.handle.clone(), queued.session);
                self.slot = Some(Slot {
                    task: tokio::spawn(service::run(cx, queued.request)),
                    reply: Some(queued.reply),
                });
            }
            Event::Commit(Commit(change)) => change(&mut self.control),
            Event::Ended(ended) => self.ended(ended),
            Event::Export(ExportEvent::Closed { id }) => self.control.export_closed(&id),
            Event::Node(event) => self.control.node_event(event),
            Event::Signal => {
                if self.control.stop_cause().is_some() {
                    // The second one: whoever sends it does not want to wait for the running command.
                    log::warn!("second signal: not waiting for the running command");
                    self.slot = None;
                }
                self.control.stop(StopCause::Signal);
            }
        }
    }

    fn ended(&mut self, ended: Result<Result<Value, QmpError>, JoinError>) {
        let Some(mut slot) = self.slot.take() else {
            return;
        };
        let result = ended.unwrap_or_else(|error| {
            log::error!("a handler failed: {error}");
            Err(internal_error())
        });
        match slot.reply.take() {
            // A client that has hung up does not take its answer.
            Some(reply) => drop(reply.send(result)),
            None => {
                if let Err(error) = result {
                    self.startup = Some(error);
                    self.control.stop(StopCause::StartFailed);
                }
            }
        }
    }
}

/// SIGINT, SIGTERM and SIGHUP.
pub(super) struct Signals([Signal; 3]);

impl Signals {
    /// Takes the signals over; from now on they do not kill.
    pub(super) fn take() -> std::io::Result<Self> {
        Ok(Signals([
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        ]))
    }

    /// Waits for one. Nothing is lost when the future is dropped.
    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests;
