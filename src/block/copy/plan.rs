//! What the workers do next: from front to back, as often as something is still pending.

use std::ops::Range;
use std::pin::pin;

use super::TargetContent;
use super::learnt::Holes;
use super::shared::{Mode, Shared};
use crate::driver::BlockStatus;
use crate::error::Result;
use crate::limits::{COPY_QUICK_PIECES, COPY_ROOM, COPY_STATUS_BYTES};

/// A piece of the disk for one worker. It may have been taken by a guest until the worker comes to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) bytes: Range<u64>,
    pub(super) content: Content,
    /// Bytes that are certainly data: for the speed limit.
    pub(super) data: u64,
    /// Up to where data follow in a row that the target may take space for, if that is behind the piece.
    pub(super) room: u64,
}

/// What is known of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// It reads as zeroes.
    Zero,
    /// Data, with zeroes at most in its last cluster as far as the source knows.
    Data,
    /// Data at the beginning, and then anything.
    Mixed,
}

/// Where the workers are.
#[derive(Debug, Default)]
pub(super) struct Plan {
    at: u64,
    /// What the source said last about a range: whether it is zero.
    known: Option<(Range<u64>, bool)>,
    /// So many chunks of scattered data are taken to be like the one before, unasked.
    like_before: usize,
    /// One of them is read to find out what holes are.
    has_tried: bool,
    /// Up to where the target has taken space.
    room: u64,
    /// Up to where the target has been asked what it holds.
    asked: u64,
}

/// What a worker takes on at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct AtOnce {
    /// Bytes of a piece of data.
    pub(super) bytes: u64,
    /// Bytes of data in all pieces together.
    pub(super) data: u64,
    /// Bytes of a piece of scattered data with the holes between them.
    pub(super) stretch: u64,
    /// How many pieces.
    pub(super) pieces: usize,
}

impl Shared {
    /// The next pieces; none when all is taken or the copy has failed.
    pub(super) async fn next_pieces(&self, plan: &mut Plan, at_once: AtOnce) -> Vec<Piece> {
        let Some(first) = self.next_pending(plan).await else {
            return Vec::new();
        };
        // Where requests are slow, each worker asks for itself.
        if at_once.pieces > 1 {
            self.ask_target(plan, first).await;
        }
        let mut pieces = Vec::with_capacity(1);
        let (mut next, mut data, mut mixed) = (Some(first), 0, 0);
        let most_mixed = at_once.data * at_once.pieces as u64;
        while let Some(at) = next
            .filter(|_| data < at_once.data && pieces.len() < at_once.pieces && mixed < most_mixed)
        {
            let piece = self.piece_at(plan, at, at_once).await;
            data += piece.data;
            if piece.content == Content::Mixed {
                mixed += piece.bytes.end - at;
            }
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
            *plan = Plan {
                asked: plan.asked,
                ..Plan::default()
            };
        }
    }

    /// Asks what the target holds from `at` on, while it has nothing of the copy there: many zeroes are one answer then.
    async fn ask_target(&self, plan: &mut Plan, at: u64) {
        if at < plan.asked || self.options.target_content == TargetContent::Zero {
            return;
        }
        let len = COPY_STATUS_BYTES.min(self.map.size() - at);
        // An error comes up again where zeroes are written.
        let status = self.target.block_status(at, len).await.ok();
        plan.asked = at + status.map_or(len, |status| status.len);
        if status.is_some_and(|status| status.zero) {
            self.learnt.set_target_zero(at..plan.asked);
        }
    }

    /// Whether scattered data are to be read with the holes between them: where those stay holes, and once to find that out.
    fn reads_holes(&self, plan: &mut Plan) -> bool {
        let holes = self.learnt.holes();
        plan.like_before = match holes {
            Holes::Kept => COPY_QUICK_PIECES - 1,
            Holes::Unknown | Holes::Lost => 0,
        };
        // What is shared instead is not read.
        self.in_place.piece().is_none()
            && match holes {
                Holes::Kept => true,
                Holes::Unknown => !std::mem::replace(&mut plan.has_tried, true),
                Holes::Lost => false,
            }
    }

    async fn piece_at(&self, plan: &mut Plan, at: u64, at_once: AtOnce) -> Piece {
        let size = self.map.size();
        let cluster = self.map.cluster_size();
        // Up to a border, so that pieces of several workers lie side by side.
        let border = |bytes: u64| (at + 1).next_multiple_of(bytes).min(size);
        let mixed = |data| Piece {
            bytes: at..border(at_once.stretch),
            content: Content::Mixed,
            data,
            room: 0,
        };
        let (known, zero) = match &plan.known {
            Some((known, zero)) if known.contains(&at) => (known.clone(), *zero),
            _ if plan.like_before > 0 && at.is_multiple_of(at_once.data) => {
                plan.like_before -= 1;
                return mixed(0);
            }
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
                content: Content::Zero,
                data: 0,
                room: 0,
            };
        }
        let known_end = known.end.next_multiple_of(cluster).min(size);
        let data_end = known_end.min(border(at_once.bytes));
        if known_end < border(at_once.data) && self.reads_holes(plan) {
            return mixed(known_end - at);
        }
        let mut room = known_end.min(border(COPY_ROOM));
        if plan.room <= at && data_end < room && self.learnt.takes_room(room) {
            plan.room = room;
        } else {
            room = 0;
        }
        Piece {
            bytes: at..data_end,
            content: Content::Data,
            data: data_end - at,
            room,
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
