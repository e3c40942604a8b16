//! Bytes of a QMP client: framing, negotiation, ids, and the arguments of every command.
//!
//! The commands are those of the daemon and their arguments are checked as there, but what passes the check is not run.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use qapi::rt::dispatch::{self, Call};
use qapi::rt::json::{Decoder, Limits, Style};
use qapi::rt::{Object, QmpError, Value};
use qblockd::commands::TABLE;
use qblockd::daemon::Cx;
use qblockd::listen::Listener;
use qblockd::monitor::{
    AnswerFuture, CommandInfo, Events, RATE_LIMITS, Request, Server, Service, Session,
};

use crate::peer;

/// Checks arguments and runs nothing.
struct Checked;

impl Service for Checked {
    fn version(&self) -> Value {
        Value::Object(Object::new())
    }

    fn find(&self, name: &str) -> Option<CommandInfo> {
        let entry = dispatch::find(TABLE, name)?;
        Some(CommandInfo {
            allow_oob: entry.flags.allow_oob,
            in_negotiation: entry.name == "qmp_capabilities",
            no_success_response: entry.flags.no_success_response,
        })
    }

    fn execute<'a>(&'a self, request: Request, session: &'a Session) -> AnswerFuture<'a> {
        Box::pin(async move {
            let cx = Cx::detached(session.clone());
            let negotiates = request.name == "qmp_capabilities";
            match dispatch::find(TABLE, &request.name).map(|entry| &entry.call) {
                Some(Call::InBand(call)) => {
                    let running = call(&cx, request.arguments)?;
                    match negotiates {
                        true => running.await,
                        false => Ok(Value::Object(Object::new())),
                    }
                }
                Some(Call::OutOfBand(call)) => call(&cx, request.arguments),
                None => panic!("a command that was found is gone"),
            }
        })
    }

    fn execute_oob(&self, request: Request, session: &Session) -> Result<Value, QmpError> {
        let cx = Cx::detached(session.clone());
        match dispatch::find(TABLE, &request.name).map(|entry| &entry.call) {
            Some(Call::OutOfBand(call)) => call(&cx, request.arguments),
            _ => Err(QmpError::generic("not out of band")),
        }
    }
}

/// The server, which lives as long as the process.
struct Fixture {
    socket: PathBuf,
    _server: Server,
    _runtime: tokio::runtime::Runtime,
    _directory: tempfile::TempDir,
}

fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("qmp");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let inside = runtime.enter();
        let listening = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
        let mut server = Server::new(Arc::new(Checked), Events::new(RATE_LIMITS));
        server.serve(
            Listener::from_unix(listening).expect("a listener"),
            Style::default(),
        );
        drop(inside);
        Fixture {
            socket,
            _server: server,
            _runtime: runtime,
            _directory: directory,
        }
    })
}

/// Sends the bytes, behind a negotiation if the first one is odd, in pieces as long as the second says.
pub fn run(data: &[u8]) {
    let (&[first, piece], rest) = data.split_first_chunk().unwrap_or((&[0, 0], data));
    let mut bytes = Vec::new();
    if first & 1 != 0 {
        bytes
            .extend_from_slice(br#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#);
    }
    bytes.extend_from_slice(rest);
    let piece = match piece {
        0 => bytes.len(),
        piece => usize::from(piece) * 16,
    };
    let answer = peer::talk(&fixture().socket, &bytes, piece);
    let mut decoder = Decoder::new(Limits::default());
    let mut answer = &answer[..];
    while let Some(message) = decoder.next(&mut answer) {
        let message = message.expect("every answer is JSON");
        let Value::Object(object) = message else {
            panic!("every answer is an object");
        };
        let kinds = ["QMP", "return", "error", "event"];
        assert!(
            kinds.iter().any(|kind| object.contains_key(*kind)),
            "{object:?}"
        );
    }
}
