//! Overlays put on disks while guests write: every layer that is left behind shows one moment, and is readable at once.
//!
//! `QBLOCKD_OVERLAYS` is how many are put on each disk, one after the other; `QBLOCKD_DISKS` on how many disks at once.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::consistency::{
    DISK_BYTES, DISKS, Progress, Shown, Stopper, WRITERS, advance, answered, sent,
    shows_one_moment, write_numbers,
};
use super::harness::{self, Daemon, Program, Qmp, tool};

/// How many overlays each disk gets in an ordinary run.
const OVERLAYS: usize = 24;

/// The image of a disk that is the active layer before the overlay of this number.
fn layer(disk: &str, number: usize) -> String {
    match number {
        0 => format!("{disk}.qcow2"),
        _ => format!("{disk}-{number}.qcow2"),
    }
}

/// What the layers of this number show, for each disk.
fn contents(folder: &Path, number: usize) -> Vec<Vec<u8>> {
    let read = |(disk, _): (&str, &str)| {
        let image = layer(disk, number);
        let line = format!("qemu-img convert -f qcow2 -O raw {image} {disk}.raw");
        tool(folder, &line);
        fs::read(folder.join(format!("{disk}.raw"))).unwrap()
    };
    DISKS.map(read).to_vec()
}

/// The numbers that a moment has of each writer: at least, at most.
type Bounds = (Vec<u64>, Vec<u64>);

/// Puts an overlay on each disk, all in one transaction.
fn cover(qmp: &mut Qmp, progress: &[Progress], number: usize) -> (Bounds, Duration) {
    let least = answered(progress);
    let actions = DISKS.map(|(disk, _)| {
        let data = json!({"device": disk, "snapshot-file": layer(disk, number)});
        json!({"type": "blockdev-snapshot-sync", "data": data})
    });
    let begin = Instant::now();
    qmp.ok("transaction", json!({"actions": actions}));
    let took = begin.elapsed();
    ((least, sent(progress)), took)
}

/// Tries what fails, which nobody may notice.
fn fail(qmp: &mut Qmp) {
    let (disk, _) = DISKS[0];
    let actions = json!([
        {"type": "blockdev-snapshot-sync", "data": {"device": disk, "snapshot-file": "none.qcow2"}},
        {"type": "abort", "data": {}},
    ]);
    let error = qmp.error("transaction", json!({"actions": actions}));
    assert_eq!(error.1, "Transaction aborted using Abort action");
}

fn check(folder: &Path, number: usize, (least, most): &Bounds) {
    let contents = contents(folder, number);
    let shown = contents.iter().map(|bytes| &bytes[..]).enumerate();
    let shown: Vec<Shown<'_>> = shown.collect();
    if let Err(problem) = shows_one_moment(&shown, least, most) {
        panic!("layer {number}: {problem}");
    }
}

/// What `query-block` shows of the first disk, whose chain has so many images below the active one.
fn check_shown(qmp: &mut Qmp, depth: usize) {
    let drives = qmp.ok("query-block", json!({}));
    let (disk, _) = DISKS[0];
    let inserted = &drives[0]["inserted"];
    assert_eq!(inserted["backing_file_depth"], depth);
    assert_eq!(inserted["file"], layer(disk, depth));
    let mut image: &Value = &inserted["image"];
    for number in (0..=depth).rev() {
        assert_eq!(image["filename"], layer(disk, number));
        image = &image["backing-image"];
    }
    assert!(image.is_null());
}

fn run(daemon: &mut Daemon, folder: &Path, overlays: usize) -> (Vec<Bounds>, Vec<u64>, Duration) {
    let mut qmp = daemon.qmp();
    let socket = daemon.path("nbd.sock");
    let progress: Vec<Progress> = (0..WRITERS).map(|_| Progress::default()).collect();
    let stop = AtomicBool::new(false);
    let exports = qmp.ok("query-block-exports", json!({}));
    assert_eq!(exports.as_array().map(Vec::len), Some(DISKS.len()));
    let mut slowest = Duration::ZERO;
    let moments = thread::scope(|scope| {
        for (writer, progress) in progress.iter().enumerate() {
            let (socket, stop) = (&socket, &stop);
            scope.spawn(move || write_numbers(socket, writer, 1, progress, stop).unwrap());
        }
        // A failed assertion below must not leave the writers running: the scope waits for them.
        let _stopper = Stopper(&stop);
        let mut random = fastrand::Rng::with_seed(2027);
        let mut moments = Vec::new();
        for number in 1..=overlays {
            advance(&progress, random.u64(1..100));
            let (bounds, took) = cover(&mut qmp, &progress, number);
            slowest = slowest.max(took);
            // The layer below is read by another program while guests go on.
            if number % 8 == 0 {
                check(folder, number - 1, &bounds);
                fail(&mut qmp);
            }
            moments.push(bounds);
        }
        // The reader of this test has a limit, and each image is inside of the one above.
        if overlays < 100 {
            check_shown(&mut qmp, overlays);
        }
        advance(&progress, 10);
        stop.store(true, Ordering::SeqCst);
        moments
    });
    qmp.ok("quit", json!({}));
    assert!(daemon.exited().success());
    (moments, answered(&progress), slowest)
}

#[test]
fn layers_that_guests_leave_behind_show_one_moment_of_all_disks() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    let overlays = std::env::var("QBLOCKD_OVERLAYS").ok();
    let overlays = overlays.map_or(OVERLAYS, |count| count.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let mut arguments = vec!["--nbd-server".to_owned(), "unix:nbd.sock".to_owned()];
    for (disk, options) in DISKS {
        let line = format!("qemu-img create -q -f qcow2 -o {options} {disk}.qcow2 {DISK_BYTES}");
        tool(folder.path(), &line);
        let drive = format!("id={disk},file={disk}.qcow2,format=qcow2");
        arguments.extend(["--drive".to_owned(), drive]);
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &arguments);
    let (moments, last, slowest) = run(&mut daemon, folder.path(), overlays);
    assert!(!folder.path().join("none.qcow2").exists());
    for (number, bounds) in moments.iter().enumerate() {
        check(folder.path(), number, bounds);
    }
    for (disk, _) in DISKS {
        for number in 0..=overlays {
            tool(
                folder.path(),
                &format!("qemu-img check -q {}", layer(disk, number)),
            );
        }
    }
    // The active layers have all that was answered.
    check(folder.path(), overlays, &(last.clone(), last.clone()));
    eprintln!(
        "{overlays} overlays on each of {} disks under {} writes; the slowest transaction took {slowest:.1?}",
        DISKS.len(),
        last.iter().sum::<u64>()
    );
}

/// Disks that get an overlay in one transaction, in an ordinary run.
const MANY_DISKS: usize = 48;

#[test]
fn many_disks_get_overlays_in_one_transaction_or_none_does() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    let disks = std::env::var("QBLOCKD_DISKS").ok();
    let disks = disks.map_or(MANY_DISKS, |count| count.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let first = folder.path().join("0.qcow2");
    tool(folder.path(), "qemu-img create -q -f qcow2 0.qcow2 1M");
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &["--state-dir", "state"]);
    let mut qmp = daemon.qmp();
    for disk in 0..disks {
        let image = folder.path().join(format!("{disk}.qcow2"));
        if disk > 0 {
            fs::copy(&first, &image).unwrap();
        }
        let file = json!({"driver": "file", "filename": image});
        let node = json!({"driver": "qcow2", "node-name": format!("d{disk}"), "file": file});
        qmp.ok("blockdev-add", node);
    }
    let overlay = |disk: usize| {
        let data = json!({
            "node-name": format!("d{disk}"),
            "snapshot-file": folder.path().join(format!("{disk}.overlay")),
            "snapshot-node-name": format!("o{disk}"),
        });
        json!({"type": "blockdev-snapshot-sync", "data": data})
    };
    let mut actions: Vec<Value> = (0..disks).map(overlay).collect();
    let overlays = || {
        let names = fs::read_dir(folder.path()).unwrap();
        let names = names.map(|entry| entry.unwrap().path());
        names
            .filter(|path| path.extension().is_some_and(|end| end == "overlay"))
            .count()
    };
    let nodes = |qmp: &mut Qmp| {
        let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
        nodes.as_array().unwrap().len()
    };

    // The last one fails, when all others are there.
    actions.push(json!({"type": "abort", "data": {}}));
    let begin = Instant::now();
    let error = qmp.error("transaction", json!({"actions": actions}));
    let failed = begin.elapsed();
    assert_eq!(error.1, "Transaction aborted using Abort action");
    assert_eq!((overlays(), nodes(&mut qmp)), (0, 2 * disks));

    actions.pop();
    let begin = Instant::now();
    qmp.ok("transaction", json!({"actions": actions}));
    let took = begin.elapsed();
    assert_eq!((overlays(), nodes(&mut qmp)), (disks, 4 * disks));
    qmp.ok("quit", json!({}));
    assert!(daemon.exited().success());
    for disk in 0..disks {
        tool(folder.path(), &format!("qemu-img check -q {disk}.overlay"));
    }
    eprintln!(
        "overlays on {disks} disks took {took:.1?}, and {failed:.1?} where the last action failed"
    );
}
