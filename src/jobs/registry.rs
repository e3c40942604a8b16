//! The jobs of the process: the machine, and the tasks that carry out what it says.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use block::error::{Error, ErrorKind, Result};
use block::graph::{ErrorAction, IoStatus};
use block::io::{InlineThread, IoThreads};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::context::{JobContext, Operation, Orders, Shared};
use super::driver::JobDriver;
use super::graph::GraphAccess;
use super::machine::{
    Audience, Cancel, Effect, GroupKey, JobKey, JobKind, JobSpec, Machine, Notice,
};
use super::state::Status;
use super::task::{self, Instruction};
use crate::limits;

/// What a job's task tells the control loop, which passes it to [`Jobs::apply`].
#[derive(Debug)]
pub struct JobReport {
    pub(super) key: JobKey,
    pub(super) report: Report,
}

#[derive(Debug)]
pub(super) enum Report {
    /// The work is held, as the pause of this number wanted.
    Paused(u64),
    /// All is done but the last step.
    Ready,
    /// An I/O error. The work goes on when it was seen.
    IoError {
        operation: Operation,
        action: ErrorAction,
        reason: IoStatus,
        seen: oneshot::Sender<()>,
    },
    /// The work is over.
    Ran(std::result::Result<(), String>),
    /// What can fail of the end was done.
    Prepared(std::result::Result<(), String>),
    /// The end, and all is cleaned up.
    Finished,
}

/// Something that clients are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobEvent {
    /// The job's id.
    pub id: String,
    /// What it does.
    pub kind: JobKind,
    /// What has happened.
    pub notice: Notice,
    /// How far it was.
    pub progress: Progress,
}

/// How far a job is, in units of its kind: bytes for block jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// What is done. Never less than before.
    pub offset: u64,
    /// What will be done when all is; may change.
    pub len: u64,
    /// What may be done in a second; 0 for no limit.
    pub speed: u64,
}

/// What queries show of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobInfo {
    /// What the client said, with the speed as it is now.
    pub spec: JobSpec,
    /// Where it is.
    pub status: Status,
    /// How far it is.
    pub progress: Progress,
    /// Its work does something now.
    pub busy: bool,
    /// The user or an error holds it, or will when its work can be held.
    pub paused: bool,
    /// How its I/O is.
    pub io_status: IoStatus,
    /// Why it has failed.
    pub error: Option<String>,
    /// When it was made, in seconds since 1970.
    pub started_at: u64,
    /// What was done in a second, of late.
    pub rate: u64,
    /// Seconds until all is done if it goes on like this; only where that can be said.
    pub time_left: Option<u64>,
}

/// A job's task, and what is shared with it.
struct Handle {
    spec: JobSpec,
    shared: Arc<Shared>,
    task: Option<Task>,
}

struct Task {
    instructions: mpsc::UnboundedSender<Instruction>,
    handle: JoinHandle<()>,
}

impl Drop for Task {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

/// All jobs. Belongs to the control loop.
pub struct Jobs {
    machine: Machine,
    handles: HashMap<JobKey, Handle>,
    reports: mpsc::UnboundedSender<JobReport>,
    graph: Arc<dyn GraphAccess>,
    threads: IoThreads,
    events: Vec<JobEvent>,
}

impl Jobs {
    /// None yet. Their tasks report to `reports`: some messages per job, which waits for an answer to most. They reach the graph
    /// by `graph`.
    pub fn new(reports: mpsc::UnboundedSender<JobReport>, graph: Arc<dyn GraphAccess>) -> Self {
        Jobs {
            machine: Machine::default(),
            handles: HashMap::new(),
            reports,
            graph,
            threads: IoThreads::for_this_machine("copy", InlineThread::Copies),
            events: Vec::new(),
        }
    }

    /// How the work of a job reaches the graph.
    pub fn graph(&self) -> Arc<dyn GraphAccess> {
        self.graph.clone()
    }

    /// Where the work of jobs that copy much is done.
    pub fn threads(&self) -> IoThreads {
        self.threads.clone()
    }

    /// What clients are to be told since the last call.
    pub fn take_events(&mut self) -> Vec<JobEvent> {
        std::mem::take(&mut self.events)
    }

    /// Whether there is no job.
    pub fn is_empty(&self) -> bool {
        self.handles.is_empty()
    }

    /// A group for jobs that are yet to be made and end together.
    pub fn new_group(&mut self) -> GroupKey {
        self.machine.new_group()
    }

    /// Makes a job, in a group or alone. Whoever makes it starts or abandons it.
    pub fn create(
        &mut self,
        spec: JobSpec,
        group: Option<GroupKey>,
        audience: Audience,
    ) -> Result<JobKey> {
        if self.handles.len() >= limits::JOBS {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("There are {} jobs and can be no more", limits::JOBS),
            ));
        }
        let shared = Arc::new(Shared::new(spec.speed, spec.len));
        let key = self.machine.create(spec.clone(), group, audience)?;
        let handle = Handle {
            spec,
            shared,
            task: None,
        };
        self.handles.insert(key, handle);
        self.carry_out();
        Ok(key)
    }

    /// Begins with the work of a job that was made.
    pub fn start(&mut self, key: JobKey, driver: Box<dyn JobDriver>) {
        let Some(handle) = self.handles.get_mut(&key) else {
            return;
        };
        let cx = JobContext::new(key, handle.shared.clone(), self.reports.clone());
        let (instructions, orders) = mpsc::unbounded_channel();
        handle.task = Some(Task {
            instructions,
            handle: tokio::spawn(task::follow(driver, cx, orders)),
        });
        self.machine.start(key);
        self.carry_out();
    }

    /// A job that was made is not going to be started.
    pub fn abandon(&mut self, key: JobKey) {
        self.machine.abandon(key);
        self.carry_out();
    }

    /// The job of this id.
    pub fn find(&self, id: &str) -> Result<JobKey> {
        let not_found = || Error::new(ErrorKind::NotFound, "Job not found");
        self.machine.find(id).ok_or_else(not_found)
    }

    /// As [`Jobs::find`], among block jobs only.
    pub fn find_block_job(&self, id: &str) -> Result<JobKey> {
        let key = self.machine.find(id);
        let is_block_job = |key: &JobKey| {
            let job = self.machine.get(*key);
            job.is_some_and(|job| job.spec.kind.is_block_job())
        };
        key.filter(is_block_job).ok_or_else(|| {
            let text = format!("Block job '{id}' not found");
            Error::new(ErrorKind::NotFound, text)
        })
    }

    /// Holds a job.
    pub fn pause(&mut self, key: JobKey) -> Result<()> {
        self.verb(|machine| machine.pause(key))
    }

    /// Lets a job go on.
    pub fn resume(&mut self, key: JobKey) -> Result<()> {
        self.verb(|machine| machine.resume(key))
    }

    /// Ends a job.
    pub fn cancel(&mut self, key: JobKey, how: Cancel) -> Result<()> {
        self.verb(|machine| machine.cancel(key, how))
    }

    /// Makes a ready job do its last step.
    pub fn complete(&mut self, key: JobKey) -> Result<()> {
        self.verb(|machine| machine.complete(key))
    }

    /// Lets a pending job conclude, with its group.
    pub fn finalize(&mut self, key: JobKey) -> Result<()> {
        self.verb(|machine| machine.finalize(key))
    }

    /// Forgets a concluded job.
    pub fn dismiss(&mut self, key: JobKey) -> Result<()> {
        self.verb(|machine| machine.dismiss(key))
    }

    /// Changes how fast a job may be. Negative speeds come from clients.
    pub fn set_speed(&mut self, key: JobKey, speed: i64) -> Result<()> {
        let negative = |_| {
            Error::new(
                ErrorKind::InvalidInput,
                "Parameter 'speed' expects a non-negative value",
            )
        };
        // A job that takes no speed takes no wrong one either.
        self.machine.check(key, super::Verb::SetSpeed)?;
        let speed = u64::try_from(speed).map_err(negative)?;
        self.machine.set_speed(key, speed)?;
        self.order(key, |orders| orders.speed = speed);
        Ok(())
    }

    /// Whether the user or an error holds a job.
    pub fn is_held(&self, key: JobKey) -> bool {
        self.machine.get(key).is_some_and(|job| job.is_held())
    }

    /// Errors are forgotten, as the machine goes on. What they hold stays held.
    pub fn reset_io_status(&mut self) {
        self.machine.reset_io_status();
    }

    /// Ends all jobs, whatever their states: for the end of the daemon. They are gone when [`Jobs::is_empty`].
    pub fn end_all(&mut self) {
        let keys: Vec<JobKey> = self.machine.list().map(|(key, _)| key).collect();
        for key in keys {
            self.machine.end(key);
        }
        self.carry_out();
    }

    /// Those that clients know of, the newest first.
    pub fn list(&self) -> Vec<JobInfo> {
        let known = self.machine.list().filter(|(_, job)| job.is_known());
        let infos = known.filter_map(|(key, job)| {
            let handle = self.handles.get(&key)?;
            let progress = handle.progress(job.spec.speed);
            let is_running = job.status == Status::Running;
            // One that is held does nothing, whatever it did a moment ago.
            let rate = match job.status {
                Status::Running | Status::Ready => handle.shared.rate(),
                _ => 0,
            };
            let left = progress.len.saturating_sub(progress.offset);
            let since_1970 = handle.shared.created.duration_since(UNIX_EPOCH);
            Some(JobInfo {
                spec: job.spec.clone(),
                status: job.status,
                progress,
                busy: is_running && !handle.shared.is_idle(),
                paused: job.is_held(),
                io_status: job.io_status,
                error: job.failure.clone(),
                started_at: since_1970.unwrap_or_default().as_secs(),
                rate,
                time_left: time_left(left, rate).filter(|_| is_running),
            })
        });
        infos.collect()
    }

    /// A job's task has something to tell.
    pub fn apply(&mut self, report: JobReport) {
        let JobReport { key, report } = report;
        let machine = &mut self.machine;
        match report {
            Report::Paused(pause) => machine.paused(key, pause),
            Report::Ready => machine.ready(key),
            Report::IoError {
                operation,
                action,
                reason,
                seen,
            } => {
                machine.io_error(key, (operation, action), reason);
                self.carry_out();
                let _ = seen.send(());
            }
            Report::Ran(result) => machine.ran(key, result),
            Report::Prepared(result) => machine.prepared(key, result),
            Report::Finished => machine.finished(key),
        }
        self.carry_out();
    }

    fn verb(&mut self, verb: impl FnOnce(&mut Machine) -> Result<()>) -> Result<()> {
        let done = verb(&mut self.machine);
        self.carry_out();
        done
    }

    fn order(&self, key: JobKey, change: impl FnOnce(&mut Orders)) {
        if let Some(handle) = self.handles.get(&key) {
            handle.shared.orders.send_modify(change);
        }
    }

    fn instruct(&self, key: JobKey, instruction: Instruction) {
        let task = self
            .handles
            .get(&key)
            .and_then(|handle| handle.task.as_ref());
        if let Some(task) = task {
            // It ends behind its last instruction only.
            let _ = task.instructions.send(instruction);
        }
    }

    /// Does what the machine has left to do.
    fn carry_out(&mut self) {
        for effect in self.machine.take_effects() {
            match effect {
                Effect::Tell(key, notice) => self.tell(key, notice),
                Effect::Run(key) => self.instruct(key, Instruction::Run),
                Effect::Pause(key, pause) => self.order(key, |orders| orders.pause = Some(pause)),
                Effect::Resume(key) => self.order(key, |orders| orders.pause = None),
                Effect::Cancel(key, how) => self.order(key, |orders| orders.cancel = Some(how)),
                Effect::Complete(key) => self.order(key, |orders| orders.complete = true),
                Effect::Prepare(key) => self.instruct(key, Instruction::Prepare),
                Effect::Commit(key) => self.instruct(key, Instruction::Commit),
                Effect::Abort(key) => self.instruct(key, Instruction::Abort),
                Effect::Forget(key) => drop(self.handles.remove(&key)),
            }
        }
    }

    fn tell(&mut self, key: JobKey, notice: Notice) {
        let Some(handle) = self.handles.get(&key) else {
            return;
        };
        let speed = handle.shared.orders.borrow().speed;
        self.events.push(JobEvent {
            id: handle.spec.id.clone(),
            kind: handle.spec.kind,
            notice,
            progress: handle.progress(speed),
        });
    }
}

impl Handle {
    fn progress(&self, speed: u64) -> Progress {
        let (offset, len) = self.shared.progress();
        Progress { offset, len, speed }
    }
}

impl std::fmt::Debug for Jobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Jobs")
            .field("jobs", &self.handles.len())
            .finish_non_exhaustive()
    }
}

/// The seconds that so much takes at a rate, begun ones counted; none where nothing moves.
fn time_left(left: u64, rate: u64) -> Option<u64> {
    (rate > 0).then(|| left.div_ceil(rate))
}

#[cfg(test)]
mod tests;
