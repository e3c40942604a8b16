//! Writes: in place where a cluster is ours, else to new clusters with the rest of the old content around.
//!
//! An allocating write, under the range lock of its guest clusters:
//!
//! 1. makes the L2 table ours, so that a full disk is found before anything is written
//! 2. reserves a contiguous run of host clusters
//! 3. reads what is kept of the first and last cluster, unless it is known to be zero
//! 4. writes head, guest data and tail with one write (on clusters that were never used, zero borders are skipped)
//! 5. publishes: replaces each L2 entry, if it is still the one that step 3 read, and hands the old cluster to the quarantine
//!
//! An error at any step leaves the old mapping; the reservation gives itself back.

use std::sync::Arc;

use futures_util::future::try_join;

use super::alloc::Reserved;
use super::entry::{L2Entry, Mapping};
use super::geometry::GuestCluster;
use super::image::Image;
use super::l2::L2Table;
use super::map::{Extent, Source};
use super::parallel::run_all;
use crate::driver::{BoxFuture, WriteFlags};
use crate::error::Result;
use crate::io::{Data, Segment};
use crate::units::HostOffset;

/// A part of a write request.
struct Part {
    offset: u64,
    data: Data,
    /// Where it goes, when its clusters are ours already.
    in_place: Option<HostOffset>,
}

/// What an allocating write does at one place, once it holds the lock.
enum Step {
    InPlace(HostOffset),
    /// A zero cluster that has kept its host cluster.
    Reuse(HostOffset),
    New,
}

/// Part of a write within neighbouring clusters of one L2 table, of which none is ours.
struct Target<'a> {
    table: &'a Arc<L2Table>,
    offset: u64,
}

impl Image {
    /// Writes a range of the disk that has been checked. The caller is inside the gate and has prepared for changes.
    /// Cancellation: run to the end by the caller.
    pub(super) async fn write_range(&self, offset: u64, data: Data) -> Result<()> {
        let len = data.len();
        if len == 0 {
            return Ok(());
        }
        let first = self.extent(offset, len).await?;
        if let (Source::Data { host, ours: true }, true) = (first.source, first.len == len) {
            return self.write_in_place(host, data).await;
        }
        let mut parts = self.split(offset, data, first).await?;
        if parts.len() == 1
            && let Some(part) = parts.pop()
        {
            return self.write_part(part).await;
        }
        let mut writes: Vec<BoxFuture<'_, Result<()>>> = Vec::with_capacity(parts.len());
        for part in parts {
            writes.push(Box::pin(self.write_part(part)));
        }
        run_all(writes).await
    }

    /// Cuts a request into parts in place, and allocating ones of neighbouring clusters of one L2 table.
    async fn split(&self, offset: u64, mut data: Data, first: Extent) -> Result<Vec<Part>> {
        let mut parts: Vec<Part> = Vec::new();
        let mut at = offset;
        let mut extent = first;
        loop {
            let in_place = match extent.source {
                Source::Data { host, ours: true } => Some(host),
                _ => None,
            };
            let piece = data.split_to(extent.len);
            match parts.last_mut() {
                Some(last)
                    if in_place.is_none()
                        && last.in_place.is_none()
                        && !at.is_multiple_of(self.g.l2_span()) =>
                {
                    last.data.append(piece);
                }
                _ => parts.push(Part {
                    offset: at,
                    data: piece,
                    in_place,
                }),
            }
            at += extent.len;
            if data.is_empty() {
                return Ok(parts);
            }
            extent = self.extent(at, data.len()).await?;
        }
    }

    async fn write_part(&self, part: Part) -> Result<()> {
        match part.in_place {
            Some(host) => self.write_in_place(host, part.data).await,
            None => self.write_allocating(part.offset, part.data).await,
        }
    }

    async fn write_in_place(&self, host: HostOffset, data: Data) -> Result<()> {
        self.check_data_place(host, data.len())?;
        self.file.write(host.0, data, WriteFlags::default()).await
    }

    /// Writes to clusters of one L2 table, most of which are not ours.
    async fn write_allocating(&self, offset: u64, mut data: Data) -> Result<()> {
        let first = self.cluster_at(offset);
        let last = self.cluster_at(offset + data.len() - 1);
        let _lock = self.lock_clusters(first, last).await;
        let table = self.own_table(self.g.l1_index(first)).await?;
        let mut at = offset;
        while !data.is_empty() {
            // Looked at again under the lock: whoever had it before may have allocated.
            let (step, len) = self.next_step(&table, at, data.len())?;
            let done = match step {
                Step::InPlace(host) => {
                    self.write_in_place(host, data.slice(0, len)).await?;
                    len
                }
                Step::Reuse(host) => {
                    self.write_reused(&table, at, host, data.slice(0, len))
                        .await?;
                    len
                }
                Step::New => {
                    let target = Target {
                        table: &table,
                        offset: at,
                    };
                    self.write_new(target, &data.slice(0, len)).await?
                }
            };
            let _ = data.split_to(done);
            at += done;
        }
        Ok(())
    }

    /// What to do at `at`, and for how many bytes: one cluster, or as many as need new clusters in a row.
    fn next_step(&self, table: &L2Table, at: u64, len: u64) -> Result<(Step, u64)> {
        let size = self.g.cluster_size();
        let in_cluster = self.g.in_cluster(at);
        let step_at = |offset: u64| -> Result<Step> {
            let cluster = self.cluster_at(offset);
            let entry = table.get(self.g.l2_index(cluster));
            Ok(match self.decode(entry, cluster)? {
                Mapping::Normal { host, copied: true } => Step::InPlace(host + in_cluster),
                Mapping::ZeroAllocated { host, copied: true } => Step::Reuse(host),
                _ => {
                    self.decode_to_replace(entry, cluster)?;
                    Step::New
                }
            })
        };
        let first = step_at(at)?;
        let mut found = size - in_cluster;
        if matches!(first, Step::New) {
            while found < len && matches!(step_at(at + found)?, Step::New) {
                found += size;
            }
        }
        Ok((first, found.min(len)))
    }

    /// Writes into the kept cluster of a zero cluster: all of it, as what it held before shows nowhere.
    async fn write_reused(
        &self,
        table: &Arc<L2Table>,
        at: u64,
        host: HostOffset,
        data: Data,
    ) -> Result<()> {
        let cluster = self.cluster_at(at);
        let index = self.g.l2_index(cluster);
        let head = self.g.in_cluster(at);
        let tail = self.g.cluster_size() - head - data.len();
        let mut all = Data::zeroes(head);
        all.append(data);
        all.push(Segment::Zeroes(tail));
        self.write_in_place(host, all).await?;
        let old = L2Entry::zero_allocated(host);
        let replaced = self.l2.replace(table, index, old, L2Entry::normal(host));
        debug_assert!(replaced, "the range lock keeps others off");
        self.commits.touch();
        Ok(())
    }

    /// Writes the front of `data` to new clusters; answers how many bytes are written and published.
    async fn write_new(&self, target: Target<'_>, data: &Data) -> Result<u64> {
        let size = self.g.cluster_size();
        let head = self.g.in_cluster(target.offset);
        let want = self.g.clusters_for(head + data.len());
        let mut reserved = self.alloc.lock().await.allocate(want).await?;
        let run = reserved.run();
        let len = data.len().min((run.count << self.g.cluster_bits()) - head);
        let tail = (run.count << self.g.cluster_bits()) - head - len;
        let first = self.cluster_at(target.offset);
        let index = self.g.l2_index(first);
        let old: Vec<L2Entry> = (index..index + run.count as usize)
            .map(|index| target.table.get(index))
            .collect();
        let last = GuestCluster(first.0 + run.count - 1);
        let (before, after) = try_join(
            self.read_old(old[0], first, 0, head),
            self.read_old(old[old.len() - 1], last, size - tail, tail),
        )
        .await?;
        let fresh = reserved.is_fresh();
        let mut host = self.g.host_offset(run.start);
        let mut all = Data::new();
        if fresh && before.is_known_zero() {
            host = host + head;
        } else {
            all.append(before);
        }
        all.append(data.slice(0, len));
        if !(fresh && after.is_known_zero()) {
            all.append(after);
        }
        self.file.write(host.0, all, WriteFlags::default()).await?;
        let published = self.publish(target.table, index, &old, &mut reserved)?;
        Ok(((published << self.g.cluster_bits()).saturating_sub(head)).min(len))
    }

    /// What a cluster shows at `[from, from + len)` inside it, to be copied.
    async fn read_old(
        &self,
        entry: L2Entry,
        cluster: GuestCluster,
        from: u64,
        len: u64,
    ) -> Result<Data> {
        if len == 0 {
            return Ok(Data::new());
        }
        match self.decode(entry, cluster)? {
            Mapping::Unallocated => {
                let offset = self.g.guest_offset(cluster).0 + from;
                // Bytes behind the end of the disk are zero, even where the backing is longer.
                let inside = self.size().saturating_sub(offset).min(len);
                let mut data = self.read_backing_to_copy(offset, inside).await?;
                data.push(Segment::Zeroes(len - inside));
                Ok(data)
            }
            Mapping::ZeroPlain | Mapping::ZeroAllocated { .. } => Ok(Data::zeroes(len)),
            Mapping::Normal { host, .. } => self.file.read((host + from).0, len).await,
            Mapping::Compressed(stream) => {
                let bytes = self.decompress(stream).await?;
                Ok(Data::from(
                    bytes.slice(from as usize..(from + len) as usize),
                ))
            }
        }
    }

    /// Points the entries from `index` on to the reserved clusters, as long as they are still the `old` ones.
    /// Answers how many; the rest stays reserved.
    fn publish(
        &self,
        table: &Arc<L2Table>,
        index: usize,
        old: &[L2Entry],
        reserved: &mut Reserved,
    ) -> Result<u64> {
        let start = self.g.host_offset(reserved.run().start);
        let mut freed = Vec::new();
        let mut published = 0;
        for (nth, old) in old.iter().enumerate() {
            let host = start + ((nth as u64) << self.g.cluster_bits());
            if !self
                .l2
                .replace(table, index + nth, *old, L2Entry::normal(host))
            {
                break;
            }
            published += 1;
            // Decoded before, when it was read.
            if let Ok(mapping) = old.decode(self.g, self.has_zero_flag()) {
                freed.extend(self.references(mapping));
            }
        }
        reserved.publish(published);
        if !freed.is_empty() {
            self.quarantine.unlinked(freed);
        }
        self.commits.touch();
        Ok(published)
    }
}
