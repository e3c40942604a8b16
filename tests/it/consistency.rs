//! The cut of a transaction: what it keeps of the disks of one guest existed at one time, in whatever way it keeps it: internal
//! snapshots, layers below overlays, backups, and mixes of them.
//!
//! Writers put the numbers 1, 2, 3, ... round-robin over the disks, each number after the one before is answered.
//! So whatever is a state of that guest holds a prefix of the numbers: all up to some number, and none above.
//!
//! * `draw`: what transactions do to which disks, from a seed
//! * `round`: a daemon with new images, and some transactions under the writers
//! * `results`: everything that they have left, opened and looked at
//!
//! `QBLOCKD_CUTS` is how many transactions are taken (100 if absent), `QBLOCKD_CRASH_SEED` the seed.

mod draw;
mod results;
mod round;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::guest::{Guest, Request};
use super::harness::{self, setting};

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
const BLOCK: usize = 4096;
pub(crate) const DISK_BYTES: u64 = WRITERS as u64 * SLOTS * STRIDE;
/// Numbers that have places of their own; the next goes where the first of them was.
pub(crate) const NUMBERS: u64 = SLOTS * DISKS.len() as u64;
/// One of so many numbers is not written: its place is zeroed.
const ZEROED: u64 = 7;
/// A writer flushes a disk before one of so many numbers.
const FLUSHED: u64 = 61;

/// The disk and the offset where a writer puts a number.
fn place(writer: usize, number: u64) -> (usize, u64) {
    let disks = DISKS.len() as u64;
    let slot = (number / disks) % SLOTS;
    let offset = (writer as u64 * SLOTS + slot) * STRIDE;
    ((number % disks) as usize, offset)
}

/// What stands where a number was put. 0 is no number.
fn block(number: u64) -> Vec<u8> {
    match number % ZEROED {
        0 => vec![0; BLOCK],
        _ => number.to_be_bytes().repeat(BLOCK / 8),
    }
}

/// How far a writer is.
#[derive(Default)]
pub(crate) struct Progress {
    /// The last number that was sent.
    pub(crate) sent: AtomicU64,
    /// The last number that was answered.
    pub(crate) answered: AtomicU64,
    /// Of each disk, the last number that a flush has covered.
    flushed: [AtomicU64; DISKS.len()],
}

fn numbers(progress: &[Progress], of: fn(&Progress) -> &AtomicU64) -> Vec<u64> {
    let load = |each| of(each).load(Ordering::SeqCst);
    progress.iter().map(load).collect()
}

/// What each writer has had answered.
pub(crate) fn answered(progress: &[Progress]) -> Vec<u64> {
    numbers(progress, |each| &each.answered)
}

/// What each writer has sent.
pub(crate) fn sent(progress: &[Progress]) -> Vec<u64> {
    numbers(progress, |each| &each.sent)
}

/// Writes numbers from `first` on until it is told to stop; answers the longest time that one took. An error is the daemon's end.
pub(crate) fn write_numbers(
    socket: &Path,
    writer: usize,
    first: u64,
    progress: &Progress,
    stop: &AtomicBool,
) -> io::Result<Duration> {
    let mut guests = Vec::new();
    for (disk, _) in DISKS {
        guests.push(Guest::connect(socket, disk)?);
    }
    let mut longest = Duration::ZERO;
    for number in first.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let (disk, offset) = place(writer, number);
        let begin = Instant::now();
        if number % FLUSHED == 0 {
            assert_eq!(guests[disk].run(&Request::Flush)?, 0);
            progress.flushed[disk].store(number - 1, Ordering::SeqCst);
        }
        let request = match number % ZEROED {
            0 => Request::Zero {
                offset,
                length: BLOCK as u32,
            },
            _ => Request::Write {
                offset,
                data: block(number),
            },
        };
        progress.sent.store(number, Ordering::SeqCst);
        assert_eq!(guests[disk].run(&request)?, 0);
        progress.answered.store(number, Ordering::SeqCst);
        longest = longest.max(begin.elapsed());
    }
    Ok(longest)
}

/// Waits until every writer has gone on by this many numbers.
pub(crate) fn advance(progress: &[Progress], count: u64) {
    let before = answered(progress);
    let is_so = || {
        let now = answered(progress);
        let mut both = before.iter().zip(&now);
        both.all(|(before, now)| *now >= before + count)
    };
    harness::until(is_so, "writes that go on");
}

/// What a disk held: its number in [`DISKS`], and its bytes.
pub(crate) type Shown<'a> = (usize, &'a [u8]);

/// Whether disks show one moment of all writers, at which each was between `least` and `most`. There may be several results of one
/// disk, which show the same then.
pub(crate) fn shows_one_moment(
    disks: &[Shown<'_>],
    least: &[u64],
    most: &[u64],
) -> Result<(), String> {
    for writer in 0..WRITERS {
        let fits = prefixes(disks, writer)?;
        let allowed = least[writer]..=most[writer];
        if !fits.iter().any(|last| allowed.contains(last)) {
            return Err(format!(
                "writer {writer} was at {fits:?}, which is not in {allowed:?}"
            ));
        }
    }
    Ok(())
}

/// The numbers of a writer that may be the last that disks hold, where they hold all before it too.
fn prefixes(disks: &[Shown<'_>], writer: usize) -> Result<Vec<u64>, String> {
    let first_of = |block: &[u8]| u64::from_be_bytes(block[..8].try_into().unwrap());
    let mut last = 0;
    for (disk, bytes) in disks {
        let places = (0..NUMBERS).map(|number| place(writer, number));
        for (_, offset) in places.filter(|(on, _)| on == disk) {
            last = last.max(first_of(&bytes[offset as usize..]));
        }
    }
    // Those behind it may be there and not be seen: zeroes, and what was put on disks that are not looked at.
    let mut candidates: Vec<u64> = (last..last + 2 * DISKS.len() as u64).collect();
    let mut problems = Vec::new();
    candidates.retain(|last| match holds_up_to(disks, writer, *last) {
        Ok(()) => true,
        Err(problem) => {
            problems.push(problem);
            false
        }
    });
    match candidates.is_empty() {
        true => Err(problems.swap_remove(0)),
        false => Ok(candidates),
    }
}

/// Whether disks hold all numbers up to this one, and none above.
fn holds_up_to(disks: &[Shown<'_>], writer: usize, last: u64) -> Result<(), String> {
    for (nth, (disk, bytes)) in disks.iter().enumerate() {
        let on_disk = |index: &u64| place(writer, *index).0 == *disk;
        for index in (0..NUMBERS).filter(on_disk) {
            let (_, offset) = place(writer, index);
            // The last number up to `last` that belongs here.
            let expected = match last.checked_sub(index) {
                Some(above) => index + above / NUMBERS * NUMBERS,
                None => 0,
            };
            let found = &bytes[offset as usize..][..BLOCK];
            if found != block(expected) {
                let found = u64::from_be_bytes(found[..8].try_into().unwrap());
                return Err(format!(
                    "writer {writer} was at {last}, but result {nth} (of disk {}) holds {found} instead of {expected}",
                    DISKS[*disk].0
                ));
            }
        }
    }
    Ok(())
}

/// Whether a disk, in its bytes, has all that flushes have covered: in each place the number that had to be there, or a later one.
pub(crate) fn has_flushed(
    (disk, bytes): Shown<'_>,
    first: u64,
    progress: &[Progress],
) -> Result<(), String> {
    for (writer, progress) in progress.iter().enumerate() {
        let flushed = progress.flushed[disk].load(Ordering::SeqCst);
        let sent = progress.sent.load(Ordering::SeqCst);
        for oldest in (flushed.saturating_sub(NUMBERS).max(first)..flushed).map(|number| number + 1)
        {
            let (on, offset) = place(writer, oldest);
            let found = &bytes[offset as usize..][..BLOCK];
            let mut since = (oldest..=sent).step_by(NUMBERS as usize);
            if on == disk && !since.any(|number| found == block(number)) {
                let found = u64::from_be_bytes(found[..8].try_into().unwrap());
                return Err(format!(
                    "writer {writer} had flushed {oldest}, and sent {sent}; disk {} has {found}",
                    DISKS[disk].0
                ));
            }
        }
    }
    Ok(())
}

/// Ends the writers.
pub(crate) struct Stopper<'a>(pub(crate) &'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn what_one_transaction_keeps_of_several_disks_shows_one_moment_of_a_guest_that_writes() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    let cuts = setting("QBLOCKD_CUTS", 100);
    let seed = harness::seed();
    let begin = Instant::now();
    let mut figures = round::Figures::default();
    for number in 0.. {
        if figures.cuts >= cuts {
            break;
        }
        let left = cuts - figures.cuts;
        let seed = seed.wrapping_add(number);
        if let Err(problem) = round::run(seed, left, &mut figures) {
            panic!("QBLOCKD_CRASH_SEED={seed}: {problem}");
        }
    }
    eprintln!("{figures:#?} in {:.1?}", begin.elapsed());
}
