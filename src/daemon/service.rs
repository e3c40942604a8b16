//! The daemon as its monitors see it: a table of commands, and a queue in front of the control loop.
//!
//! Commands run one at a time, whoever sends them, but for those that [`commands::turn`] lets run beside the one that is under way. These
//! run where their session waits for them.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use qapi::rt::dispatch::{self, Call};
use qapi::rt::{ErrorClass, QmpError, Value};
use tokio::sync::{mpsc, oneshot};

use super::cx::{ControlHandle, Cx, ending, internal_error};
use crate::commands::{self, Turn};
use crate::monitor::{AnswerFuture, CommandInfo, Request, Service, Session};

/// A command that waits for its turn.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) request: Request,
    pub(super) session: Session,
    pub(super) reply: oneshot::Sender<Result<Value, QmpError>>,
}

/// Hands commands to the control loop in the order of their arrival. A session sends its next one when it has the answer
/// to the last, so that first come, first served is fair.
#[derive(Debug)]
pub(super) struct DaemonService {
    queue: mpsc::Sender<Queued>,
    beside: ControlHandle,
}

impl DaemonService {
    /// A service that hands commands to `queue`. Those that run beside them reach the state by `beside`.
    pub(super) fn new(queue: mpsc::Sender<Queued>, beside: ControlHandle) -> Self {
        DaemonService { queue, beside }
    }

    /// Runs a command when all that were sent before it have run.
    async fn in_turn(&self, request: Request, session: &Session) -> Result<Value, QmpError> {
        let (reply, answer) = oneshot::channel();
        let queued = Queued {
            request,
            session: session.clone(),
            reply,
        };
        if self.queue.send(queued).await.is_err() {
            return Err(ending());
        }
        answer.await.unwrap_or_else(|_| Err(ending()))
    }
}

/// Runs a command whatever else is under way, but not before the daemon is up.
async fn beside(cx: Cx, request: Request) -> Result<Value, QmpError> {
    cx.arrive().await?;
    let answer = AssertUnwindSafe(run(cx, request)).catch_unwind().await;
    answer.unwrap_or_else(|_| Err(internal_error()))
}

impl Service for DaemonService {
    fn version(&self) -> Value {
        commands::control::version().into_value()
    }

    fn find(&self, name: &str) -> Option<CommandInfo> {
        let entry = dispatch::find(commands::TABLE, name)?;
        Some(CommandInfo {
            allow_oob: entry.flags.allow_oob,
            in_negotiation: entry.name == "qmp_capabilities",
            no_success_response: entry.flags.no_success_response,
        })
    }

    fn execute<'a>(&'a self, request: Request, session: &'a Session) -> AnswerFuture<'a> {
        let (control, asking) = (self.beside.clone(), session.clone());
        match commands::turn(&request.name) {
            Turn::Waits => Box::pin(self.in_turn(request, session)),
            Turn::Looks => Box::pin(beside(Cx::looking(control, asking), request)),
            Turn::Overtakes => Box::pin(beside(Cx::new(control, asking), request)),
        }
    }

    fn execute_oob(&self, request: Request, session: &Session) -> Result<Value, QmpError> {
        let cx = Cx::new(self.beside.clone(), session.clone());
        match dispatch::find(commands::TABLE, &request.name).map(|entry| &entry.call) {
            Some(Call::OutOfBand(call)) => call(&cx, request.arguments),
            _ => Err(QmpError::generic(format!(
                "The command {} does not support OOB",
                request.name
            ))),
        }
    }
}

/// Runs one command to its end.
pub(super) async fn run(cx: Cx, request: Request) -> Result<Value, QmpError> {
    match dispatch::find(commands::TABLE, &request.name).map(|entry| &entry.call) {
        Some(Call::InBand(call)) => call(&cx, request.arguments)?.await,
        Some(Call::OutOfBand(call)) => call(&cx, request.arguments),
        None => Err(QmpError::new(
            ErrorClass::CommandNotFound,
            format!("The command {} has not been found", request.name),
        )),
    }
}
