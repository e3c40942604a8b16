//! Backups to a file system that is full, and to images that compress otherwise.

use std::fs;

use serde_json::{Value, json};

use super::super::durability::full::SmallDisk;
use super::super::guest::{Guest, Request};
use super::super::harness::{self, Daemon, Program, Qmp, tool};
use super::until;

const MIB: usize = 1 << 20;

/// What an event says, without its time.
fn said(event: &Value) -> Value {
    json!([event["event"], event["data"]])
}

fn status(id: &str, status: &str) -> Value {
    json!(["JOB_STATUS_CHANGE", {"id": id, "status": status}])
}

/// All events so far, behind a command that takes no time.
fn so_far(qmp: &mut Qmp) -> Vec<Value> {
    qmp.ok("query-status", json!({}));
    qmp.events.drain(..).map(|event| said(&event)).collect()
}

/// A job whose target gets no space waits for it, tells of it, and goes on where it was.
#[test]
fn a_backup_waits_for_space_and_is_right_then() {
    let Some(()) = harness::need(&["qemu-img", "mount", "df"]) else {
        return;
    };
    let Some(disk) = SmallDisk::mount() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    tool(folder.path(), "head -c 6M /dev/urandom > before.raw");
    for policy in ["enospc", "stop"] {
        fs::copy(
            folder.path().join("before.raw"),
            folder.path().join("d.raw"),
        )
        .unwrap();
        let drive = [
            "--drive",
            "id=d,file=d.raw,format=raw",
            "--nbd-server",
            "unix:nbd.sock",
        ];
        let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &drive);
        let mut qmp = daemon.qmp();
        disk.leave(2 * MIB);
        let target = disk.path().join(format!("{policy}.qcow2"));
        let backup = json!({"device": "d", "job-id": "j", "target": target, "format": "qcow2", "sync": "full",
            "on-target-error": policy, "x-perf": {"max-workers": 1}});
        qmp.ok("drive-backup", backup);
        let job = until(&mut qmp, "j", Some("paused"));
        assert_eq!(
            (&job["paused"], &job["io-status"]),
            (&json!(true), &json!("nospace"))
        );
        assert_eq!(job["busy"], false);
        let error =
            json!(["BLOCK_JOB_ERROR", {"device": "j", "operation": "write", "action": "stop"}]);
        let expected = [
            status("j", "created"),
            status("j", "running"),
            error.clone(),
            status("j", "paused"),
        ];
        assert_eq!(so_far(&mut qmp), expected);
        // Guests do not wait for it, and the backup shows what was there before.
        let mut guest = Guest::connect(&folder.path().join("nbd.sock"), "d").unwrap();
        for offset in [0, 3 << 20, (6 << 20) - 65536] {
            let data = vec![0xaa; 65536];
            assert_eq!(guest.run(&Request::Write { offset, data }).unwrap(), 0);
        }
        // There is still no space.
        qmp.ok("block-job-resume", json!({"device": "j"}));
        until(&mut qmp, "j", Some("paused"));
        assert_eq!(
            so_far(&mut qmp),
            [status("j", "running"), error, status("j", "paused")]
        );
        fs::remove_file(disk.path().join("filler")).unwrap();
        qmp.ok("block-job-resume", json!({"device": "j"}));
        until(&mut qmp, "j", None);
        let bytes = 6 * MIB;
        let completed = json!(["BLOCK_JOB_COMPLETED",
            {"type": "backup", "device": "j", "len": bytes, "offset": bytes, "speed": 0}]);
        let mut expected: Vec<Value> = ["running", "waiting", "pending"]
            .map(|to| status("j", to))
            .into();
        expected.extend([completed, status("j", "concluded"), status("j", "null")]);
        assert_eq!(so_far(&mut qmp), expected);
        drop(guest);
        assert!(daemon.terminate().success());
        let target = target.display();
        tool(folder.path(), &format!("qemu-img check -q {target}"));
        tool(
            folder.path(),
            &format!("qemu-img compare -q -f raw -F qcow2 before.raw {target}"),
        );
        tool(disk.path(), "rm *.qcow2");
    }
}

/// A target may compress as the source does not, made here or by another program.
#[test]
fn compressed_backups_to_zstd_images_are_right() {
    let Some(()) = harness::need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    // What can be compressed, what cannot, and zeroes; the last cluster is cut off.
    let make = "qemu-img create -q -f qcow2 d.qcow2 4000K && head -c 1M /dev/urandom > random && \
        qemu-io -f qcow2 -c 'write -q -P 7 0 1M' -c 'write -q -s random 1M 1M' -c 'write -q -P 9 3990k 10k' d.qcow2";
    tool(folder.path(), make);
    let create = "qemu-img create -q -f qcow2 -o compression_type=zstd";
    tool(
        folder.path(),
        &format!("{create} there.qcow2 4000K && {create} there-too.qcow2 4000K"),
    );
    let drive = ["--drive", "id=d,file=d.qcow2,format=qcow2"];
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &drive);
    let mut qmp = daemon.qmp();
    let size = 4000 << 10;
    let create = [
        json!({"driver": "file", "filename": "made.qcow2", "size": 0}),
        json!({"driver": "qcow2", "file": {"driver": "file", "filename": "made.qcow2"}, "size": size,
            "compression-type": "zstd"}),
    ];
    for options in create {
        qmp.ok(
            "blockdev-create",
            json!({"job-id": "c", "options": options}),
        );
        while qmp.ok("query-jobs", json!({}))[0]["status"] != "concluded" {}
        qmp.ok("job-dismiss", json!({"id": "c"}));
    }
    for name in ["made", "there-too"] {
        let file = json!({"driver": "file", "filename": format!("{name}.qcow2")});
        qmp.ok(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": name, "file": file}),
        );
        let backup = json!({"device": "d", "job-id": name, "target": name, "sync": "full", "compress": true});
        qmp.ok("blockdev-backup", backup);
    }
    let backup = json!({"device": "d", "job-id": "there", "target": "there.qcow2", "mode": "existing", "sync": "full",
        "compress": true});
    qmp.ok("drive-backup", backup);
    for id in ["made", "there", "there-too"] {
        until(&mut qmp, id, None);
        assert!(super::has_completed(&qmp, id), "{id}: {:?}", qmp.events);
    }
    assert!(daemon.terminate().success());
    for name in ["made", "there", "there-too"] {
        tool(
            folder.path(),
            &format!("qemu-img check -q {name}.qcow2 && qemu-img compare -q d.qcow2 {name}.qcow2"),
        );
        tool(
            folder.path(),
            &format!("qemu-img info {name}.qcow2 | grep -q 'compression type: zstd'"),
        );
        tool(
            folder.path(),
            &format!("qemu-img map --output=json {name}.qcow2 | grep -q '\"compressed\": true'"),
        );
    }
}
