//! What a kind of job implements.

use block::driver::BoxFuture;
use block::error::Result;

use super::context::JobContext;

/// The work of a job. It runs in a task of its own, which does one of these at a time, in this order:
///
/// ```text
///   run ──> prepare ──> commit ──> clean       all jobs of the group are prepared before any is committed
///     └────────┴──────> abort  ──> clean       after an error or a cancel of any job of the group
/// ```
///
/// A job that was cancelled before it could run is aborted and cleaned. A panic is an error like any other.
pub trait JobDriver: Send {
    /// Does the work.
    ///
    /// Calls [`JobContext::pause_point`] where it can be held.
    ///
    /// Cancellation: the future is dropped at any await when the job is cancelled by force. `abort` takes back what it left.
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> BoxFuture<'a, Result<()>>;

    /// Does what can fail of the job's end. Runs to its end.
    fn prepare(&mut self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Makes the work final. Runs to its end.
    fn commit(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    /// Takes the work back, as far as it can be. Runs to its end.
    fn abort(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    /// Gives back what was used, whatever happened. Nothing of the job is left behind it. Runs to its end.
    fn clean(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }
}
