//! The transmission phase of one connection.
//!
//! One task does everything: it parses requests, starts them, and sends replies as requests finish, in whatever order
//! that is. A request is polled once where it was parsed; one that is answered at once, such as a page-cache hit, costs no
//! spawn and no queue. One that has to wait joins the set of running requests, and parsing goes on.
//!
//! ```text
//!  socket --> Input --> check --> Running --(answers at once)--> Output --> socket
//!                          |         |                             ^
//!                      (refused)  (waits)--> running set ----------+
//! ```
//!
//! Memory is bounded: a request is started only when the payloads under way and the replies that wait for the socket
//! stay within limits, and until then nothing more is read from the client.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use block::driver::Requests;
use block::io::Data;
use bytes::BytesMut;
use futures_util::stream::{FuturesUnordered, Stream};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Sleep, sleep};

use super::codec::transmission::{Command, Request};
use super::input::{BadMagic, Input};
use super::output::Output;
use super::request::{self, Failure, Running, Terms};
use crate::limits;

/// Serves requests until the client disconnects, breaks the protocol, or `stop` is done, and every request that was
/// started has finished.
///
/// When `stop` is done no further request is started; those under way finish, and their replies are sent if the client
/// takes them within a short time.
///
/// # Cancellation
/// Dropping the future drops the requests under way, which may then happen in part.
pub(super) async fn serve<S>(
    socket: S,
    early: BytesMut,
    terms: Terms,
    node: &dyn Requests,
    stop: impl Future<Output = ()>,
) -> Result<(), SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut session = Session {
        socket,
        terms,
        node,
        input: Input::new(early),
        output: Output::default(),
        waiting: None,
        starved: false,
        running: FuturesUnordered::new(),
        held: 0,
        ending: None,
        stopped: false,
        deadline: None,
    };
    let mut stop = pin!(stop);
    poll_fn(|cx| session.poll(stop.as_mut(), cx)).await
}

/// Why a connection ended other than by the client's wish.
#[derive(Debug)]
pub(super) enum SessionError {
    /// A request header with another magic number.
    BadMagic,
    /// A write longer than the server takes.
    TooLong(u32),
    /// The stream ended inside of a request.
    Truncated,
    /// The socket failed.
    Io(io::Error),
}

impl std::fmt::Display for SessionError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SessionError::BadMagic => write!(f, "a request has a wrong magic number"),
            SessionError::TooLong(length) => write!(f, "a write of {length} bytes is too long"),
            SessionError::Truncated => write!(f, "the connection ended inside of a request"),
            SessionError::Io(error) => write!(f, "{error}"),
        }
    }
}

/// A request that has been parsed but not started.
enum Waiting {
    /// Until there is room for it.
    Room(Request),
    /// For the rest of its payload.
    Payload(Request),
    /// For the end of its payload, which nobody wants.
    Refused(Request, Failure),
}

/// What a step of the state machine came to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Something happened; others may now be able to go on.
    Progress,
    /// Nothing to do before the next wake-up.
    Idle,
}

struct Session<'n, S> {
    socket: S,
    terms: Terms,
    node: &'n dyn Requests,
    input: Input,
    output: Output,
    waiting: Option<Waiting>,
    /// Parsing needs more bytes than have arrived. Only then is anything read, so the input cannot grow.
    starved: bool,
    running: FuturesUnordered<Running<'n>>,
    /// Bytes of payload of the running requests.
    held: u64,
    /// Set when no further requests are taken: what `serve` will answer.
    ending: Option<Result<(), SessionError>>,
    /// The server or the export ends, whether the client likes it or not.
    stopped: bool,
    /// When a client of an export that has ended must have taken its last replies.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Session<'_, S> {
    fn poll(
        &mut self,
        stop: Pin<&mut impl Future<Output = ()>>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), SessionError>> {
        if !self.stopped && stop.poll(cx).is_ready() {
            self.stopped = true;
            self.end(Ok(()));
        }
        for _ in 0..limits::NBD_STEPS_PER_POLL {
            let steps = [
                self.collect(cx),
                self.parse(cx),
                self.send(cx),
                self.fill(cx),
            ];
            if let Poll::Ready(result) = self.poll_ended(cx) {
                return Poll::Ready(result);
            }
            if !steps.contains(&Step::Progress) {
                return Poll::Pending;
            }
        }
        // A busy client must not keep its thread from the others'.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Takes no further requests, and does not wait for a stopped machine. The first reason counts.
    fn end(&mut self, result: Result<(), SessionError>) {
        self.waiting = None;
        self.node.hang_up();
        self.ending.get_or_insert(result);
    }

    /// Ready when the end has come, nothing runs, and every reply is sent or given up.
    fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        if self.ending.is_none() || !self.running.is_empty() {
            return Poll::Pending;
        }
        if !self.output.is_empty() && self.stopped {
            let grace = || Box::pin(sleep(limits::NBD_CLOSE_GRACE));
            let deadline = self.deadline.get_or_insert_with(grace);
            if deadline.as_mut().poll(cx).is_ready() {
                self.output.clear();
            }
        }
        match self.output.is_empty() {
            true => Poll::Ready(self.ending.take().unwrap_or(Ok(()))),
            false => Poll::Pending,
        }
    }

    /// Queues the replies of requests that have finished.
    fn collect(&mut self, cx: &mut Context<'_>) -> Step {
        let mut step = Step::Idle;
        while !self.output_is_full() {
            let Poll::Ready(Some(finished)) = Pin::new(&mut self.running).poll_next(cx) else {
                break;
            };
            self.held -= finished.cost();
            finished.reply(self.terms, &mut self.output);
            step = Step::Progress;
        }
        step
    }

    /// Whether replies should leave before more are made.
    fn output_is_full(&self) -> bool {
        self.output.queued() >= limits::NBD_OUTPUT_BATCH_BYTES
            || self.output.pieces() >= limits::NBD_OUTPUT_BATCH_PIECES
    }

    /// Whether a request with `cost` bytes of payload may be started. When nothing is under way, any may.
    fn has_room(&self, cost: u64) -> bool {
        let held = self.held + self.output.queued();
        self.running.len() < limits::NBD_MAX_IN_FLIGHT
            && (held == 0 || held + cost <= limits::NBD_MAX_IN_FLIGHT_BYTES)
    }

    /// Starts the requests that have arrived, as far as there is room.
    fn parse(&mut self, cx: &mut Context<'_>) -> Step {
        let mut step = Step::Idle;
        self.starved = false;
        while self.ending.is_none() && !self.output_is_full() {
            let next = match self.waiting.take() {
                None => self.next_request(),
                Some(Waiting::Room(request)) => self.try_start(request, cx),
                Some(Waiting::Payload(request)) => self.try_write(request, cx),
                Some(Waiting::Refused(request, failure)) => self.try_refuse(request, failure, 0),
            };
            if next == Step::Idle {
                break;
            }
            step = Step::Progress;
        }
        step
    }

    fn next_request(&mut self) -> Step {
        let request = match self.input.header() {
            Ok(Some(request)) => request,
            Ok(None) => {
                self.starved = true;
                return Step::Idle;
            }
            Err(BadMagic) => {
                self.end(Err(SessionError::BadMagic));
                return Step::Progress;
            }
        };
        let is_write = request.command == Command::Write;
        if request.command == Command::Disconnect {
            self.end(Ok(()));
        } else if let Err(failure) = request::check(&request, self.terms, self.node) {
            if is_write && request.length > limits::NBD_MAX_PAYLOAD {
                // It is told, but such a payload is not even worth being skipped.
                request::reply_failure(&request, failure, self.terms, &mut self.output);
                self.end(Err(SessionError::TooLong(request.length)));
                return Step::Progress;
            }
            let payload = if is_write { request.length } else { 0 };
            return self.try_refuse(request, failure, payload.into());
        } else {
            self.waiting = Some(Waiting::Room(request));
        }
        Step::Progress
    }

    /// Answers a refused request when its payload is gone; `more` of it has just been announced.
    fn try_refuse(&mut self, request: Request, failure: Failure, more: u64) -> Step {
        if !self.input.discard(more) {
            self.waiting = Some(Waiting::Refused(request, failure));
            self.starved = true;
            return Step::Idle;
        }
        request::reply_failure(&request, failure, self.terms, &mut self.output);
        Step::Progress
    }

    fn try_start(&mut self, request: Request, cx: &mut Context<'_>) -> Step {
        if !self.has_room(request::cost(&request)) {
            self.waiting = Some(Waiting::Room(request));
            return Step::Idle;
        }
        match request.command {
            Command::Write => self.waiting = Some(Waiting::Payload(request)),
            _ => self.start(request, Data::new(), cx),
        }
        Step::Progress
    }

    fn try_write(&mut self, request: Request, cx: &mut Context<'_>) -> Step {
        match self.input.payload(request.length as usize) {
            Some(payload) => {
                self.start(request, payload, cx);
                Step::Progress
            }
            None => {
                self.waiting = Some(Waiting::Payload(request));
                self.starved = true;
                Step::Idle
            }
        }
    }

    /// Starts a request, and is done with it at once if its answer is there.
    fn start(&mut self, request: Request, payload: Data, cx: &mut Context<'_>) {
        let mut running = Running::start(request, payload, self.terms, self.node);
        match Pin::new(&mut running).poll(cx) {
            Poll::Ready(finished) => finished.reply(self.terms, &mut self.output),
            Poll::Pending => {
                self.held += running.cost();
                self.running.push(running);
            }
        }
    }

    fn send(&mut self, cx: &mut Context<'_>) -> Step {
        if self.output.is_empty() {
            return Step::Idle;
        }
        let before = self.output.queued();
        match self.output.poll_send(&mut self.socket, cx) {
            Poll::Ready(Err(error)) => {
                // The peer takes no replies any more. What was started still finishes.
                self.output.clear();
                self.end(Err(SessionError::Io(error)));
                Step::Progress
            }
            _ if self.output.queued() < before => Step::Progress,
            _ => Step::Idle,
        }
    }

    fn fill(&mut self, cx: &mut Context<'_>) -> Step {
        if !self.starved || self.ending.is_some() {
            return Step::Idle;
        }
        match self.input.poll_fill(&mut self.socket, cx) {
            Poll::Pending => return Step::Idle,
            Poll::Ready(Ok(0)) if self.waiting.is_none() && self.input.is_between_requests() => {
                // Rude, but common: clients that end without NBD_CMD_DISC.
                self.end(Ok(()));
            }
            Poll::Ready(Ok(0)) => self.end(Err(SessionError::Truncated)),
            Poll::Ready(Ok(_)) => {}
            Poll::Ready(Err(error)) => self.end(Err(SessionError::Io(error))),
        }
        Step::Progress
    }
}
