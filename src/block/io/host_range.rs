//! Ranges of files of the host: what a file system can share between files instead of copying it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::witness::Handle;

/// Bytes that lie in a regular file of the host as they are. It keeps the file open, and nothing else: what the bytes are, and that nobody
/// changes them, is between those who pass it on.
#[derive(Debug, Clone)]
pub struct HostRange {
    file: Arc<OwnedFd>,
    offset: u64,
    len: u64,
}

impl HostRange {
    pub(super) fn new(file: Arc<OwnedFd>, offset: u64, len: u64) -> Self {
        HostRange { file, offset, len }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The `len` bytes at `offset` of it.
    ///
    /// # Panics
    /// When they are not inside: a caller's error.
    pub fn slice(&self, offset: u64, len: u64) -> Self {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "slice outside of the range"
        );
        HostRange {
            file: self.file.clone(),
            offset: self.offset + offset,
            len,
        }
    }

    /// Where it begins in its file, in bytes.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// What is there now. The file must be open without `O_DIRECT`.
    pub(crate) fn content(&self) -> io::Result<Vec<u8>> {
        Handle(self.file.clone()).read(self.offset, self.len as usize)
    }
}
