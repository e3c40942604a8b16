//! Changing the size of the disk. Alone in the image: the gate is closed.
//!
//! The switch is one header write each time. Growing prepares everything before it (the new L1 table, zeroes where
//! old bytes could show); shrinking drops the tail after it, so that an error before changes nothing.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::alloc::{Reserved, Run};
use super::bitmaps::Resize;
use super::header::Version;
use super::image::Image;
use super::l1::L1Table;
use super::owners::Owner;
use super::zero::Unmap;
use crate::driver::{Preallocation, ZeroFlags};
use crate::error::{Error, ErrorKind, Result};
use crate::io::Data;
use crate::limits;

/// A larger L1 table that the header does not point to yet. Dropped, its place is free again.
struct StagedL1 {
    /// The one that the header points to.
    old: Arc<L1Table>,
    area: Reserved,
}

impl Image {
    /// Changes the size (see `Requests::resize`). Cancellation: run to the end by the caller.
    pub(super) async fn change_size(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        let _alone = self.gate.close().await;
        self.check_range(0, 0)?;
        self.prepare_metadata_change().await?;
        let old = self.size();
        if !size.is_multiple_of(512) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "The new size must be a multiple of 512",
            ));
        }
        if size > limits::MAX_DISK_SIZE
            || self.g.l1_entries_for(size) > limits::QCOW2_MAX_L1_BYTES / 8
        {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "Image is too big: its L1 table would be too large",
            ));
        }
        let header = self.header.get();
        if header.nb_snapshots > 0 && header.version == Version::V2 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "Can't resize a v2 image which has snapshots",
            ));
        }
        if preallocation != Preallocation::Off {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "Preallocation of a resize is not supported",
            ));
        }
        if size == old {
            return Ok(());
        }
        let resize = Resize { old, new: size };
        let marked = self
            .bitmaps
            .mark_resized(&self.metadata, self.g, resize)
            .await?;
        let result = match size < old {
            true => self.shrink(old, size).await,
            false => self.grow(old, size).await,
        };
        match result {
            Ok(()) => {
                self.bitmaps
                    .fit(&self.metadata, self.g, resize, marked)
                    .await
            }
            Err(_) => self.bitmaps.unmark(&self.metadata, marked).await,
        }
        result
    }

    async fn grow(&self, old: u64, new: u64) -> Result<()> {
        // Bytes behind the old end show from now on: those in its last cluster, those of a longer backing, and those that a
        // shrink has left which did not come to its end. The range is inside the new size, which the zero writes must see.
        let shown = self.backing().map_or(0, |backing| backing.size());
        let cluster_end = old.next_multiple_of(self.g.cluster_size());
        let mapped = self.l1().len() as u64 * self.g.l2_span();
        let stale = self.mapped_end(cluster_end, new.min(mapped)).await?;
        let hide_to = shown.max(cluster_end).max(stale).min(new);
        let data_file = self.data.grow(old, new).await?;
        self.size.store(new, Ordering::Release);
        let prepared = async {
            // As far as the present L1 table reaches, in that. It is durable then, so that a larger one can be its copy.
            self.hide_old_bytes(old, hide_to, 0..mapped).await?;
            self.write_back().await?;
            self.stage_l1(self.g.l1_entries_for(new)).await
        };
        let result = match prepared.await {
            Ok(staged) => self.switch_grown(old..new, hide_to, staged).await,
            Err(error) => Err(error),
        };
        if result.is_err() {
            self.size.store(old, Ordering::Release);
            self.data.take_back_growth(data_file).await;
        }
        result
    }

    /// Makes what a growth from `old` shows read as zeroes up to `hide_to`, and lets a raw data file show what it has there.
    /// Only in the part of the disk that `part` names.
    async fn hide_old_bytes(&self, old: u64, hide_to: u64, part: Range<u64>) -> Result<()> {
        let within = |at: u64| at.clamp(part.start, part.end);
        let (from, to) = (within(old), within(hide_to));
        if from < to {
            let flags = ZeroFlags {
                may_unmap: true,
                ..ZeroFlags::default()
            };
            self.zero_range(from, to - from, flags).await?;
        }
        if self.data.is_raw() {
            // From the cluster of the old end on: those of its subclusters that a shrink has forgotten are data again.
            let start = within(old - self.g.in_cluster(old));
            let end = within(self.size());
            self.allocate_in_place(start, end).await?;
        }
        Ok(())
    }

    /// Makes the header say the new size, and where the staged L1 table lies. On error the table in use is the old one again.
    async fn switch_grown(
        &self,
        resize: Range<u64>,
        hide_to: u64,
        staged: Option<StagedL1>,
    ) -> Result<()> {
        let Some(mut staged) = staged else {
            let new = resize.end;
            return self.header.update(|header| header.size = new).await;
        };
        let l1 = self.l1();
        let mapped = staged.old.len() as u64 * self.g.l2_span();
        let switched = async {
            self.hide_old_bytes(resize.start, hide_to, mapped..u64::MAX)
                .await?;
            self.write_back().await?;
            self.header
                .update(|header| {
                    header.size = resize.end;
                    header.l1_size = l1.len() as u32;
                    header.l1_table_offset = l1.offset();
                })
                .await
        };
        if let Err(error) = switched.await {
            match self.header.check() {
                Ok(()) => self.take_back_l1(&staged).await,
                // The header may point to the new table: all that either state needs stays counted.
                Err(_) => {
                    staged.area.publish(staged.area.run().count);
                    self.set_l1(staged.old.clone());
                }
            }
            return Err(error);
        }
        staged.area.publish(staged.area.run().count);
        if staged.old.len() > 0 {
            self.quarantine.unlinked([Run {
                start: self.g.host_cluster(staged.old.offset()),
                count: self.g.clusters_for(staged.old.len() as u64 * 8),
            }]);
        }
        self.commits.touch();
        Ok(())
    }

    /// The end of the last cluster in `[from, to)` that an entry maps; `from` if there is none.
    async fn mapped_end(&self, from: u64, to: u64) -> Result<u64> {
        let mut at = to;
        while at > from {
            let start = from.max((at - 1) / self.g.l2_span() * self.g.l2_span());
            let index = self.g.l1_index(self.cluster_at(start));
            if let Some((table, _)) = self.table(index).await? {
                let first = self.g.l2_index(self.cluster_at(start));
                let last = self.g.l2_index(self.cluster_at(at - 1));
                let mapped = |nth: &usize| table.get(*nth) != Default::default();
                if let Some(found) = (first..=last).rfind(mapped) {
                    let clusters = (found - first + 1) as u64;
                    return Ok(start + (clusters << self.g.cluster_bits()));
                }
            }
            at = start;
        }
        Ok(from)
    }

    async fn shrink(&self, old: u64, new: u64) -> Result<()> {
        self.write_back().await?;
        self.header.update(|header| header.size = new).await?;
        self.size.store(new, Ordering::Release);
        let start = new.next_multiple_of(self.g.subcluster_size());
        let dropped = async {
            if start < old {
                self.unmap(start, old, Unmap::Forget).await?;
            }
            self.drop_tables(self.g.l1_entries_for(new) as usize)
                .await?;
            self.write_back_all().await?;
            self.data.shrink(new).await
        };
        if let Err(error) = dropped.await {
            // The disk has its new size; what is behind its end is unused space.
            log::warn!("qcow2: the dropped end of the disk keeps its space: {error}");
        }
        Ok(())
    }

    /// Clears the L1 entries from `first` on and frees the empty tables behind them.
    async fn drop_tables(&self, first: usize) -> Result<()> {
        let l1 = self.l1();
        for index in first..l1.len() {
            let Some((table, entry)) = self.table(index).await? else {
                continue;
            };
            // A shared table still counts for its clusters, which belong to the active layer too.
            if !entry.is_copied() || !table.is_empty() {
                continue;
            }
            l1.set(index, Default::default());
            self.quarantine.unlinked([self.cluster_run(table.host())]);
            self.commits.touch();
        }
        Ok(())
    }

    /// Copies the L1 table to a larger place if it has fewer than `entries` entries. The copy is in use in memory, and the header does
    /// not point to it yet: until it does, no entry of the old table may change. The next write-back makes the copy durable, as all
    /// that it will lead to.
    async fn stage_l1(&self, entries: u64) -> Result<Option<StagedL1>> {
        let old = self.l1();
        if old.len() as u64 >= entries {
            return Ok(None);
        }
        let clusters = self.g.clusters_for(entries * 8);
        let area = {
            let mut alloc = self.alloc.lock().await;
            alloc.allocate_metadata(clusters, Owner::L1Table).await?
        };
        let offset = self.g.host_offset(area.run().start);
        let mut table = old.entries();
        table.resize(entries as usize, 0);
        let mut bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bytes.resize((clusters << self.g.cluster_bits()) as usize, 0);
        let data = Data::from(bytes);
        self.metadata.write(Owner::L1Table, offset, data).await?;
        self.set_l1(Arc::new(L1Table::new(offset, table)));
        Ok(Some(StagedL1 { old, area }))
    }

    /// Uses the old L1 table again, and frees what only the staged one points to.
    async fn take_back_l1(&self, staged: &StagedL1) {
        let first = staged.old.len();
        let dropped = async {
            let start = first as u64 * self.g.l2_span();
            self.unmap(start, self.size(), Unmap::Forget).await?;
            self.drop_tables(first).await
        };
        if let Err(error) = dropped.await {
            log::warn!("qcow2: what a larger disk has needed keeps its space: {error}");
        }
        self.set_l1(staged.old.clone());
    }
}
