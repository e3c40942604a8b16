//! The states that a crash may leave of a disk whose writes have been logged.
//!
//! ```text
//! log:   w w w F w w F w w w w F ...          F: a flush
//!        durable   |volatile|  <- an epoch: everything before it is on the disk,
//!                              of its own writes any subset, each whole or torn
//! ```
//!
//! What a killed process leaves is among them: a prefix of an epoch, nothing torn.
//!
//! An image with an external data file is two disks with one log; a daemon's files are many. A flush makes durable what its own disk got.

use std::collections::HashSet;
use std::sync::Arc;

use crate::driver::Requests;
use crate::error::Result;
use crate::io::Data;
use crate::protocols::memory::{Change, Memory, Record};

use super::content::SECTOR;

/// How many states are tried.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Up to this many volatile writes, all subsets.
    pub all_subsets: usize,
    /// Else, besides all prefixes, single drops and single keeps, this many random subsets.
    pub random_subsets: usize,
    /// At most this many states of an epoch; a random choice where there are more.
    pub per_epoch: usize,
}

impl Default for Effort {
    fn default() -> Self {
        Effort {
            all_subsets: 8,
            random_subsets: 32,
            per_epoch: usize::MAX,
        }
    }
}

/// The writes between two flushes of the disk, and all that is durable before them.
#[derive(Debug)]
pub struct Epoch<'a> {
    log: &'a [Record],
    /// The disk with everything before `from`.
    disk: Arc<Memory>,
    from: usize,
    /// Records up to here have completed when the power goes.
    end: usize,
    /// Those of them, as numbers in the log, of which any subset may be lost.
    volatile: Vec<usize>,
}

/// What of an epoch reaches the disk.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Choice {
    /// Which of the volatile writes.
    keep: Vec<bool>,
    /// One of them that is torn, and which of its sectors are kept.
    torn: Option<(usize, Tear)>,
}

/// Which sectors of a torn write reach the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Tear {
    Front(u64),
    Back(u64),
    /// Some, by a seed.
    Some(u64),
}

impl Tear {
    fn keeps(self, sector: u64) -> bool {
        match self {
            Tear::Front(sectors) => sector < sectors,
            Tear::Back(first) => sector >= first,
            Tear::Some(seed) => fastrand::Rng::with_seed(seed ^ (sector << 32)).bool(),
        }
    }
}

/// A disk after a crash.
#[derive(Debug)]
pub struct State {
    /// The disk.
    pub disk: Arc<Memory>,
    /// Records of the log that had completed: what was answered by then must be there.
    pub completed: usize,
    /// The last record that has left a trace, plus one: what began later has not.
    pub reached: usize,
    /// Everything that had completed is there, and nothing else: the page cache behind a process that was killed.
    pub is_kill: bool,
    /// Which state it is, for people.
    pub what: String,
}

/// The log with writes of whole sectors, and of zeroes to whole sectors. A page cache, or a disk's own cache, writes a sector with
/// all that it holds: what earlier requests put into it never gets lost alone.
pub fn whole_sectors(base: &Memory, log: &[Record]) -> Result<Vec<Record>> {
    let live = base.fork();
    let widened = log.iter().map(|record| {
        let live = live.numbered(record.disk);
        live.apply(&record.change)?;
        let mut record = record.clone();
        let (offset, len) = range_of(&record.change);
        let is_whole = offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR);
        let is_inside = len > 0 && offset < live.size();
        if is_inside && (!is_whole || matches!(record.change, Change::Write { .. })) {
            let start = offset / SECTOR * SECTOR;
            let end = (offset + len).next_multiple_of(SECTOR).min(live.size());
            record.change = Change::Write {
                offset: start,
                data: live.peek(start, end - start),
                fua: false,
            };
        }
        Ok(record)
    });
    widened.collect()
}

/// The epochs of a log that starts on `base`.
pub fn epochs<'a>(base: &Memory, log: &'a [Record]) -> Result<Vec<Epoch<'a>>> {
    let mut epochs = Vec::new();
    let disk = base.fork();
    let mut from = 0;
    let mut volatile: Vec<usize> = Vec::new();
    for end in 0..=log.len() {
        let flush = match log.get(end) {
            Some(record) if !matches!(record.change, Change::Flush) => {
                volatile.push(end);
                continue;
            }
            flush => flush,
        };
        // What is under way at the crash may reach the disk as well.
        let now = flush.map_or(u64::MAX, |flush| flush.completed);
        let under_way = (end + 1..log.len()).filter(|at| {
            let is_flush = matches!(log[*at].change, Change::Flush);
            log[*at].issued < now && !is_flush
        });
        let volatile_now: Vec<usize> = volatile.iter().copied().chain(under_way).collect();
        if !volatile_now.is_empty() {
            epochs.push(Epoch {
                log,
                disk: disk.fork(),
                from,
                end,
                volatile: volatile_now,
            });
        }
        // A flush covers what had completed on its disk when it was issued.
        volatile.retain(|at| {
            flush.is_none_or(|flush| {
                log[*at].disk != flush.disk || log[*at].completed > flush.issued
            })
        });
        let durable_to = volatile.first().copied().unwrap_or(end);
        for record in &log[from..durable_to.max(from)] {
            disk.numbered(record.disk).apply(&record.change)?;
        }
        from = durable_to.max(from);
    }
    Ok(epochs)
}

impl Epoch<'_> {
    /// Whether more than this many records have completed when the power goes.
    pub fn ends_behind(&self, records: usize) -> bool {
        self.end > records
    }

    /// How many writes may be lost.
    pub fn volatile(&self) -> usize {
        self.volatile.len()
    }

    /// The states to try: all subsets where they are few, else prefixes, single drops, single keeps and random subsets; and each
    /// with one write torn.
    pub fn choices(&self, effort: Effort, random: &mut fastrand::Rng) -> Vec<Choice> {
        let count = self.volatile.len();
        let mut subsets: Vec<Vec<bool>> = Vec::new();
        if count <= effort.all_subsets {
            subsets.extend((0..1_u32 << count).map(|bits| {
                let keep = |nth| bits >> nth & 1 == 1;
                (0..count).map(keep).collect()
            }));
        } else {
            for nth in 0..=count {
                subsets.push((0..count).map(|other| other < nth).collect());
            }
            for nth in 0..count {
                subsets.push((0..count).map(|other| other != nth).collect());
                subsets.push((0..count).map(|other| other == nth).collect());
            }
            for _ in 0..effort.random_subsets {
                let share = random.f32();
                subsets.push((0..count).map(|_| random.f32() < share).collect());
            }
        }
        let mut choices = Vec::with_capacity(2 * subsets.len());
        for keep in subsets {
            let torn = self.tear(&keep, random);
            let whole = Choice { keep, torn: None };
            if torn.is_some() {
                choices.push(Choice {
                    torn,
                    ..whole.clone()
                });
            }
            choices.push(whole);
        }
        let mut seen = HashSet::new();
        choices.retain(|choice| seen.insert(choice.clone()));
        if choices.len() > effort.per_epoch {
            random.shuffle(&mut choices);
            choices.truncate(effort.per_epoch);
        }
        choices
    }

    /// A tear of one of the writes that are kept, if one has several sectors. Often the last: a kill tears that one.
    fn tear(&self, keep: &[bool], random: &mut fastrand::Rng) -> Option<(usize, Tear)> {
        let sectors = |nth: usize| sectors_of(&self.log[self.volatile[nth]].change);
        let long: Vec<usize> = (0..keep.len())
            .filter(|nth| keep[*nth] && sectors(*nth) > 1)
            .collect();
        let last = *long.last()?;
        let nth = match random.bool() {
            true => last,
            false => long[random.usize(..long.len())],
        };
        let at = random.u64(1..sectors(nth));
        let tear = match random.u8(..3) {
            0 => Tear::Front(at),
            1 => Tear::Back(at),
            _ => Tear::Some(random.u64(..)),
        };
        Some((nth, tear))
    }

    /// The disk that a choice leaves.
    pub fn state(&self, choice: &Choice) -> Result<State> {
        let all = self.disk.fork();
        let mut reached = self.from;
        let mut nth = 0;
        for at in self.from..self.log.len() {
            let Record { change, disk, .. } = &self.log[at];
            let disk = all.numbered(*disk);
            if self.volatile.get(nth) != Some(&at) {
                if at >= self.end && nth >= self.volatile.len() {
                    break;
                }
                if at < self.end {
                    disk.apply(change)?;
                    reached = at + 1;
                }
                continue;
            }
            if choice.keep[nth] {
                match choice.torn {
                    Some((torn, tear)) if torn == nth => apply_torn(disk, change, tear)?,
                    _ => disk.apply(change)?,
                }
                reached = at + 1;
            }
            nth += 1;
        }
        Ok(State {
            disk: all,
            completed: self.end,
            reached,
            is_kill: choice.torn.is_none()
                && self
                    .volatile
                    .iter()
                    .zip(&choice.keep)
                    .all(|(at, keep)| *keep == (*at < self.end)),
            what: self.describe(choice),
        })
    }

    fn describe(&self, choice: &Choice) -> String {
        let kept: Vec<usize> = (0..self.volatile.len())
            .filter(|nth| choice.keep[*nth])
            .map(|nth| self.volatile[nth])
            .collect();
        let torn = match choice.torn {
            Some((nth, tear)) => format!(", {} torn ({tear:?})", self.volatile[nth]),
            None => String::new(),
        };
        format!(
            "records before {} and of {:?} only {kept:?}{torn}",
            self.volatile.first().copied().unwrap_or(self.end),
            self.volatile,
        )
    }
}

fn range_of(change: &Change) -> (u64, u64) {
    match change {
        Change::Write { offset, data, .. } => (*offset, data.len()),
        Change::WriteZeroes { offset, len, .. } | Change::Discard { offset, len } => {
            (*offset, *len)
        }
        Change::Resize { .. } | Change::Flush => (0, 0),
    }
}

/// How many sectors of the disk a change touches.
fn sectors_of(change: &Change) -> u64 {
    let (offset, len) = range_of(change);
    (offset + len).div_ceil(SECTOR) - offset / SECTOR
}

fn apply_torn(disk: &Memory, change: &Change, tear: Tear) -> Result<()> {
    let (offset, len) = range_of(change);
    let first = offset / SECTOR;
    for sector in first..(offset + len).div_ceil(SECTOR) {
        if !tear.keeps(sector - first) {
            continue;
        }
        let from = offset.max(sector * SECTOR);
        let to = (offset + len).min((sector + 1) * SECTOR);
        disk.apply(&part(change, from, to - from))?;
    }
    Ok(())
}

fn part(change: &Change, from: u64, part: u64) -> Change {
    match change {
        Change::Write { offset, data, fua } => Change::Write {
            offset: from,
            data: Data::from(data.slice(from - offset, part).to_bytes()),
            fua: *fua,
        },
        Change::WriteZeroes { fua, .. } => Change::WriteZeroes {
            offset: from,
            len: part,
            fua: *fua,
        },
        Change::Discard { .. } => Change::Discard {
            offset: from,
            len: part,
        },
        other => other.clone(),
    }
}
