//! Transactions over several images whose last action fails: nothing has changed on any.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::super::harness::{self, Daemon, Program, Qmp};
use super::full::SmallDisk;

const IMAGES: [&str; 3] = ["one", "two", "three"];

/// Makes three images, and `ro`, with some data and a snapshot `old` in each. A snapshot of the third takes more space.
fn make(folder: &Path) {
    for name in IMAGES.iter().chain(&["ro"]) {
        let size = if *name == "three" { "4T" } else { "16M" };
        for line in [
            format!("qemu-img create -q -f qcow2 {name}.qcow2 {size}"),
            format!("qemu-io -f qcow2 -c 'write -P 5 1M 512k' {name}.qcow2"),
            format!("qemu-img snapshot -c old {name}.qcow2"),
            // A part of the data is shared with the snapshot, and a part is not.
            format!("qemu-io -f qcow2 -c 'write -P 6 1M 128k' {name}.qcow2"),
        ] {
            harness::tool(folder, &line);
        }
    }
}

/// The images as drives, `ro` read-only, and the NBD server.
fn start(folder: &Path) -> (Daemon, Qmp) {
    let drive = |name: &str| format!("id={name},file={name}.qcow2");
    let drives: Vec<String> = IMAGES.iter().map(|name| drive(name)).collect();
    let read_only = format!("{},readonly=on", drive("ro"));
    let mut arguments: Vec<&str> = Vec::new();
    for drive in drives.iter().chain([&read_only]) {
        arguments.extend(["--drive", drive]);
    }
    arguments.extend(["--nbd-server", "unix:nbd.sock"]);
    let mut daemon = Daemon::start_in(Program::Qblockd, folder, &arguments);
    let qmp = daemon.qmp();
    (daemon, qmp)
}

/// Everything about an image that a failed command may not change: where each byte is, how far the file is in use,
/// the snapshots, and that there are no errors and no leaks.
fn state(folder: &Path, name: &str) -> Vec<Value> {
    let json = |line: &str| -> Value {
        let text = harness::tool(
            folder,
            &format!("qemu-img {line} --output=json {name}.qcow2"),
        );
        serde_json::from_str(&text).unwrap()
    };
    let check = json("check -f qcow2");
    for wrong in ["corruptions", "leaks", "check-errors"] {
        assert_eq!(check.get(wrong).and_then(Value::as_u64).unwrap_or(0), 0);
    }
    vec![
        json("map -f qcow2"),
        check["image-end-offset"].clone(),
        check["allocated-clusters"].clone(),
        json("info -f qcow2")["snapshots"].clone(),
    ]
}

fn snapshot(device: &str, name: &str) -> Value {
    json!({"type": "blockdev-snapshot-internal-sync", "data": {"device": device, "name": name}})
}

fn revert(device: &str, name: &str) -> Value {
    json!({"type": "x-blockdev-snapshot-revert", "data": {"device": device, "name": name}})
}

fn delete(device: &str, name: &str) -> Value {
    let kind = "x-blockdev-snapshot-delete-internal-sync";
    json!({"type": kind, "data": {"device": device, "name": name}})
}

/// The names of all snapshots of all drives, as query-block lists them.
fn listed(qmp: &mut Qmp) -> Vec<String> {
    let drives = qmp.ok("query-block", json!({}));
    let mut names = Vec::new();
    for drive in drives.as_array().unwrap() {
        let snapshots = &drive["inserted"]["image"]["snapshots"];
        for snapshot in snapshots.as_array().unwrap() {
            names.push(format!("{}/{}", drive["device"], snapshot["name"]).replace('"', ""));
        }
    }
    names.sort();
    names
}

const OLD: [&str; 4] = ["one/old", "ro/old", "three/old", "two/old"];

#[test]
fn a_last_action_that_fails_undoes_the_others() {
    let Some(()) = harness::need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    make(folder.path());
    let before = IMAGES.map(|name| state(folder.path(), name));
    let (mut daemon, mut qmp) = start(folder.path());
    let failing = [
        (json!({"type": "abort", "data": {}}), "abort"),
        (snapshot("three", "old"), "already exists"),
        (snapshot("ro", "new"), "read only"),
        (snapshot("four", "new"), "Cannot find device"),
        (snapshot("three", ""), "name"),
        (snapshot("one", "new"), "already exists"),
        (revert("three", "nope"), "does not exist"),
        (delete("two", "old"), "does not exist"),
        (revert("ro", "old"), "read only"),
    ];
    for (last, word) in failing {
        let mut actions: Vec<Value> = IMAGES.iter().map(|name| snapshot(name, "new")).collect();
        actions.extend([
            revert("one", "old"),
            snapshot("one", "another"),
            delete("two", "old"),
            revert("three", "new"),
            last.clone(),
        ]);
        let (_, desc) = qmp.error("transaction", json!({"actions": actions}));
        assert!(
            desc.to_lowercase().contains(&word.to_lowercase()),
            "{last}: {desc}"
        );
        assert_eq!(listed(&mut qmp), OLD, "{last}");
    }
    // The guest still writes in place where it did: a cluster of its own costs nothing.
    harness::until(|| daemon.path("nbd.sock").exists(), "the exports");
    for name in IMAGES {
        daemon.tool(&format!(
            "qemu-io -f raw -c 'write -P 6 1M 128k' 'nbd+unix:///{name}?socket=nbd.sock'"
        ));
    }
    drop(qmp);
    assert!(daemon.terminated().success());
    for (name, before) in IMAGES.iter().zip(before) {
        assert_eq!(state(folder.path(), name), before, "{name}");
    }
}

#[test]
fn a_disk_too_full_for_the_last_image_undoes_the_others() {
    let Some(()) = harness::need(&["qemu-img", "qemu-io", "mount", "df"]) else {
        return;
    };
    // All images take their space at the same time, and which of them finds none is chance. The first one's error is told if it has
    // one, so that another's means that the first had its space, and gave it back.
    for _ in 0..40 {
        let Some(disk) = SmallDisk::mount() else {
            return;
        };
        let failed_on = fill_while_snapshots_fail(&disk);
        println!("with one more page each time it failed on {failed_on:?}");
        if failed_on.contains(&"three") {
            return;
        }
    }
    panic!("it never failed on the last image");
}

/// Tries a transaction on a disk with one more free page each time, until it succeeds. Answers on which images it has failed.
fn fill_while_snapshots_fail(disk: &SmallDisk) -> Vec<&'static str> {
    make(disk.path());
    let before = IMAGES.map(|name| state(disk.path(), name));
    let (mut daemon, mut qmp) = start(disk.path());
    let actions: Vec<Value> = IMAGES.iter().map(|name| snapshot(name, "new")).collect();
    let actions = json!({"actions": actions});
    let mut failed_on = Vec::new();
    for pages in 0..64 {
        disk.leave(pages * 4096);
        let reply = qmp.execute("transaction", actions.clone());
        let Some(desc) = reply["error"]["desc"].as_str() else {
            break;
        };
        assert!(desc.contains("No space left on device"), "{desc}");
        let is_named = |name: &&str| desc.contains(&format!("'{name}'"));
        failed_on.extend(IMAGES.into_iter().filter(is_named));
        assert_eq!(listed(&mut qmp), OLD, "{pages} pages");
    }
    for name in IMAGES {
        qmp.ok(
            "blockdev-snapshot-delete-internal-sync",
            json!({"device": name, "name": "new"}),
        );
    }
    fs::remove_file(disk.path().join("filler")).unwrap();
    drop(qmp);
    assert!(daemon.terminated().success());
    for (name, before) in IMAGES.iter().zip(before) {
        assert_eq!(state(disk.path(), name), before, "{name}");
    }
    failed_on
}
