//! Memory of finished reads, kept for the next ones.
//!
//! Memory that comes fresh from the kernel is zeroed page by page when it is first touched, which takes longer than reading into it from
//! the page cache; and memory that was just read from is still in the processor's cache. So a few buffers of the sizes that copies and
//! large requests use stay here when whoever has read is done with them.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::buffer::{Aligned, Buffer};
use crate::limits::{MAX_SPARE_BUFFER, MAX_SPARE_BYTES, MIN_SPARE_BUFFER};

/// What spare memory is aligned to: enough for direct I/O on most files.
const ALIGNMENT: usize = 4096;

/// Buffers that nobody uses at present. Each is a power of two in size.
#[derive(Debug, Default)]
pub(super) struct Spares(Mutex<Vec<Aligned>>);

impl Spares {
    /// A buffer for `len` bytes at a multiple of `alignment`, from what was kept if possible. Errors as [`Buffer::new`].
    pub(super) fn buffer(self: &Arc<Self>, len: usize, alignment: usize) -> io::Result<Buffer> {
        let size = len.next_power_of_two();
        if !(MIN_SPARE_BUFFER..=MAX_SPARE_BUFFER).contains(&size) || alignment > ALIGNMENT {
            return Buffer::new(len, alignment);
        }
        let memory = match self.take(size) {
            Some(memory) => memory,
            None => Aligned::new(size, ALIGNMENT)?,
        };
        Ok(Buffer::lent(memory, len, self.clone()))
    }

    /// The memory of this size that was given back last.
    fn take(&self, size: usize) -> Option<Aligned> {
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = spares.iter().rposition(|memory| memory.len() == size)?;
        Some(spares.remove(found))
    }

    /// Keeps memory that nobody uses any more, in place of what has lain here longest.
    pub(super) fn give_back(&self, memory: Aligned) {
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut kept: usize = spares.iter().map(Aligned::len).sum();
        let too_many = spares.iter().take_while(|oldest| {
            let too_many = kept + memory.len() > MAX_SPARE_BYTES;
            kept -= if too_many { oldest.len() } else { 0 };
            too_many
        });
        let too_many = too_many.count();
        let freed: Vec<Aligned> = spares.drain(..too_many).collect();
        spares.push(memory);
        drop(spares);
        drop(freed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_was_read_from_is_used_again_with_nothing_of_its_old_content() {
        let spares = Arc::new(Spares::default());
        let mut buffer = spares.buffer(MIN_SPARE_BUFFER - 5, 512).unwrap();
        let address = buffer.next() as usize;
        buffer.append(&vec![7; MIN_SPARE_BUFFER - 5]);
        let bytes = buffer.freeze();
        let part = bytes.slice(100..);
        drop(bytes);
        assert!(spares.take(MIN_SPARE_BUFFER).is_none(), "still in use");
        assert_eq!(part.len(), MIN_SPARE_BUFFER - 105);
        drop(part);
        let mut again = spares.buffer(MIN_SPARE_BUFFER, 1).unwrap();
        assert_eq!(again.next() as usize, address);
        assert_eq!((again.filled(), again.missing()), (0, MIN_SPARE_BUFFER));
        // Dropped without having been filled.
        drop(again);
        assert!(spares.take(MIN_SPARE_BUFFER).is_some());
    }

    #[test]
    fn only_so_much_is_kept() {
        let spares = Arc::new(Spares::default());
        let count = MAX_SPARE_BYTES / MAX_SPARE_BUFFER + 3;
        let used: Vec<Buffer> = (0..count)
            .map(|_| spares.buffer(MAX_SPARE_BUFFER, 1).unwrap())
            .collect();
        drop(spares.buffer(MIN_SPARE_BUFFER, 1).unwrap());
        drop(used);
        let kept = spares.0.lock().unwrap();
        assert_eq!(
            kept.iter().map(Aligned::len).sum::<usize>(),
            MAX_SPARE_BYTES
        );
        assert!(kept.iter().all(|memory| memory.len() == MAX_SPARE_BUFFER));
    }

    #[test]
    fn what_is_too_small_or_too_large_is_not_kept() {
        let spares = Arc::new(Spares::default());
        for len in [0, 1, MIN_SPARE_BUFFER / 2, MAX_SPARE_BUFFER + 1] {
            drop(spares.buffer(len, 1).unwrap());
        }
        assert!(spares.0.lock().unwrap().is_empty());
    }
}
