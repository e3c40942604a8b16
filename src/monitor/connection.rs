//! One client's connection, from the greeting to the last byte.
//!
//! A connection is one task with three parts that run side by side: reading, executing, writing.
//! The listener that accepted it owns the task. It ends when the client has closed its side and
//! has got its replies, when it stops taking them, or when the server stops.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::{Arc, OnceLock};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{Notify, mpsc, watch};

use qapi::rt::json::{Decoder, JsonError, Style};
use qapi::rt::{ErrorClass, QmpError, Value};

use super::budget::{Budget, Share};
use super::events::{Events, Subscription};
use super::outbox::Outbox;
use super::service::{Request, Service};
use super::session::{Capability, Session};
use super::stream::Stream;
use super::wire::{self, Call};
use crate::limits;

/// How far the server is in stopping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Commands are taken.
    Running,
    /// No further command is started; what runs may end.
    Stopping,
    /// The last event has been queued: flush and close.
    Closing,
}

/// What connections share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) service: Arc<dyn Service>,
    pub(super) events: Events,
    pub(super) phase: watch::Receiver<Phase>,
    /// Dropped by a connection when all its replies are queued: how the server knows.
    pub(super) draining: mpsc::Sender<Infallible>,
    /// The memory for large messages.
    pub(super) budget: Budget,
}

/// A message in its place in the queue: a broken one is answered there too.
struct Queued {
    message: Result<Value, JsonError>,
    /// The memory that it takes, until it is answered.
    _share: Share,
}

struct Connection {
    service: Arc<dyn Service>,
    events: Events,
    budget: Budget,
    session: Session,
    outbox: Arc<Outbox>,
    /// Set once negotiation has ended. Lives as long as the connection: the last event comes when
    /// executing is over.
    subscription: OnceLock<Subscription>,
    /// An in-band message has been answered. Without out-of-band execution reading waits for it.
    answered: Notify,
    /// The client takes no more output.
    hung_up: watch::Sender<bool>,
    phase: watch::Receiver<Phase>,
}

/// Serves one client until its connection ends.
pub(super) async fn serve(shared: Shared, style: Style, stream: Stream) {
    let offered = [Capability::Oob];
    let session = Session::with_descriptors(&offered, stream.descriptors);
    let connection = Connection {
        service: shared.service,
        events: shared.events,
        budget: shared.budget,
        outbox: Arc::new(Outbox::new(session.clone(), style)),
        session,
        subscription: OnceLock::new(),
        answered: Notify::new(),
        hung_up: watch::Sender::new(false),
        phase: shared.phase,
    };
    let id = connection.session.id();
    log::debug!("QMP client {id}: connected");
    let version = connection.service.version();
    connection
        .outbox
        .push_reply(wire::greeting(version, &offered, style));
    match connection
        .run(stream.reader, stream.writer, shared.draining)
        .await
    {
        Ok(()) => log::debug!("QMP client {id}: disconnected"),
        // How most clients leave is not worth a line of the log, which strangers could fill with it.
        Err(error) if is_hang_up(&error) => log::debug!("QMP client {id}: gone: {error}"),
        Err(error) => log::warn!("QMP client {id}: dropped: {error}"),
    }
}

fn is_hang_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

impl Connection {
    /// Runs the three parts. An error says why output could not be delivered.
    async fn run<R, W>(
        &self,
        reader: R,
        writer: W,
        draining: mpsc::Sender<Infallible>,
    ) -> io::Result<()>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let (queue, queued) = mpsc::channel(limits::QMP_QUEUE);
        let reading = async {
            // Ending this future drops the queue's sender, which ends the executing one.
            tokio::select! {
                () = self.read(reader, queue) => {}
                () = self.stopping() => {}
            }
        };
        let mut working = pin!(async { tokio::join!(reading, self.execute(queued)) });
        let mut writing = pin!(self.write(writer));
        // Working comes first, so that a reply is written in the round that made it.
        tokio::select! {
            biased;
            _ = &mut working => {}
            ended = &mut writing => {
                // The client is gone. Its running command is not cancelled.
                self.hung_up.send_replace(true);
                tokio::select! {
                    _ = working => {}
                    () = self.phase_reaches(Phase::Closing) => {}
                }
                return ended;
            }
            () = self.phase_reaches(Phase::Closing) => {}
        }
        drop(draining);
        if *self.phase.borrow() != Phase::Running {
            // The server has one more event for everybody.
            tokio::select! {
                ended = &mut writing => return ended,
                () = self.phase_reaches(Phase::Closing) => {}
            }
        }
        self.outbox.finish();
        match tokio::time::timeout(limits::QMP_FLUSH_GRACE, writing).await {
            Ok(ended) => ended,
            Err(_) => Err(io::Error::other("does not read its last replies")),
        }
    }

    /// Reads until the client closes its side or executing has ended.
    async fn read<R: AsyncRead + Unpin>(&self, mut reader: R, queue: mpsc::Sender<Queued>) {
        let mut decoder = Share::stranger();
        let mut share = self.budget.share();
        let mut buffer = vec![0; limits::QMP_READ_BYTES];
        loop {
            // An unreadable socket is a closed one: what was read is still answered.
            let length = reader.read(&mut buffer).await.unwrap_or(0);
            let mut rest = buffer.get(..length).unwrap_or(&[]);
            loop {
                let message = match length {
                    0 => decoder.finish(),
                    _ => decoder.next(&mut rest),
                };
                let Some(message) = message else { break };
                let message = Queued {
                    message,
                    _share: std::mem::replace(&mut share, self.budget.share()),
                };
                if self.take(message, &queue).await.is_err() {
                    return;
                }
                // What comes behind the negotiation may be large.
                self.settle(&mut share, &mut decoder);
            }
            self.settle(&mut share, &mut decoder);
            if length == 0 {
                return;
            }
        }
    }

    fn settle(&self, share: &mut Share, decoder: &mut Decoder) {
        if self.session.is_negotiated() {
            share.settle(decoder);
        }
    }

    /// Gives a message to where it is executed, and waits until reading may go on.
    ///
    /// Fails when executing has ended.
    async fn take(&self, message: Queued, queue: &mpsc::Sender<Queued>) -> Result<(), Ended> {
        let message = match message {
            Queued {
                message: Ok(value), ..
            } if wire::overtakes(&value) => {
                self.execute_oob(value);
                // A client that does not read is not read from either.
                self.outbox.room().await;
                return Ok(());
            }
            message => message,
        };
        queue.send(message).await.map_err(|_| Ended)?;
        if self.session.is_enabled(Capability::Oob) {
            // Reading stops while the queue is full, also for what would overtake it: QEMU's
            // clients count on the number.
            drop(queue.reserve().await.map_err(|_| Ended)?);
        } else {
            self.answered.notified().await;
        }
        Ok(())
    }

    /// Answers queued messages in order, until reading has ended and the queue is empty, or the
    /// session is being stopped.
    async fn execute(&self, mut queue: mpsc::Receiver<Queued>) {
        while let Some(message) = queue.recv().await {
            tokio::select! {
                biased;
                () = self.stopping() => return,
                () = self.outbox.room() => {}
            }
            if let Some(subscription) = self.subscription.get() {
                subscription.heard();
            }
            match message.message {
                Ok(value) => self.execute_in_band(value).await,
                Err(error) => self.reply(None, Err(error.into())),
            }
            self.outbox.release_events();
            if self.session.is_negotiated() {
                // After the reply: a client takes the first message after its request for that.
                self.subscription
                    .get_or_init(|| self.events.subscribe(&self.outbox));
            }
            self.answered.notify_one();
        }
    }

    async fn execute_in_band(&self, message: Value) {
        let (id, admitted) = self.admit(message);
        let result = match admitted {
            Ok(admitted) => {
                let running = self.service.execute(admitted.request, &self.session);
                match running.await {
                    Ok(_) if admitted.silent => return,
                    result => result,
                }
            }
            Err(error) => Err(error),
        };
        self.reply(id, result);
    }

    fn execute_oob(&self, message: Value) {
        let (id, admitted) = self.admit(message);
        let result = match admitted {
            Ok(admitted) => match self.service.execute_oob(admitted.request, &self.session) {
                Ok(_) if admitted.silent => return,
                result => result,
            },
            Err(error) => Err(error),
        };
        self.reply(id, result);
    }

    /// Takes a message apart and checks that its command exists and may be run now, in this way.
    /// The id comes first: it goes back with any outcome.
    fn admit(&self, message: Value) -> (Option<Value>, Result<Admitted, QmpError>) {
        let oob_enabled = self.session.is_enabled(Capability::Oob);
        let incoming = wire::take_apart(message, oob_enabled);
        (
            incoming.id,
            incoming.call.and_then(|call| self.look_up(call)),
        )
    }

    fn look_up(&self, call: Call) -> Result<Admitted, QmpError> {
        let name = &call.request.name;
        let info = self.service.find(name);
        if !self.session.is_negotiated() && !info.is_some_and(|info| info.in_negotiation) {
            return Err(QmpError::new(
                ErrorClass::CommandNotFound,
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            ));
        }
        let Some(info) = info else {
            let desc = format!("The command {name} has not been found");
            return Err(QmpError::new(ErrorClass::CommandNotFound, desc));
        };
        if call.oob && !info.allow_oob {
            let desc = format!("The command {name} does not support OOB");
            return Err(QmpError::generic(desc));
        }
        Ok(Admitted {
            request: call.request,
            silent: info.no_success_response,
        })
    }

    fn reply(&self, id: Option<Value>, result: Result<Value, QmpError>) {
        let message = wire::answer(id, result, self.outbox.style());
        self.outbox.push_reply(message);
    }

    /// Writes what the outbox gives until it ends or the client stops taking it.
    async fn write<W: AsyncWrite + Unpin>(&self, mut writer: W) -> io::Result<()> {
        while let Some(batch) = self.outbox.batch().await {
            let mut rest = &batch[..];
            while !rest.is_empty() {
                let writing = tokio::time::timeout(limits::QMP_WRITE_STALL, writer.write(rest));
                let length = match writing.await {
                    Ok(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(result) => result?,
                    Err(_) => return Err(io::Error::other("takes no output")),
                };
                rest = rest.get(length..).unwrap_or(&[]);
                self.outbox.wrote(length);
            }
        }
        writer.shutdown().await
    }

    /// Waits until no further command may be started.
    async fn stopping(&self) {
        let mut hung_up = self.hung_up.subscribe();
        tokio::select! {
            () = self.phase_reaches(Phase::Stopping) => {}
            // Cannot fail: the sender is a member.
            _ = hung_up.wait_for(|gone| *gone) => {}
        }
    }

    async fn phase_reaches(&self, phase: Phase) {
        let mut current = self.phase.clone();
        // A server that was dropped without a shutdown has reached every phase.
        drop(current.wait_for(|now| *now >= phase).await);
    }
}

/// A request that may be run.
struct Admitted {
    request: Request,
    /// Nothing is sent when it succeeds.
    silent: bool,
}

/// Executing has ended: nothing more can be queued.
struct Ended;

#[cfg(test)]
mod tests;
