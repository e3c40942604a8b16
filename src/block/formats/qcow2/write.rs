//! Writes: in place where a cluster is ours, else to new clusters with what they keep of the old content.
//!
//! An allocating write, under the range lock of its guest clusters:
//!
//! 1. makes the L2 table ours, so that a full disk is found before anything is written
//! 2. reserves a contiguous run of host clusters
//! 3. reads what is kept of the first and last cluster (see `cow`), unless it is known to be zero
//! 4. writes old and new data, with one write as a rule (on clusters that were never used, zeroes are skipped)
//! 5. publishes: replaces each L2 entry, if it is still the one that step 3 read, and hands the old cluster to the quarantine
//!
//! In a cluster of ours that has no data yet in all of its subclusters, or is kept behind zeroes, steps 2 and 5 are
//! simpler: the data go where they belong, then the entry says that they are there. The lock is that of the subclusters
//! alone, so that writes side by side in one cluster do not wait for each other.
//!
//! An error at any step leaves the old mapping; the reservation gives itself back.

use std::ops::Range;
use std::sync::Arc;

use futures_util::future::{try_join, try_join_all};

use super::alloc::{Reserved, Run};
use super::entry::{L2Entry, Mapping, PlainCluster};
use super::geometry::GuestCluster;
use super::image::Image;
use super::l2::L2Table;
use super::map::{Extent, Source};
use super::parallel::run_all;
use super::subclusters::{State, Subclusters, mask};
use crate::driver::{BoxFuture, WriteFlags};
use crate::error::Result;
use crate::io::Data;
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
    /// A cluster of ours gets data.
    Fill(PlainCluster),
    /// The place gets another host cluster.
    New,
}

/// What an allocating write has alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// The subclusters that it writes to: enough for `Step::Fill`.
    Subclusters,
    /// All of their clusters.
    Clusters,
}

/// Part of a write within neighbouring clusters of one L2 table, of which none is ours.
pub(super) struct Target<'a> {
    pub(super) table: &'a Arc<L2Table>,
    pub(super) offset: u64,
}

/// What a guest cluster is that gets another host cluster.
pub(super) struct Old {
    pub(super) entry: L2Entry,
    pub(super) mapping: Mapping,
    /// The references that go with the entry.
    gone: Option<Run>,
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
        let least = match self.g.has_extended_l2() {
            true => self.g.cluster_size(),
            false => 0,
        };
        loop {
            let in_place = match extent.source {
                // Subclusters in place go with their neighbours in the cluster: one write for all.
                _ if extent.len < least => None,
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
        if !self.data.is_external() {
            self.check_data_place(host, data.len())?;
        }
        self.write_data(host, data).await
    }

    /// Writes guest data, and what is around them in their clusters. An external data file never reaches beyond the disk.
    pub(super) async fn write_data(&self, host: HostOffset, mut data: Data) -> Result<()> {
        if self.data.is_external() {
            let inside = self.size().saturating_sub(host.0);
            data = data.slice(0, data.len().min(inside));
        }
        let file = self.data.child();
        file.write(host.0, data, WriteFlags::default()).await
    }

    /// Writes to clusters of one L2 table that are not ours, or have no data yet where they are written.
    async fn write_allocating(&self, offset: u64, mut data: Data) -> Result<()> {
        let mut at = offset;
        let mut scope = self.scope(offset).await?;
        while !data.is_empty() {
            let done = self.write_alone(scope, at, &data).await?;
            let _ = data.split_to(done);
            at += done;
            scope = Scope::Clusters;
        }
        Ok(())
    }

    /// What a write has to lock, by what is there now. It may turn out to be too little.
    async fn scope(&self, offset: u64) -> Result<Scope> {
        if !self.g.has_extended_l2() {
            return Ok(Scope::Clusters);
        }
        let index = self.g.l1_index(self.cluster_at(offset));
        let step = match self.table(index).await? {
            Some((table, entry)) if entry.is_copied() => self.next_step(&table, offset, 1)?.0,
            _ => Step::New,
        };
        Ok(match step {
            Step::Fill(_) => Scope::Subclusters,
            Step::New => Scope::Clusters,
        })
    }

    /// Writes `data` under a lock of the given scope. Answers how many bytes are done: all, or those in front of a place
    /// for which the scope is too small.
    async fn write_alone(&self, scope: Scope, offset: u64, data: &Data) -> Result<u64> {
        let first = self.cluster_at(offset);
        let last = self.cluster_at(offset + data.len() - 1);
        let _lock = match scope {
            Scope::Subclusters => self.lock_subclusters(offset, data.len()).await,
            Scope::Clusters => self.lock_clusters(first, last).await,
        };
        let table = self.own_table(self.g.l1_index(first)).await?;
        let mut done = 0;
        while done < data.len() {
            let at = offset + done;
            // Looked at again under the lock: whoever had it before may have allocated.
            let (step, len) = self.next_step(&table, at, data.len() - done)?;
            let target = Target {
                table: &table,
                offset: at,
            };
            let piece = data.slice(done, len);
            done += match step {
                Step::Fill(cluster) => self.fill(target, cluster, piece).await?,
                Step::New if scope == Scope::Subclusters => return Ok(done),
                Step::New => self.write_new(target, &piece).await?,
            };
        }
        Ok(done)
    }

    /// What to do at `at`, and for how many bytes: one cluster, or as many as need new clusters in a row.
    fn next_step(&self, table: &L2Table, at: u64, len: u64) -> Result<(Step, u64)> {
        let step_at = |offset: u64| -> Result<Step> {
            let cluster = self.cluster_at(offset);
            let entry = table.get(self.g.l2_index(cluster));
            match self.decode(entry, cluster)? {
                Mapping::Plain(plain) if plain.ours().is_some() => Ok(Step::Fill(plain)),
                _ => {
                    self.decode_to_replace(entry, cluster)?;
                    Ok(Step::New)
                }
            }
        };
        let size = self.g.cluster_size();
        let first = step_at(at)?;
        let mut found = size - self.g.in_cluster(at);
        if matches!(first, Step::New) {
            while found < len && matches!(step_at(at + found)?, Step::New) {
                found += size;
            }
        }
        Ok((first, found.min(len)))
    }

    /// Writes into a cluster of ours, and says that there are data where there were none. Answers how many bytes are
    /// written; none when the cluster is no longer there.
    async fn fill(&self, target: Target<'_>, plain: PlainCluster, data: Data) -> Result<u64> {
        let Some(host) = plain.ours() else {
            return Ok(0);
        };
        let cluster = self.cluster_at(target.offset);
        let len = data.len();
        let from = self.g.in_cluster(target.offset);
        let touched = self.g.subclusters_of(from, len);
        let has_data = |index| plain.subclusters.state(index) == State::Data;
        // Only subclusters that begin to have data need borders.
        let byte = |index: u32| u64::from(index) << self.g.subcluster_bits();
        let start = match has_data(touched.start) {
            true => from,
            false => byte(touched.start),
        };
        let end = match has_data(touched.end - 1) {
            true => from + len,
            false => byte(touched.end),
        };
        let old = Mapping::Plain(plain);
        let (mut all, after) = try_join(
            self.read_old(old, cluster, start..from),
            self.read_old(old, cluster, from + len..end),
        )
        .await?;
        all.append(data);
        all.append(after);
        self.write_in_place(host + start, all).await?;
        let written = mask(touched);
        if written & !plain.subclusters.data() == 0 {
            return Ok(len);
        }
        loop {
            let index = self.g.l2_index(cluster);
            let old = target.table.get(index);
            let now = match self.decode(old, cluster)? {
                Mapping::Plain(now) if now.ours() == Some(host) => now,
                // The range lock keeps others off, but the flag of a damaged image may go at any time.
                _ => return Ok(0),
            };
            let new = PlainCluster {
                subclusters: now.subclusters.with(written, State::Data),
                ..now
            };
            // Neighbours in the cluster may be written meanwhile.
            let new = L2Entry::plain(new, self.g);
            if self.l2.replace(target.table, index, old, new) {
                self.commits.touch();
                return Ok(len);
            }
        }
    }

    pub(super) fn old_cluster(&self, table: &L2Table, cluster: GuestCluster) -> Result<Old> {
        let entry = table.get(self.g.l2_index(cluster));
        let mapping = self.decode(entry, cluster)?;
        Ok(Old {
            entry,
            mapping,
            gone: self.references(mapping),
        })
    }

    /// Writes the front of `data` to new clusters; answers how many bytes are written and published.
    async fn write_new(&self, target: Target<'_>, data: &Data) -> Result<u64> {
        let size = self.g.cluster_size();
        let head = self.g.in_cluster(target.offset);
        let want = self.g.clusters_for(head + data.len());
        let mut reserved = self
            .reserve_data(self.cluster_at(target.offset), want)
            .await?;
        let run = reserved.run();
        let len = data.len().min((run.count << self.g.cluster_bits()) - head);
        let first = self.cluster_at(target.offset);
        let old = (first.0..first.0 + run.count)
            .map(|cluster| self.old_cluster(target.table, GuestCluster(cluster)))
            .collect::<Result<Vec<Old>>>()?;
        let mut pieces: Vec<(u64, Data)> = vec![(head, data.slice(0, len))];
        let fresh = reserved.is_fresh();
        // Only the clusters at the ends keep something.
        let mut kept = Vec::new();
        let last = run.count - 1;
        for nth in [0, last].into_iter().take(if last > 0 { 2 } else { 1 }) {
            let cluster = GuestCluster(first.0 + nth);
            let mapping = old[nth as usize].mapping;
            let written = within(head..head + len, nth * size, size);
            for range in self.kept(mapping, written) {
                if !(fresh && self.surely_zero(mapping, &range)) {
                    kept.push((nth * size + range.start, mapping, cluster, range));
                }
            }
        }
        if !kept.is_empty() {
            let reads = kept.iter().map(|(_, mapping, cluster, range)| {
                self.read_old(*mapping, *cluster, range.clone())
            });
            for ((at, ..), old_data) in kept.iter().zip(try_join_all(reads).await?) {
                if !(fresh && old_data.is_known_zero()) {
                    pieces.push((*at, old_data));
                }
            }
        }
        self.write_neighbours(self.g.host_offset(run.start), pieces)
            .await?;
        let published = self.publish(&target, &old, head..head + len, &mut reserved)?;
        Ok(((published << self.g.cluster_bits()).saturating_sub(head)).min(len))
    }

    /// Writes pieces at their distances from `start`; neighbours together.
    async fn write_neighbours(
        &self,
        start: HostOffset,
        mut pieces: Vec<(u64, Data)>,
    ) -> Result<()> {
        pieces.sort_unstable_by_key(|(at, _)| *at);
        pieces.dedup_by(|(at, piece), (before_at, before)| {
            let joins = *before_at + before.len() == *at;
            if joins {
                before.append(std::mem::take(piece));
            }
            joins
        });
        if pieces.len() == 1
            && let Some((at, data)) = pieces.pop()
        {
            return self.write_data(start + at, data).await;
        }
        let write = |(at, data)| -> BoxFuture<'_, Result<()>> {
            Box::pin(self.write_data(start + at, data))
        };
        run_all(pieces.into_iter().map(write).collect()).await
    }

    /// Points the entries from `target` on to the reserved clusters, as long as they are still the `old` ones. `written`
    /// is counted from the first cluster's start. Answers how many; the rest stays reserved.
    pub(super) fn publish(
        &self,
        target: &Target<'_>,
        old: &[Old],
        written: Range<u64>,
        reserved: &mut Reserved,
    ) -> Result<u64> {
        let size = self.g.cluster_size();
        let first = self.g.l2_index(self.cluster_at(target.offset));
        let start = self.g.host_offset(reserved.run().start);
        let mut freed = Vec::new();
        let mut published = 0;
        for (nth, old) in old.iter().enumerate() {
            let at = nth as u64 * size;
            let part = within(written.clone(), at, size);
            let subclusters = match old.mapping {
                Mapping::Plain(cluster) => {
                    let touched = self.g.subclusters_of(part.start, part.end - part.start);
                    cluster.subclusters.with(mask(touched), State::Data)
                }
                Mapping::Compressed(_) => {
                    let all = mask(0..self.g.subclusters());
                    Subclusters::default().with(all, State::Data)
                }
            };
            let new = PlainCluster {
                host: Some(start + at),
                copied: true,
                subclusters,
            };
            let new = L2Entry::plain(new, self.g);
            if !self.l2.replace(target.table, first + nth, old.entry, new) {
                break;
            }
            published += 1;
            freed.extend(old.gone);
        }
        reserved.publish(published);
        if !freed.is_empty() {
            self.quarantine.unlinked(freed);
        }
        self.commits.touch();
        Ok(published)
    }
}

/// The part of `range` in the `size` bytes from `start` on, counted from there.
fn within(range: Range<u64>, start: u64, size: u64) -> Range<u64> {
    let part = range.start.max(start)..range.end.min(start + size);
    part.start - start..part.end - start
}
