//! Several actions as one: all of them happen, or none.
//!
//! ```text
//!   resolve (one look at the control state) -> quiesce all nodes -> prepare 1, 2, 3 -> commit all
//!                                                                      | fails
//!                                                                      +-> abort 2, 1 -> the error
//! ```
//!
//! Prepare does all that can fail; commit cannot. Cleaning up is dropping the actions and the quiesced sections. A
//! snapshot command on its own is a transaction of one action, so that there is one way to take a snapshot.

mod snapshot;

use std::panic::AssertUnwindSafe;

use block::driver::BoxFuture;
use futures_util::FutureExt;
use qapi::rt::QmpError;

pub(crate) use snapshot::SnapshotInternal;

/// A part of a transaction.
pub(crate) trait Action: Send {
    /// Does all that can fail. Called once; after an error the action has had no effect and is not aborted.
    fn prepare(&mut self) -> BoxFuture<'_, Result<(), QmpError>>;

    /// Takes back what `prepare` did. What cannot be taken back is logged with what the user must do.
    fn abort(&mut self) -> BoxFuture<'_, ()>;

    /// Makes it final. Only after all actions of the transaction are prepared.
    fn commit(self: Box<Self>);
}

/// The `abort` action: makes every transaction that has it fail. For tests of clients.
pub(crate) struct Abort;

impl Action for Abort {
    fn prepare(&mut self) -> BoxFuture<'_, Result<(), QmpError>> {
        Box::pin(async { Err(QmpError::generic("Transaction aborted using Abort action")) })
    }

    fn abort(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn commit(self: Box<Self>) {}
}

/// Prepares all actions in order and commits them, or aborts in reverse those that were prepared.
///
/// # Cancellation
/// When the future is dropped, what was prepared stays. The control loop drops a handler only when it is told twice
/// to end.
pub(crate) async fn run(mut actions: Vec<Box<dyn Action>>) -> Result<(), QmpError> {
    for at in 0..actions.len() {
        let (done, rest) = actions.split_at_mut(at);
        let Some(action) = rest.first_mut() else {
            break;
        };
        // A panic is a failure like any other: what the others did must be taken back.
        let prepared = AssertUnwindSafe(action.prepare())
            .catch_unwind()
            .await
            .unwrap_or_else(|_| Err(crate::daemon::internal_error()));
        if let Err(error) = prepared {
            for action in done.iter_mut().rev() {
                action.abort().await;
            }
            return Err(error);
        }
    }
    for action in actions {
        action.commit();
    }
    Ok(())
}

#[cfg(test)]
mod tests;
