//! A control loop without a command line, for tests.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use qapi::rt::{QmpError, Value};
use tokio::task::JoinHandle;

use super::control_loop::{ControlLoop, Finished, Signals};
use super::cx::Cx;
use super::service::DaemonService;
use crate::monitor::Request;

/// A child that begins has the locks of all files for a moment, until it is another program.
static CHILDREN: RwLock<()> = RwLock::new(());

/// While this is kept, no test begins a child: for those that lock the same files again and again.
pub(crate) fn without_children() -> RwLockWriteGuard<'static, ()> {
    CHILDREN.write().unwrap_or_else(PoisonError::into_inner)
}

/// To be kept while a child begins.
pub(crate) fn child() -> RwLockReadGuard<'static, ()> {
    CHILDREN.read().unwrap_or_else(PoisonError::into_inner)
}

/// A loop that has not begun, and the service in front of it.
pub(super) fn parts() -> (ControlLoop, Arc<DaemonService>, Cx) {
    super::wired(Signals::take().unwrap())
}

/// The way to a loop that runs until the test ends.
pub(crate) fn running() -> Cx {
    started().cx
}

/// A loop that can be told to stop.
pub(crate) struct Running {
    pub(crate) cx: Cx,
    end: JoinHandle<Finished>,
}

/// A loop, and the way to it.
pub(crate) fn started() -> Running {
    let (control_loop, _, cx) = parts();
    let end = tokio::spawn(control_loop.run(std::future::ready(Ok(()))));
    Running { cx, end }
}

impl Running {
    /// Behind a stop: the daemon's end in order.
    pub(crate) async fn ended(self) -> Result<(), String> {
        super::stop(self.end.await.unwrap()).await
    }
}

/// Answers a command as to a client.
pub(crate) async fn execute(cx: &Cx, command: &str, arguments: Value) -> Result<Value, QmpError> {
    let Value::Object(arguments) = arguments else {
        panic!("the arguments of {command} are no object");
    };
    let request = Request {
        name: command.to_owned(),
        arguments,
    };
    super::service::run(cx.clone(), request).await
}

/// Lets tasks go on whose time may be paused, and threads of copies, whose time is the real one.
pub(crate) async fn a_moment() {
    tokio::time::sleep(Duration::from_millis(1)).await;
    std::thread::sleep(Duration::from_micros(100));
}
