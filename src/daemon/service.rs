//! The daemon as its monitors see it: a table of commands, and a queue in front of the control loop.

use qapi::rt::dispatch::{self, Call};
use qapi::rt::{ErrorClass, QmpError, Value};
use tokio::sync::{mpsc, oneshot};

use super::cx::{ControlHandle, Cx, ending};
use crate::commands;
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
    control: ControlHandle,
}

impl DaemonService {
    pub(super) fn new(queue: mpsc::Sender<Queued>, control: ControlHandle) -> Self {
        DaemonService { queue, control }
    }
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
        Box::pin(async move {
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
        })
    }

    fn execute_oob(&self, request: Request, session: &Session) -> Result<Value, QmpError> {
        let cx = Cx::new(self.control.clone(), session.clone());
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
