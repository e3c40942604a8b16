//! A transaction of a script as the daemon gets it, and what it is to leave.

use block::copy::SyncMode;
use block::driver::SnapshotSelector;
use block::graph::OnError;

use super::run::{Job, Place, drive};
use super::script::{Act, Copying, DISKS, Disk, Image, NewFile, Other, Snapshot, There, World};
use crate::transaction::{
    Abort, Action, BackupAction, BackupOptions, BackupPerf, BackupTarget, ExternalSnapshot,
    FileTarget, Operation, Overlay, OverlayFile, SnapshotAction, TargetMode,
};

/// A transaction, and what it is to leave.
pub(super) struct Planned {
    pub(super) world: World,
    pub(super) actions: Vec<Box<dyn Action>>,
    pub(super) durable: [bool; DISKS],
    pub(super) at_once: [bool; DISKS],
    /// Disks that have got an overlay so far: what is below it is durable with the answer only.
    pub(super) covered: [bool; DISKS],
    /// Disks that have gone back.
    pub(super) reverted: [bool; DISKS],
    pub(super) jobs: Vec<Job>,
}

impl Planned {
    pub(super) fn add(&mut self, act: Act, place: &Place, name: String) {
        match act {
            Act::Create(disk) => {
                self.world.disks[disk].take(name.clone());
                self.internal(disk, Operation::Create { name });
            }
            Act::Delete(disk, nth) => {
                if let Some((nth, which)) = self.select(disk, nth) {
                    self.world.disks[disk].top_mut().snapshots.remove(nth);
                    self.internal(disk, Operation::Delete(which));
                }
            }
            Act::Revert(disk, nth) => {
                if let Some((nth, which)) = self.select(disk, nth) {
                    let top = self.world.disks[disk].top_mut();
                    top.content = top.snapshots[nth].content.clone();
                    self.reverted[disk] = true;
                    self.internal(disk, Operation::Revert(which));
                }
            }
            Act::External(disk, file) => self.external(disk, file, place),
            Act::Backup(disk, copying, file) => self.backup(disk, copying, file, place),
            Act::Abort => self.actions.push(Box::new(Abort)),
        }
    }

    fn internal(&mut self, disk: usize, operation: Operation) {
        self.durable[disk] = true;
        self.at_once[disk] |= !self.covered[disk];
        let action = SnapshotAction::new(drive(disk), operation);
        self.actions.push(Box::new(action));
    }

    fn select(&self, disk: usize, nth: usize) -> Option<(usize, SnapshotSelector)> {
        let snapshots = &self.world.disks[disk].top().snapshots;
        let nth = nth.checked_rem(snapshots.len())?;
        let which = SnapshotSelector {
            id: None,
            name: Some(snapshots[nth].name.clone()),
        };
        Some((nth, which))
    }

    fn external(&mut self, disk: usize, NewFile { name, there }: NewFile, place: &Place) {
        self.world.others.remove(&name);
        let overlay = match there {
            There::Image => Overlay::Node(name.clone()),
            _ => Overlay::File(OverlayFile {
                filename: place.filename(&name),
                node_name: None,
                format: "qcow2".to_owned(),
                is_there: false,
            }),
        };
        let action = ExternalSnapshot::new(Some(drive(disk)), None, overlay);
        self.actions.push(Box::new(action));
        let content = self.world.disks[disk].top().content.clone();
        let chain = &mut self.world.disks[disk].chain;
        chain.push(Image::new(name, content));
        self.durable[disk] = true;
        self.covered[disk] = true;
    }

    fn backup(
        &mut self,
        disk: usize,
        Copying { sync, shares }: Copying,
        NewFile { name, there }: NewFile,
        place: &Place,
    ) {
        let content = None;
        let target = Other::Target { content };
        self.world.others.insert(name.clone(), target);
        let is_whole = match sync {
            SyncMode::Full => true,
            SyncMode::Top => self.world.disks[disk].chain.len() == 1,
            SyncMode::None => false,
        };
        let source = self.world.disks[disk].top().content.clone();
        self.jobs.push(Job {
            id: name.clone(),
            is_endless: sync == SyncMode::None,
            content: is_whole.then_some(source),
        });
        let target = match there {
            There::Image => BackupTarget::Node(name.clone()),
            _ => BackupTarget::File(FileTarget::new(
                place.filename(&name),
                Some("qcow2".to_owned()),
                TargetMode::AbsolutePaths,
            )),
        };
        let action = BackupAction::new(BackupOptions {
            device: drive(disk),
            target,
            sync,
            job_id: Some(name),
            speed: 0,
            compress: false,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            auto_finalize: true,
            auto_dismiss: true,
            filter_node_name: None,
            perf: BackupPerf {
                use_copy_range: Some(shares),
                ..BackupPerf::default()
            },
        });
        self.actions.push(Box::new(action));
    }
}

impl Disk {
    /// A snapshot of the topmost image.
    pub(super) fn take(&mut self, name: String) {
        let top = self.top_mut();
        let content = top.content.clone();
        top.snapshots.push(Snapshot { name, content });
    }
}
