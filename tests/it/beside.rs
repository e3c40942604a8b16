//! Several clients at once: who only asks does not wait for a command of somebody else, and what he is told agrees with his events.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::harness::{Daemon, Program, Qmp};

const DRIVES: usize = 60;

/// Jobs, one after the other.
const JOBS: usize = 40;

/// The file that each drive shows.
fn files(qmp: &mut Qmp) -> Vec<String> {
    let drives = qmp.ok("query-block", json!({}));
    let drives = drives.as_array().unwrap().iter();
    let file = |drive: &Value| drive["inserted"]["file"].as_str().unwrap().to_owned();
    drives.map(file).collect()
}

#[test]
fn clients_are_answered_while_a_transaction_over_many_disks_is_under_way() {
    let drives = (0..DRIVES).map(|at| format!("id=d{at},file=base{at}.qcow2,size=1M"));
    let arguments: Vec<String> = drives.flat_map(|drive| ["--drive".into(), drive]).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut daemon = Daemon::start(Program::Qblockd, &arguments);
    let mut worker = daemon.qmp();
    let mut watcher = daemon.qmp();
    let actions = (0..DRIVES).map(|at| {
        json!({"type": "blockdev-snapshot-sync", "data": {
            "device": format!("d{at}"), "snapshot-file": format!("over{at}.qcow2"),
        }})
    });
    let actions: Vec<Value> = actions.collect();
    let work = std::thread::spawn(move || {
        worker.ok("transaction", json!({"actions": actions}));
        worker
    });
    let (mut before, mut during) = (0, 0);
    loop {
        let shown = files(&mut watcher);
        assert_eq!(shown.len(), DRIVES);
        let led = shown.iter().filter(|file| file.starts_with("over")).count();
        assert!(led == 0 || led == DRIVES, "half a transaction: {shown:?}");
        if led == DRIVES {
            break;
        }
        before += 1;
        // Somebody who has just come, as programs do that look after others.
        assert_eq!(daemon.qmp().ok("query-status", json!({}))["running"], true);
        watcher.ok("query-blockstats", json!({}));
        watcher.ok("query-jobs", json!({}));
        during += usize::from(!work.is_finished());
    }
    work.join().unwrap();
    assert!(
        during > 0,
        "{before} rounds, {during} of them beside the transaction"
    );
    assert!(daemon.terminate().success());
}

/// What the events so far say of jobs that there are.
#[derive(Default)]
struct Told(HashMap<String, String>);

impl Told {
    fn hear(&mut self, events: Vec<Value>) {
        for event in events {
            if event["event"] != "JOB_STATUS_CHANGE" {
                continue;
            }
            let text = |key: &str| event["data"][key].as_str().unwrap().to_owned();
            match text("status").as_str() {
                "null" => self.0.remove(&text("id")),
                status => self.0.insert(text("id"), status.to_owned()),
            };
        }
    }
}

#[test]
fn an_answer_shows_what_the_events_before_it_say_and_nothing_newer() {
    let mut daemon = Daemon::start(Program::Qblockd, &["--drive", "id=d,file=d.qcow2,size=1M"]);
    let mut worker = daemon.qmp();
    let mut watcher = daemon.qmp();
    let work = std::thread::spawn(move || {
        for job in 0..JOBS {
            let id = format!("j{job}");
            let backup = json!({"job-id": id, "device": "d", "target": format!("{id}.qcow2"), "sync": "full"});
            worker.ok("drive-backup", backup);
            worker.events_until(|event| {
                let data = &event["data"];
                data["id"] == id.as_str() && data["status"] == "null"
            });
        }
    });
    let (mut told, mut seen) = (Told::default(), 0);
    let mut is_last = false;
    while !is_last {
        is_last = work.is_finished();
        let jobs = watcher.ok("query-jobs", json!({}));
        told.hear(std::mem::take(&mut watcher.events));
        let jobs = jobs.as_array().unwrap().iter();
        let text = |job: &Value, key: &str| job[key].as_str().unwrap().to_owned();
        let shown: HashMap<_, _> = jobs
            .map(|job| (text(job, "id"), text(job, "status")))
            .collect();
        assert_eq!(shown, told.0);
        seen += shown.len();
        std::thread::sleep(Duration::from_micros(200));
    }
    work.join().unwrap();
    assert!(seen > 0, "no job was seen");
}
