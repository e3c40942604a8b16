//! An image whose refcounts were still owed when its daemon was killed, opened by other programs: each of them repairs it,
//! and finds the disk and every snapshot as they were.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};

use super::super::guest::{Guest, Request};
use super::super::harness::{self, Daemon, Program, Qmp};

const CLUSTER: usize = 4096;

/// Many small L2 tables, all in use: counting takes longer than a kill.
const CREATE: &str =
    "qemu-img create -q -f qcow2 -o cluster_size=4k,preallocation=metadata disk.qcow2 512M";

/// Places that are looked at, and the bytes between them: each is in an L2 table of its own.
const PLACES: usize = 16;
const STRIDE: u64 = 31 << 20;

/// Images that are killed at most, until one is caught unsettled.
const TRIES: usize = 20;

/// The byte at each place.
type Content = [u8; PLACES];

/// The disk's content, and that of each snapshot.
struct Known {
    disk: Content,
    snapshots: Vec<(&'static str, Content)>,
}

struct Client {
    guest: Guest,
    qmp: Qmp,
    known: Known,
}

impl Client {
    fn write(&mut self, place: usize, byte: u8) {
        let request = Request::Write {
            offset: place as u64 * STRIDE,
            data: vec![byte; CLUSTER],
        };
        assert_eq!(self.guest.run(&request).unwrap(), 0);
        self.known.disk[place] = byte;
    }

    fn snapshot(&mut self, name: &'static str) {
        let arguments = json!({"device": "disk", "name": name});
        self.qmp.ok("blockdev-snapshot-internal-sync", arguments);
        self.known.snapshots.push((name, self.known.disk));
    }

    fn revert(&mut self, name: &str) {
        let arguments = json!({"device": "disk", "name": name});
        self.qmp.ok("x-blockdev-snapshot-revert", arguments);
        let reverted = self.known.snapshots.iter().find(|(own, _)| *own == name);
        self.known.disk = reverted.expect("a snapshot that was taken").1;
    }
}

/// Takes snapshots, reverts to one and kills the daemon behind the reply to the last command.
fn churned(folder: &Path) -> Known {
    harness::tool(folder, CREATE);
    let arguments = [
        "--drive",
        "id=disk,file=disk.qcow2",
        "--nbd-server",
        "unix:nbd.sock",
    ];
    let mut daemon = Daemon::start_in(Program::Qblockd, folder, &arguments);
    let mut client = Client {
        qmp: daemon.qmp(),
        guest: Guest::connect(&daemon.path("nbd.sock"), "disk").unwrap(),
        known: Known {
            disk: [0; PLACES],
            snapshots: Vec::new(),
        },
    };
    for place in 0..PLACES {
        client.write(place, 1 + place as u8);
    }
    client.snapshot("s1");
    client.write(0, 99);
    client.snapshot("s2");
    client.write(1, 77);
    client.snapshot("s3");
    client.revert("s1");
    client.write(2, 55);
    assert_eq!(client.guest.run(&Request::Flush).unwrap(), 0);
    client.snapshot("s4");
    daemon.kill();
    client.known
}

fn is_dirty(folder: &Path) -> bool {
    let info = harness::tool(folder, "qemu-img info -f qcow2 --output=json disk.qcow2");
    let info: Value = serde_json::from_str(&info).unwrap();
    info["dirty-flag"] == true
}

fn content(raw: &Path) -> Content {
    let raw = File::open(raw).unwrap();
    let mut content = [0; PLACES];
    for (place, byte) in content.iter_mut().enumerate() {
        let mut cluster = [0; CLUSTER];
        raw.read_exact_at(&mut cluster, place as u64 * STRIDE)
            .unwrap();
        *byte = cluster[0];
        assert_eq!(cluster, [*byte; CLUSTER], "place {place}");
    }
    content
}

const NODE: &str = "qcow2,node-name=disk,file.driver=file,file.filename=copy.qcow2";

/// Opens the image so that it is repaired.
fn repair(way: &str, folder: &Path) {
    match way {
        "qemu-img" => drop(harness::tool(folder, "qemu-img check -q -r all copy.qcow2")),
        "qblockd check" => {
            let done = harness::run_to_end(
                Program::Qblockd,
                folder,
                &["check", "--repair=all", "copy.qcow2"],
            );
            assert!(done.status.success(), "{done:?}");
        }
        "qblockd" => {
            let mut daemon = Daemon::start_in(Program::Qblockd, folder, &["--blockdev", NODE]);
            daemon.qmp().ok("quit", json!({}));
            assert!(daemon.exited().success());
        }
        // It names every cluster that it repairs.
        program => {
            let commands = r#"{"execute":"qmp_capabilities"}{"execute":"quit"}"#;
            let options = "--chardev stdio,id=m --monitor chardev=m";
            let line =
                format!("echo '{commands}' | {program} --blockdev {NODE} {options} 2>/dev/null");
            harness::tool(folder, &line);
        }
    }
}

#[test]
fn other_programs_repair_an_image_that_was_killed_unsettled() {
    let Some(()) = harness::need(&["qemu-img", "qemu-storage-daemon"]) else {
        return;
    };
    let killed = (0..TRIES).find_map(|_| {
        let folder = tempfile::tempdir().unwrap();
        let known = churned(folder.path());
        is_dirty(folder.path()).then_some((folder, known))
    });
    let (folder, known) = killed.expect("a kill before everything is counted");
    let folder = folder.path();
    for way in [
        "qemu-img",
        "qemu-storage-daemon",
        "qblockd check",
        "qblockd",
    ] {
        harness::tool(folder, "cp --sparse=always disk.qcow2 copy.qcow2");
        repair(way, folder);
        harness::tool(folder, "qemu-img check -q copy.qcow2");
        let convert = "qemu-img convert -f qcow2 -O raw";
        harness::tool(folder, &format!("{convert} copy.qcow2 raw"));
        assert_eq!(content(&folder.join("raw")), known.disk, "{way}");
        for (name, taken) in &known.snapshots {
            let line = format!("{convert} -l snapshot.name={name} copy.qcow2 raw");
            harness::tool(folder, &line);
            assert_eq!(content(&folder.join("raw")), *taken, "{way}: {name}");
        }
    }
}
