//! Backups and their jobs from outside: errors, and what guests and tools see of it.

mod below;
mod cut_off;
mod full;
mod moment;
mod random;
mod shared;

use serde_json::{Value, json};

use super::harness::{Daemon, Program, Qmp};

/// Waits until a job has this status; `None` when it is gone.
fn until(qmp: &mut Qmp, id: &str, wanted: Option<&str>) -> Value {
    let deadline = std::time::Instant::now() + super::harness::PATIENCE;
    loop {
        let jobs = qmp.ok("query-block-jobs", json!({}));
        let mut jobs = jobs.as_array().unwrap().iter();
        let job = jobs.find(|job| job["device"] == id).cloned();
        let status = job.as_ref().and_then(|job| job["status"].as_str());
        if status == wanted {
            return job.unwrap_or_default();
        }
        assert!(
            std::time::Instant::now() < deadline,
            "{id}: {job:?}, not {wanted:?}"
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Whether a job was told to have done all that it had to.
fn has_completed(qmp: &Qmp, id: &str) -> bool {
    qmp.events.iter().any(|event| {
        event["event"] == "BLOCK_JOB_COMPLETED"
            && event["data"]["device"] == id
            && event["data"].get("error").is_none()
    })
}

/// Snapshots and backups of one disk in one transaction meet in one image, below one filter or several.
#[test]
fn one_transaction_may_copy_a_disk_several_times_between_its_snapshots() {
    let Some(()) = super::harness::need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let make = "qemu-img create -q -f qcow2 d.qcow2 16M && qemu-io -f qcow2 -c 'write -q -P 1 0 8M' d.qcow2";
    super::harness::tool(folder.path(), make);
    let drive = ["--drive", "id=d,file=d.qcow2,format=qcow2"];
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &drive);
    let mut qmp = daemon.qmp();
    let snapshot = |name: &str| {
        let data = json!({"device": "d", "name": name});
        json!({"type": "blockdev-snapshot-internal-sync", "data": data})
    };
    let backup = |id: &str| {
        let target = format!("{id}.qcow2");
        let data = json!({"device": "d", "job-id": id, "sync": "full", "target": target});
        json!({"type": "drive-backup", "data": data})
    };
    let actions = [snapshot("x"), backup("a"), snapshot("y"), backup("b")];
    qmp.ok("transaction", json!({"actions": actions}));
    for id in ["a", "b"] {
        until(&mut qmp, id, None);
        assert!(has_completed(&qmp, id), "{:?}", qmp.events);
    }
    // To go back, a disk must not be copied: not even by an action before this one.
    let revert =
        json!({"type": "x-blockdev-snapshot-revert", "data": {"device": "d", "name": "x"}});
    let actions = [backup("c"), revert];
    let (_, error) = qmp.error("transaction", json!({"actions": actions}));
    assert!(error.contains("being copied"), "{error}");
    assert!(!folder.path().join("c.qcow2").exists());
    let drives = qmp.ok("query-block", json!({}));
    let image = &drives[0]["inserted"]["image"];
    assert_eq!(image["snapshots"].as_array().unwrap().len(), 2);
    assert_eq!(image["format"], "qcow2");
    assert!(daemon.terminate().success());
    for id in ["a", "b"] {
        let compare =
            format!("qemu-img compare -q d.qcow2 {id}.qcow2 && qemu-img check -q {id}.qcow2");
        super::harness::tool(folder.path(), &compare);
    }
}

/// A raw file may end within a sector; images with a format consist of whole ones.
#[test]
fn a_disk_that_ends_within_a_sector_gets_backups_and_overlays() {
    let Some(()) = super::harness::need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let make = "head -c 1000001 /dev/urandom > d.raw";
    super::harness::tool(folder.path(), make);
    let drive = ["--drive", "id=d,file=d.raw,format=raw"];
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &drive);
    let mut qmp = daemon.qmp();
    for (id, format) in [("a", "qcow2"), ("b", "raw")] {
        let target = format!("{id}.{format}");
        let backup = json!({"device": "d", "job-id": id, "sync": "full", "target": target, "format": format});
        qmp.ok("drive-backup", backup);
        until(&mut qmp, id, None);
        assert!(has_completed(&qmp, id), "{:?}", qmp.events);
    }
    let overlay = json!({"device": "d", "snapshot-file": "over.qcow2"});
    qmp.ok("blockdev-snapshot-sync", overlay);
    let drives = qmp.ok("query-block", json!({}));
    assert_eq!(drives[0]["inserted"]["image"]["virtual-size"], 1000448);
    assert!(daemon.terminate().success());
    for compare in [
        "qemu-img compare -q -f raw -F qcow2 d.raw a.qcow2",
        "cmp d.raw b.raw",
        "qemu-img compare -q -f raw -F qcow2 d.raw over.qcow2",
    ] {
        super::harness::tool(folder.path(), compare);
    }
}
