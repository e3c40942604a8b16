//! The control loop: waits for one event, applies it, and does so until the daemon is to stop.
//!
//! ```text
//!   monitors --Command--> +--------+ --spawns--> handler (one at a time)
//!   handler  --Commit---> | select |                |
//!   queries  --Commit---> |        |                |
//!   handler  --Ended----> | apply  | <--------------+
//!   exports  --Export---> |        |
//!   jobs     --Job------> |        |
//!   jobs     --Errand---> |        | --spawns--> as a handler
//!   nodes    --Node-----> +--------+
//!   system   --Signal--------^
//! ```
//!
//! `select` may wait, `apply` may not. Guest I/O never comes by here.
//!
//! What changes the state stands in line. Queries do not: they run in the tasks of their sessions, and come by to look. They see what
//! there is between two commits of the handler. Neither can keep the other waiting: a session has one command under way, and who comes
//! next is drawn.

use block::events::NodeEvent;
use qapi::rt::{QmpError, Value};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::Instant;

use super::control::{Control, StopCause};
use super::cx::{Commit, ControlHandle, Cx, internal_error};
use super::jobs::Errand;
use super::service::{self, Queued};
use crate::exports::ExportEvent;
use crate::jobs::JobReport;
use crate::limits;
use crate::monitor::Session;

/// All that can happen to the control state.
#[derive(Debug)]
pub(super) enum Event {
    /// A client's command is next.
    Command(Queued),
    /// A handler wants to look at the state or change it.
    Commit(Commit),
    /// The running handler has ended.
    Ended(Result<Result<Value, QmpError>, JoinError>),
    /// An export has something to tell.
    Export(ExportEvent),
    /// A job's task has something to tell.
    Job(JobReport),
    /// A job wants to do something that stands in line with commands.
    Errand(Errand),
    /// Something has happened to a node.
    Node(NodeEvent),
    /// The system wants the daemon to end.
    Signal,
    /// Jobs have had their time to end with the daemon.
    Overdue,
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
    /// Commits of commands that run beside the handler.
    pub(super) beside: mpsc::Receiver<Commit>,
    pub(super) exports: mpsc::UnboundedReceiver<ExportEvent>,
    pub(super) jobs: mpsc::UnboundedReceiver<JobReport>,
    pub(super) errands: mpsc::Receiver<Errand>,
    pub(super) nodes: mpsc::Receiver<NodeEvent>,
    pub(super) signals: Signals,
}

/// The handler that runs, and who waits for it.
struct Slot {
    task: JoinHandle<Result<Value, QmpError>>,
    asker: Asker,
}

enum Asker {
    /// A client, who waits for the answer.
    Client(oneshot::Sender<Result<Value, QmpError>>),
    /// Whoever started the daemon.
    Startup,
    /// A job, which is told in its own way.
    Job,
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
    /// When the daemon ends without the jobs that are left; once it is to end.
    deadline: Option<Instant>,
}

impl ControlLoop {
    pub(super) fn new(control: Control, inputs: Inputs, handle: ControlHandle) -> Self {
        ControlLoop {
            control,
            inputs,
            handle,
            slot: None,
            startup: None,
            deadline: None,
        }
    }

    /// Follows `startup`, then commands, until something stops the daemon.
    pub(super) async fn run(
        mut self,
        startup: impl Future<Output = Result<(), QmpError>> + Send + 'static,
    ) -> Finished {
        self.slot = Some(Slot {
            task: tokio::spawn(async { startup.await.map(|()| Value::Null) }),
            asker: Asker::Startup,
        });
        while !self.is_at_its_end() {
            let event = self.select().await;
            log::trace!("{event:?}");
            self.apply(event);
            self.control.tell_of_jobs();
        }
        Finished {
            control: self.control,
            exports: self.inputs.exports,
            nodes: self.inputs.nodes,
            startup: self.startup.map_or(Ok(()), Err),
        }
    }

    /// Whether the command line is still being followed: clients wait until there is what they are going to ask for.
    fn is_starting(&self) -> bool {
        let slot = self.slot.as_ref();
        slot.is_some_and(|slot| matches!(slot.asker, Asker::Startup))
    }

    /// Whether the daemon is to stop, and can: the running command has ended, then the jobs.
    fn is_at_its_end(&mut self) -> bool {
        if self.control.stop_cause().is_none() {
            return false;
        }
        if self
            .slot
            .as_ref()
            .is_some_and(|slot| !matches!(slot.asker, Asker::Job))
        {
            return false;
        }
        self.control.jobs.end_all();
        self.control.tell_of_jobs();
        let jobs = self.control.jobs.list();
        let grace = || Instant::now() + limits::JOB_STOP_GRACE;
        let is_overdue = *self.deadline.get_or_insert_with(grace) <= Instant::now();
        if is_overdue {
            for job in &jobs {
                log::warn!("job '{}' does not end: ending without it", job.spec.id);
            }
        }
        is_overdue || (self.control.jobs.is_empty() && self.slot.is_none())
    }

    /// Waits for the next event. Commits and exports come before the end of the handler that caused them.
    async fn select(&mut self) -> Event {
        let is_idle = self.slot.is_none();
        let is_open = is_idle && self.control.stop_cause().is_none();
        let is_up = !self.is_starting();
        let deadline = self.deadline;
        let overdue = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let ended = async {
            match &mut self.slot {
                Some(slot) => (&mut slot.task).await,
                None => std::future::pending().await,
            }
        };
        let next = async {
            tokio::select! {
                Some(queued) = self.inputs.commands.recv(), if is_open => Event::Command(queued),
                Some(commit) = self.inputs.beside.recv(), if is_up => Event::Commit(commit),
                else => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.inputs.signals.next() => Event::Signal,
            Some(commit) = self.inputs.commits.recv() => Event::Commit(commit),
            Some(event) = self.inputs.exports.recv() => Event::Export(event),
            Some(report) = self.inputs.jobs.recv() => Event::Job(report),
            Some(event) = self.inputs.nodes.recv() => Event::Node(event),
            ended = ended => Event::Ended(ended),
            Some(errand) = self.inputs.errands.recv(), if is_idle => Event::Errand(errand),
            event = next => event,
            () = overdue => Event::Overdue,
        }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Command(queued) => {
                let cx = Cx::new(self.handle.clone(), queued.session);
                self.slot = Some(Slot {
                    task: tokio::spawn(service::run(cx, queued.request)),
                    asker: Asker::Client(queued.reply),
                });
            }
            Event::Errand(Errand(errand)) => {
                let cx = Cx::new(self.handle.clone(), Session::new(&[]));
                let task = errand(cx);
                self.slot = Some(Slot {
                    task: tokio::spawn(async { task.await.map(|()| Value::Null) }),
                    asker: Asker::Job,
                });
            }
            Event::Commit(Commit(change)) => change(&mut self.control),
            Event::Ended(ended) => self.ended(ended),
            Event::Export(ExportEvent::Closed { id }) => self.control.export_closed(&id),
            Event::Job(report) => self.control.jobs.apply(report),
            Event::Node(event) => self.control.node_event(event),
            Event::Overdue => {}
            Event::Signal => {
                if self.control.stop_cause().is_some() {
                    // The second one: whoever sends it does not want to wait for the running command.
                    log::warn!("second signal: not waiting for the running command or jobs");
                    self.slot = None;
                    self.deadline = Some(Instant::now());
                }
                self.control.stop(StopCause::Signal);
            }
        }
    }

    fn ended(&mut self, ended: Result<Result<Value, QmpError>, JoinError>) {
        let Some(mut slot) = self.slot.take() else {
            return;
        };
        let asker = std::mem::replace(&mut slot.asker, Asker::Job);
        let result = ended.unwrap_or_else(|error| {
            log::error!("a handler failed: {error}");
            Err(internal_error())
        });
        match (asker, result) {
            // A client that has hung up does not take its answer.
            (Asker::Client(reply), result) => drop(reply.send(result)),
            (Asker::Startup, Err(error)) => {
                self.startup = Some(error);
                self.control.stop(StopCause::StartFailed);
            }
            (Asker::Job, Err(error)) => {
                log::error!("a job's change of the graph failed: {error:?}")
            }
            (Asker::Startup | Asker::Job, Ok(_)) => {}
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
