//! One file operation with all the memory it needs, and how to run it step by step.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::{opcode, squeue, types};

use super::buffer::Buffer;
use super::data::{Data, Segment};
use super::pool::Waits;
use super::sys::{self, Iovecs};
use super::witness::{Deed, Extent, Handle};
use crate::limits::MAX_IOVECS;

/// An operation on a file. It keeps the file open and the memory alive until the kernel has finished.
pub(crate) struct Operation {
    file: Arc<OwnedFd>,
    work: Work,
    ranges: Iovecs,
}

/// What is to be done.
pub(crate) enum Work {
    /// Fill the buffer from `offset`; what lies behind the end of the file is zeroes. A count that is no
    /// multiple of `alignment` means the end of the file: direct I/O could not go on from there.
    Read {
        offset: u64,
        buffer: Buffer,
        alignment: usize,
    },
    /// Write `data[done..]`.
    Write {
        offset: u64,
        data: Data,
        done: u64,
        durable: bool,
    },
    /// `fdatasync`.
    Sync,
    /// `fallocate`.
    Allocate { mode: i32, offset: u64, len: u64 },
}

/// Whether a step was the last.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Another step is needed.
    More,
    /// All is done.
    Done,
}

impl Operation {
    pub(crate) fn new(file: Arc<OwnedFd>, work: Work) -> Self {
        Operation {
            file,
            work,
            ranges: Iovecs(Vec::new()),
        }
    }

    /// What was done: how a read gets at its bytes.
    pub(crate) fn into_work(self) -> Work {
        self.work
    }

    /// Runs to the end on this thread.
    pub(crate) fn run(&mut self) -> io::Result<()> {
        while self.step(0)? == Progress::More {}
        Ok(())
    }

    /// Runs a part of it: the front of a write; of what has no front, nothing.
    pub(super) fn run_part(&mut self, extent: Extent) -> io::Result<()> {
        match (extent, &mut self.work) {
            (Extent::All, _) => self.run(),
            (Extent::Front(most), Work::Write { data, .. }) if most > 0 => {
                *data = data.slice(0, most.min(data.len()));
                self.run()
            }
            (Extent::Front(_) | Extent::Nothing, _) => Ok(()),
        }
    }

    /// What it waits for.
    pub(super) fn waits(&self) -> Waits {
        match &self.work {
            Work::Sync | Work::Write { durable: true, .. } => Waits::ForDisk,
            Work::Read { .. } | Work::Write { .. } | Work::Allocate { .. } => Waits::Little,
        }
    }

    /// What a witness sees.
    pub(super) fn deed(&self) -> Deed {
        let file = Handle(self.file.clone());
        match &self.work {
            Work::Read { offset, buffer, .. } => Deed::Read {
                file,
                offset: *offset,
                len: buffer.missing() as u64,
            },
            Work::Write { offset, data, .. } => Deed::Change {
                file,
                offset: *offset,
                len: data.len(),
            },
            Work::Sync => Deed::Sync { file },
            Work::Allocate { offset, len, .. } => Deed::Change {
                file,
                offset: *offset,
                len: *len,
            },
        }
    }

    /// Runs as far as it goes without blocking. `Ok(More)` when it would have blocked; what was moved so far
    /// counts. `Unsupported` when this file cannot tell.
    pub(crate) fn run_without_blocking(&mut self) -> io::Result<Progress> {
        loop {
            match self.step(libc::RWF_NOWAIT) {
                Ok(Progress::More) => {}
                Ok(Progress::Done) => return Ok(Progress::Done),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Progress::More);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn step(&mut self, flags: i32) -> io::Result<Progress> {
        loop {
            match self.call(flags) {
                Ok(count) => return self.advance(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn call(&mut self, flags: i32) -> io::Result<usize> {
        self.gather();
        let file = self.file.as_fd();
        match &self.work {
            Work::Read { offset, buffer, .. } => {
                let at = offset + buffer.filled() as u64;
                // SAFETY: `gather` made the only range from the buffer's missing part.
                unsafe { sys::preadv2(file, &self.ranges.0, at, flags) }
            }
            Work::Write {
                offset,
                done,
                durable,
                ..
            } => {
                let flags = flags | if *durable { libc::RWF_DSYNC } else { 0 };
                // SAFETY: `gather` made the ranges from segments of `data`, which we own.
                unsafe { sys::pwritev2(file, &self.ranges.0, offset + done, flags) }
            }
            Work::Sync => Ok(rustix::fs::fdatasync(file).map(|()| 0)?),
            Work::Allocate { mode, offset, len } => {
                let mode = rustix::fs::FallocateFlags::from_bits_retain(*mode as u32);
                Ok(rustix::fs::fallocate(file, mode, *offset, *len).map(|()| 0)?)
            }
        }
    }

    /// The next step for a ring. The operation must not move or be dropped until its completion.
    pub(crate) fn entry(&mut self) -> squeue::Entry {
        self.gather();
        let fd = types::Fd(self.file.as_raw_fd());
        let ranges = (self.ranges.0.as_ptr(), self.ranges.0.len() as u32);
        match &self.work {
            Work::Read { offset, buffer, .. } => opcode::Readv::new(fd, ranges.0, ranges.1)
                .offset(offset + buffer.filled() as u64)
                .build(),
            Work::Write {
                offset,
                done,
                durable,
                ..
            } => opcode::Writev::new(fd, ranges.0, ranges.1)
                .offset(offset + done)
                .rw_flags(if *durable { libc::RWF_DSYNC } else { 0 })
                .build(),
            Work::Sync => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Work::Allocate { mode, offset, len } => opcode::Fallocate::new(fd, *len)
                .offset(*offset)
                .mode(*mode)
                .build(),
        }
    }

    /// Accounts for what a system call or completion said it has moved.
    pub(crate) fn advance(&mut self, count: usize) -> io::Result<Progress> {
        match &mut self.work {
            Work::Read {
                buffer, alignment, ..
            } => {
                // SAFETY: the kernel has filled `count` bytes of the range that `gather` made.
                unsafe { buffer.advance(count) };
                if count == 0 || !buffer.filled().is_multiple_of(*alignment) {
                    buffer.fill_with_zeroes();
                }
                Ok(Progress::after(buffer.missing() == 0))
            }
            Work::Write { data, done, .. } => {
                if count == 0 {
                    return Err(io::Error::from_raw_os_error(libc::ENOSPC));
                }
                *done += count as u64;
                Ok(Progress::after(*done == data.len()))
            }
            Work::Sync | Work::Allocate { .. } => Ok(Progress::Done),
        }
    }

    /// Makes the list of memory ranges for what is left, as many as one system call takes.
    fn gather(&mut self) {
        self.ranges.0.clear();
        match &mut self.work {
            Work::Read { buffer, .. } => self.ranges.0.push(libc::iovec {
                iov_len: buffer.missing(),
                iov_base: buffer.next().cast(),
            }),
            Work::Write { data, done, .. } => gather_segments(data, *done, &mut self.ranges.0),
            Work::Sync | Work::Allocate { .. } => {}
        }
    }
}

fn gather_segments(data: &Data, done: u64, ranges: &mut Vec<libc::iovec>) {
    let mut skip = done;
    for segment in data.segments() {
        if skip >= segment.len() {
            skip -= segment.len();
            continue;
        }
        match segment {
            Segment::Bytes(bytes) => ranges.push(range(&bytes[skip as usize..])),
            Segment::Zeroes(len) => {
                let mut left = len - skip;
                while left > 0 && ranges.len() < MAX_IOVECS {
                    let piece = left.min(sys::ZEROES_LEN as u64);
                    ranges.push(range(&sys::ZEROES.0[..piece as usize]));
                    left -= piece;
                }
            }
        }
        skip = 0;
        if ranges.len() == MAX_IOVECS {
            return;
        }
    }
}

fn range(bytes: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}

impl Progress {
    fn after(done: bool) -> Self {
        if done { Progress::Done } else { Progress::More }
    }
}
