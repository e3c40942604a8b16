//! What each metadata cluster of the image is: the check that keeps writes off clusters of another kind.
//!
//! Metadata are few (one L2 table per 8192 data clusters at 64 KiB), so a map of them alone answers in constant
//! time at a small price. Of L2 tables that only snapshots use, those are in it that a bounded part of the snapshots' L1 tables
//! leads to (`snapshot`).

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::alloc::Run;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::QCOW2_MAX_METADATA_CLUSTERS;
use crate::units::ClusterIndex;

/// What a metadata cluster holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The image's first cluster.
    Header,
    /// The active L1 table or one of a snapshot.
    L1Table,
    /// An L2 table, of the active L1 table or of a snapshot's.
    L2Table,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The snapshot table.
    SnapshotTable,
    /// The directory of persistent bitmaps.
    BitmapDirectory,
    /// A persistent bitmap's table.
    BitmapTable,
    /// A persistent bitmap's bits.
    Bitmap,
}

impl Owner {
    /// What QEMU's messages call it; tables are active or used by snapshots only.
    pub(crate) fn qemu_name(self, is_active: bool) -> &'static str {
        match (self, is_active) {
            (Owner::Header, _) => "qcow2_header",
            (Owner::L1Table, true) => "active L1 table",
            (Owner::L1Table, false) => "inactive L1 table",
            (Owner::L2Table, true) => "active L2 table",
            (Owner::L2Table, false) => "inactive L2 table",
            (Owner::RefcountTable, _) => "refcount table",
            (Owner::RefcountBlock, _) => "refcount block",
            (Owner::SnapshotTable, _) => "snapshot table",
            (Owner::BitmapDirectory, _) => "bitmap directory",
            (Owner::BitmapTable, _) => "bitmap table",
            (Owner::Bitmap, _) => "bitmap",
        }
    }

    /// What it is, for messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Owner::Header => "the image header",
            Owner::L1Table => "an L1 table",
            Owner::L2Table => "an L2 table",
            Owner::RefcountTable => "the refcount table",
            Owner::RefcountBlock => "a refcount block",
            Owner::SnapshotTable => "the snapshot table",
            Owner::BitmapDirectory => "the bitmap directory",
            Owner::BitmapTable => "a bitmap table",
            Owner::Bitmap => "a persistent bitmap",
        }
    }
}

/// The map.
#[derive(Debug, Default)]
pub(crate) struct Owners {
    map: RwLock<HashMap<u64, Owner>>,
}

impl Owners {
    /// Says what `other` says, and nothing else.
    pub(crate) fn adopt(&self, other: Owners) {
        let map = other.map.into_inner();
        *self.write() = map.unwrap_or_else(PoisonError::into_inner);
    }

    /// Says that `count` clusters hold `owner`. Fails, with nothing changed, where one holds something else.
    pub(crate) fn claim(&self, first: ClusterIndex, count: u64, owner: Owner) -> Result<()> {
        let mut map = self.write();
        for index in first.0..first.0 + count {
            match map.get(&index) {
                Some(other) if *other != owner => {
                    return Err(conflict(ClusterIndex(index), owner.name(), *other));
                }
                _ => {}
            }
        }
        map.extend((first.0..first.0 + count).map(|index| (index, owner)));
        Ok(())
    }

    /// The same for structures of an image that is being opened: one of the same kind in the same place is refused
    /// as well, and so is more metadata than is kept track of.
    pub(crate) fn claim_alone(&self, first: ClusterIndex, count: u64, owner: Owner) -> Result<()> {
        let known = self.read().len() as u64;
        if known.saturating_add(count) > QCOW2_MAX_METADATA_CLUSTERS {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "qcow2: The image has more metadata than can be kept track of",
            ));
        }
        if let Some((cluster, other)) = self.first_owned(Run {
            start: first,
            count,
        }) {
            return Err(conflict(cluster, owner.name(), other));
        }
        self.claim(first, count, owner)
    }

    /// Says that those of the clusters hold `owner` that hold nothing yet, as far as there is room. Answers which was the first
    /// that holds something else.
    pub(crate) fn claim_unowned(
        &self,
        clusters: impl Iterator<Item = ClusterIndex>,
        owner: Owner,
    ) -> Option<(ClusterIndex, Owner)> {
        let mut map = self.write();
        let mut taken = None;
        for cluster in clusters {
            let room = (map.len() as u64) < QCOW2_MAX_METADATA_CLUSTERS;
            match map.get(&cluster.0) {
                Some(other) if *other != owner => taken = taken.or(Some((cluster, *other))),
                None if room => drop(map.insert(cluster.0, owner)),
                _ => {}
            }
        }
        taken
    }

    /// The first of these clusters that holds metadata.
    pub(crate) fn first_owned(&self, run: Run) -> Option<(ClusterIndex, Owner)> {
        let map = self.read();
        (run.start.0..run.end()).find_map(|index| Some((ClusterIndex(index), *map.get(&index)?)))
    }

    /// The first of these clusters that does not hold `owner`, with what it holds.
    pub(crate) fn first_not(
        &self,
        owner: Owner,
        run: Run,
    ) -> Option<(ClusterIndex, Option<Owner>)> {
        let map = self.read();
        let held = (run.start.0..run.end()).map(|index| (index, map.get(&index).copied()));
        let mut others = held.filter(|(_, held)| *held != Some(owner));
        others
            .next()
            .map(|(index, held)| (ClusterIndex(index), held))
    }

    /// Says that the clusters hold no metadata any more.
    pub(crate) fn release(&self, first: ClusterIndex, count: u64) {
        let mut map = self.write();
        for index in first.0..first.0 + count {
            map.remove(&index);
        }
    }

    /// What the cluster holds, if that is metadata.
    pub(crate) fn get(&self, cluster: ClusterIndex) -> Option<Owner> {
        self.read().get(&cluster.0).copied()
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<u64, Owner>> {
        self.map.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<u64, Owner>> {
        self.map.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn conflict(cluster: ClusterIndex, wanted: &str, owner: Owner) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!(
            "qcow2: Image is corrupt: host cluster {} is used for {wanted}, but holds {}",
            cluster.0,
            owner.name()
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claimed_cluster_takes_neither_data_nor_another_kind() {
        let owners = Owners::default();
        owners.claim(ClusterIndex(3), 2, Owner::L1Table).unwrap();
        owners.claim(ClusterIndex(4), 1, Owner::L1Table).unwrap();
        let error = owners
            .claim(ClusterIndex(2), 3, Owner::L2Table)
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert_eq!(owners.get(ClusterIndex(2)), None, "nothing changed");
        let run = |start, count| Run {
            start: ClusterIndex(start),
            count,
        };
        let owned = Some((ClusterIndex(4), Owner::L1Table));
        assert_eq!(owners.first_owned(run(4, 9)), owned);
        assert_eq!(owners.first_owned(run(5, 9)), None);
        owners.release(ClusterIndex(3), 2);
        assert_eq!(owners.first_owned(run(0, 9)), None);
    }
}
