//! A backup that is killed leaves a temporary snapshot in its source: the next daemon that opens the image for writing deletes it.

use std::path::Path;

use serde_json::{Value, json};

use super::super::harness::{self, Daemon, Program, Qmp, tool};

fn snapshots(folder: &Path) -> Vec<String> {
    let text = tool(folder, "qemu-img info -U -f qcow2 --output=json disk.qcow2");
    let info: Value = serde_json::from_str(&text).unwrap();
    let list = info["snapshots"].as_array().cloned().unwrap_or_default();
    let name = |snapshot: &Value| snapshot["name"].as_str().unwrap().to_owned();
    list.iter().map(name).collect()
}

fn start(folder: &Path, options: &str) -> Daemon {
    let drive = format!("id=d,file=disk.qcow2{options}");
    Daemon::start_in(Program::Qblockd, folder, &["--drive", &drive])
}

#[test]
fn the_temporary_snapshot_of_a_killed_backup_goes_when_a_drive_opens_the_image_for_writing() {
    let Some(()) = harness::need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    for line in [
        "qemu-img create -q -f qcow2 disk.qcow2 64M",
        "qemu-io -f qcow2 -c 'write -P 5 0 16M' disk.qcow2",
        "qemu-img snapshot -c mine disk.qcow2",
    ] {
        tool(folder.path(), line);
    }
    let mut daemon = start(folder.path(), "");
    let mut qmp = daemon.qmp();
    let backup = json!({"device": "d", "target": "target.qcow2", "sync": "full", "speed": 65536,
        "job-id": "job", "x-perf": {"x-point-in-time": "internal-snapshot"}});
    qmp.ok("drive-backup", backup);
    harness::until(
        || snapshots(folder.path()).len() == 2,
        "a temporary snapshot",
    );
    daemon.kill();
    drop(qmp);
    let left = snapshots(folder.path());
    assert!(left[1].starts_with("x-qblockd-temporary:job."), "{left:?}");
    // Nobody who only reads the image changes it.
    let mut daemon = start(folder.path(), ",readonly=on");
    drop(daemon.qmp());
    assert!(daemon.terminated().success());
    assert_eq!(snapshots(folder.path()), left);
    // Of a node as of a drive, where the lock says that nobody else has it.
    tool(folder.path(), "cp disk.qcow2 other.qcow2");
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &[]);
    let mut qmp = daemon.qmp();
    let names = |qmp: &mut Qmp, locking: &str| {
        let file = json!({"driver": "file", "filename": "other.qcow2", "locking": locking});
        let node = json!({"driver": "qcow2", "node-name": "other", "file": file});
        qmp.ok("blockdev-add", node);
        let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
        let nodes = nodes.as_array().unwrap().iter();
        let counts: Vec<usize> = nodes
            .filter_map(|node| node["image"]["snapshots"].as_array().map(Vec::len))
            .collect();
        qmp.ok("blockdev-del", json!({"node-name": "other"}));
        counts
    };
    assert_eq!(names(&mut qmp, "off"), [2]);
    assert_eq!(names(&mut qmp, "auto"), [1]);
    drop(qmp);
    assert!(daemon.terminated().success());
    let mut daemon = start(folder.path(), "");
    drop(daemon.qmp());
    harness::until(|| snapshots(folder.path()) == ["mine"], "its deletion");
    assert!(daemon.terminated().success());
    let check = tool(folder.path(), "qemu-img check -f qcow2 disk.qcow2");
    assert!(check.contains("No errors were found"), "{check}");
}
