//! Commands that name what is below, beside or above the filter of a running backup. Neither the moment that the backup shows nor the
//! guest's disk suffers from any.

use serde_json::{Value, json};

use super::until;
use crate::guest::{Guest, Request};
use crate::harness::{Daemon, Program, Qmp, need, tool};

const BUSY: &str = "is busy: block device is in use by block job: backup";
const COPIED: &str = "is excluded by node 'filter' (uses node as 'file' child)";

/// A disk `s` with backing and an internal snapshot, exported and being copied to `t` very slowly; `o` is idle.
fn start() -> (tempfile::TempDir, Daemon, Qmp) {
    let folder = tempfile::tempdir().unwrap();
    let make = "qemu-img create -q -f qcow2 base.qcow2 16M && qemu-io -c 'write -q -P 1 0 16M' base.qcow2 && \
                qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 s.qcow2 && qemu-io -c 'write -q -P 2 0 8M' s.qcow2 && \
                qemu-img snapshot -c old s.qcow2 && qemu-io -c 'write -q -P 3 0 4M' s.qcow2 && \
                qemu-img convert -O raw s.qcow2 moment.raw && \
                qemu-img create -q -f qcow2 t.qcow2 16M && qemu-img create -q -f qcow2 o.qcow2 16M";
    tool(folder.path(), make);
    let mut daemon = Daemon::start_in(
        Program::Qblockd,
        folder.path(),
        &["--nbd-server", "unix:nbd.sock"],
    );
    let mut qmp = daemon.qmp();
    for name in ["s", "t", "o"] {
        let file = json!({"driver": "file", "filename": format!("{name}.qcow2"), "node-name": format!("{name}-file")});
        let mut node = json!({"driver": "qcow2", "node-name": name, "file": file});
        if name == "o" {
            node["backing"] = Value::Null;
        }
        qmp.ok("blockdev-add", node);
    }
    let export = json!({"type": "nbd", "id": "e", "node-name": "s", "name": "e", "writable": true});
    qmp.ok("block-export-add", export);
    let backup = json!({"device": "s", "target": "t", "sync": "full", "job-id": "job", "speed": 65536,
                        "filter-node-name": "filter"});
    qmp.ok("blockdev-backup", backup);
    (folder, daemon, qmp)
}

/// Commands with what they are answered: a part of the error, or nothing where they are carried out.
fn commands() -> Vec<(&'static str, Value, &'static str)> {
    let resize = |node: &str, size: u64| json!({"node-name": node, "size": size});
    let snapshot = |device: &str, name: &str| json!({"device": device, "name": name});
    let reopen = |backing: Value| json!({"options": [{"driver": "qcow2", "node-name": "s", "file": "s-file", "backing": backing}]});
    let export = |node: &str| json!({"type": "nbd", "id": "e1", "node-name": node, "name": "e1", "writable": true});
    let revert =
        json!({"type": "x-blockdev-snapshot-revert", "data": {"device": "filter", "name": "old"}});
    let raw = |below: &str| json!({"driver": "raw", "node-name": "r", "file": below});
    let swap = json!({"options": [{"driver": "qcow2", "node-name": "s", "file": "o-file", "backing": null}]});
    let backup = |from: &str, to: &str| json!({"device": from, "target": to, "sync": "full", "job-id": "other"});
    vec![
        (
            "x-blockdev-snapshot-revert",
            snapshot("s", "old"),
            "Need a root block node",
        ),
        (
            "x-blockdev-snapshot-revert",
            snapshot("filter", "old"),
            "being copied by a job",
        ),
        (
            "transaction",
            json!({"actions": [revert]}),
            "being copied by a job",
        ),
        ("block_resize", resize("s", 4 << 20), COPIED),
        ("block_resize", resize("s", 32 << 20), COPIED),
        (
            "block_resize",
            resize("s-file", 1 << 20),
            "is excluded by node 's' (uses node as 'file' child)",
        ),
        (
            "block_resize",
            resize("filter", 1 << 20),
            "what is behind is still to be copied",
        ),
        ("block_resize", resize("t", 1 << 20), BUSY),
        (
            "block_resize",
            resize("t-file", 1 << 20),
            "is excluded by node 't'",
        ),
        (
            "blockdev-snapshot",
            json!({"node": "s", "overlay": "o"}),
            BUSY,
        ),
        (
            "blockdev-snapshot",
            json!({"node": "filter", "overlay": "o"}),
            BUSY,
        ),
        (
            "blockdev-snapshot",
            json!({"node": "t", "overlay": "o"}),
            BUSY,
        ),
        (
            "blockdev-snapshot",
            json!({"node": "o", "overlay": "s"}),
            "already in use",
        ),
        (
            "blockdev-snapshot-sync",
            json!({"node-name": "s", "snapshot-file": "x.qcow2", "snapshot-node-name": "x"}),
            BUSY,
        ),
        ("blockdev-reopen", reopen(Value::Null), BUSY),
        ("blockdev-reopen", reopen(json!("o")), BUSY),
        ("blockdev-reopen", swap, BUSY),
        ("blockdev-del", json!({"node-name": "s"}), "is in use"),
        ("blockdev-del", json!({"node-name": "t"}), BUSY),
        ("blockdev-del", json!({"node-name": "filter"}), BUSY),
        (
            "change-backing-file",
            json!({"device": "s", "image-node-name": "s", "backing-file": "o.qcow2"}),
            "Need a root block node",
        ),
        ("block-export-add", export("s"), COPIED),
        (
            "block-export-add",
            export("s-file"),
            "is excluded by node 's'",
        ),
        (
            "block-export-add",
            export("t"),
            "is excluded by node 'filter'",
        ),
        ("blockdev-add", raw("s"), COPIED),
        ("blockdev-add", raw("s-file"), "is excluded by node 's'"),
        ("blockdev-add", raw("t"), "is excluded by node 'filter'"),
        ("blockdev-backup", backup("t", "o"), BUSY),
        ("blockdev-backup", backup("o", "s"), COPIED),
        ("blockdev-backup", backup("o", "t"), BUSY),
        ("blockdev-backup", backup("o", "filter"), BUSY),
        (
            "blockdev-snapshot-internal-sync",
            snapshot("s", "new"),
            "Need a root block node",
        ),
        (
            "blockdev-snapshot-delete-internal-sync",
            snapshot("s", "old"),
            "Need a root block node",
        ),
        // The image's snapshots are no business of the copy.
        (
            "blockdev-snapshot-internal-sync",
            snapshot("filter", "new"),
            "",
        ),
        (
            "blockdev-snapshot-delete-internal-sync",
            snapshot("filter", "old"),
            "",
        ),
    ]
}

#[test]
fn a_backup_and_its_disk_are_safe_from_commands_about_other_nodes() {
    let Some(()) = need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let (folder, daemon, mut qmp) = start();
    let mut guest = Guest::connect(&folder.path().join("nbd.sock"), "e").unwrap();
    let mut disk = std::fs::read(folder.path().join("moment.raw")).unwrap();
    for (number, (command, arguments, expected)) in commands().into_iter().enumerate() {
        let reply = qmp.execute(command, arguments.clone());
        let error = reply["error"]["desc"].as_str().unwrap_or_default();
        assert_eq!(
            error.is_empty(),
            expected.is_empty(),
            "{command} {arguments}: {reply}"
        );
        assert!(error.contains(expected), "{command} {arguments}: {reply}");
        // From the end, where the copy comes last.
        let offset = (15 << 20) - number * 200_000;
        let data = vec![100 + number as u8; 100_000];
        disk[offset..offset + data.len()].copy_from_slice(&data);
        let write = Request::Write {
            offset: offset as u64,
            data,
        };
        assert_eq!(
            guest.run(&write).unwrap(),
            0,
            "behind {command} {arguments}"
        );
    }
    for (place, node) in ["s", "s-file", "t", "t-file", "filter"]
        .into_iter()
        .enumerate()
    {
        let id = format!("create{place}");
        let options = json!({"driver": "qcow2", "file": node, "size": 1 << 20});
        qmp.ok("blockdev-create", json!({"job-id": id, "options": options}));
        let concluded = json!({"id": id, "status": "concluded"});
        while qmp.event("JOB_STATUS_CHANGE")["data"] != concluded {}
        let jobs = qmp.ok("query-jobs", json!({}));
        let job = jobs
            .as_array()
            .unwrap()
            .iter()
            .find(|job| job["id"] == id.as_str());
        assert!(job.unwrap()["error"].is_string(), "{node}: {jobs}");
    }
    qmp.ok("block-job-set-speed", json!({"device": "job", "speed": 0}));
    until(&mut qmp, "job", None);
    assert_eq!(guest.content().unwrap(), disk);
    drop(guest);
    assert!(daemon.terminate().success());
    let compare = "qemu-img compare -q -f raw moment.raw -F qcow2 t.qcow2 && qemu-img check -q t.qcow2 && qemu-img check -q s.qcow2";
    tool(folder.path(), compare);
    std::fs::write(folder.path().join("after.raw"), disk).unwrap();
    tool(
        folder.path(),
        "qemu-img compare -q -f raw after.raw -F qcow2 s.qcow2",
    );
}
