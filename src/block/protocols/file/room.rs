//! Space that is taken before it is written, where that makes writing quicker (`HostFile::make_room` says where): by copies of disks alone.
//!
//! A file that grows gets some behind its end, which is given back when it is closed; what a killed process leaves there is given back by
//! whoever sets the file's size next. Inside of a file the writer says for how much ([`WriteFlags::ahead`]), and gives back by itself
//! what it does not write.
//!
//! [`WriteFlags::ahead`]: crate::driver::WriteFlags::ahead

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::{File, Open};
use crate::driver::Requests;
use crate::limits::GROWTH_ROOM;

impl File {
    /// Takes space for what is written now and next, if that is likely to help.
    pub(super) fn make_room(&self, open: &Open, range: Range<u64>, ahead: u64) {
        if range.end > self.size() {
            // What is given up for writing before it is closed cannot give back what is behind its end.
            if open.auto {
                return;
            }
            let from = self.room.load(Ordering::Relaxed).max(range.start);
            let to = range.end + GROWTH_ROOM;
            if from < range.end {
                self.room.fetch_max(to, Ordering::Relaxed);
                open.host.make_room(from..to);
            }
        } else if ahead > 0 {
            let end = range.end.saturating_add(ahead).min(self.size());
            open.host.make_room(range.start..end);
        }
    }

    /// Gives back what was taken behind the end of the file. Nobody may be writing to it.
    pub(super) async fn give_back_room(&self) {
        let (open, size) = (self.present(), self.size());
        let is_left = self.room.swap(0, Ordering::Relaxed) > size;
        // Without locks somebody else may have written there.
        if !is_left || !open.host.size().is_ok_and(|now| now == size) {
            return;
        }
        if let Err(error) = open.host.truncate(size).await {
            log::debug!(
                "space behind the end of '{}' stays taken: {error}",
                self.filename()
            );
        }
    }
}
