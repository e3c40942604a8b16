//! The control state: what commands look at and change. It has one owner, the control loop.

use std::sync::Arc;

use qapi::events;
use qapi::types::ShutdownCause;

use block::events::{Corruption, Happening, HostBytes, NodeEvent};
use block::graph::Graph;
use block::io::IoContext;

use super::covered::Covered;
use super::exports::Exports;
use super::pidfile::PidFile;
use super::sockets::DefaultSockets;
use crate::commands::job_event;
use crate::jobs::Jobs;
use crate::journal::Journal;
use crate::monitor::{self, Events};

/// Everything that commands act on.
pub struct Control {
    /// Nodes and drives.
    pub graph: Graph,
    /// The NBD server, its exports, and the nodes they use.
    pub exports: Exports,
    /// Jobs, from their making until they are forgotten.
    pub jobs: Jobs,
    /// What files are opened with.
    pub io: IoContext,
    /// Where transactions are written down; `None` without a state directory.
    pub journal: Option<Arc<Journal>>,
    /// What nobody should write to any more.
    pub covered: Covered,
    /// The monitors; taken out when the daemon ends.
    pub(super) monitors: monitor::Server,
    /// Files to remove at the end.
    pub(super) belongings: Belongings,
    events: Events,
    stop: Option<StopCause>,
}

/// Files that are there for as long as the daemon is. Dropped last.
#[derive(Debug, Default)]
pub(super) struct Belongings {
    pub(super) sockets: Option<DefaultSockets>,
    pub(super) pidfile: Option<PidFile>,
}

/// Why the daemon ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopCause {
    /// A client's `quit`.
    Quit,
    /// SIGINT, SIGTERM or SIGHUP.
    Signal,
    /// The command line could not be followed.
    StartFailed,
}

impl Control {
    pub(super) fn new(
        graph: Graph,
        exports: Exports,
        jobs: Jobs,
        monitors: monitor::Server,
        events: Events,
    ) -> Self {
        Control {
            graph,
            exports,
            jobs,
            io: IoContext::new(),
            journal: None,
            covered: Covered::default(),
            monitors,
            belongings: Belongings::default(),
            events,
            stop: None,
        }
    }

    /// Tells every client.
    pub fn emit(&self, event: impl Into<qapi::Event>) {
        self.events.emit(wire(event.into()));
    }

    /// Tells every client that comes, until one has seen it; then calls `seen`. Called once, at the start.
    pub(super) fn keep(&self, events: Vec<qapi::Event>, seen: impl FnOnce() + Send + 'static) {
        self.events
            .keep(events.into_iter().map(wire).collect(), seen);
    }

    /// Ends the daemon when the running command has ended. The first cause counts.
    pub fn stop(&mut self, cause: StopCause) {
        self.stop.get_or_insert(cause);
    }

    pub(super) fn stop_cause(&self) -> Option<StopCause> {
        self.stop
    }

    /// Tells every client what has happened to jobs.
    pub(super) fn tell_of_jobs(&mut self) {
        for event in self.jobs.take_events() {
            if let Some(event) = job_event(event) {
                self.emit(event);
            }
        }
    }

    /// An export is gone: its node may go too.
    pub(super) fn export_closed(&mut self, id: &str) {
        self.exports.closed(&mut self.graph, id);
        self.emit(events::BlockExportDeleted { id: id.to_owned() });
    }

    /// Tells every client what has happened to a node.
    pub(super) fn node_event(&self, event: NodeEvent) {
        let NodeEvent { node, what } = event;
        // Clients of 2013 know images as drives. The member is there for a node that is none, too.
        let drive = self.graph.drives().iter().find(|drive| {
            let root = drive.node();
            root.is_some_and(|root| root.name() == node)
        });
        let device = drive.map(|drive| drive.id.clone()).unwrap_or_default();
        match what {
            Happening::GuestErrors => {}
            Happening::ImageCorrupted(Corruption {
                message,
                place,
                fatal,
            }) => {
                let (offset, size) = place
                    .map(|HostBytes { offset, len }| (offset as i64, len as i64))
                    .unzip();
                self.emit(events::BlockImageCorrupted {
                    device,
                    node_name: Some(node),
                    msg: message,
                    offset,
                    size,
                    fatal,
                });
            }
        }
        // Whatever has come: if the channel was full, what has happened to drives has no event of its own.
        self.tell_of_machine();
    }
}

/// An event as monitors take it.
fn wire(event: qapi::Event) -> monitor::Event {
    monitor::Event {
        name: event.name(),
        data: event.into_data(),
    }
}

/// The last event of a daemon.
pub(super) fn shutdown_event(cause: StopCause) -> Option<monitor::Event> {
    let reason = match cause {
        StopCause::Quit => ShutdownCause::HostQmpQuit,
        StopCause::Signal => ShutdownCause::HostSignal,
        StopCause::StartFailed => return None,
    };
    let event = events::Shutdown {
        guest: false,
        reason,
    };
    Some(wire(event.into()))
}
