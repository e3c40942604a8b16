//! The disks of a transaction while guests stand still, some with a change of their internal snapshots.

use std::collections::HashMap;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use block::driver::{
    BoxFuture, HeaderHeld, HeaderSwitch, Requests as _, RequestsHeld, SnapshotChange, Snapshots,
};
use block::error::{Error, ErrorKind, Result};
use block::graph::{FlushesHeld, Node, Quiesced, hold_flushes_within, place, quiesce_all_within};
use futures_util::future::join_all;
use qapi::rt::QmpError;
use tokio::task::unconstrained;
use tokio::time::timeout;

use super::{Disk, Until, guarded};
use crate::limits;

/// All disks that are held. Dropped before `commit`, nothing has happened to any.
#[derive(Default)]
pub(crate) struct Held {
    disks: Vec<HeldDisk>,
    /// By [`place`], where a node is among the disks.
    of_node: HashMap<usize, usize>,
    /// Since when guests wait, as long as they do.
    since: Option<Instant>,
    /// Parts of the time since, and when they ended.
    parts: Vec<(&'static str, Instant)>,
    /// Which action is being staged.
    pub(super) action: usize,
}

/// What guests do while actions are staged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Guests {
    /// Those of all disks wait from one moment on.
    Wait,
    /// They go on, but for what the change of their own disk holds back.
    GoOn,
}

/// The fields are in the order in which they are let go of.
struct HeldDisk {
    /// `None` where snapshots are not changed. Why there is none is told to the first action that wants to change them.
    change: Option<Result<Box<dyn SnapshotChange>>>,
    quiesced: Option<Quiesced>,
    /// What is still held back of those who have been let go.
    flushes: Option<FlushesHeld>,
    disk: Disk,
    /// Which action began to change its snapshots.
    first: usize,
    /// How a message begins that the change as a whole has failed: as if its first step had.
    failure: String,
}

impl Held {
    /// Begins to change snapshots, and then holds all disks still at the same time: requests wait for the slowest, not for the sum.
    ///
    /// A disk that does not answer what it was sent before within [`limits::TRANSACTION_DRAIN`] makes it fail: others must
    /// not wait for a device that hangs. Requests go on then.
    pub(super) async fn begin(
        disks: Vec<Disk>,
        guests: Guests,
    ) -> std::result::Result<Held, QmpError> {
        if disks.iter().any(|disk| waits_for_flush(disk, guests)) {
            let changed = disks.iter().filter(|disk| disk.changes);
            let changed: Vec<&Node> = changed.map(|disk| &*disk.node).collect();
            flush_ahead(&changed).await;
        }
        let mut changes = join_all(disks.iter().map(begin_change)).await;
        let flushes = match guests {
            Guests::Wait => Some(hold_flushes(&disks).await?),
            Guests::GoOn => None,
        };
        if flushes.is_some() {
            let begun = changes.iter_mut().flatten();
            join_all(begun.map(|change| step(change, |change| change.hold_flushes()))).await;
        }
        let of_node = disks.iter().enumerate();
        let of_node = of_node.map(|(at, disk)| (place(&disk.node), at)).collect();
        let since = Instant::now();
        let (quiesced, drained) = unconstrained(hold(&disks, &mut changes, flushes)).await?;
        let held = disks.into_iter().zip(quiesced).zip(changes);
        let disks = held.map(|((disk, quiesced), change)| HeldDisk {
            change,
            quiesced,
            flushes: None,
            disk,
            first: 0,
            failure: String::new(),
        });
        Ok(Held {
            disks: disks.collect(),
            of_node,
            since: Some(since),
            parts: vec![("drain", drained), ("begin", Instant::now())],
            action: 0,
        })
    }

    /// Begins to change snapshots while guests go on; they are held by [`Held::hold`]. `None` where a disk needs them to stand still for
    /// that.
    pub(super) async fn ahead(disks: &[Disk]) -> Option<Held> {
        let mut changes = join_all(disks.iter().map(begin_change)).await;
        let begun = changes.iter_mut().flatten();
        if !join_all(begun.map(go_ahead)).await.into_iter().all(|go| go) {
            return None;
        }
        let of_node = disks.iter().enumerate();
        let of_node = of_node.map(|(at, disk)| (place(&disk.node), at)).collect();
        let held = disks.iter().zip(changes).map(|(disk, change)| HeldDisk {
            change,
            quiesced: None,
            flushes: None,
            disk: disk.clone(),
            first: 0,
            failure: String::new(),
        });
        Some(Held {
            disks: held.collect(),
            of_node,
            ..Held::default()
        })
    }

    /// Holds all disks still at the same time, when their changes have been made ahead.
    pub(super) async fn hold(&mut self) -> std::result::Result<(), QmpError> {
        let disks: Vec<Disk> = self.disks.iter().map(|held| held.disk.clone()).collect();
        let flushes = hold_flushes(&disks).await?;
        self.each(|change| change.hold_flushes()).await?;
        self.since = Some(Instant::now());
        let held = async {
            let quiesced = quiesce(&disks, flushes).await?;
            for (held, quiesced) in self.disks.iter_mut().zip(quiesced) {
                held.quiesced = Some(quiesced);
            }
            self.mark("drain");
            self.each(|change| change.hold()).await
        };
        // No turns are taken with other tasks of the thread: guests wait.
        unconstrained(held).await?;
        self.mark("begin");
        Ok(())
    }

    /// Does a part of all changes.
    async fn each(
        &mut self,
        part: impl for<'c> Fn(&'c mut dyn SnapshotChange) -> BoxFuture<'c, Result<()>>,
    ) -> std::result::Result<(), QmpError> {
        let done = self.disks.iter_mut().map(|held| held.run(&part));
        join_all(done).await.into_iter().collect()
    }

    /// A part of what is done while guests wait has ended.
    pub(super) fn mark(&mut self, part: &'static str) {
        self.parts.push((part, Instant::now()));
    }

    /// What shows that a node is held still. `None` in a dry run.
    pub(crate) fn quiesced(&self, node: &Arc<Node>) -> Option<&Quiesced> {
        self.find(node)?.quiesced.as_ref()
    }

    /// The size that a disk will have in bytes: a revert to a snapshot may change it.
    pub(crate) fn size(&self, node: &Arc<Node>) -> u64 {
        match self.find(node).and_then(|held| held.change.as_ref()) {
            Some(Ok(change)) => change.size(),
            _ => node.size(),
        }
    }

    /// Whether the internal snapshots of a disk are changed: until the end of the change the driver does nothing else.
    pub(crate) fn changes(&self, node: &Arc<Node>) -> bool {
        let held = self.find(node);
        held.is_some_and(|held| matches!(held.change, Some(Ok(_))))
    }

    fn find(&self, node: &Arc<Node>) -> Option<&HeldDisk> {
        self.disks.get(*self.of_node.get(&place(node))?)
    }

    /// The change of a disk whose snapshots the plan says are changed. `failure` is how the message begins should it fail.
    pub(super) fn change(
        &mut self,
        node: &Arc<Node>,
        failure: &str,
    ) -> Result<&mut dyn SnapshotChange> {
        let at = self.of_node.get(&place(node));
        let held = at.and_then(|at| self.disks.get_mut(*at));
        let action = self.action;
        let Some((change, text, first)) =
            held.and_then(|held| Some((held.change.as_mut()?, &mut held.failure, &mut held.first)))
        else {
            // An action that changes what it did not name.
            return Err(Error::new(ErrorKind::InvalidInput, "The disk is not held"));
        };
        if text.is_empty() {
            failure.clone_into(text);
            *first = action;
        }
        match change {
            Ok(change) => Ok(&mut **change),
            Err(error) => Err(error.clone()),
        }
    }

    /// Whether guests may go on before the transaction is decided: what they write from then on comes behind it. Were only some of them
    /// let go, the others would wait for their writes to become durable.
    pub(super) async fn may_let_go(&mut self) -> std::result::Result<bool, QmpError> {
        let mut disks = self.disks.iter();
        if disks.any(|held| held.disk.until == Until::Decided) {
            return Ok(false);
        }
        let disks = self.disks.iter_mut();
        let allowed = disks.map(|held| async {
            match held.change {
                Some(_) => held.run(|change| change.may_let_go()).await,
                None => Ok(true),
            }
        });
        let allowed: std::result::Result<Vec<bool>, QmpError> =
            join_all(allowed).await.into_iter().collect();
        let allowed = allowed?.into_iter().all(|allowed| allowed);
        self.mark("space");
        Ok(allowed)
    }

    /// Whether the graph leads guests of a disk elsewhere when it is committed.
    pub(super) fn leads(&self) -> bool {
        let mut disks = self.disks.iter();
        disks.any(|held| held.disk.until != Until::LetGo)
    }

    /// Lets guests go on; flushes of new overlays wait.
    pub(super) async fn let_go(&mut self) -> std::result::Result<(), QmpError> {
        let mut leaving = Leaving::of(&mut self.disks);
        let ready = leaving.ready.clone();
        let disks = self.disks.iter_mut().enumerate();
        let let_go = disks.map(|(at, held)| {
            let ready = ready.clone();
            let then = Box::new(move |requests| lock(&ready).push((at, requests)));
            async move {
                match held.change {
                    Some(_) => held.run(|change| change.let_go(then)).await.map(drop),
                    None => {
                        then(RequestsHeld::not());
                        Ok(())
                    }
                }
            }
        });
        let let_go = leaving.go_with(join_all(let_go)).await;
        let let_go: std::result::Result<(), QmpError> = let_go.into_iter().collect();
        if let Some(last) = leaving.back_to(&mut self.disks)
            && self.disks.iter().all(|held| held.quiesced.is_none())
        {
            self.parts.push(("let go", last));
            self.log_wait(self.disks.len());
        }
        let_go
    }

    /// Makes durable what all changes need.
    pub(super) async fn prepare(&mut self) -> std::result::Result<(), QmpError> {
        self.each(|change| change.prepare()).await
    }

    /// Whether [`Held::prepare`] would do it, for all changes: (action that began the change, its error).
    pub(super) async fn try_out(&mut self) -> Vec<(usize, QmpError)> {
        let disks = self.disks.iter_mut();
        let tried = disks.map(|held| async {
            let first = held.first;
            let tried = held.run(|change| change.try_out()).await;
            tried.err().map(|error| (first, error))
        });
        join_all(tried).await.into_iter().flatten().collect()
    }

    /// What the commit will write, as (place among the images of the journal, switch). Images that are in no journal are left out.
    pub(super) async fn switches(
        &mut self,
    ) -> std::result::Result<Vec<(usize, HeaderSwitch)>, QmpError> {
        let disks = self.disks.iter_mut();
        let switches = disks.map(|held| async {
            let place = held.disk.journaled;
            let switch = held.run(|change| change.switch()).await?;
            Ok(place.zip(switch))
        });
        let switches: std::result::Result<Vec<_>, QmpError> =
            join_all(switches).await.into_iter().collect();
        Ok(switches?.into_iter().flatten().collect())
    }

    /// Makes all changes. After an error some have been made, which is to be followed by [`Held::roll_back`].
    pub(super) async fn commit(&mut self) -> std::result::Result<(), QmpError> {
        self.each(|change| change.commit()).await
    }

    /// What is still held back of guests that have been let go.
    pub(super) fn take_flushes(&mut self) -> Vec<FlushesHeld> {
        let disks = self.disks.iter_mut();
        disks.filter_map(|held| held.flushes.take()).collect()
    }

    /// Takes back what was made, and lets requests go on. Answers the disks of which that has failed.
    ///
    /// A disk that hangs is left to a task of its own, which takes its change back when it is done; until then it is left.
    pub(super) async fn roll_back(self) -> Vec<Disk> {
        let disks = self.disks.into_iter().map(|mut held| async move {
            if let Ok(left) = timeout(limits::TRANSACTION_STEP, held.roll_back()).await {
                return left.then_some(held.disk);
            }
            let disk = held.disk.clone();
            let device = &disk.device;
            log::error!("device '{device}' hangs in a transaction that has failed");
            // It ends when the disk answers, or with the process.
            tokio::spawn(async move { held.roll_back().await });
            Some(disk)
        });
        join_all(disks).await.into_iter().flatten().collect()
    }

    /// The changes stay, and requests go on. How long they waited is logged. Answers what holds the headers of the images.
    pub(super) fn release(mut self) -> Vec<HeaderHeld> {
        self.mark("commit");
        let disks = std::mem::take(&mut self.disks);
        let count = disks.len();
        let mut headers = Vec::new();
        for held in disks {
            if let Some(Ok(change)) = held.change {
                headers.push(change.finish());
            }
        }
        self.log_wait(count);
        headers
    }

    /// Says how long guests waited, and for what: once, when they go on.
    fn log_wait(&mut self, disks: usize) {
        let Some(since) = self.since.take() else {
            return;
        };
        let end = self.parts.last().map_or(since, |(_, end)| *end);
        let waited = end.duration_since(since);
        let level = match waited > limits::TRANSACTION_LONG_HOLD {
            true => log::Level::Warn,
            false => log::Level::Info,
        };
        let mut begin = since;
        let mut each = Vec::new();
        for (part, end) in &self.parts {
            each.push(format!("{part} {:.1?}", end.duration_since(begin)));
            begin = *end;
        }
        let each = each.join(", ");
        log::log!(
            target: "qblockd::transaction",
            level,
            "transaction over {disks} disks: guests waited {waited:.1?} ({each})"
        );
    }
}

/// Guests that are let go.
struct Leaving {
    /// What holds back each disk, and whether its flushes stay.
    disks: Vec<(Option<Quiesced>, Option<FlushesHeld>, Until)>,
    /// The places of disks that can go on, and what else holds them back.
    ready: Arc<Mutex<Vec<(usize, RequestsHeld)>>>,
    /// When the last of them went on.
    last: Option<Instant>,
}

impl Leaving {
    /// Takes what holds back the disks.
    fn of(disks: &mut [HeldDisk]) -> Self {
        let disks = disks
            .iter_mut()
            .map(|held| (held.quiesced.take(), None, held.disk.until));
        Leaving {
            disks: disks.collect(),
            ready: Arc::default(),
            last: None,
        }
    }

    /// Lets go on who can, while what they wait for is done.
    ///
    /// Mostly that is all of them behind the first look at it, before anything is written. They go on at once: the guests of the first
    /// would keep the rest from the processor.
    async fn go_with<T>(&mut self, let_go: impl Future<Output = T>) -> T {
        let mut let_go = pin!(let_go);
        poll_fn(|context| {
            let let_go = let_go.as_mut().poll(context);
            self.go();
            let_go
        })
        .await
    }

    /// Lets go on who can.
    fn go(&mut self) {
        let ready = std::mem::take(&mut *lock(&self.ready));
        let go_on = !ready.is_empty();
        for (at, requests) in ready {
            let Some((quiesced, flushes, until)) = self.disks.get_mut(at) else {
                continue;
            };
            drop(requests);
            let held = quiesced.take().map(Quiesced::into_flushes);
            *flushes = held.filter(|_| *until == Until::Flushes);
        }
        if go_on {
            self.last = Some(Instant::now());
        }
    }

    /// Gives back what still holds. Answers when the last of the others went on.
    fn back_to(self, disks: &mut [HeldDisk]) -> Option<Instant> {
        for (held, (quiesced, flushes, _)) in disks.iter_mut().zip(self.disks) {
            (held.quiesced, held.flushes) = (quiesced, flushes);
        }
        self.last
    }
}

impl HeldDisk {
    /// Runs a part of the change, for as long as guests may be made to wait. One that could not be begun has failed an action and
    /// does not come here.
    async fn run<'h, T: Default>(
        &'h mut self,
        part: impl FnOnce(&'h mut dyn SnapshotChange) -> BoxFuture<'h, Result<T>>,
    ) -> std::result::Result<T, QmpError> {
        let HeldDisk {
            change, failure, ..
        } = self;
        let Some(Ok(change)) = change else {
            return Ok(T::default());
        };
        let part = async {
            let seconds = limits::TRANSACTION_STEP.as_secs();
            match timeout(limits::TRANSACTION_STEP, part(&mut **change)).await {
                Ok(done) => done.map_err(|error| error.to_string()),
                Err(_) => Err(format!("the disk has not answered within {seconds} s")),
            }
            .map_err(|error| QmpError::generic(format!("{failure}: {error}")))
        };
        guarded(part).await
    }

    /// Takes back a change, as far as it was made. Answers whether that fails.
    async fn roll_back(&mut self) -> bool {
        let Some(Ok(change)) = &mut self.change else {
            return false;
        };
        let Err(error) = change.roll_back().await else {
            return false;
        };
        let Disk { device, node, .. } = &self.disk;
        log::error!(
            "device '{device}': the snapshot operations of a transaction that has failed could not be taken \
             back: {error}. They may have happened to '{}'. Its snapshots cannot be changed before it has been opened \
             again; look at them then",
            node.driver().info().filename
        );
        true
    }
}

/// Holds requests back. Behind the time that it answers all disks show the same moment.
async fn hold(
    disks: &[Disk],
    changes: &mut [Option<Result<Box<dyn SnapshotChange>>>],
    flushes: Option<FlushesHeld>,
) -> std::result::Result<(Vec<Option<Quiesced>>, Instant), QmpError> {
    let quiesced = match flushes {
        Some(flushes) => quiesce(disks, flushes)
            .await?
            .into_iter()
            .map(Some)
            .collect(),
        None => disks.iter().map(|_| None).collect(),
    };
    let drained = Instant::now();
    // What does not come by way of the nodes.
    let begun = changes.iter_mut().flatten();
    join_all(begun.map(|change| step(change, |change| change.hold()))).await;
    Ok((quiesced, drained))
}

/// Holds flushes of all disks back.
async fn hold_flushes(disks: &[Disk]) -> std::result::Result<FlushesHeld, QmpError> {
    let held = hold_flushes_within(&nodes(disks), limits::TRANSACTION_DRAIN).await;
    held.map_err(|slow| hangs(disks, slow))
}

/// Holds requests to all disks back, from one moment on.
async fn quiesce(
    disks: &[Disk],
    flushes: FlushesHeld,
) -> std::result::Result<Vec<Quiesced>, QmpError> {
    let quiesced = quiesce_all_within(&nodes(disks), flushes, limits::TRANSACTION_DRAIN).await;
    quiesced.map_err(|slow| hangs(disks, slow))
}

fn nodes(disks: &[Disk]) -> Vec<Arc<Node>> {
    disks.iter().map(|disk| disk.node.clone()).collect()
}

/// The error of a disk whose requests do not end.
fn hangs(disks: &[Disk], slow: usize) -> QmpError {
    let device = disks.get(slow).map_or("", |disk| &disk.device);
    let seconds = limits::TRANSACTION_DRAIN.as_secs();
    QmpError::generic(format!(
        "Device '{device}' has not finished its requests within {seconds} s"
    ))
}

fn lock<T>(place: &Mutex<T>) -> MutexGuard<'_, T> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether guests of the disk wait until its change is durable, or in a dry run, until that has been tried.
fn waits_for_flush(disk: &Disk, guests: Guests) -> bool {
    let snapshots = disk.node.driver().snapshots();
    disk.until == Until::Decided && guests == Guests::Wait
        || snapshots.is_some_and(Snapshots::holds_requests)
}

/// Read-only disks and formats without snapshots have failed the action before.
async fn begin_change(disk: &Disk) -> Option<Result<Box<dyn SnapshotChange>>> {
    if !disk.changes {
        return None;
    }
    let Some(snapshots) = disk.node.driver().snapshots() else {
        return Some(Err(Error::new(
            ErrorKind::Unsupported,
            "The format has no internal snapshots",
        )));
    };
    Some(in_time(snapshots.change()).await)
}

/// Does a step of a change that could be begun. One that fails has not been begun.
async fn step(
    change: &mut Result<Box<dyn SnapshotChange>>,
    step: impl for<'c> FnOnce(&'c mut dyn SnapshotChange) -> BoxFuture<'c, Result<()>>,
) {
    if let Ok(begun) = change
        && let Err(error) = in_time(step(&mut **begun)).await
    {
        *change = Err(error);
    }
}

/// Whether the change of a disk can be made while guests go on. One that could not be begun tells its action why.
async fn go_ahead(change: &mut Result<Box<dyn SnapshotChange>>) -> bool {
    match change {
        // An error is met again where it is told.
        Ok(begun) => in_time(begun.go_ahead()).await.unwrap_or(false),
        Err(_) => true,
    }
}

/// Does a step of a change, for as long as guests may be made to wait.
async fn in_time<T>(step: impl Future<Output = Result<T>>) -> Result<T> {
    let done = timeout(limits::TRANSACTION_STEP, step).await;
    done.unwrap_or_else(|_| {
        let seconds = limits::TRANSACTION_STEP.as_secs();
        let text = format!("the disk has not answered within {seconds} s");
        Err(Error::new(ErrorKind::Io, text))
    })
}

/// Makes durable what has been written, while guests go on, until a flush ends soon: the flushes of what comes next, for which
/// guests wait, have little left to do then.
pub(crate) async fn flush_ahead(disks: &[&Node]) {
    for _ in 0..limits::FLUSHES_AHEAD {
        let start = Instant::now();
        let flushes = disks.iter().map(|disk| disk.flush());
        // An error is for what comes next to report: it flushes again.
        let failed = join_all(flushes).await.iter().any(Result::is_err);
        if failed || start.elapsed() < limits::SHORT_FLUSH {
            return;
        }
    }
}
