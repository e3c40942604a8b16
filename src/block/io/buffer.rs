//! Memory that the kernel reads into: aligned for direct I/O, not cleared first.

use std::alloc::{Layout, alloc, dealloc};
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use bytes::Bytes;

use super::spares::Spares;

/// What every allocator aligns to anyway: up to here a plain vector does.
const NATURAL_ALIGNMENT: usize = 8;

/// A buffer that is filled from its front and then becomes [`Bytes`] without a copy.
///
/// Invariant: the first `filled` bytes are initialised, and `filled <= len <= capacity`.
pub(crate) struct Buffer {
    memory: Memory,
    len: usize,
    filled: usize,
    /// How many of them are zeroes for want of others.
    behind_end: usize,
}

enum Memory {
    Plain(Vec<u8>),
    Aligned(Lent),
}

/// Aligned memory, and where it goes in the end.
struct Lent {
    /// `None` only while it is dropped.
    memory: Option<Aligned>,
    spares: Option<Arc<Spares>>,
}

/// Memory with an alignment of its own. Its content is not initialised.
#[derive(Debug)]
pub(super) struct Aligned {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: `Aligned` owns its memory alone, as a `Box<[u8]>` does.
unsafe impl Send for Aligned {}
// SAFETY: shared access only reads.
unsafe impl Sync for Aligned {}

impl Buffer {
    /// Room for `len` bytes at an address that is a multiple of the power of two `alignment`.
    /// `OutOfMemory` when there is none: a request must not abort the process.
    pub(crate) fn new(len: usize, alignment: usize) -> io::Result<Self> {
        let memory = if alignment <= NATURAL_ALIGNMENT || len == 0 {
            let mut plain = Vec::new();
            plain.try_reserve_exact(len).map_err(|_| out_of_memory())?;
            Memory::Plain(plain)
        } else {
            Memory::Aligned(Lent {
                memory: Some(Aligned::new(len, alignment)?),
                spares: None,
            })
        };
        Ok(Buffer {
            memory,
            len,
            filled: 0,
            behind_end: 0,
        })
    }

    /// Room for `len` bytes in memory that goes back to `spares` when the last who uses it is done.
    pub(super) fn lent(memory: Aligned, len: usize, spares: Arc<Spares>) -> Self {
        assert!(len <= memory.len(), "the memory is too small");
        Buffer {
            memory: Memory::Aligned(Lent {
                memory: Some(memory),
                spares: Some(spares),
            }),
            len,
            filled: 0,
            behind_end: 0,
        }
    }

    /// How many bytes are still missing.
    pub(crate) fn missing(&self) -> usize {
        self.len - self.filled
    }

    /// How many bytes are there.
    pub(crate) fn filled(&self) -> usize {
        self.filled
    }

    /// How many of them `fill_with_zeroes` has added.
    pub(crate) fn behind_end(&self) -> usize {
        self.behind_end
    }

    /// Where the next byte goes. The pointer stays valid until the buffer is dropped or frozen.
    pub(crate) fn next(&mut self) -> *mut u8 {
        let start = self.start();
        // SAFETY: filled <= len <= capacity, so this is inside of the allocation or at its end.
        unsafe { start.add(self.filled) }
    }

    /// Declares that `count` more bytes have been written at `next()`.
    ///
    /// # Safety
    /// They have been, and `count <= missing()`.
    pub(crate) unsafe fn advance(&mut self, count: usize) {
        debug_assert!(count <= self.missing());
        self.filled += count;
    }

    /// Zeroes what is missing: the part of a read that lies behind the end of the file.
    pub(crate) fn fill_with_zeroes(&mut self) {
        let missing = self.missing();
        let next = self.next();
        // SAFETY: `missing` bytes of the allocation lie behind `next`.
        unsafe {
            next.write_bytes(0, missing);
            self.advance(missing);
        }
        self.behind_end += missing;
    }

    /// Copies `source` behind what is there.
    ///
    /// # Panics
    /// When it does not fit: a caller's error.
    pub(crate) fn append(&mut self, source: &[u8]) {
        assert!(source.len() <= self.missing(), "buffer is full");
        let next = self.next();
        // SAFETY: the assertion leaves room for `source`, which cannot overlap memory that we own alone.
        unsafe {
            next.copy_from_nonoverlapping(source.as_ptr(), source.len());
            self.advance(source.len());
        }
    }

    /// The filled bytes, shared from now on.
    pub(crate) fn freeze(self) -> Bytes {
        let filled = self.filled;
        match self.memory {
            Memory::Plain(mut plain) => {
                // SAFETY: the first `filled` bytes are initialised and filled <= capacity.
                unsafe { plain.set_len(filled) };
                Bytes::from(plain)
            }
            Memory::Aligned(memory) => Bytes::from_owner(Filled { memory, filled }),
        }
    }

    fn start(&mut self) -> *mut u8 {
        match &mut self.memory {
            Memory::Plain(plain) => plain.as_mut_ptr(),
            Memory::Aligned(lent) => lent.start(),
        }
    }
}

/// Aligned memory whose first `filled` bytes are initialised.
struct Filled {
    memory: Lent,
    filled: usize,
}

impl AsRef<[u8]> for Filled {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the buffer's invariant: `filled` bytes from `start` are initialised, and we own them.
        unsafe { std::slice::from_raw_parts(self.memory.start(), self.filled) }
    }
}

impl Lent {
    fn start(&self) -> *mut u8 {
        match &self.memory {
            Some(memory) => memory.start.as_ptr(),
            None => unreachable!("used after its end"),
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let (Some(memory), Some(spares)) = (self.memory.take(), &self.spares) {
            spares.give_back(memory);
        }
    }
}

impl Aligned {
    /// Its size in bytes.
    pub(super) fn len(&self) -> usize {
        self.layout.size()
    }

    /// `len` bytes, at least one, at a multiple of `alignment`.
    pub(super) fn new(len: usize, alignment: usize) -> io::Result<Self> {
        assert!(len > 0, "an empty buffer needs no memory");
        let layout = Layout::from_size_align(len, alignment).map_err(|_| out_of_memory())?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { alloc(layout) }).ok_or_else(out_of_memory)?;
        Ok(Aligned { start, layout })
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and freed only here.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

fn out_of_memory() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOMEM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_as_they_went_in_at_any_alignment() {
        for alignment in [1, 8, 512, 4096] {
            let mut buffer = Buffer::new(1000, alignment).unwrap();
            assert_eq!(buffer.next() as usize % alignment, 0);
            buffer.append(&[7; 300]);
            assert_eq!((buffer.filled(), buffer.missing()), (300, 700));
            buffer.fill_with_zeroes();
            let bytes = buffer.freeze();
            assert_eq!(bytes.len(), 1000);
            assert!(bytes[..300].iter().all(|byte| *byte == 7));
            assert!(bytes[300..].iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn too_much_memory_is_an_error() {
        assert!(Buffer::new(isize::MAX as usize, 1).is_err());
        assert!(Buffer::new(isize::MAX as usize, 4096).is_err());
    }
}
