//! From a guest range to what it is made of.

use super::entry::{Compressed, Mapping};
use super::image::Image;
use super::l2::L2Table;
use super::subclusters::State;
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
    /// Data that the file does not have, in this host cluster: an error for who reads, nothing to keep for who overwrites.
    Lost(HostOffset),
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
        let first = self.source_at(&table, offset)?;
        let ours = l1_entry.is_copied();
        let mut found = first.len;
        // Only whole clusters go on: within one, runs of subclusters end where the state changes.
        while found < most && self.g.is_aligned(offset + found) {
            let next = self.source_at(&table, offset + found)?;
            if !continues(first.source, next.source, found) {
                break;
            }
            found += next.len;
        }
        let source = match first.source {
            Source::Data { host, ours: copied } => Source::Data {
                host,
                ours: copied && ours,
            },
            other => other,
        };
        Ok(Extent {
            source,
            len: found.min(most),
        })
    }

    /// What lies at `offset`, for as much of its cluster as has the same source.
    fn source_at(&self, table: &L2Table, offset: u64) -> Result<Extent> {
        let cluster = self.cluster_at(offset);
        let in_cluster = self.g.in_cluster(offset);
        let mapping = self.decode(table.get(self.g.l2_index(cluster)), cluster)?;
        let plain = match mapping {
            Mapping::Plain(plain) => plain,
            Mapping::Compressed(stream) => {
                return Ok(Extent {
                    source: Source::Compressed(stream),
                    len: self.g.cluster_size() - in_cluster,
                });
            }
        };
        let first = (in_cluster >> self.g.subcluster_bits()) as u32;
        let (state, count) = plain.subclusters.run(first..self.g.subclusters());
        let end = u64::from(first + count) << self.g.subcluster_bits();
        let source = match (state, plain.host) {
            (State::Data, Some(host)) if self.is_behind_end(host) => Source::Lost(host),
            (State::Data, Some(host)) => Source::Data {
                host: host + in_cluster,
                ours: plain.copied,
            },
            (State::Zero, _) => Source::Zero,
            _ => Source::Unallocated,
        };
        Ok(Extent {
            source,
            len: end - in_cluster,
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
        if let Source::Lost(host) = first.source {
            return Err(self.lost(self.cluster_at(offset), host));
        }
        let mut answer = self.status_of(offset, first);
        let mut tables = 1;
        while answer.len < len && tables < STATUS_TABLES {
            let at = offset + answer.len;
            let extent = self.extent(at, len - answer.len).await?;
            if matches!(extent.source, Source::Lost(_)) {
                break;
            }
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
        self.with_holes(answer).await
    }

    fn status_of(&self, offset: u64, extent: Extent) -> BlockStatus {
        let mut len = extent.len;
        let mut zero = extent.source == Source::Zero;
        if extent.source == Source::Unallocated {
            let end = self.backing().map_or(0, |backing| backing.size());
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
