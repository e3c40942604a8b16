//! A disk that fills up: the guest and the client are told so, nothing that was there is lost, and all is well when
//! there is space again.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::super::guest::{Guest, Request};
use super::super::harness::{self, Daemon, Program, Qmp};

const CLUSTER: usize = 65536;
const ENOSPC: u32 = 28;

/// Writes that are tried on the full disk.
const TRIES: usize = 5;

/// Bytes of the file system.
const SPACE: usize = 12 << 20;

/// A file system of a few megabytes, unmounted in the end.
pub(crate) struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// Mounts one, or says that it may not.
    pub(crate) fn mount() -> Option<SmallDisk> {
        let folder = tempfile::tempdir().unwrap();
        let options = format!("size={SPACE}");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "none"])
            .arg(folder.path())
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(SmallDisk(folder)),
            refused => {
                eprintln!("cannot mount a tmpfs: nothing is tested ({refused:?})");
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Leaves this many bytes free.
    pub(crate) fn leave(&self, bytes: usize) {
        let filler = self.path().join("filler");
        let _ = fs::remove_file(&filler);
        let free = harness::tool(self.path(), "df -B1 --output=avail . | tail -1");
        let free: usize = free.trim().parse().unwrap();
        fs::write(filler, vec![1; free.saturating_sub(bytes)]).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Busy if a test failed and its daemon still ends; lazily then.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

/// A daemon with the image as export `disk`, and its device for QMP.
fn start(program: Program, disk: &SmallDisk) -> (Daemon, Qmp, Guest) {
    let arguments: &[&str] = match program {
        Program::Qblockd => &[
            "--drive",
            "id=disk,file=disk.qcow2,werror=report",
            "--nbd-server",
            "unix:nbd.sock",
        ],
        Program::QemuStorageDaemon | Program::Qemu => &[
            "--blockdev",
            "qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2",
            "--nbd-server",
            "addr.type=unix,addr.path=nbd.sock",
            "--export",
            "nbd,id=e,node-name=disk,writable=on",
        ],
    };
    let mut daemon = Daemon::start_in(program, disk.path(), arguments);
    let qmp = daemon.qmp();
    harness::until(|| daemon.path("nbd.sock").exists(), "the export");
    let guest = Guest::connect(&daemon.path("nbd.sock"), "disk").unwrap();
    (daemon, qmp, guest)
}

fn write(cluster: usize, byte: u8) -> Request {
    Request::Write {
        offset: (cluster * CLUSTER) as u64,
        data: vec![byte; CLUSTER],
    }
}

fn snapshot(qmp: &mut Qmp, name: &str) -> Value {
    qmp.execute(
        "blockdev-snapshot-internal-sync",
        json!({"device": "disk", "name": name}),
    )
}

/// What `qemu-img check` counts: errors and leaks.
fn check(disk: &SmallDisk) -> (u64, u64) {
    let output = Command::new("qemu-img")
        .args(["check", "--output=json", "disk.qcow2"])
        .current_dir(disk.path())
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let count = |key: &str| report.get(key).and_then(Value::as_u64).unwrap_or(0);
    (count("corruptions") + count("check-errors"), count("leaks"))
}

/// What one program does when the disk fills up while the guest writes.
#[derive(Debug, Default, PartialEq)]
struct Outcome {
    /// The error of the write that did not fit, and of a snapshot then.
    write: u32,
    snapshot: Option<String>,
    /// The error of a flush then, if any.
    flush: u32,
    /// Errors of overwrites of what is allocated.
    overwrites_failed: usize,
    /// A snapshot, and a write, when there is space again.
    later: bool,
    errors: u64,
    leaks: u64,
}

fn fill(program: Program, disk: &SmallDisk, options: &str) -> Outcome {
    let create = format!("qemu-img create -q -f qcow2 {options} disk.qcow2 64M");
    harness::tool(disk.path(), &create);
    disk.leave(SPACE / 2);
    let (mut daemon, mut qmp, mut guest) = start(program, disk);
    let mut outcome = Outcome::default();
    let mut fitted = 0;
    while outcome.write == 0 {
        outcome.write = guest.run(&write(fitted, 9)).unwrap();
        fitted += usize::from(outcome.write == 0);
    }
    // The full disk stays full, whatever is tried. A part of such a write may be done, in small clusters.
    for cluster in fitted..fitted + TRIES {
        assert_ne!(guest.run(&write(cluster, 9)).unwrap(), 0);
    }
    // Not a block is left, where a small snapshot would fit. The tables may not fit either; they stay in memory then.
    disk.leave(0);
    outcome.flush = guest.run(&Request::Flush).unwrap();
    // Before the snapshot; and after it, unless it found space in what the failed writes gave back.
    for byte in [1, 2] {
        if byte == 2 {
            let reply = snapshot(&mut qmp, "full");
            outcome.snapshot = reply["error"]["desc"].as_str().map(str::to_owned);
            if outcome.snapshot.is_none() {
                break;
            }
        }
        for cluster in 0..fitted {
            let error = guest.run(&write(cluster, byte)).unwrap();
            outcome.overwrites_failed += usize::from(error != 0);
        }
    }
    let content = guest.content().unwrap();
    fs::remove_file(disk.path().join("filler")).unwrap();
    let reply = snapshot(&mut qmp, "later");
    outcome.later = reply.get("return").is_some() && guest.run(&write(0, 3)).unwrap() == 0;
    assert_eq!(guest.run(&Request::Flush).unwrap(), 0);
    drop((guest, qmp));
    assert!(daemon.terminated().success());
    (outcome.errors, outcome.leaks) = check(disk);
    if program == Program::Qblockd {
        let byte = 1 + u8::from(outcome.snapshot.is_some());
        let old = |cluster: usize| content[cluster * CLUSTER..][..CLUSTER] == [byte; CLUSTER];
        let gone: Vec<usize> = (0..fitted).filter(|cluster| !old(*cluster)).collect();
        assert!(
            gone.is_empty(),
            "acknowledged writes are gone: {gone:?}, {outcome:?}"
        );
        let rest = &content[(fitted + TRIES) * CLUSTER..];
        assert!(rest.chunks(CLUSTER).all(|cluster| cluster == [0; CLUSTER]));
        let line = "qemu-img convert -f qcow2 -l snapshot.name=later -O raw disk.qcow2";
        let out = tempfile::tempdir().unwrap();
        harness::tool(disk.path(), &format!("{line} {}/raw", out.path().display()));
        assert!(fs::read(out.path().join("raw")).unwrap() == content);
    }
    fs::remove_file(disk.path().join("disk.qcow2")).unwrap();
    outcome
}

#[test]
fn a_disk_that_fills_up_is_an_error_and_no_more() {
    let Some(()) = harness::need(&["qemu-img", "qemu-storage-daemon", "mount", "df"]) else {
        return;
    };
    let Some(disk) = SmallDisk::mount() else {
        return;
    };
    for options in ["", "-o cluster_size=512", "-o compat=0.10,cluster_size=4k"] {
        let ours = fill(Program::Qblockd, &disk, options);
        let theirs = fill(Program::QemuStorageDaemon, &disk, options);
        println!("{options}\nqblockd: {ours:?}\nqemu-storage-daemon: {theirs:?}");
        if let Some(said) = &ours.snapshot {
            assert!(said.contains("No space left on device"), "{said}");
        }
        assert!(
            ours.snapshot.is_some() || !options.is_empty(),
            "too much space"
        );
        assert!([0, ENOSPC].contains(&ours.flush), "{}", ours.flush);
        let expected = Outcome {
            write: ENOSPC,
            snapshot: ours.snapshot.clone(),
            flush: ours.flush,
            later: true,
            ..Outcome::default()
        };
        assert_eq!(ours, expected);
    }
}

/// Snapshots with every amount of space too little: each fails without a trace, and the first that fits succeeds.
fn squeeze(program: Program, disk: &SmallDisk) -> (Vec<String>, u64, u64) {
    // Small clusters: a snapshot takes many, and can fail at each.
    harness::tool(
        disk.path(),
        "qemu-img create -q -f qcow2 -o cluster_size=4k disk.qcow2 8G",
    );
    let (mut daemon, mut qmp, mut guest) = start(program, disk);
    for cluster in 0..32 {
        assert_eq!(guest.run(&write(cluster * 61, 1)).unwrap(), 0);
    }
    assert_eq!(guest.run(&Request::Flush).unwrap(), 0);
    let mut failures = Vec::new();
    for pages in 0.. {
        disk.leave(pages * 4096);
        let reply = snapshot(&mut qmp, "tight");
        let Some(desc) = reply["error"]["desc"].as_str() else {
            break;
        };
        failures.push(desc.to_owned());
        // The guest's clusters are still its own.
        let error = guest.run(&write(pages % 32 * 61, 2)).unwrap();
        if program == Program::Qblockd {
            assert_eq!(
                error, 0,
                "an overwrite after a failed snapshot ({pages} pages)"
            );
        }
        assert!(pages < 64, "{failures:?}");
    }
    let _ = fs::remove_file(disk.path().join("filler"));
    drop((guest, qmp));
    assert!(daemon.terminated().success());
    let (errors, leaks) = check(disk);
    fs::remove_file(disk.path().join("disk.qcow2")).unwrap();
    (failures, errors, leaks)
}

#[test]
fn a_snapshot_that_does_not_fit_leaves_no_trace() {
    let Some(()) = harness::need(&["qemu-img", "qemu-storage-daemon", "mount", "df"]) else {
        return;
    };
    let Some(disk) = SmallDisk::mount() else {
        return;
    };
    let (failures, errors, leaks) = squeeze(Program::Qblockd, &disk);
    println!(
        "qblockd: {} failures, {errors} errors, {leaks} leaks",
        failures.len()
    );
    let theirs = squeeze(Program::QemuStorageDaemon, &disk);
    println!(
        "qemu-storage-daemon: {} failures, {} errors, {} leaks",
        theirs.0.len(),
        theirs.1,
        theirs.2
    );
    assert!(!failures.is_empty(), "too much space");
    for failure in &failures {
        assert!(failure.contains("No space left on device"), "{failure}");
    }
    assert_eq!((errors, leaks), (0, 0));
}
