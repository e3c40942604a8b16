//! What the monitor asks of the daemon.

use std::future::Future;
use std::pin::Pin;

use qapi::rt::{Object, QmpError, Value};

use super::session::Session;

/// An in-band command on its way.
pub type AnswerFuture<'a> = Pin<Box<dyn Future<Output = Result<Value, QmpError>> + Send + 'a>>;

/// A well-formed request for a command that [`Service::find`] knows.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The wire name of the command.
    pub name: String,
    /// The arguments as the client wrote them; empty if there were none.
    pub arguments: Object,
}

/// What the monitor must know of a command before it can be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CommandInfo {
    /// May be run with `exec-oob`.
    pub allow_oob: bool,
    /// Is reachable while capabilities are being negotiated. Every other command answers
    /// `Expecting capabilities negotiation with 'qmp_capabilities'` there.
    pub in_negotiation: bool,
    /// Nothing is sent when it succeeds (`'success-response': false`).
    pub no_success_response: bool,
}

/// The commands behind a monitor. One service is shared by every session.
pub trait Service: Send + Sync + 'static {
    /// The value of `version` in the greeting; equal to the reply of `query-version`.
    fn version(&self) -> Value;

    /// Looks a command up by its wire name. `None` makes the monitor answer CommandNotFound.
    fn find(&self, name: &str) -> Option<CommandInfo>;

    /// Runs a command in-band.
    ///
    /// The monitor awaits the future before it starts the next in-band command of the same
    /// session. Sessions call this at the same time; running one command at a time across all of
    /// them, but for those that need not wait, and doing so fairly, is the service's part.
    ///
    /// # Cancellation
    /// A client that hangs up does not cancel its command: the monitor polls the future to its end
    /// and drops the answer. Only the shutdown of the server drops futures, those that have not
    /// ended within its grace time, so a service that stops should fail what it has queued rather
    /// than leave it pending.
    fn execute<'a>(&'a self, request: Request, session: &'a Session) -> AnswerFuture<'a>;

    /// Runs a command out of band (`exec-oob`), on the session's own task.
    ///
    /// Must not wait: in-band commands of any session may be running. Called only for commands
    /// with [`CommandInfo::allow_oob`] and only in sessions that enabled
    /// [`Capability::Oob`](super::Capability::Oob).
    fn execute_oob(&self, request: Request, session: &Session) -> Result<Value, QmpError>;
}
