//! Clusters that are shared with another file by the file system, instead of being copied to this one.
//!
//! The steps are those of an allocating write (see `write`), for whole clusters: they always get new host clusters, so that nobody can be
//! writing to what is shared.

use super::geometry::GuestCluster;
use super::image::Image;
use super::map::Source;
use super::write::Target;
use crate::error::{Error, ErrorKind, Result};
use crate::io::HostRange;

impl Image {
    /// Where guest data lie in the file, as far as they are plain and in a row. The caller is inside the gate.
    pub(super) async fn host_range(&self, offset: u64, len: u64) -> Result<Option<HostRange>> {
        if len == 0 {
            return Ok(None);
        }
        let extent = self.extent(offset, len).await?;
        match extent.source {
            Source::Data { host, .. } => self.data.child().host_range(host.0, extent.len).await,
            _ => Ok(None),
        }
    }

    /// Makes whole clusters of the disk hold what `from` holds. `Unsupported` for parts of clusters, and for data in another file. The
    /// caller is inside the gate and has prepared for changes. Cancellation: run to the end by the caller.
    pub(super) async fn share_range(&self, offset: u64, from: HostRange) -> Result<()> {
        let is_whole = self.g.is_aligned(offset) && self.g.is_aligned(from.len());
        if self.data.is_external() || !is_whole {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "Only whole clusters of an image's own file can be shared",
            ));
        }
        let mut done = 0;
        while done < from.len() {
            let at = offset + done;
            let len = self.within_table(at, from.len() - done);
            done += self.share_in_table(at, &from.slice(done, len)).await?;
        }
        Ok(())
    }

    /// The same for the front of clusters of one L2 table; answers how many bytes are done.
    async fn share_in_table(&self, offset: u64, from: &HostRange) -> Result<u64> {
        let first = self.cluster_at(offset);
        let last = self.cluster_at(offset + from.len() - 1);
        let _lock = self.lock_clusters(first, last).await;
        let table = self.own_table(self.g.l1_index(first)).await?;
        let want = self.g.clusters_for(from.len());
        let mut reserved = self.reserve_data(first, want).await?;
        let run = reserved.run();
        let len = (run.count << self.g.cluster_bits()).min(from.len());
        let mut old = Vec::with_capacity(run.count as usize);
        for cluster in (first.0..first.0 + run.count).map(GuestCluster) {
            self.decode_to_replace(table.get(self.g.l2_index(cluster)), cluster)?;
            old.push(self.old_cluster(&table, cluster)?);
        }
        let host = self.g.host_offset(run.start);
        let file = self.data.child();
        file.write_shared(host.0, from.slice(0, len)).await?;
        let target = Target {
            table: &table,
            offset,
        };
        let published = self.publish(&target, &old, 0..len, &mut reserved)?;
        Ok((published << self.g.cluster_bits()).min(len))
    }
}
