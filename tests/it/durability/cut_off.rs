//! A daemon that is killed in transactions over three disks under load: after the restart each has happened on all of them, or on
//! none, and what it took shows one moment of the guest.
//!
//! `QBLOCKD_TRANSACTION_KILLS` is how often (10 if absent), `QBLOCKD_CRASH_SEED` the seed.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::consistency::{
    BLOCK, DISK_BYTES, DISKS, NUMBERS, WRITERS, contents, place, prefix,
};
use super::super::guest::{Guest, Request};
use super::super::harness::{self, Daemon, Program, Qmp, tool};
use super::setting;

/// What is known over all kills.
struct Victim {
    folder: tempfile::TempDir,
    random: fastrand::Rng,
    /// How long a transaction takes, so that kills hit all of it.
    usual: Duration,
    /// How many snapshots there have been.
    taken: u64,
    /// What restarts have said.
    outcomes: BTreeMap<String, usize>,
    /// How transactions ended that were cut off.
    happened: [usize; 2],
}

/// A writer puts numbers on the disks, in turn.
#[derive(Default)]
struct Progress {
    sent: AtomicU64,
    answered: AtomicU64,
}

/// Ends with the daemon. Whatever an earlier kill has left is written over first.
fn write_numbers(socket: &Path, writer: usize, first: u64, progress: &Progress, stop: &AtomicBool) {
    let connect = |(disk, _): (&str, &str)| Guest::connect(socket, disk).expect("an export");
    let mut guests = DISKS.map(connect);
    for number in first.. {
        let (disk, offset) = place(writer, number);
        let data = number.to_be_bytes().repeat(BLOCK / 8);
        progress.sent.store(number, Ordering::SeqCst);
        let written = guests[disk].run(&Request::Write { offset, data });
        if written.is_err() || stop.load(Ordering::SeqCst) {
            return;
        }
        assert_eq!(written.ok(), Some(0));
        progress.answered.store(number, Ordering::SeqCst);
    }
}

fn action(kind: &str, disk: &str, name: &str) -> Value {
    json!({"type": kind, "data": {"device": disk, "name": name}})
}

/// A transaction that takes a snapshot of each disk, and deletes and reverts to others besides.
fn transaction(name: &str, old: Option<&str>) -> Value {
    let mut actions = Vec::new();
    for (disk, _) in DISKS {
        actions.push(action("blockdev-snapshot-internal-sync", disk, name));
    }
    // What the guest sees stays the same.
    actions.push(action("x-blockdev-snapshot-revert", "b", name));
    for (disk, _) in DISKS {
        let kind = "x-blockdev-snapshot-delete-internal-sync";
        actions.extend(old.map(|old| action(kind, disk, old)));
    }
    json!({"actions": actions})
}

/// The snapshots of each disk, as qemu-img sees them.
fn names(folder: &Path) -> Vec<Vec<String>> {
    let of = |(disk, _): (&str, &str)| {
        let line = format!("qemu-img info -f qcow2 --output=json {disk}.qcow2");
        let info: Value = serde_json::from_str(&tool(folder, &line)).unwrap();
        let snapshots = info["snapshots"].as_array().cloned().unwrap_or_default();
        let name = |snapshot: &Value| snapshot["name"].as_str().unwrap().to_owned();
        snapshots.iter().map(name).collect()
    };
    DISKS.map(of).to_vec()
}

/// Waits until a journal says that everything is to happen.
fn wait_for_commit(state: &Path, until: Instant) {
    let says_so = |path: &Path| {
        let text = std::fs::read(path).unwrap_or_default();
        String::from_utf8_lossy(&text).contains(r#"{"record":"commit""#)
    };
    while Instant::now() < until {
        let journals = std::fs::read_dir(state).unwrap().flatten();
        if journals.into_iter().any(|journal| says_so(&journal.path())) {
            return;
        }
    }
}

impl Victim {
    fn start(&self) -> Daemon {
        let mut arguments = ["--state-dir", "state", "--nbd-server", "unix:nbd.sock"]
            .map(str::to_owned)
            .to_vec();
        for (disk, _) in DISKS {
            let drive = format!("id={disk},file={disk}.qcow2,discard=unmap");
            arguments.extend(["--drive".to_owned(), drive]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Daemon::start_in(Program::Qblockd, self.folder.path(), &arguments)
    }

    /// A start behind a kill: what it says of the transaction that was cut off.
    fn restart(&mut self) -> (Daemon, Qmp) {
        let mut daemon = self.start();
        let mut qmp = daemon.qmp();
        let exports = qmp.ok("query-block-exports", json!({}));
        assert_eq!(exports.as_array().map(Vec::len), Some(DISKS.len()));
        for event in std::mem::take(&mut qmp.events) {
            assert_eq!(event["event"], "X_TRANSACTION_RECOVERED", "{event}");
            let outcome = event["data"]["outcome"].as_str().unwrap().to_owned();
            assert_ne!(outcome, "degraded", "{event}");
            *self.outcomes.entry(outcome).or_default() += 1;
        }
        // The events have been seen.
        let left = daemon.tool("ls state");
        assert_eq!(left, "", "journals are left");
        (daemon, qmp)
    }

    /// Kills the daemon in a transaction under load, and looks at what there is after a restart.
    fn round(&mut self) {
        let (mut daemon, mut qmp) = self.restart();
        let socket = daemon.path("nbd.sock");
        let progress: Vec<Progress> = (0..WRITERS).map(|_| Progress::default()).collect();
        let stop = AtomicBool::new(false);
        // All places are written anew before anything is looked at.
        let first = NUMBERS * (1 + self.random.u64(0..1000));
        let (name, least) = thread::scope(|scope| {
            for (writer, progress) in progress.iter().enumerate() {
                let (socket, stop) = (&socket, &stop);
                scope.spawn(move || write_numbers(socket, writer, first, progress, stop));
            }
            let is_full = || {
                let answered = |each: &Progress| each.answered.load(Ordering::SeqCst);
                progress.iter().all(|each| answered(each) > first + NUMBERS)
            };
            harness::until(is_full, "disks that are written over");
            let before = format!("cut{}", self.taken);
            self.taken += 1;
            let begin = Instant::now();
            qmp.ok("transaction", transaction(&before, None));
            self.usual = begin.elapsed();
            let name = format!("cut{}", self.taken);
            self.taken += 1;
            let answered = progress
                .iter()
                .map(|each| each.answered.load(Ordering::SeqCst));
            let least: Vec<u64> = answered.collect();
            let line =
                json!({"execute": "transaction", "arguments": transaction(&name, Some(&before))});
            qmp.send(&line.to_string());
            let sent = Instant::now();
            match self.random.bool() {
                true => thread::sleep(self.usual.mul_f64(self.random.f64() * 1.3)),
                // Most kills of the other kind miss the moment between the first header and the last.
                false => {
                    wait_for_commit(&daemon.path("state"), sent + 3 * self.usual);
                    thread::sleep(self.usual.mul_f64(self.random.f64() * 0.2));
                }
            }
            daemon.kill();
            stop.store(true, Ordering::SeqCst);
            (name, least)
        });
        drop(qmp);
        let (mut daemon, qmp) = self.restart();
        drop(qmp);
        assert!(daemon.terminated().success());
        // A kill may leave leaks, and in version 2 flags that no data depends on.
        for (disk, _) in DISKS {
            daemon.tool(&format!("qemu-img check -q -r all -f qcow2 {disk}.qcow2"));
        }
        self.check(&name, &least, &progress);
    }

    fn check(&mut self, name: &str, least: &[u64], progress: &[Progress]) {
        let folder = self.folder.path();
        let names = names(folder);
        assert!(
            names.iter().all(|one| *one == names[0]),
            "half a transaction: {names:?}"
        );
        let there = names[0].last().expect("one of the two snapshots");
        assert_eq!(
            names[0].len(),
            1,
            "the old one, or the new one in its place: {names:?}"
        );
        let happened = there == name;
        self.happened[usize::from(happened)] += 1;
        let disks = contents(folder, Some(there));
        for (writer, least) in least.iter().enumerate() {
            let last = prefix(&disks, writer).unwrap_or_else(|text| panic!("{there}: {text}"));
            let most = progress[writer].sent.load(Ordering::SeqCst);
            let range = match happened {
                true => *least..=most,
                // One more may have been under way.
                false => 0..=*least + 1,
            };
            assert!(range.contains(&last), "{there}: {last} is not in {range:?}");
        }
    }
}

#[test]
fn a_daemon_killed_in_transactions_leaves_each_of_them_done_or_not_done() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    let kills = setting("QBLOCKD_TRANSACTION_KILLS", 10);
    let seed = setting("QBLOCKD_CRASH_SEED", fastrand::u64(..));
    println!("QBLOCKD_CRASH_SEED={seed}");
    let folder = tempfile::tempdir().unwrap();
    for (disk, options) in DISKS {
        let line = format!("qemu-img create -q -f qcow2 -o {options} {disk}.qcow2 {DISK_BYTES}");
        tool(folder.path(), &line);
    }
    let mut victim = Victim {
        folder,
        random: fastrand::Rng::with_seed(seed),
        usual: Duration::ZERO,
        taken: 0,
        outcomes: BTreeMap::new(),
        happened: [0; 2],
    };
    for _ in 0..kills {
        victim.round();
        for (disk, _) in DISKS {
            let line = format!(
                "for s in $(qemu-img snapshot -l {disk}.qcow2 | awk 'NR>2 {{print $2}}'); \
                                do qemu-img snapshot -d $s {disk}.qcow2; done"
            );
            tool(victim.folder.path(), &line);
        }
    }
    let [not, done] = victim.happened;
    println!(
        "{kills} kills: {not} transactions have not happened, {done} have; restarts said {:?}",
        victim.outcomes
    );
}
