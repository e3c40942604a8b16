//! The same sessions on qemu-storage-daemon and on qblockd: replies, queries, and the order of each job's events.

use serde_json::{Value, json};

use super::{start, told, until};
use crate::harness::{Program, Qmp, need};

/// What came of a session: replies, and what was told of each job.
struct Record {
    qmp: Qmp,
    lines: Vec<String>,
}

impl Record {
    fn run(&mut self, command: &str, arguments: Value) {
        let reply = self.qmp.execute(command, arguments.clone());
        self.lines.push(format!("{command} {arguments}"));
        self.note(reply);
    }

    fn note(&mut self, mut reply: Value) {
        // What is ours, what depends on the moment, and what QEMU has in another order.
        if let Some(jobs) = reply["return"].as_array_mut() {
            for job in jobs {
                let job = job.as_object_mut().unwrap();
                for key in ["started-at", "rate", "time-left", "busy"] {
                    job.remove(key);
                }
                job.sort_keys();
            }
        }
        self.lines.push(reply.to_string());
    }

    fn until(&mut self, id: &str, wanted: Option<&str>) {
        until(&mut self.qmp, id, wanted);
    }

    /// What was told of a job. QEMU also pauses jobs for a moment whenever the graph changes, without being asked: all `paused` and
    /// `running` but the first are left out.
    fn told(&mut self, id: &str) {
        let mut told = told(&mut self.qmp, id);
        let mut is_first = true;
        told.retain(|what| match what.as_str() {
            "running" => std::mem::take(&mut is_first),
            "paused" => false,
            _ => true,
        });
        self.lines.push(format!("{id}: {}", told.join(", ")));
    }
}

fn backup(device: &str, target: &str, sync: &str, more: Value) -> Value {
    let mut all = json!({"device": device, "target": target, "sync": sync});
    for (key, value) in more.as_object().unwrap() {
        all[key] = value.clone();
    }
    all
}

fn grouped(actions: &[Value]) -> Value {
    let actions: Vec<Value> = actions
        .iter()
        .map(|data| json!({"type": "blockdev-backup", "data": data}))
        .collect();
    json!({"actions": actions, "properties": {"completion-mode": "grouped"}})
}

/// A job, every verb on it in several states, and its ends.
fn verbs(record: &mut Record) {
    let slow =
        json!({"job-id": "j", "speed": 65536, "auto-finalize": false, "auto-dismiss": false});
    record.run(
        "blockdev-backup",
        backup("src0", "dst0", "full", slow.clone()),
    );
    record.run("block-job-resume", json!({"device": "j"}));
    record.run("block-job-complete", json!({"device": "j"}));
    record.run("job-finalize", json!({"id": "j"}));
    record.run("block-job-dismiss", json!({"id": "j"}));
    record.run("block-job-set-speed", json!({"device": "j", "speed": -1}));
    record.run("job-pause", json!({"id": "j"}));
    record.run("block-job-pause", json!({"device": "j"}));
    record.until("j", Some("paused"));
    record.run("block-job-cancel", json!({"device": "j"}));
    record.run("block-job-resume", json!({"device": "j"}));
    record.run("job-resume", json!({"id": "j"}));
    record.run("block-job-set-speed", json!({"device": "j", "speed": 0}));
    record.until("j", Some("pending"));
    record.run("query-block-jobs", json!({}));
    record.run("query-jobs", json!({}));
    for verb in ["pause", "complete", "dismiss"] {
        record.run(&format!("job-{verb}"), json!({"id": "j"}));
    }
    record.run("block-job-set-speed", json!({"device": "j", "speed": 1}));
    record.run("job-finalize", json!({"id": "j"}));
    record.until("j", Some("concluded"));
    for verb in ["cancel", "pause", "resume", "complete", "finalize"] {
        record.run(&format!("job-{verb}"), json!({"id": "j"}));
    }
    record.run("query-block-jobs", json!({}));
    record.run("job-dismiss", json!({"id": "j"}));
    record.told("j");
    // Cancelled while it is held.
    record.run("blockdev-backup", backup("src0", "dst0", "none", slow));
    record.run("job-pause", json!({"id": "j"}));
    record.until("j", Some("paused"));
    record.run("block-job-cancel", json!({"device": "j", "force": true}));
    record.until("j", Some("concluded"));
    record.run("query-block-jobs", json!({}));
    record.run("block-job-dismiss", json!({"id": "j"}));
    record.told("j");
}

fn refusals(record: &mut Record) {
    let with = |more: Value| backup("src0", "dst0", "full", more);
    record.run("blockdev-backup", with(json!({})));
    record.run("blockdev-backup", with(json!({"job-id": "0"})));
    record.run("blockdev-backup", with(json!({"job-id": "j", "speed": -1})));
    for perf in [
        json!({"max-workers": 0}),
        json!({"max-chunk": -1}),
        json!({"max-chunk": 1}),
        json!({"min-cluster-size": 3}),
    ] {
        record.run(
            "blockdev-backup",
            with(json!({"job-id": "j", "x-perf": perf})),
        );
    }
    let named = json!({"job-id": "j", "filter-node-name": "src0"});
    record.run("blockdev-backup", with(named));
    record.run(
        "blockdev-backup",
        backup("src0", "src0", "full", json!({"job-id": "j"})),
    );
    // A target that a job has, ids in use, and nodes that a job keeps.
    let none = json!({"job-id": "j", "filter-node-name": "f"});
    record.run("blockdev-backup", backup("src0", "dst0", "none", none));
    record.run(
        "blockdev-backup",
        backup("src1", "dst0", "full", json!({"job-id": "k"})),
    );
    for node in ["src0", "dst0", "f"] {
        record.run("blockdev-del", json!({"node-name": node}));
    }
    let again = grouped(&[
        backup("src0", "dst1", "full", json!({"job-id": "a", "speed": 1})),
        backup("src1", "dst1", "full", json!({"job-id": "b", "speed": 1})),
    ]);
    record.run("transaction", again);
    record.run("job-cancel", json!({"id": "j"}));
    record.until("j", None);
    for command in ["pause", "resume", "cancel", "complete"] {
        record.run(&format!("block-job-{command}"), json!({"device": "nobody"}));
        record.run(&format!("job-{command}"), json!({"id": "nobody"}));
    }
    let abort = json!({"type": "abort", "data": {}});
    let properties = json!({"completion-mode": "grouped"});
    record.run(
        "transaction",
        json!({"actions": [abort], "properties": properties}),
    );
}

fn groups(record: &mut Record) {
    let a = |more: Value| backup("src0", "dst0", "full", more);
    let b = |sync: &str| backup("src1", "dst1", sync, json!({"job-id": "b"}));
    let manual = a(json!({"job-id": "a", "auto-finalize": false}));
    record.run("transaction", grouped(&[manual, b("full")]));
    record.until("b", Some("pending"));
    record.run("job-finalize", json!({"id": "b"}));
    record.until("a", None);
    record.told("a");
    record.told("b");
    // One that is cancelled takes others with it: one at work, and one that is done.
    for speed in [1, 0] {
        let first = a(json!({"job-id": "a", "speed": speed}));
        record.run("transaction", grouped(&[first, b("none")]));
        record.until("a", Some(if speed == 0 { "waiting" } else { "running" }));
        record.run("block-job-cancel", json!({"device": "b"}));
        record.until("a", None);
        record.until("b", None);
        record.told("a");
        record.told("b");
    }
    // Of an aborted transaction nothing is left but what was told.
    let begin = a(json!({"job-id": "a"}));
    let actions = json!([
        {"type": "blockdev-backup", "data": begin},
        {"type": "abort", "data": {}},
    ]);
    record.run("transaction", json!({"actions": actions}));
    record.run("query-jobs", json!({}));
    record.told("a");
}

fn record(program: Program, session: fn(&mut Record)) -> Vec<String> {
    let (_folder, _daemon, qmp) = start(program);
    let mut record = Record {
        qmp,
        lines: Vec::new(),
    };
    session(&mut record);
    record.lines
}

/// Sentences that differ, as docs/differences.md says.
fn as_ours(line: &str) -> String {
    line.replace(
        r#"{"class":"GenericError","desc":"Cannot find device"#,
        r#"{"class":"DeviceNotFound","desc":"Cannot find device"#,
    )
}

#[test]
fn sessions_are_as_with_qemu_storage_daemon() {
    let Some(()) = need(&["qemu-storage-daemon", "qemu-img", "qemu-io"]) else {
        return;
    };
    for session in [verbs, refusals, groups] {
        let theirs = record(Program::QemuStorageDaemon, session);
        let ours = record(Program::Qblockd, session);
        for (theirs, ours) in theirs.iter().zip(&ours) {
            let mut theirs = as_ours(theirs);
            // Told by QEMU of a job that is refused, too.
            if ours.ends_with(": ") {
                theirs = ours.clone();
            }
            assert_eq!(theirs, *ours);
        }
        assert_eq!(theirs.len(), ours.len());
    }
}
