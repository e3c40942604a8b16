//! The disks of a transaction while guests stand still, some with a change of their internal snapshots.

use std::sync::Arc;
use std::time::Instant;

use block::driver::{BoxFuture, HeaderHeld, HeaderSwitch, Requests as _, SnapshotChange};
use block::error::{Error, ErrorKind, Result};
use block::graph::{Node, Quiesced, quiesce_all_within};
use futures_util::future::join_all;
use qapi::rt::QmpError;
use tokio::time::timeout;

use super::{Disk, guarded};
use crate::limits;

/// All disks that are held. Dropped before `commit`, nothing has happened to any.
pub(crate) struct Held {
    disks: Vec<HeldDisk>,
    since: Instant,
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
    disk: Disk,
    /// Which action began to change its snapshots.
    first: usize,
    /// How a message begins that the change as a whole has failed: as if its first step had.
    failure: String,
}

/// What is left when not all could be taken back.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// What the client calls the disks.
    pub(super) devices: Vec<String>,
}

impl Held {
    /// Holds all disks still at the same time, and begins to change snapshots: requests wait for the slowest, not for the sum.
    ///
    /// A disk that does not answer what it was sent before within [`limits::TRANSACTION_DRAIN`] makes it fail: others must
    /// not wait for a device that hangs. Requests go on then.
    pub(super) async fn begin(
        disks: Vec<Disk>,
        guests: Guests,
    ) -> std::result::Result<Held, QmpError> {
        flush_ahead(&disks).await;
        let since = Instant::now();
        let quiesced: Vec<Option<Quiesced>> = match guests {
            Guests::Wait => quiesce(&disks).await?.into_iter().map(Some).collect(),
            Guests::GoOn => disks.iter().map(|_| None).collect(),
        };
        // Behind the last of these all disks show the same moment.
        let drained = Instant::now();
        let changes = join_all(disks.iter().map(begin_change)).await;
        let held = disks.into_iter().zip(quiesced).zip(changes);
        let disks = held.map(|((disk, quiesced), change)| HeldDisk {
            change,
            quiesced,
            disk,
            first: 0,
            failure: String::new(),
        });
        Ok(Held {
            disks: disks.collect(),
            since,
            parts: vec![("drain", drained), ("begin", Instant::now())],
            action: 0,
        })
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
        let mut disks = self.disks.iter();
        disks.find(|held| Arc::ptr_eq(&held.disk.node, node))
    }

    /// The change of a disk whose snapshots the plan says are changed. `failure` is how the message begins should it fail.
    pub(super) fn change(
        &mut self,
        node: &Arc<Node>,
        failure: &str,
    ) -> Result<&mut dyn SnapshotChange> {
        let mut disks = self.disks.iter_mut();
        let held = disks.find(|held| Arc::ptr_eq(&held.disk.node, node));
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

    /// Makes durable what all changes need.
    pub(super) async fn prepare(&mut self) -> std::result::Result<(), QmpError> {
        let disks = self.disks.iter_mut();
        let prepared = disks.map(|held| held.run(|change| change.prepare()));
        join_all(prepared).await.into_iter().collect()
    }

    /// As [`Held::prepare`], and whatever fails: (action that began the change, its error).
    pub(super) async fn try_prepare(&mut self) -> Vec<(usize, QmpError)> {
        let disks = self.disks.iter_mut();
        let prepared = disks.map(|held| async {
            let first = held.first;
            let prepared = held.run(|change| change.prepare()).await;
            prepared.err().map(|error| (first, error))
        });
        join_all(prepared).await.into_iter().flatten().collect()
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
        let disks = self.disks.iter_mut();
        let committed = disks.map(|held| held.run(|change| change.commit()));
        join_all(committed).await.into_iter().collect()
    }

    /// Takes back what was made, and lets requests go on.
    ///
    /// A disk that hangs is left to a task of its own, which takes its change back when it is done; until then it is left.
    pub(super) async fn roll_back(self) -> Left {
        let disks = self.disks.into_iter().map(|mut held| async move {
            if let Ok(left) = timeout(limits::TRANSACTION_STEP, held.roll_back()).await {
                return left.then_some(held.disk.device);
            }
            let device = held.disk.device.clone();
            log::error!("device '{device}' hangs in a transaction that has failed");
            // It ends when the disk answers, or with the process.
            tokio::spawn(async move { held.roll_back().await });
            Some(device)
        });
        let left = join_all(disks).await;
        Left {
            devices: left.into_iter().flatten().collect(),
        }
    }

    /// The changes stay, and requests go on. How long they waited is logged. Answers what holds the headers of the images.
    pub(super) fn release(mut self) -> Vec<HeaderHeld> {
        self.mark("commit");
        let Held {
            disks,
            since,
            parts,
            ..
        } = self;
        let count = disks.len();
        let mut headers = Vec::new();
        for held in disks {
            if let Some(Ok(change)) = held.change {
                headers.push(change.finish());
            }
        }
        log_wait(count, since, &parts);
        headers
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

/// Says how long guests waited, and for what.
fn log_wait(disks: usize, since: Instant, parts: &[(&str, Instant)]) {
    let waited = since.elapsed();
    let level = match waited > limits::TRANSACTION_LONG_HOLD {
        true => log::Level::Warn,
        false => log::Level::Info,
    };
    let mut begin = since;
    let mut each = Vec::new();
    for (part, end) in parts {
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

/// Holds requests to all disks back, from one moment on.
async fn quiesce(disks: &[Disk]) -> std::result::Result<Vec<Quiesced>, QmpError> {
    let nodes: Vec<Arc<Node>> = disks.iter().map(|disk| disk.node.clone()).collect();
    let quiesced = quiesce_all_within(&nodes, limits::TRANSACTION_DRAIN).await;
    quiesced.map_err(|slow| {
        let device = disks.get(slow).map_or("", |disk| &disk.device);
        let seconds = limits::TRANSACTION_DRAIN.as_secs();
        QmpError::generic(format!(
            "Device '{device}' has not finished its requests within {seconds} s"
        ))
    })
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
    let begun = timeout(limits::TRANSACTION_STEP, snapshots.change()).await;
    Some(begun.unwrap_or_else(|_| {
        let seconds = limits::TRANSACTION_STEP.as_secs();
        let text = format!("the disk has not answered within {seconds} s");
        Err(Error::new(ErrorKind::Io, text))
    }))
}

/// Makes durable what has been written, while guests go on, until a flush ends soon: the flushes of a snapshot, for which
/// guests wait, have little left to do then.
async fn flush_ahead(disks: &[Disk]) {
    for _ in 0..limits::SNAPSHOT_FLUSHES_AHEAD {
        let start = Instant::now();
        let flushes = disks.iter().filter(|disk| disk.changes);
        let flushes = flushes.map(|disk| disk.node.flush());
        // An error is the snapshot's to report: it flushes again.
        let failed = join_all(flushes).await.iter().any(Result::is_err);
        if failed || start.elapsed() < limits::SNAPSHOT_SHORT_FLUSH {
            return;
        }
    }
}
