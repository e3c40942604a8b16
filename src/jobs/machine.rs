//! All jobs of the process as plain state: no clocks, no tasks, no I/O.
//!
//! Every call is something that has happened: a client's verb, or a report of a job's work. It changes states and leaves
//! [`Effect`]s, in order, for whoever runs the jobs: what clients are told, and what the work has to do next.
//!
//! Jobs end in groups; most are alone in theirs. When all members' work is over without an error they become pending, are
//! prepared one after another, and then committed one after another. The first that fails or is cancelled takes the
//! others with it: their work is cancelled, and when all of it is over each is aborted. The newest member comes first in
//! all of this, as in QEMU.

mod groups;

use std::collections::{BTreeMap, HashMap};

use block::error::{Error, ErrorKind, Result};
use block::graph::{ErrorAction, IoStatus, is_well_formed};

use super::context::Operation;
use super::state::{Status, Verb};
use groups::{Group, Phase};

/// What a job is called between the registry and its work. Never used twice, and in the order of creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobKey(u64);

/// Jobs that end together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupKey(u64);

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum JobKind {
    /// Copies a disk as it is at one moment.
    Backup,
    /// Makes an image.
    Create,
}

impl JobKind {
    /// Whether clients see it among block jobs, with their verbs and events.
    pub fn is_block_job(self) -> bool {
        match self {
            JobKind::Backup => true,
            JobKind::Create => false,
        }
    }
}

/// What a client says of a job when it is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobSpec {
    /// Its id.
    pub id: String,
    /// What it does.
    pub kind: JobKind,
    /// How fast it may be at first, in units of progress (bytes for block jobs) per second. 0: as fast as it can.
    pub speed: u64,
    /// What will be done when all is, as far as that is known.
    pub len: u64,
    /// Whether it concludes without the user's word.
    pub auto_finalize: bool,
    /// Whether it is forgotten when it has concluded.
    pub auto_dismiss: bool,
}

/// Who is told of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// All clients.
    Clients,
    /// Nobody: it is a trial, made to see whether it can be, and abandoned.
    Nobody,
}

/// How a job that is cancelled ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancel {
    /// As it likes: a ready job may complete without its last step.
    Soft,
    /// At once.
    Force,
}

/// Something for whoever runs the jobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Tell clients.
    Tell(JobKey, Notice),
    /// Begin with the work.
    Run(JobKey),
    /// Hold the work; it reports `paused` with this number.
    Pause(JobKey, u64),
    /// Let the work go on.
    Resume(JobKey),
    /// End the work.
    Cancel(JobKey, Cancel),
    /// Do the last step of a ready job.
    Complete(JobKey),
    /// Do what can fail of the end.
    Prepare(JobKey),
    /// Make the end final, and clean up.
    Commit(JobKey),
    /// Take back, and clean up.
    Abort(JobKey),
    /// The job does not exist any more.
    Forget(JobKey),
}

/// What clients are told of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// It has another state.
    Status(Status),
    /// It is ready.
    Ready,
    /// It waits for the user's word.
    Pending,
    /// It has ended, with an error if there is one.
    Completed(Option<String>),
    /// It was cancelled.
    Cancelled,
    /// An I/O error, and what is done about it.
    Error(Operation, ErrorAction),
}

/// A job.
#[derive(Debug, Clone)]
pub struct Job {
    /// What the client said.
    pub spec: JobSpec,
    /// Where it is.
    pub status: Status,
    /// Why it fails, if it does.
    pub failure: Option<String>,
    /// How its I/O is.
    pub io_status: IoStatus,
    group: GroupKey,
    audience: Audience,
    /// There is a task that carries out its instructions.
    has_task: bool,
    /// Its work was begun.
    started: bool,
    /// Held by the user or by an error; the work may not know yet.
    held: bool,
    /// The number of the last pause: reports about earlier ones count for nothing.
    pause: u64,
    /// It is to end at once.
    cancelled: bool,
    /// It was asked to end as it likes.
    soft_cancelled: bool,
    /// Nothing can change how it ends any more.
    is_finishing: bool,
}

impl Job {
    fn new(spec: JobSpec, group: GroupKey, audience: Audience) -> Self {
        Job {
            spec,
            status: Status::Created,
            failure: None,
            io_status: IoStatus::Ok,
            group,
            audience,
            has_task: false,
            started: false,
            held: false,
            pause: 0,
            cancelled: false,
            soft_cancelled: false,
            is_finishing: false,
        }
    }

    /// Whether clients know of it.
    pub fn is_known(&self) -> bool {
        self.audience == Audience::Clients
    }

    /// Whether the user or an error holds it, also when its work has not stopped yet.
    pub fn is_held(&self) -> bool {
        self.held
    }
}

/// All jobs.
#[derive(Debug, Default)]
pub struct Machine {
    jobs: BTreeMap<JobKey, Job>,
    ids: HashMap<String, JobKey>,
    groups: BTreeMap<GroupKey, Group>,
    last: u64,
    effects: Vec<Effect>,
}

const CANCELLED: &str = "Operation canceled";

impl Machine {
    /// What has been left to do since the last call.
    pub fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// The job of this id, unless it is a trial.
    pub fn find(&self, id: &str) -> Option<JobKey> {
        let key = self.ids.get(id).copied();
        key.filter(|key| self.jobs.get(key).is_some_and(Job::is_known))
    }

    /// A job that there is.
    pub fn get(&self, key: JobKey) -> Option<&Job> {
        self.jobs.get(&key)
    }

    /// All of them, the newest first.
    pub fn list(&self) -> impl Iterator<Item = (JobKey, &Job)> {
        self.jobs.iter().rev().map(|(key, job)| (*key, job))
    }

    /// A group for jobs that are yet to be made.
    pub fn new_group(&mut self) -> GroupKey {
        self.last += 1;
        GroupKey(self.last)
    }

    /// Makes a job, in a group of others or alone.
    pub fn create(
        &mut self,
        spec: JobSpec,
        group: Option<GroupKey>,
        audience: Audience,
    ) -> Result<JobKey> {
        if !is_well_formed(&spec.id) {
            return Err(invalid(format!("Invalid job ID '{}'", spec.id)));
        }
        if self.ids.contains_key(&spec.id) {
            let text = format!("Job ID '{}' already in use", spec.id);
            return Err(Error::new(ErrorKind::AlreadyExists, text));
        }
        let group = group.unwrap_or_else(|| self.new_group());
        self.last += 1;
        let key = JobKey(self.last);
        self.groups.entry(group).or_default().members.push(key);
        self.ids.insert(spec.id.clone(), key);
        self.jobs.insert(key, Job::new(spec, group, audience));
        self.tell(key, Notice::Status(Status::Created));
        Ok(key)
    }

    /// Begins with the work of a job that was made. One that was cancelled meanwhile is aborted instead.
    pub fn start(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        assert_eq!(job.status, Status::Created, "a job is started once");
        job.has_task = true;
        if job.cancelled {
            self.over(key, Err(CANCELLED.to_owned()));
            return;
        }
        job.started = true;
        let pause = job.held.then_some(job.pause);
        self.transition(key, Status::Running);
        if let Some(pause) = pause {
            self.effects.push(Effect::Pause(key, pause));
        }
        self.effects.push(Effect::Run(key));
    }

    /// A job that was made will not be started. There is no work to be taken back.
    pub fn abandon(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        assert_eq!(job.status, Status::Created, "its work has not begun");
        job.cancelled = true;
        self.over(key, Err(CANCELLED.to_owned()));
    }

    // Verbs.

    /// Whether a job takes a verb now.
    pub fn check(&self, key: JobKey, verb: Verb) -> Result<()> {
        let Some(job) = self.jobs.get(&key) else {
            return Err(Error::new(ErrorKind::NotFound, "Job not found"));
        };
        // What is being finished cannot be changed, and a user's word that was given is not wanted again.
        let group = self.groups.get(&job.group);
        let is_finalized = group.is_some_and(|group| group.phase != Phase::Pending);
        let is_late = job.is_finishing || (verb == Verb::Finalize && is_finalized);
        if job.status.accepts(verb) && !is_late {
            return Ok(());
        }
        Err(invalid(format!(
            "Job '{}' in state '{}' cannot accept command verb '{}'",
            job.spec.id,
            job.status.name(),
            verb.name()
        )))
    }

    /// The user wants the job held.
    pub fn pause(&mut self, key: JobKey) -> Result<()> {
        self.check(key, Verb::Pause)?;
        match self.hold(key) {
            true => Ok(()),
            false => Err(invalid("Job is already paused")),
        }
    }

    /// The user wants the job to go on.
    pub fn resume(&mut self, key: JobKey) -> Result<()> {
        if self.jobs.get(&key).is_some_and(|job| !job.held) {
            return Err(invalid("Can't resume a job that was not paused"));
        }
        self.check(key, Verb::Resume)?;
        self.let_go(key);
        Ok(())
    }

    /// The user wants another speed.
    pub fn set_speed(&mut self, key: JobKey, speed: u64) -> Result<()> {
        self.check(key, Verb::SetSpeed)?;
        if let Some(job) = self.jobs.get_mut(&key) {
            job.spec.speed = speed;
        }
        Ok(())
    }

    /// The user wants the job to end. No kind of job ends softly but one that is ready.
    pub fn cancel(&mut self, key: JobKey, how: Cancel) -> Result<()> {
        self.check(key, Verb::Cancel)?;
        let is_ready = |job: &Job| matches!(job.status, Status::Ready | Status::Standby);
        match how {
            Cancel::Soft if self.jobs.get(&key).is_some_and(is_ready) => {
                self.let_go(key);
                if let Some(job) = self.jobs.get_mut(&key) {
                    job.soft_cancelled = true;
                }
                self.effects.push(Effect::Cancel(key, Cancel::Soft));
            }
            Cancel::Soft | Cancel::Force => self.force_cancel(key),
        }
        Ok(())
    }

    /// The user wants the last step of a ready job.
    pub fn complete(&mut self, key: JobKey) -> Result<()> {
        self.check(key, Verb::Complete)?;
        if let Some(job) = self.jobs.get(&key)
            && (job.cancelled || job.soft_cancelled)
        {
            let text = format!("The active block job '{}' cannot be completed", job.spec.id);
            return Err(invalid(text));
        }
        self.effects.push(Effect::Complete(key));
        Ok(())
    }

    /// The user gives his word that a job, with its group, may conclude.
    pub fn finalize(&mut self, key: JobKey) -> Result<()> {
        self.check(key, Verb::Finalize)?;
        if let Some(group) = self.group_of(key) {
            self.prepare_group(group);
        }
        Ok(())
    }

    /// The user has seen enough of a concluded job.
    pub fn dismiss(&mut self, key: JobKey) -> Result<()> {
        self.check(key, Verb::Dismiss)?;
        self.forget(key);
        Ok(())
    }

    /// Ends a job whatever its state, as far as it can be: for the end of the daemon. Nobody is going to start it.
    pub fn end(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get(&key) else {
            return;
        };
        match job.status {
            Status::Concluded => self.forget(key),
            Status::Created => self.abandon(key),
            _ if self.check(key, Verb::Cancel).is_ok() => self.force_cancel(key),
            _ => {}
        }
    }

    /// Errors are forgotten, as the machine goes on. What they hold stays held.
    pub fn reset_io_status(&mut self) {
        for job in self.jobs.values_mut() {
            job.io_status = IoStatus::Ok;
        }
    }

    // Reports of the work.

    /// The work is held, as the pause of this number wanted.
    pub fn paused(&mut self, key: JobKey, pause: u64) {
        let Some(job) = self.jobs.get(&key) else {
            return;
        };
        if job.held && job.pause == pause {
            match job.status {
                Status::Running => self.transition(key, Status::Paused),
                Status::Ready => self.transition(key, Status::Standby),
                _ => {}
            }
        }
    }

    /// All is done but the last step.
    pub fn ready(&mut self, key: JobKey) {
        if self.jobs.get(&key).map(|job| job.status) == Some(Status::Running) {
            self.transition(key, Status::Ready);
            self.tell(key, Notice::Ready);
        }
    }

    /// An I/O error, what the policy makes of it, and what the job shows if that is to stop.
    pub fn io_error(
        &mut self,
        key: JobKey,
        (operation, action): (Operation, ErrorAction),
        reason: IoStatus,
    ) {
        // One that was cancelled ends, whatever else fails.
        if self.jobs.get(&key).is_none_or(|job| job.cancelled) {
            return;
        }
        self.tell(key, Notice::Error(operation, action));
        if action == ErrorAction::Stop {
            self.hold(key);
            if let Some(job) = self.jobs.get_mut(&key)
                && job.io_status == IoStatus::Ok
            {
                job.io_status = reason;
            }
        }
    }

    /// The work is over.
    pub fn ran(&mut self, key: JobKey, result: std::result::Result<(), String>) {
        self.over(key, result);
    }

    /// It is committed or aborted, and cleaned up.
    pub fn finished(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get(&key) else {
            return;
        };
        let group = job.group;
        let notice = match job.cancelled {
            true => Notice::Cancelled,
            false => Notice::Completed(job.failure.clone()),
        };
        if job.started {
            self.tell(key, notice);
        }
        self.conclude(key);
        self.finish_next(group);
    }

    // Steps.

    fn tell(&mut self, key: JobKey, notice: Notice) {
        let job = self.jobs.get(&key);
        if job.is_some_and(Job::is_known) {
            self.effects.push(Effect::Tell(key, notice));
        }
    }

    fn transition(&mut self, key: JobKey, next: Status) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        let now = job.status;
        assert!(
            now.may_become(next),
            "job '{}' cannot go from {now:?} to {next:?}",
            job.spec.id
        );
        job.status = next;
        if now != next {
            self.tell(key, Notice::Status(next));
        }
    }

    fn group_of(&self, key: JobKey) -> Option<GroupKey> {
        Some(self.jobs.get(&key)?.group)
    }

    /// Holds a job. Answers whether it was not held before.
    fn hold(&mut self, key: JobKey) -> bool {
        let Some(job) = self.jobs.get_mut(&key) else {
            return false;
        };
        if std::mem::replace(&mut job.held, true) {
            return false;
        }
        job.pause += 1;
        if job.started {
            self.effects.push(Effect::Pause(key, job.pause));
        }
        true
    }

    /// Undoes [`Machine::hold`], if it was.
    fn let_go(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        if !std::mem::replace(&mut job.held, false) {
            return;
        }
        job.io_status = IoStatus::Ok;
        let (started, status) = (job.started, job.status);
        match status {
            Status::Paused => self.transition(key, Status::Running),
            Status::Standby => self.transition(key, Status::Ready),
            _ => {}
        }
        if started {
            self.effects.push(Effect::Resume(key));
        }
    }

    fn force_cancel(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get_mut(&key) else {
            return;
        };
        if std::mem::replace(&mut job.cancelled, true) {
            return;
        }
        let (group, status) = (job.group, job.status);
        match status {
            // Whoever made it starts or abandons it.
            Status::Created => {}
            _ if status.is_over() => {
                self.abort_group(group);
                self.advance(group);
            }
            _ => {
                // Before it may go on: it would try once more what has failed.
                self.effects.push(Effect::Cancel(key, Cancel::Force));
                self.let_go(key);
            }
        }
    }

    /// The work of a job is over, or will never be.
    fn over(&mut self, key: JobKey, result: std::result::Result<(), String>) {
        let Some(job) = self.jobs.get(&key) else {
            return;
        };
        let (group, cancelled) = (job.group, job.cancelled);
        self.let_go(key);
        match result {
            Err(text) => self.fail(key, text),
            Ok(()) if cancelled => self.fail(key, CANCELLED.to_owned()),
            Ok(()) => {
                self.transition(key, Status::Waiting);
                self.advance(group);
                return;
            }
        }
        self.abort_group(group);
        self.advance(group);
    }

    fn fail(&mut self, key: JobKey, text: String) {
        if let Some(job) = self.jobs.get_mut(&key) {
            let text = if job.cancelled {
                CANCELLED.to_owned()
            } else {
                text
            };
            job.failure.get_or_insert(text);
        }
        self.transition(key, Status::Aborting);
    }

    fn set_finishing(&mut self, key: JobKey, is_finishing: bool) {
        if let Some(job) = self.jobs.get_mut(&key) {
            job.is_finishing = is_finishing;
        }
    }

    fn forget(&mut self, key: JobKey) {
        self.transition(key, Status::Null);
        self.effects.push(Effect::Forget(key));
        if let Some(job) = self.jobs.remove(&key) {
            self.ids.remove(&job.spec.id);
        }
    }
}

fn invalid(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, text)
}

#[cfg(test)]
mod tests;
