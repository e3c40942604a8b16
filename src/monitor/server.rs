//! All monitors of the process: their sockets, their clients, and how they end.

use std::convert::Infallible;
use std::future::poll_fn;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use qapi::rt::json::Style;

use super::budget::Budget;
use super::connection::{self, Phase, Shared};
use super::events::{Event, Events};
use super::service::Service;
use crate::limits;
use crate::listen::Listener;

/// Serves any number of monitors, and any number of clients on each, at once.
///
/// It owns every task of the monitors: one per listener, which owns one per client, and the timer
/// of the events. [`Server::shutdown`] ends them in order; dropping the server cuts them off.
pub struct Server {
    service: Arc<dyn Service>,
    events: Events,
    phase: watch::Sender<Phase>,
    /// Held by listeners and by connections that have replies to make.
    draining: mpsc::Sender<Infallible>,
    drained: mpsc::Receiver<Infallible>,
    clients: Arc<Semaphore>,
    budget: Budget,
    listeners: JoinSet<()>,
    timer: JoinSet<()>,
}

impl Server {
    /// A server without monitors. Called in a tokio runtime.
    pub fn new(service: Arc<dyn Service>, events: Events) -> Server {
        let (draining, drained) = mpsc::channel(1);
        let mut timer = JoinSet::new();
        let ticking = events.clone();
        timer.spawn(async move { ticking.run().await });
        Server {
            service,
            events,
            phase: watch::Sender::new(Phase::Running),
            draining,
            drained,
            clients: Arc::new(Semaphore::new(limits::QMP_CLIENTS)),
            budget: Budget::default(),
            listeners: JoinSet::new(),
            timer,
        }
    }

    /// Adds a monitor: its clients are served from now on.
    pub fn serve(&mut self, listener: Listener, style: Style) {
        let shared = Shared {
            service: Arc::clone(&self.service),
            events: self.events.clone(),
            phase: self.phase.subscribe(),
            draining: self.draining.clone(),
            budget: self.budget.clone(),
        };
        let clients = Arc::clone(&self.clients);
        self.listeners
            .spawn(accept(listener, style, shared, clients));
    }

    /// Stops: no client or command is taken any more, running commands end (or are dropped after
    /// [`limits::QMP_STOP_GRACE`]), their replies are queued, then `last`, and all is flushed.
    ///
    /// The sockets are closed and their files removed when it returns.
    pub async fn shutdown(mut self, last: Option<Event>) {
        self.phase.send_replace(Phase::Stopping);
        drop(self.draining);
        let drained = self.drained.recv();
        if tokio::time::timeout(limits::QMP_STOP_GRACE, drained)
            .await
            .is_err()
        {
            log::warn!("QMP: a command did not end in time, its client gets no reply");
        }
        if let Some(event) = last {
            self.events.emit(event);
        }
        self.phase.send_replace(Phase::Closing);
        while self.listeners.join_next().await.is_some() {}
        self.timer.shutdown().await;
    }
}

/// Accepts the clients of one monitor and owns their tasks, until the server stops.
async fn accept(listener: Listener, style: Style, shared: Shared, clients: Arc<Semaphore>) {
    let mut connections: JoinSet<()> = JoinSet::new();
    let mut stopping = shared.phase.clone();
    let mut full = false;
    loop {
        let accepted = tokio::select! {
            accepted = poll_fn(|cx| listener.poll_accept(cx)) => accepted,
            _ = stopping.wait_for(|phase| *phase >= Phase::Stopping) => break,
            Some(_) = connections.join_next() => continue,
        };
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                log::warn!("QMP: cannot accept a client: {error}");
                tokio::time::sleep(limits::QMP_ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&clients).try_acquire_owned() else {
            // One line until there is room again; the client sees its connection closed.
            if !std::mem::replace(&mut full, true) {
                log::warn!("QMP: more than {} clients, refused", limits::QMP_CLIENTS);
            }
            continue;
        };
        full = false;
        let shared = shared.clone();
        connections.spawn(async move {
            let _place: OwnedSemaphorePermit = place;
            connection::serve(shared, style, stream.into()).await;
        });
    }
    // No client comes any more, and nothing remains to be drained here but in the connections.
    drop((listener, shared));
    while connections.join_next().await.is_some() {}
}
