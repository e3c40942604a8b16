//! The disks of a transaction while it runs: held still, each with one change of its internal snapshots.

use std::sync::Arc;
use std::time::Instant;

use block::driver::{BoxFuture, Requests as _, SnapshotChange};
use block::error::{Error, ErrorKind, Result};
use block::graph::{Node, Quiesced};
use futures_util::future::join_all;
use qapi::rt::QmpError;

use super::{Disk, guarded};
use crate::limits;

/// All of them. Dropped before `commit`, nothing has happened to any.
pub(crate) struct Changes(Vec<Held>);

/// A disk that is held still. The fields are in the order in which they are let go of.
struct Held {
    /// Why there is none is told to the first action that wants to do something with it.
    change: Result<Box<dyn SnapshotChange>>,
    _quiesced: Quiesced,
    disk: Disk,
    /// How a message begins that the change as a whole has failed: as if its first step had.
    failure: String,
}

impl Changes {
    /// Holds all disks still, each once however often it occurs, and begins to change their snapshots.
    ///
    /// What happens to one disk happens to all at the same time: requests wait for the slowest, not for the sum.
    pub(super) async fn begin(disks: Vec<Disk>) -> Changes {
        let mut distinct: Vec<Disk> = Vec::new();
        for disk in disks {
            let is_same = |known: &Disk| Arc::ptr_eq(&known.node, &disk.node);
            if !distinct.iter().any(is_same) {
                distinct.push(disk);
            }
        }
        flush_ahead(&distinct).await;
        let quiesced = join_all(distinct.iter().map(|disk| disk.node.quiesce())).await;
        // Behind the last of these all disks show the same moment.
        let changes = join_all(distinct.iter().map(|disk| begin_change(&disk.node))).await;
        let held = distinct.into_iter().zip(quiesced).zip(changes);
        Changes(
            held.map(|((disk, quiesced), change)| Held {
                change,
                _quiesced: quiesced,
                disk,
                failure: String::new(),
            })
            .collect(),
        )
    }

    /// The change of a disk that an action of this transaction has named. `failure` is how the message begins should it fail.
    pub(super) fn of(
        &mut self,
        node: &Arc<Node>,
        failure: &str,
    ) -> Result<&mut dyn SnapshotChange> {
        let mut held = self.0.iter_mut();
        let held = held.find(|held| Arc::ptr_eq(&held.disk.node, node));
        let Some(held) = held else {
            // An action that changes what it did not name.
            return Err(Error::new(ErrorKind::InvalidInput, "The disk is not held"));
        };
        if held.failure.is_empty() {
            failure.clone_into(&mut held.failure);
        }
        match &mut held.change {
            Ok(change) => Ok(&mut **change),
            Err(error) => Err(error.clone()),
        }
    }

    /// Makes durable what all changes need.
    pub(super) async fn prepare(&mut self) -> std::result::Result<(), QmpError> {
        let prepared = self
            .0
            .iter_mut()
            .map(|held| held.run(|change| change.prepare()));
        join_all(prepared).await.into_iter().collect()
    }

    /// Makes all changes, or none: if one cannot be made, those that were are rolled back.
    pub(super) async fn commit(&mut self) -> std::result::Result<(), QmpError> {
        let committed = self
            .0
            .iter_mut()
            .map(|held| held.run(|change| change.commit()));
        let committed = join_all(committed).await;
        let Some(error) = committed.iter().find_map(|result| result.as_ref().err()) else {
            return Ok(());
        };
        let made = self.0.iter_mut().zip(&committed);
        let made = made.filter_map(|(held, result)| result.is_ok().then_some(held));
        let left = join_all(made.map(Held::roll_back)).await;
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

    /// The changes stay, and requests go on.
    pub(super) fn finish(self) {
        for held in self.0 {
            if let Ok(change) = held.change {
                change.finish();
            }
        }
    }
}

impl Held {
    /// Runs a part of the change. One that could not be begun has failed an action and does not come here.
    async fn run<'h>(
        &'h mut self,
        part: impl FnOnce(&'h mut dyn SnapshotChange) -> BoxFuture<'h, Result<()>>,
    ) -> std::result::Result<(), QmpError> {
        let Held {
            change, failure, ..
        } = self;
        let Ok(change) = change else {
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
        let Ok(change) = &mut self.change else {
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

/// Read-only disks and formats without snapshots have failed the action before.
async fn begin_change(node: &Node) -> Result<Box<dyn SnapshotChange>> {
    match node.driver().snapshots() {
        Some(snapshots) => snapshots.change().await,
        None => Err(Error::new(
            ErrorKind::Unsupported,
            "The format has no internal snapshots",
        )),
    }
}

/// Makes durable what has been written, while guests go on, until a flush ends soon: the flushes of a snapshot, for which
/// guests wait, have little left to do then.
async fn flush_ahead(disks: &[Disk]) {
    for _ in 0..limits::SNAPSHOT_FLUSHES_AHEAD {
        let start = Instant::now();
        let flushes = disks.iter().map(|disk| disk.node.flush());
        // An error is the snapshot's to report: it flushes again.
        let failed = join_all(flushes).await.iter().any(Result::is_err);
        if failed || start.elapsed() < limits::SNAPSHOT_SHORT_FLUSH {
            return;
        }
    }
}
