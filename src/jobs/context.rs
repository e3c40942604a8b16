//! What the work of a job is given: where it may be held, how fast it may be, and whom it tells of progress and errors.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use block::error::{Error, ErrorKind, Result};
use block::graph::{ErrorAction, IoStatus, OnError};
use block::rate::RateLimit;
use tokio::sync::{mpsc, oneshot, watch};

use super::machine::{Cancel, JobKey};
use super::meter::Meter;
use super::registry::{JobReport, Report};
use crate::limits;

/// Which half of a copy failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Reading the source.
    Read,
    /// Writing the target.
    Write,
}

/// What the control loop wants of the work.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Orders {
    /// Be held, and report it with this number.
    pub(super) pause: Option<u64>,
    /// End.
    pub(super) cancel: Option<Cancel>,
    /// Do the last step of a ready job.
    pub(super) complete: bool,
    /// Bytes per second; 0 for no limit.
    pub(super) speed: u64,
}

/// What both sides see of a job.
pub(super) struct Shared {
    pub(super) orders: watch::Sender<Orders>,
    pub(super) created: SystemTime,
    offset: AtomicU64,
    len: AtomicU64,
    /// The work waits for time or for the user.
    is_idle: AtomicBool,
    /// How many parts of the work [`JobContext::begin`] has let begin that have not ended.
    under_way: watch::Sender<usize>,
    limit: Mutex<RateLimit>,
    meter: Mutex<Meter>,
}

impl Shared {
    pub(super) fn new(speed: u64, len: u64) -> Self {
        Shared {
            orders: watch::Sender::new(Orders {
                speed,
                ..Orders::default()
            }),
            created: SystemTime::now(),
            offset: AtomicU64::new(0),
            len: AtomicU64::new(len),
            is_idle: AtomicBool::new(false),
            under_way: watch::Sender::new(0),
            limit: Mutex::new(RateLimit::new(speed)),
            meter: Mutex::new(Meter::new(Instant::now())),
        }
    }

    /// What is done, and what will be when all is.
    pub(super) fn progress(&self) -> (u64, u64) {
        let len = self.len.load(Ordering::Relaxed);
        (self.offset.load(Ordering::Relaxed), len)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.is_idle.load(Ordering::Relaxed)
    }

    /// How much has been done in a second, of late.
    pub(super) fn rate(&self) -> u64 {
        let (offset, _) = self.progress();
        lock(&self.meter).rate(Instant::now(), offset)
    }
}

/// The locks here guard plain numbers, which are whole at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Handle of the work on its job. Clones are the same job's.
#[derive(Clone)]
pub struct JobContext {
    key: JobKey,
    shared: Arc<Shared>,
    reports: mpsc::UnboundedSender<JobReport>,
}

impl JobContext {
    pub(super) fn new(
        key: JobKey,
        shared: Arc<Shared>,
        reports: mpsc::UnboundedSender<JobReport>,
    ) -> Self {
        JobContext {
            key,
            shared,
            reports,
        }
    }

    /// So much more has been done.
    pub fn advance(&self, done: u64) {
        let offset = self.shared.offset.fetch_add(done, Ordering::Relaxed);
        lock(&self.shared.meter).note(Instant::now(), offset.saturating_add(done));
    }

    /// So much has been done, and will have been when all is. What is done never goes back.
    pub fn set_progress(&self, done: u64, len: u64) {
        let before = self.shared.offset.fetch_max(done, Ordering::Relaxed);
        self.shared.len.store(len, Ordering::Relaxed);
        lock(&self.shared.meter).note(Instant::now(), before.max(done));
    }

    /// So much is left to do.
    pub fn set_remaining(&self, remaining: u64) {
        let offset = self.shared.offset.load(Ordering::Relaxed);
        let len = offset.saturating_add(remaining);
        self.shared.len.store(len, Ordering::Relaxed);
    }

    /// Returns at once, unless the job is to be held: then when it may go on, or is to end softly. When it is to end by force
    /// there is nothing to go on with: this waits to be dropped.
    ///
    /// To clients the job is held from when this is called and nothing that [`JobContext::begin`] let begin is under way.
    /// Cancellation: safe.
    pub async fn pause_point(&self) {
        let mut orders = self.shared.orders.subscribe();
        let mut under_way = self.shared.under_way.subscribe();
        let mut told = None;
        loop {
            let Orders { pause, cancel, .. } = orders.borrow_and_update().clone();
            self.unless_forced(cancel).await;
            let Some(pause) = pause.filter(|_| cancel.is_none()) else {
                if told.is_some() {
                    let (offset, _) = self.shared.progress();
                    lock(&self.shared.meter).restart(Instant::now(), offset);
                }
                break;
            };
            let _idle = Idle::new(&self.shared);
            let changed = tokio::select! {
                // The senders are `self`'s.
                _ = under_way.wait_for(|parts| *parts == 0), if told != Some(pause) => {
                    told = Some(pause);
                    self.report(Report::Paused(pause));
                    continue;
                }
                changed = orders.changed() => changed,
            };
            if changed.is_err() {
                break;
            }
        }
    }

    /// As [`JobContext::throttle`], for work of several parts at once: from the answer on the caller's part is under way, until it
    /// says [`JobContext::end`]. A job is held when no part is.
    ///
    /// Cancellation: nothing is under way; what was taken may be lost.
    pub async fn begin(&self, units: u64) {
        self.throttle(units).await;
        loop {
            self.shared.under_way.send_modify(|parts| *parts += 1);
            // Whoever waits for the job to stand still counts behind the order: one of the two sees the other.
            let Orders { pause, cancel, .. } = self.shared.orders.borrow().clone();
            if pause.is_none() || cancel.is_some() {
                return;
            }
            self.end();
            self.pause_point().await;
        }
    }

    /// A part that [`JobContext::begin`] let begin has ended.
    pub fn end(&self) {
        let less = |parts: &mut usize| *parts = parts.saturating_sub(1);
        self.shared.under_way.send_modify(less);
    }

    /// Takes `units` of what the speed allows; waits until it does, and while the job is held. Returns at once when the job is to
    /// end softly; never when by force, as [`JobContext::pause_point`].
    ///
    /// Cancellation: nothing was taken.
    pub async fn throttle(&self, units: u64) {
        let mut orders = self.shared.orders.subscribe();
        loop {
            self.pause_point().await;
            let Orders { cancel, speed, .. } = orders.borrow_and_update().clone();
            let now = Instant::now();
            let taken = {
                let mut limit = lock(&self.shared.limit);
                if limit.speed() != speed {
                    limit.set_speed(speed, now);
                }
                limit.take(units, now)
            };
            let Err(wait) = taken else {
                return;
            };
            if cancel.is_some() {
                return;
            }
            let _idle = Idle::new(&self.shared);
            // Whatever the user wants, he does not want to wait for this.
            let _ = tokio::time::timeout(wait, orders.changed()).await;
        }
    }

    /// Does nothing but what the user wants: is held, and goes on. For work that others do.
    pub async fn stand_by(&self) {
        let mut orders = self.shared.orders.subscribe();
        loop {
            self.pause_point().await;
            let _idle = Idle::new(&self.shared);
            if orders.changed().await.is_err() {
                return;
            }
        }
    }

    /// Whoever asks is about to be dropped; what it would do next it need not do.
    async fn unless_forced(&self, cancel: Option<Cancel>) {
        if cancel == Some(Cancel::Force) {
            std::future::pending().await
        }
    }

    pub(super) async fn force_cancelled(&self) {
        let mut orders = self.shared.orders.subscribe();
        let is_forced = |orders: &Orders| orders.cancel == Some(Cancel::Force);
        // The sender is `self`'s.
        let _ = orders.wait_for(is_forced).await;
    }

    /// All is done that can be done without the user's word. It comes, or the job is to end softly: see the answer.
    pub async fn ready(&self) -> ReadyEnd {
        self.report(Report::Ready);
        let mut orders = self.shared.orders.subscribe();
        loop {
            self.pause_point().await;
            let Orders {
                complete, cancel, ..
            } = orders.borrow_and_update().clone();
            match (cancel, complete) {
                (Some(_), _) => return ReadyEnd::Cancelled,
                (None, true) => return ReadyEnd::Complete,
                (None, false) => {}
            }
            let _idle = Idle::new(&self.shared);
            if orders.changed().await.is_err() {
                return ReadyEnd::Cancelled;
            }
        }
    }

    /// Tells of an I/O error, and does what the policy says: answers when the request is to be tried again, or the error if the
    /// job is to fail of it.
    ///
    /// # Cancellation
    /// The error may have been told, and the job may be held.
    pub async fn on_error(
        &self,
        operation: Operation,
        policy: OnError,
        error: Error,
    ) -> Result<()> {
        let action = policy.action(&error);
        let (seen, was_seen) = oneshot::channel();
        self.report(Report::IoError {
            operation,
            action,
            reason: reason(&error),
            seen,
        });
        // The order to hold comes with the answer.
        let _ = was_seen.await;
        match action {
            ErrorAction::Report => return Err(error),
            ErrorAction::Stop => self.pause_point().await,
            ErrorAction::Ignore => {
                let _idle = Idle::new(&self.shared);
                tokio::time::sleep(limits::JOB_RETRY_PAUSE).await;
            }
        }
        Ok(())
    }

    pub(super) fn report(&self, report: Report) {
        // Nobody listens any more when the daemon ends.
        let _ = self.reports.send(JobReport {
            key: self.key,
            report,
        });
    }
}

/// Why a ready job goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadyEnd {
    /// The user wants the last step.
    Complete,
    /// The user wants it to end without.
    Cancelled,
}

/// While it is there the work waits.
struct Idle<'s>(&'s Shared);

impl<'s> Idle<'s> {
    fn new(shared: &'s Shared) -> Self {
        shared.is_idle.store(true, Ordering::Relaxed);
        Idle(shared)
    }
}

impl Drop for Idle<'_> {
    fn drop(&mut self) {
        self.0.is_idle.store(false, Ordering::Relaxed);
    }
}

/// What a job that an error stops shows of it.
fn reason(error: &Error) -> IoStatus {
    match error.kind() {
        ErrorKind::NoSpace => IoStatus::NoSpace,
        _ => IoStatus::Failed,
    }
}
