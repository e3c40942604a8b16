//! A load whose every outcome is known: what each block of the disk may hold after the server's end, and what each
//! snapshot may hold.
//!
//! Blocks are written with stamps that never repeat. For each block the versions are kept with the times at which they
//! were sent and acknowledged, on one clock for all threads; a block has one request in flight at most. Between two
//! times a block can have held a version that was sent before the second one, unless a later one was acknowledged before
//! the first.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::super::guest::{Guest, Request};

/// Bytes of a block: the smallest cluster, which a write either changes or does not.
pub(super) const BLOCK: usize = 512;

/// Most blocks of one request, and most requests in flight.
const RUN: usize = 192;
const DEPTH: usize = 8;

/// A time that has not come.
pub(super) const NEVER: u64 = u64::MAX;

/// The clock of all threads; it gives each event a number.
#[derive(Debug)]
pub(super) struct Clock(AtomicU64);

impl Clock {
    pub(super) fn new() -> Clock {
        // Zero is before everything.
        Clock(AtomicU64::new(1))
    }

    pub(super) fn tick(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst)
    }
}

#[derive(Debug, Clone, Copy)]
struct Version {
    stamp: u64,
    sent: u64,
    acknowledged: u64,
}

/// The versions of a range of blocks, oldest first; never empty.
#[derive(Debug)]
pub(super) struct History {
    versions: Vec<Vec<Version>>,
    /// When the last flush that succeeded was sent.
    pub(super) flushed: u64,
}

impl History {
    /// What a disk with this content has behind it.
    pub(super) fn new(content: &[u8]) -> History {
        let version = |block| Version {
            stamp: stamp(block).expect("a block that is whole"),
            sent: 0,
            acknowledged: 0,
        };
        History {
            versions: content
                .chunks(BLOCK)
                .map(|block| vec![version(block)])
                .collect(),
            flushed: 0,
        }
    }

    /// Checks a content that was taken between two times.
    pub(super) fn check(&self, content: &[u8], from: u64, to: u64) -> Result<(), String> {
        for (at, block) in content.chunks(BLOCK).enumerate() {
            let Some(stamp) = stamp(block) else {
                return Err(format!("block {at} is torn"));
            };
            let versions = &self.versions[at];
            let last = versions
                .iter()
                .rposition(|version| version.acknowledged < from);
            let allowed = &versions[last.unwrap_or(0)..];
            let held = |version: &Version| version.stamp == stamp && version.sent < to;
            if !allowed.iter().any(held) {
                return Err(format!(
                    "block {at} holds {stamp}, between {from} and {to}: {versions:?}"
                ));
            }
        }
        Ok(())
    }

    /// How many versions were acknowledged since the beginning.
    pub(super) fn acknowledged(&self) -> usize {
        let of_block = |versions: &Vec<Version>| {
            let real = versions.iter().filter(|version| version.sent > 0);
            real.filter(|version| version.acknowledged < NEVER).count()
        };
        self.versions.iter().map(of_block).sum()
    }
}

/// The number that fills a block, or nothing if it is of several.
fn stamp(block: &[u8]) -> Option<u64> {
    let mut words = block.chunks_exact(8);
    let first = words.next()?;
    let all = words.all(|word| word == first);
    all.then(|| u64::from_le_bytes(first.try_into().unwrap()))
}

/// One guest that writes to a disk until the server ends, or it is told to.
pub(super) struct Writer<'a> {
    pub(super) socket: PathBuf,
    pub(super) export: &'a str,
    pub(super) clock: &'a Clock,
    pub(super) stop: &'a AtomicBool,
    pub(super) random: fastrand::Rng,
}

impl Writer<'_> {
    /// Runs; `first` is the first block of the range that is the writer's alone.
    pub(super) fn run(mut self, first: usize, history: &mut History) {
        let Some(mut guest) = self.connect() else {
            return;
        };
        // An end of the connection is the end of the load.
        let _ = self.write(&mut guest, first, history);
    }

    fn connect(&self) -> Option<Guest> {
        while !self.stop.load(Ordering::Relaxed) {
            match Guest::connect(&self.socket, self.export) {
                Ok(guest) => return Some(guest),
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(2)),
            }
        }
        None
    }

    fn write(
        &mut self,
        guest: &mut Guest,
        first: usize,
        history: &mut History,
    ) -> std::io::Result<()> {
        while !self.stop.load(Ordering::Relaxed) {
            let mut flights: HashMap<u64, Vec<usize>> = HashMap::new();
            for cookie in 0..DEPTH as u64 {
                let run = self.run_of_blocks(history.versions.len());
                if flights.values().flatten().any(|block| run.contains(block)) {
                    continue;
                }
                let request = self.request(first, &run, history);
                flights.insert(cookie, run);
                guest.submit(cookie, &request)?;
            }
            while !flights.is_empty() {
                let (cookie, error) = guest.reply()?;
                let blocks = flights
                    .remove(&cookie)
                    .expect("the reply to a request in flight");
                assert_eq!(error, 0, "a write");
                let now = self.clock.tick();
                for block in blocks {
                    let version = history.versions[block].last_mut();
                    version.expect("the version written").acknowledged = now;
                }
            }
            if self.random.u8(..4) == 0 {
                let now = self.clock.tick();
                assert_eq!(guest.run(&Request::Flush)?, 0, "a flush");
                history.flushed = now;
            }
        }
        Ok(())
    }

    fn run_of_blocks(&mut self, count: usize) -> Vec<usize> {
        let length = self.random.usize(1..=RUN.min(count));
        let start = self.random.usize(0..=count - length);
        (start..start + length).collect()
    }

    /// A request for these blocks, written down.
    fn request(&mut self, first: usize, run: &[usize], history: &mut History) -> Request {
        let zero = self.random.u8(..5) == 0;
        let sent = self.clock.tick();
        let mut data = Vec::new();
        for block in run {
            let stamp = match zero {
                true => 0,
                false => self.clock.tick() << 16 | self.random.u64(1..1 << 16),
            };
            history.versions[*block].push(Version {
                stamp,
                sent,
                acknowledged: NEVER,
            });
            data.extend(stamp.to_le_bytes().repeat(BLOCK / 8));
        }
        let offset = ((first + run[0]) * BLOCK) as u64;
        match zero {
            true => Request::Zero {
                offset,
                length: data.len() as u32,
            },
            false => Request::Write { offset, data },
        }
    }
}

/// Reads a disk through an export that is there, or will soon be.
pub(super) fn content(socket: &Path, export: &str) -> Vec<u8> {
    let deadline = std::time::Instant::now() + super::super::harness::PATIENCE;
    loop {
        match Guest::connect(socket, export).and_then(|mut guest| guest.content()) {
            Ok(content) => return content,
            Err(error) => assert!(std::time::Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
