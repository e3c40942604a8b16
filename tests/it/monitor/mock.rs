//! A service with a few commands, and a server around it on a thread of its own.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use qapi::rt::json::Style;
use qapi::rt::{Object, QmpError, Value};
use qblockd::listen::{Address, Listener};
use qblockd::monitor::{
    AnswerFuture, Capability, CommandInfo, Event, Events, RATE_LIMITS, Request, Server, Service,
    Session,
};
use serde_json::json;
use tokio::sync::{Semaphore, oneshot};

/// What the commands work on.
pub(super) struct Mock {
    version: Value,
    /// `hold` takes a permit before it answers.
    pub(super) permits: Semaphore,
    /// How many `hold` have been started.
    pub(super) held: AtomicUsize,
    /// Names of commands in the order they were run.
    pub(super) log: Mutex<Vec<String>>,
    events: Events,
}

impl Mock {
    fn run(&self, request: &Request, session: &Session) -> Result<Value, QmpError> {
        self.log.lock().unwrap().push(request.name.clone());
        let arguments = &request.arguments;
        match request.name.as_str() {
            "qmp_capabilities" => negotiate(arguments, session),
            "query-version" => match arguments.keys().next() {
                Some(key) => Err(QmpError::generic(format!(
                    "Parameter '{key}' is unexpected"
                ))),
                None => Ok(self.version.clone()),
            },
            "echo" | "echo-oob" => Ok(Value::Object(arguments.clone())),
            "emit" => {
                self.events.emit(event("MOCK", arguments.clone()));
                Ok(json!({}))
            }
            // As many bytes as are asked for.
            "blob" => {
                let size = arguments["size"].as_u64().unwrap_or(0);
                Ok(Value::from("x".repeat(usize::try_from(size).unwrap())))
            }
            // What can be read from the descriptor that came along.
            "read-fd" => match session.take_descriptor() {
                Some(descriptor) => {
                    let mut text = String::new();
                    File::from(descriptor).read_to_string(&mut text).unwrap();
                    Ok(Value::from(text))
                }
                None => Err(QmpError::generic(
                    "No file descriptor supplied via SCM_RIGHTS",
                )),
            },
            "silent" => Ok(json!({})),
            "silent-failure" => Err(QmpError::generic("failed")),
            other => Err(QmpError::generic(format!("no such mock: {other}"))),
        }
    }
}

fn negotiate(arguments: &Object, session: &Session) -> Result<Value, QmpError> {
    let mut enable = Vec::new();
    for (key, names) in arguments {
        if key != "enable" {
            return Err(QmpError::generic(format!(
                "Parameter '{key}' is unexpected"
            )));
        }
        for name in names.as_array().into_iter().flatten() {
            match name.as_str() {
                Some("oob") => enable.push(Capability::Oob),
                _ => {
                    let desc = format!("Parameter 'null' does not accept value {name}");
                    return Err(QmpError::generic(desc.replace('"', "'")));
                }
            }
        }
    }
    session.negotiate(&enable)?;
    Ok(json!({}))
}

pub(super) fn event(name: &'static str, data: Object) -> Event {
    Event { name, data }
}

impl Service for Mock {
    fn version(&self) -> Value {
        self.version.clone()
    }

    fn find(&self, name: &str) -> Option<CommandInfo> {
        let known = CommandInfo::default();
        match name {
            "qmp_capabilities" => Some(CommandInfo {
                in_negotiation: true,
                ..known
            }),
            "echo-oob" => Some(CommandInfo {
                allow_oob: true,
                ..known
            }),
            "silent" | "silent-failure" => Some(CommandInfo {
                no_success_response: true,
                ..known
            }),
            "query-version" | "echo" | "hold" | "emit" | "blob" | "read-fd" => Some(known),
            _ => None,
        }
    }

    fn execute<'a>(&'a self, request: Request, session: &'a Session) -> AnswerFuture<'a> {
        Box::pin(async move {
            if request.name != "hold" {
                return self.run(&request, session);
            }
            self.held.fetch_add(1, Ordering::SeqCst);
            self.permits.acquire().await.unwrap().forget();
            self.log.lock().unwrap().push("hold".to_owned());
            Ok(json!("released"))
        })
    }

    fn execute_oob(&self, request: Request, session: &Session) -> Result<Value, QmpError> {
        self.run(&request, session)
    }
}

/// A running server. Stops when dropped, if not before.
pub(super) struct Running {
    pub(super) mock: Arc<Mock>,
    pub(super) events: Events,
    directory: tempfile::TempDir,
    stop: Option<oneshot::Sender<Option<Event>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// A version that is not QEMU's.
pub(super) fn version() -> Value {
    json!({"qemu": {"micro": 3, "minor": 2, "major": 1}, "package": "mock"})
}

impl Running {
    /// A server with a compact monitor (`qmp.sock`) and a pretty one (`pretty.sock`).
    pub(super) fn start() -> Running {
        Running::with_version(version())
    }

    pub(super) fn with_version(version: Value) -> Running {
        let directory = tempfile::tempdir().unwrap();
        let events = Events::new(RATE_LIMITS);
        let mock = Arc::new(Mock {
            version,
            permits: Semaphore::new(0),
            held: AtomicUsize::new(0),
            log: Mutex::default(),
            events: events.clone(),
        });
        let (stop, stopped) = oneshot::channel();
        let (ready, started) = std::sync::mpsc::channel();
        let service = Arc::clone(&mock);
        let path = directory.path().to_owned();
        let hub = events.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(async move {
                let mut server = Server::new(service, hub);
                for (name, style) in [("qmp.sock", Style::Compact), ("pretty.sock", Style::Pretty)]
                {
                    let address = Address::Unix(path.join(name));
                    for listener in Listener::bind(&address).await.unwrap() {
                        server.serve(listener, style);
                    }
                }
                ready.send(()).unwrap();
                let last = stopped.await.unwrap();
                server.shutdown(last).await;
            });
        });
        started.recv().unwrap();
        Running {
            mock,
            events,
            directory,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.directory.path().join("qmp.sock")
    }

    pub(super) fn pretty_socket(&self) -> PathBuf {
        self.directory.path().join("pretty.sock")
    }

    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Begins the shutdown, with a last event.
    pub(super) fn stop(&mut self, last: Option<Event>) {
        self.stop.take().unwrap().send(last).unwrap();
    }

    /// Waits until the server is gone.
    pub(super) fn join(&mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A failed test may leave commands held; they must not hold up the shutdown.
        self.mock.permits.add_permits(1000);
        if let Some(stop) = self.stop.take() {
            drop(stop.send(None));
        }
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}
