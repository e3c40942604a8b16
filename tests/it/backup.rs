//! Jobs and backups from outside: the same sessions on qemu-storage-daemon, errors, and what guests and tools see of it.

mod below;
mod moment;
mod peers;
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

/// What was told of a job so far, in short: states, and the names of other events with what is characteristic.
fn told(qmp: &mut Qmp, id: &str) -> Vec<String> {
    let is_its = |event: &Value| event["data"]["id"] == id || event["data"]["device"] == id;
    let (its, others) = std::mem::take(&mut qmp.events)
        .into_iter()
        .partition(is_its);
    qmp.events = others;
    let its: Vec<Value> = its;
    let short = its.iter().map(|event| {
        let (name, data) = (event["event"].as_str().unwrap(), &event["data"]);
        match name {
            "JOB_STATUS_CHANGE" => data["status"].as_str().unwrap().to_owned(),
            "BLOCK_JOB_ERROR" => format!("{name} {} {}", data["operation"], data["action"]),
            "BLOCK_JOB_COMPLETED" if data.get("error").is_some() => {
                format!("{name} {}", data["error"])
            }
            _ => name.to_owned(),
        }
    });
    short.collect()
}

/// A daemon with two disks of 16 MiB, `src0` and `src1`, of which the first half is written, and three targets, `dst0` to `dst2`.
fn start(program: Program) -> (tempfile::TempDir, Daemon, Qmp) {
    let folder = tempfile::tempdir().unwrap();
    let make = "qemu-img create -q -f qcow2 src0.qcow2 16M && \
                qemu-io -f qcow2 -c 'write -q -P 1 0 8M' src0.qcow2 && cp src0.qcow2 src1.qcow2 && \
                for i in 0 1 2; do qemu-img create -q -f qcow2 dst$i.qcow2 16M; done";
    super::harness::tool(folder.path(), make);
    let mut daemon = Daemon::start_in(program, folder.path(), &[]);
    let mut qmp = daemon.qmp();
    for name in ["src0", "src1", "dst0", "dst1", "dst2"] {
        let file = json!({"driver": "file", "filename": format!("{name}.qcow2")});
        let node = json!({"driver": "qcow2", "node-name": name, "file": file});
        qmp.ok("blockdev-add", node);
    }
    (folder, daemon, qmp)
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
        assert!(told(&mut qmp, id).contains(&"BLOCK_JOB_COMPLETED".to_owned()));
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
