//! Backups that are paused, throttled, cancelled and run out of space at random moments: the target of one that says it is whole
//! is the disk as it was, and the disk is untouched whatever happens.

use std::path::Path;

use fastrand::Rng;
use serde_json::json;

use super::until;
use crate::durability::full::SmallDisk;
use crate::harness::{self, Daemon, Program, Qmp, need, tool};

/// A drive `d` of 16 MiB, half written, with a copy of it beside.
fn disk(folder: &Path, arguments: &[&str]) -> (Daemon, Qmp) {
    let make = "qemu-img create -q -f qcow2 d.qcow2 16M && \
                qemu-io -f qcow2 -c 'write -q -P 5 0 3M' -c 'write -q -P 6 5M 5M' d.qcow2 && cp d.qcow2 before.qcow2";
    tool(folder, make);
    let mut all = vec!["--drive", "id=d,file=d.qcow2,format=qcow2"];
    all.extend(arguments);
    let mut daemon = Daemon::start_in(Program::Qblockd, folder, &all);
    let qmp = daemon.qmp();
    (daemon, qmp)
}

/// The end of a job that stays: its error, if it has one.
fn end(qmp: &mut Qmp) -> Option<String> {
    let job = until(qmp, "d", Some("concluded"));
    qmp.ok("job-dismiss", json!({"id": "d"}));
    job["error"].as_str().map(str::to_owned)
}

#[test]
fn verbs_at_random_moments() {
    let Some(()) = need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let seed = harness::seed();
    let mut rng = Rng::with_seed(seed);
    let folder = tempfile::tempdir().unwrap();
    let (daemon, mut qmp) = disk(folder.path(), &[]);
    let (mut whole, mut cancelled) = (0, 0);
    for _ in 0..30 {
        let speed = rng.choice([0, 1 << 20, 64 << 20]).unwrap();
        let backup = json!({"device": "d", "target": "t.qcow2", "sync": "full", "speed": speed,
                            "auto-dismiss": false, "x-perf": {"max-chunk": 65536}});
        qmp.ok("drive-backup", backup);
        for _ in 0..rng.usize(..8) {
            std::thread::sleep(std::time::Duration::from_micros(rng.u64(..4000)));
            // A job that is over refuses, which is as good.
            match rng.u8(..5) {
                0 | 1 => drop(qmp.execute("job-pause", json!({"id": "d"}))),
                2 | 3 => drop(qmp.execute("job-resume", json!({"id": "d"}))),
                _ => {
                    let speed = json!({"device": "d", "speed": rng.u64(..1 << 26)});
                    qmp.execute("block-job-set-speed", speed);
                }
            }
        }
        if rng.bool() {
            qmp.execute("job-cancel", json!({"id": "d"}));
        } else {
            qmp.execute("block-job-set-speed", json!({"device": "d", "speed": 0}));
            qmp.execute("job-resume", json!({"id": "d"}));
        }
        match end(&mut qmp) {
            None => {
                whole += 1;
                tool(
                    folder.path(),
                    "qemu-img compare -q before.qcow2 t.qcow2 && qemu-img check -q t.qcow2",
                );
            }
            Some(error) => {
                cancelled += 1;
                assert_eq!(error, "Operation canceled");
            }
        }
        let nodes = qmp.ok("query-named-block-nodes", json!({}));
        assert_eq!(nodes.as_array().unwrap().len(), 2, "the drive's: {nodes}");
    }
    assert!(whole > 0 && cancelled > 0, "{whole} and {cancelled}");
    assert!(daemon.terminate().success());
    tool(
        folder.path(),
        "qemu-img compare -q before.qcow2 d.qcow2 && qemu-img check -q d.qcow2",
    );
}

#[test]
fn a_full_target_ends_or_holds_the_job_and_never_the_disk() {
    let Some(()) = need(&["qemu-img", "qemu-io", "mount", "df"]) else {
        return;
    };
    let Some(small) = SmallDisk::mount() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let (daemon, mut qmp) = disk(folder.path(), &[]);
    let target = small.path().join("t.qcow2");
    for (policy, action) in [("report", "report"), ("enospc", "stop"), ("stop", "stop")] {
        let _ = std::fs::remove_file(&target);
        small.leave(4 << 20);
        qmp.events.clear();
        let backup = json!({"device": "d", "target": target, "sync": "full",
                            "auto-dismiss": false, "on-target-error": policy});
        qmp.ok("drive-backup", backup);
        let error = qmp.event("BLOCK_JOB_ERROR")["data"].clone();
        assert_eq!(
            error,
            json!({"device": "d", "operation": "write", "action": action})
        );
        if action == "report" {
            let text = end(&mut qmp).unwrap();
            assert!(text.contains("No space left on device"), "{text}");
            continue;
        }
        let job = until(&mut qmp, "d", Some("paused"));
        assert_eq!(job["io-status"], "nospace");
        // There is still no space: it goes on, and is held again.
        qmp.events.clear();
        qmp.ok("block-job-resume", json!({"device": "d"}));
        qmp.event("BLOCK_JOB_ERROR");
        until(&mut qmp, "d", Some("paused"));
        std::fs::remove_file(small.path().join("filler")).unwrap();
        qmp.ok("job-resume", json!({"id": "d"}));
        assert_eq!(end(&mut qmp), None);
        let compare = format!("qemu-img compare -q before.qcow2 {}", target.display());
        tool(folder.path(), &compare);
    }
    assert!(daemon.terminate().success());
    tool(
        folder.path(),
        "qemu-img compare -q before.qcow2 d.qcow2 && qemu-img check -q d.qcow2",
    );
}
