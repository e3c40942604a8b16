//! Random scripts: a small image and a few operations on it, from a seed.
//!
//! Most bugs of storage code that is hit by a crash show with three operations or so; what matters is that tables are
//! small enough to be filled, shared, split between sectors, moved and grown by them.

use std::ops::Range;
use std::sync::Arc;

use super::audit::{Audit, Problem};
use super::base::{BASE_FILE, Base};
use super::content::Content;
use crate::driver::{BackingFile, Preallocation};
use crate::formats::qcow2::create::{Compat, CreateOptions, DataFileOptions};
use crate::protocols::memory::Memory;

/// The image that a script runs on.
#[derive(Debug, Clone)]
pub struct Case {
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// Width of a refcount.
    pub refcount_bits: u32,
    /// Version 2 or 3.
    pub compat: Compat,
    /// Bytes of the disk.
    pub size: u64,
    /// Where guests write. The rest of the disk stays empty, so that large disks cost no time.
    pub windows: Vec<Range<u64>>,
    /// Guests write much of the first window at once now and then: more than a refcount block counts.
    pub long_writes: bool,
    /// The file is made this long before the first write, so that the refcount table must grow soon.
    pub file_size: u64,
    /// Tables are evicted all the time.
    pub small_caches: bool,
    /// Holes are punched where clusters are freed.
    pub discard: bool,
    /// L2 entries with subclusters.
    pub extended_l2: bool,
    /// Another program has left persistent bitmaps.
    pub bitmaps: bool,
    /// Another program has taken the snapshots of an image of version 2, long ago.
    pub old_snapshots: bool,
    /// Where the guest's data lie.
    pub data: DataPlace,
    /// What a power cut leaves of requests.
    pub storage: Storage,
    /// What it stands on.
    pub base: Option<Base>,
}

/// What storage keeps of requests that no flush has covered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// Sectors, each with all that it held at that time: a page cache, or a disk's own.
    Sectors,
    /// Any of the requests, also where they share a sector: all that a server promises. Guests write whole sectors to such a disk.
    Requests,
}

/// Where guest data lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataPlace {
    /// In the image's own file.
    Own,
    /// In an external data file.
    External,
    /// In one that can be read as a raw image.
    Raw,
}

/// The longest write, in bytes: what a state costs grows with it.
const MAX_LONG: u64 = 256 << 10;

/// How images name their data file.
pub const DATA_FILE: &str = "data.raw";

/// Which images scripts run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Images {
    /// All kinds but `Large`.
    Any,
    /// Clusters of 2 MiB, which cost much time.
    Large,
    /// With extended L2 entries.
    ExtendedL2,
    /// With persistent bitmaps.
    Bitmaps,
    /// Version 2.
    V2,
    /// With an external data file.
    DataFile,
    /// With a backing file.
    Overlay,
}

impl Case {
    /// How the image is made.
    pub fn options(&self) -> CreateOptions {
        let mut options = CreateOptions::new(self.size);
        options.cluster_size = self.cluster_size();
        options.refcount_bits = self.refcount_bits;
        options.compat = self.compat;
        options.extended_l2 = self.extended_l2;
        options.data_file = self.has_data_file().then(|| DataFileOptions {
            name: Some(DATA_FILE.to_owned()),
            raw: self.data == DataPlace::Raw,
        });
        if self.base.is_some() {
            options.backing = BackingFile {
                name: Some(BASE_FILE.to_owned()),
                format: Some("raw".to_owned()),
            };
        }
        options.preallocation = Preallocation::Off;
        options
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// What the disk shows before anything is written.
    pub fn empty(&self) -> Content {
        let mut content = match &self.base {
            Some(base) => base.content().clone(),
            None => Content::new(0),
        };
        content.resize(self.size);
        content
    }

    /// The second reader on an image of this kind.
    pub fn audit<'a>(
        &'a self,
        bytes: &'a [u8],
        data: Option<&'a Arc<Memory>>,
    ) -> Result<Audit<'a>, Problem> {
        let audit = Audit::of(bytes, data)?;
        Ok(audit.over(self.base.as_ref().map(Base::content)))
    }

    /// Whether guest data lie in a file of their own.
    pub fn has_data_file(&self) -> bool {
        self.data != DataPlace::Own
    }

    /// What an L2 table maps.
    fn l2_span(&self) -> u64 {
        let entry = if self.extended_l2 { 16 } else { 8 };
        self.cluster_size() / entry * self.cluster_size()
    }

    fn random(random: &mut fastrand::Rng, images: Images) -> Case {
        let mut case = Case::random_format(random, images);
        let cluster = case.cluster_size();
        let l2_span = case.l2_span();
        let window = cluster * random.u64(4..=12).min((512 << 10) / cluster).max(4);
        let window = match images {
            // Borders of clusters lie inside of windows all the same.
            Images::Large => 512 << 10,
            _ => window,
        };
        // Two or three L2 tables; now and then an L1 table of several sectors.
        let spans = match random.u8(..6) {
            0 => 1,
            // All tables of a raw data file are there from the start.
            1 if case.data != DataPlace::Raw => random.u64(65..=130),
            _ => random.u64(1..=3),
        };
        let tail = 512 * random.u64(1..=window / 512);
        let size = spans * l2_span + tail;
        let border = random.u64(1..=spans) * l2_span;
        let half = (window / 2) & !511;
        case.size = size;
        case.windows = vec![
            0..window.min(size),
            border.saturating_sub(half)..(border + half).min(size),
            size.saturating_sub(window)..size,
        ];
        // What a refcount block counts. Where that is little, one write-back may have several new ones, which count each other's clusters.
        let block = cluster * (cluster * 8 / u64::from(case.refcount_bits));
        if block <= MAX_LONG / 2 && !case.has_data_file() && random.u8(..3) == 0 {
            case.long_writes = true;
            case.windows[0] = 0..random.u64(block / 512..=(4 * block).min(MAX_LONG) / 512) * 512;
            case.size = size.max(case.windows[0].end);
        }
        // What the first cluster of the refcount table can count.
        let counted = (cluster / 8) * block;
        if counted <= 2 << 20 && random.bool() {
            // So near to the end of it that a few clusters more need a larger table.
            let most = 1 << random.u32(..6);
            case.file_size = counted - cluster * random.u64(1..=most);
        }
        case.small_caches = random.bool();
        case.discard = random.u8(..4) > 0;
        let has_base = images == Images::Overlay || images == Images::Any && random.u8(..5) == 0;
        if has_base && case.data != DataPlace::Raw {
            let size = match random.u8(..4) {
                0 => size,
                1 => size + 512 * random.u64(1..=2 * window / 512),
                // It ends inside of the last window, or before it.
                2 => size.saturating_sub(512 * random.u64(1..=2 * tail / 512)),
                _ => border,
            };
            // What lies behind the end of the disk shows if that grows the wrong way.
            let mut windows = case.windows.clone();
            windows.push(case.size..size.max(case.size));
            case.base = Some(Base::random(random, size.max(512), &windows));
        }
        case.old_snapshots = case.compat == Compat::V0_10 && random.bool();
        case
    }

    /// Everything but sizes and how it is opened.
    fn random_format(random: &mut fastrand::Rng, images: Images) -> Case {
        let one_of = |random: &mut fastrand::Rng, kind: Images, share: u8| {
            let mixes = matches!(images, Images::Any | Images::Overlay);
            images == kind || mixes && random.u8(..share) == 0
        };
        let v2 = one_of(random, Images::V2, 8);
        let extended_l2 = !v2 && one_of(random, Images::ExtendedL2, 10);
        let has_data_file = !v2 && one_of(random, Images::DataFile, 8);
        let data = match has_data_file {
            true => *pick(random, &[DataPlace::External, DataPlace::Raw]),
            false => DataPlace::Own,
        };
        let extended_l2 = extended_l2 || images == Images::DataFile && random.u8(..3) == 0;
        let bitmaps = !v2 && !has_data_file && one_of(random, Images::Bitmaps, 6);
        let cluster_bits = match images {
            Images::Large => 21,
            _ if extended_l2 && has_data_file => 14,
            _ if has_data_file => *pick(random, &[9, 9, 9, 10, 12]),
            _ if extended_l2 => *pick(random, &[14, 14, 16]),
            _ => *pick(random, &[9, 9, 9, 9, 9, 9, 10, 12, 12, 12, 16]),
        };
        let refcount_bits = match v2 {
            true => 16,
            false => *pick(random, &[16, 16, 16, 16, 64, 64, 32, 8, 4, 2, 1]),
        };
        Case {
            cluster_bits,
            refcount_bits,
            compat: if v2 { Compat::V0_10 } else { Compat::V1_1 },
            size: 0,
            windows: Vec::new(),
            long_writes: false,
            file_size: 0,
            small_caches: false,
            discard: false,
            extended_l2,
            bitmaps,
            old_snapshots: false,
            data,
            storage: *pick(
                random,
                &[Storage::Sectors, Storage::Sectors, Storage::Requests],
            ),
            base: None,
        }
    }
}

/// A step of a change of the snapshots. Numbers count modulo the snapshots that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Take one.
    Create,
    /// Delete one.
    Delete(usize),
    /// Go back to one.
    Revert(usize),
}

/// How a change of several steps ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It happens.
    Finish,
    /// It happens and is taken back.
    RollBack,
    /// It is dropped before it happens.
    Drop,
}

/// How much longer the name of the backing file becomes, so that it moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackingName {
    /// As at the beginning.
    Short,
    /// By a third of a sector.
    Long,
    /// By most of a sector.
    Longest,
}

impl BackingName {
    /// The name.
    pub fn name(self) -> String {
        let folders = match self {
            BackingName::Short => 0,
            BackingName::Long => 80,
            BackingName::Longest => 240,
        };
        "./".repeat(folders) + BASE_FILE
    }

    /// Whether it is one of these.
    pub fn is_one(name: &str) -> bool {
        let all = [BackingName::Short, BackingName::Long, BackingName::Longest];
        all.iter().any(|one| one.name() == name)
    }
}

/// A change of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amendment {
    /// To version 3.
    Upgrade,
    /// Whether refcounts may be updated late; refused in version 2.
    LazyRefcounts(bool),
    /// The same backing file by another name.
    Backing(BackingName),
}

/// An operation of a script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// A guest write of stamped bytes.
    Write {
        /// Guest offset.
        at: u64,
        /// Bytes.
        len: u64,
        /// Durable when answered.
        fua: bool,
    },
    /// A compressed write of the cluster at `at`.
    Compress {
        /// Guest offset.
        at: u64,
    },
    /// A guest zero write.
    Zero {
        /// Guest offset.
        at: u64,
        /// Bytes.
        len: u64,
        /// May free the clusters.
        unmap: bool,
    },
    /// A guest discard.
    Discard {
        /// Guest offset.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// A guest flush.
    Flush,
    /// One snapshot is taken.
    Create,
    /// One snapshot is deleted.
    Delete(usize),
    /// Several steps at once.
    Change(Vec<Step>, End),
    /// As `Change`, but requests are let go when all steps are known, and a guest does this before the change ends.
    LetGo {
        /// The change.
        steps: Vec<Step>,
        /// What the guest does.
        ops: Vec<Op>,
        /// How the change ends.
        end: End,
    },
    /// Deletes and reverts of a change that goes ahead: a guest does this before and behind the switch, and the disk follows.
    Ahead {
        /// The change.
        steps: Vec<Step>,
        /// What the guest does.
        ops: Vec<Op>,
        /// How the change ends.
        end: End,
    },
    /// The disk gets this many bytes.
    Resize(u64),
    /// The image is closed and opened.
    Reopen,
    /// Guest requests at once, and a snapshot with them; the seed says in which order the file's requests complete.
    Together {
        /// The requests.
        ops: Vec<Op>,
        /// Whether a snapshot is taken.
        snapshot: bool,
        /// Of the order.
        seed: u64,
    },
    /// The format of the open image is changed.
    Amend(Amendment),
    /// Nothing happens for some milliseconds: time for work in the background.
    Idle(u64),
}

/// What a seed means.
#[derive(Debug, Clone)]
pub struct Script {
    /// Where it comes from.
    pub seed: u64,
    /// The image.
    pub case: Case,
    /// What fills the image before the log begins.
    pub before: Vec<Op>,
    /// What is logged.
    pub ops: Vec<Op>,
}

/// What a script is mostly about.
#[derive(Debug, Clone, Copy)]
enum Theme {
    Guest,
    Snapshots,
    Resize,
    Mixed,
}

impl Script {
    /// The script of a seed.
    pub fn random(seed: u64, images: Images) -> Script {
        let mut random = fastrand::Rng::with_seed(seed);
        let case = Case::random(&mut random, images);
        let themes = [
            Theme::Guest,
            Theme::Snapshots,
            Theme::Snapshots,
            Theme::Mixed,
            Theme::Mixed,
            Theme::Resize,
        ];
        let theme = *pick(&mut random, &themes);
        let mut before = vec![fill(&mut random, &case)];
        for _ in 0..random.usize(0..=4) {
            before.push(random_op(&mut random, &case, Theme::Mixed));
        }
        let ops = (0..random.usize(2..=7))
            .map(|_| random_op(&mut random, &case, theme))
            .collect();
        Script {
            seed,
            case,
            before,
            ops,
        }
    }

    /// What a guest may do behind a recovery: most of all writes where snapshots have data.
    pub fn aftermath(random: &mut fastrand::Rng, case: &Case) -> Vec<Op> {
        let mut ops = vec![fill(random, case)];
        for _ in 0..random.usize(1..=3) {
            ops.push(random_op(random, case, Theme::Guest));
        }
        if random.u8(..4) == 0 {
            ops.push(random_op(random, case, Theme::Snapshots));
            ops.push(random_op(random, case, Theme::Guest));
        }
        ops
    }
}

fn pick<'a, T>(random: &mut fastrand::Rng, from: &'a [T]) -> &'a T {
    &from[random.usize(..from.len())]
}

/// A write of much of one window.
fn fill(random: &mut fastrand::Rng, case: &Case) -> Op {
    let window = pick(random, &case.windows).clone();
    fill_window(random, &window)
}

fn fill_window(random: &mut fastrand::Rng, window: &Range<u64>) -> Op {
    let len = window.end - window.start;
    let skip = random.u64(..len / 2) & !511;
    Op::Write {
        at: window.start + skip,
        len: random.u64(len / 4..=len - skip).next_multiple_of(512),
        fua: false,
    }
}

/// A range inside a window: often at borders of clusters or subclusters, seldom at odd bytes.
fn range(random: &mut fastrand::Rng, case: &Case) -> (u64, u64) {
    let cluster = match case.extended_l2 && random.bool() {
        true => case.cluster_size() / 32,
        false => case.cluster_size(),
    };
    let window = pick(random, &case.windows).clone();
    let mut at = random.u64(window.clone());
    let longest = match random.u8(..4) {
        0 => 2048,
        1 => 4 * cluster,
        _ => 2 * cluster,
    };
    let mut len = random.u64(1..=longest);
    match random.u8(..8) {
        0 => {}
        1..=3 => {
            at &= !511;
            len = len.next_multiple_of(512);
        }
        _ => {
            at &= !(cluster - 1);
            len = len.next_multiple_of(cluster);
        }
    }
    if case.storage == Storage::Requests {
        at &= !511;
        len = len.next_multiple_of(512);
    }
    at = at.max(window.start);
    (at, len.min(window.end - at))
}

fn random_op(random: &mut fastrand::Rng, case: &Case, theme: Theme) -> Op {
    let (guest, snapshots, resize) = match theme {
        Theme::Guest => (90, 4, 1),
        Theme::Snapshots => (35, 60, 1),
        Theme::Resize => (45, 20, 30),
        Theme::Mixed => (60, 30, 4),
    };
    if case.compat == Compat::V0_10 && random.u8(..12) == 0 {
        return Op::Amend(Amendment::Upgrade);
    }
    if case.base.is_some() && random.u8(..20) == 0 {
        let names = [BackingName::Short, BackingName::Long, BackingName::Longest];
        return Op::Amend(Amendment::Backing(*pick(random, &names)));
    }
    let dice = random.u8(..100);
    if dice < guest {
        return guest_op(random, case);
    }
    if dice < guest + snapshots / 6 {
        return Op::Together {
            ops: (0..random.usize(2..=5))
                .map(|_| match guest_op(random, case) {
                    Op::Compress { .. } => Op::Flush,
                    op => op,
                })
                .collect(),
            snapshot: random.bool(),
            seed: random.u64(..),
        };
    }
    if dice < guest + snapshots {
        return snapshot_op(random, case);
    }
    if dice < guest + snapshots + resize {
        return Op::Resize(new_size(random, case));
    }
    match random.u8(..5) {
        0..=1 => Op::Reopen,
        2..=3 => Op::Idle(*pick(random, &[1, 20, 500, 5000])),
        _ => Op::Amend(Amendment::LazyRefcounts(random.bool())),
    }
}

fn guest_op(random: &mut fastrand::Rng, case: &Case) -> Op {
    let (at, len) = range(random, case);
    // Large clusters are compressed on other threads, so that a seed would not give the same run again; and data files hold no
    // streams.
    let compresses = case.cluster_bits < 16 && !case.has_data_file();
    match random.u8(..20) {
        0..=2 if case.long_writes => fill_window(random, &case.windows[0]),
        9..=10 if compresses => Op::Compress {
            at: at & !(case.cluster_size() - 1),
        },
        0..=10 => Op::Write {
            at,
            len,
            fua: random.u8(..8) == 0,
        },
        11..=13 => Op::Zero {
            at,
            len,
            unmap: random.bool(),
        },
        14..=16 => Op::Discard { at, len },
        _ => Op::Flush,
    }
}

fn snapshot_op(random: &mut fastrand::Rng, case: &Case) -> Op {
    let nth = random.usize(..16);
    match random.u8(..18) {
        15.. => Op::Ahead {
            steps: (0..random.usize(1..=3))
                .map(|_| match random.u8(..3) {
                    0 => Step::Delete(random.usize(..16)),
                    _ => Step::Revert(random.usize(..16)),
                })
                .collect(),
            ops: (0..random.usize(1..=6))
                .map(|_| guest_op(random, case))
                .collect(),
            end: *pick(
                random,
                &[End::Finish, End::Finish, End::RollBack, End::Drop],
            ),
        },
        12.. => Op::LetGo {
            steps: (0..random.usize(1..=3))
                .map(|_| match random.u8(..3) {
                    0 => Step::Delete(random.usize(..16)),
                    _ => Step::Create,
                })
                .collect(),
            ops: (0..random.usize(1..=5))
                .map(|_| guest_op(random, case))
                .collect(),
            end: *pick(
                random,
                &[End::Finish, End::Finish, End::RollBack, End::Drop],
            ),
        },
        0..=3 => Op::Create,
        4..=5 => Op::Delete(nth),
        6..=8 => Op::Change(vec![Step::Revert(nth)], End::Finish),
        _ => {
            let steps = (0..random.usize(1..=3))
                .map(|_| match random.u8(..3) {
                    0 => Step::Create,
                    1 => Step::Delete(random.usize(..16)),
                    _ => Step::Revert(random.usize(..16)),
                })
                .collect();
            let end = *pick(
                random,
                &[End::Finish, End::Finish, End::RollBack, End::Drop],
            );
            Op::Change(steps, end)
        }
    }
}

fn new_size(random: &mut fastrand::Rng, case: &Case) -> u64 {
    let l2_span = case.l2_span();
    let size = match random.u8(..5) {
        0 => case.size / 2,
        1 => case.size + random.u64(1..=4) * l2_span,
        2 => case
            .size
            .saturating_sub(case.cluster_size() * random.u64(1..6)),
        3 => case.size.saturating_sub(512 * random.u64(1..40)),
        _ => case.size,
    };
    (size & !511).max(512)
}
