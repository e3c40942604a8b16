//! Images that are made over what block devices hold: what fails leaves a device as it was, and what does not is right. And devices
//! that become larger.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::guest::{Guest, Request};
use super::harness::{self, Daemon, Loop, Program, Qmp, tool};

/// Bytes of the disk, and of the device.
const DISK: &str = "8M";
const DEVICE: &str = "12M";

/// A disk of random bytes and zeroes in `disk.qcow2`, and a device that is full of other bytes.
struct Place {
    folder: tempfile::TempDir,
    device: Loop,
    /// What the device held.
    before: Vec<u8>,
}

impl Place {
    fn new() -> Option<Place> {
        harness::need(&["qemu-img", "qemu-io", "losetup"])?;
        let folder = tempfile::tempdir().unwrap();
        tool(
            folder.path(),
            &format!("qemu-img create -q -f qcow2 disk.qcow2 {DISK}"),
        );
        tool(
            folder.path(),
            "qemu-io -f qcow2 -c 'write -P 3 0 1M' -c 'write -P 4 5M 300k' disk.qcow2",
        );
        tool(
            folder.path(),
            &format!("head -c {DEVICE} /dev/urandom > volume"),
        );
        let device = Loop::attach(&folder.path().join("volume"))?;
        let before = fs::read(&device.0).unwrap();
        Some(Place {
            folder,
            device,
            before,
        })
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn start(&self) -> Daemon {
        let drive = "id=d0,file=disk.qcow2,format=qcow2";
        let arguments = ["--drive", drive, "--state-dir", "state"];
        Daemon::start_in(Program::Qblockd, self.path(), &arguments)
    }

    fn is_as_before(&self) -> bool {
        fs::read(&self.device.0).unwrap() == self.before
    }

    fn backup(&self, format: &str) -> Value {
        json!({"device": "d0", "job-id": "j", "target": self.device.0, "sync": "full", "format": format})
    }
}

fn action(kind: &str, data: Value) -> Value {
    json!({"type": kind, "data": data})
}

/// A transaction of these and one that fails.
fn failing(actions: &[Value]) -> Value {
    let mut actions = actions.to_vec();
    actions.push(action("abort", json!({})));
    json!({"actions": actions})
}

fn backed_up(qmp: &mut Qmp, arguments: Value) {
    qmp.ok("drive-backup", arguments);
    let event = qmp.event("BLOCK_JOB_COMPLETED");
    assert_eq!(event["data"].get("error"), None, "{event}");
}

#[test]
fn what_fails_leaves_a_device_as_it_was() {
    let Some(place) = Place::new() else {
        return;
    };
    let mut daemon = place.start();
    let mut qmp = daemon.qmp();
    let overlay = json!({"device": "d0", "snapshot-file": place.device.0});
    for action in [
        action("drive-backup", place.backup("qcow2")),
        action("blockdev-snapshot-sync", overlay.clone()),
    ] {
        let (_, text) = qmp.error("transaction", failing(std::slice::from_ref(&action)));
        assert_eq!(text, "Transaction aborted using Abort action");
        assert!(place.is_as_before(), "{action}");
        let dry = json!({"actions": [action], "x-dry-run": true});
        qmp.ok("transaction", dry);
        assert!(place.is_as_before(), "{action}");
    }
    // More than its creation writes would not come back.
    let snapshot = json!({"device": "d0", "name": "s"});
    let both = json!({"actions": [action("blockdev-snapshot-sync", overlay.clone()),
        action("blockdev-snapshot-internal-sync", snapshot.clone())]});
    let (_, text) = qmp.error("transaction", both);
    assert!(
        text.contains("is made on a device by the same transaction"),
        "{text}"
    );
    assert!(place.is_as_before());
    // The snapshot first means something, and is done.
    let both = json!({"actions": [action("blockdev-snapshot-internal-sync", snapshot),
        action("blockdev-snapshot-sync", overlay)]});
    qmp.ok("transaction", both);
    qmp.ok("quit", json!({}));
    assert!(daemon.exited().success());
    let device = &place.device.0;
    tool(
        place.path(),
        &format!("qemu-img check -q -f qcow2 {device}"),
    );
    tool(
        place.path(),
        &format!("qemu-img compare -f qcow2 -F qcow2 disk.qcow2 {device}"),
    );
}

#[test]
fn a_backup_to_a_device_is_right_whatever_was_there() {
    let Some(place) = Place::new() else {
        return;
    };
    let mut daemon = place.start();
    let mut qmp = daemon.qmp();
    let device = &place.device.0;
    for format in ["raw", "qcow2"] {
        tool(
            place.path(),
            &format!("head -c {DEVICE} /dev/urandom > {device}"),
        );
        if format == "raw" {
            // The target must have the size of the disk.
            tool(place.path(), "qemu-img create -q -f qcow2 large.qcow2 12M");
            tool(
                place.path(),
                "qemu-io -f qcow2 -c 'write -P 5 64k 1M' large.qcow2",
            );
            let file = json!({"driver": "file", "filename": "large.qcow2"});
            let node = json!({"driver": "qcow2", "node-name": "large", "file": file});
            qmp.ok("blockdev-add", node);
            let mut backup = place.backup(format);
            backup["device"] = json!("large");
            backed_up(&mut qmp, backup);
            qmp.ok("blockdev-del", json!({"node-name": "large"}));
            tool(
                place.path(),
                &format!("qemu-img compare -f qcow2 -F raw large.qcow2 {device}"),
            );
        } else {
            backed_up(&mut qmp, place.backup(format));
            let compare = format!("qemu-img compare -U -f qcow2 -F {format} disk.qcow2 {device}");
            tool(place.path(), &compare);
        }
    }
    qmp.ok("quit", json!({}));
    assert!(daemon.exited().success());
}

#[test]
fn a_killed_transaction_leaves_a_device_as_it_was() {
    let Some(place) = Place::new() else {
        return;
    };
    let seed = harness::seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let mut usual = Duration::from_millis(5);
    let mut recovered = 0;
    for round in 0..12 {
        let mut daemon = place.start();
        let mut qmp = daemon.qmp();
        let arguments = failing(&[
            action(
                "blockdev-snapshot-internal-sync",
                json!({"device": "d0", "name": "s"}),
            ),
            action("drive-backup", place.backup("qcow2")),
        ]);
        if round == 0 {
            let begun = Instant::now();
            qmp.error("transaction", arguments.clone());
            usual = begun.elapsed();
        }
        let request = json!({"execute": "transaction", "arguments": arguments});
        qmp.send(&request.to_string());
        thread::sleep(usual.mul_f64(random.f64()));
        daemon.kill();
        let journals = fs::read_dir(place.path().join("state")).unwrap();
        recovered += journals.count();
        let mut daemon = place.start();
        daemon.qmp();
        assert!(daemon.terminated().success());
        assert!(place.is_as_before(), "round {round}");
    }
    println!("{recovered} of 12 transactions were cut off");
}

/// Volumes are extended when they are full: the drive that stopped goes on then, and so does the job that paused.
#[test]
fn an_extended_device_is_noticed_by_who_waits_for_space() {
    let Some(()) = harness::need(&["qemu-img", "losetup", "truncate"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let mut volumes = Vec::new();
    for name in ["drive", "target"] {
        tool(folder.path(), &format!("truncate -s 3M {name}"));
        let Some(device) = Loop::attach(&folder.path().join(name)) else {
            return;
        };
        volumes.push(device);
    }
    let (volume, target) = (&volumes[0].0, &volumes[1].0);
    tool(
        folder.path(),
        &format!("qemu-img create -q -f qcow2 {volume} 64M"),
    );
    let extend = |name: &str, device: &str| {
        let line = format!("truncate -s 20M {name} && losetup -c {device}");
        tool(folder.path(), &line);
    };
    let drive = format!("id=d,file={volume},format=qcow2,werror=enospc");
    let arguments = ["--drive", &drive, "--nbd-server", "unix:nbd.sock"];
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &arguments);
    let mut qmp = daemon.qmp();
    let mut guest = Guest::connect(&folder.path().join("nbd.sock"), "d").unwrap();
    let piece = |number: u64| Request::Write {
        offset: number << 20,
        data: vec![number as u8 + 1; 1 << 20],
    };
    for number in 0..6 {
        guest.submit(number, &piece(number)).unwrap();
    }
    qmp.event("STOP");
    extend("drive", volume);
    qmp.ok("cont", json!({}));
    for _ in 0..6 {
        assert_eq!(guest.reply().unwrap().1, 0);
    }
    let backup = json!({"device": "d", "job-id": "j", "target": target, "sync": "full", "format": "qcow2",
        "on-target-error": "enospc"});
    qmp.ok("drive-backup", backup);
    qmp.event("BLOCK_JOB_ERROR");
    while qmp.ok("query-block-jobs", json!({}))[0]["status"] != "paused" {}
    extend("target", target);
    qmp.ok("block-job-resume", json!({"device": "j"}));
    let event = qmp.event("BLOCK_JOB_COMPLETED");
    assert_eq!(event["data"].get("error"), None, "{event}");
    for number in 0..6 {
        assert!(guest.read(number << 20, 1 << 20).unwrap() == vec![number as u8 + 1; 1 << 20]);
    }
    drop(guest);
    assert!(daemon.terminated().success());
    tool(
        folder.path(),
        &format!("qemu-img check -q -f qcow2 {volume}"),
    );
    tool(
        folder.path(),
        &format!("qemu-img compare -q -f qcow2 -F qcow2 {volume} {target}"),
    );
}

/// A volume's new size is told as QEMU's users do: by asking for it.
#[test]
fn a_raw_drive_takes_the_new_size_of_its_device() {
    let Some(()) = harness::need(&["losetup", "truncate"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let set = |mib: u64| tool(folder.path(), &format!("truncate -s {mib}M volume"));
    set(4);
    let Some(device) = Loop::attach(&folder.path().join("volume")) else {
        return;
    };
    let drive = format!("id=d,file={},format=raw", device.0);
    let arguments = ["--drive", &drive, "--nbd-server", "unix:nbd.sock"];
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &arguments);
    let mut qmp = daemon.qmp();
    for mib in [12, 8] {
        set(mib);
        tool(folder.path(), &format!("losetup -c {}", device.0));
        for (other, text) in [
            (mib + 1, "Cannot grow device files"),
            (mib - 1, "Cannot resize device files"),
        ] {
            let size = json!({"device": "d", "size": other << 20});
            assert_eq!(qmp.error("block_resize", size).1, text);
        }
        qmp.ok("block_resize", json!({"device": "d", "size": mib << 20}));
        let shown = &qmp.ok("query-block", json!({}))[0]["inserted"]["image"];
        assert_eq!(shown["virtual-size"], mib << 20);
        let mut guest = Guest::connect(&folder.path().join("nbd.sock"), "d").unwrap();
        let (offset, data) = ((mib - 1) << 20, vec![mib as u8; 1 << 20]);
        let last = Request::Write {
            offset,
            data: data.clone(),
        };
        assert_eq!(guest.run(&last).unwrap(), 0);
        assert!(guest.read(offset, 1 << 20).unwrap() == data);
    }
    assert!(daemon.terminated().success());
}

#[test]
fn an_image_that_cannot_be_made_on_a_device_changes_nothing() {
    let Some(place) = Place::new() else {
        return;
    };
    let mut daemon = place.start();
    let mut qmp = daemon.qmp();
    let node = json!({"driver": "host_device", "node-name": "v", "filename": place.device.0});
    qmp.ok("blockdev-add", node);
    let inline = json!({"driver": "host_device", "filename": place.device.0});
    let wrong = [
        json!({"driver": "qcow2", "file": "v", "size": 1 << 20, "preallocation": "full"}),
        json!({"driver": "qcow2", "file": "v", "size": 64_u64 << 40, "cluster-size": 512}),
        json!({"driver": "qcow2", "file": inline, "size": 1 << 20, "preallocation": "falloc"}),
        json!({"driver": "file", "filename": place.device.0, "size": 64 << 20}),
    ];
    for options in wrong {
        let create = json!({"job-id": "c", "options": options});
        qmp.ok("blockdev-create", create);
        let deadline = Instant::now() + harness::PATIENCE;
        let job = loop {
            let jobs = qmp.ok("query-jobs", json!({}));
            if jobs[0]["status"] == "concluded" {
                break jobs[0].clone();
            }
            assert!(Instant::now() < deadline, "{jobs}");
        };
        assert!(job["error"].is_string(), "{job}");
        qmp.ok("job-dismiss", json!({"id": "c"}));
        assert!(place.is_as_before(), "{options}");
    }
    qmp.ok("blockdev-del", json!({"node-name": "v"}));
    // Larger than the device.
    qmp.ok("block_resize", json!({"device": "d0", "size": 16 << 20}));
    let target = json!({"device": "d0", "target": place.device.0, "sync": "full"});
    for (format, mode, text) in [
        ("raw", "absolute-paths", "Cannot grow device files"),
        (
            "raw",
            "existing",
            "Source and target image have different sizes",
        ),
        (
            "host_device",
            "absolute-paths",
            "Source and target image have different sizes",
        ),
    ] {
        let mut backup = target.clone();
        backup["format"] = format.into();
        backup["mode"] = mode.into();
        assert_eq!(qmp.error("drive-backup", backup).1, text);
        assert!(place.is_as_before());
    }
    qmp.ok("quit", json!({}));
    assert!(daemon.exited().success());
}
