//! A control loop without a command line, for tests.

use std::sync::Arc;

use block::graph::Graph;
use tokio::sync::mpsc;

use super::control::Control;
use super::control_loop::{ControlLoop, Inputs, Signals};
use super::cx::{ControlHandle, Cx};
use super::exports::Exports;
use super::jobs::Errands;
use super::service::DaemonService;
use crate::jobs::Jobs;
use crate::limits;
use crate::monitor::{Events, RATE_LIMITS, Server, Session};

/// A loop that has not begun, and the service in front of it.
pub(super) fn parts() -> (ControlLoop, Arc<DaemonService>, Cx) {
    let (queue, commands) = mpsc::channel(limits::QMP_CLIENTS);
    let (handle, commits) = mpsc::channel(limits::COMMITS);
    let (closed, exports) = mpsc::unbounded_channel();
    let (reports, jobs) = mpsc::unbounded_channel();
    let (errand, errands) = mpsc::channel(limits::ERRANDS);
    let (sink, nodes) = block::events::channel();
    let handle = ControlHandle(handle);
    let events = Events::new(RATE_LIMITS);
    let service = Arc::new(DaemonService::new(queue, handle.clone()));
    let monitors = Server::new(service.clone(), events.clone());
    let inputs = Inputs {
        commands,
        commits,
        exports,
        jobs,
        errands,
        nodes,
        signals: Signals::take().unwrap(),
    };
    let cx = Cx::new(handle.clone(), Session::new(&[]));
    let control = Control::new(
        Graph::reporting(sink),
        Exports::new(closed),
        Jobs::new(reports, Arc::new(Errands(errand))),
        monitors,
        events,
    );
    (ControlLoop::new(control, inputs, handle), service, cx)
}

/// The way to a loop that runs until the test ends.
pub(crate) fn running() -> Cx {
    let (control_loop, _, cx) = parts();
    tokio::spawn(control_loop.run(std::future::ready(Ok(()))));
    cx
}
