//! Changing the size of the disk. Alone in the image: the gate is closed.
//!
//! The switch is one header write each time. Growing prepares everything before it (the new L1 table, zeroes where
//! old bytes could show); shrinking drops the tail after it, so that an error before changes nothing.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::alloc::Run;
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
        self.grow_l1(self.g.l1_entries_for(new)).await?;
        // Bytes behind the old end show from now on: those in its last cluster, those of a longer backing, and those that a
        // shrink has left which did not come to its end. The range is inside the new size, which the zero writes must see.
        let shown = self.backing.as_ref().map_or(0, |backing| backing.size());
        let cluster_end = old.next_multiple_of(self.g.cluster_size());
        let stale = self.mapped_end(cluster_end, new).await?;
        let end = shown.max(cluster_end).max(stale).min(new);
        let data_file = self.data.grow(old, new).await?;
        self.size.store(new, Ordering::Release);
        let hidden = async {
            if end > old {
                let flags = ZeroFlags {
                    may_unmap: true,
                    ..ZeroFlags::default()
                };
                self.zero_range(old, end - old, flags).await?;
            }
            if self.data.is_raw() {
                self.allocate_in_place(cluster_end, new).await?;
            }
            self.write_back().await?;
            self.header.update(|header| header.size = new).await
        };
        let result = hidden.await;
        if result.is_err() {
            self.size.store(old, Ordering::Release);
            self.data.take_back_growth(data_file).await;
        }
        result
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

    /// Moves the L1 table to a larger place if it has fewer than `entries` entries.
    async fn grow_l1(&self, entries: u64) -> Result<()> {
        let old = self.l1();
        if old.len() as u64 >= entries {
            return Ok(());
        }
        // The new table is a copy: what the old one points to must be durable first, as ever.
        self.write_back().await?;
        let clusters = self.g.clusters_for(entries * 8);
        let mut reserved = {
            let mut alloc = self.alloc.lock().await;
            let reserved = alloc.allocate_metadata(clusters, Owner::L1Table).await?;
            alloc.write_back().await?;
            reserved
        };
        let offset = self.g.host_offset(reserved.run().start);
        let mut table = old.entries();
        table.resize(entries as usize, 0);
        let mut bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bytes.resize((clusters << self.g.cluster_bits()) as usize, 0);
        let data = Data::from(bytes);
        self.metadata.write(Owner::L1Table, offset, data).await?;
        self.file.flush().await?;
        self.header
            .update(|header| {
                header.l1_size = entries as u32;
                header.l1_table_offset = offset;
            })
            .await?;
        reserved.publish(clusters);
        self.set_l1(Arc::new(L1Table::new(offset, table)));
        if old.len() > 0 {
            self.quarantine.unlinked([Run {
                start: self.g.host_cluster(old.offset()),
                count: self.g.clusters_for(old.len() as u64 * 8),
            }]);
        }
        self.commits.touch();
        Ok(())
    }
}
