//! Zero writes and discards: whole subclusters by their L2 entries, borders as data.
//!
//! Both take the range lock of their guest clusters, so that they never free a cluster under an allocating write. The
//! clusters that they unlink go to the quarantine. A cluster in which no data are left is unlinked, unless it is
//! to be kept.

use std::ops::Range;
use std::sync::Arc;

use super::alloc::{Run, push_run};
use super::entry::{L2Entry, Mapping, PlainCluster};
use super::geometry::GuestCluster;
use super::image::Image;
use super::l2::L2Table;
use super::map::Source;
use super::subclusters::{State, Subclusters, mask};
use crate::driver::ZeroFlags;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Data;
use crate::units::ClusterIndex;

/// Longest run of zero bytes written at once where an image cannot say zero.
const ZERO_PIECE: u64 = 4 << 20;

/// What happens to whole subclusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unmap {
    /// They read as zeroes, and clusters of ours keep their host clusters.
    KeepAllocated,
    /// They read as zeroes and give their host clusters back.
    Zero,
    /// They are as if never written: the backing shows.
    Forget,
}

impl Image {
    /// Makes a checked range read as zeroes. The caller is inside the gate and has prepared for changes.
    /// Cancellation: run to the end by the caller.
    pub(super) async fn zero_range(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        if self.data.is_raw() {
            return self.data.child().write_zeroes(offset, len, flags).await;
        }
        let size = self.g.subcluster_size();
        let end = offset + len;
        // The last subcluster of the disk is whole when its part on the disk is.
        let whole_end = if end == self.size() {
            end.next_multiple_of(size)
        } else {
            end - end % size
        };
        let whole_start = offset.next_multiple_of(size);
        if whole_start >= whole_end {
            return self.zero_bytes(offset, len, flags).await;
        }
        if flags.no_fallback {
            self.refuse_fallback(offset, whole_start).await?;
            self.refuse_fallback(whole_end.min(end), end).await?;
        }
        self.zero_bytes(offset, whole_start - offset, flags).await?;
        let tail = whole_end.min(end);
        self.zero_subclusters(whole_start, tail, flags).await?;
        self.zero_bytes(tail, end - tail, flags).await
    }

    async fn refuse_fallback(&self, from: u64, to: u64) -> Result<()> {
        if from < to && !self.reads_zero(from, to - from).await? {
            return Err(no_fast_way());
        }
        Ok(())
    }

    /// Zeroes as data, unless they are there already.
    async fn zero_bytes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        if len == 0 || self.reads_zero(offset, len).await? {
            return Ok(());
        }
        if flags.no_fallback {
            return Err(no_fast_way());
        }
        let mut at = offset;
        while at < offset + len {
            let piece = ZERO_PIECE.min(offset + len - at);
            self.write_range(at, Data::zeroes(piece)).await?;
            at += piece;
        }
        Ok(())
    }

    /// Whether the range is known to read as zeroes.
    async fn reads_zero(&self, offset: u64, len: u64) -> Result<bool> {
        for (at, extent) in self.extents(offset, len).await? {
            let zero = match extent.source {
                Source::Zero => true,
                Source::Unallocated => self.read_backing_is_zero(at, extent.len).await?,
                _ => false,
            };
            if !zero {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn read_backing_is_zero(&self, offset: u64, len: u64) -> Result<bool> {
        match self.backing() {
            Some(backing) if offset < backing.size() => {
                let inside = len.min(backing.size() - offset);
                let status = backing.block_status(offset, inside).await?;
                Ok(status.zero && status.len >= inside)
            }
            _ => Ok(true),
        }
    }

    /// Zeroes of whole subclusters; `end` may be the end of the disk inside of one.
    async fn zero_subclusters(&self, start: u64, end: u64, flags: ZeroFlags) -> Result<()> {
        let how = match (self.has_zero_flag(), flags.may_unmap) {
            (true, true) => Unmap::Zero,
            (true, false) => Unmap::KeepAllocated,
            // Version 2 has no zero flag. Without a backing, unallocated clusters are zero.
            (false, true) if !self.may_have_backing() => Unmap::Forget,
            (false, _) => return self.zero_bytes(start, end - start, flags).await,
        };
        for (at, len) in self.unmap(start, end, how).await? {
            self.zero_bytes(at, len, flags).await?;
        }
        Ok(())
    }

    /// Drops the content of the whole subclusters in a checked range. The caller is inside the gate and has prepared.
    pub(super) async fn discard_range(&self, offset: u64, len: u64) -> Result<()> {
        if self.data.is_raw() {
            return match self.tuning.pass_discard() {
                true => self.data.child().discard(offset, len).await,
                false => Ok(()),
            };
        }
        let size = self.g.subcluster_size();
        let end = offset + len;
        let start = offset.next_multiple_of(size);
        let whole_end = match end == self.size() {
            true => end,
            false => end - end % size,
        };
        if start >= whole_end {
            return Ok(());
        }
        // What was discarded must not show older content of a backing file. Version 2 cannot say so: there it stays.
        let how = match (self.may_have_backing(), self.has_zero_flag()) {
            (true, true) => Unmap::Zero,
            (true, false) => return Ok(()),
            (false, _) => Unmap::Forget,
        };
        // Parts of compressed clusters stay: it is a hint.
        self.unmap(start, whole_end, how).await.map(|_left| ())
    }

    /// Changes the entries of all whole subclusters in `[start, end)`, one L2 table after the other. Answers the parts of
    /// compressed clusters at the ends, which no entry can say anything about: offsets and lengths.
    pub(super) async fn unmap(&self, start: u64, end: u64, how: Unmap) -> Result<Vec<(u64, u64)>> {
        let mut left = Vec::new();
        let mut at = start;
        // Where nothing is mapped there is nothing to drop, so that the size of an empty disk costs no time.
        let skips = how == Unmap::Forget || !self.may_have_backing();
        while at < end {
            if skips {
                at = self.next_table(at);
                if at >= end {
                    break;
                }
            }
            let len = self.within_table(at, end - at);
            let first = self.cluster_at(at);
            let last = self.cluster_at(at + len - 1);
            {
                let _lock = self.lock_clusters(first, last).await;
                self.unmap_in_table(at..at + len, how, &mut left).await?;
            }
            self.relieve().await;
            at += len;
        }
        Ok(left)
    }

    /// The first guest offset from `at` on that has an L2 table; if there is none, one behind every disk.
    fn next_table(&self, at: u64) -> u64 {
        let l1 = self.l1();
        let first = self.g.l1_index(self.cluster_at(at));
        let mut slots = first..l1.len().max(first);
        match slots.find(|slot| l1.get(*slot).0 != 0) {
            Some(slot) if slot == first => at,
            Some(slot) => slot as u64 * self.g.l2_span(),
            None => u64::MAX,
        }
    }

    async fn unmap_in_table(
        &self,
        range: Range<u64>,
        how: Unmap,
        left: &mut Vec<(u64, u64)>,
    ) -> Result<()> {
        let first = self.cluster_at(range.start);
        let last = self.cluster_at(range.end - 1);
        let l1_index = self.g.l1_index(first);
        let present = self.table(l1_index).await?.map(|(table, _)| table);
        if present.is_none() && (how == Unmap::Forget || !self.may_have_backing()) {
            return Ok(());
        }
        // A table is made or copied only when one of its entries really changes.
        let mut changes = false;
        for cluster in (first.0..=last.0).map(GuestCluster) {
            let entry = present.as_ref().map_or_else(L2Entry::default, |table| {
                table.get(self.g.l2_index(cluster))
            });
            let mapping = self.decode(entry, cluster)?;
            let part = self.part_of(cluster, &range);
            match self.unmapped(mapping, self.whole_subclusters(&part), how) {
                Some(new) if new == entry => {}
                Some(_) => {
                    self.decode_to_replace(entry, cluster)?;
                    changes = true;
                }
                None => {
                    let at = self.g.guest_offset(cluster).0 + part.start;
                    left.push((at, part.end - part.start));
                }
            }
        }
        if !changes {
            return Ok(());
        }
        let table = self.own_table(l1_index).await?;
        let mut outside = Vec::new();
        for cluster in (first.0..=last.0).map(GuestCluster) {
            let part = self.part_of(cluster, &range);
            let subclusters = self.whole_subclusters(&part);
            let gave_up = self.unmap_cluster(&table, cluster, subclusters, how)?;
            if gave_up && self.data.is_external() {
                let start = ClusterIndex(cluster.0);
                push_run(&mut outside, Run { start, count: 1 });
            }
        }
        self.commits.touch();
        self.give_back(&outside).await;
        Ok(())
    }

    /// The bytes of a cluster that are in a guest range.
    fn part_of(&self, cluster: GuestCluster, range: &Range<u64>) -> Range<u64> {
        let start = self.g.guest_offset(cluster).0;
        let end = range.end.min(start + self.g.cluster_size());
        range.start.max(start) - start..end - start
    }

    /// The subclusters of a part of a cluster that begins with one. The last one is whole when the disk ends in it.
    fn whole_subclusters(&self, part: &Range<u64>) -> u32 {
        mask(self.g.subclusters_of(part.start, part.end - part.start))
    }

    /// Answers whether the guest cluster had a host cluster and has none any more.
    fn unmap_cluster(
        &self,
        table: &Arc<L2Table>,
        cluster: GuestCluster,
        subclusters: u32,
        how: Unmap,
    ) -> Result<bool> {
        let index = self.g.l2_index(cluster);
        loop {
            let old = table.get(index);
            let mapping = self.decode(old, cluster)?;
            let Some(new) = self.unmapped(mapping, subclusters, how) else {
                return Ok(false);
            };
            if new == old {
                return Ok(false);
            }
            if !self.l2.replace(table, index, old, new) {
                continue;
            }
            if new.host_cluster().is_none() {
                self.quarantine.unlinked(self.references(mapping));
            }
            return Ok(has_host(mapping) && !has_host(self.decode(new, cluster)?));
        }
    }

    /// What an entry becomes; `None` for a part of a compressed cluster.
    fn unmapped(&self, mapping: Mapping, subclusters: u32, how: Unmap) -> Option<L2Entry> {
        let all = mask(0..self.g.subclusters());
        let old = match mapping {
            Mapping::Plain(cluster) => cluster,
            Mapping::Compressed(_) if subclusters == all => PlainCluster {
                subclusters: Subclusters::default().with(all, State::Data),
                ..PlainCluster::default()
            },
            Mapping::Compressed(_) => return None,
        };
        let states = old.subclusters;
        let states = match how {
            Unmap::Forget => states.with(subclusters, State::Unallocated),
            Unmap::Zero | Unmap::KeepAllocated => {
                // Without a backing the others read as zeroes already.
                let shown = match self.may_have_backing() {
                    true => all,
                    false => states.data() | states.zero(),
                };
                states.with(subclusters & shown, State::Zero)
            }
        };
        let keep = match how {
            Unmap::KeepAllocated => old.ours().is_some(),
            Unmap::Zero | Unmap::Forget => false,
        };
        let host = old.host.filter(|_| keep || states.data() != 0);
        Some(L2Entry::plain(
            PlainCluster {
                host,
                copied: old.copied && host.is_some(),
                subclusters: states,
            },
            self.g,
        ))
    }
}

fn has_host(mapping: Mapping) -> bool {
    matches!(mapping, Mapping::Plain(cluster) if cluster.host.is_some())
}

fn no_fast_way() -> Error {
    Error::new(
        ErrorKind::Unsupported,
        "Zeroes cannot be written here without writing data",
    )
}
