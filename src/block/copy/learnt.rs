//! What a copy learns of its two ends while it goes on, to ask and to do less.
//!
//! * Whether holes of the source are holes in what is read from it: then scattered data are read with the holes between them, in one
//!   request.
//! * How far apart they are: so many bytes of the disk are read at once that there is a request's worth of data among them.
//! * What of the target reads as zeroes, so that not every run of zeroes is asked for.
//! * Whether what the source calls data are data without zeroes: then the target may take space for much of it at once
//!   ([`WriteFlags::ahead`]). The space that zeroes have got is given back, and nothing is taken for a while.
//!
//! [`WriteFlags::ahead`]: crate::driver::WriteFlags::ahead

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::limits::{COPY_ROOM, COPY_ROOM_AFTER, COPY_SCATTERED};

/// What holes of the source are when they are read together with data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Holes {
    /// Nobody has tried.
    Unknown,
    /// Runs of zeroes, which cost nothing.
    Kept,
    /// Bytes.
    Lost,
}

/// What is known of the two ends.
#[derive(Debug)]
pub(super) struct Learnt {
    holes: AtomicU8,
    /// Bytes that are read at once where holes are among them.
    stretch: AtomicU64,
    /// Whether space is ever taken.
    may_take: bool,
    /// Bytes of data since the last zeroes among them.
    without_zeroes: AtomicU64,
    /// Up to where space was taken last.
    room: AtomicU64,
    /// Where the target read as zeroes when it was asked. Nobody else writes it, and each cluster is copied once.
    zero: Mutex<Range<u64>>,
}

impl Learnt {
    pub(super) fn new(may_take: bool) -> Self {
        Learnt {
            holes: AtomicU8::new(Holes::Unknown as u8),
            stretch: AtomicU64::new(0),
            may_take,
            without_zeroes: AtomicU64::new(0),
            room: AtomicU64::new(0),
            zero: Mutex::new(0..0),
        }
    }

    /// What is known of holes that are read.
    pub(super) fn holes(&self) -> Holes {
        match self.holes.load(Ordering::Relaxed) {
            holes if holes == Holes::Kept as u8 => Holes::Kept,
            holes if holes == Holes::Lost as u8 => Holes::Lost,
            _ => Holes::Unknown,
        }
    }

    /// A hole has been read.
    pub(super) fn set_holes(&self, holes: Holes) {
        self.holes.store(holes as u8, Ordering::Relaxed);
    }

    /// Bytes to read at once where holes are among them, holes included: a `chunk`, or more where data are scattered.
    pub(super) fn stretch(&self, chunk: u64) -> u64 {
        self.stretch.load(Ordering::Relaxed).max(chunk)
    }

    /// So many bytes of data were among all that were read.
    pub(super) fn scattered(&self, data: u64, all: u64, chunk: u64) {
        let stretch = match data {
            _ if data > chunk => 0,
            _ if data <= chunk / 2 && all >= self.stretch(chunk) => (2 * all).min(COPY_SCATTERED),
            _ => return,
        };
        self.stretch.store(stretch, Ordering::Relaxed);
    }

    /// Takes space for data up to `end`, if that is likely to be filled.
    pub(super) fn takes_room(&self, end: u64) -> bool {
        let takes = self.may_take && self.without_zeroes.load(Ordering::Relaxed) >= COPY_ROOM_AFTER;
        if takes {
            self.room.fetch_max(end, Ordering::Relaxed);
        }
        takes
    }

    /// So many bytes of data were data.
    pub(super) fn data(&self, bytes: u64) {
        if self.may_take {
            self.without_zeroes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Zeroes were among the data at `offset`. Answers whether the target may have taken space for them.
    pub(super) fn zeroes(&self, offset: u64) -> bool {
        if !self.may_take {
            return false;
        }
        self.without_zeroes.store(0, Ordering::Relaxed);
        let room = self.room.load(Ordering::Relaxed);
        // Workers are no further apart.
        (room.saturating_sub(COPY_ROOM_AFTER)..room).contains(&offset)
    }

    /// The end of the zeroes of the target that `offset` is among.
    pub(super) fn target_zero(&self, offset: u64) -> Option<u64> {
        let zero = self.zero.lock().unwrap_or_else(PoisonError::into_inner);
        zero.contains(&offset).then_some(zero.end)
    }

    /// The target reads as zeroes there.
    pub(super) fn set_target_zero(&self, range: Range<u64>) {
        *self.zero.lock().unwrap_or_else(PoisonError::into_inner) = range;
    }
}

const _: () = assert!(COPY_ROOM_AFTER >= 4 * COPY_ROOM);
