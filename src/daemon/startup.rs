//! The start: follows the command line, step by step, with the handlers that commands use.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use qapi::handlers::{BlockCore, BlockExport};
use qapi::rt::decode::Decode;
use qapi::rt::json::Style;
use qapi::rt::{QmpError, Value};
use qapi::types::{BlockExportOptions, BlockdevOptions, NbdServerOptions};

use super::Control;
use super::cx::Cx;
use super::drives;
use super::sockets::DefaultSockets;
use crate::commands::{self, Handlers};
use crate::config::{Action, Arguments, Chardev, Config, Monitor, Step, server_arguments};
use crate::listen::{Address, Listener};

/// What the user is told when the daemon is up.
#[derive(Debug, Default)]
pub(super) struct Started {
    /// Where QMP is served, in the order of the command line.
    pub(super) qmp: Vec<Address>,
    /// Where NBD is served.
    pub(super) nbd: Option<Address>,
    /// Drives that are exported under their ids.
    pub(super) exports: Vec<String>,
    /// Whether there are sockets that nobody asked for.
    pub(super) made_up: bool,
}

/// Follows the command line. The error is the line after `qblockd: `.
pub(super) async fn follow(cx: &Cx, config: &Config) -> Result<Started, QmpError> {
    let mut start = Start {
        cx,
        moves: config.daemonize,
        chardevs: HashMap::new(),
        drives: Vec::new(),
        started: Started::default(),
    };
    for Step { text, action } in &config.steps {
        start
            .step(action.clone())
            .await
            .map_err(|error| QmpError::generic(format!("{text}: {}", error.desc)))?;
    }
    start.defaults(config).await?;
    start.export_drives(config).await?;
    Ok(start.started)
}

/// The start under way.
struct Start<'a> {
    cx: &'a Cx,
    /// The daemon will leave its folder, and must find its sockets' files again to remove them.
    moves: bool,
    /// Sockets that listen and have no monitor yet; `None` when they have one.
    chardevs: HashMap<String, Option<Vec<Listener>>>,
    drives: Vec<drives::Added>,
    started: Started,
}

impl Start<'_> {
    async fn step(&mut self, action: Action) -> Result<(), QmpError> {
        match action {
            Action::Blockdev(arguments) => {
                let options = decode(arguments, BlockdevOptions::decode)?;
                Handlers::blockdev_add(self.cx, options).await
            }
            Action::Drive(options) => {
                let number = self.drives.len();
                self.drives
                    .push(drives::add(self.cx, options, number).await?);
                Ok(())
            }
            Action::Chardev(chardev) => self.chardev(chardev).await,
            Action::Monitor(monitor) => self.monitor(monitor).await,
            Action::Qmp(address) => self.qmp(address).await,
            Action::NbdServer(arguments) => self.nbd_server(arguments).await,
            Action::Export(arguments) => {
                let options = decode(arguments, BlockExportOptions::decode)?;
                Handlers::block_export_add(self.cx, options).await
            }
        }
    }

    async fn chardev(&mut self, chardev: Chardev) -> Result<(), QmpError> {
        let Chardev { id, address } = chardev;
        if self.chardevs.contains_key(&id) {
            return Err(QmpError::generic(format!(
                "Chardev with id '{id}' already exists"
            )));
        }
        let bound = self.listen(address).await?;
        self.chardevs.insert(id, Some(bound));
        Ok(())
    }

    async fn monitor(&mut self, monitor: Monitor) -> Result<(), QmpError> {
        let Monitor { chardev, pretty } = monitor;
        let Some(slot) = self.chardevs.get_mut(&chardev) else {
            return Err(QmpError::generic(format!(
                "chardev \"{chardev}\" not found"
            )));
        };
        let Some(listeners) = slot.take() else {
            return Err(QmpError::generic(format!(
                "chardev '{chardev}' is already in use"
            )));
        };
        let style = if pretty {
            Style::Pretty
        } else {
            Style::Compact
        };
        self.serve(listeners, style).await
    }

    async fn qmp(&mut self, address: Address) -> Result<(), QmpError> {
        let listeners = self.listen(address).await?;
        self.serve(listeners, Style::Compact).await
    }

    async fn serve(&mut self, listeners: Vec<Listener>, style: Style) -> Result<(), QmpError> {
        let first = listeners.first().and_then(Listener::address);
        self.started.qmp.extend(first.cloned());
        self.cx
            .commit(move |control| {
                for listener in listeners {
                    control.monitors.serve(listener, style);
                }
                Ok(())
            })
            .await
    }

    async fn nbd_server(&mut self, arguments: Arguments) -> Result<(), QmpError> {
        let mut options = decode(arguments, NbdServerOptions::decode)?;
        if let qapi::types::SocketAddressBranch::Unix(unix) = &mut options.addr.r#type {
            let path = self.socket_path(Path::new(&unix.path));
            unix.path = path.to_string_lossy().into_owned();
        }
        let address = commands::nbd::start_server(self.cx, options).await?;
        self.started.nbd = Some(address);
        Ok(())
    }

    async fn listen(&self, address: Address) -> Result<Vec<Listener>, QmpError> {
        let address = match address {
            Address::Unix(path) => Address::Unix(self.socket_path(&path)),
            tcp @ Address::Tcp { .. } => tcp,
        };
        Listener::bind(&address)
            .await
            .map_err(|error| QmpError::generic(error.to_string()))
    }

    fn socket_path(&self, path: &Path) -> PathBuf {
        if self.moves {
            absolute(path)
        } else {
            path.to_owned()
        }
    }

    /// A user who names a drive and no way to it gets one.
    async fn defaults(&mut self, config: &Config) -> Result<(), QmpError> {
        let asked = config.steps.iter().any(|step| {
            matches!(
                step.action,
                Action::Monitor(_) | Action::Qmp(_) | Action::NbdServer(_)
            )
        });
        if asked || self.drives.is_empty() {
            return Ok(());
        }
        let sockets = DefaultSockets::make().map_err(QmpError::generic)?;
        let (qmp, nbd) = (sockets.qmp(), sockets.nbd());
        self.started.made_up = true;
        // The daemon's from now on: they go when the servers have gone, whether the start fails or not.
        let keep = move |control: &mut Control| {
            control.belongings.sockets = Some(sockets);
            Ok(())
        };
        self.cx.commit(keep).await?;
        self.qmp(Address::Unix(qmp)).await?;
        self.nbd_server(server_arguments(Address::Unix(nbd))).await
    }

    /// Drives are exported, unless the command line says itself what is.
    async fn export_drives(&mut self, config: &Config) -> Result<(), QmpError> {
        let has_own = |step: &Step| matches!(step.action, Action::Export(_));
        if self.started.nbd.is_none() || config.steps.iter().any(has_own) {
            return Ok(());
        }
        for drive in &self.drives {
            if let Some(export) = drive.export() {
                Handlers::block_export_add(self.cx, export).await?;
                self.started.exports.push(drive.id.clone());
            }
        }
        Ok(())
    }
}

/// The value of an option as the argument of its command.
fn decode<T>(arguments: Arguments, decode: Decode<T>) -> Result<T, QmpError> {
    let Arguments { syntax, object } = arguments;
    decode(Value::Object(object), &qapi::rt::Path::root(syntax))
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
