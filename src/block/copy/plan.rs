//! What the workers do next: from front to back, as often as something is still pending.

use std::ops::Range;
use std::pin::pin;

use super::shared::{Mode, Shared};
use crate::driver::BlockStatus;
use crate::error::Result;
use crate::limits::COPY_STATUS_BYTES;

/// A piece of the disk for one worker. It may have been taken by a guest until the worker comes to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) bytes: Range<u64>,
    /// It is known to read as zeroes.
    pub(super) zero: bool,
}

/// Where the workers are.
#[derive(Debug, Default)]
pub(super) struct Plan {
    at: u64,
    /// What the source said last about a range: whether it is zero.
    known: Option<(Range<u64>, bool)>,
}

/// What a worker takes on at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct AtOnce {
    /// Bytes of a piece, and of data in all pieces together.
    pub(super) bytes: u64,
    /// How many pieces.
    pub(super) pieces: usize,
}

impl Shared {
    /// The next pieces; none when all is taken or the copy has failed.
    pub(super) async fn next_pieces(&self, plan: &mut Plan, at_once: AtOnce) -> Vec<Piece> {
        let Some(first) = self.next_pending(plan).await else {
            return Vec::new();
        };
        let mut pieces = Vec::with_capacity(1);
        let (mut next, mut data) = (Some(first), 0);
        while let Some(at) = next.filter(|_| data < at_once.bytes && pieces.len() < at_once.pieces)
        {
            let piece = self.piece_at(plan, at, at_once.bytes).await;
            data += if piece.zero { 0 } else { piece.bytes.end - at };
            plan.at = piece.bytes.end;
            pieces.push(piece);
            next = self.map.next_pending(plan.at);
        }
        pieces
    }

    /// Where something is pending, once it is certain whether anything is.
    async fn next_pending(&self, plan: &mut Plan) -> Option<u64> {
        loop {
            let mut ended = pin!(self.map.ended());
            ended.as_mut().enable();
            if self.check().is_err() || self.map.is_done() {
                return None;
            }
            if let Some(at) = self.map.next_pending(plan.at) {
                return Some(at);
            }
            // Once more from the front, for what was given up; it may be that all the rest is being read.
            if self.map.next_pending(0).is_none() {
                ended.await;
            }
            *plan = Plan::default();
        }
    }

    async fn piece_at(&self, plan: &mut Plan, at: u64, chunk: u64) -> Piece {
        let size = self.map.size();
        let cluster = self.map.cluster_size();
        let (known, zero) = match &plan.known {
            Some((known, zero)) if known.contains(&at) => (known.clone(), *zero),
            _ => {
                let len = COPY_STATUS_BYTES.max(cluster).min(size - at);
                // Who reads there will meet the error.
                let status = self.status(at, len).await;
                let (len, zero) = status.map_or((len, false), |status| (status.len, status.zero));
                plan.known = Some((at..at + len, zero));
                (at..at + len, zero)
            }
        };
        let last = known.end == size;
        let whole = if last {
            size
        } else {
            known.end / cluster * cluster
        };
        if zero && whole > at {
            return Piece {
                bytes: at..whole,
                zero: true,
            };
        }
        // Up to the chunk's border, so that pieces of several workers lie side by side; and no zeroes but in the last cluster.
        let known_end = known.end.next_multiple_of(cluster);
        let chunk_end = (at + 1).next_multiple_of(chunk);
        Piece {
            bytes: at..known_end.min(chunk_end).min(size),
            zero: false,
        }
    }

    /// What the source holds there. It is so at the point in time as far as nobody has taken it when this answers.
    async fn status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        loop {
            self.readable().await;
            let _asking = self.map.ask(offset..offset + len);
            if self.mode() != Mode::Taken {
                return self.reader().block_status(offset, len).await;
            }
        }
    }

    /// Whether the source's top layer has allocated any of these bytes, which the caller has claimed.
    pub(super) async fn is_allocated(&self, offset: u64, len: u64) -> Result<bool> {
        let mut at = offset;
        while at < offset + len {
            let status = self.reader().block_status(at, offset + len - at).await?;
            if status.allocated {
                return Ok(true);
            }
            at += status.len;
        }
        Ok(false)
    }

    /// Drops what the source's top layer has not allocated.
    pub(super) async fn drop_unallocated(&self) -> Result<()> {
        let size = self.map.size();
        let (mut at, mut free_from) = (0, 0);
        while at < size {
            let len = COPY_STATUS_BYTES.min(size - at);
            let status = self.status(at, len).await?;
            if status.allocated {
                self.add_dropped(self.map.drop_range(free_from..at));
                free_from = at + status.len;
            }
            at += status.len;
            self.check()?;
        }
        self.add_dropped(self.map.drop_range(free_from..size));
        Ok(())
    }
}
