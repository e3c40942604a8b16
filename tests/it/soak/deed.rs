//! What commands and transactions do to disks, as a client says it and as a model of the disks follows it.

use std::collections::BTreeMap;

use fastrand::Rng;
use serde_json::{Value, json};

/// How many layers a disk has at most.
const LAYERS: usize = 8;

/// A disk as it has to be.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    /// The drive.
    pub(super) name: String,
    /// The file on top.
    pub(super) top: String,
    pub(super) content: Vec<u8>,
    /// What the internal snapshots of the image on top hold.
    pub(super) snapshots: BTreeMap<String, Vec<u8>>,
    /// The files below, and what each holds with those under it.
    pub(super) below: Vec<(String, Vec<u8>)>,
}

/// A backup that was begun: what its target has to hold if it completes.
#[derive(Debug, Clone)]
pub(super) struct Copy {
    pub(super) target: String,
    pub(super) format: &'static str,
    pub(super) content: Vec<u8>,
}

/// All that there has to be.
#[derive(Debug, Clone, Default)]
pub(super) struct World {
    pub(super) disks: Vec<Disk>,
    /// By the ids of their jobs.
    pub(super) copies: BTreeMap<String, Copy>,
}

/// One action.
#[derive(Debug, Clone)]
pub(super) enum Deed {
    Snapshot(String),
    Delete(String),
    Revert(String),
    Overlay(String),
    Backup {
        job: String,
        target: String,
        format: &'static str,
        more: Value,
    },
}

/// An action on the disk of this number.
pub(super) type OnDisk = (usize, Deed);

impl Deed {
    /// Any, that is likely to be possible. `number` makes its names new.
    pub(super) fn draw(rng: &mut Rng, disk: &Disk, number: u64) -> Deed {
        let kept: Vec<&String> = disk.snapshots.keys().collect();
        match (rng.u8(..8), rng.choice(kept)) {
            (0, Some(name)) => Deed::Delete(name.clone()),
            (1, Some(name)) => Deed::Revert(name.clone()),
            (2, _) if disk.below.len() < LAYERS => Deed::Overlay(format!("layer{number}.qcow2")),
            (0..=3, _) => Deed::Snapshot(format!("snapshot{number}")),
            _ => Deed::draw_backup(rng, number),
        }
    }

    fn draw_backup(rng: &mut Rng, number: u64) -> Deed {
        let format = rng.choice(["qcow2", "raw"]).unwrap_or("raw");
        let mut more = json!({"sync": "full"});
        if format == "qcow2" {
            more["sync"] = json!(rng.choice(["full", "top"]));
            more["compress"] = json!(rng.u8(..6) == 0);
        }
        if rng.u8(..3) == 0 {
            more["speed"] = json!(rng.choice([1 << 20, 8 << 20, 64 << 20]));
        }
        if rng.u8(..4) == 0 {
            more["x-perf"] =
                json!({"max-workers": rng.choice([1, 4, 64]), "use-copy-range": rng.bool()});
        }
        more["auto-finalize"] = json!(rng.u8(..5) > 0);
        more["auto-dismiss"] = json!(rng.u8(..5) > 0);
        Deed::Backup {
            job: format!("job{number}"),
            target: format!("target{number}.{format}"),
            format,
            more,
        }
    }

    /// As a transaction has it: the type of the action, and its data.
    fn said(&self, device: &str) -> (&'static str, Value) {
        match self {
            Deed::Snapshot(name) => (
                "blockdev-snapshot-internal-sync",
                json!({"device": device, "name": name}),
            ),
            Deed::Delete(name) => (
                "x-blockdev-snapshot-delete-internal-sync",
                json!({"device": device, "name": name}),
            ),
            Deed::Revert(name) => (
                "x-blockdev-snapshot-revert",
                json!({"device": device, "name": name}),
            ),
            Deed::Overlay(file) => (
                "blockdev-snapshot-sync",
                json!({"device": device, "snapshot-file": file}),
            ),
            Deed::Backup {
                job,
                target,
                format,
                more,
            } => {
                let mut data =
                    json!({"device": device, "job-id": job, "target": target, "format": format});
                if let (Some(data), Some(more)) = (data.as_object_mut(), more.as_object()) {
                    data.extend(more.clone());
                }
                ("drive-backup", data)
            }
        }
    }

    /// An action of a transaction.
    pub(super) fn action(&self, device: &str) -> Value {
        let (kind, data) = self.said(device);
        json!({"type": kind, "data": data})
    }

    /// A command of its own.
    pub(super) fn command(&self, device: &str) -> (&'static str, Value) {
        let (kind, data) = self.said(device);
        // As a command it is QEMU's.
        let name = match self {
            Deed::Delete(_) => "blockdev-snapshot-delete-internal-sync",
            _ => kind,
        };
        (name, data)
    }

    /// Lets it happen; `None` where it can't.
    fn happens(&self, disk: &mut Disk, copies: &mut BTreeMap<String, Copy>) -> Option<()> {
        match self {
            Deed::Snapshot(name) => {
                disk.snapshots.insert(name.clone(), disk.content.clone());
            }
            Deed::Delete(name) => {
                disk.snapshots.remove(name)?;
            }
            Deed::Revert(name) => disk.content = disk.snapshots.get(name)?.clone(),
            Deed::Overlay(file) => {
                let below = std::mem::replace(&mut disk.top, file.clone());
                disk.below.push((below, disk.content.clone()));
                disk.snapshots.clear();
            }
            Deed::Backup {
                job,
                target,
                format,
                ..
            } => {
                let copy = Copy {
                    target: target.clone(),
                    format,
                    content: disk.content.clone(),
                };
                copies.insert(job.clone(), copy);
            }
        }
        Some(())
    }
}

impl World {
    /// The world in which all of this has happened, in its order; `None` where it can't.
    pub(super) fn behind(&self, deeds: &[OnDisk]) -> Option<World> {
        let mut world = self.clone();
        for (number, deed) in deeds {
            deed.happens(&mut world.disks[*number], &mut world.copies)?;
        }
        Some(world)
    }
}
