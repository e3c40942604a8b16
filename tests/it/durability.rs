//! What is on disk when things go wrong: a killed daemon, a full disk, an end under load, a transaction that fails.
//!
//! `QBLOCKD_CRASH_ROUNDS` is how often each image of the crash test is killed (5 if absent), `QBLOCKD_CRASH_SEED` the
//! seed of its load; the seed is printed.

mod full;
mod load;
mod transactions;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use super::harness::{self, Daemon, Program, Qmp};
use load::{BLOCK, Clock, History, NEVER, Writer};

const SIZE: usize = 16 << 20;

/// Connections that write at a time, each to its own part of the disk.
const WRITERS: usize = 2;

/// Snapshots that are kept at a time.
const SNAPSHOTS: usize = 4;

/// A snapshot whose creation was asked for.
#[derive(Debug, Clone)]
struct Snapshot {
    asked: u64,
    answered: u64,
    deletion_asked: bool,
    deletion_answered: bool,
    /// Its content, once it has been seen.
    content: Option<Vec<u8>>,
}

type Snapshots = BTreeMap<String, Snapshot>;

/// An image under load, with all that is known of it.
struct Victim {
    folder: tempfile::TempDir,
    clock: Clock,
    histories: Vec<History>,
    snapshots: Snapshots,
    random: fastrand::Rng,
    /// Clusters that were leaked after each kill.
    leaks: Vec<u64>,
    /// Writes and snapshot commands that were acknowledged.
    acknowledged: (usize, usize),
}

/// How the load ends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Kill,
    Terminate,
    Quit,
}

impl Victim {
    fn new(options: &str, seed: u64) -> Victim {
        let folder = tempfile::tempdir().unwrap();
        harness::tool(
            folder.path(),
            &format!("qemu-img create -q -f qcow2 {options} disk.qcow2 {SIZE}"),
        );
        let part = vec![0; SIZE / WRITERS];
        Victim {
            folder,
            clock: Clock::new(),
            histories: (0..WRITERS).map(|_| History::new(&part)).collect(),
            snapshots: Snapshots::new(),
            random: fastrand::Rng::with_seed(seed),
            leaks: Vec::new(),
            acknowledged: (0, 0),
        }
    }

    fn start(&self) -> Daemon {
        Daemon::start_in(
            Program::Qblockd,
            self.folder.path(),
            &[
                "--drive",
                "id=disk,file=disk.qcow2,discard=unmap",
                "--nbd-server",
                "unix:nbd.sock",
            ],
        )
    }

    /// Runs the daemon under load up to its end, and checks what the image is then.
    fn round(&mut self, end: End) {
        let mut daemon = self.start();
        if !self.leaks.is_empty() {
            self.see(&daemon);
        }
        let lasts = Duration::from_millis(self.random.u64(0..300));
        let stop = AtomicBool::new(false);
        let (clock, socket) = (&self.clock, daemon.path("nbd.sock"));
        let mut qmp = Some(daemon.qmp());
        std::thread::scope(|scope| {
            for (at, history) in self.histories.iter_mut().enumerate() {
                let writer = Writer {
                    socket: socket.clone(),
                    export: "disk",
                    clock,
                    stop: &stop,
                    random: self.random.fork(),
                };
                scope.spawn(move || writer.run(at * SIZE / WRITERS / BLOCK, history));
            }
            let mut churn = Churn {
                qmp: qmp.take().unwrap(),
                clock,
                stop: &stop,
                random: self.random.fork(),
            };
            let snapshots = &mut self.snapshots;
            scope.spawn(move || churn.run(snapshots));
            std::thread::sleep(lasts);
            match end {
                End::Kill => daemon.kill(),
                End::Terminate => assert!(daemon.terminated().success()),
                End::Quit => {
                    daemon.qmp().ok("quit", json!({}));
                    assert!(daemon.exited().success());
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        self.acknowledged.0 += self
            .histories
            .iter()
            .map(History::acknowledged)
            .sum::<usize>();
        let leaks = self.check_image(end);
        assert!(
            end == End::Kill || leaks == 0,
            "{leaks} leaks after {end:?}"
        );
        self.leaks.push(leaks);
        self.check_snapshots();
    }

    /// Nothing is wrong according to qemu-img; gives back the leaks.
    ///
    /// A kill can leave an image whose header says that its refcounts are to be rebuilt: qemu-img must be able to. It can also leave
    /// COPIED flags that do not agree with a count, which qemu-img calls errors. Two kinds are harmless: the count is
    /// too high, so that it is right when the leaks are repaired, or the flag is missing, which costs a copy. Any other is not.
    fn check_image(&self, end: End) -> u64 {
        let folder = self.folder.path();
        let image = std::fs::read(folder.join("disk.qcow2")).unwrap();
        let version = u32::from_be_bytes(image[4..8].try_into().unwrap());
        if version >= 3 && image[79] & 1 != 0 {
            assert_eq!(end, End::Kill, "not settled");
            let line = "cp disk.qcow2 repaired.qcow2; qemu-img check -q -r all repaired.qcow2; qemu-img check -q repaired.qcow2";
            harness::tool(folder, line);
            println!("refcounts to be rebuilt");
            return 0;
        }
        let report = |image: &str| {
            let check = Command::new("qemu-img")
                .args(["check", "--output=json", image])
                .current_dir(folder)
                .output()
                .unwrap();
            let report: Value = serde_json::from_slice(&check.stdout).unwrap();
            (report, String::from_utf8_lossy(&check.stderr).into_owned())
        };
        let (found, text) = report("disk.qcow2");
        let count = |key: &str| found.get(key).and_then(Value::as_u64).unwrap_or(0);
        assert_eq!(count("check-errors"), 0, "{text}");
        if count("corruptions") > 0 {
            assert_eq!(end, End::Kill, "{text}");
            let line =
                "cp disk.qcow2 repaired.qcow2; qemu-img check -q -r leaks repaired.qcow2 || true";
            harness::tool(folder, line);
            let (_, text) = report("repaired.qcow2");
            let is_missing_flag = |line: &&str| {
                line.starts_with("ERROR OFLAG_COPIED") && line.ends_with("refcount=1")
            };
            let wrong: Vec<&str> = text
                .lines()
                .filter(|line| line.starts_with("ERROR") && !is_missing_flag(line))
                .collect();
            assert!(wrong.is_empty(), "{wrong:#?}");
            println!("{} COPIED flags and counts disagree", count("corruptions"));
        }
        count("leaks")
    }

    /// Every acknowledged snapshot is there and holds what it must; what became of the others is noted.
    fn check_snapshots(&mut self) {
        let there = snapshot_names(self.folder.path());
        for name in &there {
            assert!(self.snapshots.contains_key(name), "{name} was never taken");
        }
        let known = std::mem::take(&mut self.snapshots);
        for (name, mut snapshot) in known {
            let is_there = there.contains(&name);
            if snapshot.deletion_answered {
                assert!(!is_there, "{name} has come back");
                self.acknowledged.1 += 2;
                continue;
            }
            let may_be_gone = snapshot.deletion_asked || snapshot.answered == NEVER;
            assert!(is_there || may_be_gone, "{name} is lost: {there:?}");
            if !is_there {
                continue;
            }
            self.acknowledged.1 += usize::from(snapshot.answered < NEVER);
            let content = snapshot_content(self.folder.path(), &name);
            match &snapshot.content {
                Some(seen) => assert!(*seen == content, "{name} has changed"),
                None => self.check_parts(&name, &content, |_| (snapshot.asked, snapshot.answered)),
            }
            snapshot.content = Some(content);
            snapshot.answered = snapshot.answered.min(NEVER - 1);
            snapshot.deletion_asked = false;
            self.snapshots.insert(name, snapshot);
        }
    }

    fn check_parts(&self, name: &str, content: &[u8], times: impl Fn(&History) -> (u64, u64)) {
        assert_eq!(content.len(), SIZE, "{name}");
        for (history, part) in self.histories.iter().zip(content.chunks(SIZE / WRITERS)) {
            let (from, to) = times(history);
            if let Err(complaint) = history.check(part, from, to) {
                panic!("{name}: {complaint}");
            }
        }
    }

    /// Reads the disk after a kill: every flushed write is there. From now on it is what it is.
    fn see(&mut self, daemon: &Daemon) {
        let content = load::content(&daemon.path("nbd.sock"), "disk");
        self.check_parts("the disk", &content, |history| (history.flushed, NEVER));
        self.histories = content.chunks(SIZE / WRITERS).map(History::new).collect();
    }
}

/// What a command has done: all of it, or nothing.
#[derive(Debug, Clone, Copy)]
enum Done {
    Yes,
    Refused,
}

/// Snapshots taken and deleted while the guest writes.
struct Churn<'a> {
    qmp: Qmp,
    clock: &'a Clock,
    stop: &'a AtomicBool,
    random: fastrand::Rng,
}

impl Churn<'_> {
    fn run(&mut self, snapshots: &mut Snapshots) {
        while !self.stop.load(Ordering::Relaxed) && self.step(snapshots).is_some() {
            std::thread::sleep(Duration::from_millis(self.random.u64(0..10)));
        }
    }

    /// One command; nothing if the daemon ended before it answered.
    fn step(&mut self, snapshots: &mut Snapshots) -> Option<()> {
        let mut kept: Vec<String> = snapshots
            .iter()
            .filter(|(_, snapshot)| !snapshot.deletion_asked)
            .map(|(name, _)| name.clone())
            .collect();
        if kept.len() >= SNAPSHOTS {
            let name = kept.swap_remove(self.random.usize(..kept.len()));
            let snapshot = snapshots.get_mut(&name)?;
            snapshot.deletion_asked = true;
            match self.command("blockdev-snapshot-delete-internal-sync", &name)? {
                Done::Yes => snapshot.deletion_answered = true,
                Done::Refused => snapshot.deletion_asked = false,
            }
            return Some(());
        }
        let asked = self.clock.tick();
        let name = format!("s{asked}");
        let snapshot = snapshots.entry(name.clone()).or_insert(Snapshot {
            asked,
            answered: NEVER,
            deletion_asked: false,
            deletion_answered: false,
            content: None,
        });
        match self.command("blockdev-snapshot-internal-sync", &name)? {
            Done::Yes => snapshot.answered = self.clock.tick(),
            Done::Refused => {
                snapshots.remove(&name);
            }
        }
        Some(())
    }

    fn command(&mut self, command: &str, name: &str) -> Option<Done> {
        let arguments = json!({"device": "disk", "name": name});
        let reply = self.qmp.try_execute(command, arguments)?;
        if reply.get("return").is_some() {
            return Some(Done::Yes);
        }
        assert_eq!(
            reply["error"]["desc"], "The daemon is shutting down",
            "{command} {name}"
        );
        Some(Done::Refused)
    }
}

/// The names of an image's snapshots.
fn snapshot_names(folder: &Path) -> Vec<String> {
    let info = harness::tool(folder, "qemu-img info -f qcow2 --output=json disk.qcow2");
    let info: Value = serde_json::from_str(&info).unwrap();
    let snapshots = info["snapshots"].as_array().cloned().unwrap_or_default();
    let name = |snapshot: &Value| snapshot["name"].as_str().unwrap().to_owned();
    snapshots.iter().map(name).collect()
}

/// What a snapshot holds, as qemu-img reads it.
fn snapshot_content(folder: &Path, name: &str) -> Vec<u8> {
    let line =
        format!("qemu-img convert -f qcow2 -l snapshot.name={name} -O raw disk.qcow2 snapshot.raw");
    harness::tool(folder, &line);
    std::fs::read(folder.join("snapshot.raw")).unwrap()
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect(name))
}

/// Geometries under load: small clusters for much metadata, the default, and refcounts of both kinds of width.
const IMAGES: &[&str] = &[
    "-o cluster_size=4k,refcount_bits=8",
    "",
    "-o compat=0.10,cluster_size=16k",
    "-o lazy_refcounts=on,cluster_size=512,refcount_bits=64",
];

#[test]
fn a_killed_daemon_keeps_every_flushed_write_and_every_snapshot() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    let rounds = setting("QBLOCKD_CRASH_ROUNDS", 5);
    let seed = setting("QBLOCKD_CRASH_SEED", fastrand::u64(..));
    println!("QBLOCKD_CRASH_SEED={seed}");
    for options in IMAGES {
        let mut victim = Victim::new(options, seed);
        for _ in 0..rounds {
            victim.round(End::Kill);
        }
        // The last one is reopened too, ends in order, and nothing is left over but what the kills leaked.
        let mut daemon = victim.start();
        victim.see(&daemon);
        assert!(daemon.terminated().success());
        let left = victim.check_image(End::Kill);
        victim.check_snapshots();
        let (writes, snapshots) = victim.acknowledged;
        println!(
            "[{options}] {writes} writes of blocks and {snapshots} snapshot commands acknowledged; \
             clusters leaked after each kill: {:?}, in the end: {left}",
            victim.leaks
        );
        assert!(writes > 0, "a load");
    }
}

#[test]
fn an_end_under_load_keeps_everything_and_leaks_nothing() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    let seed = setting("QBLOCKD_CRASH_SEED", fastrand::u64(..));
    println!("QBLOCKD_CRASH_SEED={seed}");
    for (options, end) in IMAGES
        .iter()
        .zip([End::Terminate, End::Quit, End::Quit, End::Terminate])
    {
        let mut victim = Victim::new(options, seed);
        for _ in 0..2 {
            victim.round(end);
            // What was acknowledged is there without a flush.
            let mut daemon = victim.start();
            let content = load::content(&daemon.path("nbd.sock"), "disk");
            victim.check_parts("the disk", &content, |_| (NEVER, NEVER));
            assert!(daemon.terminated().success());
        }
        assert!(victim.acknowledged.0 > 0, "a load");
    }
}
