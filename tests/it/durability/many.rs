//! Transactions of many actions: over many disks, and on one disk in an order that means something.
//!
//! `QBLOCKD_DISKS` is how many there are (150 if absent).

use std::fs;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use super::super::harness::{self, Daemon, Program, Qmp, tool};
use super::setting;

fn action(kind: &str, device: &str, name: &str) -> Value {
    json!({"type": kind, "data": {"device": device, "name": name}})
}

fn create(device: &str, name: &str) -> Value {
    action("blockdev-snapshot-internal-sync", device, name)
}

fn delete(device: &str, name: &str) -> Value {
    action("x-blockdev-snapshot-delete-internal-sync", device, name)
}

fn revert(device: &str, name: &str) -> Value {
    action("x-blockdev-snapshot-revert", device, name)
}

fn add(qmp: &mut Qmp, node: &str, filename: &str) {
    let file = json!({"driver": "file", "filename": filename});
    let options = json!({"driver": "qcow2", "node-name": node, "file": file});
    qmp.ok("blockdev-add", options);
}

/// The names of an image's snapshots, in order.
fn names(folder: &Path, image: &str) -> Vec<String> {
    let line = format!("qemu-img info -U -f qcow2 --output=json {image}");
    let info: Value = serde_json::from_str(&tool(folder, &line)).unwrap();
    let snapshots = info["snapshots"].as_array().cloned().unwrap_or_default();
    let name = |snapshot: &Value| snapshot["name"].as_str().unwrap().to_owned();
    snapshots.iter().map(name).collect()
}

#[test]
fn many_disks_are_changed_by_one_transaction() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    let disks = setting("QBLOCKD_DISKS", 150);
    let folder = tempfile::tempdir().unwrap();
    let image = |disk: u64| folder.path().join(format!("{disk}.qcow2"));
    tool(folder.path(), "qemu-img create -q -f qcow2 0.qcow2 1M");
    for disk in 1..disks {
        fs::copy(image(0), image(disk)).unwrap();
    }
    let state = ["--state-dir", "state"];
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &state);
    let mut qmp = daemon.qmp();
    for disk in 0..disks {
        add(&mut qmp, &format!("d{disk}"), &format!("{disk}.qcow2"));
    }
    let each = |action: fn(&str, &str) -> Value, name: &str| -> Vec<Value> {
        (0..disks)
            .map(|disk| action(&format!("d{disk}"), name))
            .collect()
    };
    let begin = Instant::now();
    qmp.ok("transaction", json!({"actions": each(create, "one")}));
    println!("a snapshot of {disks} disks took {:.1?}", begin.elapsed());
    // The last action fails: nothing has happened on any.
    let mut actions = each(create, "two");
    actions.push(delete("d0", "none"));
    let (_, desc) = qmp.error("transaction", json!({"actions": actions}));
    assert!(
        desc.contains("'none' does not exist on device 'd0'"),
        "{desc}"
    );
    let mut actions = each(create, "three");
    actions.extend(each(revert, "three"));
    actions.extend(each(delete, "one"));
    qmp.ok("transaction", json!({"actions": actions}));
    qmp.ok("quit", json!({}));
    assert!(daemon.exited().success());
    for disk in [0, disks / 2, disks - 1] {
        let image = format!("{disk}.qcow2");
        assert_eq!(names(folder.path(), &image), ["three"]);
        tool(folder.path(), &format!("qemu-img check -q {image}"));
    }
}

#[test]
fn actions_on_one_disk_are_about_what_those_before_have_left() {
    let Some(()) = harness::need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    for line in [
        "qemu-img create -q -f qcow2 a.qcow2 1M",
        "qemu-io -f qcow2 -c 'write -P 1 0 1M' a.qcow2",
        "qemu-img snapshot -c first a.qcow2",
        "qemu-io -f qcow2 -c 'write -P 2 0 1M' a.qcow2",
    ] {
        tool(folder.path(), line);
    }
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &[]);
    let mut qmp = daemon.qmp();
    add(&mut qmp, "a", "a.qcow2");
    // A snapshot that an earlier action takes can be reverted to, and deleted; one that is gone cannot.
    let actions = [
        create("a", "second"),
        revert("a", "first"),
        create("a", "third"),
        delete("a", "first"),
        revert("a", "second"),
        delete("a", "second"),
        create("a", "first"),
    ];
    qmp.ok("transaction", json!({"actions": actions}));
    for (actions, why) in [
        (
            [delete("a", "third"), revert("a", "third")],
            "does not exist",
        ),
        ([create("a", "new"), create("a", "new")], "already exists"),
        ([revert("a", "new"), create("a", "new")], "does not exist"),
    ] {
        let (_, desc) = qmp.error("transaction", json!({"actions": actions}));
        assert!(desc.contains(why), "{desc}");
    }
    qmp.ok("quit", json!({}));
    assert!(daemon.exited().success());
    assert_eq!(names(folder.path(), "a.qcow2"), ["third", "first"]);
    for (snapshot, byte) in [("", 2), ("-l third", 1), ("-l first", 2)] {
        let line = format!("qemu-img convert -f qcow2 -O raw {snapshot} a.qcow2 a.raw");
        tool(folder.path(), &line);
        let content = fs::read(folder.path().join("a.raw")).unwrap();
        assert!(content.iter().all(|each| *each == byte), "{snapshot}");
    }
    tool(folder.path(), "qemu-img check -q a.qcow2");
}

#[test]
fn a_device_is_the_layer_that_an_earlier_action_puts_on_it() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let arguments = [
        "--state-dir",
        "state",
        "--drive",
        "id=a,file=a.qcow2,size=1M",
    ];
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &arguments);
    let mut qmp = daemon.qmp();
    let layer = |file: &str| {
        let data = json!({"device": "a", "snapshot-file": file, "snapshot-node-name": &file[..1]});
        json!({"type": "blockdev-snapshot-sync", "data": data})
    };
    let mut actions = vec![
        create("a", "below"),
        layer("o.qcow2"),
        create("a", "between"),
        layer("p.qcow2"),
    ];
    qmp.ok(
        "transaction",
        json!({"actions": actions, "x-dry-run": true}),
    );
    // The uppermost layer has no snapshots yet.
    let mut wrong = actions.clone();
    wrong.push(revert("a", "between"));
    let (_, desc) = qmp.error("transaction", json!({"actions": wrong}));
    assert!(
        desc.contains("'between' does not exist on device 'a'"),
        "{desc}"
    );
    // A node that has a layer on it is not what it was.
    wrong.pop();
    wrong.push(create("o", "late"));
    let (_, desc) = qmp.error("transaction", json!({"actions": wrong}));
    assert_eq!(desc, "Need a root block node");
    for file in ["o.qcow2", "p.qcow2"] {
        assert!(!folder.path().join(file).exists(), "{file}");
    }
    actions.push(create("a", "above"));
    qmp.ok("transaction", json!({"actions": actions}));
    qmp.ok("quit", json!({}));
    assert!(daemon.exited().success());
    for (image, snapshot) in [("a", "below"), ("o", "between"), ("p", "above")] {
        let image = format!("{image}.qcow2");
        assert_eq!(names(folder.path(), &image), [snapshot]);
        tool(folder.path(), &format!("qemu-img check -q {image}"));
    }
    let line = "qemu-img info --backing-chain --output=json p.qcow2";
    let chain: Value = serde_json::from_str(&tool(folder.path(), line)).unwrap();
    assert_eq!(chain.as_array().map(Vec::len), Some(3));
}

fn overlay(name: &str) -> Value {
    let data = json!({
        "device": "a", "snapshot-file": format!("{name}.qcow2"), "snapshot-node-name": name
    });
    json!({"type": "blockdev-snapshot-sync", "data": data})
}

fn backup(name: &str) -> Value {
    let data = json!({
        "device": "a", "target": format!("{name}.qcow2"), "sync": "full", "job-id": name
    });
    json!({"type": "drive-backup", "data": data})
}

#[test]
fn overlays_and_backups_of_one_disk_are_of_one_moment() {
    let Some(()) = harness::need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    for (actions, chain) in [
        (vec![overlay("one"), backup("copy")], 2),
        (
            vec![overlay("one"), create("a", "inside"), backup("copy")],
            2,
        ),
        (
            vec![create("a", "below"), overlay("one"), overlay("two")],
            3,
        ),
        (vec![overlay("one"), overlay("two"), backup("copy")], 3),
        (vec![backup("copy"), backup("again")], 1),
    ] {
        let folder = tempfile::tempdir().unwrap();
        for line in [
            "qemu-img create -q -f qcow2 a.qcow2 1M",
            "qemu-io -f qcow2 -c 'write -P 1 0 1M' a.qcow2",
        ] {
            tool(folder.path(), line);
        }
        let drive = ["--drive", "id=a,file=a.qcow2,format=qcow2"];
        let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &drive);
        let mut qmp = daemon.qmp();
        qmp.ok("transaction", json!({"actions": &actions}));
        let backups = actions
            .iter()
            .filter(|action| action["type"] == "drive-backup");
        for _ in backups.clone() {
            let event = qmp.event("BLOCK_JOB_COMPLETED");
            assert_eq!(event["data"].get("error"), None, "{event}");
        }
        let drives = qmp.ok("query-block", json!({}));
        let depth = drives[0]["inserted"]["backing_file_depth"].as_u64();
        assert_eq!(depth.map(|depth| depth + 1), Some(chain), "{actions:?}");
        qmp.ok("quit", json!({}));
        assert!(daemon.exited().success());
        for backup in backups {
            let name = backup["data"]["target"].as_str().unwrap();
            tool(
                folder.path(),
                &format!("qemu-img compare -q a.qcow2 {name}"),
            );
            tool(folder.path(), &format!("qemu-img check -q {name}"));
        }
        tool(folder.path(), "qemu-img check -q a.qcow2");
    }
}
