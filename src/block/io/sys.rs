//! The system calls that have no safe form elsewhere.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Bytes of zeroes that every zero run of a write points to.
pub(crate) static ZEROES: Zeroes = Zeroes([0; ZEROES_LEN]);

/// Length of [`ZEROES`] in bytes.
pub(crate) const ZEROES_LEN: usize = 64 << 10;

/// Aligned for direct I/O on every file system there is.
#[repr(align(65536))]
pub(crate) struct Zeroes(pub(crate) [u8; ZEROES_LEN]);

/// A list of memory ranges for one system call. The owner of the memory keeps it alive.
pub(crate) struct Iovecs(pub(crate) Vec<libc::iovec>);

// SAFETY: the pointers are only followed by the kernel while the operation that owns both the list and the
// memory is alive, wherever that operation has moved to.
unsafe impl Send for Iovecs {}

/// How often the calling thread has slept in the kernel so far; being preempted does not count.
pub(crate) fn sleeps_of_this_thread() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the call fills the structure, all of whose fields are integers, for which zero is valid as well.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init()
    };
    usage.ru_nvcsw
}

/// `preadv2`.
///
/// # Safety
/// Each range is valid for writes.
pub(crate) unsafe fn preadv2(
    file: BorrowedFd<'_>,
    ranges: &[libc::iovec],
    offset: u64,
    flags: i32,
) -> io::Result<usize> {
    // SAFETY: the caller vouches for the ranges; the list is valid for its length.
    let count = unsafe {
        libc::preadv2(
            file.as_raw_fd(),
            ranges.as_ptr(),
            ranges.len() as libc::c_int,
            offset as libc::off_t,
            flags,
        )
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// `pwritev2`.
///
/// # Safety
/// Each range is valid for reads.
pub(crate) unsafe fn pwritev2(
    file: BorrowedFd<'_>,
    ranges: &[libc::iovec],
    offset: u64,
    flags: i32,
) -> io::Result<usize> {
    // SAFETY: the caller vouches for the ranges; the list is valid for its length.
    let count = unsafe {
        libc::pwritev2(
            file.as_raw_fd(),
            ranges.as_ptr(),
            ranges.len() as libc::c_int,
            offset as libc::off_t,
            flags,
        )
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// What an open-file-description lock does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LockKind {
    /// Others may hold it too.
    Shared,
    /// Nobody else may.
    Exclusive,
    /// Gives it up.
    Unlock,
}

impl LockKind {
    fn raw(self) -> i16 {
        (match self {
            LockKind::Shared => libc::F_RDLCK,
            LockKind::Exclusive => libc::F_WRLCK,
            LockKind::Unlock => libc::F_UNLCK,
        }) as i16
    }
}

/// Takes or gives up the lock on one byte, without waiting.
pub(crate) fn lock_byte(file: BorrowedFd<'_>, byte: u64, kind: LockKind) -> io::Result<()> {
    let mut lock = flock(byte, kind);
    // SAFETY: `lock` is a valid struct flock for the time of the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether somebody else's lock would be in the way of taking this one.
pub(crate) fn byte_is_locked(file: BorrowedFd<'_>, byte: u64, kind: LockKind) -> io::Result<bool> {
    let mut lock = flock(byte, kind);
    // SAFETY: `lock` is a valid struct flock for the time of the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(lock.l_type != LockKind::Unlock.raw())
}

fn flock(byte: u64, kind: LockKind) -> libc::flock {
    // SAFETY: all fields are integers; l_pid must be 0 for these locks.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind.raw();
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = byte as libc::off_t;
    lock.l_len = 1;
    lock
}

/// `_IOW(0x94, 13, struct file_clone_range)` of linux/fs.h.
const FICLONERANGE: libc::c_ulong = 0x4020_940d;

/// The argument of `FICLONERANGE`.
#[repr(C)]
struct FileCloneRange {
    src_fd: i64,
    src_offset: u64,
    src_length: u64,
    dest_offset: u64,
}

/// Makes `to` share from `at` on what `from` has in `[offset, offset + len)`. Multiples of the file system's block, or up to the end of
/// `from`. The kernel writes out what is dirty there, and lets nobody change either file meanwhile.
pub(crate) fn clone_range(
    from: BorrowedFd<'_>,
    (offset, len): (u64, u64),
    to: BorrowedFd<'_>,
    at: u64,
) -> io::Result<()> {
    let range = FileCloneRange {
        src_fd: i64::from(from.as_raw_fd()),
        src_offset: offset,
        src_length: len,
        dest_offset: at,
    };
    // SAFETY: the request reads one structure of this layout from the pointer, and both files are open.
    let result = unsafe { libc::ioctl(to.as_raw_fd(), FICLONERANGE as _, &raw const range) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// `_IO(0x12, 119)` of linux/fs.h.
const BLKDISCARD: libc::c_ulong = 0x1277;
/// `_IO(0x12, 127)` of linux/fs.h.
const BLKZEROOUT: libc::c_ulong = 0x127f;

/// Tells a block device that a range is no longer needed. Multiples of its sector.
pub(crate) fn block_discard(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    block_range(file, BLKDISCARD, offset, len)
}

/// Makes a block device zero a range. Multiples of its sector.
pub(crate) fn block_zero(file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
    block_range(file, BLKZEROOUT, offset, len)
}

fn block_range(
    file: BorrowedFd<'_>,
    request: libc::c_ulong,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: both requests read two u64 from the pointer.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as _, range.as_ptr()) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
