//! Zero writes and discards: whole clusters by their L2 entries, borders as data.
//!
//! Both take the range lock of their guest clusters, so that they never free a cluster under an allocating write. The
//! clusters that they unlink go to the quarantine.

use std::sync::Arc;

use super::entry::{L2Entry, Mapping};
use super::geometry::GuestCluster;
use super::image::Image;
use super::l2::L2Table;
use super::map::Source;
use crate::driver::ZeroFlags;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Data;

/// Longest run of zero bytes written at once where an image cannot say zero.
const ZERO_PIECE: u64 = 4 << 20;

/// What happens to the entries of whole clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unmap {
    /// They read as zeroes and keep their host clusters.
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
        let size = self.g.cluster_size();
        let end = offset + len;
        // The last cluster of the disk is whole when its part on the disk is.
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
        self.zero_clusters(whole_start, tail, flags).await?;
        self.zero_bytes(tail, end - tail, flags).await
    }

    async fn refuse_fallback(&self, from: u64, to: u64) -> Result<()> {
        if from < to && !self.reads_zero(from, to - from).await? {
            return Err(no_fast_way());
        }
        Ok(())
    }

    /// Zeroes inside of one or two clusters, as data unless they are there already.
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
        match &self.backing {
            Some(backing) if offset < backing.size() => {
                let inside = len.min(backing.size() - offset);
                let status = backing.block_status(offset, inside).await?;
                Ok(status.zero && status.len >= inside)
            }
            _ => Ok(true),
        }
    }

    /// Zeroes of whole clusters; `end` may be the end of the disk inside of one.
    async fn zero_clusters(&self, start: u64, end: u64, flags: ZeroFlags) -> Result<()> {
        if self.has_zero_flag() {
            let how = match flags.may_unmap {
                true => Unmap::Zero,
                false => Unmap::KeepAllocated,
            };
            return self.unmap(start, end, how).await;
        }
        // Version 2 has no zero flag. Without a backing, unallocated clusters are zero.
        if flags.may_unmap && !self.may_have_backing() {
            return self.unmap(start, end, Unmap::Forget).await;
        }
        self.zero_bytes(start, end - start, flags).await
    }

    /// Drops the content of the whole clusters in a checked range. The caller is inside the gate and has prepared.
    pub(super) async fn discard_range(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.g.cluster_size();
        let end = offset + len;
        let start = offset.next_multiple_of(size);
        let whole_end = match end == self.size() {
            true => end,
            false => end - end % size,
        };
        if start >= whole_end {
            return Ok(());
        }
        // What was discarded must not show older content of a backing file, where the image can say so.
        let how = match self.has_zero_flag() && self.may_have_backing() {
            true => Unmap::Zero,
            false => Unmap::Forget,
        };
        self.unmap(start, whole_end, how).await
    }

    /// Changes the entries of all clusters in `[start, end)`, one L2 table after the other.
    pub(super) async fn unmap(&self, start: u64, end: u64, how: Unmap) -> Result<()> {
        let mut at = start;
        while at < end {
            let len = self.within_table(at, end - at);
            let first = self.cluster_at(at);
            let last = self.cluster_at(at + len - 1);
            {
                let _lock = self.lock_clusters(first, last).await;
                self.unmap_in_table(first, last, how).await?;
            }
            self.relieve().await;
            at += len;
        }
        Ok(())
    }

    async fn unmap_in_table(
        &self,
        first: GuestCluster,
        last: GuestCluster,
        how: Unmap,
    ) -> Result<()> {
        let l1_index = self.g.l1_index(first);
        let present = self.table(l1_index).await?.map(|(table, _)| table);
        let unallocated = self.unmapped(Mapping::Unallocated, how);
        if present.is_none() && unallocated == L2Entry::default() {
            // Nothing to look at, so that the size of an empty disk costs no time.
            return Ok(());
        }
        // A table is made or copied only when one of its entries really changes.
        let mut changes = false;
        for cluster in first.0..=last.0 {
            let cluster = GuestCluster(cluster);
            let entry = present.as_ref().map_or_else(L2Entry::default, |table| {
                table.get(self.g.l2_index(cluster))
            });
            let mapping = self.decode(entry, cluster)?;
            if self.unmapped(mapping, how) != entry {
                self.decode_to_replace(entry, cluster)?;
                changes = true;
            }
        }
        if !changes {
            return Ok(());
        }
        let table = self.own_table(l1_index).await?;
        for cluster in first.0..=last.0 {
            self.unmap_cluster(&table, GuestCluster(cluster), how)?;
        }
        self.commits.touch();
        Ok(())
    }

    fn unmap_cluster(&self, table: &Arc<L2Table>, cluster: GuestCluster, how: Unmap) -> Result<()> {
        let index = self.g.l2_index(cluster);
        loop {
            let old = table.get(index);
            let mapping = self.decode(old, cluster)?;
            let new = self.unmapped(mapping, how);
            if new == old {
                return Ok(());
            }
            if !self.l2.replace(table, index, old, new) {
                continue;
            }
            if new.host_cluster().is_none() {
                self.quarantine.unlinked(self.references(mapping));
            }
            return Ok(());
        }
    }

    /// What an entry becomes.
    fn unmapped(&self, mapping: Mapping, how: Unmap) -> L2Entry {
        let nothing = match how {
            Unmap::Forget => L2Entry::default(),
            Unmap::Zero | Unmap::KeepAllocated => L2Entry::zero_plain(),
        };
        match mapping {
            // Without a backing it reads as zeroes already.
            Mapping::Unallocated if !self.may_have_backing() => L2Entry::default(),
            Mapping::ZeroPlain if how != Unmap::Forget => L2Entry::zero_plain(),
            Mapping::Normal { host, copied: true }
            | Mapping::ZeroAllocated { host, copied: true }
                if how == Unmap::KeepAllocated =>
            {
                L2Entry::zero_allocated(host)
            }
            _ => nothing,
        }
    }
}

fn no_fast_way() -> Error {
    Error::new(
        ErrorKind::Unsupported,
        "Zeroes cannot be written here without writing data",
    )
}
