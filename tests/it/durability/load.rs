//! A load whose every outcome is known: what each block of the disk may hold after the server's end, and what each
//! snapshot may hold.
//!
//! Blocks are written with stamps that never repeat. For each block the versions are kept with the times at which they
//! were sent and acknowledged, on one clock for all threads; a block has one write in flight at most. A revert is one more
//! version of every block, which may be in flight beside it. Between two times a block can have held a version that was sent
//! before the second one, unless another was sent after its acknowledgement and acknowledged before the first.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

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
    origin: Origin,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Origin {
    /// Durable after the next flush.
    Write,
    /// Durable when it is acknowledged.
    Revert,
}

/// When a content was seen.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    pub(super) from: u64,
    pub(super) to: u64,
    /// A revert, by the time it was sent, that came after it for certain.
    pub(super) before: Option<u64>,
}

/// The versions of a range of blocks; never empty.
#[derive(Debug)]
pub(super) struct History {
    versions: Vec<Vec<Version>>,
    /// When the last flush that succeeded was sent.
    flushed: u64,
}

impl History {
    /// What a disk with this content has behind it.
    pub(super) fn new(content: &[u8]) -> History {
        let version = |block| Version {
            stamp: stamp(block).expect("a block that is whole"),
            sent: 0,
            acknowledged: 0,
            origin: Origin::Write,
        };
        History {
            versions: content
                .chunks(BLOCK)
                .map(|block| vec![version(block)])
                .collect(),
            flushed: 0,
        }
    }

    /// A revert to this content is sent.
    pub(super) fn revert(&mut self, content: &[u8], sent: u64) {
        for (versions, block) in self.versions.iter_mut().zip(content.chunks(BLOCK)) {
            versions.push(Version {
                stamp: stamp(block).expect("a block that is whole"),
                sent,
                acknowledged: NEVER,
                origin: Origin::Revert,
            });
        }
    }

    /// The revert that was sent then has been acknowledged.
    pub(super) fn reverted(&mut self, sent: u64, now: u64) {
        for version in self.versions.iter_mut().flatten() {
            if version.origin == Origin::Revert && version.sent == sent {
                version.acknowledged = now;
            }
        }
    }

    /// The revert that was sent then has been refused.
    pub(super) fn not_reverted(&mut self, sent: u64) {
        for versions in &mut self.versions {
            versions.retain(|version| version.origin != Origin::Revert || version.sent != sent);
        }
    }

    /// Checks a content that was taken at some time.
    pub(super) fn check(&self, content: &[u8], window: Window) -> Result<(), String> {
        self.check_blocks(content, |versions, version| {
            let is_over = versions
                .iter()
                .any(|later| later.follows(version) && later.acknowledged < window.from);
            version.sent < window.to && window.before != Some(version.sent) && !is_over
        })
        .map_err(|complaint| format!("{window:?}: {complaint}"))
    }

    /// Checks what a crash has left: all that was flushed, and reverts that were acknowledged.
    pub(super) fn check_crashed(&self, content: &[u8]) -> Result<(), String> {
        self.check_blocks(content, |versions, version| {
            let mut later = versions.iter().filter(|later| later.follows(version));
            !later.any(|later| self.is_durable(later))
        })
    }

    fn check_blocks(
        &self,
        content: &[u8],
        allowed: impl Fn(&[Version], &Version) -> bool,
    ) -> Result<(), String> {
        for (at, block) in content.chunks(BLOCK).enumerate() {
            let Some(stamp) = stamp(block) else {
                return Err(format!("block {at} is torn"));
            };
            let versions = &self.versions[at];
            let mut held = versions.iter().filter(|version| version.stamp == stamp);
            if !held.any(|version| allowed(versions, version)) {
                return Err(format!("block {at} holds {stamp} of {versions:?}"));
            }
        }
        Ok(())
    }

    /// How many blocks can be as they are only if a revert was made, and how many only if it was not.
    pub(super) fn evidence(&self, content: &[u8], sent: u64) -> (usize, usize) {
        let (mut made, mut not_made) = (0, 0);
        for (versions, block) in self.versions.iter().zip(content.chunks(BLOCK)) {
            let is_this = |version: &Version| version.sent == sent;
            let is_held = |version: &&Version| Some(version.stamp) == stamp(block);
            let may_follow = |version: &Version| is_this(version) || version.acknowledged > sent;
            let survives_without = |version: &Version| {
                let later = versions.iter().filter(|later| !is_this(later));
                let mut later = later.filter(|later| later.follows(version));
                !is_this(version) && !later.any(|later| self.is_durable(later))
            };
            not_made += usize::from(!versions.iter().filter(is_held).any(may_follow));
            made += usize::from(!versions.iter().filter(is_held).any(survives_without));
        }
        (made, not_made)
    }

    /// Whether it outlives a crash.
    fn is_durable(&self, version: &Version) -> bool {
        match version.origin {
            Origin::Write => version.acknowledged < self.flushed,
            Origin::Revert => version.acknowledged < NEVER,
        }
    }

    /// How many writes of blocks were acknowledged since the beginning.
    pub(super) fn acknowledged(&self) -> usize {
        let is_answered = |version: &&Version| {
            version.origin == Origin::Write && version.sent > 0 && version.acknowledged < NEVER
        };
        self.versions.iter().flatten().filter(is_answered).count()
    }
}

impl Version {
    /// Whether it was sent when the other was there already.
    fn follows(&self, other: &Version) -> bool {
        self.sent > other.acknowledged
    }
}

/// The histories of the parts of a disk. Each is written by one writer, and all by reverts.
pub(super) type Shared = Mutex<History>;

/// The history for a moment. A thread that panics has failed the test.
pub(super) fn lock(history: &Shared) -> MutexGuard<'_, History> {
    history.lock().expect("a history that is whole")
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
    pub(super) fn run(mut self, first: usize, history: &Shared) {
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

    fn write(&mut self, guest: &mut Guest, first: usize, history: &Shared) -> std::io::Result<()> {
        let count = lock(history).versions.len();
        while !self.stop.load(Ordering::Relaxed) {
            // By cookie: the blocks, and the time at which they were sent.
            let mut flights: HashMap<u64, (Vec<usize>, u64)> = HashMap::new();
            for cookie in 0..DEPTH as u64 {
                let run = self.run_of_blocks(count);
                let mut taken = flights.values().flat_map(|(blocks, _)| blocks);
                if taken.any(|block| run.contains(block)) {
                    continue;
                }
                let (request, sent) = self.request(first, &run, &mut lock(history));
                flights.insert(cookie, (run, sent));
                guest.submit(cookie, &request)?;
            }
            while !flights.is_empty() {
                let (cookie, error) = guest.reply()?;
                let (blocks, sent) = flights
                    .remove(&cookie)
                    .expect("the reply to a request in flight");
                assert_eq!(error, 0, "a write");
                let now = self.clock.tick();
                let mut history = lock(history);
                for block in blocks {
                    let mut versions = history.versions[block].iter_mut();
                    let version = versions.find(|version| version.sent == sent);
                    version.expect("the version written").acknowledged = now;
                }
            }
            if self.random.u8(..4) == 0 {
                let now = self.clock.tick();
                assert_eq!(guest.run(&Request::Flush)?, 0, "a flush");
                lock(history).flushed = now;
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
    fn request(&mut self, first: usize, run: &[usize], history: &mut History) -> (Request, u64) {
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
                origin: Origin::Write,
            });
            data.extend(stamp.to_le_bytes().repeat(BLOCK / 8));
        }
        let offset = ((first + run[0]) * BLOCK) as u64;
        let request = match zero {
            true => Request::Zero {
                offset,
                length: data.len() as u32,
            },
            false => Request::Write { offset, data },
        };
        (request, sent)
    }
}

/// Reads a disk through an export that is there.
pub(super) fn read(socket: &Path, export: &str) -> std::io::Result<Vec<u8>> {
    Guest::connect(socket, export)?.content()
}

/// As [`read`], where the export will be there soon.
pub(super) fn content(socket: &Path, export: &str) -> Vec<u8> {
    let deadline = std::time::Instant::now() + super::super::harness::PATIENCE;
    loop {
        match read(socket, export) {
            Ok(content) => return content,
            Err(error) => assert!(std::time::Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
