//! The cut of a transaction: what three disks of one guest hold in the snapshots of one transaction existed at one time.
//!
//! Writers put the numbers 1, 2, 3, ... round-robin over the disks, each number after the one before is answered.
//! So whatever is a state of that guest holds a prefix of the numbers: all up to some number, and none above.
//!
//! `QBLOCKD_CUTS` is how many transactions are taken (100 if absent).

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::harness::{self, Daemon, Program, Qmp, tool};
use super::nbd::client::Client;

/// The disks, with images that differ in all that snapshots depend on.
pub(crate) const DISKS: [(&str, &str); 3] = [
    ("a", "cluster_size=64k"),
    ("b", "cluster_size=4k,refcount_bits=64"),
    ("c", "cluster_size=16k,compat=0.10"),
];
pub(crate) const WRITERS: usize = 2;
/// Places on each disk where one writer puts numbers, one after the other and then over the oldest.
const SLOTS: u64 = 96;
/// Bytes from one place to the next; a write has `BLOCK` of them.
const STRIDE: u64 = 16 << 10;
pub(crate) const BLOCK: usize = 4096;
pub(crate) const DISK_BYTES: u64 = WRITERS as u64 * SLOTS * STRIDE;
/// Numbers that have places of their own; the next goes where the first of them was.
pub(crate) const NUMBERS: u64 = SLOTS * DISKS.len() as u64;
/// How many transactions are taken under way.
fn how_many() -> usize {
    std::env::var("QBLOCKD_CUTS").map_or(100, |text| text.parse().expect("a number"))
}

/// The disk and the offset where a writer puts a number.
pub(crate) fn place(writer: usize, number: u64) -> (usize, u64) {
    let disks = DISKS.len() as u64;
    let slot = (number / disks) % SLOTS;
    let offset = (writer as u64 * SLOTS + slot) * STRIDE;
    ((number % disks) as usize, offset)
}

/// How far a writer is.
#[derive(Default)]
pub(crate) struct Progress {
    /// The last number that was sent.
    pub(crate) sent: AtomicU64,
    /// The last number that was answered.
    pub(crate) answered: AtomicU64,
}

/// Writes numbers until told to stop; gives back the longest time that one write took.
pub(crate) fn write_numbers(
    socket: &Path,
    writer: usize,
    progress: &Progress,
    stop: &AtomicBool,
) -> Duration {
    let mut disks = DISKS.map(|(name, _)| {
        let mut client = Client::connect(socket);
        client.handshake(3);
        client.go(name);
        client
    });
    let mut longest = Duration::ZERO;
    for number in 1.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let (disk, offset) = place(writer, number);
        let begin = Instant::now();
        progress.sent.store(number, Ordering::SeqCst);
        disks[disk].write(offset, &number.to_be_bytes().repeat(BLOCK / 8));
        progress.answered.store(number, Ordering::SeqCst);
        longest = longest.max(begin.elapsed());
    }
    longest
}

/// A snapshot of all disks, and what it has to hold of each writer: at least what was answered when it was asked for, at most
/// what was sent when it was there.
struct Cut {
    name: String,
    bounds: Vec<(u64, u64)>,
    /// How long the reply to the transaction took.
    took: Duration,
}

pub(crate) fn numbers(progress: &[Progress], of: fn(&Progress) -> &AtomicU64) -> Vec<u64> {
    let load = |each| of(each).load(Ordering::SeqCst);
    progress.iter().map(load).collect()
}

/// Waits until every writer has gone on by this many numbers.
pub(crate) fn advance(progress: &[Progress], count: u64) {
    let before = numbers(progress, |each| &each.answered);
    let is_so = || {
        let now = numbers(progress, |each| &each.answered);
        before
            .iter()
            .zip(&now)
            .all(|(before, now)| *now >= before + count)
    };
    harness::until(is_so, "writes that go on");
}

fn snapshot_of(device: &str, name: &str) -> Value {
    json!({"device": device, "name": name})
}

fn cut(qmp: &mut Qmp, progress: &[Progress], name: String) -> Cut {
    let least = numbers(progress, |each| &each.answered);
    let actions = DISKS.map(|(disk, _)| {
        json!({"type": "blockdev-snapshot-internal-sync", "data": snapshot_of(disk, &name)})
    });
    let begin = Instant::now();
    qmp.ok("transaction", json!({"actions": actions}));
    let took = begin.elapsed();
    let most = numbers(progress, |each| &each.sent);
    Cut {
        name,
        bounds: least.into_iter().zip(most).collect(),
        took,
    }
}

/// What a snapshot (or, without a name, the disk itself) holds, for each disk.
fn contents(folder: &Path, snapshot: Option<&str>) -> Vec<Vec<u8>> {
    let of = |(disk, _): (&str, &str)| content(folder, disk, snapshot);
    DISKS.map(of).to_vec()
}

/// The same of one disk.
pub(crate) fn content(folder: &Path, disk: &str, snapshot: Option<&str>) -> Vec<u8> {
    let which = snapshot.map_or(String::new(), |name| format!("-l snapshot.name={name}"));
    let line = format!("qemu-img convert -f qcow2 -O raw {which} {disk}.qcow2 {disk}.raw");
    tool(folder, &line);
    fs::read(folder.join(format!("{disk}.raw"))).unwrap()
}

/// The last number that disks hold of a writer, if they hold all before it too.
pub(crate) fn prefix(disks: &[Vec<u8>], writer: usize) -> Result<u64, String> {
    let block = |number| {
        let (disk, offset) = place(writer, number);
        &disks[disk][offset as usize..][..BLOCK]
    };
    let first_of = |block: &[u8]| u64::from_be_bytes(block[..8].try_into().unwrap());
    let round = NUMBERS;
    let last = (0..round).map(|number| first_of(block(number))).max();
    let last = last.unwrap_or(0);
    for index in 0..round {
        // The last number up to `last` that belongs here; 0 is no number.
        let expected = match last.checked_sub(index) {
            Some(above) => index + above / round * round,
            None => 0,
        };
        let found = block(index);
        if found != expected.to_be_bytes().repeat(BLOCK / 8) {
            return Err(format!(
                "writer {writer}: there is {last}, but {} where {expected} was before it",
                first_of(found)
            ));
        }
    }
    Ok(last)
}

fn check(folder: &Path, cut: &Cut) -> Result<(), String> {
    let disks = contents(folder, Some(&cut.name));
    for (writer, (least, most)) in cut.bounds.iter().enumerate() {
        let last = prefix(&disks, writer)?;
        if !(*least..=*most).contains(&last) {
            return Err(format!(
                "writer {writer}: up to {last}, not between {least} and {most}"
            ));
        }
    }
    Ok(())
}

/// What the writers and the client that takes snapshots have seen.
struct Seen {
    cuts: Vec<Cut>,
    /// Snapshots that were taken of one disk after the other.
    apart: Cut,
    longest_write: Duration,
    last: Vec<u64>,
}

fn run(daemon: &mut Daemon) -> Seen {
    let mut qmp = daemon.qmp();
    let socket = daemon.path("nbd.sock");
    let progress: Vec<Progress> = (0..WRITERS).map(|_| Progress::default()).collect();
    let stop = AtomicBool::new(false);
    // Commands wait until the command line has been followed.
    let exports = qmp.ok("query-block-exports", json!({}));
    assert_eq!(exports.as_array().map(Vec::len), Some(DISKS.len()));
    let (cuts, apart, longest_write) = thread::scope(|scope| {
        let writers: Vec<_> = progress
            .iter()
            .enumerate()
            .map(|(writer, progress)| {
                let (socket, stop) = (&socket, &stop);
                scope.spawn(move || write_numbers(socket, writer, progress, stop))
            })
            .collect();
        // A failed assertion below must not leave the writers running: the scope waits for them.
        let _stopper = Stopper(&stop);
        let mut cuts: Vec<Cut> = Vec::new();
        let mut random = fastrand::Rng::with_seed(2026);
        for at in 0..how_many() {
            advance(&progress, random.u64(1..200));
            cuts.push(cut(&mut qmp, &progress, format!("cut{at}")));
            // Some go again, so that clusters are freed and used anew meanwhile.
            if at % 3 != 0 {
                let gone = cuts.remove(random.usize(..cuts.len()));
                for (disk, _) in DISKS {
                    let which = snapshot_of(disk, &gone.name);
                    qmp.ok("blockdev-snapshot-delete-internal-sync", which);
                }
            }
        }
        advance(&progress, 10);
        for (disk, _) in DISKS {
            qmp.ok(
                "blockdev-snapshot-internal-sync",
                snapshot_of(disk, "apart"),
            );
            advance(&progress, 10);
        }
        let apart = Cut {
            name: "apart".to_owned(),
            bounds: vec![(0, u64::MAX); WRITERS],
            took: Duration::ZERO,
        };
        stop.store(true, Ordering::SeqCst);
        let longest = writers
            .into_iter()
            .map(|writer| writer.join().unwrap())
            .max();
        (cuts, apart, longest.unwrap_or_default())
    });
    qmp.ok("quit", json!({}));
    assert!(daemon.exited().success());
    Seen {
        cuts,
        apart,
        longest_write,
        last: numbers(&progress, |each| &each.answered),
    }
}

/// Ends the writers.
pub(crate) struct Stopper<'a>(pub(crate) &'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn snapshots_of_one_transaction_show_one_moment_of_a_guest_that_writes() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let mut arguments = ["--state-dir", "state", "--nbd-server", "unix:nbd.sock"]
        .map(str::to_owned)
        .to_vec();
    for (disk, options) in DISKS {
        let line = format!("qemu-img create -q -f qcow2 -o {options} {disk}.qcow2 {DISK_BYTES}");
        tool(folder.path(), &line);
        arguments.extend([
            "--drive".to_owned(),
            format!("id={disk},file={disk}.qcow2,format=qcow2"),
        ]);
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let begin = Instant::now();
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &arguments);
    let seen = run(&mut daemon);
    let ran = begin.elapsed();
    for (disk, _) in DISKS {
        tool(folder.path(), &format!("qemu-img check -q {disk}.qcow2"));
    }
    for cut in &seen.cuts {
        if let Err(text) = check(folder.path(), cut) {
            panic!("{}: {text}", cut.name);
        }
    }
    // The disks themselves have all that was answered.
    let disks = contents(folder.path(), None);
    for (writer, last) in seen.last.iter().enumerate() {
        assert_eq!(prefix(&disks, writer), Ok(*last));
    }
    // And this test sees a cut that is none.
    let apart = check(folder.path(), &seen.apart);
    assert!(apart.is_err(), "snapshots of different times look like one");
    eprintln!(
        "{} transactions over {} disks under {} writes in {ran:.1?}; the longest write took {:.1?}, \
         the longest transaction {:.1?}",
        how_many(),
        DISKS.len(),
        seen.last.iter().sum::<u64>(),
        seen.longest_write,
        seen.cuts
            .iter()
            .map(|cut| cut.took)
            .max()
            .unwrap_or_default()
    );
}
