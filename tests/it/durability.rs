//! What is on disk when things go wrong: a killed daemon, a full disk, an end under load, a transaction that fails.
//!
//! `QBLOCKD_CRASH_ROUNDS` is how often each image of the crash test is killed (5 if absent), `QBLOCKD_CRASH_SEED` the
//! seed of its load; the seed is printed.

mod churn;
mod cut_off;
pub(crate) mod full;
mod load;
mod many;
mod temporary;
mod transactions;
mod unsettled;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use super::harness::{self, Daemon, Program, setting};
use churn::{Asked, Churn, Done, Snapshots};
use load::{BLOCK, Clock, History, NEVER, Shared, Window, Writer, lock};

const SIZE: usize = 16 << 20;

/// Connections that write at a time, each to its own part of the disk.
const WRITERS: usize = 2;

/// An image under load, with all that is known of it.
struct Victim {
    folder: tempfile::TempDir,
    /// The guest's data lie in `data.raw`; there are no snapshots then.
    has_data_file: bool,
    clock: Clock,
    histories: Vec<Shared>,
    snapshots: Snapshots,
    /// The command that the end cut off, until it is known whether it was carried out.
    cut_off: Option<CutOff>,
    random: fastrand::Rng,
    /// What each kill left.
    left: Vec<Left>,
    /// Writes of blocks that were acknowledged.
    writes: usize,
    /// Operations on snapshots that were.
    done: Done,
}

/// A command without an answer: carried out, or not at all.
struct CutOff {
    asked: Asked,
    /// What its snapshots say.
    carried_out: Option<bool>,
}

/// What `qemu-img check` finds in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Left {
    /// The image says itself that its refcounts must be rebuilt, so that the rest means nothing.
    dirty: bool,
    leaks: u64,
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
            has_data_file: options.contains("data_file="),
            clock: Clock::new(),
            histories: (0..WRITERS).map(|_| History::new(&part).into()).collect(),
            snapshots: Snapshots::new(),
            cut_off: None,
            random: fastrand::Rng::with_seed(seed),
            left: Vec::new(),
            writes: 0,
            done: Done::default(),
        }
    }

    fn start(&self) -> Daemon {
        let drive: &[&str] = match self.has_data_file {
            false => &["--drive", "id=disk,file=disk.qcow2,discard=unmap"],
            true => &[
                "--blockdev",
                "qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2,discard=unmap,\
                 data-file.driver=file,data-file.filename=data.raw,data-file.discard=unmap",
                "--export",
                "nbd,id=e,node-name=disk,writable=on",
            ],
        };
        let server: &[&str] = &["--nbd-server", "unix:nbd.sock"];
        let arguments = [server, drive].concat();
        Daemon::start_in(Program::Qblockd, self.folder.path(), &arguments)
    }

    /// Runs the daemon under load up to its end, and checks what the image is then.
    fn round(&mut self, end: End) {
        let mut daemon = self.start();
        if !self.left.is_empty() {
            self.see(&daemon);
        }
        let lasts = Duration::from_millis(self.random.u64(0..300));
        let stop = AtomicBool::new(false);
        let (clock, socket) = (&self.clock, daemon.path("nbd.sock"));
        let mut asked = None;
        let churn = Churn {
            qmp: daemon.qmp(),
            socket: socket.clone(),
            clock,
            stop: &stop,
            random: self.random.fork(),
            histories: &self.histories,
            snapshots: &mut self.snapshots,
            asked: &mut asked,
            done: Done::default(),
        };
        let done = std::thread::scope(|scope| {
            for (at, history) in self.histories.iter().enumerate() {
                let writer = Writer {
                    socket: socket.clone(),
                    export: "disk",
                    clock,
                    stop: &stop,
                    random: self.random.fork(),
                };
                scope.spawn(move || writer.run(at * SIZE / WRITERS / BLOCK, history));
            }
            let churn = (!self.has_data_file).then(|| scope.spawn(move || churn.run()));
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
            churn.map_or_else(Done::default, |churn| {
                churn.join().expect("snapshots that are as they must be")
            })
        });
        self.cut_off = asked.map(|asked| CutOff {
            asked,
            carried_out: None,
        });
        let writes = self
            .histories
            .iter()
            .map(|history| lock(history).acknowledged());
        self.writes += writes.sum::<usize>();
        self.done.operations += done.operations;
        self.done.views += done.views;
        let left = self.check_image(end);
        self.left.push(left);
        self.check_snapshots();
    }

    /// Nothing is wrong according to qemu-img; gives back what a kill may leave.
    ///
    /// A dirty image is repaired by qemu-img in a copy. In one that is not, a kill can leave leaks; a kill inside a snapshot
    /// command also COPIED flags that do not agree with a count, which qemu-img calls errors. Two kinds of these are harmless:
    /// the count is too high, so that it is right when the leaks are repaired, or the flag is missing, which costs a copy.
    fn check_image(&self, end: End) -> Left {
        let folder = self.folder.path();
        let report = |image: &str| {
            let check = Command::new("qemu-img")
                .args(["check", "--output=json", image])
                .current_dir(folder)
                .output()
                .unwrap();
            let report: Value = serde_json::from_slice(&check.stdout).unwrap();
            let text = String::from_utf8_lossy(&check.stderr).into_owned();
            let count = |key: &str| report.get(key).and_then(Value::as_u64).unwrap_or(0);
            assert_eq!(count("check-errors"), 0, "{text}");
            (count("corruptions"), count("leaks"), text)
        };
        let info = harness::tool(folder, "qemu-img info -f qcow2 --output=json disk.qcow2");
        let info: Value = serde_json::from_str(&info).unwrap();
        if info["dirty-flag"] == true {
            assert_eq!(end, End::Kill, "the image is dirty");
            let line = "cp disk.qcow2 repaired.qcow2; qemu-img check -q -r all repaired.qcow2";
            harness::tool(folder, line);
            let (corruptions, leaks, text) = report("repaired.qcow2");
            assert_eq!((corruptions, leaks), (0, 0), "{text}");
            return Left {
                dirty: true,
                leaks: 0,
            };
        }
        let (corruptions, leaks, text) = report("disk.qcow2");
        let is_clean = (corruptions, leaks) == (0, 0);
        assert!(end == End::Kill || is_clean, "after {end:?}: {text}");
        if corruptions > 0 {
            let line =
                "cp disk.qcow2 repaired.qcow2; qemu-img check -q -r leaks repaired.qcow2 || true";
            harness::tool(folder, line);
            let (_, _, text) = report("repaired.qcow2");
            let is_missing_flag = |line: &&str| {
                line.starts_with("ERROR OFLAG_COPIED") && line.ends_with("refcount=1")
            };
            let wrong: Vec<&str> = text
                .lines()
                .filter(|line| line.starts_with("ERROR") && !is_missing_flag(line))
                .collect();
            assert!(wrong.is_empty(), "{wrong:#?}");
        }
        Left {
            dirty: false,
            leaks,
        }
    }

    /// Every acknowledged snapshot is there and holds what it must; what became of the others is noted.
    fn check_snapshots(&mut self) {
        let there = snapshot_names(self.folder.path());
        for name in &there {
            assert!(self.snapshots.contains_key(name), "{name} was never taken");
        }
        if let Some(cut_off) = &mut self.cut_off {
            let Asked {
                created, deleted, ..
            } = &cut_off.asked;
            let is_there = created.as_ref().map(|name| there.contains(name));
            let is_gone = deleted.as_ref().map(|name| !there.contains(name));
            if let (Some(is_there), Some(is_gone)) = (is_there, is_gone) {
                assert_eq!(is_there, is_gone, "half a transaction: {:?}", cut_off.asked);
            }
            cut_off.carried_out = is_there.or(is_gone);
        }
        let asked = self.cut_off.as_ref().map(|cut_off| cut_off.asked.clone());
        let Asked {
            created, deleted, ..
        } = asked.unwrap_or_default();
        let known = std::mem::take(&mut self.snapshots);
        for (name, mut snapshot) in known {
            let is_there = there.contains(&name);
            if snapshot.deletion_answered {
                assert!(!is_there, "{name} has come back");
                continue;
            }
            let may_be_gone = [&created, &deleted].contains(&&Some(name.clone()));
            assert!(is_there || may_be_gone, "{name} is lost: {there:?}");
            if !is_there {
                continue;
            }
            let content = snapshot_content(self.folder.path(), &name);
            if let Some(seen) = &snapshot.content {
                assert!(*seen == content, "{name} has changed");
            }
            if !snapshot.is_checked {
                self.check_parts(&name, &content, |history, part| {
                    history.check(part, snapshot.window)
                });
            }
            snapshot.content = Some(content);
            snapshot.is_checked = true;
            self.snapshots.insert(name, snapshot);
        }
    }

    fn check_parts(
        &self,
        name: &str,
        content: &[u8],
        check: impl Fn(&History, &[u8]) -> Result<(), String>,
    ) {
        assert_eq!(content.len(), SIZE, "{name}");
        for (history, part) in self.histories.iter().zip(content.chunks(SIZE / WRITERS)) {
            if let Err(complaint) = check(&lock(history), part) {
                panic!("{name}: {complaint}");
            }
        }
    }

    /// Reads the disk after a kill: every flushed write is there. From now on it is what it is.
    fn see(&mut self, daemon: &Daemon) {
        let content = load::content(&daemon.path("nbd.sock"), "disk");
        self.check_parts("the disk", &content, History::check_crashed);
        self.check_cut_off(&content);
        self.know(&content);
    }

    /// All of a command that was cut off has happened, or nothing.
    fn check_cut_off(&mut self, content: &[u8]) {
        let Some(CutOff { asked, carried_out }) = self.cut_off.take() else {
            return;
        };
        let Some(sent) = asked.reverted else {
            return;
        };
        let parts = self.histories.iter().zip(content.chunks(SIZE / WRITERS));
        let evidence = parts.map(|(history, part)| lock(history).evidence(part, sent));
        let (made, not_made) = evidence.fold((0, 0), |all, part| (all.0 + part.0, all.1 + part.1));
        println!("a revert that was cut off: {made} blocks say it was made, {not_made} it was not");
        assert!(made == 0 || not_made == 0, "half a revert");
        let contradicts = match carried_out {
            Some(true) => not_made > 0,
            Some(false) => made > 0,
            None => false,
        };
        assert!(!contradicts, "half a transaction: {asked:?}");
    }

    /// The disk holds this.
    fn know(&mut self, content: &[u8]) {
        let parts = content.chunks(SIZE / WRITERS);
        self.histories = parts.map(|part| History::new(part).into()).collect();
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

/// Geometries under load: small clusters for much metadata, the default, refcounts of both kinds of width, subclusters, and data
/// in a file of their own.
const IMAGES: &[&str] = &[
    "-o cluster_size=4k,refcount_bits=8",
    "",
    "-o compat=0.10,cluster_size=16k",
    "-o lazy_refcounts=on,cluster_size=512,refcount_bits=64",
    "-o extended_l2=on,cluster_size=16k",
    "-o data_file=data.raw,cluster_size=4k",
    "-o data_file=data.raw,data_file_raw=on,extended_l2=on",
];

#[test]
fn a_killed_daemon_keeps_every_flushed_write_and_every_snapshot() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    let rounds = setting("QBLOCKD_CRASH_ROUNDS", 5);
    let seed = harness::seed();
    for options in IMAGES {
        let mut victim = Victim::new(options, seed);
        for _ in 0..rounds {
            victim.round(End::Kill);
        }
        // The last one is reopened too, and ends in order.
        let mut daemon = victim.start();
        victim.see(&daemon);
        daemon.qmp().ok("quit", json!({}));
        assert!(daemon.exited().success());
        let left = victim.check_image(End::Kill);
        victim.check_snapshots();
        let (writes, done) = (victim.writes, victim.done);
        println!(
            "[{options}] {writes} writes of blocks and {} operations on snapshots acknowledged, {} views read; \
             each kill left {:?}; in the end: {left:?}",
            done.operations, done.views, victim.left
        );
        // What was rebuilt has no leaks, and no others come.
        let before = victim.left.last().map_or(0, |left| left.leaks);
        assert!(!left.dirty && left.leaks <= before);
        assert!(writes > 0, "a load");
    }
}

#[test]
fn an_end_under_load_keeps_everything_and_leaks_nothing() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    let seed = harness::seed();
    let ends = [End::Terminate, End::Quit, End::Quit, End::Terminate];
    for (options, end) in IMAGES.iter().zip(ends.into_iter().cycle()) {
        let mut victim = Victim::new(options, seed);
        for _ in 0..2 {
            victim.round(end);
            // What was acknowledged is there without a flush.
            let mut daemon = victim.start();
            let content = load::content(&daemon.path("nbd.sock"), "disk");
            let window = Window {
                from: NEVER,
                to: NEVER,
                before: None,
            };
            victim.check_parts("the disk", &content, |history, part| {
                history.check(part, window)
            });
            victim.check_cut_off(&content);
            victim.know(&content);
            assert!(daemon.terminated().success());
        }
        assert!(victim.writes > 0, "a load");
    }
}
