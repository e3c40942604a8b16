//! Writes of clusters that lie apart on the disk, side by side in the file: one run of host clusters, and one write, for all of them.
//!
//! It is an allocating write (see `write`) of whole clusters that have no host cluster yet: nothing is kept of them. Everything else goes
//! the way of single writes.

use std::sync::Arc;

use super::entry::{L2Entry, Mapping, PlainCluster};
use super::geometry::GuestCluster;
use super::image::Image;
use super::l2::L2Table;
use super::parallel::run_all;
use super::subclusters::{State, mask};
use super::write::Old;
use crate::driver::BoxFuture;
use crate::error::Result;
use crate::io::Data;

/// Whole clusters in a row.
struct Piece {
    first: GuestCluster,
    data: Data,
}

impl Image {
    /// Writes pieces of the disk that have been checked. The caller is inside the gate and has prepared for changes.
    /// Cancellation: run to the end by the caller.
    pub(super) async fn write_scattered(&self, pieces: Vec<(u64, Data)>) -> Result<()> {
        let span = self.g.l2_span();
        let mut whole: Vec<Piece> = Vec::with_capacity(pieces.len());
        let mut others: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        let l2_table = pieces.first().map(|(at, _)| at / span);
        for (at, data) in pieces {
            let end = at + data.len();
            let is_alone = data.is_empty()
                || self.data.is_external()
                || !(self.g.is_aligned(at) && self.g.is_aligned(end))
                || l2_table != Some(at / span)
                || l2_table != Some((end - 1) / span)
                || whole
                    .last()
                    .is_some_and(|last| last.first >= self.cluster_at(at));
            match is_alone {
                true => others.push(Box::pin(self.write_range(at, data))),
                false => whole.push(Piece {
                    first: self.cluster_at(at),
                    data,
                }),
            }
        }
        others.push(Box::pin(self.write_whole(whole)));
        run_all(others).await
    }

    /// Writes whole clusters of one L2 table, in ascending order.
    async fn write_whole(&self, pieces: Vec<Piece>) -> Result<()> {
        let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else {
            return Ok(());
        };
        let (first, last) = (first.first, self.end_of(last));
        let mut others = Vec::new();
        {
            let _lock = self.lock_clusters(first, GuestCluster(last - 1)).await;
            let table = self.own_table(self.g.l1_index(first)).await?;
            let mut new = Vec::with_capacity(pieces.len());
            for piece in pieces {
                match self.is_new(&table, &piece)? {
                    true => new.push(piece),
                    false => others.push(piece),
                }
            }
            while !new.is_empty() {
                new = self.write_side_by_side(&table, new).await?;
            }
        }
        let write = |piece: Piece| -> BoxFuture<'_, Result<()>> {
            let at = self.g.guest_offset(piece.first).0;
            Box::pin(self.write_range(at, piece.data))
        };
        run_all(others.into_iter().map(write).collect()).await
    }

    /// The number behind the last cluster.
    fn end_of(&self, piece: &Piece) -> u64 {
        piece.first.0 + (piece.data.len() >> self.g.cluster_bits())
    }

    /// Whether no cluster of it refers to anything.
    fn is_new(&self, table: &L2Table, piece: &Piece) -> Result<bool> {
        for cluster in piece.first.0..self.end_of(piece) {
            let cluster = GuestCluster(cluster);
            let entry = table.get(self.g.l2_index(cluster));
            let has_none = |plain: PlainCluster| plain.host.is_none();
            if !matches!(self.decode(entry, cluster)?, Mapping::Plain(plain) if has_none(plain)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes as many of the clusters as there is a run of host clusters for; answers with the rest.
    async fn write_side_by_side(
        &self,
        table: &Arc<L2Table>,
        pieces: Vec<Piece>,
    ) -> Result<Vec<Piece>> {
        let bits = self.g.cluster_bits();
        let clusters = |piece: &Piece| piece.first.0..self.end_of(piece);
        let want = pieces.iter().map(|piece| piece.data.len() >> bits).sum();
        let first = pieces.first().map_or(GuestCluster(0), |piece| piece.first);
        let mut reserved = self.reserve_data(first, want).await?;
        let run = reserved.run();
        let olds = pieces
            .iter()
            .flat_map(clusters)
            .take(run.count as usize)
            .map(|cluster| Ok((cluster, self.old_cluster(table, GuestCluster(cluster))?)))
            .collect::<Result<Vec<(u64, Old)>>>()?;
        let mut all = Data::new();
        for piece in &pieces {
            let room = (run.count << bits) - all.len();
            all.append(piece.data.slice(0, piece.data.len().min(room)));
        }
        let start = self.g.host_offset(run.start);
        self.write_data(start, all).await?;
        let mut published = 0;
        for (cluster, old) in &olds {
            let Mapping::Plain(plain) = old.mapping else {
                break;
            };
            let new = PlainCluster {
                host: Some(start + (published << bits)),
                copied: true,
                subclusters: plain
                    .subclusters
                    .with(mask(0..self.g.subclusters()), State::Data),
            };
            let index = self.g.l2_index(GuestCluster(*cluster));
            if !self
                .l2
                .replace(table, index, old.entry, L2Entry::plain(new, self.g))
            {
                break;
            }
            published += 1;
        }
        reserved.publish(published);
        self.commits.touch();
        Ok(behind(pieces, published, bits))
    }
}

/// What is left of the pieces when so many clusters of `1 << bits` bytes at their front are gone.
fn behind(pieces: Vec<Piece>, mut clusters: u64, bits: u32) -> Vec<Piece> {
    let mut left = Vec::new();
    for mut piece in pieces {
        let gone = clusters.min(piece.data.len() >> bits);
        clusters -= gone;
        let _ = piece.data.split_to(gone << bits);
        piece.first.0 += gone;
        if !piece.data.is_empty() {
            left.push(piece);
        }
    }
    left
}
