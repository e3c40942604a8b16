//! Drives that stop the machine: on a file system that is full, and at the end of the daemon.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::durability::full::SmallDisk;
use super::guest::{Guest, Request};
use super::harness::{self, Daemon, Program, Qmp};

const BLOCK: usize = 64 << 10;

/// Blocks of the disk that is stopped: a backup with a speed limit is not done with it at the first go.
const DISK_BLOCKS: usize = 128;
const ENOSPC: u32 = 28;
const ESHUTDOWN: u32 = 108;

/// Requests that a guest has under way.
const DEPTH: usize = 8;

/// What each of two guests writes, in blocks: more than the file system takes.
const BLOCKS: usize = 40;

/// The longest that an end may take while the machine stands still.
const BOUND: Duration = Duration::from_secs(5);

fn write(block: usize, byte: u8) -> Request {
    Request::Write {
        offset: (block * BLOCK) as u64,
        data: vec![byte; BLOCK],
    }
}

fn guest(folder: &Path, export: &str) -> Guest {
    let socket = folder.join("nbd.sock");
    harness::until(|| socket.exists(), "the NBD server");
    Guest::connect(&socket, export).unwrap()
}

fn status(qmp: &mut Qmp) -> String {
    let status = qmp.ok("query-status", json!({}));
    assert_eq!(status["running"], status["status"] == "running");
    status["status"].as_str().unwrap().to_owned()
}

fn io_status(qmp: &mut Qmp, drive: &str) -> Value {
    let drives = qmp.ok("query-block", json!({}));
    let drives = drives.as_array().unwrap().iter();
    let mut of_id = drives.filter(|each| each["device"] == drive);
    of_id.next().unwrap()["io-status"].clone()
}

/// Writes blocks, some at a time, and flushes; goes on where it has to wait. Every answer must be good.
fn fill(mut guest: Guest, blocks: std::ops::Range<usize>) {
    let mut under_way = 0;
    for block in blocks {
        guest
            .submit(block as u64, &write(block, block as u8 + 1))
            .unwrap();
        under_way += 1;
        if under_way == DEPTH {
            assert_eq!(guest.reply().unwrap().1, 0);
            under_way -= 1;
        }
    }
    for _ in 0..under_way {
        assert_eq!(guest.reply().unwrap().1, 0);
    }
    assert_eq!(guest.run(&Request::Flush).unwrap(), 0);
}

#[test]
fn guests_wait_for_space_and_lose_nothing() {
    let Some(()) = harness::need(&["qemu-img", "mount", "df"]) else {
        return;
    };
    let Some(disk) = SmallDisk::mount() else {
        return;
    };
    let folder = disk.path();
    disk.leave(3 << 20);
    let mut daemon = Daemon::start_in(
        Program::Qblockd,
        folder,
        &[
            "--drive",
            "id=hd0,file=a.qcow2,size=64M",
            "--drive",
            "id=hd1,file=b.raw,format=raw,size=64M,werror=stop",
            "--nbd-server",
            "unix:nbd.sock",
        ],
    );
    let mut qmp = daemon.qmp();
    let (end, second) = (2 * BLOCKS, guest(folder, "hd0"));
    let guests = [
        (guest(folder, "hd0"), 0..BLOCKS),
        (second, BLOCKS..end),
        (guest(folder, "hd1"), 0..BLOCKS),
    ];
    let guests = guests.map(|(guest, blocks)| std::thread::spawn(move || fill(guest, blocks)));
    let error = qmp.event("BLOCK_IO_ERROR")["data"].clone();
    assert_eq!(
        (&error["action"], &error["nospace"]),
        (&json!("stop"), &json!(true))
    );
    assert_eq!(error["reason"], "No space left on device");
    qmp.event("STOP");
    assert_eq!(status(&mut qmp), "io-error");
    let drive = error["device"].as_str().unwrap();
    assert_eq!(io_status(&mut qmp, drive), "nospace");
    // There is still no space: it goes on, and stops again.
    qmp.ok("cont", json!({}));
    qmp.event("RESUME");
    qmp.event("STOP");
    assert_eq!(status(&mut qmp), "io-error");
    assert!(guests.iter().any(|guest| !guest.is_finished()));
    fs::remove_file(folder.join("filler")).unwrap();
    // Others may have failed before there was space, and are told of by and by.
    let deadline = Instant::now() + harness::PATIENCE;
    while guests.iter().any(|guest| !guest.is_finished()) {
        assert!(Instant::now() < deadline, "the guests do not go on");
        qmp.ok("cont", json!({}));
        std::thread::sleep(Duration::from_millis(20));
    }
    for guest in guests {
        guest.join().unwrap();
    }
    assert_eq!(status(&mut qmp), "running");
    assert_eq!(io_status(&mut qmp, "hd0"), "ok");
    for (export, blocks) in [("hd0", end), ("hd1", BLOCKS)] {
        let mut reader = guest(folder, export);
        for block in 0..blocks {
            let content = reader.read((block * BLOCK) as u64, BLOCK as u32).unwrap();
            assert!(
                content == [block as u8 + 1; BLOCK],
                "{export}: block {block}"
            );
        }
    }
    let stats = qmp.ok("query-blockstats", json!({}));
    assert_eq!(stats[0]["stats"]["wr_operations"], end);
    assert_eq!(stats[0]["stats"]["failed_wr_operations"], 0);
    drop(qmp);
    assert!(daemon.terminated().success());
    harness::tool(folder, "qemu-img check -q a.qcow2");
}

/// A daemon whose machine stands still, with a write and a flush that wait.
fn stopped(folder: &Path) -> (Daemon, Qmp, Guest) {
    let arguments = [
        "--drive",
        "id=hd0,file=a.qcow2,size=8M",
        "--nbd-server",
        "unix:nbd.sock",
    ];
    let mut daemon = Daemon::start_in(Program::Qblockd, folder, &arguments);
    let mut qmp = daemon.qmp();
    let mut guest = guest(folder, "hd0");
    for block in 0..DISK_BLOCKS {
        assert_eq!(guest.run(&write(block, 1)).unwrap(), 0);
    }
    qmp.ok("stop", json!({}));
    guest.submit(1, &write(0, 2)).unwrap();
    guest.submit(2, &Request::Flush).unwrap();
    // Refused by the export itself: what was sent before has been taken when the answer is there.
    let outside = Request::Write {
        offset: (DISK_BLOCKS * BLOCK) as u64,
        data: vec![0; 512],
    };
    guest.submit(3, &outside).unwrap();
    assert_eq!(guest.reply().unwrap(), (3, ENOSPC));
    (daemon, qmp, guest)
}

#[test]
fn a_daemon_ends_while_the_machine_stands_still_and_tells_the_guest() {
    for by_command in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let (mut daemon, mut qmp, mut guest) = stopped(folder.path());
        daemon.ended_within(BOUND, &mut qmp, by_command);
        for _ in 0..2 {
            assert_eq!(guest.reply().unwrap().1, ESHUTDOWN);
        }
        if harness::need(&["qemu-img"]).is_some() {
            harness::tool(folder.path(), "qemu-img check -q a.qcow2");
            harness::tool(folder.path(), "qemu-img convert -O raw a.qcow2 a.raw");
            let content = fs::read(folder.path().join("a.raw")).unwrap();
            assert!(
                content[..BLOCK] == [1; BLOCK],
                "what was refused has not happened"
            );
        }
    }
}

#[test]
fn what_a_client_that_goes_has_left_waiting_does_not_happen() {
    let folder = tempfile::tempdir().unwrap();
    let (daemon, mut qmp, gone) = stopped(folder.path());
    drop(gone);
    // It is noticed while the machine stands still.
    let deadline = Instant::now() + harness::PATIENCE;
    while qmp
        .execute("block-export-del", json!({"id": "hd0"}))
        .get("return")
        .is_none()
    {
        assert!(Instant::now() < deadline, "the export is in use forever");
        std::thread::sleep(Duration::from_millis(5));
    }
    let export = json!({"type": "nbd", "id": "e", "node-name": "hd0", "writable": true});
    qmp.ok("block-export-add", export);
    let mut guest = guest(folder.path(), "hd0");
    qmp.ok("cont", json!({}));
    let content = guest.read(0, BLOCK as u32).unwrap();
    assert!(content == [1; BLOCK]);
    drop((qmp, guest));
    assert!(daemon.terminate().success());
}

#[test]
fn jobs_end_with_the_daemon_while_the_machine_stands_still() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    for by_command in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let (mut daemon, mut qmp, mut waiting) = stopped(folder.path());
        // It takes hours at this speed.
        let backup = json!({"device": "hd0", "job-id": "job0", "target": "target.raw", "format": "raw", "sync": "full", "speed": 1024});
        qmp.ok("drive-backup", backup);
        let options = json!({"driver": "file", "filename": "new.raw", "size": 1 << 20, "preallocation": "full"});
        qmp.ok(
            "blockdev-create",
            json!({"job-id": "job1", "options": options}),
        );
        daemon.ended_within(BOUND, &mut qmp, by_command);
        for _ in 0..2 {
            assert_eq!(waiting.reply().unwrap().1, ESHUTDOWN);
        }
        let mut events = std::mem::take(&mut qmp.events);
        events.extend(qmp.rest());
        let names: Vec<&str> = events
            .iter()
            .filter_map(|event| event["event"].as_str())
            .collect();
        assert!(names.contains(&"BLOCK_JOB_CANCELLED"), "{names:?}");
        assert_eq!(names.last(), Some(&"SHUTDOWN"));
        let gone = |id: &str| {
            let of_id =
                |event: &&Value| event["data"]["id"] == id && event["data"]["status"] == "null";
            events.iter().filter(of_id).count() == 1
        };
        assert!(gone("job0") && gone("job1"), "{events:?}");
        harness::tool(folder.path(), "qemu-img check -q a.qcow2");
        assert_eq!(
            harness::tool(folder.path(), "qemu-img snapshot -l a.qcow2"),
            ""
        );
        // Nothing of what waited has happened.
        harness::tool(folder.path(), "qemu-img convert -O raw a.qcow2 a.raw");
        let content = fs::read(folder.path().join("a.raw")).unwrap();
        assert!(content[..BLOCK] == [1; BLOCK]);
    }
}

#[test]
fn what_waits_goes_to_the_overlay_that_a_snapshot_has_put_there() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let (daemon, mut qmp, mut guest) = stopped(folder.path());
    let before = io_status(&mut qmp, "hd0");
    let snapshot = json!({"device": "hd0", "snapshot-file": "over.qcow2", "format": "qcow2"});
    qmp.ok("blockdev-snapshot-sync", snapshot);
    assert_eq!(status(&mut qmp), "paused");
    qmp.ok("cont", json!({}));
    for _ in 0..2 {
        assert_eq!(guest.reply().unwrap().1, 0);
    }
    assert_eq!(io_status(&mut qmp, "hd0"), before);
    drop((qmp, guest));
    assert!(daemon.terminate().success());
    for (image, byte) in [("a.qcow2", 1), ("over.qcow2", 2)] {
        harness::tool(folder.path(), &format!("qemu-img check -q {image}"));
        harness::tool(
            folder.path(),
            &format!("qemu-img convert -O raw {image} raw"),
        );
        let content = fs::read(folder.path().join("raw")).unwrap();
        assert!(content[..BLOCK] == [byte; BLOCK], "{image}");
    }
}

const LAYERS: usize = 1000;

/// Clients can put any number of nodes on each other.
#[test]
fn statistics_of_a_thousand_layers_are_cut_off_and_not_the_daemon() {
    let mut daemon = Daemon::start(Program::Qblockd, &[]);
    let mut qmp = daemon.qmp();
    qmp.ok(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "n0"}),
    );
    for nth in 1..LAYERS {
        let node = json!({"driver": "raw", "node-name": format!("n{nth}"), "file": format!("n{}", nth - 1)});
        qmp.ok("blockdev-add", node);
    }
    qmp.send(r#"{"execute": "query-blockstats", "arguments": {"query-nodes": true}}"#);
    let text = qmp.line();
    let layers = text.matches("\"parent\"").count();
    assert!((10_000..=20_000).contains(&layers), "{layers}");
    assert_eq!(status(&mut qmp), "running");
}
