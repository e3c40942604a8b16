//! The server: listeners, connections and exports.
//!
//! One task accepts; it owns a task per connection, which does the handshake and then the transmission, on a thread for
//! I/O. `stop` ends the first, which ends the others when they have answered what is in flight. Nothing else is spawned.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use block::driver::Requests;
use block::error::{Error, ErrorKind, Result};
use block::io::{InlineThread, IoThreads, Seat};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};

use super::negotiate::{Negotiated, Offer, negotiate};
use super::registry::{NbdExportOptions, Registry};
use super::session::serve;
use crate::exports::{ExportEvent, ExportInfo, RemoveMode};
use crate::limits;
use crate::listen::{Address, Connection, Listener};

/// How a server is set up.
#[derive(Clone)]
pub struct NbdServerOptions {
    /// Where it listens; at least one.
    pub addresses: Vec<Address>,
    /// Connections at a time; more wait to be accepted. `None` for no limit.
    pub max_connections: Option<usize>,
    /// How long a client may take to choose an export. `None` for no limit.
    pub handshake_timeout: Option<Duration>,
    /// Where connections run.
    pub threads: IoThreads,
}

impl NbdServerOptions {
    /// A server with the usual limits.
    pub fn new(addresses: Vec<Address>) -> Self {
        NbdServerOptions {
            addresses,
            max_connections: Some(limits::NBD_MAX_CONNECTIONS),
            handshake_timeout: Some(limits::NBD_HANDSHAKE_TIMEOUT),
            threads: IoThreads::for_this_machine("export", InlineThread::Guests),
        }
    }
}

/// A running NBD server. Dropping it ends its connections at once, without answering what is in flight.
pub struct NbdServer {
    registry: Arc<Registry>,
    addresses: Vec<Address>,
    stop: watch::Sender<bool>,
    /// The accepting task.
    accepting: JoinSet<()>,
}

impl NbdServer {
    /// Listens and begins to accept, on the runtime that it is called in; connections run on `options.threads`. `events`
    /// is told of exports that are gone.
    ///
    /// Fails when an address cannot be listened at; nothing is left behind then.
    pub async fn start(
        options: NbdServerOptions,
        events: mpsc::UnboundedSender<ExportEvent>,
    ) -> Result<NbdServer> {
        let mut listeners = Vec::new();
        for address in &options.addresses {
            let bound = Listener::bind(address).await;
            listeners.extend(bound.map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?);
        }
        if listeners.is_empty() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "An NBD server needs an address to listen at",
            ));
        }
        let registry = Arc::new(Registry::new(events));
        let stop = watch::Sender::new(false);
        let mut addresses: Vec<_> = listeners
            .iter()
            .filter_map(|each| each.address().cloned())
            .collect();
        addresses.dedup();
        let acceptor = Acceptor {
            listeners,
            next: 0,
            shared: Arc::new(Shared {
                registry: registry.clone(),
                handshake_timeout: options.handshake_timeout,
                offer: Offer {
                    multi_conn: options.max_connections != Some(1),
                },
                half_open: Mutex::default(),
            }),
            threads: options.threads,
            most: options.max_connections.unwrap_or(usize::MAX).max(1),
            connections: JoinSet::new(),
            stop: stop.subscribe(),
        };
        let mut accepting = JoinSet::new();
        accepting.spawn(acceptor.run());
        Ok(NbdServer {
            registry,
            addresses,
            stop,
            accepting,
        })
    }

    /// Where it listens, with the ports that it really has.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Adds an export of `node`. Clients find it at once.
    pub fn add(&self, options: NbdExportOptions, node: Arc<dyn Requests>) -> Result<()> {
        self.registry.add(options, node)
    }

    /// Removes the export with this id. `ExportEvent::Closed` follows when its last client is gone, which after a safe
    /// removal, that is refused while there are clients, has been sent when this returns.
    pub fn remove(&self, id: &str, mode: RemoveMode) -> Result<()> {
        self.registry.remove(id, mode)
    }

    /// The id of the export that clients know as `name`.
    pub fn id_of_name(&self, name: &str) -> Result<String> {
        self.registry.id_of_name(name)
    }

    /// All exports, the newest first.
    pub fn exports(&self) -> Vec<ExportInfo> {
        self.registry.list()
    }

    /// Ends listening, then the exports and connections. When it is done every request that was started has been
    /// answered, and `ExportEvent::Closed` has been sent for every export.
    ///
    /// # Cancellation
    /// Dropping the future drops the server.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        self.registry.remove_all();
        while let Some(ended) = self.accepting.join_next().await {
            report_panic(ended);
        }
    }
}

/// Tasks fail by panicking only, and the others go on.
fn report_panic(ended: std::result::Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        log::error!("NBD: a connection failed: {error}");
    }
}

/// What all connections of a server use.
struct Shared {
    registry: Arc<Registry>,
    handshake_timeout: Option<Duration>,
    offer: Offer,
    /// Connections in their handshake, the oldest first.
    half_open: Mutex<HalfOpen>,
}

#[derive(Default)]
struct HalfOpen {
    next: u64,
    connections: VecDeque<(u64, AbortHandle)>,
    /// That there are too many has been said.
    is_crowd: bool,
}

impl HalfOpen {
    /// Whether it was there.
    fn remove(&mut self, id: u64) -> bool {
        let at = self.connections.iter().position(|(each, _)| *each == id);
        let was_there = at.is_some_and(|at| self.connections.remove(at).is_some());
        self.is_crowd &= self.connections.len() > limits::NBD_MAX_HALF_OPEN / 2;
        was_there
    }

    /// Adds one. Whoever opens connections without using them pushes out their own first.
    fn push(&mut self, task: AbortHandle) {
        self.connections.push_back((self.next, task));
        self.next += 1;
        if self.connections.len() > limits::NBD_MAX_HALF_OPEN
            && let Some((_, oldest)) = self.connections.pop_front()
        {
            // One line for all of them, however many come.
            if !std::mem::replace(&mut self.is_crowd, true) {
                log::warn!("NBD: too many connections in their handshake, dropping the oldest");
            }
            oldest.abort();
        }
    }
}

impl Shared {
    fn half_open(&self) -> MutexGuard<'_, HalfOpen> {
        self.half_open
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The accepting task.
struct Acceptor {
    listeners: Vec<Listener>,
    /// The listener to ask first, so that none starves the others.
    next: usize,
    shared: Arc<Shared>,
    /// Not among what connections share: they must not be the ones to end their own threads.
    threads: IoThreads,
    most: usize,
    connections: JoinSet<()>,
    stop: watch::Receiver<bool>,
}

impl Acceptor {
    async fn run(mut self) {
        let mut stop = self.stop.clone();
        loop {
            let has_room = self.connections.len() < self.most;
            tokio::select! {
                biased;
                () = raised(&mut stop) => break,
                Some(ended) = self.connections.join_next() => report_panic(ended),
                accepted = poll_fn(|cx| poll_accept(&self.listeners, &mut self.next, cx)),
                    if has_room => self.accepted(accepted).await,
            }
        }
        // No further connections, and the sockets' files are gone, before the old ones end.
        self.listeners.clear();
        while let Some(ended) = self.connections.join_next().await {
            report_panic(ended);
        }
    }

    async fn accepted(&mut self, accepted: io::Result<Connection>) {
        match accepted {
            Ok(stream) => {
                if let Err(error) = self.spawn(stream) {
                    log::warn!("NBD: could not serve a connection: {error}");
                }
            }
            Err(error) => {
                // Most likely too many open files. Trying again at once would only burn a core.
                log::warn!("NBD: could not accept a connection: {error}");
                tokio::time::sleep(limits::NBD_ACCEPT_PAUSE).await;
            }
        }
    }

    fn spawn(&mut self, stream: Connection) -> io::Result<()> {
        let seat = self.threads.seat()?;
        let thread = seat.handle().clone();
        let mut half_open = self.shared.half_open();
        let new = NewConnection {
            id: half_open.next,
            shared: self.shared.clone(),
            stop: self.stop.clone(),
            _seat: seat,
        };
        // The thread's own scheduler has to watch the socket, not the one that accepted it.
        let _context = thread.enter();
        let task = match stream {
            Connection::Unix(socket) => {
                let socket = UnixStream::from_std(socket.into_std()?)?;
                self.connections.spawn_on(new.run(socket), &thread)
            }
            Connection::Tcp(socket) => {
                let socket = TcpStream::from_std(socket.into_std()?)?;
                self.connections.spawn_on(new.run(socket), &thread)
            }
        };
        half_open.push(task);
        Ok(())
    }
}

fn poll_accept(
    listeners: &[Listener],
    next: &mut usize,
    cx: &mut Context<'_>,
) -> Poll<io::Result<Connection>> {
    for turn in 0..listeners.len() {
        let at = (*next + turn) % listeners.len();
        if let Poll::Ready(accepted) = listeners[at].poll_accept(cx) {
            *next = at + 1;
            return Poll::Ready(accepted);
        }
    }
    Poll::Pending
}

/// Waits until a flag is true, or until nobody is left who could set it.
async fn raised(flag: &mut watch::Receiver<bool>) {
    let _ = flag.wait_for(|raised| *raised).await;
}

/// What a connection's task begins with.
struct NewConnection {
    /// Its number among the half-open ones.
    id: u64,
    shared: Arc<Shared>,
    stop: watch::Receiver<bool>,
    _seat: Seat,
}

impl NewConnection {
    /// One connection from its greeting to its end.
    async fn run<S: AsyncRead + AsyncWrite + Unpin>(mut self, mut socket: S) {
        let negotiated = tokio::select! {
            () = raised(&mut self.stop) => return,
            negotiated = negotiate_in_time(&mut socket, &self.shared) => negotiated,
        };
        if !self.shared.half_open().remove(self.id) {
            // Pushed out at this very moment.
            return;
        }
        match negotiated {
            Ok(Some(negotiated)) => transmission(socket, negotiated).await,
            Ok(None) => {}
            Err(error) => log::debug!("NBD: handshake failed: {error}"),
        }
    }
}

async fn transmission<S>(socket: S, negotiated: Negotiated)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let Negotiated {
        export,
        terms,
        early,
    } = negotiated;
    let node = export.node();
    let mut closing = export.closing();
    if let Err(error) = serve(socket, early, terms, &*node, raised(&mut closing)).await {
        let name = &export.options().name;
        log::debug!("NBD: connection to '{name}' closed: {error}");
    }
    // The export's event may be sent by what follows, and no reference may be left then.
    drop(node);
    drop(export);
}

async fn negotiate_in_time<S>(socket: &mut S, shared: &Shared) -> io::Result<Option<Negotiated>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let handshake = negotiate(socket, &shared.registry, shared.offer);
    match shared.handshake_timeout {
        Some(limit) => tokio::time::timeout(limit, handshake)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
        None => handshake.await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_crowd_pushes_out_its_oldest_and_is_told_of_once() {
        let mut half_open = HalfOpen::default();
        let most = limits::NBD_MAX_HALF_OPEN;
        for count in 1..=3 * most {
            half_open.push(tokio::spawn(std::future::pending::<()>()).abort_handle());
            assert_eq!(half_open.connections.len(), count.min(most));
            assert_eq!(half_open.is_crowd, count > most);
        }
        let oldest = 2 * most as u64;
        assert!(!half_open.remove(oldest - 1));
        for id in oldest..3 * most as u64 {
            assert!(half_open.is_crowd || half_open.connections.len() <= most / 2);
            assert!(half_open.remove(id));
        }
        // Another one is news.
        assert!(!half_open.is_crowd);
    }
}
