//! A drive's guests: their requests on the way to the drive's root, what happens when one fails, and what is counted.
//!
//! ```text
//!   client ─> Client ─> the drive's gate ─> edge ─> node
//!                            ^                       │ fails, and the policy says stop
//!                            └── the machine stops ──┘
//! ```
//!
//! While the machine stands still requests wait at their drive's gate: nothing of theirs is inside of a node, so that nodes can be
//! quiesced, snapshotted and replaced. A request that has failed goes back to the gate, and is sent again when the machine goes on.
//!
//! * `policy`: what is done about errors
//! * `machine`: whether guests run
//! * `account`: what has been done, and how long it took

mod account;
mod machine;
mod policy;

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

use super::edge::Edge;
use crate::driver::{
    BlockStatus, BoxFuture, Preallocation, RequestLimits, Requests, WriteFlags, ZeroFlags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::events::{EventSink, Happening, Reporter};
use crate::io::{Data, Entered, Gate, RunToEnd};
use crate::limits::MAX_UNTOLD_ERRORS;

use account::{Account, Ending, Operation};

pub use account::{DriveStats, Totals};
pub use machine::{Machine, RunState};
pub use policy::{ErrorAction, ErrorPolicy, IoStatus, OnError};

/// What a drive's guests see.
pub(super) struct Device {
    id: String,
    root: Option<Edge>,
    policy: ErrorPolicy,
    machine: Machine,
    /// Closed while the machine stands still.
    gate: Arc<Gate>,
    account: Account,
    faults: Mutex<Faults>,
    reporter: Reporter,
}

/// What has gone wrong.
#[derive(Debug, Default)]
struct Faults {
    status: IoStatus,
    /// What users have not been told of, the oldest first. Of many errors in a row the first ones and the last are kept.
    untold: VecDeque<GuestError>,
}

/// A guest's request has failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestError {
    /// It was a read.
    pub is_read: bool,
    /// What was done about it.
    pub action: ErrorAction,
    /// The drive's root at that time.
    pub node: Option<String>,
    /// The reason was a lack of space.
    pub no_space: bool,
    /// The system's text for the error.
    pub reason: String,
}

impl Device {
    pub(super) fn new(
        id: &str,
        root: Option<Edge>,
        policy: ErrorPolicy,
        machine: &Machine,
        events: &EventSink,
    ) -> Arc<Self> {
        let gate = Arc::default();
        machine.admit(&gate);
        Arc::new(Device {
            id: id.to_owned(),
            root,
            policy,
            machine: machine.clone(),
            gate,
            account: Account::new(),
            faults: Mutex::default(),
            reporter: events.reporter(id),
        })
    }

    /// How its last requests went; `None` for a drive that never stops the machine.
    pub(super) fn io_status(&self) -> Option<IoStatus> {
        self.policy.can_stop().then(|| self.faults().status)
    }

    /// What has been done.
    pub(super) fn stats(&self) -> DriveStats {
        self.account.totals()
    }

    /// Errors of which users have not been told, the oldest first.
    pub(super) fn take_untold_errors(&self) -> VecDeque<GuestError> {
        std::mem::take(&mut self.faults().untold)
    }

    /// The past is forgotten: the machine goes on.
    pub(super) fn reset_io_status(&self) {
        self.faults().status = IoStatus::Ok;
    }

    /// The data path for one client. Requests through it answer `InvalidInput` if the drive has no medium.
    pub(super) fn client(self: &Arc<Self>) -> Arc<Client> {
        Arc::new(Client {
            device: self.clone(),
            gone: AtomicBool::new(false),
            hung_up: Notify::new(),
        })
    }

    /// Plain data behind it, whole between any two statements.
    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn root(&self) -> Result<&Edge> {
        self.root.as_ref().ok_or_else(|| {
            Error::new(
                ErrorKind::InvalidInput,
                format!("Device '{}' has no medium", self.id),
            )
        })
    }

    /// Counts a request that has ended, and decides what to do if it has failed.
    fn judge<T>(&self, guest: Guest, begun: Instant, result: Result<T>) -> Verdict<T> {
        let count = |ending| self.account.count(guest.operation, begun, ending);
        let error = match result {
            Ok(answer) => {
                count(Ending::Done(guest.bytes));
                return Verdict::Answer(Ok(answer));
            }
            Err(error) if guest.no_fallback && error.kind() == ErrorKind::Unsupported => {
                // Nothing has been tried: the client asks in another way.
                return Verdict::Answer(Err(error));
            }
            Err(error) if self.is_senseless(&error) => {
                count(Ending::Invalid);
                return Verdict::Answer(Err(error));
            }
            Err(error) => error,
        };
        match self.failed(guest.operation, &error) {
            ErrorAction::Report => {
                count(Ending::Failed);
                Verdict::Answer(Err(error))
            }
            ErrorAction::Ignore => {
                count(Ending::Done(guest.bytes));
                Verdict::Ignore
            }
            ErrorAction::Stop => Verdict::Again,
        }
    }

    /// Does what the policy says about an error: the machine has stopped if it says so.
    #[cold]
    fn failed(&self, operation: Operation, error: &Error) -> ErrorAction {
        let is_read = operation == Operation::Read;
        let on_error = if is_read {
            self.policy.read
        } else {
            self.policy.write
        };
        let action = on_error.action(error);
        let no_space = policy::is_short_of_space(error);
        let node = self.root.as_ref().map(Edge::node);
        log::debug!("drive '{}': {error} ({action:?})", self.id);
        let mut faults = self.faults();
        if action == ErrorAction::Stop && faults.status == IoStatus::Ok {
            faults.status = match no_space {
                true => IoStatus::NoSpace,
                false => IoStatus::Failed,
            };
        }
        if faults.untold.len() >= MAX_UNTOLD_ERRORS {
            faults.untold.pop_back();
        }
        faults.untold.push_back(GuestError {
            is_read,
            action,
            node: node.map(|node| node.name().to_owned()),
            no_space,
            reason: crate::error::system_text(&io::Error::from_raw_os_error(error.errno())),
        });
        let is_first = faults.untold.len() == 1;
        drop(faults);
        if action == ErrorAction::Stop {
            self.machine.stop(RunState::IoError);
        }
        // Whoever is told looks at all that is there: the next ones need not call.
        if is_first {
            self.reporter.report(Happening::GuestErrors);
        }
        action
    }

    /// Whether the request could never have succeeded, whatever state the disk's storage is in.
    fn is_senseless(&self, error: &Error) -> bool {
        match error.kind() {
            ErrorKind::OutOfRange => true,
            // The host's file system may have become read-only: that is a failure.
            ErrorKind::ReadOnly => {
                let root = self.root.as_ref().map(Edge::node);
                root.is_none_or(|root| root.behaviour().read_only)
            }
            _ => false,
        }
    }
}

/// A guest's request.
#[derive(Clone, Copy)]
struct Guest {
    operation: Operation,
    bytes: u64,
    /// `Unsupported` is an answer to it.
    no_fallback: bool,
}

impl Guest {
    fn new(operation: Operation, bytes: u64) -> Self {
        Guest {
            operation,
            bytes,
            no_fallback: false,
        }
    }
}

/// What becomes of a request.
enum Verdict<T> {
    /// It is answered.
    Answer(Result<T>),
    /// It is answered as if it had succeeded.
    Ignore,
    /// It is sent again when the machine goes on.
    Again,
}

/// A client of a drive: a connection of an export. Its requests wait while the machine stands still.
pub struct Client {
    device: Arc<Device>,
    /// It waits no more.
    gone: AtomicBool,
    hung_up: Notify,
}

impl Client {
    /// Enters the drive's gate. An error only if the client has gone.
    async fn enter(&self) -> Result<Entered<&Gate>> {
        match self.device.gate.try_enter() {
            Some(entered) => Ok(entered),
            None => self.wait().await,
        }
    }

    /// Waits until the machine goes on. Boxed, so that requests which need not wait are small.
    #[cold]
    fn wait(&self) -> BoxFuture<'_, Result<Entered<&Gate>>> {
        Box::pin(async {
            let hung_up = self.hung_up.notified();
            tokio::pin!(hung_up);
            // From here on no call is missed, so that the flag can be looked at.
            hung_up.as_mut().enable();
            if self.gone.load(Ordering::SeqCst) {
                return Err(self.given_up());
            }
            tokio::select! {
                entered = self.device.gate.enter() => Ok(entered),
                () = hung_up => Err(self.given_up()),
            }
        })
    }

    fn given_up(&self) -> Error {
        Error::io(
            format!("The machine of drive '{}' is stopped", self.device.id),
            &io::Error::from_raw_os_error(libc::ESHUTDOWN),
        )
    }

    /// Sends a request until its answer is final. `instead` is the answer if the error is ignored.
    async fn send<T: Send + 'static>(
        &self,
        guest: Guest,
        mut start: impl FnMut(&Edge) -> RunToEnd<Result<T>>,
        instead: impl FnOnce() -> T,
    ) -> Result<T> {
        let device = &*self.device;
        let root = device.root()?;
        loop {
            let entered = self.enter().await?;
            let begun = Instant::now();
            let result = start(root).await;
            match device.judge(guest, begun, result) {
                Verdict::Answer(result) => return result,
                Verdict::Ignore => return Ok(instead()),
                Verdict::Again => drop(entered),
            }
        }
    }
}

impl Requests for Client {
    fn size(&self) -> u64 {
        self.device.root.as_ref().map_or(0, Requests::size)
    }

    fn limits(&self) -> RequestLimits {
        match &self.device.root {
            Some(root) => root.limits(),
            None => RequestLimits {
                alignment: 1,
                preferred: 1,
                growable: false,
            },
        }
    }

    fn read(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        Box::pin(self.send(
            Guest::new(Operation::Read, len),
            move |root| root.start_read(offset, len),
            move || Data::zeroes(len),
        ))
    }

    fn write(&self, offset: u64, data: Data, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        let guest = Guest::new(Operation::Write, data.len());
        // Kept for another attempt.
        let start = move |root: &Edge| root.start_write(offset, data.clone(), flags);
        Box::pin(self.send(guest, start, || ()))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        let guest = Guest {
            no_fallback: flags.no_fallback,
            ..Guest::new(Operation::Write, len)
        };
        let start = move |root: &Edge| root.start_write_zeroes(offset, len, flags);
        Box::pin(self.send(guest, start, || ()))
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        let guest = Guest::new(Operation::Discard, len);
        Box::pin(self.send(guest, move |root| root.start_discard(offset, len), || ()))
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        let guest = Guest::new(Operation::Flush, 0);
        Box::pin(self.send(guest, Edge::start_flush, || ()))
    }

    /// Not a request that a guest's disk knows: it waits as others do, and is neither counted nor subject to the policy.
    fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        Box::pin(async move {
            let _entered = self.enter().await?;
            self.device.root()?.block_status(offset, len).await
        })
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.device.root()?.resize(size, preallocation).await })
    }

    fn for_client(&self) -> Option<Arc<dyn Requests>> {
        Some(self.device.client())
    }

    fn hang_up(&self) {
        self.gone.store(true, Ordering::SeqCst);
        self.hung_up.notify_waiters();
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("id", &self.id)
            .field("policy", &self.policy)
            .field("status", &self.faults().status)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
