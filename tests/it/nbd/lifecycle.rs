//! Servers, exports and connections: how they begin and end.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use block::error::ErrorKind;
use block::protocols::memory::{Memory, OpKind};
use qblockd::exports::nbd::{NbdExportOptions, NbdServer, NbdServerOptions};
use qblockd::exports::{ExportEvent, RemoveMode};
use qblockd::listen::Address;

use super::client::*;
use super::{Fixture, SIZE};

fn closed(id: &str) -> ExportEvent {
    ExportEvent::Closed { id: id.to_owned() }
}

#[test]
fn exports_come_and_go_while_the_server_runs() {
    let mut fixture = Fixture::new();
    fixture.add("second", |options| options.writable = false);
    let list = fixture.server().exports();
    let shown: Vec<_> = list
        .iter()
        .map(|export| (&export.id[..], &export.node_name[..], export.writable))
        .collect();
    assert_eq!(shown, [("second", "node0", false), ("disk", "node0", true)]);
    let node: std::sync::Arc<dyn block::driver::Requests> = fixture.disk.clone();
    let add = |id: &str, name: &str| {
        let options = NbdExportOptions {
            id: id.into(),
            name: name.into(),
            ..NbdExportOptions::default()
        };
        let added = fixture.server().add(options, node.clone());
        added.map_err(|error| error.message().to_owned())
    };
    assert_eq!(
        add("disk", "x"),
        Err("Block export id 'disk' is already in use".into())
    );
    assert_eq!(
        add("x", "disk"),
        Err("NBD server already has export named 'disk'".into())
    );
    let long = "x".repeat(4097);
    assert_eq!(
        add("x", &long),
        Err(format!("export name '{long}' too long"))
    );
    fixture.server().remove("disk", RemoveMode::Safe).unwrap();
    assert_eq!(fixture.event(), closed("disk"));
    let gone = fixture
        .server()
        .remove("disk", RemoveMode::Safe)
        .unwrap_err();
    assert_eq!(
        (gone.kind(), gone.message()),
        (ErrorKind::NotFound, "Export 'disk' is not found")
    );
    assert!(fixture.server().id_of_name("disk").is_err());
    assert_eq!(fixture.server().id_of_name("second").unwrap(), "second");
    let mut client = fixture.connect();
    client.handshake(3);
    client.refused(GO, &info_data("disk", &[]), ERR_UNKNOWN);
}

#[test]
fn a_safe_removal_is_refused_while_there_are_clients_and_a_hard_one_sends_them_away() {
    let mut fixture = Fixture::new();
    let mut client = fixture.simple();
    assert_eq!(fixture.server().exports()[0].connections, 1);
    let refused = fixture
        .server()
        .remove("disk", RemoveMode::Safe)
        .unwrap_err();
    assert_eq!(
        (refused.kind(), refused.message()),
        (ErrorKind::InUse, "export 'disk' still in use")
    );
    client.read(0, 512);
    // In flight when the export goes: it is answered, and the export lives until then.
    fixture.disk.hold(OpKind::Read);
    client.send(&request(0, READ, 5, 0, 512));
    fixture.wait_held(1);
    fixture.server().remove("disk", RemoveMode::Hard).unwrap();
    let shown = &fixture.server().exports()[0];
    assert_eq!((shown.shutting_down, shown.connections), (true, 1));
    let again = fixture
        .server()
        .remove("disk", RemoveMode::Hard)
        .unwrap_err();
    assert_eq!(again.message(), "Export 'disk' is already shutting down");
    assert!(fixture.events.try_recv().is_err());
    fixture.disk.release_all();
    assert_eq!(client.simple_reply(), (5, 0));
    client.take(512);
    assert!(client.is_closed());
    assert_eq!(fixture.event(), closed("disk"));
    assert!(fixture.server().exports().is_empty());
    // The node has been let go of: what is left is the fixture's.
    assert_eq!(std::sync::Arc::strong_count(&fixture.disk), 1);
}

#[test]
fn stopping_answers_what_is_in_flight_and_removes_the_socket() {
    let mut fixture = Fixture::new();
    let mut idle = fixture.simple();
    let mut handshaking = fixture.connect();
    // Its greeting says that the server has it.
    handshaking.take(18);
    let mut busy = fixture.simple();
    fixture.disk.hold(OpKind::Write);
    let mut message = request(0, WRITE, 3, 0, 4);
    message.extend(b"data");
    busy.send(&message);
    fixture.wait_held(1);
    let disk = fixture.disk.clone();
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        disk.release_all();
    });
    fixture.stop();
    release.join().unwrap();
    assert_eq!(busy.simple_reply(), (3, 0));
    assert!(busy.is_closed() && idle.is_closed() && handshaking.is_closed());
    assert_eq!(fixture.event(), closed("disk"));
    assert!(!fixture.path().exists());
    assert_eq!(&fixture.disk.content()[..4], b"data");
}

#[test]
fn a_client_that_takes_no_replies_does_not_hold_up_the_end() {
    let mut fixture = Fixture::with(8 << 20, |_| {});
    let mut client = fixture.simple();
    client.send(&request(0, READ, 1, 0, 8 << 20));
    client.take(16);
    fixture.stop();
    assert_eq!(fixture.event(), closed("disk"));
}

#[test]
fn a_client_that_vanishes_leaves_its_writes_whole() {
    let mut fixture = Fixture::new();
    let mut client = fixture.simple();
    fixture.disk.hold(OpKind::Write);
    let mut message = request(0, WRITE, 3, 0, 4);
    message.extend(b"data");
    message.extend(&request(0, WRITE, 4, 8192, 100)[..20]);
    client.send(&message);
    fixture.wait_held(1);
    drop(client);
    std::thread::sleep(Duration::from_millis(20));
    fixture.disk.release_all();
    fixture.stop();
    assert_eq!(&fixture.disk.content()[..4], b"data");
    assert_eq!(fixture.disk.count(OpKind::Write), 1);
}

#[test]
fn a_socket_that_was_left_behind_is_replaced_and_one_in_use_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd.sock");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let start = || {
        let (events, _) = tokio::sync::mpsc::unbounded_channel();
        let options = NbdServerOptions::new(vec![Address::Unix(path.clone())]);
        runtime.block_on(NbdServer::start(options, events))
    };
    let in_use = format!(
        "Failed to bind socket to {}: Address already in use",
        path.display()
    );
    let message =
        |result: Result<NbdServer, block::error::Error>| result.err().unwrap().message().to_owned();
    std::fs::write(&path, "precious").unwrap();
    assert_eq!(message(start()), in_use);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    std::fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    assert_eq!(message(start()), in_use);
    drop(other);
    let server = start().unwrap();
    runtime.block_on(server.stop());
    assert!(!path.exists());
    // A file that somebody else put there meanwhile stays.
    let server = start().unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "precious").unwrap();
    runtime.block_on(server.stop());
    assert!(path.exists());
    drop(runtime);
}

#[test]
fn tcp_works_and_tells_its_port() {
    let mut fixture = Fixture::with(SIZE, |options| {
        options.addresses.push(Address::tcp("127.0.0.1", 0));
    });
    let Some(Address::Tcp { port, .. }) = fixture.server().addresses().get(1).cloned() else {
        panic!("no TCP address");
    };
    assert_ne!(port, 0);
    let taken = NbdServerOptions::new(vec![Address::tcp("127.0.0.1", port)]);
    let (events, _) = tokio::sync::mpsc::unbounded_channel();
    let error = fixture
        .runtime
        .block_on(NbdServer::start(taken, events))
        .err()
        .unwrap();
    assert_eq!(
        error.message(),
        "Failed to find an available port: Address already in use"
    );
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(&3u32.to_be_bytes()).unwrap();
    stream.write_all(&option(LIST, b"")).unwrap();
    let mut answer = [0; 18 + 20 + 8 + 20];
    std::io::Read::read_exact(&mut stream, &mut answer).unwrap();
    assert_eq!(&answer[42..46], b"disk");
    fixture.stop();
}

#[test]
fn connections_beyond_the_limit_wait_for_their_turn() {
    let fixture = Fixture::with(SIZE, |options| options.max_connections = Some(2));
    let mut first = fixture.simple();
    let _second = fixture.simple();
    let mut third = fixture.connect();
    third
        .0
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    assert!(!third.is_closed(), "it waits");
    first.send(&request(0, DISC, 1, 0, 0));
    third
        .0
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    third.handshake(3);
    third.go("disk");
    third.read(0, 512);
}

#[test]
fn a_handshake_takes_its_time_only_once() {
    let fixture = Fixture::with(SIZE, |options| {
        options.handshake_timeout = Some(Duration::from_millis(100));
    });
    let mut slow = fixture.connect();
    slow.take(18);
    assert!(slow.is_closed());
    // The time counts for the handshake only.
    let mut client = fixture.simple();
    std::thread::sleep(Duration::from_millis(200));
    client.read(0, 512);
}

#[test]
fn strangers_who_never_finish_their_handshake_lock_nobody_out() {
    let fixture = Fixture::with(SIZE, |options| options.max_connections = None);
    let mut strangers: Vec<UnixStream> = (0..300)
        .map(|_| {
            let mut client = fixture.connect();
            client.take(18);
            client.0
        })
        .collect();
    fixture.simple().read(0, 512);
    let mut oldest = Client(strangers.remove(0));
    assert!(oldest.is_closed());
    let mut newest = Client(strangers.pop().unwrap());
    newest.send(&3u32.to_be_bytes());
    newest.go("disk");
    newest.read(0, 512);
    // 300 handshakes at a time were never kept.
    let alive = strangers.into_iter().filter(|stream| {
        stream
            .set_read_timeout(Some(Duration::from_millis(1)))
            .unwrap();
        !Client(stream.try_clone().unwrap()).is_closed()
    });
    assert!(alive.count() <= 64);
}

#[test]
fn the_size_is_the_nodes_present_size() {
    let fixture = Fixture::new();
    let mut client = fixture.simple();
    let disk = fixture.disk.clone();
    let grow = async move {
        let node: &dyn block::driver::Requests = &*disk;
        node.resize(2 * SIZE, block::driver::Preallocation::Off)
            .await
    };
    fixture.runtime.block_on(grow).unwrap();
    client.write(2 * SIZE - 4, b"tail");
    assert_eq!(client.simple(&request(0, READ, 1, 2 * SIZE, 1)), EINVAL);
}

#[test]
fn several_exports_do_not_mix() {
    let fixture = Fixture::new();
    let other = Memory::new(4096);
    let options = NbdExportOptions {
        id: "other".into(),
        name: "other".into(),
        writable: true,
        ..NbdExportOptions::default()
    };
    fixture.server().add(options, other.clone()).unwrap();
    let mut client = fixture.connect();
    client.handshake(3);
    client.go("other");
    client.write(0, b"other");
    fixture.simple().write(0, b"first");
    assert_eq!(&other.content()[..5], b"other");
    assert_eq!(&fixture.disk.content()[..5], b"first");
}
