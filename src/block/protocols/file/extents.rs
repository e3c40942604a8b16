//! Where data and holes are in a file, with the last answer remembered.
//!
//! SEEK_DATA and SEEK_HOLE walk the file system's own tables: asking again for each block of a large extent
//! makes a copy quadratic on some of them.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::io::{Extent, HostFile};

/// The last extent found, and whether anything has changed since.
#[derive(Debug, Default)]
pub(super) struct Extents(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: Option<Extent>,
    /// Counts changes begun and ended: an answer that was looked up while it moved is not remembered.
    generation: u64,
}

/// What a request does to a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Holes become data.
    Filled,
    /// Data may become holes.
    Freed,
}

/// A request that changes the file is under way.
#[derive(Debug)]
#[must_use]
pub(super) struct Changing<'a> {
    extents: &'a Extents,
    change: Change,
    range: Range<u64>,
}

impl Extents {
    /// Forgets what the request makes wrong, and what lies in front of that, now and again when the answer is dropped.
    pub(super) fn change(&self, change: Change, range: Range<u64>) -> Changing<'_> {
        self.forget(change, &range);
        Changing {
            extents: self,
            change,
            range,
        }
    }

    /// The extent of `offset`, up to its end.
    pub(super) async fn find(&self, host: &HostFile, offset: u64) -> io::Result<Extent> {
        let generation = {
            let state = self.state();
            if let Some(last) = state.last
                && (last.start..last.end).contains(&offset)
            {
                return Ok(last);
            }
            state.generation
        };
        let found = host.extent_at(offset).await?;
        let mut state = self.state();
        if state.generation == generation {
            state.last = Some(found);
        }
        Ok(found)
    }

    fn forget(&self, change: Change, range: &Range<u64>) {
        let mut state = self.state();
        state.generation += 1;
        // Writing to data and freeing holes changes nothing.
        let stale = |last: &Extent| {
            last.data == (change == Change::Freed)
                && last.start < range.end
                && range.start < last.end
        };
        let Some(last) = state.last.take_if(|last| stale(last)) else {
            return;
        };
        // What lies behind is asked for next, where somebody goes through the file and fills it.
        if range.end < last.end {
            state.last = Some(Extent {
                start: range.end,
                ..last
            });
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.extents.forget(self.change, &self.range);
    }
}
