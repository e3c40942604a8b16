//! A daemon that is killed in transactions over three disks under load: after the restart each has happened on all of them, or on
//! none, and what it took shows one moment of the guest.
//!
//! `QBLOCKD_TRANSACTION_KILLS` is how often (12 if absent), `QBLOCKD_CRASH_SEED` the seed.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::super::consistency::{
    DISK_BYTES, DISKS, NUMBERS, Progress, Shown, Stopper, WRITERS, advance, answered, has_flushed,
    sent, shows_one_moment, write_numbers,
};
use super::super::harness::{self, Daemon, Program, Qmp, setting, tool};

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

/// What a transaction does to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    /// Without a revert, which makes guests wait until all is decided.
    Snapshot,
    Internal,
    External,
    Backup,
}

/// What transactions do to the three disks.
const KINDS: [[Cut; 3]; 6] = [
    [Cut::Internal, Cut::Internal, Cut::Internal],
    [Cut::Snapshot, Cut::External, Cut::External],
    [Cut::External, Cut::External, Cut::External],
    [Cut::Snapshot, Cut::Backup, Cut::External],
    [Cut::External, Cut::Internal, Cut::External],
    [Cut::Backup, Cut::Internal, Cut::External],
];

fn action(kind: &str, disk: &str, name: &str) -> Value {
    json!({"type": kind, "data": {"device": disk, "name": name}})
}

/// The file that a cut makes.
fn file(disk: &str, name: &str) -> String {
    format!("{disk}-{name}.qcow2")
}

/// A transaction that cuts all disks, and deletes older snapshots besides.
fn transaction(kind: [Cut; 3], name: &str, old: Option<&str>) -> Value {
    let mut actions = Vec::new();
    for (disk, _) in DISKS {
        let kind = "x-blockdev-snapshot-delete-internal-sync";
        actions.extend(old.map(|old| action(kind, disk, old)));
    }
    for ((disk, _), cut) in DISKS.into_iter().zip(kind) {
        match cut {
            Cut::Snapshot => {
                actions.push(action("blockdev-snapshot-internal-sync", disk, name));
            }
            Cut::Internal => {
                actions.push(action("blockdev-snapshot-internal-sync", disk, name));
                // What the guest sees stays the same.
                actions.push(action("x-blockdev-snapshot-revert", disk, name));
            }
            Cut::External => actions.push(json!({"type": "blockdev-snapshot-sync", "data":
                {"device": disk, "snapshot-file": file(disk, name)}})),
            Cut::Backup => actions.push(json!({"type": "drive-backup", "data":
                {"device": disk, "target": file(disk, name), "sync": "full", "job-id": name}})),
        }
    }
    json!({"actions": actions})
}

/// The snapshots of a disk, as qemu-img sees them.
fn names(folder: &Path, disk: &str) -> Vec<String> {
    let line = format!("qemu-img info -f qcow2 --output=json {disk}.qcow2");
    let info: Value = serde_json::from_str(&tool(folder, &line)).unwrap();
    let snapshots = info["snapshots"].as_array().cloned().unwrap_or_default();
    let name = |snapshot: &Value| snapshot["name"].as_str().unwrap().to_owned();
    snapshots.iter().map(name).collect()
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
            let actions = event["data"]["actions"].as_array().unwrap();
            assert!(!actions.is_empty(), "{event}");
            for action in actions {
                self.check_action(&outcome, action);
            }
            *self.outcomes.entry(outcome).or_default() += 1;
        }
        // The events have been seen.
        let left = daemon.tool("ls state");
        assert_eq!(left, "", "journals are left");
        (daemon, qmp)
    }

    /// Whether an action of a report says what there is.
    fn check_action(&self, outcome: &str, action: &Value) {
        let is_backup = action["action"] == "drive-backup";
        let expected = match outcome {
            "removed" => "undone",
            _ if is_backup => "cut-off",
            _ => "done",
        };
        assert_eq!(action["result"], expected, "{action}");
        let path = |member: &str| action[member].as_str().map(Path::new);
        let disk = action["device"].as_str().unwrap();
        let image = self.folder.path().join(format!("{disk}.qcow2"));
        assert_eq!(path("image"), Some(&*image.canonicalize().unwrap()));
        if let Some(file) = path("filename") {
            assert_eq!(file.exists(), expected != "undone", "{action}");
        }
        let is_snapshot = action["snapshot"].is_string();
        assert_ne!(is_snapshot, action["filename"].is_string(), "{action}");
    }

    /// Kills the daemon in a transaction under load, and looks at what there is after a restart.
    fn round(&mut self, kind: [Cut; 3]) {
        tool(self.folder.path(), "rm -f *.qcow2");
        // Guests of an image of version 2 wait until all is decided, and those of all others with them.
        let version = match kind.contains(&Cut::Snapshot) {
            true => ",compat=1.1",
            false => "",
        };
        for (disk, options) in DISKS {
            let line = format!(
                "qemu-img create -q -f qcow2 -o {options}{version} {disk}.qcow2 {DISK_BYTES}"
            );
            tool(self.folder.path(), &line);
        }
        let (mut daemon, mut qmp) = self.restart();
        let socket = daemon.path("nbd.sock");
        let progress: Vec<Progress> = (0..WRITERS).map(|_| Progress::default()).collect();
        let stop = AtomicBool::new(false);
        // All places are written anew before anything is looked at.
        let first = NUMBERS * (1 + self.random.u64(0..1000));
        let (name, least) = thread::scope(|scope| {
            for (writer, progress) in progress.iter().enumerate() {
                let (socket, stop) = (&socket, &stop);
                // It ends with the daemon.
                scope.spawn(move || drop(write_numbers(socket, writer, first, progress, stop)));
            }
            // A failed assertion below must not leave the writers running: the scope waits for them.
            let _stopper = Stopper(&stop);
            let has_begun = || answered(&progress).iter().all(|number| *number > 0);
            harness::until(has_begun, "writers");
            // Whatever an earlier kill has left is written over first.
            advance(&progress, NUMBERS);
            let before = format!("cut{}", self.taken);
            self.taken += 1;
            let begin = Instant::now();
            qmp.ok("transaction", transaction(KINDS[0], &before, None));
            self.usual = begin.elapsed();
            let name = format!("cut{}", self.taken);
            self.taken += 1;
            let least = answered(&progress);
            // Files take longer.
            if kind != KINDS[0] {
                self.usual *= 4;
            }
            let arguments = transaction(kind, &name, Some(&before));
            let line = json!({"execute": "transaction", "arguments": arguments});
            qmp.send(&line.to_string());
            let sent = Instant::now();
            match self.random.bool() {
                true => thread::sleep(self.usual.mul_f64(self.random.f64() * 1.3)),
                // Most kills of the other kind miss the moment between the first header and the last.
                false => {
                    wait_for_commit(&daemon.path("state"), sent + 3 * self.usual);
                    thread::sleep(Duration::from_micros(self.random.u64(0..5000)));
                }
            }
            daemon.kill();
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
        self.check(kind, (&name, first), &least, &progress);
    }

    fn check(
        &mut self,
        kind: [Cut; 3],
        (name, first): (&str, u64),
        least: &[u64],
        progress: &[Progress],
    ) {
        let folder = self.folder.path();
        // Of each disk: whether the older snapshot is gone, and the cut is there.
        let parts = DISKS.into_iter().zip(kind).flat_map(|((disk, _), cut)| {
            let mut names = names(folder, disk);
            let is_there = match cut {
                Cut::Snapshot | Cut::Internal => names.iter().any(|other| other == name),
                Cut::External | Cut::Backup => folder.join(file(disk, name)).exists(),
            };
            names.retain(|other| other != name);
            [names.is_empty(), is_there]
        });
        let parts: Vec<bool> = parts.collect();
        let happened = parts[0];
        assert!(
            parts.iter().all(|part| *part == happened),
            "half a transaction: {kind:?} {parts:?}"
        );
        self.happened[usize::from(happened)] += 1;
        for (number, ((disk, _), cut)) in DISKS.into_iter().zip(kind).enumerate() {
            let top = match happened && cut == Cut::External {
                true => file(disk, name),
                false => format!("{disk}.qcow2"),
            };
            let line = format!("qemu-img convert -f qcow2 -O raw {top} {disk}.raw");
            tool(folder, &line);
            let bytes = std::fs::read(folder.join(format!("{disk}.raw"))).unwrap();
            if let Err(problem) = has_flushed((number, &bytes), first, progress) {
                panic!("{kind:?}, happened {happened}: {problem}");
            }
        }
        // A backup that was cut off is not done.
        if !happened || kind.contains(&Cut::Backup) {
            return;
        }
        let content = |((disk, _), cut): ((&str, &str), Cut)| {
            let which = match cut {
                Cut::Snapshot | Cut::Internal => format!("-l snapshot.name={name}"),
                // What is below the new layer.
                Cut::External | Cut::Backup => String::new(),
            };
            let line = format!("qemu-img convert -f qcow2 -O raw {which} {disk}.qcow2 {disk}.raw");
            tool(folder, &line);
            std::fs::read(folder.join(format!("{disk}.raw"))).unwrap()
        };
        let contents: Vec<Vec<u8>> = DISKS.into_iter().zip(kind).map(content).collect();
        let shown = contents.iter().map(|bytes| &bytes[..]).enumerate();
        let shown: Vec<Shown<'_>> = shown.collect();
        if let Err(problem) = shows_one_moment(&shown, least, &sent(progress)) {
            panic!("{kind:?}: {problem}");
        }
    }
}

#[test]
fn a_daemon_killed_in_transactions_leaves_each_of_them_done_or_not_done() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    let kills = setting("QBLOCKD_TRANSACTION_KILLS", 12);
    let seed = harness::seed();
    let mut victim = Victim {
        folder: tempfile::tempdir().unwrap(),
        random: fastrand::Rng::with_seed(seed),
        usual: Duration::ZERO,
        taken: 0,
        outcomes: BTreeMap::new(),
        happened: [0; 2],
    };
    for kill in 0..kills {
        victim.round(KINDS[kill as usize % KINDS.len()]);
    }
    let [not, done] = victim.happened;
    println!(
        "{kills} kills: {not} transactions have not happened, {done} have; restarts said {:?}",
        victim.outcomes
    );
}
