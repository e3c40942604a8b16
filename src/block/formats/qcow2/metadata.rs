//! The way of metadata into the image's file: each kind is written to clusters that the owner map says hold it, and to no others.
//!
//! Tables in memory know where they lie, and so do refcount blocks. Should that ever be wrong, by damage that opening did not find or by
//! a mistake of ours, the write is prevented as a guest's on metadata is. Readers pay nothing for it, and writers a lookup per cluster.
//!
//! The header is the exception: it always lies in the first cluster (see `header_cell`, `amend`).

use std::sync::Arc;

use super::alloc::Run;
use super::damage::Damage;
use super::geometry::Geometry;
use super::owners::{Owner, Owners};
use crate::driver::{Child, WriteFlags};
use crate::error::Result;
use crate::events::HostBytes;
use crate::io::Data;
use crate::units::HostOffset;

/// The file with what keeps metadata apart. Clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Metadata {
    pub(super) g: Geometry,
    pub(super) file: Child,
    pub(super) owners: Arc<Owners>,
    pub(super) damage: Arc<Damage>,
}

impl Metadata {
    /// Writes all of `data`, which is of the kind `owner`. Not durable before the file's next flush. `Corrupt`, with nothing
    /// written, where the clusters hold something else.
    pub(super) async fn write(&self, owner: Owner, at: HostOffset, data: Data) -> Result<()> {
        self.check(owner, at, data.len())?;
        self.file.write(at.0, data, WriteFlags::default()).await
    }

    /// Whether clusters hold no metadata. `Corrupt` when they do, though nothing counts them.
    pub(super) fn check_unused(&self, run: Run) -> Result<()> {
        let Some((_, owner)) = self.owners.first_owned(run) else {
            return Ok(());
        };
        let name = owner.qemu_name(true);
        let message = format!("Preventing invalid write on metadata (overlaps with {name})");
        let place = HostBytes {
            offset: self.g.host_offset(run.start).0,
            len: run.count << self.g.cluster_bits(),
        };
        Err(self.damage.prevented(message, Some(place)))
    }

    fn check(&self, owner: Owner, at: HostOffset, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let start = self.g.host_cluster(at);
        let count = self.g.host_cluster(at + (len - 1)).0 - start.0 + 1;
        let Some((cluster, other)) = self.owners.first_not(owner, Run { start, count }) else {
            return Ok(());
        };
        let holds = other.map_or("no metadata", Owner::name);
        let message = format!(
            "Preventing invalid write of {} at {at}: host cluster {} holds {holds}",
            owner.name(),
            cluster.0
        );
        let place = HostBytes { offset: at.0, len };
        Err(self.damage.prevented(message, Some(place)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::Requests;
    use crate::error::ErrorKind;
    use crate::formats::qcow2::testing::block_on;
    use crate::protocols::memory::Memory;
    use crate::units::ClusterIndex;

    #[test]
    fn each_kind_goes_to_its_own_clusters_only() {
        let disk = Memory::new(0);
        let metadata = Metadata {
            g: Geometry::new(9, 4),
            file: disk.child(),
            owners: Arc::default(),
            damage: Arc::default(),
        };
        let claims = [
            (3, Owner::L2Table),
            (4, Owner::L2Table),
            (5, Owner::L1Table),
        ];
        for (cluster, owner) in claims {
            let cluster = ClusterIndex(cluster);
            metadata.owners.claim(cluster, 1, owner).unwrap();
        }
        let write = |owner, at, len: usize| {
            let data = Data::from(vec![7; len]);
            block_on(metadata.write(owner, HostOffset(at), data))
        };
        write(Owner::L2Table, 3 * 512, 1024).unwrap();
        write(Owner::L1Table, 5 * 512 + 8, 8).unwrap();
        assert_eq!(disk.size(), 5 * 512 + 16);
        let wrong = [
            (Owner::L1Table, 3 * 512, 8, "cluster 3 holds an L2 table"),
            (Owner::L2Table, 4 * 512, 513, "cluster 5 holds an L1 table"),
            (
                Owner::RefcountBlock,
                9 * 512,
                1,
                "cluster 9 holds no metadata",
            ),
        ];
        for (owner, at, len, text) in wrong {
            let error = write(owner, at, len).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(error.message().ends_with(text), "{error}");
            assert!(metadata.damage.check().is_err());
        }
        assert_eq!(disk.size(), 5 * 512 + 16);
    }
}
