//! Sockets: who may connect, who may be slow, and how all of it ends.

use std::fs;
use std::io::Read as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use qapi::rt::json::Style;
use qblockd::limits;
use qblockd::listen::{Address, Listener};
use serde_json::{Map, Value, json};

use super::mock::{Running, event};
use super::{Client, PATIENCE};

fn bind(address: &Address) -> Result<Vec<Listener>, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let bound = runtime.unwrap().block_on(Listener::bind(address));
    bound.map_err(|error| error.to_string())
}

fn data(size: usize) -> Map<String, Value> {
    Map::from_iter([("x".to_owned(), Value::from("y".repeat(size)))])
}

#[test]
fn a_client_that_does_not_read_loses_events_and_nobody_else_does() {
    let server = Running::start();
    let mut deaf = Client::ready(&server.socket(), "");
    let mut reader = Client::ready(&server.socket(), "");
    let rounds = 4 * limits::QMP_OUTBOX_EVENT_BYTES / 10_000;
    for _ in 0..rounds {
        server.events.emit(event("FLOOD", data(10_000)));
        assert_eq!(reader.receive()["event"], "FLOOD");
    }
    deaf.send("{'execute':'echo','id':'still here'}");
    let mut events = 0;
    loop {
        let message = deaf.receive();
        if message.get("event").is_none() {
            assert_eq!(message["id"], "still here");
            break;
        }
        events += 1;
    }
    assert!(events > 10 && events < rounds, "{events} of {rounds}");
}

#[test]
fn a_client_that_does_not_read_its_replies_is_not_read_from() {
    let server = Running::start();
    let mut deaf = Client::ready(&server.socket(), "'oob'");
    let count = 64;
    for n in 0..count {
        let size = limits::QMP_OUTBOX_REPLY_BYTES / 4;
        deaf.send(format!(
            "{{'execute':'blob','arguments':{{'size':{size}}},'id':{n}}}"
        ));
    }
    std::thread::sleep(Duration::from_millis(100));
    let run = server.mock.log.lock().unwrap().len();
    assert!(
        run < 16,
        "{run} replies are held for a client that reads none"
    );
    let mut other = Client::ready(&server.socket(), "");
    assert_eq!(other.ask("{'execute':'echo','id':1}")["id"], 1);
    for n in 0..count {
        assert_eq!(deaf.receive()["id"], n, "no reply is lost");
    }
}

#[test]
fn clients_beyond_the_limit_are_turned_away() {
    let server = Running::start();
    let mut clients: Vec<Client> = (0..limits::QMP_CLIENTS)
        .map(|_| Client::connect(&server.socket()).0)
        .collect();
    let mut refused = UnixStream::connect(server.socket()).unwrap();
    refused.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(refused.read(&mut [0; 16]).unwrap(), 0, "closed");
    assert_eq!(
        clients[0].ask("{'execute':'qmp_capabilities'}"),
        json!({"return": {}})
    );
    clients.pop();
    let begin = Instant::now();
    loop {
        // The place is free once the server has seen the other one go.
        let mut stream = UnixStream::connect(server.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        if stream.read(&mut [0; 16]).unwrap() > 0 {
            break;
        }
        assert!(begin.elapsed() < PATIENCE);
    }
}

#[test]
fn shutdown_delivers_replies_then_the_last_event_and_removes_the_sockets() {
    let mut server = Running::start();
    let mut client = Client::ready(&server.socket(), "'oob'");
    let mut idle = Client::ready(&server.socket(), "");
    client.send("{'execute':'hold','id':1}{'execute':'echo','id':2}");
    while server.mock.held.load(Ordering::SeqCst) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    server.stop(Some(event("SHUTDOWN", Map::new())));
    std::thread::sleep(Duration::from_millis(20));
    server.mock.permits.add_permits(1);
    assert_eq!(client.receive()["id"], 1);
    assert_eq!(client.receive()["event"], "SHUTDOWN");
    assert_eq!(client.line(), "", "what was queued is not run");
    assert_eq!(idle.receive()["event"], "SHUTDOWN");
    assert_eq!(idle.line(), "");
    server.join();
    let left: Vec<_> = fs::read_dir(server.directory()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let address = Address::Unix(path.clone());
    drop(UnixListener::bind(&path).unwrap());
    let listener = bind(&address).unwrap();
    let shown = path.display();
    let refused = bind(&address).unwrap_err();
    let expected = format!("Failed to bind socket to {shown}: Address already in use");
    assert_eq!(refused, expected);
    drop(listener);
    assert!(!path.exists(), "removed with the listener");
    fs::write(&path, "precious").unwrap();
    assert_eq!(bind(&address).unwrap_err(), expected);
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn a_socket_file_that_was_replaced_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = bind(&Address::Unix(path.clone())).unwrap();
    fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(listener);
    assert!(path.exists());
}

#[test]
fn addresses_that_cannot_be_listened_on_are_explained() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("no/s");
    let error = bind(&Address::Unix(missing.clone())).unwrap_err();
    let shown = missing.display();
    assert_eq!(
        error,
        format!("Failed to bind socket to {shown}: No such file or directory")
    );
    let long = "x".repeat(120);
    let error = bind(&Address::Unix(long.clone().into())).unwrap_err();
    assert_eq!(error, format!("UNIX socket path '{long}' is too long"));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let error = bind(&Address::tcp("127.0.0.1", port)).unwrap_err();
    assert_eq!(
        error,
        "Failed to find an available port: Address already in use"
    );
    let error = bind(&Address::tcp("203.0.113.7", 0)).unwrap_err();
    assert_eq!(
        error,
        "Failed to bind socket: Cannot assign requested address"
    );
}

#[test]
fn tcp_and_sockets_that_are_open_already_are_served() {
    use qblockd::monitor::{Events, Server};
    let mock = Running::start();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("given");
    let given = UnixListener::bind(&path).unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let service = std::sync::Arc::clone(&mock.mock);
    let (server, tcp) = runtime.block_on(async {
        let mut server = Server::new(service, Events::new(&[]));
        let address = Address::tcp("localhost", 0);
        let mut port = None;
        for listener in Listener::bind(&address).await.unwrap() {
            if let Some(Address::Tcp { port: bound, .. }) = listener.address() {
                port = Some(*bound);
            }
            server.serve(listener, Style::Compact);
        }
        let tcp = ("localhost", port.unwrap());
        server.serve(Listener::from_unix(given).unwrap(), Style::Compact);
        (server, tcp)
    });
    let mut client = Client::ready(&path, "");
    assert_eq!(client.ask("{'execute':'echo','id':1}")["id"], 1);
    let mut greeting = [0; 8];
    let mut stream = std::net::TcpStream::connect(tcp).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"{\"QMP\": ");
    runtime.block_on(server.shutdown(None));
    assert!(path.exists(), "not ours to remove");
}
