//! Several actions as one: all of them happen, or none.
//!
//! ```text
//!   flush ahead -> hold back requests, begin a change of each disk's snapshots
//!     -> prepare actions 1, 2, 3 -> prepare the changes -> commit the changes -> commit the actions -> let go
//!               |                      |                     | fails
//!               |                      |                     +-> roll back the changes that were made
//!               +----------------------+---------------------+-> abort the actions 3, 2, 1 -> the error
//! ```
//!
//! Prepare does all that can fail; commit cannot. The commit of a change is between the two: it is one write for each
//! disk. Internal snapshots are steps of their disk's change, in the order of the actions, so that there is nothing to take back
//! before that write. A snapshot command on its own is a transaction of one action: there is one way to do it.
//!
//! * `changes`: the disks that are held, with the changes of their snapshots
//! * `snapshot`: the actions on internal snapshots

mod changes;
mod snapshot;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use block::driver::{BoxFuture, SnapshotInfo};
use block::graph::Node;
use block::io::RunToEnd;
use futures_util::FutureExt;
use qapi::rt::QmpError;

use changes::Changes;
pub(crate) use snapshot::{Operation, SnapshotAction};

/// A part of a transaction.
pub(crate) trait Action: Send {
    /// The disk whose internal snapshots the action changes. Requests to it wait from before the first action is prepared until
    /// the last is committed, and all actions on it share one change.
    fn snapshots_of(&self) -> Option<&Disk> {
        None
    }

    /// Does all that can fail, on what earlier actions have left. Called once; after an error the action has had no effect
    /// and is not aborted.
    fn prepare<'a>(&'a mut self, changes: &'a mut Changes) -> BoxFuture<'a, Result<(), QmpError>>;

    /// Takes back what `prepare` did, but for steps of changes, which go with their change. What cannot be taken back is
    /// logged with what the user must do.
    fn abort(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    /// Makes it final. Only after all actions of the transaction are prepared. Answers the snapshot that it was about, if
    /// it was about one.
    fn commit(self: Box<Self>) -> Option<SnapshotInfo>;
}

/// A disk of a transaction.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    /// What the client called it.
    pub(crate) device: String,
    /// Its root.
    pub(crate) node: Arc<Node>,
    /// The nodes that show snapshots of it.
    pub(crate) views: Vec<Arc<Node>>,
}

/// The `abort` action: makes every transaction that has it fail. For tests of clients.
pub(crate) struct Abort;

impl Action for Abort {
    fn prepare<'a>(&'a mut self, _: &'a mut Changes) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(async { Err(QmpError::generic("Transaction aborted using Abort action")) })
    }

    fn commit(self: Box<Self>) -> Option<SnapshotInfo> {
        None
    }
}

/// Carries out all actions, and answers what each was about; or none, and answers the first error.
///
/// # Cancellation
/// When the future is dropped the transaction goes on to its end: some disks done and others not is what nobody wants.
pub(crate) async fn run(
    actions: Vec<Box<dyn Action>>,
) -> Result<Vec<Option<SnapshotInfo>>, QmpError> {
    RunToEnd::new(carry_out(actions)).await
}

async fn carry_out(
    mut actions: Vec<Box<dyn Action>>,
) -> Result<Vec<Option<SnapshotInfo>>, QmpError> {
    let disks = actions.iter().filter_map(|action| action.snapshots_of());
    let mut changes = Changes::begin(disks.cloned().collect()).await;
    let mut prepared = 0;
    let committed = async {
        for action in &mut actions {
            guarded(action.prepare(&mut changes)).await?;
            prepared += 1;
        }
        changes.prepare().await?;
        changes.commit().await
    };
    if let Err(error) = committed.await {
        for action in actions.iter_mut().take(prepared).rev() {
            action.abort().await;
        }
        return Err(error);
    }
    let about = actions.into_iter().map(|action| action.commit()).collect();
    changes.finish();
    Ok(about)
}

/// A panic is a failure like any other: what the others did must be taken back.
async fn guarded<T>(part: impl Future<Output = Result<T, QmpError>>) -> Result<T, QmpError> {
    AssertUnwindSafe(part)
        .catch_unwind()
        .await
        .unwrap_or_else(|_| Err(crate::daemon::internal_error()))
}

#[cfg(test)]
mod tests;
