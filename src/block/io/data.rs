//! Request payloads: a rope of shared bytes and zero runs.
//!
//! A payload crosses the layers without being copied: a format splits it at cluster borders, wraps guest data between
//! copied-on-write neighbours, and the file engine writes the lot with one vectored call. Zero runs cost no memory.
//! It owns its bytes, so a request that the kernel still works on outlives a dropped future.

use bytes::{Bytes, BytesMut};
use smallvec::SmallVec;

/// A part of a payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// Bytes as they are.
    Bytes(Bytes),
    /// This many zero bytes.
    Zeroes(u64),
}

impl Segment {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Segment::Bytes(bytes) => bytes.len() as u64,
            Segment::Zeroes(len) => *len,
        }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A payload: segments in order, none of them empty, neighbouring zero runs merged.
#[derive(Debug, Clone, Default)]
pub struct Data {
    segments: SmallVec<[Segment; 1]>,
    len: u64,
}

impl Data {
    /// No bytes.
    pub fn new() -> Self {
        Data::default()
    }

    /// `len` zero bytes.
    pub fn zeroes(len: u64) -> Self {
        let mut data = Data::new();
        data.push(Segment::Zeroes(len));
        data
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The parts in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Whether all of it is zero runs; bytes that happen to be zero do not count.
    pub fn is_known_zero(&self) -> bool {
        self.segments
            .iter()
            .all(|segment| matches!(segment, Segment::Zeroes(_)))
    }

    /// Whether every byte is zero; looks at the bytes, up to the first that is not.
    pub fn reads_as_zeroes(&self) -> bool {
        // Whole chunks without an early exit are compared many bytes at a time.
        const CHUNK: usize = 128;
        let is_zero = |bytes: &[u8]| bytes.iter().fold(0, |any, byte| any | byte) == 0;
        self.segments.iter().all(|segment| match segment {
            Segment::Bytes(bytes) => bytes.chunks(CHUNK).all(is_zero),
            Segment::Zeroes(_) => true,
        })
    }

    /// Appends a segment.
    pub fn push(&mut self, segment: Segment) {
        if segment.is_empty() {
            return;
        }
        self.len += segment.len();
        if let (Some(Segment::Zeroes(last)), Segment::Zeroes(more)) =
            (self.segments.last_mut(), &segment)
        {
            *last += more;
            return;
        }
        self.segments.push(segment);
    }

    /// Appends all of `other`.
    pub fn append(&mut self, other: Data) {
        for segment in other.segments {
            self.push(segment);
        }
    }

    /// Takes the first `len` bytes off the front, without copying.
    ///
    /// # Panics
    /// When `len` is more than there is: a caller's error.
    pub fn split_to(&mut self, len: u64) -> Data {
        let tail = self.slice(len, self.len - len);
        let head = self.slice(0, len);
        *self = tail;
        head
    }

    /// The `len` bytes at `offset`, sharing the memory.
    ///
    /// # Panics
    /// When the range is not inside: a caller's error.
    pub fn slice(&self, offset: u64, len: u64) -> Data {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "slice outside of the payload"
        );
        let mut part = Data::new();
        let mut at = 0;
        for segment in &self.segments {
            let from = offset.max(at);
            let to = (offset + len).min(at + segment.len());
            if from < to {
                part.push(match segment {
                    Segment::Bytes(bytes) => {
                        Segment::Bytes(bytes.slice((from - at) as usize..(to - at) as usize))
                    }
                    Segment::Zeroes(_) => Segment::Zeroes(to - from),
                });
            }
            at += segment.len();
        }
        part
    }

    /// One contiguous piece of memory: shared when it is one already, copied otherwise.
    pub fn to_bytes(&self) -> Bytes {
        if let [Segment::Bytes(bytes)] = &self.segments[..] {
            return bytes.clone();
        }
        let mut all = BytesMut::with_capacity(self.len as usize);
        for segment in &self.segments {
            match segment {
                Segment::Bytes(bytes) => all.extend_from_slice(bytes),
                Segment::Zeroes(len) => all.resize(all.len() + *len as usize, 0),
            }
        }
        all.freeze()
    }

    /// Copies everything into `target`, which has the payload's length.
    ///
    /// # Panics
    /// When the lengths differ: a caller's error.
    pub fn copy_to(&self, target: &mut [u8]) {
        assert_eq!(self.len, target.len() as u64, "target of another length");
        let mut at = 0;
        for segment in &self.segments {
            let part = &mut target[at..at + segment.len() as usize];
            match segment {
                Segment::Bytes(bytes) => part.copy_from_slice(bytes),
                Segment::Zeroes(_) => part.fill(0),
            }
            at += part.len();
        }
    }
}

impl From<Bytes> for Data {
    fn from(bytes: Bytes) -> Self {
        let mut data = Data::new();
        data.push(Segment::Bytes(bytes));
        data
    }
}

impl From<Vec<u8>> for Data {
    fn from(bytes: Vec<u8>) -> Self {
        Bytes::from(bytes).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Data {
        let mut data = Data::from(vec![1, 2, 3]);
        data.push(Segment::Zeroes(2));
        data.push(Segment::Zeroes(1));
        data.append(Data::from(vec![4]));
        data
    }

    #[test]
    fn neighbouring_zero_runs_merge_and_bytes_come_out_in_order() {
        assert_eq!(sample().segments().len(), 3);
        assert_eq!(&sample().to_bytes()[..], [1, 2, 3, 0, 0, 0, 4]);
    }

    #[test]
    fn zeroes_are_recognised_among_bytes() {
        let mut bytes = vec![0; 1000];
        assert!(Data::from(bytes.clone()).reads_as_zeroes());
        assert!(Data::zeroes(5).reads_as_zeroes());
        bytes[999] = 1;
        assert!(!Data::from(bytes).reads_as_zeroes());
        assert!(!sample().reads_as_zeroes());
    }

    #[test]
    fn a_split_shares_what_a_slice_would() {
        for at in 0..=7 {
            let mut tail = sample();
            let head = tail.split_to(at);
            assert_eq!((head.len(), tail.len()), (at, 7 - at));
            let mut whole = head.to_bytes().to_vec();
            whole.extend_from_slice(&tail.to_bytes());
            assert_eq!(whole, [1, 2, 3, 0, 0, 0, 4]);
        }
    }
}
