//! A file or block device of the host, with asynchronous operations on it.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, SeekFrom, StatxFlags};

use super::buffer::Buffer;
use super::context::{EngineKind, IoContext};
use super::data::{Data, Segment};
use super::host_range::HostRange;
use super::identity::FileIdentity;
use super::inline::{self, InlineWrites};
use super::operation::{Operation, Progress, Work};
use super::sys::{self, LockKind};
use super::witness::{Deed, Handle};
use crate::limits::MAX_ALIGNMENT;

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenMode {
    /// For writing too.
    pub writable: bool,
    /// Past the page cache.
    pub direct: bool,
    /// What would block is run by io_uring where the kernel has it, else by threads.
    pub ring: bool,
}

/// What was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    BlockDevice,
}

/// A run of bytes that are all stored or all not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) data: bool,
}

/// An open file.
///
/// All methods may be called from many tasks at once. Cancellation: a system call that has begun runs to its
/// end; it keeps its memory and the file until then.
#[derive(Debug)]
pub struct HostFile {
    file: Arc<OwnedFd>,
    context: IoContext,
    engine: EngineKind,
    kind: FileKind,
    identity: FileIdentity,
    /// What offsets and lengths are multiples of, and memory addresses; 1 for buffered I/O.
    alignment: u32,
    memory_alignment: u32,
    /// Whether the kernel can tell for this file what would block.
    nowait_reads: AtomicBool,
    nowait_writes: AtomicBool,
    /// For writes to the page cache of which the kernel cannot tell; `None` for direct I/O.
    inline_writes: Option<InlineWrites>,
    /// Whether writes are quicker where space was taken before: see [`HostFile::make_room`].
    wants_room: AtomicBool,
}

impl HostFile {
    /// Opens a regular file or block device. Anything else is `InvalidInput`.
    pub async fn open(context: &IoContext, path: &Path, mode: OpenMode) -> io::Result<Self> {
        let path = path.to_owned();
        context.names().opens(&path)?;
        let (file, facts) = context.call(move || open_file(&path, mode)).await?;
        // A witness is to see everything, in the order of the engine.
        let inline = !mode.direct && context.witness().is_none();
        let witness = context.witness();
        let stands_for_device = witness.is_some_and(|witness| witness.is_device(facts.identity));
        Ok(HostFile {
            file: Arc::new(file),
            context: context.clone(),
            engine: if mode.ring {
                EngineKind::Ring
            } else {
                EngineKind::Threads
            },
            kind: match stands_for_device {
                true => FileKind::BlockDevice,
                false => facts.kind,
            },
            identity: facts.identity,
            alignment: facts.alignment,
            memory_alignment: facts.memory_alignment,
            // A direct read waits for the disk even when asked not to block.
            nowait_reads: AtomicBool::new(inline),
            nowait_writes: AtomicBool::new(inline),
            inline_writes: inline.then(InlineWrites::new),
            wants_room: AtomicBool::new(inline && mode.writable && facts.counts_blocks),
        })
    }

    /// Opens the same file once more, whatever its name is by now.
    pub(crate) async fn reopen(&self, mode: OpenMode) -> io::Result<Self> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        HostFile::open(&self.context, path.as_ref(), mode).await
    }

    /// Which file it is.
    pub(crate) fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// Whether this name does not lead to another file.
    pub(crate) async fn is_at(&self, path: &str) -> bool {
        let at = FileIdentity::at(&self.context, path).await;
        // A name that is gone leads to nothing else.
        at.map_or(true, |file| file == self.identity())
    }

    /// What it is.
    pub(crate) fn kind(&self) -> FileKind {
        self.kind
    }

    /// What offsets and lengths of reads and writes must be multiples of.
    pub(crate) fn alignment(&self) -> u32 {
        self.alignment
    }

    /// The present size in bytes. Does not block on I/O.
    pub fn size(&self) -> io::Result<u64> {
        // The position is not used otherwise, so moving it harms nobody.
        Ok(rustix::fs::seek(&*self.file, SeekFrom::End(0))?)
    }

    /// Bytes of host storage in use. Does not block on I/O.
    pub(crate) fn allocated(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstat(&*self.file)?;
        Ok(u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
    }

    /// Reads `len` bytes; those behind the end of the file are zeroes.
    pub async fn read(&self, offset: u64, len: u64) -> io::Result<Bytes> {
        let (bytes, _) = self.read_to_end(offset, len).await?;
        Ok(bytes)
    }

    /// The same, and how many of them lie in front of the file's end.
    pub(crate) async fn read_to_end(&self, offset: u64, len: u64) -> io::Result<(Bytes, u64)> {
        let len = usize::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let mut operation = self.operation(Work::Read {
            offset,
            buffer: self.context.buffer(len, self.memory_alignment as usize)?,
            alignment: self.alignment as usize,
        });
        if without_waiting(&mut operation, &self.nowait_reads)? == Progress::More {
            operation = self.context.run(self.engine, operation).await?;
        }
        match operation.into_work() {
            Work::Read { buffer, .. } => {
                let there = buffer.filled() - buffer.behind_end();
                Ok((buffer.freeze(), there as u64))
            }
            _ => unreachable!("a read came back as something else"),
        }
    }

    /// Writes all of `data`, durably (as by `fdatasync`) if asked.
    pub async fn write(&self, offset: u64, data: Data, durable: bool) -> io::Result<()> {
        let len = data.len();
        let mut operation = self.operation(Work::Write {
            offset,
            data: self.fit_memory(data)?,
            done: 0,
            durable,
        });
        // A durable write waits for the disk in any case.
        if !durable {
            if without_waiting(&mut operation, &self.nowait_writes)? == Progress::Done {
                return Ok(());
            }
            if !self.nowait_writes.load(Ordering::Relaxed)
                && let Some(inline) = &self.inline_writes
                && let Some(written) = inline.run(offset, len, || operation.run())
            {
                return written;
            }
        }
        self.change(operation).await
    }

    /// Makes everything written so far durable.
    pub async fn sync(&self) -> io::Result<()> {
        self.change(self.operation(Work::Sync)).await
    }

    /// Frees a range, which reads as zeroes then; the size stays.
    pub(crate) async fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.fallocate(mode, offset, len).await
    }

    /// Makes a range read as zeroes and keeps space for it; the file grows if the range lies behind its end.
    pub(crate) async fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::ZERO_RANGE, offset, len)
            .await
    }

    /// Reserves space for a range; bytes that were there stay. The file grows if needed.
    pub(crate) async fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fallocate(FallocateFlags::empty(), offset, len).await
    }

    /// Takes space for a range that is about to be written, by a thread that copies disks. What is read there stays, and so does the
    /// size. Nothing happens where that does not make the writes quicker; nor if it fails, as the writes answer for themselves.
    pub(crate) fn make_room(&self, range: Range<u64>) {
        if !inline::may_wait() || !self.wants_room.load(Ordering::Relaxed) {
            return;
        }
        let len = range.end - range.start;
        let take = || {
            rustix::fs::fallocate(&*self.file, FallocateFlags::KEEP_SIZE, range.start, len)?;
            Ok(())
        };
        // It waits for what a write waits for.
        let taken = self.inline_writes.as_ref();
        match taken.and_then(|writes| writes.run(range.start, 0, take)) {
            Some(Err(error)) if is_unsupported(&error) => {
                self.wants_room.store(false, Ordering::Relaxed);
            }
            Some(Err(error)) => log::debug!("no room for {len} bytes: {error}"),
            Some(Ok(())) | None => {}
        }
    }

    /// These bytes, for whoever may share them.
    pub(crate) fn range(&self, offset: u64, len: u64) -> HostRange {
        HostRange::new(self.file.clone(), offset, len)
    }

    /// Shares from `offset` on what `from` holds, if the file system can. See [`cannot_share`].
    pub(crate) async fn share(&self, offset: u64, from: HostRange) -> io::Result<()> {
        let _changing = self.inline_writes.as_ref().map(InlineWrites::changing);
        let (file, deed) = (self.file.clone(), self.change_of(offset, from.len()));
        let is_witnessed = self.context.witness().is_some();
        let share = move || match is_witnessed {
            // What a witness sees is the same in all file systems, as if all of them could share.
            true => {
                let data = from.content()?.into();
                let (done, durable) = (0, false);
                let work = Work::Write {
                    offset,
                    data,
                    done,
                    durable,
                };
                Operation::new(file, work).run()
            }
            false => {
                let range = (from.offset(), from.len());
                sys::clone_range(from.file(), range, file.as_fd(), offset)
            }
        };
        self.context.act(deed, share).await
    }

    /// Sets the size.
    pub(crate) async fn truncate(&self, size: u64) -> io::Result<()> {
        let (file, handle) = (self.file.clone(), Handle(self.file.clone()));
        let deed = || Deed::Resize { file: handle };
        let truncate = move || Ok(rustix::fs::ftruncate(&*file, size)?);
        self.context.act(deed, truncate).await
    }

    /// Tells a block device that a range is not needed.
    pub(crate) async fn device_discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let file = self.file.clone();
        let discard = move || sys::block_discard(file.as_fd(), offset, len);
        self.context.act(self.change_of(offset, len), discard).await
    }

    /// Zeroes a range of a block device, by writing if need be.
    pub(crate) async fn device_zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let file = self.file.clone();
        let zero = move || sys::block_zero(file.as_fd(), offset, len);
        self.context.act(self.change_of(offset, len), zero).await
    }

    /// The extent that `offset` lies in. Where the file system cannot tell, all is data.
    pub(crate) async fn extent_at(&self, offset: u64) -> io::Result<Extent> {
        if inline::may_wait() {
            return find_extent(&self.file, offset);
        }
        let file = self.file.clone();
        self.context.call(move || find_extent(&file, offset)).await
    }

    /// Takes or gives up an open-file-description lock on one byte, without waiting.
    pub(crate) fn lock_byte(&self, byte: u64, kind: LockKind) -> io::Result<()> {
        sys::lock_byte(self.file.as_fd(), byte, kind)
    }

    /// Whether another open file description has a lock on this byte.
    pub(crate) fn byte_is_locked(&self, byte: u64) -> io::Result<bool> {
        sys::byte_is_locked(self.file.as_fd(), byte, LockKind::Exclusive)
    }

    /// What a witness sees of a change.
    fn change_of(&self, offset: u64, len: u64) -> impl FnOnce() -> Deed + 'static {
        let file = Handle(self.file.clone());
        move || Deed::Change { file, offset, len }
    }

    async fn fallocate(&self, mode: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let work = Work::Allocate {
            mode: mode.bits() as i32,
            offset,
            len,
        };
        self.change(self.operation(work)).await
    }

    fn operation(&self, work: Work) -> Operation {
        Operation::new(self.file.clone(), work)
    }

    /// Runs by the engine what changes or syncs the file.
    async fn change(&self, operation: Operation) -> io::Result<()> {
        let _changing = self.inline_writes.as_ref().map(InlineWrites::changing);
        self.context.run(self.engine, operation).await.map(|_| ())
    }

    /// The payload, copied if its memory does not suit direct I/O.
    fn fit_memory(&self, data: Data) -> io::Result<Data> {
        let alignment = self.memory_alignment as usize;
        let fits = data.segments().iter().all(|segment| match segment {
            Segment::Bytes(bytes) => {
                (bytes.as_ptr() as usize).is_multiple_of(alignment)
                    && bytes.len().is_multiple_of(alignment)
            }
            Segment::Zeroes(len) => len.is_multiple_of(alignment as u64),
        });
        if fits {
            return Ok(data);
        }
        let mut buffer = self.context.buffer(data.len() as usize, alignment)?;
        for segment in data.segments() {
            match segment {
                Segment::Bytes(bytes) => buffer.append(bytes),
                Segment::Zeroes(len) => {
                    let mut left = *len as usize;
                    while left > 0 {
                        let piece = left.min(sys::ZEROES_LEN);
                        buffer.append(&sys::ZEROES.0[..piece]);
                        left -= piece;
                    }
                }
            }
        }
        Ok(buffer.freeze().into())
    }
}

/// Runs an operation as far as the page cache serves it. `More` when it would wait, or when the kernel cannot tell for
/// this file, which is remembered.
fn without_waiting(operation: &mut Operation, nowait: &AtomicBool) -> io::Result<Progress> {
    if !nowait.load(Ordering::Relaxed) {
        return Ok(Progress::More);
    }
    match operation.run_without_blocking() {
        Err(error) if is_unsupported(&error) => {
            nowait.store(false, Ordering::Relaxed);
            Ok(Progress::More)
        }
        progress => progress,
    }
}

/// Whether the kernel or file system says that it does not know this call.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
    )
}

/// Whether the kernel says that these ranges of these files cannot be shared: other file systems, ones that cannot, or borders within a
/// block.
pub(crate) fn cannot_share(error: &io::Error) -> bool {
    is_unsupported(error)
        || matches!(
            error.raw_os_error(),
            Some(libc::EXDEV | libc::EINVAL | libc::EPERM | libc::ETXTBSY | libc::EBADF)
        )
}

struct Facts {
    kind: FileKind,
    identity: FileIdentity,
    alignment: u32,
    memory_alignment: u32,
    /// The file system keeps books for each block of a file.
    counts_blocks: bool,
}

/// The number by which ext2, ext3 and ext4 tell who they are.
const EXT_MAGIC: u64 = 0xef53;

fn open_file(path: &Path, mode: OpenMode) -> io::Result<(OwnedFd, Facts)> {
    let mut flags = OFlags::CLOEXEC;
    // Opening a FIFO or a tape must not hang the thread; regular files and disks do not care.
    flags |= OFlags::NONBLOCK;
    flags |= if mode.writable {
        OFlags::RDWR
    } else {
        OFlags::RDONLY
    };
    flags.set(OFlags::DIRECT, mode.direct);
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&file)?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => FileKind::Regular,
        FileType::BlockDevice => FileKind::BlockDevice,
        FileType::Directory => return Err(io::Error::from_raw_os_error(libc::EISDIR)),
        _ => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither file nor disk",
            ));
        }
    };
    let (memory_alignment, alignment) = if mode.direct {
        direct_alignment(&file, kind)?
    } else {
        (1, 1)
    };
    let identity = match kind {
        FileKind::Regular => FileIdentity {
            device: stat.st_dev,
            inode: stat.st_ino,
        },
        FileKind::BlockDevice => FileIdentity {
            device: stat.st_rdev,
            inode: 0,
        },
    };
    let facts = Facts {
        kind,
        identity,
        alignment,
        memory_alignment,
        counts_blocks: kind == FileKind::Regular
            && rustix::fs::fstatfs(&file).is_ok_and(|fs| fs.f_type as u64 == EXT_MAGIC),
    };
    Ok((file, facts))
}

/// What direct I/O needs of memory and of offsets: as the kernel says (6.1), else the disk's sector, else tried.
fn direct_alignment(file: &OwnedFd, kind: FileKind) -> io::Result<(u32, u32)> {
    let usable = |value: u32| value.is_power_of_two() && value <= MAX_ALIGNMENT;
    if let Ok(stat) = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        && usable(stat.stx_dio_mem_align)
        && usable(stat.stx_dio_offset_align)
    {
        return Ok((stat.stx_dio_mem_align, stat.stx_dio_offset_align));
    }
    if kind == FileKind::BlockDevice
        && let Ok(sector) = rustix::fs::ioctl_blksszget(file)
        && usable(sector)
    {
        return Ok((sector, sector));
    }
    for alignment in [512u32, 4096, MAX_ALIGNMENT] {
        let mut buffer = Buffer::new(alignment as usize, alignment as usize)?;
        let range = libc::iovec {
            iov_base: buffer.next().cast(),
            iov_len: buffer.missing(),
        };
        // SAFETY: the range is the whole of a buffer that outlives the call.
        if unsafe { sys::preadv2(file.as_fd(), &[range], 0, 0) }.is_ok() {
            // An empty file accepts anything: memory of a page is right everywhere.
            return Ok((alignment.max(4096), alignment));
        }
    }
    Err(io::Error::from_raw_os_error(libc::EINVAL))
}

fn find_extent(file: &OwnedFd, offset: u64) -> io::Result<Extent> {
    let seek = |to| rustix::fs::seek(file, to);
    let extent = |end, data| Extent {
        start: offset,
        end,
        data,
    };
    match seek(SeekFrom::Data(offset)) {
        Ok(start) if start > offset => Ok(extent(start, false)),
        Ok(_) => Ok(extent(seek(SeekFrom::Hole(offset))?, true)),
        // No data behind the offset: a hole up to the end, or the end itself.
        Err(rustix::io::Errno::NXIO) => Ok(extent(u64::MAX, false)),
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(extent(u64::MAX, true)),
        Err(error) => Err(error.into()),
    }
}
