//! What a transaction does to which disks, from a seed.

use super::DISKS;

/// A format of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Raw,
    Qcow2,
}

impl Format {
    pub(super) fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// How an overlay gets there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OverlayBy {
    /// `blockdev-snapshot-sync` makes it.
    New,
    /// `blockdev-snapshot-sync` opens a file that is there.
    Existing,
    /// `blockdev-snapshot` takes a node.
    Node,
}

/// What is copied of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sync {
    Full,
    Top,
    None,
}

/// A backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Backup {
    /// `blockdev-backup` or `drive-backup`.
    pub(super) is_to_node: bool,
    pub(super) format: Format,
    pub(super) sync: Sync,
    /// How what guests overwrite is kept.
    pub(super) kept: &'static str,
    pub(super) compress: bool,
    /// Bytes per second, 0 for as many as it can.
    pub(super) speed: u64,
}

/// An action on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Act {
    Internal,
    /// An internal snapshot that nobody looks at, and that one of the next transactions deletes.
    Passing,
    /// An internal snapshot, and back to it: guests see the same.
    Revert,
    Overlay(OverlayBy),
    Backup(Backup),
}

/// A transaction.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// The disk of each action.
    pub(super) acts: Vec<(usize, Act)>,
    pub(super) is_grouped: bool,
    /// It ends with an action that fails.
    pub(super) is_aborted: bool,
}

/// What all actions of a transaction are, where the disks can do that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Only {
    Internal,
    Overlays,
    Backups,
}

/// What is known of a disk when something is drawn for it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Drawn {
    /// Of the topmost image.
    pub(super) format: Format,
    pub(super) has_backing: bool,
    /// A backup of it is under way: it takes snapshots and further backups, and nothing else.
    pub(super) is_copied: bool,
}

/// The options of `qemu-img create` for an image of a disk; none for a raw one.
pub(super) fn image(random: &mut fastrand::Rng) -> Option<String> {
    let cluster = ["4k", "16k", "64k", "512"][random.usize(..4)];
    Some(match random.u8(..8) {
        0 | 1 => return None,
        2 => format!("compat=0.10,cluster_size={cluster}"),
        3 => format!("refcount_bits=8,cluster_size={cluster}"),
        4 => format!("refcount_bits=64,cluster_size={cluster}"),
        5 => "extended_l2=on,cluster_size=64k".to_owned(),
        _ => format!("cluster_size={cluster}"),
    })
}

impl Plan {
    /// All disks take part in it, each in some way.
    pub(super) fn random(random: &mut fastrand::Rng, disks: [Drawn; DISKS.len()]) -> Plan {
        let mut acts = Vec::new();
        // One kind alone takes ways of its own: guests wait for no I/O where all actions are internal snapshots, and only backups
        // know the grouped mode.
        let only = match random.u8(..6) {
            0 => Some(Only::Internal),
            1 => Some(Only::Backups),
            2 => Some(Only::Overlays),
            _ => None,
        };
        for (number, mut disk) in disks.into_iter().enumerate() {
            for _ in 0..1 + usize::from(random.u8(..4) == 0) {
                let act = match only {
                    Some(Only::Internal) if disk.format == Format::Qcow2 => Act::Internal,
                    Some(Only::Overlays) if !disk.is_copied => Act::Overlay(OverlayBy::New),
                    Some(Only::Backups) => {
                        Act::Backup(backup(random, disk.format, disk.has_backing))
                    }
                    _ => disk.act(random),
                };
                disk.follow(&act);
                acts.push((number, act));
            }
        }
        // Actions of one disk keep their order, and mix with those of others.
        for _ in 0..acts.len() {
            let at = random.usize(1..acts.len());
            if acts[at - 1].0 != acts[at].0 {
                acts.swap(at - 1, at);
            }
        }
        // Other actions do not know that mode.
        let is_grouped = only == Some(Only::Backups) && random.bool();
        Plan {
            acts,
            is_grouped,
            is_aborted: !is_grouped && random.u8(..12) == 0,
        }
    }

    /// An overlay on one disk.
    pub(super) fn overlay(disk: usize) -> Plan {
        Plan {
            acts: vec![(disk, Act::Overlay(OverlayBy::New))],
            is_grouped: false,
            is_aborted: false,
        }
    }

    /// Backups of all disks that copy only what guests overwrite.
    pub(super) fn fleecing(random: &mut fastrand::Rng) -> Plan {
        let backup = |random: &mut fastrand::Rng| Backup {
            sync: Sync::None,
            format: Format::Qcow2,
            is_to_node: false,
            compress: false,
            ..backup(random, Format::Raw, false)
        };
        let acts = (0..DISKS.len()).map(|disk| (disk, Act::Backup(backup(random))));
        Plan {
            acts: acts.collect(),
            is_grouped: false,
            is_aborted: false,
        }
    }
}

impl Drawn {
    fn act(self, random: &mut fastrand::Rng) -> Act {
        let is_qcow2 = self.format == Format::Qcow2;
        match random.u8(..12) {
            0..3 if is_qcow2 => Act::Internal,
            3 if is_qcow2 => Act::Passing,
            4 if is_qcow2 && !self.is_copied => Act::Revert,
            5..8 if !self.is_copied => Act::Overlay(match random.u8(..6) {
                0..4 => OverlayBy::New,
                4 => OverlayBy::Node,
                _ => OverlayBy::Existing,
            }),
            _ => Act::Backup(backup(random, self.format, self.has_backing)),
        }
    }

    /// What it is behind an action.
    fn follow(&mut self, act: &Act) {
        match act {
            Act::Internal | Act::Passing | Act::Revert => {}
            Act::Overlay(_) => {
                self.format = Format::Qcow2;
                self.has_backing = true;
            }
            Act::Backup(_) => self.is_copied = true,
        }
    }
}

/// A backup that shows all of a disk, alone or with what the disk's image stands on.
fn backup(random: &mut fastrand::Rng, source: Format, has_backing: bool) -> Backup {
    let is_to_node = random.bool();
    let format = match random.u8(..3) {
        0 => Format::Raw,
        _ => Format::Qcow2,
    };
    // Without a backing of its own a target shows only what the topmost image has.
    let may_be_top = !has_backing || !is_to_node && format == Format::Qcow2;
    let kept = match source {
        Format::Raw => ["auto", "copy-before-write"][random.usize(..2)],
        Format::Qcow2 => ["auto", "copy-before-write", "internal-snapshot"][random.usize(..3)],
    };
    Backup {
        is_to_node,
        format,
        sync: match may_be_top && random.u8(..4) == 0 {
            true => Sync::Top,
            false => Sync::Full,
        },
        kept,
        compress: format == Format::Qcow2 && random.u8(..8) == 0,
        speed: match random.u8(..8) {
            0 => 32 << 20,
            1 => 128 << 20,
            _ => 0,
        },
    }
}
