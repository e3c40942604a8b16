//! What files are locked for, and how they are open, while nobody uses them, somebody reads, and somebody writes: as with
//! qemu-storage-daemon, so that other programs may do the same things meanwhile.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::guest::{Guest, Request};
use super::harness::{Daemon, Program, Qmp, need, tool};

const WRITES: &str = "100 101 103 201 203";
const READS: &str = "100 201 203";

/// How a process has a file open: `r`, or `rw`, and the bytes that it has locked.
fn held(daemon: &Daemon, file: &Path) -> (&'static str, String) {
    let (mut mode, mut locks) = ("r", Vec::new());
    let process = Path::new("/proc").join(daemon.id().to_string());
    for entry in fs::read_dir(process.join("fd")).unwrap() {
        let entry = entry.unwrap();
        if fs::read_link(entry.path()).ok().as_deref() != Some(file) {
            continue;
        }
        let info = fs::read_to_string(process.join("fdinfo").join(entry.file_name())).unwrap();
        for line in info.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                ["flags:", flags] if flags.ends_with('2') => mode = "rw",
                ["lock:", .., first, last] => {
                    locks.extend(first.parse::<u32>().unwrap()..=last.parse().unwrap());
                }
                _ => {}
            }
        }
    }
    locks.sort_unstable();
    let locks: Vec<String> = locks.iter().map(u32::to_string).collect();
    (mode, locks.join(" "))
}

struct Host {
    folder: tempfile::TempDir,
    daemon: Daemon,
    qmp: Qmp,
}

impl Host {
    fn new(make: &str) -> Host {
        let folder = tempfile::tempdir().unwrap();
        tool(folder.path(), make);
        Host::in_folder(folder, "nbd.sock")
    }

    fn in_folder(folder: tempfile::TempDir, socket: &str) -> Host {
        let server = format!("unix:{socket}");
        let mut daemon =
            Daemon::start_in(Program::Qblockd, folder.path(), &["--nbd-server", &server]);
        let qmp = daemon.qmp();
        Host {
            folder,
            daemon,
            qmp,
        }
    }

    fn file(&mut self, name: &str, auto: bool) {
        let node = json!({"driver": "file", "node-name": format!("{name}-file"), "filename": name, "auto-read-only": auto});
        self.qmp.ok("blockdev-add", node);
    }

    fn export(&mut self, node: &str, writable: bool) -> Value {
        let id = format!("{node}-{writable}");
        self.qmp.execute(
            "block-export-add",
            json!({"type": "nbd", "id": id, "node-name": node, "name": id, "writable": writable}),
        )
    }

    fn unexport(&mut self, node: &str, writable: bool) {
        let id = format!("{node}-{writable}");
        self.qmp
            .ok("block-export-del", json!({"id": id, "mode": "hard"}));
        while self.qmp.event("BLOCK_EXPORT_DELETED")["data"]["id"] != id.as_str() {}
    }

    #[track_caller]
    fn expect(&self, file: &str, mode: &str, locks: &str) {
        let path = self.folder.path().canonicalize().unwrap().join(file);
        let (found, bytes) = held(&self.daemon, &path);
        assert_eq!((found, bytes.as_str()), (mode, locks), "{file}");
    }
}

#[test]
fn a_raw_file_is_held_for_what_is_done_to_the_node_on_it() {
    for (auto, idle) in [(false, "rw"), (true, "r")] {
        let mut host = Host::new("truncate -s 1M d");
        host.file("d", auto);
        host.expect("d", idle, "");
        host.qmp.ok(
            "blockdev-add",
            json!({"driver": "raw", "node-name": "d", "file": "d-file"}),
        );
        host.expect("d", idle, "");
        host.export("d", false);
        host.expect("d", idle, READS);
        host.export("d", true);
        host.expect("d", "rw", WRITES);
        let mut guest = Guest::connect(&host.folder.path().join("nbd.sock"), "d-true").unwrap();
        let write = Request::Write {
            offset: 0,
            data: vec![7; 512],
        };
        assert_eq!(guest.run(&write).unwrap(), 0);
        assert_eq!(guest.run(&Request::Flush).unwrap(), 0);
        host.unexport("d", true);
        host.expect("d", idle, READS);
        host.unexport("d", false);
        host.expect("d", idle, "");
        // Another program has it meanwhile, and what it does is seen.
        fs::write(host.folder.path().join("d"), vec![9; 2 << 20]).unwrap();
        host.qmp
            .ok("block_resize", json!({"node-name": "d", "size": 3 << 20}));
        host.expect("d", idle, "");
        host.export("d", true);
        let mut guest = Guest::connect(&host.folder.path().join("nbd.sock"), "d-true").unwrap();
        assert_eq!(guest.read((2 << 20) - 512, 512).unwrap(), [9; 512]);
        assert_eq!(guest.read(2 << 20, 512).unwrap(), [0; 512]);
    }
}

#[test]
fn a_reopened_file_follows_its_users_as_it_is_told_then() {
    let mut host = Host::new("truncate -s 1M d");
    host.file("d", false);
    let reopen = |auto: bool| {
        let file = json!({"driver": "file", "node-name": "d-file", "filename": "d", "auto-read-only": auto});
        json!({"options": [file]})
    };
    host.expect("d", "rw", "");
    host.qmp.ok("blockdev-reopen", reopen(true));
    host.expect("d", "r", "");
    host.export("d-file", true);
    host.expect("d", "rw", WRITES);
    // With a user that writes it changes nothing at once.
    host.qmp.ok("blockdev-reopen", reopen(false));
    host.expect("d", "rw", WRITES);
    host.unexport("d-file", true);
    host.expect("d", "rw", "");
    host.export("d-file", true);
    host.qmp.ok("blockdev-reopen", reopen(true));
    host.expect("d", "rw", WRITES);
    let mut guest = Guest::connect(&host.folder.path().join("nbd.sock"), "d-file-true").unwrap();
    let write = Request::Write {
        offset: 0,
        data: vec![7; 512],
    };
    assert_eq!(guest.run(&write).unwrap(), 0);
    drop(guest);
    host.unexport("d-file", true);
    host.expect("d", "r", "");
}

#[test]
fn the_target_of_a_job_is_not_said_to_be_its_disk() {
    let Some(()) = need(&["qemu-img"]) else {
        return;
    };
    let mut host =
        Host::new("qemu-img create -q -f qcow2 s 1M && qemu-img create -q -f qcow2 o 1M");
    for name in ["s", "o"] {
        host.file(name, true);
        let image = json!({"driver": "qcow2", "node-name": name, "file": format!("{name}-file")});
        host.qmp.ok("blockdev-add", image);
    }
    let backup =
        |device: &str| json!({"device": device, "target": "t", "sync": "none", "job-id": device});
    host.qmp.ok("drive-backup", backup("s"));
    let (_, error) = host.qmp.error("drive-backup", backup("o"));
    assert_eq!(
        error,
        "Failed to get \"write\" lock. A backup of 's' of this daemon has the image [t] open"
    );
}

#[test]
fn a_file_that_another_has_taken_the_place_of_is_not_written() {
    let Some(()) = need(&["qemu-img"]) else {
        return;
    };
    let mut host =
        Host::new("truncate -s 1M d && truncate -s 1M e && qemu-img create -q -f qcow2 s 1M");
    host.file("d", true);
    host.file("s", true);
    let image = json!({"driver": "qcow2", "node-name": "s", "file": "s-file"});
    host.qmp.ok("blockdev-add", image);
    let backup =
        json!({"device": "s", "target": "d", "sync": "full", "job-id": "job", "format": "raw"});
    let (_, error) = host.qmp.error("drive-backup", backup);
    assert_eq!(
        error,
        "Failed to get \"write\" lock. 'd-file' of this daemon has the image [d] open"
    );
    tool(host.folder.path(), "mv e d");
    let refused = host.export("d-file", true);
    let text = refused["error"]["desc"].as_str();
    assert_eq!(
        text,
        Some("'d' is another file by now than the one that was opened")
    );
    tool(host.folder.path(), "rm d");
    assert_eq!(host.export("d-file", true)["return"], json!({}));
}

#[test]
fn an_image_is_held_for_as_long_as_it_is_open() {
    let Some(()) = need(&["qemu-img"]) else {
        return;
    };
    let make = "qemu-img create -q -f qcow2 base 1M && qemu-img create -q -f qcow2 -b base -F qcow2 top && \
                qemu-img create -q -f qcow2 -o data_file=data,data_file_raw=on apart 1M && truncate -s 1M raw && \
                qemu-img create -q -f qcow2 new 1M";
    for (auto, idle) in [(false, "rw"), (true, "r")] {
        let mut host = Host::new(make);
        for name in ["base", "top", "data", "apart", "raw", "new"] {
            host.file(name, auto);
            host.expect(name, idle, "");
        }
        host.qmp.ok(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "base", "file": "base-file", "read-only": true}),
        );
        host.expect("base", idle, READS);
        host.qmp.ok(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "top", "file": "top-file", "backing": "base"}),
        );
        host.expect("top", "rw", WRITES);
        host.expect("base", idle, READS);
        host.qmp.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "apart", "file": "apart-file", "data-file": "data-file"}));
        host.expect("apart", "rw", WRITES);
        host.expect("data", "rw", WRITES);
        host.qmp.ok("blockdev-del", json!({"node-name": "apart"}));
        host.expect("apart", idle, "");
        host.expect("data", idle, "");
        // An external snapshot: what was written is only read from then on, and its file is read-only.
        host.qmp.ok(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "new", "file": "new-file", "backing": null}),
        );
        host.qmp.ok(
            "blockdev-snapshot",
            json!({"node": "top", "overlay": "new"}),
        );
        host.expect("new", "rw", WRITES);
        host.expect("top", "r", READS);
        for name in ["new", "top", "base"] {
            host.qmp.ok("blockdev-del", json!({"node-name": name}));
        }
        host.expect("new", idle, "");
        host.expect("base", idle, "");
        // Of a raw disk too, that nobody used before.
        host.qmp.ok("blockdev-add", json!({"driver": "qcow2", "node-name": "new", "file": "new-file", "backing": "raw-file"}));
        host.expect("raw", idle, READS);
        host.qmp.ok("blockdev-del", json!({"node-name": "new"}));
        host.expect("raw", idle, "");
        // What is wrong with an image is no reason to keep its file.
        host.qmp.error(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "no", "file": "raw-file"}),
        );
        host.expect("raw", idle, "");
        let options = json!({"driver": "qcow2", "file": "raw-file", "size": 1 << 20});
        host.qmp.ok(
            "blockdev-create",
            json!({"job-id": "job", "options": options}),
        );
        while host.qmp.event("JOB_STATUS_CHANGE")["data"]["status"] != "concluded" {}
        assert_eq!(host.qmp.ok("query-jobs", json!({}))[0].get("error"), None);
        host.expect("raw", idle, "");
        tool(
            host.folder.path(),
            "qemu-img info raw | grep -q qcow2 && qemu-img snapshot -c s raw",
        );
    }
}

#[test]
fn a_backup_holds_files_for_its_time() {
    let Some(()) = need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let mut host = Host::new(
        "truncate -s 16M from && truncate -s 16M to && qemu-io -f raw -c 'write -q -P 5 0 16M' from",
    );
    for name in ["from", "to"] {
        host.file(name, true);
        host.qmp.ok(
            "blockdev-add",
            json!({"driver": "raw", "node-name": name, "file": format!("{name}-file")}),
        );
    }
    let backup =
        json!({"device": "from", "target": "to", "sync": "full", "job-id": "job", "speed": 65536});
    host.qmp.ok("blockdev-backup", backup);
    host.expect("from", "r", READS);
    host.expect("to", "rw", WRITES);
    host.qmp
        .ok("block-job-set-speed", json!({"device": "job", "speed": 0}));
    host.qmp.event("BLOCK_JOB_COMPLETED");
    super::harness::until(
        || {
            held(
                &host.daemon,
                &host.folder.path().canonicalize().unwrap().join("to"),
            )
            .1
            .is_empty()
        },
        "locks given up",
    );
    host.expect("from", "r", "");
    host.expect("to", "r", "");
    tool(host.folder.path(), "cmp from to");
}

/// As libvirt writes it: every file is a node of its own with `auto-read-only`, and machines share a base.
#[test]
fn two_daemons_share_a_base_and_nothing_else() {
    let Some(()) = need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let make = "qemu-img create -q -f qcow2 base 1M && for i in a b; do qemu-img create -q -f qcow2 -b base -F qcow2 $i; done";
    let mut one = Host::new(make);
    let second = tempfile::tempdir().unwrap();
    tool(
        second.path(),
        &format!("ln -s {0}/base {0}/a {0}/b .", one.folder.path().display()),
    );
    let mut other = Host::in_folder(second, "nbd2.sock");
    for (host, top) in [(&mut one, "a"), (&mut other, "b")] {
        for name in ["base", top] {
            host.file(name, true);
        }
        host.qmp.ok(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "base", "file": "base-file", "read-only": true}),
        );
        host.qmp.ok("blockdev-add", json!({"driver": "qcow2", "node-name": top, "file": format!("{top}-file"), "backing": "base"}));
        assert_eq!(host.export(top, true)["return"], json!({}));
    }
    // The other's own image, which is being written, and the base, which is being read.
    other.file("a", true);
    let (_, error) = other.qmp.error(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "a", "file": "a-file", "backing": "base"}),
    );
    assert!(error.starts_with("Failed to get \"write\" lock"), "{error}");
    let base =
        json!({"driver": "qcow2", "node-name": "base", "file": "base-file", "read-only": false});
    let (_, error) = other
        .qmp
        .error("blockdev-reopen", json!({"options": [base]}));
    assert!(
        error.contains("lock") || error.contains("conflict"),
        "{error}"
    );
    other.export("a-file", false)["error"].as_object().unwrap();
    let refused = other.export("a-file", true);
    let text = refused["error"]["desc"].as_str().unwrap();
    assert!(
        text.starts_with("Failed to get \"write\" lock. Is another process using the image"),
        "{text}"
    );
    // And when the first is done with it.
    one.unexport("a", true);
    one.qmp.ok("blockdev-del", json!({"node-name": "a"}));
    other.qmp.ok(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "a", "file": "a-file", "backing": "base"}),
    );
}

#[test]
fn a_file_that_cannot_be_written_says_so_to_whoever_wants_to_write() {
    let mut host = Host::new("truncate -s 1M d");
    let file = host.folder.path().join("d");
    let chattr = |flag: &str| {
        let changed = Command::new("chattr").arg(flag).arg(&file).output();
        changed.is_ok_and(|output| output.status.success())
    };
    if !chattr("+i") {
        eprintln!("skipped: files cannot be made immutable here");
        return;
    }
    host.file("d", true);
    let raw = json!({"driver": "raw", "node-name": "d", "file": "d-file"});
    host.qmp.ok("blockdev-add", raw);
    assert_eq!(host.export("d", false)["return"], json!({}));
    let refused = host.export("d", true);
    let is_free = chattr("-i");
    let text = refused["error"]["desc"].as_str();
    assert_eq!(text, Some("Could not open 'd': Operation not permitted"));
    host.expect("d", "r", READS);
    assert!(is_free);
    assert_eq!(host.export("d", true)["return"], json!({}));
    host.expect("d", "rw", WRITES);
}
