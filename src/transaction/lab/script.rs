//! Three disks, some of them chains, and what is done to them, from a seed.

use std::collections::BTreeMap;
use std::sync::Arc;

use block::copy::SyncMode;
use block::crashlab::audit::Bitmap;
use block::crashlab::content::Content;
use block::formats::qcow2::create::{Compat, CreateOptions};

use super::tape::{Behind, DEVICE, Failure, Fault};

/// The disks.
pub(super) const DISKS: usize = 3;
/// Bytes of each.
pub(super) const DISK_BYTES: u64 = 96 << 10;
/// Bytes of a block device: clusters for an image, and for what is written to it.
pub(super) const DEVICE_BYTES: usize = 2 << 20;
/// The longest guest write.
pub(super) const LONGEST_WRITE: u64 = 6 << 10;

/// The images that a disk begins with, by their place in its chain.
pub(super) fn image_name(disk: usize, level: usize) -> String {
    format!("disk{disk}-{level}")
}

/// What a transaction asks of the host, at most, but for few: all of it, and behind the journal's last records.
const LONGEST_TRANSACTION: u64 = 130;
const LONGEST_END: u64 = 40;

/// What somebody else has put where a file is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum There {
    Nothing,
    Empty,
    Bytes,
    /// A block device with something in front.
    Device,
    /// An image, which is added as a node and named by that.
    Image,
}

/// A file that a transaction makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NewFile {
    pub(super) name: String,
    pub(super) there: There,
}

/// How a disk is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Copying {
    pub(super) sync: SyncMode,
    /// Bytes are shared where that is possible.
    pub(super) shares: bool,
}

/// An action of a transaction. Numbers of snapshots count modulo those of the topmost image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Act {
    Create(usize),
    Delete(usize, usize),
    Revert(usize, usize),
    External(usize, NewFile),
    Backup(usize, Copying, NewFile),
    /// Makes the transaction fail.
    Abort,
}

/// An operation of a script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Op {
    /// A guest of this disk writes.
    Write {
        disk: usize,
        at: u64,
        len: u64,
    },
    /// A guest of this disk flushes.
    Flush(usize),
    Transaction(Vec<Act>),
    /// One in which something fails that it asks of the host, or its guests. Nothing comes behind it.
    Failing(Vec<Act>, Vec<Failure>),
    /// Time for what goes on behind answers.
    Idle,
}

/// What is tried.
#[derive(Debug, Clone)]
pub(super) struct Script {
    pub(super) seed: u64,
    /// How the images are made.
    pub(super) images: [CreateOptions; DISKS],
    /// Whether a disk begins as an overlay.
    pub(super) has_overlay: [bool; DISKS],
    /// Whether its first image, of version 3, begins with persistent bitmaps, as another program leaves them.
    pub(super) has_bitmaps: [bool; DISKS],
    /// Guests write while transactions run. Of the random ones none reverts then: they do so in scripts of their own.
    pub(super) has_guests: bool,
    pub(super) ops: Vec<Op>,
}

impl Script {
    pub(super) fn random(seed: u64) -> Script {
        let mut random = fastrand::Rng::with_seed(seed);
        let random = &mut random;
        let images = [(); DISKS].map(|()| {
            let mut options = CreateOptions::new(DISK_BYTES);
            options.cluster_size = [512, 4096, 16384][random.usize(..3)];
            let is_old = random.u8(..4) == 0;
            options.compat = if is_old { Compat::V0_10 } else { Compat::V1_1 };
            options.refcount_bits = if is_old {
                16
            } else {
                [16, 64, 4][random.usize(..3)]
            };
            options.extended_l2 = !is_old && options.cluster_size == 16384 && random.bool();
            options.lazy_refcounts = !is_old && random.u8(..4) == 0;
            options
        });
        let has_bitmaps = [(); DISKS].map(|()| random.u8(..4) == 0);
        let has_guests = random.bool();
        let mut ops = Vec::new();
        for _ in 0..random.usize(1..=2) {
            for _ in 0..random.usize(2..5) {
                ops.push(write(random));
            }
            if random.u8(..3) == 0 {
                ops.push(Op::Flush(random.usize(..DISKS)));
            }
            ops.push(Op::Transaction(acts(random, ops.len(), has_guests)));
        }
        ops.push(write(random));
        ops.push(Op::Flush(random.usize(..DISKS)));
        match random.u8(..4) {
            0 | 1 => ops.push(Op::Idle),
            2 => {
                let mut acts = acts(random, ops.len(), has_guests);
                acts.retain(|act| *act != Act::Abort);
                ops.push(Op::Failing(acts, failures(random)));
            }
            _ => {}
        }
        Script {
            seed,
            images,
            has_overlay: [(); DISKS].map(|()| random.u8(..4) == 0),
            has_bitmaps,
            has_guests,
            ops,
        }
    }
}

impl Script {
    /// One transaction that lets guests go on undecided, and fails behind the journal's commit: on one disk an overlay, on the
    /// others snapshots.
    pub(super) fn taken_back(seed: u64) -> Script {
        /// What is done to the host from the commit to the end, with what guests do meanwhile.
        const LONGEST: u64 = 24;
        let mut script = Script::random(seed);
        let mut random = fastrand::Rng::with_seed(!seed);
        let random = &mut random;
        for image in &mut script.images {
            (image.compat, image.refcount_bits) = (Compat::V1_1, 16);
        }
        script.has_guests = true;
        let covered = random.usize(..DISKS);
        let mut acts: Vec<Act> = (0..DISKS)
            .map(|disk| match disk == covered {
                true => {
                    let there = [There::Nothing, There::Empty, There::Bytes][random.usize(..3)];
                    let name = format!("new-{disk}");
                    Act::External(disk, NewFile { name, there })
                }
                false => Act::Create(disk),
            })
            .collect();
        if random.bool() {
            // Over the one that is there then.
            let there = There::Nothing;
            let name = "new-above".to_owned();
            acts.push(Act::External(
                random.usize(..DISKS),
                NewFile { name, there },
            ));
        }
        let mut failures = failures(random);
        failures[0].behind = Behind::Commit;
        if let Some(second) = failures.get_mut(1)
            && random.bool()
        {
            second.behind = Behind::Abort;
        }
        for failure in &mut failures {
            failure.skip %= LONGEST;
        }
        let write = write(random);
        script.ops = vec![write, Op::Failing(acts, failures)];
        script
    }
}

impl Script {
    /// One transaction that reverts disks and deletes snapshots, and does most of it while guests write; perhaps it fails.
    pub(super) fn goes_ahead(seed: u64) -> Script {
        /// What is done to the host from the commit to the end, with what guests do meanwhile.
        const LONGEST: u64 = 40;
        let mut script = Script::random(seed);
        let mut random = fastrand::Rng::with_seed(!seed);
        let random = &mut random;
        for image in &mut script.images {
            image.compat = Compat::V1_1;
        }
        script.has_guests = true;
        if random.u8(..8) > 0 {
            // With them none goes ahead.
            script.has_bitmaps = [false; DISKS];
        }
        script.ops = vec![write(random), write(random)];
        let taken: Vec<Act> = (0..DISKS)
            .filter(|_| random.bool())
            .map(Act::Create)
            .collect();
        if !taken.is_empty() {
            script.ops.push(Op::Transaction(taken));
            script.ops.push(write(random));
        }
        if random.bool() {
            script.ops.push(Op::Flush(random.usize(..DISKS)));
        }
        let mut acts = vec![Act::Revert(random.usize(..DISKS), random.usize(..2))];
        for _ in 0..random.usize(1..=4) {
            let (disk, nth) = (random.usize(..DISKS), random.usize(..4));
            acts.push(match random.u8(..3) {
                0 => Act::Delete(disk, nth),
                _ => Act::Revert(disk, nth),
            });
        }
        if random.bool() {
            let mut failures = failures(random);
            for failure in &mut failures {
                failure.skip %= LONGEST;
            }
            script.ops.push(Op::Failing(acts, failures));
            return script;
        }
        script.ops.push(Op::Transaction(acts));
        if random.bool() {
            script.ops.push(write(random));
            script.ops.push(Op::Idle);
        }
        script
    }
}

fn write(random: &mut fastrand::Rng) -> Op {
    let len = 512 * random.u64(1..=LONGEST_WRITE / 512);
    Op::Write {
        disk: random.usize(..DISKS),
        // The last sector is that of guests beside.
        at: 512 * random.u64(..(DISK_BYTES - len) / 512),
        len,
    }
}

/// What fails, and perhaps something more when that is taken back.
fn failures(random: &mut fastrand::Rng) -> Vec<Failure> {
    // Not in the middle: a header's first sector is written whole or not at all.
    let fault = |random: &mut fastrand::Rng| [Fault::Io, Fault::NoSpace][random.usize(..2)];
    let (behind, longest) = match random.u8(..4) {
        0 => (Behind::Now, LONGEST_TRANSACTION),
        1 => (Behind::Stages, LONGEST_END),
        _ => (Behind::Commit, LONGEST_END),
    };
    let mut failures = vec![Failure {
        behind,
        skip: random.u64(..longest),
        fault: fault(random),
    }];
    if random.u8(..3) == 0 {
        failures.push(Failure {
            behind: Behind::Now,
            skip: random.u64(..LONGEST_END / 2),
            fault: fault(random),
        });
    }
    failures
}

/// The actions of the transaction that is the operation `nth`. With guests it reverts nothing.
fn acts(random: &mut fastrand::Rng, nth: usize, has_guests: bool) -> Vec<Act> {
    let file = |random: &mut fastrand::Rng, act: usize| {
        let there = match random.u8(..7) {
            0 | 1 => There::Nothing,
            2 => There::Empty,
            3 => There::Bytes,
            4 => There::Device,
            _ => There::Image,
        };
        let prefix = match there {
            There::Device => DEVICE,
            _ => "new",
        };
        let name = format!("{prefix}{nth}-{act}");
        NewFile { name, there }
    };
    let mut acts = Vec::new();
    let mut backed_up = [false; DISKS];
    let mut on_device = [false; DISKS];
    for act in 0..random.usize(2..=5) {
        let disk = random.usize(..DISKS);
        if on_device[disk] {
            // An image that was just made on a device takes no snapshots.
            continue;
        }
        if backed_up[disk] {
            // A disk that is copied takes snapshots, and nothing else.
            acts.push(Act::Create(disk));
            continue;
        }
        acts.push(match random.u8(..12) {
            0..4 => Act::Create(disk),
            4 | 5 => Act::Delete(disk, random.usize(..4)),
            6 | 7 if has_guests => Act::Create(disk),
            6 | 7 => Act::Revert(disk, random.usize(..4)),
            8..10 => {
                let file = file(random, act);
                on_device[disk] = file.there == There::Device;
                Act::External(disk, file)
            }
            _ => {
                backed_up[disk] = true;
                let sync = [SyncMode::Full, SyncMode::Top, SyncMode::None][random.usize(..3)];
                let shares = random.bool();
                Act::Backup(disk, Copying { sync, shares }, file(random, act))
            }
        });
    }
    if random.u8(..6) == 0 {
        acts.push(Act::Abort);
    }
    acts
}

/// A snapshot that an image has to have.
#[derive(Debug, Clone)]
pub(super) struct Snapshot {
    pub(super) name: String,
    pub(super) content: Arc<Content>,
}

/// An image that there has to be.
#[derive(Debug, Clone)]
pub(super) struct Image {
    /// The name of its file.
    pub(super) file: String,
    pub(super) snapshots: Vec<Snapshot>,
    /// What it shows with all that is below it.
    pub(super) content: Arc<Content>,
    /// Its bitmaps, as they were when it was empty.
    pub(super) bitmaps: Arc<[Bitmap]>,
}

impl Image {
    /// One that has nothing of its own.
    pub(super) fn new(file: String, content: Arc<Content>) -> Image {
        Image {
            file,
            snapshots: Vec::new(),
            content,
            bitmaps: Arc::default(),
        }
    }
}

/// What there has to be of a disk: its images, the topmost last. There is at least one.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    pub(super) chain: Vec<Image>,
}

impl Disk {
    pub(super) fn top(&self) -> &Image {
        self.chain.last().unwrap()
    }

    pub(super) fn top_mut(&mut self) -> &mut Image {
        self.chain.last_mut().unwrap()
    }
}

/// A file besides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Other {
    /// With these bytes.
    Bytes(Vec<u8>),
    /// An image that shows nothing of its own and has no snapshots.
    Empty,
    /// The target of a backup.
    Target {
        /// What it shows when the backup has ended; before that anything.
        content: Option<Arc<Content>>,
    },
}

/// Everything that there has to be.
#[derive(Debug, Clone)]
pub(super) struct World {
    pub(super) disks: Vec<Disk>,
    pub(super) others: BTreeMap<String, Other>,
}

impl There {
    pub(super) fn bytes(self) -> Option<Vec<u8>> {
        match self {
            There::Nothing | There::Image => None,
            There::Empty => Some(Vec::new()),
            There::Bytes => Some(b"of somebody else".repeat(100)),
            There::Device => {
                // Something in each cluster of the metadata, and behind them.
                let mut bytes = vec![0; DEVICE_BYTES];
                for cluster in bytes.chunks_mut(64 << 10).take(6) {
                    cluster[..3200].copy_from_slice(&b"on a device, too".repeat(200));
                }
                Some(bytes)
            }
        }
    }
}

impl Script {
    /// The images that transactions are to find as nodes, and what each stands on when it becomes an overlay.
    pub(super) fn nodes(&self) -> Vec<(String, Option<String>)> {
        let mut tops = [0, 1, 2].map(|disk: usize| Script::first_top(self, disk));
        let mut nodes = Vec::new();
        for op in &self.ops {
            let (Op::Transaction(acts) | Op::Failing(acts, _)) = op else {
                continue;
            };
            let mut after = tops.clone();
            for act in acts {
                let (file, base) = match act {
                    Act::External(disk, file) => {
                        let top = &mut after[*disk];
                        (file, Some(std::mem::replace(top, file.name.clone())))
                    }
                    Act::Backup(_, _, file) => (file, None),
                    _ => continue,
                };
                if file.there == There::Image {
                    nodes.push((file.name.clone(), base));
                }
            }
            if !acts.contains(&Act::Abort) {
                tops = after;
            }
        }
        nodes
    }

    /// The topmost image that a disk begins with.
    fn first_top(&self, disk: usize) -> String {
        image_name(disk, usize::from(self.has_overlay[disk]))
    }

    /// The files that transactions make.
    pub(super) fn files(&self) -> impl Iterator<Item = &NewFile> {
        let acts = self.ops.iter().flat_map(|op| match op {
            Op::Transaction(acts) | Op::Failing(acts, _) => &acts[..],
            _ => &[],
        });
        acts.filter_map(|act| match act {
            Act::External(_, file) | Act::Backup(_, _, file) => Some(file),
            _ => None,
        })
    }
}

impl World {
    /// All names in the folder.
    pub(super) fn names(&self) -> Vec<String> {
        let images = self.disks.iter().flat_map(|disk| &disk.chain);
        let mut names: Vec<String> = images.map(|image| image.file.clone()).collect();
        names.extend(self.others.keys().cloned());
        names.sort();
        names
    }
}
