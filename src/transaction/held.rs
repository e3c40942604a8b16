//! The disks of a transaction while guests stand still, some with a change of their internal snapshots.

use std::sync::Arc;
use std::time::{Duration, Instant};

use block::driver::{BoxFuture, Requests as _, SnapshotChange};
use block::error::{Error, ErrorKind, Result};
use block::graph::{Node, Quiesced};
use futures_util::future::join_all;
use qapi::rt::QmpError;
use tokio::time::timeout;

use super::{Disk, guarded};
use crate::limits;

/// All disks that are held. Dropped before `commit`, nothing has happened to any.
pub(crate) struct Held {
    disks: Vec<HeldDisk>,
    since: Instant,
}

/// The fields are in the order in which they are let go of.
struct HeldDisk {
    /// `None` where snapshots are not changed. Why there is none is told to the first action that wants to change them.
    change: Option<Result<Box<dyn SnapshotChange>>>,
    quiesced: Quiesced,
    disk: Disk,
    /// How a message begins that the change as a whole has failed: as if its first step had.
    failure: String,
}

impl Held {
    /// Holds all disks still at the same time, and begins to change snapshots: requests wait for the slowest, not for the sum.
    ///
    /// A disk that does not answer what it was sent before within [`limits::TRANSACTION_DRAIN`] makes it fail: others must
    /// not wait for a device that hangs. Requests go on then.
    pub(super) async fn begin(disks: Vec<Disk>) -> std::result::Result<Held, QmpError> {
        flush_ahead(&disks).await;
        let since = Instant::now();
        let quiesced = quiesce_all(&disks).await?;
        // Behind the last of these all disks show the same moment.
        let changes = join_all(disks.iter().map(begin_change)).await;
        let held = disks.into_iter().zip(quiesced).zip(changes);
        let disks = held.map(|((disk, quiesced), change)| HeldDisk {
            change,
            quiesced,
            disk,
            failure: String::new(),
        });
        Ok(Held {
            disks: disks.collect(),
            since,
        })
    }

    /// What shows that a node is held still.
    #[allow(dead_code, reason = "graph changes need it")]
    pub(crate) fn quiesced(&self, node: &Arc<Node>) -> Option<&Quiesced> {
        self.find(node).map(|held| &held.quiesced)
    }

    #[allow(dead_code, reason = "new layers need it")]
    /// The size that a disk will have in bytes: a revert to a snapshot may change it.
    pub(crate) fn size(&self, node: &Arc<Node>) -> u64 {
        match self.find(node).and_then(|held| held.change.as_ref()) {
            Some(Ok(change)) => change.size(),
            _ => node.size(),
        }
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
        let Some((change, text)) =
            held.and_then(|held| Some((held.change.as_mut()?, &mut held.failure)))
        else {
            // An action that changes what it did not name.
            return Err(Error::new(ErrorKind::InvalidInput, "The disk is not held"));
        };
        if text.is_empty() {
            failure.clone_into(text);
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

    /// Makes all changes, or none: if one cannot be made, those that were are rolled back.
    pub(super) async fn commit(&mut self) -> std::result::Result<(), QmpError> {
        let disks = self.disks.iter_mut();
        let committed = disks.map(|held| held.run(|change| change.commit()));
        let committed = join_all(committed).await;
        let Some(error) = committed.iter().find_map(|result| result.as_ref().err()) else {
            return Ok(());
        };
        let made = self.disks.iter_mut().zip(&committed);
        let made = made.filter_map(|(held, result)| result.is_ok().then_some(held));
        let left = join_all(made.map(HeldDisk::roll_back)).await;
        let left: Vec<&str> = left.into_iter().flatten().collect();
        Err(match left.is_empty() {
            true => error.clone(),
            false => QmpError::generic(format!(
                "{}; and what was done to '{}' could not be taken back, see the daemon's log",
                error.desc,
                left.join("', '")
            )),
        })
    }

    /// The changes stay, and requests go on. Answers how long they waited.
    pub(super) fn release(self) -> Duration {
        let Held { disks, since } = self;
        for held in disks {
            if let Some(Ok(change)) = held.change {
                change.finish();
            }
        }
        since.elapsed()
    }
}

impl HeldDisk {
    /// Runs a part of the change. One that could not be begun has failed an action and does not come here.
    async fn run<'h>(
        &'h mut self,
        part: impl FnOnce(&'h mut dyn SnapshotChange) -> BoxFuture<'h, Result<()>>,
    ) -> std::result::Result<(), QmpError> {
        let HeldDisk {
            change, failure, ..
        } = self;
        let Some(Ok(change)) = change else {
            return Ok(());
        };
        let part = async {
            let done = part(&mut **change).await;
            done.map_err(|error| QmpError::generic(format!("{failure}: {error}")))
        };
        guarded(part).await
    }

    /// Takes back a change that was made. Answers the disk's name if that fails.
    async fn roll_back(&mut self) -> Option<&str> {
        let Some(Ok(change)) = &mut self.change else {
            return None;
        };
        let error = change.roll_back().await.err()?;
        let Disk { device, node, .. } = &self.disk;
        log::error!(
            "device '{device}': the snapshot operations of a transaction that failed on another disk could not be taken \
             back: {error}. They may have happened to '{}'. Its snapshots cannot be changed before it has been opened \
             again; look at them then",
            node.driver().info().filename
        );
        Some(device)
    }
}

/// Holds back requests to all disks, and waits for those under way.
async fn quiesce_all(disks: &[Disk]) -> std::result::Result<Vec<Quiesced>, QmpError> {
    let quiesced = disks.iter().map(|disk| async {
        let quiesced = timeout(limits::TRANSACTION_DRAIN, disk.node.quiesce()).await;
        quiesced.map_err(|_| {
            QmpError::generic(format!(
                "Device '{}' has not finished its requests within {} s",
                disk.device,
                limits::TRANSACTION_DRAIN.as_secs()
            ))
        })
    });
    join_all(quiesced).await.into_iter().collect()
}

/// Read-only disks and formats without snapshots have failed the action before.
async fn begin_change(disk: &Disk) -> Option<Result<Box<dyn SnapshotChange>>> {
    if !disk.changes {
        return None;
    }
    Some(match disk.node.driver().snapshots() {
        Some(snapshots) => snapshots.change().await,
        None => Err(Error::new(
            ErrorKind::Unsupported,
            "The format has no internal snapshots",
        )),
    })
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
