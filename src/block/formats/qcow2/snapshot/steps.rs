//! The steps of a change: what each needs, and what it does to the tables that the change will switch to.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::areas::without_copied;
use super::list::check_l1;
use super::settling::{changes, tables};
use super::staged::{Staged, StagedL1};
use super::table::TableEntry;
use crate::driver::{NewSnapshot, SnapshotInfo, SnapshotSelector};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::alloc::Run;
use crate::formats::qcow2::entry::L1Entry;
use crate::formats::qcow2::geometry::{ENTRY_SIZE, Geometry};
use crate::formats::qcow2::image::Image;
use crate::formats::qcow2::open::read_table;
use crate::formats::qcow2::owners::Owner;
use crate::limits::{MAX_DISK_SIZE, QCOW2_MAX_L1_BYTES, QCOW2_MAX_SNAPSHOTS};
use crate::units::{ClusterIndex, HostOffset};

impl Staged {
    /// Takes a snapshot of the disk as it is after the steps before.
    pub(super) async fn create(&mut self, new: NewSnapshot) -> Result<SnapshotInfo> {
        self.check_phase()?;
        if self.goes_ahead {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "A snapshot that is taken needs requests to be held back",
            ));
        }
        self.validate_new(&new)?;
        self.check_tables(&self.active.entries)?;
        let entries = self.active.entries.clone();
        let mut entry = TableEntry::new(self.table.next_id(), &new, self.size());
        entry.l1_entries = entries.len() as u32;
        entry.l1_offset = self.place_l1(entries.clone()).await?.0;
        let info = entry.info(self.size());
        self.table = self.table.with(entry);
        self.changes.extend(changes(self.image.g, &entries, 1));
        Ok(info)
    }

    fn validate_new(&self, new: &NewSnapshot) -> Result<()> {
        if new.name.is_empty() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "Snapshot name is empty",
            ));
        }
        if new.name.len() > usize::from(u16::MAX) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "Snapshot name is too long",
            ));
        }
        if self.table.has_name(&new.name) {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("Snapshot with name '{}' already exists", new.name),
            ));
        }
        if self.table.entries().len() >= QCOW2_MAX_SNAPSHOTS as usize {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("The image has {QCOW2_MAX_SNAPSHOTS} snapshots and can have no more"),
            ));
        }
        if self.image.g.refcount_max() < 2 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "Images with refcounts of 1 bit cannot have snapshots",
            ));
        }
        Ok(())
    }

    /// Takes fresh clusters for an L1 table; an empty one needs none.
    async fn place_l1(&mut self, entries: Arc<[u64]>) -> Result<HostOffset> {
        if entries.is_empty() {
            return Ok(HostOffset(0));
        }
        let image = &self.image;
        let clusters = image.g.clusters_for(entries.len() as u64 * ENTRY_SIZE);
        let area = match self.room.take_l1(clusters) {
            Some(area) => area,
            None => {
                let mut alloc = image.alloc.lock().await;
                alloc.allocate_metadata(clusters, Owner::L1Table).await?
            }
        };
        let offset = image.g.host_offset(area.run().start);
        self.new_l1s.push((area, entries));
        Ok(offset)
    }

    /// Deletes a snapshot.
    pub(super) async fn delete(&mut self, which: SnapshotSelector) -> Result<SnapshotInfo> {
        self.check_phase()?;
        let (index, info) = self.find(&which)?;
        if self.goes_ahead {
            // Nobody begins to view it from here on.
            let leaving = self.deleted.iter().chain([&info.id]).cloned();
            self.image.snapshots.set_leaving(leaving.collect());
        }
        if self.image.snapshots.is_held(&info.id) {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("Snapshot '{}' is being read", info.name),
            ));
        }
        let entry = &self.table.entries()[index];
        let (offset, l1) = (HostOffset(entry.l1_offset), self.read_l1(entry).await?);
        self.check_tables(&l1)?;
        self.table = self.table.without(index);
        self.deleted.insert(info.id.clone());
        self.replace_l1(offset, l1.len());
        self.changes.extend(changes(self.image.g, &l1, -1));
        Ok(info)
    }

    fn find(&self, which: &SnapshotSelector) -> Result<(usize, SnapshotInfo)> {
        let index = self.table.index_of(which)?;
        Ok((index, self.table.entries()[index].info(self.size())))
    }

    /// Nothing points to an L1 table after the switch.
    fn replace_l1(&mut self, offset: HostOffset, entries: usize) {
        let g = self.image.g;
        let start = g.host_cluster(offset);
        let made_here =
            |area: &(crate::formats::qcow2::alloc::Reserved, _)| area.0.run().start == start;
        if let Some(place) = self.new_l1s.iter().position(made_here) {
            self.new_l1s.remove(place);
            return;
        }
        let count = g.clusters_for(entries as u64 * ENTRY_SIZE);
        if count > 0 {
            self.replaced.push(Run { start, count });
        }
    }

    /// Makes the disk what it was at a snapshot. Saved VM state stays the snapshot's alone.
    pub(super) async fn revert(&mut self, which: SnapshotSelector) -> Result<SnapshotInfo> {
        self.check_phase()?;
        let (index, info) = self.find(&which)?;
        let entry = &self.table.entries()[index];
        let l1 = self.read_l1(entry).await?;
        let g = self.image.g;
        let needed = entries_needed(g, &l1, info.disk_size)?;
        let l1: Arc<[u64]> = match needed {
            // A table has an entry, as that of a new image.
            0 => vec![0].into(),
            needed => l1[..needed].into(),
        };
        self.check_tables(&l1)?;
        for (_, table) in tables(g, &l1) {
            self.image.owners.claim(table, 1, Owner::L2Table)?;
        }
        let offset = self.place_l1(l1.clone()).await?;
        let new = StagedL1 {
            offset,
            entries: l1.clone(),
        };
        let old = std::mem::replace(&mut self.active, new);
        self.replace_l1(old.offset, old.entries.len());
        self.changes.extend(changes(g, &l1, 1));
        if !(self.goes_ahead && old.offset == self.before.offset()) {
            // The others are known when requests have been held back.
            self.changes.extend(changes(g, &old.entries, -1));
        }
        self.size.store(info.disk_size, Ordering::Release);
        self.reverts = true;
        Ok(info)
    }

    /// The L1 table of a snapshot, held against the limits: nobody has looked at it before.
    async fn read_l1(&self, entry: &TableEntry) -> Result<Arc<[u64]>> {
        let g = self.image.g;
        let offset = HostOffset(entry.l1_offset);
        let new = self.new_l1s.iter();
        let mut new = new.filter(|(area, _)| area.run().start == g.host_cluster(offset));
        if let Some((_, entries)) = new.next() {
            return Ok(entries.clone());
        }
        self.image.read_snapshot_l1(entry).await
    }

    /// Whether an L1 table can be worked with: each L2 table is in the file, there once, and none is metadata of another kind or
    /// active in another place.
    fn check_tables(&self, l1: &[u64]) -> Result<()> {
        let g = self.image.g;
        let end = g.clusters_for(self.image.file.size());
        let mut seen: Vec<u64> = Vec::new();
        let mut moved: Vec<u64> = Vec::new();
        for (slot, entry) in l1.iter().enumerate() {
            let checked = L1Entry(*entry).checked(g);
            let host = checked.map_err(|_| damaged(format!("an L1 entry is {entry:#x}")))?;
            let Some(host) = host else { continue };
            let cluster = g.host_cluster(host);
            let owner = self.image.owners.get(cluster);
            if cluster.0 >= end || owner.is_some_and(|owner| owner != Owner::L2Table) {
                return Err(damaged(format!("an L2 table lies at {host}")));
            }
            seen.push(cluster.0);
            if self.active.entries.get(slot) != Some(entry) {
                moved.push(cluster.0);
            }
        }
        seen.sort_unstable();
        if let Some(twice) = seen.windows(2).find(|pair| pair[0] == pair[1]) {
            let host = g.host_offset(ClusterIndex(twice[0]));
            return Err(damaged(format!(
                "an L1 table has its L2 table at {host} twice"
            )));
        }
        moved.sort_unstable();
        for (slot, table) in tables(g, &self.active.entries) {
            let same = l1.get(slot) == self.active.entries.get(slot);
            if !same && moved.binary_search(&table.0).is_ok() {
                let host = g.host_offset(table);
                return Err(damaged(format!("the L2 table at {host} has two places")));
            }
        }
        Ok(())
    }
}

/// A snapshot's disk.
pub(super) struct SnapshotDisk {
    /// The L1 table, without COPIED; saved VM state may lie behind what the disk needs.
    pub(super) l1: Arc<[u64]>,
    /// Bytes.
    pub(super) size: u64,
}

impl Image {
    /// The disk of a snapshot, held against the limits.
    pub(super) async fn snapshot_disk(&self, entry: &TableEntry) -> Result<SnapshotDisk> {
        let l1 = self.read_snapshot_l1(entry).await?;
        let size = entry.info(self.size()).disk_size;
        entries_needed(self.g, &l1, size)?;
        Ok(SnapshotDisk { l1, size })
    }

    /// The L1 table of a snapshot in the file, without COPIED.
    pub(super) async fn read_snapshot_l1(&self, entry: &TableEntry) -> Result<Arc<[u64]>> {
        let g = self.g;
        check_l1(g, &self.file, entry.l1_offset, entry.l1_entries)?;
        let at = (HostOffset(entry.l1_offset), entry.l1_entries.into());
        let entries = read_table(&self.file, g, "Snapshot L1 table", at).await?;
        Ok(without_copied(&entries))
    }
}

/// How many entries of a snapshot's L1 table its disk takes.
fn entries_needed(g: Geometry, l1: &[u64], size: u64) -> Result<usize> {
    let needed = g.l1_entries_for(size);
    if size > MAX_DISK_SIZE || needed * ENTRY_SIZE > QCOW2_MAX_L1_BYTES {
        return Err(damaged("the snapshot's disk is too large"));
    }
    if needed > l1.len() as u64 {
        return Err(damaged("the snapshot's L1 table is too small for its disk"));
    }
    Ok(needed as usize)
}

/// The error of damage that a step has found in what a snapshot refers to.
pub(super) fn damaged(what: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("The image needs a repair (qemu-img check -r all): {what}"),
    )
}
