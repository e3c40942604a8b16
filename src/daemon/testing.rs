//! A control loop without a command line, for tests.

use std::sync::Arc;

use super::control_loop::{ControlLoop, Signals};
use super::cx::Cx;
use super::service::DaemonService;

/// A loop that has not begun, and the service in front of it.
pub(super) fn parts() -> (ControlLoop, Arc<DaemonService>, Cx) {
    super::wired(Signals::take().unwrap())
}

/// The way to a loop that runs until the test ends.
pub(crate) fn running() -> Cx {
    let (control_loop, _, cx) = parts();
    tokio::spawn(control_loop.run(std::future::ready(Ok(()))));
    cx
}
