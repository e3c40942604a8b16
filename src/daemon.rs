//! The daemon from its start to its end: the owner of the control state.
//!
//! ```text
//!   run -> startup (the command line, step by step)
//!       -> control loop: select an event, apply it        commands reach the state by Cx::commit only, queries by Cx::look
//!       -> stop: exports, nodes, monitors, files, in this order
//! ```
//!
//! * [`control`]: the state
//! * [`cx`]: what handlers are given
//! * `control_loop`, `service`: events, and where commands come from
//! * [`exports`]: exports as state
//! * `jobs`: how jobs stand in line with commands
//! * `machine`: drives that stop and go on
//! * `lookup`: what clients mean by a device
//! * `startup`, `drives`, `sockets`: the start; `state`: what it finds of a crash
//! * `background`, `pidfile`: what makes a process a daemon

mod background;
pub mod control;
mod control_loop;
mod covered;
pub mod cx;
mod drives;
pub mod exports;
mod jobs;
pub(crate) mod lookup;
mod machine;
mod pidfile;
mod service;
mod sockets;
mod startup;
mod state;
#[cfg(test)]
pub(crate) mod testing;

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;

use block::graph::Graph;
use qapi::rt::QmpError;
use tokio::sync::mpsc;

use self::control::Belongings;
use self::control_loop::{ControlLoop, Finished, Inputs, Signals};
use self::cx::ControlHandle;
use self::jobs::Errands;
use self::pidfile::PidFile;
use self::service::DaemonService;
use self::startup::Started;
use crate::config::Config;
use crate::exports::ExportEvent;
use crate::jobs::Jobs;
use crate::limits;
use crate::listen::Address;
use crate::monitor::{self, Events, Session};

pub use control::{Control, StopCause};
pub use cx::Cx;
pub(crate) use cx::internal_error;

/// Is a daemon until it is told to end. 0 when it was told and everything could be closed, else 1.
pub fn run(config: Config) -> ExitCode {
    if config.daemonize {
        if !background::is_child() {
            return background::start_child();
        }
        background::leave_terminal();
    }
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let lived = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start: {error}"))
        .and_then(|runtime| runtime.block_on(live(config)));
    match lived {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // Standard error may be gone; the exit code is not.
            let _ = writeln!(io::stderr(), "qblockd: {message}");
            ExitCode::FAILURE
        }
    }
}

async fn live(config: Config) -> Result<(), String> {
    let signals = Signals::take().map_err(|error| format!("cannot take signals over: {error}"))?;
    let (control_loop, _, cx) = wired(signals);
    let finished = control_loop.run(start(cx, config)).await;
    stop(finished).await
}

/// A loop that has not begun, the service in front of it, and the way of handlers to it.
fn wired(signals: Signals) -> (ControlLoop, Arc<DaemonService>, Cx) {
    let (queue, commands) = mpsc::channel(limits::QMP_CLIENTS);
    let (handle, commits) = mpsc::channel(limits::COMMITS);
    // Unbounded, because who sends cannot wait; it takes one message per export, of which there are `limits::EXPORTS`.
    let (closed, exports) = mpsc::unbounded_channel();
    let (reports, jobs) = mpsc::unbounded_channel();
    let (errand, errands) = mpsc::channel(limits::ERRANDS);
    let (sink, nodes) = block::events::channel();
    let (beside, looks) = mpsc::channel(limits::COMMITS);
    let handle = ControlHandle::new(handle);
    let events = Events::new(monitor::RATE_LIMITS);
    let service = Arc::new(DaemonService::new(queue, ControlHandle::new(beside)));
    let monitors = monitor::Server::new(service.clone(), events.clone());
    let control = Control::new(
        Graph::reporting(sink),
        exports::Exports::new(closed),
        Jobs::new(reports, Arc::new(Errands(errand))),
        monitors,
        events,
    );
    let inputs = Inputs {
        commands,
        commits,
        beside: looks,
        exports,
        jobs,
        errands,
        nodes,
        signals,
    };
    let cx = Cx::new(handle.clone(), Session::new(&[]));
    (ControlLoop::new(control, inputs, handle), service, cx)
}

/// The start, and what happens when it is done.
async fn start(cx: Cx, config: Config) -> Result<(), QmpError> {
    if let Some(folder) = &config.state_dir {
        state::open(&cx, folder).await?;
    }
    let started = startup::follow(&cx, &config).await?;
    let pidfile = config.pidfile.as_deref().map(PidFile::create).transpose();
    let pidfile = pidfile.map_err(QmpError::generic)?;
    cx.commit(move |control| {
        control.belongings.pidfile = pidfile;
        Ok(())
    })
    .await?;
    if started.made_up {
        // Nobody may be reading; the daemon serves all the same.
        let _ = io::stdout().write_all(started.next_steps().as_bytes());
    }
    if config.daemonize {
        background::report_ready()
            .map_err(|error| QmpError::generic(format!("--daemonize: {error}")))?;
    }
    Ok(())
}

/// The end: whoever uses something goes before what is used, and clients learn of it last.
async fn stop(finished: Finished) -> Result<(), String> {
    let Finished {
        mut control,
        mut exports,
        mut nodes,
        startup,
    } = finished;
    if let Ok(server) = control.exports.take_server() {
        server.stop().await;
    }
    while let Ok(ExportEvent::Closed { id }) = exports.try_recv() {
        control.export_closed(&id);
    }
    let closed = control.graph.remove_all().close().await;
    while let Ok(event) = nodes.try_recv() {
        control.node_event(event);
    }
    let last = control.stop_cause().and_then(control::shutdown_event);
    let Control {
        monitors,
        belongings,
        ..
    } = control;
    monitors.shutdown(last).await;
    let Belongings { sockets, pidfile } = belongings;
    drop(sockets);
    drop(pidfile);
    startup.map_err(|error| error.desc)?;
    closed.map_err(|error| format!("an image could not be closed: {error}"))
}

impl Started {
    /// Where the sockets are that nobody asked for, and what to type next.
    fn next_steps(&self) -> String {
        let mut text = String::new();
        for address in &self.qmp {
            text.push_str(&format!("QMP  {address}\n"));
        }
        if let Some(address) = &self.nbd {
            text.push_str(&format!("NBD  {address}\n\n"));
            if let (Some(export), Address::Unix(path)) = (self.exports.first(), address) {
                text.push_str(&format!(
                    "Look at the disk:  qemu-img info 'nbd+unix:///{export}?socket={}'\n",
                    path.display()
                ));
            }
        }
        if let Some(Address::Unix(path)) = self.qmp.first() {
            text.push_str(&format!(
                "Speak QMP:         echo '{{\"execute\":\"qmp_capabilities\"}} {{\"execute\":\"query-block\"}}' | nc -N -U {}\n",
                path.display()
            ));
        }
        text
    }
}
