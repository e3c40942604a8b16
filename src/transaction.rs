//! Several actions as one: all of them happen, or none.
//!
//! ```text
//!   resolve, prepare, enter 1, 2, ...                  guests run; may take its time
//!     -> hold all disks, once
//!          -> stage 1, 2, ...                           in memory
//!          -> commit 1, 2, ...                          on the control loop; edges are led elsewhere
//!     -> let go                                         but for flushes of new overlays
//!   make durable what snapshots need                    all that can fail has been done
//!     -> write the journal's commit                     from here on it happens, whatever else does
//!     -> switch the headers of images                   one write for each
//!   start 1, 2, ..., finish 1, 2, ...
//!
//!   an error anywhere before the switch: let go -> abort ..., 2, 1 -> the error
//! ```
//!
//! Where no internal snapshot changes, nothing is left to be decided when guests stand still: the journal's commit is written before.
//! Where snapshots are reverted to or deleted and nothing else is done, the images are switched before: disks are held to follow
//! them, in memory. Where what guests do could not be taken back (a revert beside something else, an overlay that was there
//! before) they are let go last, behind the switch and the commits. A header that cannot be switched takes everything back; the journal
//! says so first. Every wait while guests are held has a limit. `docs/crash-safety.md` has what a crash leaves at each point, and why.
//!
//! Each action is about what those before it leave: `device` is looked up in the [`Plan`]. Commands that are actions, too,
//! are transactions of one action: there is one way to do it.
//!
//! * `plan`: what the actions so far will leave
//! * `concerns`: which actions have something in common
//! * `queue`: those that have nothing in common are prepared at the same time
//! * `aborting`: and taken back at the same time
//! * `preparing`: what actions prepare with
//! * `held`: the disks that are held still, with the changes of their internal snapshots
//! * `dry_run`: what would happen
//! * `snapshot`: the actions on internal snapshots
//! * `backup`: the actions that begin a backup
//! * `external`: the actions that put an overlay on a disk

mod aborting;
mod backup;
mod concerns;
mod dry_run;
mod external;
mod held;
#[cfg(test)]
pub(crate) mod lab;
mod plan;
mod preparing;
mod queue;
mod snapshot;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use block::driver::{BoxFuture, HeaderHeld, HeaderSwitch, SnapshotInfo};
use block::graph::{FlushesHeld, Node};
use block::io::RunToEnd;
use block::open::TakenBack;
use futures_util::FutureExt;
use futures_util::stream::{self, StreamExt as _};
use qapi::rt::QmpError;
use tokio::task::unconstrained;
use tokio::time::timeout;

use crate::daemon::{Control, Cx, internal_error};
use crate::jobs::Audience;
use crate::journal::{Entry, JournaledAction};
use crate::limits;
use aborting::abort_all;
use concerns::Keys;
use held::Guests;
use preparing::journal_error;
use queue::OnFailure;

pub(crate) use backup::{
    BackupAction, BackupOptions, BackupPerf, BackupTarget, FileTarget, TargetMode,
};
pub(crate) use concerns::Concerns;
pub(crate) use dry_run::{Preview, dry_run};
pub(crate) use external::{ExternalSnapshot, Overlay, OverlayFile};
pub(crate) use held::{Held, flush_ahead};
pub(crate) use plan::{Plan, WayBack};
pub(crate) use preparing::Preparing;
pub(crate) use snapshot::{Operation, SnapshotAction};

/// A part of a transaction.
///
/// All but `resolve` and `commit` run outside of the control loop. What an action does before its `commit` nobody but later
/// actions may use: nothing else changes meanwhile but by guests, jobs, which may be cancelled, and exports. Queries see new nodes,
/// unused, and jobs that are not begun.
pub(crate) trait Action: Send {
    /// Looks up what the action is about, as the actions before it leave it, and checks all that can be known now. It says which
    /// disks are to be held, and what its commit will do to the graph as far as that is known. On the control loop: it cannot
    /// wait. After an error nothing else of the action is called.
    fn resolve(&mut self, control: &mut Control, plan: &mut Plan) -> Result<(), QmpError>;

    /// What it is about. Others that are about something else are prepared, and taken back, at the same time.
    fn concerns(&self) -> Concerns {
        Concerns::Everything
    }

    /// Whether it makes a job: these are made in the order of their actions.
    fn begins_job(&self) -> bool {
        false
    }

    /// Does what takes time, while guests run: makes and opens files, takes space. Called when it has been resolved. Nobody finds what it
    /// makes yet.
    fn prepare<'a>(&'a mut self, with: &'a Preparing) -> BoxFuture<'a, Result<(), QmpError>> {
        let _ = with;
        Box::pin(async { Ok(()) })
    }

    /// Puts nodes that were made into the graph, unused, and what is to lead to them into the plan. Called when it has been prepared, and
    /// those before it that have something in common with it have entered.
    fn enter<'a>(
        &'a mut self,
        with: &'a Preparing,
        plan: &'a mut Plan,
    ) -> BoxFuture<'a, Result<(), QmpError>> {
        let _ = (with, plan);
        Box::pin(async { Ok(()) })
    }

    /// Does what needs guests to stand still and can fail. They wait for it: no files are made here.
    fn stage<'a>(&'a mut self, held: &'a mut Held) -> BoxFuture<'a, Result<(), QmpError>> {
        let _ = held;
        Box::pin(async { Ok(()) })
    }

    /// Whether `stage` is all that it does, and depends on nothing that guests do: they may go on meanwhile.
    fn stages_ahead(&self) -> bool {
        false
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

    /// Starts what goes on behind the answer, when the transaction has happened. It takes no time.
    fn start<'a>(&'a mut self, cx: &'a Cx) -> BoxFuture<'a, ()> {
        let _ = cx;
        Box::pin(async {})
    }

    /// Does what is left when guests run again. What goes wrong here is logged: the transaction has happened.
    fn finish<'a>(&'a mut self, cx: &'a Cx) -> BoxFuture<'a, ()> {
        let _ = cx;
        Box::pin(async {})
    }

    /// Takes back whatever `prepare`, `stage` and `commit` did, also where they failed half-way. Guests run. What cannot be taken back
    /// is logged with what the user must do, and answered.
    fn abort<'a>(&'a mut self, cx: &'a Cx) -> BoxFuture<'a, Option<Stays>> {
        let _ = cx;
        Box::pin(async { None })
    }

    /// What the client wants, for the journal. Before anything else is called.
    fn journaled(&self) -> Option<JournaledAction> {
        None
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

/// What could not be taken back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stays {
    /// What the client calls the disk.
    pub(crate) device: String,
    /// The file that has what its guests have written.
    pub(crate) file: PathBuf,
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
    /// How long it is to be held.
    until: Until,
    /// Which of the images in the journal it is.
    journaled: Option<usize>,
}

/// How long guests of a disk stand still, the shortest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Until {
    /// Until the change of its snapshots lets them go.
    LetGo,
    /// Until the graph leads them elsewhere.
    Led,
    /// As `Led`; their flushes wait until the transaction is decided.
    Flushes,
    /// Until the transaction is decided.
    Decided,
}

impl Disk {
    fn hold(&mut self, until: Until) {
        self.until = self.until.max(until);
    }
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
                let left = running.abort().await;
                Err(with_left(error, &left))
            }
        }
    })
    .await
}

/// An error, with the disks on which something of the transaction is left.
fn with_left(error: QmpError, left: &[String]) -> QmpError {
    if left.is_empty() {
        return error;
    }
    QmpError::generic(format!(
        "{}; and what was done to '{}' could not be taken back, see the daemon's log",
        error.desc,
        left.join("', '")
    ))
}

/// An action that is prepared, or was to be.
struct Prepared {
    /// Its place among all.
    place: usize,
    action: Box<dyn Action>,
    /// What it is about, as it was found when it was resolved.
    about: Keys,
}

/// A transaction under way.
struct Running {
    /// In order.
    actions: Vec<Prepared>,
    with: Preparing,
    /// What they will leave.
    plan: Plan,
    /// The journal has its commit, or will need none.
    is_decided: bool,
    /// The graph is what it will be.
    is_committed: bool,
    /// Guests that have gone on undecided.
    flushes: Vec<FlushesHeld>,
    /// Disks whose images could not be made what they were: the journal stays, and the next start tries again.
    left: Vec<Disk>,
}

impl Running {
    async fn new(cx: Cx, completion: Completion, audience: Audience) -> Result<Self, QmpError> {
        Ok(Running {
            actions: Vec::new(),
            with: Preparing::new(cx, completion, audience).await?,
            plan: Plan::default(),
            is_decided: false,
            is_committed: false,
            flushes: Vec::new(),
            left: Vec::new(),
        })
    }

    async fn attempt(
        &mut self,
        actions: Vec<Box<dyn Action>>,
    ) -> Result<Vec<HeaderHeld>, QmpError> {
        self.with.actions = actions
            .iter()
            .filter_map(|action| action.journaled())
            .collect();
        let entered = self.prepare_all(actions, OnFailure::Stop).await;
        if let Some((_, error)) = entered.errors.into_iter().next() {
            return Err(error);
        }
        let mut disks = self.plan.take_disks();
        self.with.stage(&mut disks).await?;
        let mut held = Held::default();
        let done = async {
            if self.goes_ahead(&disks)
                && let Some(begun) = Held::ahead(&disks).await
            {
                held = begun;
                return self.switch_and_hold(&mut held).await;
            }
            if !disks.iter().any(|disk| disk.changes) {
                // Files that are made are all that there is to it. Until they are used they say nothing.
                self.decide(Vec::new()).await?;
            }
            held = Held::begin(disks, Guests::Wait).await?;
            self.stage_and_switch(&mut held).await
        };
        match done.await {
            Ok(()) => Ok(held.release()),
            Err(error) => {
                self.roll_back(held).await;
                Err(error)
            }
        }
    }

    /// Whether guests need to stand still for nothing but that all disks follow what has happened to the images. Without a revert they
    /// wait for no disk in any case.
    fn goes_ahead(&self, disks: &[Disk]) -> bool {
        disks.iter().any(|disk| disk.until == Until::Decided)
            && self
                .actions
                .iter()
                .all(|prepared| prepared.action.stages_ahead())
    }

    /// Does all that can fail, and switches the headers of images, while guests go on; then the disks follow.
    async fn switch_and_hold(&mut self, held: &mut Held) -> Result<(), QmpError> {
        self.stage_all(held).await?;
        held.prepare().await?;
        let switches = held.switches().await?;
        self.decide(switches).await?;
        held.commit().await?;
        held.hold().await
    }

    async fn stage_all(&mut self, held: &mut Held) -> Result<(), QmpError> {
        for Prepared { action, .. } in &mut self.actions {
            let staged = timeout(limits::TRANSACTION_STEP, guarded(action.stage(held))).await;
            staged.unwrap_or_else(|_| Err(slow()))?;
        }
        Ok(())
    }

    /// Does what the actions need guests to stand still for. Those go on where they need not wait for the switch.
    async fn stage(&mut self, held: &mut Held) -> Result<(), QmpError> {
        self.stage_all(held).await?;
        held.mark("stage");
        if self.is_decided || held.may_let_go().await? {
            if held.leads() {
                self.check(held).await?;
                self.commit(held).await?;
                held.mark("lead");
            }
            held.let_go().await?;
        }
        Ok(())
    }

    /// Does all that can fail, and then switches the headers of images. Guests go on as soon as they can.
    async fn stage_and_switch(&mut self, held: &mut Held) -> Result<(), QmpError> {
        // No turns are taken with other tasks of the thread: guests wait.
        unconstrained(self.stage(held)).await?;
        held.prepare().await?;
        held.mark("write");
        if !self.is_committed {
            self.check(held).await?;
        }
        if !self.is_decided {
            let switches = held.switches().await?;
            self.decide(switches).await?;
            held.mark("journal");
        }
        held.commit().await?;
        held.mark("switch");
        if !self.is_committed {
            self.commit(held).await?;
            held.mark("lead");
        }
        Ok(())
    }

    /// From here on it happens, after a crash, too.
    async fn decide(&mut self, switches: Vec<(usize, HeaderSwitch)>) -> Result<(), QmpError> {
        if let Some(entry) = self.with.entry.get_mut() {
            let written = limited(entry.commit(switches)).await;
            written.map_err(|error| journal_error(&error))?;
        }
        self.is_decided = true;
        Ok(())
    }

    /// Takes back what was staged, and lets guests go on. What the journal says comes first: should it be cut off here, the next
    /// start must not do what was undone.
    async fn roll_back(&mut self, mut held: Held) {
        if let Some(entry) = self.with.entry.get_mut()
            && let Err(error) = limited(entry.revoke()).await
        {
            log_wrong(entry, &error);
        }
        self.flushes = held.take_flushes();
        self.left = held.roll_back().await;
    }

    /// Asks the graph whether it would take all commits. Afterwards it is too late to say no.
    async fn check(&mut self, held: &mut Held) -> Result<(), QmpError> {
        self.on_the_loop(held, |control, actions, _| {
            let mut actions = actions.iter();
            actions.try_for_each(|Prepared { action, .. }| action.check(control))
        })
        .await
    }

    /// The graph is to follow.
    async fn commit(&mut self, held: &mut Held) -> Result<(), QmpError> {
        self.is_committed = true;
        self.on_the_loop(held, |control, actions, held| {
            for Prepared { action, .. } in actions {
                let committed = AssertUnwindSafe(|| action.commit(control, held));
                if catch_unwind(committed).is_err() {
                    log::error!("an action of a transaction has failed where it cannot");
                }
            }
            Ok(())
        })
        .await
    }

    /// Does something to all actions on the control loop. Without an answer the daemon ends, and its graph with it.
    async fn on_the_loop(
        &mut self,
        held: &mut Held,
        what: impl FnOnce(&mut Control, &mut [Prepared], &Held) -> Result<(), QmpError> + Send + 'static,
    ) -> Result<(), QmpError> {
        let (mut actions, disks) = (std::mem::take(&mut self.actions), std::mem::take(held));
        let done = self.with.cx.commit(move |control| {
            let done = AssertUnwindSafe(|| what(control, &mut actions, &disks));
            let done = catch_unwind(done).unwrap_or_else(|_| Err(internal_error()));
            Ok((actions, disks, done))
        });
        let result;
        (self.actions, *held, result) = done.await?;
        result
    }

    /// Guests run. The headers of images stay what the journal says they are until it has ended: after a crash meanwhile, the next
    /// start finds them as it expects.
    async fn finish(mut self, headers: Vec<HeaderHeld>) -> Vec<Effect> {
        for Prepared { action, .. } in &mut self.actions {
            action.start(&self.with.cx).await;
        }
        let remains = self.with.keep_files().await;
        if let Some(entry) = self.with.entry.take() {
            end(entry).await;
        }
        drop(headers);
        let cx = &self.with.cx;
        let actions = self.actions.iter_mut();
        let finishing = actions.map(|Prepared { action, .. }| action.finish(cx));
        let finishing: Vec<BoxFuture<'_, ()>> = finishing.collect();
        let finishing = stream::iter(finishing).buffer_unordered(limits::TRANSACTION_PREPARING);
        finishing.collect::<()>().await;
        self.with.io.release(remains).await;
        let actions = self.actions.iter();
        actions.map(|prepared| prepared.action.effect()).collect()
    }

    /// Takes back what was prepared. Answers the disks on which something is left.
    async fn abort(mut self) -> Vec<String> {
        let stay = abort_all(&self.with.cx, &mut self.actions).await;
        let files: Vec<PathBuf> = stay.iter().map(|stays| stays.file.clone()).collect();
        if !(files.is_empty() && self.left.is_empty()) {
            self.note_what_is_left(&files).await;
        }
        // What guests have written is safe from the next start, too.
        self.flushes.clear();
        // Nobody has the files open when they go.
        self.actions.clear();
        self.plan = Plan::default();
        let TakenBack { are_back, remains } = self.with.remove_files(&files).await;
        if !are_back {
            // The next start tries it again, and leaves alone the images, which have gone on.
            self.note_what_is_left(&files).await;
            if let Some(entry) = self.with.entry.get_mut() {
                let uuid = entry.uuid();
                log::error!(
                    "transaction {uuid}: what stays will be taken back by the next start; nobody is to use it until then"
                );
            }
        } else if let Some(entry) = self.with.entry.take()
            && self.left.is_empty()
        {
            end(entry).await;
        }
        self.with.io.release(remains).await;
        let left = self.left.into_iter().map(|disk| disk.device);
        left.chain(stay.into_iter().map(|stays| stays.device))
            .collect()
    }

    /// Says in the journal which images are left, and that these files stay.
    async fn note_what_is_left(&mut self, files: &[PathBuf]) {
        let Some(entry) = self.with.entry.get_mut() else {
            return;
        };
        let images = self.left.iter().filter_map(|disk| disk.journaled);
        let images: Vec<usize> = images.collect();
        if let Err(error) = limited(entry.leaves(&images, files)).await {
            log_wrong(entry, &error);
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

/// The journal of a transaction that has failed could not be written.
fn log_wrong(entry: &Entry, error: &io::Error) {
    let uuid = entry.uuid();
    log::error!("the journal of transaction {uuid}, which has failed, is wrong: {error}");
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
