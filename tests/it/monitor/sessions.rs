//! Sessions: negotiation, ids, order, out-of-band execution, events.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::mock::{Running, event, version};
use super::{Client, PATIENCE};

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_greeting_and_the_negotiation() {
    let server = Running::start();
    let (mut client, greeting) = Client::connect(&server.socket());
    let expected = json!({"QMP": {"version": version(), "capabilities": ["oob"]}});
    assert_eq!(greeting, expected);

    let reply = client.ask("{'execute':'query-version','id':1}");
    let desc = "Expecting capabilities negotiation with 'qmp_capabilities'";
    let error = json!({"class": "CommandNotFound", "desc": desc});
    assert_eq!(reply, json!({"id": 1, "error": error}));
    assert_eq!(
        client.ask("{'execute':'nonsense'}"),
        json!({"error": error})
    );
    assert_eq!(
        client.refusal("{'a':1}"),
        "QMP input member 'a' is unexpected"
    );
    assert_eq!(client.refusal("{]\n"), "JSON parse error, expecting value");
    let bogus = "{'execute':'qmp_capabilities','arguments':{'enable':['bogus']}}";
    assert_eq!(
        client.refusal(bogus),
        "Parameter 'null' does not accept value 'bogus'"
    );

    let agreed = client.ask("{'execute':'qmp_capabilities','id':'x'}");
    assert_eq!(agreed, json!({"return": {}, "id": "x"}));
    assert_eq!(
        client.ask("{'execute':'query-version'}"),
        json!({"return": version()})
    );
    let again = client.ask("{'execute':'qmp_capabilities'}");
    let desc = "Capabilities negotiation is already complete, command ignored";
    assert_eq!(
        again,
        json!({"error": {"class": "CommandNotFound", "desc": desc}})
    );
    let unknown = client.ask("{'execute':'nonsense'}");
    let desc = "The command nonsense has not been found";
    assert_eq!(
        unknown,
        json!({"error": {"class": "CommandNotFound", "desc": desc}})
    );

    // A new connection begins at the beginning.
    let (mut client, _) = Client::connect(&server.socket());
    assert!(
        client
            .refusal("{'execute':'query-version'}")
            .starts_with("Expecting")
    );
}

#[test]
fn malformed_input_costs_one_error_before_and_after_negotiation() {
    let server = Running::start();
    let (mut client, _) = Client::connect(&server.socket());
    for negotiated in [false, true] {
        let broken: [&[u8]; 6] = [
            b"{]\n",
            b"{\xFF",
            b"{\x01",
            b"{'bad \xFF",
            b"{'execute': 'nonexistent', 'id':'\n",
            b"%p\n",
        ];
        for bytes in broken {
            let refusal = client.refusal(bytes);
            assert!(refusal.starts_with("JSON parse error, "), "{refusal}");
            let next = client.ask("{'execute':'query-version','id':7}");
            assert_eq!(next["id"], 7);
            assert_eq!(next.get("return").is_some(), negotiated, "{next}");
        }
        client.send("foo bar\n");
        for word in ["foo", "bar"] {
            let expected = format!("JSON parse error, invalid keyword '{word}'");
            assert_eq!(client.receive()["error"]["desc"], expected);
        }
        if !negotiated {
            client.ask("{'execute':'qmp_capabilities'}");
        }
    }
}

#[test]
fn pieces_and_pipelines_give_the_same_answers() {
    let server = Running::start();
    let mut client = Client::ready(&server.socket(), "");
    let input = "{'execute':'echo','arguments':{'a':[1]},'id':1}[1]{'execute':'echo','id':2}\n\n {'id':3}42 ";
    let mut replies = Vec::new();
    for pieces in [input.len(), 1] {
        for piece in input.as_bytes().chunks(pieces) {
            client.send(piece);
        }
        let lines: Vec<String> = (0..5).map(|_| client.line()).collect();
        replies.push(lines);
    }
    assert_eq!(replies[0], replies[1]);
    assert_eq!(replies[0][0], "{\"return\": {\"a\": [1]}, \"id\": 1}\r\n");
    assert_eq!(replies[0][2], "{\"return\": {}, \"id\": 2}\r\n");
    let lacks = "{\"class\": \"GenericError\", \"desc\": \"QMP input lacks member 'execute'\"}";
    assert_eq!(
        replies[0][3],
        format!("{{\"id\": 3, \"error\": {lacks}}}\r\n")
    );
}

#[test]
fn without_oob_one_command_is_in_flight_and_replies_keep_their_order() {
    let server = Running::start();
    let mut client = Client::ready(&server.socket(), "");
    client.send("{'execute':'hold','id':1}{'execute':'echo','id':2}{'exec-oob':'echo-oob','id':3}");
    wait_until("held", || server.mock.held.load(Ordering::SeqCst) == 1);
    thread::sleep(Duration::from_millis(30));
    assert_eq!(*server.mock.log.lock().unwrap(), ["qmp_capabilities"]);
    server.mock.permits.add_permits(1);
    let ids: Vec<_> = (0..3).map(|_| client.receive()["id"].clone()).collect();
    assert_eq!(ids, [1, 2, 3]);
}

#[test]
fn oob_overtakes_until_the_queue_of_eight_is_full() {
    let server = Running::start();
    let mut client = Client::ready(&server.socket(), "'oob'");
    assert_eq!(
        client.refusal("{'exec-oob':'query-version'}"),
        "The command query-version does not support OOB"
    );
    assert_eq!(
        client.refusal("{'exec-oob':'x','execute':'y'}"),
        "QMP input member 'execute' clashes with 'exec-oob'"
    );
    assert_eq!(
        client.ask("{'execute':'echo-oob','id':0}")["id"],
        0,
        "in-band too"
    );
    client.send("{'execute':'hold','id':'h'}{'execute':'echo','id':'e'}]");
    assert_eq!(client.ask("{'exec-oob':'echo-oob','id':'o'}")["id"], "o");
    // One runs and two wait (the broken message too). Six more fill the queue.
    for _ in 0..6 {
        client.send("{'execute':'echo','id':'q'}");
    }
    client.send("{'exec-oob':'echo-oob','id':'late'}");
    thread::sleep(Duration::from_millis(50));
    server.mock.permits.add_permits(1);
    assert_eq!(client.receive()["id"], "h");
    let ids: Vec<String> = (0..9).map(|_| client.receive()["id"].to_string()).collect();
    let late = ids.iter().position(|id| id == "\"late\"").unwrap();
    assert!(late > 0, "seen only when there was room again: {ids:?}");
    let in_band: Vec<&str> = ids
        .iter()
        .map(String::as_str)
        .filter(|id| *id != "\"late\"")
        .collect();
    assert_eq!(in_band[..2], ["\"e\"", "null"]);
    assert_eq!(in_band[2..], ["\"q\""; 6]);
}

#[test]
fn a_held_command_stops_nobody_else() {
    let server = Running::start();
    let mut holder = Client::ready(&server.socket(), "");
    holder.send("{'execute':'hold','id':1}");
    wait_until("held", || server.mock.held.load(Ordering::SeqCst) == 1);
    let mut others: Vec<Client> = (0..20)
        .map(|_| Client::ready(&server.socket(), ""))
        .collect();
    for (n, client) in others.iter_mut().enumerate() {
        let reply = client.ask(&format!("{{'execute':'echo','id':{n}}}"));
        assert_eq!(reply["id"], n);
    }
    server.mock.permits.add_permits(1);
    assert_eq!(holder.receive()["id"], 1);
}

#[test]
fn events_reach_every_negotiated_session_in_its_style() {
    let server = Running::start();
    let (mut waiting, _) = Client::connect(&server.socket());
    let mut first = Client::ready(&server.socket(), "");
    let mut second = Client::ready(&server.socket(), "'oob'");
    first.send("{'execute':'emit','arguments':{'n':1},'id':'done'}");
    let seen = first.receive();
    assert_eq!(seen["event"], "MOCK");
    assert_eq!(seen["data"], json!({"n": 1}));
    assert!(seen["timestamp"]["seconds"].as_i64().unwrap() > 1_700_000_000);
    assert!(seen["timestamp"]["microseconds"].as_i64().unwrap() < 1_000_000);
    assert_eq!(first.receive()["id"], "done");
    assert_eq!(second.receive()["event"], "MOCK");
    // The one in negotiation gets its replies and nothing else.
    assert_eq!(
        waiting.ask("{'execute':'qmp_capabilities'}"),
        json!({"return": {}})
    );
    server.events.emit(event("LATER", serde_json::Map::new()));
    let later = waiting.receive();
    assert_eq!(later["event"], "LATER");
    assert!(later.get("data").is_none());
}

#[test]
fn the_pretty_monitor_indents() {
    let server = Running::start();
    let (mut client, first) = {
        let stream = std::os::unix::net::UnixStream::connect(server.pretty_socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let lines = std::io::BufReader::new(stream.try_clone().unwrap());
        let mut client = Client { stream, lines };
        let first = client.line();
        (client, first)
    };
    assert_eq!(first, "{\r\n");
    while client.line() != "}\r\n" {}
    client.send("{'execute':'qmp_capabilities'}");
    let reply: String = (0..4).map(|_| client.line()).collect();
    assert_eq!(reply, "{\r\n    \"return\": {\r\n    }\r\n}\r\n");
}

#[test]
fn success_may_be_silent_but_failure_is_not() {
    let server = Running::start();
    let mut client = Client::ready(&server.socket(), "");
    client.send("{'execute':'silent'}");
    assert_eq!(client.refusal("{'execute':'silent-failure'}"), "failed");
}

#[test]
fn a_client_that_hangs_up_does_not_cancel_its_command() {
    let server = Running::start();
    let mut client = Client::ready(&server.socket(), "");
    client.send("{'execute':'hold'}");
    wait_until("held", || server.mock.held.load(Ordering::SeqCst) == 1);
    drop(client);
    thread::sleep(Duration::from_millis(20));
    server.mock.permits.add_permits(1);
    wait_until("run to its end", || {
        server
            .mock
            .log
            .lock()
            .unwrap()
            .last()
            .is_some_and(|name| name == "hold")
    });
}

#[test]
fn a_half_closed_client_gets_its_replies() {
    let server = Running::start();
    let mut client = Client::ready(&server.socket(), "'oob'");
    client.send("{'execute':'echo','id':1}{'execute':'echo','id':2}'cut");
    let rest = client.finish();
    let lines: Vec<&str> = rest.lines().collect();
    assert_eq!(lines.len(), 3, "{rest}");
    assert!(
        lines[1].contains("\"id\": 2") && lines[2].contains("stray ''cut'"),
        "{rest}"
    );
}

#[test]
fn a_descriptor_comes_with_the_bytes_of_its_request() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use std::io::IoSlice;
    use std::os::fd::AsFd as _;

    let server = Running::start();
    let mut client = Client::ready(&server.socket(), "");
    let directory = tempfile::tempdir().unwrap();
    for text in ["first", "second"] {
        let path = directory.path().join(text);
        std::fs::write(&path, text).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        let files = [file.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        let bytes = b"{'execute':'read-fd','id':1}";
        let slices = [IoSlice::new(bytes)];
        let sent = sendmsg(&client.stream, &slices, &mut control, SendFlags::empty());
        assert_eq!(sent.unwrap(), bytes.len());
        assert_eq!(client.receive()["return"], text);
    }
    let none = "No file descriptor supplied via SCM_RIGHTS";
    assert_eq!(client.refusal("{'execute':'read-fd'}"), none);
}
