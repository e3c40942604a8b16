//! Reads. They take no lock: the gate keeps what they have resolved to in place until they leave.

use super::image::Image;
use super::map::{Extent, Source};
use super::parallel::collect;
use crate::driver::BoxFuture;
use crate::error::Result;
use crate::io::{Data, Segment};

impl Image {
    /// Reads a range of the disk that has been checked. The caller is inside the gate.
    pub(super) async fn read_range(&self, offset: u64, len: u64) -> Result<Data> {
        if len == 0 {
            return Ok(Data::new());
        }
        let first = self.extent(offset, len).await?;
        if first.len == len {
            return self.read_extent(offset, first).await;
        }
        let parts = self.extents(offset, len).await?;
        let mut reads: Vec<BoxFuture<'_, Result<Data>>> = Vec::with_capacity(parts.len());
        for (at, part) in parts {
            reads.push(Box::pin(self.read_extent(at, part)));
        }
        let mut all = Data::new();
        for part in collect(reads).await? {
            all.append(part);
        }
        Ok(all)
    }

    /// Reads a run with one source.
    pub(super) async fn read_extent(&self, offset: u64, extent: Extent) -> Result<Data> {
        match extent.source {
            Source::Unallocated => self.read_backing(offset, extent.len).await,
            Source::Zero => Ok(Data::zeroes(extent.len)),
            Source::Lost(host) => Err(self.lost(self.cluster_at(offset), host)),
            Source::Data { host, .. } => self.data.child().read(host.0, extent.len).await,
            Source::Compressed(stream) => {
                let cluster = self.decompress(stream).await?;
                let from = self.g.in_cluster(offset) as usize;
                let part = cluster.slice(from..from + extent.len as usize);
                Ok(Data::from(part))
            }
        }
    }

    /// Reads what unallocated clusters show: the backing, and zeroes behind its end.
    pub(super) async fn read_backing(&self, offset: u64, len: u64) -> Result<Data> {
        let Some(backing) = self.backing() else {
            return Ok(Data::zeroes(len));
        };
        let inside = backing.size().saturating_sub(offset).min(len);
        if inside == 0 {
            return Ok(Data::zeroes(len));
        }
        let mut data = backing.read(offset, inside).await?;
        data.push(Segment::Zeroes(len - inside));
        Ok(data)
    }

    /// The same for copying up: asks first whether it is zero, so that nothing is read and no zeroes are copied.
    pub(super) async fn read_backing_to_copy(&self, offset: u64, len: u64) -> Result<Data> {
        if let Some(backing) = self.backing() {
            let inside = backing.size().saturating_sub(offset).min(len);
            if inside > 0 {
                let status = backing.block_status(offset, inside).await?;
                if status.zero && status.len >= inside {
                    return Ok(Data::zeroes(len));
                }
            }
        }
        self.read_backing(offset, len).await
    }
}
