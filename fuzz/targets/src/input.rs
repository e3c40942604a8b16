//! Numbers out of a fuzzer's bytes.

/// What is left of the bytes. Behind their end everything is zero.
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Input(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A big endian number of `width` bytes, at most 8.
    pub(crate) fn number(&mut self, width: usize) -> u64 {
        let (front, rest) = self.0.split_at(width.min(self.0.len()));
        self.0 = rest;
        front
            .iter()
            .fold(0, |all, byte| all << 8 | u64::from(*byte))
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.number(1) as u8
    }

    /// The next `len` bytes, or what there is.
    pub(crate) fn take(&mut self, len: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        front
    }
}
