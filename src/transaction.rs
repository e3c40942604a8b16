//! Several actions as one: all of them happen, or none.
//!
//! ```text
//!   resolve, prepare 1 -> resolve, prepare 2 -> ...     guests run; may take its time
//!     -> hold all disks, once
//!          -> stage 1, 2, ...                           where only snapshots are taken or deleted, they are let go here
//!          -> make durable                              all that can fail has been done
//!          -> write the journal's commit                from here on it happens, whatever else does
//!          -> switch the headers of images              one write for each
//!          -> commit 1, 2, ...                          on the control loop; edges are led elsewhere
//!     -> let go
//!   finish 1, 2, ...                                    guests run
//!
//!   an error anywhere before the commit: let go -> abort ..., 2, 1 -> the error
//! ```
//!
//! A header that cannot be switched takes everything back; the journal says so first. Every wait while guests are held has a limit.
//! `docs/crash-safety.md` has what a crash leaves at each point.
//!
//! Each action is about what those before it leave: `device` is looked up in the [`Plan`]. Commands that are actions, too,
//! are transactions of one action: there is one way to do it.
//!
//! * `plan`: what the actions so far will leave
//! * `preparing`: what actions prepare with
//! * `held`: the disks that are held still, with the changes of their internal snapshots
//! * `dry_run`: what would happen
//! * `snapshot`: the actions on internal snapshots
//! * `backup`: the actions that begin a backup
//! * `external`: the actions that put an overlay on a disk

mod backup;
mod dry_run;
mod external;
mod held;
#[cfg(test)]
mod lab;
mod plan;
mod preparing;
mod snapshot;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use block::driver::{BoxFuture, HeaderHeld, SnapshotInfo};
use block::graph::Node;
use block::io::RunToEnd;
use futures_util::FutureExt;
use qapi::rt::QmpError;
use tokio::time::timeout;

use crate::daemon::{Control, Cx, internal_error};
use crate::jobs::Audience;
use crate::journal::Entry;
use crate::limits;
use held::Guests;
use preparing::journal_error;

pub(crate) use backup::{
    BackupAction, BackupOptions, BackupPerf, BackupTarget, FileTarget, TargetMode,
};
pub(crate) use dry_run::{Preview, dry_run};
pub(crate) use external::{ExternalSnapshot, Overlay, OverlayFile};
pub(crate) use held::Held;
pub(crate) use plan::Plan;
pub(crate) use preparing::Preparing;
pub(crate) use snapshot::{Operation, SnapshotAction};

/// A part of a transaction.
///
/// All but `resolve` and `commit` run outside of the control loop. What an action does before its `commit` nobody but later
/// actions may see: no other command runs meanwhile, but guests, jobs and exports do.
pub(crate) trait Action: Send {
    /// Looks up what the action is about, as the actions before it leave it, and checks all that can be known now. It says which
    /// disks are to be held, and what its commit will do to the graph as far as that is known. On the control loop: it cannot
    /// wait. After an error nothing else of the action is called.
    fn resolve(&mut self, control: &mut Control, plan: &mut Plan) -> Result<(), QmpError>;

    /// Does what takes time, while guests run: makes and opens files, takes space. Called right behind `resolve`, before the next
    /// action is resolved. Nodes that it makes go into the graph here, unused; what is to lead to them, into the plan.
    fn prepare<'a>(&'a mut self, with: &'a mut Preparing) -> BoxFuture<'a, Result<(), QmpError>> {
        let _ = with;
        Box::pin(async { Ok(()) })
    }

    /// Does what needs guests to stand still and can fail. They wait for it: no files are made here.
    fn stage<'a>(&'a mut self, held: &'a mut Held) -> BoxFuture<'a, Result<(), QmpError>> {
        let _ = held;
        Box::pin(async { Ok(()) })
    }

    /// Whether its commit would be refused: by the same function, on the control loop, when all else has been done and nothing is
    /// decided yet. No other command runs in between, so that users may go then, and none comes.
    fn check(&self, control: &Control) -> Result<(), QmpError> {
        let _ = control;
        Ok(())
    }

    /// Makes it so. On the control loop, with all disks held: it cannot wait, does no I/O, and cannot fail.
    fn commit(&mut self, control: &mut Control, held: &Held) {
        let _ = (control, held);
    }

    /// Does what is left when guests run again. What goes wrong here is logged: the transaction has happened.
    fn finish<'a>(&'a mut self, cx: &'a Cx) -> BoxFuture<'a, ()> {
        let _ = cx;
        Box::pin(async {})
    }

    /// Takes back whatever `prepare` and `stage` did, also where they failed half-way. Guests run. What cannot be taken back is
    /// logged with what the user must do.
    fn abort<'a>(&'a mut self, cx: &'a Cx) -> BoxFuture<'a, ()> {
        let _ = cx;
        Box::pin(async {})
    }

    /// What it does, or has done, as far as that is known.
    fn effect(&self) -> Effect {
        Effect::default()
    }
}

/// What an action does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Effect {
    /// The internal snapshot that it takes, deletes or reverts to.
    pub(crate) snapshot: Option<SnapshotInfo>,
    /// The file that it makes or opens.
    pub(crate) filename: Option<String>,
    /// The node that it puts into the graph.
    pub(crate) node_name: Option<String>,
    /// The job that it begins.
    pub(crate) job_id: Option<String>,
}

/// How jobs of one transaction end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Completion {
    /// Each by itself.
    Individual,
    /// All of them, or none.
    Grouped,
}

/// A disk of a transaction.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    /// What the client called it.
    pub(crate) device: String,
    /// Its root.
    pub(crate) node: Arc<Node>,
    /// Its internal snapshots are changed.
    changes: bool,
    /// It is to be held until all is committed.
    is_kept: bool,
    /// Which of the images in the journal it is.
    journaled: Option<usize>,
}

/// The `abort` action: makes every transaction that has it fail. For tests of clients.
pub(crate) struct Abort;

impl Action for Abort {
    fn resolve(&mut self, _: &mut Control, _: &mut Plan) -> Result<(), QmpError> {
        Err(QmpError::generic("Transaction aborted using Abort action"))
    }
}

/// Carries out all actions, and answers what each did; or none, and answers the first error.
///
/// # Cancellation
/// When the future is dropped the transaction goes on to its end: some disks done and others not is what nobody wants.
pub(crate) async fn run(
    cx: &Cx,
    actions: Vec<Box<dyn Action>>,
    completion: Completion,
) -> Result<Vec<Effect>, QmpError> {
    let cx = cx.clone();
    RunToEnd::new(async move {
        let mut running = Running::new(cx, completion, Audience::Clients).await?;
        match running.attempt(actions).await {
            Ok(headers) => Ok(running.finish(headers).await),
            Err(error) => {
                running.abort().await;
                Err(error)
            }
        }
    })
    .await
}

/// A transaction under way.
struct Running {
    /// Those that are prepared, or were to be.
    actions: Vec<Box<dyn Action>>,
    with: Preparing,
    /// An image could not be made what it was: its journal stays, and the next start tries again.
    is_left: bool,
}

impl Running {
    async fn new(cx: Cx, completion: Completion, audience: Audience) -> Result<Self, QmpError> {
        Ok(Running {
            actions: Vec::new(),
            with: Preparing::new(cx, completion, audience).await?,
            is_left: false,
        })
    }

    async fn attempt(
        &mut self,
        actions: Vec<Box<dyn Action>>,
    ) -> Result<Vec<HeaderHeld>, QmpError> {
        for action in actions {
            self.prepare(action).await?;
        }
        let mut disks = std::mem::take(&mut self.with.plan.disks);
        self.with.stage(&mut disks).await?;
        let mut held = Held::begin(disks, Guests::Wait).await?;
        match self.stage_and_switch(&mut held).await {
            Ok(()) => Ok(self.commit(held).await),
            Err(error) => Err(self.roll_back(held, error).await),
        }
    }

    /// While guests are held: does all that can fail, and then switches the headers of images.
    async fn stage_and_switch(&mut self, held: &mut Held) -> Result<(), QmpError> {
        for action in &mut self.actions {
            let staged = timeout(limits::TRANSACTION_STEP, guarded(action.stage(held))).await;
            staged.unwrap_or_else(|_| Err(slow()))?;
        }
        held.mark("stage");
        held.let_go().await?;
        held.prepare().await?;
        held.mark("write");
        self.check().await?;
        if let Some(entry) = &mut self.with.entry {
            let switches = held.switches().await?;
            let written = limited(entry.commit(switches)).await;
            written.map_err(|error| journal_error(&error))?;
            held.mark("journal");
        }
        held.commit().await?;
        held.mark("switch");
        Ok(())
    }

    /// Asks the graph whether it would take all commits. Afterwards it is too late to say no.
    async fn check(&mut self) -> Result<(), QmpError> {
        let actions = std::mem::take(&mut self.actions);
        let checked = self.with.cx.commit(move |control| {
            let check = || actions.iter().try_for_each(|action| action.check(control));
            let checked = catch_unwind(AssertUnwindSafe(check));
            let checked = checked.unwrap_or_else(|_| Err(internal_error()));
            Ok((actions, checked))
        });
        let (actions, checked) = checked.await?;
        self.actions = actions;
        checked
    }

    /// Takes back what was staged, and lets guests go on. What the journal says comes first: should it be cut off here, the next
    /// start must not do what was undone.
    async fn roll_back(&mut self, held: Held, error: QmpError) -> QmpError {
        if let Some(entry) = &mut self.with.entry
            && let Err(error) = limited(entry.revoke()).await
        {
            let uuid = entry.uuid();
            log::error!("the journal of transaction {uuid}, which has failed, is wrong: {error}");
        }
        let left = held.roll_back().await;
        if left.devices.is_empty() {
            return error;
        }
        self.is_left = true;
        QmpError::generic(format!(
            "{}; and what was done to '{}' could not be taken back, see the daemon's log",
            error.desc,
            left.devices.join("', '")
        ))
    }

    /// Resolves and prepares the next action.
    async fn prepare(&mut self, mut action: Box<dyn Action>) -> Result<(), QmpError> {
        let mut plan = std::mem::take(&mut self.with.plan);
        let resolved = move |control: &mut Control| {
            let resolved = catch_unwind(AssertUnwindSafe(|| action.resolve(control, &mut plan)));
            let resolved = resolved.unwrap_or_else(|_| Err(internal_error()));
            Ok((plan, resolved.map(|()| action)))
        };
        let (plan, resolved) = self.with.cx.commit(resolved).await?;
        self.with.plan = plan;
        self.actions.push(resolved?);
        match self.actions.last_mut() {
            Some(action) => guarded(action.prepare(&mut self.with)).await,
            None => Ok(()),
        }
    }

    /// All headers are switched: it has happened, and the graph is to follow. Answers what keeps the headers as they are.
    async fn commit(&mut self, held: Held) -> Vec<HeaderHeld> {
        let mut actions = std::mem::take(&mut self.actions);
        let committed = self.with.cx.commit(move |control| {
            for action in &mut actions {
                let committed = AssertUnwindSafe(|| action.commit(control, &held));
                if catch_unwind(committed).is_err() {
                    log::error!("an action of a transaction has failed where it cannot");
                }
            }
            Ok((actions, held))
        });
        // Without an answer the daemon ends, and its graph with it.
        let Ok((actions, held)) = committed.await else {
            return Vec::new();
        };
        self.actions = actions;
        held.release()
    }

    /// Guests run. The headers of images stay what the journal says they are until it has ended: after a crash meanwhile, the next
    /// start finds them as it expects.
    async fn finish(mut self, headers: Vec<HeaderHeld>) -> Vec<Effect> {
        self.with.keep_files().await;
        if let Some(entry) = self.with.entry.take() {
            end(entry).await;
        }
        drop(headers);
        for action in &mut self.actions {
            action.finish(&self.with.cx).await;
        }
        self.actions.iter().map(|action| action.effect()).collect()
    }

    async fn abort(mut self) {
        for action in self.actions.iter_mut().rev() {
            action.abort(&self.with.cx).await;
        }
        self.with.remove_files().await;
        if let Some(entry) = self.with.entry.take()
            && !self.is_left
        {
            end(entry).await;
        }
    }
}

async fn end(entry: Entry) {
    let uuid = entry.uuid().to_owned();
    if let Err(error) = limited(entry.end()).await {
        log::error!(
            "the journal of transaction {uuid}, which is over, could not be ended: {error}"
        );
    }
}

/// The error of an action whose disk hangs.
fn slow() -> QmpError {
    let seconds = limits::TRANSACTION_STEP.as_secs();
    QmpError::generic(format!(
        "A disk of the transaction has not answered within {seconds} s"
    ))
}

/// Waits for the disk of the journal as long as for others.
async fn limited<T>(written: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    let written = timeout(limits::TRANSACTION_STEP, written).await;
    written.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// A panic is a failure like any other: what the others did must be taken back.
async fn guarded<T>(part: impl Future<Output = Result<T, QmpError>>) -> Result<T, QmpError> {
    let caught = AssertUnwindSafe(part).catch_unwind().await;
    caught.unwrap_or_else(|_| Err(internal_error()))
}

#[cfg(test)]
mod tests;
