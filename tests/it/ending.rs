//! The end of a daemon whose peers hang: by command or by signal, in order and in time, whatever clients and disks do.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::guest::{Guest, Request};
use super::harness::{Daemon, Program, Qmp};

/// The longest that an end may take: what is under way on disks ends by itself within a second here.
const BOUND: Duration = Duration::from_secs(10);

/// The slowest disk that there can be, in nanoseconds for each request.
const SLOW: u64 = 1_000_000_000;

/// Bytes of each disk.
const SIZE: u64 = 64 << 20;

/// Ends a daemon, and answers what it has told last.
fn end_in_time(mut daemon: Daemon, mut qmp: Qmp, by_command: bool) -> Vec<Value> {
    daemon.ended_within(BOUND, &mut qmp, by_command);
    let mut events = std::mem::take(&mut qmp.events);
    events.extend(qmp.rest());
    assert_eq!(events.last().unwrap()["event"], "SHUTDOWN");
    events
}

fn null_disk(qmp: &mut Qmp, name: &str, latency: u64) {
    let node = json!({"driver": "null-co", "node-name": name, "size": SIZE, "latency-ns": latency});
    qmp.ok("blockdev-add", node);
}

/// A client that sends questions with long answers, and reads none.
fn deaf_client(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut text = br#"{"execute":"qmp_capabilities"}"#.to_vec();
    text.extend(br#"{"execute":"query-qmp-schema"}"#.repeat(1000));
    // As much as the socket takes: the daemon stops reading when its answers are not read.
    let mut sent = 0;
    let deadline = Instant::now() + Duration::from_millis(300);
    while sent < text.len() && Instant::now() < deadline {
        match stream.write(&text[sent..]) {
            Ok(bytes) => sent += bytes,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    stream
}

#[test]
fn a_daemon_ends_while_clients_do_not_read() {
    for by_command in [true, false] {
        let mut daemon = Daemon::start(Program::Qblockd, &[]);
        let qmp = daemon.qmp();
        let deaf: Vec<UnixStream> = (0..3)
            .map(|_| deaf_client(&daemon.path("qmp.sock")))
            .collect();
        // One that has not even negotiated.
        let silent = UnixStream::connect(daemon.path("qmp.sock")).unwrap();
        end_in_time(daemon, qmp, by_command);
        drop((deaf, silent));
    }
}

#[test]
fn a_daemon_ends_while_the_target_of_a_job_hangs() {
    for by_command in [true, false] {
        let mut daemon = Daemon::start(Program::Qblockd, &[]);
        daemon.tool(&format!("head -c {SIZE} /dev/urandom > data"));
        let mut qmp = daemon.qmp();
        let data = json!({"driver": "file", "node-name": "data", "filename": "data"});
        qmp.ok("blockdev-add", data);
        for (name, latency) in [("slow", SLOW), ("slow-too", SLOW), ("fast", 0)] {
            null_disk(&mut qmp, name, latency);
        }
        // Each needs a minute and more.
        let perf = json!({"max-workers": 8, "max-chunk": 65536});
        for (source, target) in [("data", "slow"), ("slow-too", "fast")] {
            let backup = json!({"device": source, "job-id": target, "target": target, "sync": "full", "x-perf": perf});
            qmp.ok("blockdev-backup", backup);
        }
        std::thread::sleep(Duration::from_millis(100));
        let events = end_in_time(daemon, qmp, by_command);
        let cancelled = events
            .iter()
            .filter(|event| event["event"] == "BLOCK_JOB_CANCELLED");
        assert_eq!(cancelled.count(), 2, "{events:?}");
    }
}

#[test]
fn a_daemon_ends_while_guests_have_requests_under_way_or_read_nothing() {
    for by_command in [true, false] {
        let mut daemon = Daemon::start(Program::Qblockd, &["--nbd-server", "unix:nbd.sock"]);
        let mut qmp = daemon.qmp();
        for (name, latency) in [("slow", SLOW), ("fast", 0)] {
            null_disk(&mut qmp, name, latency);
            let export = json!({"type": "nbd", "id": name, "node-name": name, "name": name, "writable": true});
            qmp.ok("block-export-add", export);
        }
        let mut waiting = Guest::connect(&daemon.path("nbd.sock"), "slow").unwrap();
        for number in 0..16 {
            let write = Request::Write {
                offset: number * 4096,
                data: vec![1; 4096],
            };
            waiting.submit(number, &write).unwrap();
        }
        waiting.submit(16, &Request::Flush).unwrap();
        // The answers to these do not fit into the socket.
        let mut deaf = Guest::connect(&daemon.path("nbd.sock"), "fast").unwrap();
        for _ in 0..16 {
            deaf.submit_read(0, 16 << 20).unwrap();
        }
        std::thread::sleep(Duration::from_millis(100));
        end_in_time(daemon, qmp, by_command);
    }
}
