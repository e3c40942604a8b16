//! The task of a job: runs the work, and does what the control loop says of its end.

use std::panic::AssertUnwindSafe;

use block::error::{Error, ErrorKind, Result};
use futures_util::FutureExt;
use tokio::sync::mpsc;

use super::context::JobContext;
use super::driver::JobDriver;
use super::registry::Report;

/// What the task is to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Instruction {
    /// The work.
    Run,
    /// What can fail of the end.
    Prepare,
    /// The end, if all went well. The last instruction.
    Commit,
    /// The end otherwise. The last instruction.
    Abort,
}

/// Follows instructions. Without the one who gives them the work is taken back.
pub(super) async fn follow(
    mut driver: Box<dyn JobDriver>,
    cx: JobContext,
    mut instructions: mpsc::UnboundedReceiver<Instruction>,
) {
    loop {
        match instructions.recv().await.unwrap_or(Instruction::Abort) {
            Instruction::Run => {
                let result = tokio::select! {
                    biased;
                    () = cx.force_cancelled() => Err(cancelled()),
                    result = guarded(work(&mut *driver, &cx)) => result,
                };
                cx.report(Report::Ran(text(result)));
            }
            Instruction::Prepare => {
                let result = guarded(driver.prepare()).await;
                cx.report(Report::Prepared(text(result)));
            }
            Instruction::Commit => {
                end(driver.commit()).await;
                break;
            }
            Instruction::Abort => {
                end(driver.abort()).await;
                break;
            }
        }
    }
    end(driver.clean()).await;
    drop(driver);
    cx.report(Report::Finished);
}

/// A job may be held before it has begun.
async fn work(driver: &mut dyn JobDriver, cx: &JobContext) -> Result<()> {
    cx.pause_point().await;
    driver.run(cx).await
}

/// A panic is a failure of the job, not of others.
async fn guarded(part: impl Future<Output = Result<()>>) -> Result<()> {
    let done = AssertUnwindSafe(part).catch_unwind().await;
    done.unwrap_or_else(|_| {
        Err(Error::new(
            ErrorKind::Io,
            "Internal error, see the daemon's log",
        ))
    })
}

async fn end(part: impl Future<Output = ()>) {
    // There is nobody to answer; the panic's text is in the log.
    let _ = AssertUnwindSafe(part).catch_unwind().await;
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Io, "Operation canceled")
}

fn text(result: Result<()>) -> std::result::Result<(), String> {
    result.map_err(|error| error.message().to_owned())
}
