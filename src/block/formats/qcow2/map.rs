//! From a guest range to what it is made of.

use super::entry::{Compressed, Mapping};
use super::image::Image;
use crate::driver::BlockStatus;
use crate::error::Result;
use crate::units::HostOffset;

/// L2 tables that one `block_status` request looks at, so that it ends soon on a cold cache.
const STATUS_TABLES: usize = 4;

/// What a run of guest bytes is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// The backing decides.
    Unallocated,
    /// Zeroes, by a flag of this layer.
    Zero,
    /// Bytes of the file from here on. `ours` when nobody else refers to them, so they may be overwritten.
    Data { host: HostOffset, ours: bool },
    /// A compressed cluster, of which the run is a part.
    Compressed(Compressed),
}

/// A run of guest bytes with one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) source: Source,
    pub(super) len: u64,
}

impl Image {
    /// What lies at `offset`, for as many of the next `len` bytes as have the same contiguous source in one L2 table.
    pub(super) async fn extent(&self, offset: u64, len: u64) -> Result<Extent> {
        debug_assert!(len > 0);
        let cluster = self.cluster_at(offset);
        let most = self.within_table(offset, len);
        let Some((table, l1_entry)) = self.table(self.g.l1_index(cluster)).await? else {
            return Ok(Extent {
                source: Source::Unallocated,
                len: most,
            });
        };
        let first = self.g.l2_index(cluster);
        let in_cluster = self.g.in_cluster(offset);
        let source = |mapping: Mapping| match mapping {
            Mapping::Unallocated => Source::Unallocated,
            Mapping::ZeroPlain | Mapping::ZeroAllocated { .. } => Source::Zero,
            Mapping::Normal { host, copied } => Source::Data {
                host,
                ours: copied && l1_entry.is_copied(),
            },
            Mapping::Compressed(stream) => Source::Compressed(stream),
        };
        let start = source(self.decode(table.get(first), cluster)?);
        let size = self.g.cluster_size();
        let mut found = size - in_cluster;
        let mut clusters = 1;
        while found < most {
            let next = source(self.decode(table.get(first + clusters), cluster)?);
            if !continues(start, next, clusters as u64 * size) {
                break;
            }
            clusters += 1;
            found += size;
        }
        let source = match start {
            Source::Data { host, ours } => Source::Data {
                host: host + in_cluster,
                ours,
            },
            other => other,
        };
        Ok(Extent {
            source,
            len: found.min(most),
        })
    }

    /// The whole range as extents.
    pub(super) async fn extents(&self, offset: u64, len: u64) -> Result<Vec<(u64, Extent)>> {
        let mut extents = Vec::new();
        let mut at = offset;
        while at < offset + len {
            let extent = self.extent(at, offset + len - at).await?;
            extents.push((at, extent));
            at += extent.len;
        }
        Ok(extents)
    }

    /// Answers `block_status` (see `Requests`).
    pub(super) async fn status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let first = self.extent(offset, len).await?;
        let mut answer = self.status_of(offset, first);
        let mut tables = 1;
        while answer.len < len && tables < STATUS_TABLES {
            let at = offset + answer.len;
            let extent = self.extent(at, len - answer.len).await?;
            let next = self.status_of(at, extent);
            let joins = match (answer.host_offset, next.host_offset) {
                (None, None) => !answer.compressed && !next.compressed,
                (Some(before), Some(after)) => before + answer.len == after,
                _ => false,
            };
            if !joins || (answer.allocated, answer.zero) != (next.allocated, next.zero) {
                break;
            }
            answer.len += next.len;
            tables += usize::from(at.is_multiple_of(self.g.l2_span()));
        }
        Ok(answer)
    }

    fn status_of(&self, offset: u64, extent: Extent) -> BlockStatus {
        let mut len = extent.len;
        let mut zero = extent.source == Source::Zero;
        if extent.source == Source::Unallocated {
            let end = self.backing.as_ref().map_or(0, |backing| backing.size());
            zero = offset >= end;
            if !zero {
                len = len.min(end - offset);
            }
        }
        BlockStatus {
            len,
            allocated: extent.source != Source::Unallocated,
            zero,
            host_offset: match extent.source {
                Source::Data { host, .. } => Some(host.0),
                _ => None,
            },
            compressed: matches!(extent.source, Source::Compressed(_)),
        }
    }
}

/// Whether `next` is what `start` goes on with after `distance` bytes.
fn continues(start: Source, next: Source, distance: u64) -> bool {
    match (start, next) {
        (Source::Unallocated, Source::Unallocated) | (Source::Zero, Source::Zero) => true,
        (
            Source::Data { host, ours },
            Source::Data {
                host: other,
                ours: o,
            },
        ) => host.0 + distance == other.0 && ours == o,
        _ => false,
    }
}
