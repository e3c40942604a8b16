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

/// The images in a folder, and what is in the state directory below it.
fn files(folder: &Path) -> Vec<String> {
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).unwrap();
        let names = entries.map(|entry| entry.unwrap().path().display().to_string());
        names.collect::<Vec<String>>()
    };
    let mut files = names(folder);
    files.retain(|file| file.ends_with(".qcow2"));
    files.extend(names(&folder.join("state")));
    files.sort_unstable();
    files
}

#[test]
fn what_fails_over_many_disks_leaves_nothing_on_any() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    let disks = setting("QBLOCKD_DISKS", 150) / 3;
    let folder = tempfile::tempdir().unwrap();
    let image = |name: String| folder.path().join(format!("{name}.qcow2"));
    tool(folder.path(), "qemu-img create -q -f qcow2 d0.qcow2 1M");
    let mut arguments = vec!["--state-dir".to_owned(), "state".to_owned()];
    // One more has nothing done to it but what fails.
    for disk in 0..=disks {
        for copy in [format!("d{disk}"), format!("existing{disk}")] {
            if !image(copy.clone()).exists() {
                fs::copy(image("d0".to_owned()), image(copy)).unwrap();
            }
        }
        arguments.push("--drive".to_owned());
        arguments.push(format!("id=d{disk},file=d{disk}.qcow2,format=qcow2"));
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &arguments);
    let mut qmp = daemon.qmp();
    let overlay = |disk: u64, folder: &str| {
        let file = format!("{folder}overlay{disk}.qcow2");
        let data = json!({"device": format!("d{disk}"), "snapshot-file": file});
        json!({"type": "blockdev-snapshot-sync", "data": data})
    };
    let backup = |disk: u64, mode: &str| {
        let data = json!({
            "device": format!("d{disk}"), "target": format!("{}{disk}.qcow2", if mode == "existing" { mode } else { "new" }),
            "sync": "full", "format": "qcow2", "mode": mode, "job-id": format!("{mode}{disk}")
        });
        json!({"type": "drive-backup", "data": data})
    };
    // One after the other on each disk, and side by side across them.
    let of_disk = |disk| {
        [
            overlay(disk, ""),
            backup(disk, "absolute-paths"),
            backup(disk, "existing"),
            create(&format!("d{disk}"), "inside"),
        ]
    };
    let all: Vec<Value> = (0..disks).flat_map(of_disk).collect();
    let with = |last: Value| [&all[..], &[last]].concat();
    let (before, nodes) = (
        files(folder.path()),
        qmp.ok("query-named-block-nodes", json!({})),
    );
    for (actions, dry, why) in [
        (
            with(json!({"type": "abort", "data": {}})),
            false,
            "Abort action",
        ),
        (with(overlay(disks, "none/")), false, "No such file"),
        (with(create("nobody", "s")), false, "'nobody'"),
        (all.clone(), true, ""),
    ] {
        let begin = Instant::now();
        let arguments = json!({"actions": actions, "x-dry-run": dry});
        match dry {
            false => {
                let (_, desc) = qmp.error("transaction", arguments);
                assert!(desc.contains(why), "{desc}");
            }
            true => {
                let done = qmp.ok("transaction", arguments);
                for action in done["x-actions"].as_array().unwrap() {
                    assert_eq!(action.get("error"), None, "{action}");
                }
            }
        }
        println!(
            "4 actions on each of {disks} disks fail for {why:?} in {:.1?}",
            begin.elapsed()
        );
        assert_eq!(files(folder.path()), before);
        assert_eq!(qmp.ok("query-named-block-nodes", json!({})), nodes);
        assert_eq!(qmp.ok("query-jobs", json!({})), json!([]));
    }
    qmp.ok("transaction", json!({"actions": all}));
    for _ in 0..2 * disks {
        qmp.event("BLOCK_JOB_COMPLETED");
    }
    qmp.ok("quit", json!({}));
    assert!(daemon.exited().success());
    assert_eq!(names(folder.path(), "overlay0.qcow2"), ["inside"]);
    assert_eq!(
        files(folder.path()).len() as u64,
        before.len() as u64 + 2 * disks
    );
}
