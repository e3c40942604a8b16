//! What depends on seconds, with paused time.

use tokio::io::AsyncReadExt as _;
use tokio::time::Instant;

use super::*;
use crate::listen::{Address, Listener};
use crate::monitor::descriptors::Descriptors;
use crate::monitor::{AnswerFuture, CommandInfo, Event, Server};

/// Knows one command, which never ends.
struct Endless;

impl Service for Endless {
    fn version(&self) -> Value {
        Value::Null
    }

    fn find(&self, _name: &str) -> Option<CommandInfo> {
        Some(CommandInfo {
            in_negotiation: true,
            ..CommandInfo::default()
        })
    }

    fn execute<'a>(&'a self, request: Request, session: &'a Session) -> AnswerFuture<'a> {
        Box::pin(async move {
            if request.name == "qmp_capabilities" {
                session.negotiate(&[])?;
                return Ok(Value::Null);
            }
            std::future::pending().await
        })
    }

    fn execute_oob(&self, _request: Request, _session: &Session) -> Result<Value, QmpError> {
        Ok(Value::Null)
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_nothing_for_a_minute_is_dropped() {
    let phase = watch::Sender::new(Phase::Running);
    let shared = Shared {
        service: Arc::new(Endless),
        events: Events::new(&[]),
        phase: phase.subscribe(),
        draining: mpsc::channel(1).0,
        budget: Budget::default(),
    };
    // Smaller than the greeting: the first write is cut short and the next one waits.
    let (ours, theirs) = tokio::io::duplex(16);
    let (reader, writer) = tokio::io::split(ours);
    let begin = Instant::now();
    let stream = Stream {
        reader: Box::new(reader),
        writer: Box::new(writer),
        descriptors: Descriptors::default(),
    };
    serve(shared, Style::Compact, stream).await;
    assert_eq!(begin.elapsed().as_secs(), limits::QMP_WRITE_STALL.as_secs());
    drop((theirs, phase));
}

#[tokio::test(start_paused = true)]
async fn a_command_that_never_ends_does_not_hold_up_the_shutdown() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let mut server = Server::new(Arc::new(Endless), Events::new(&[]));
    let listeners = Listener::bind(&Address::Unix(path.clone())).await.unwrap();
    for listener in listeners {
        server.serve(listener, Style::Compact);
    }
    let mut client = tokio::net::UnixStream::connect(&path).await.unwrap();
    let commands = b"{'execute':'qmp_capabilities'}{'execute':'wait'}";
    client.write_all(commands).await.unwrap();
    let mut seen = vec![0; 512];
    let mut length = 0;
    while !seen[..length].ends_with(b"{\"return\": null}\r\n") {
        length += client.read(&mut seen[length..]).await.unwrap();
    }
    let begin = Instant::now();
    let name = "LAST";
    let data = qapi::rt::Object::new();
    server.shutdown(Some(Event { name, data })).await;
    assert_eq!(begin.elapsed().as_secs(), limits::QMP_STOP_GRACE.as_secs());
    let mut rest = String::new();
    client.read_to_string(&mut rest).await.unwrap();
    assert!(
        rest.contains("\"event\": \"LAST\"") && rest.lines().count() == 1,
        "{rest}"
    );
}
