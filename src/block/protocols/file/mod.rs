//! Files and block devices of the host.
//!
//! * `locks`: the byte-range locks that QEMU uses, so that each refuses the other's open images
//! * `extents`: where data and holes are, remembered
//! * `reopen`: the same file, opened otherwise
//! * `room`: space that is taken before it is written
//! * `zero`: zeroes and discards by the cheapest means that the file system has

mod claims;
mod extents;
mod locks;
mod reopen;
mod room;
mod zero;

use std::cmp;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use crate::driver::{
    BlockStatus, BoxFuture, Child, Claims, Driver, DriverInfo, Need, Preallocation, ReopenOptions,
    Reopening, RequestLimits, Requests, WriteFlags, ZeroFlags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{
    Data, FileIdentity, FileKind, HostFile, HostRange, IoContext, OpenMode, cannot_share,
};
use crate::open::{Aio, CacheMode, FileOptions};

use claims::Holding;
use extents::{Change, Extents};
use zero::ZeroSupport;

/// How a file is accessed, apart from its own options.
#[derive(Debug, Clone, Copy, Default)]
pub struct FileAccess {
    /// Only for reading.
    pub read_only: bool,
    /// Open for writing only while somebody writes.
    pub auto_read_only: bool,
    /// `direct` and `no_flush` are the file's part of it; `writethrough` is the node's.
    pub cache: CacheMode,
}

/// An open file.
#[derive(Debug)]
pub struct File {
    /// How it is open at present, and for whom.
    holding: Arc<Holding>,
    /// Kept here so that every request need not ask the kernel. Nobody else changes it while it is used: the file is locked.
    size: AtomicU64,
    extents: Extents,
    zero: ZeroSupport,
    /// The errno of a failed flush: the kernel has dropped the dirty pages then, and a later flush that
    /// succeeds would hide the loss.
    flush_error: AtomicI32,
    /// Up to where space was taken for a file that grows; behind its end what nobody has written.
    room: AtomicU64,
}

/// How a file is open.
#[derive(Debug)]
struct Open {
    /// Where requests go.
    host: HostFile,
    /// The file as it is open while nobody writes, if that is another handle. It has the locks then.
    reading: Option<Arc<Open>>,
    read_only: bool,
    /// `host` is for reading, unless somebody writes.
    auto: bool,
    no_flush: bool,
    direct: bool,
}

impl Open {
    /// The handle that has the locks.
    fn locked(&self) -> &Open {
        self.reading.as_deref().unwrap_or(self)
    }

    /// Whether it takes another handle to write.
    fn opens_for_writing(&self) -> bool {
        self.auto && !self.read_only && self.reading.is_none()
    }
}

impl File {
    /// Opens the file, which must exist, and locks it for as long as it is open.
    pub async fn open(
        context: &IoContext,
        options: &FileOptions,
        access: FileAccess,
    ) -> Result<Self> {
        let file = File::open_unused(context, options, access).await?;
        let need = match file.is_read_only() {
            true => Need::Reads,
            false => Need::Writes,
        };
        let claim = file.claim(need).await?;
        file.set_need(need);
        drop(claim);
        Ok(file)
    }

    /// Opens the file, which must exist, with no locks: for whoever claims what he needs.
    pub async fn open_unused(
        context: &IoContext,
        options: &FileOptions,
        access: FileAccess,
    ) -> Result<Self> {
        let filename = &options.filename;
        if filename.is_empty() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "The 'file' block driver requires a file name",
            ));
        }
        let open = open_host(context, options, access).await?;
        let size = open
            .host
            .size()
            .map_err(|e| Error::io(format!("Could not get the size of '{filename}'"), &e))?;
        Ok(File {
            holding: Holding::new(open, options.clone()),
            size: AtomicU64::new(size),
            extents: Extents::default(),
            zero: ZeroSupport::default(),
            flush_error: AtomicI32::new(0),
            room: AtomicU64::new(0),
        })
    }

    /// Whether it was opened for reading only; with `auto_read_only` only the attempt tells.
    pub fn is_read_only(&self) -> bool {
        self.holding.open.load().read_only
    }

    fn present(&self) -> Arc<Open> {
        self.holding.open.load_full()
    }

    fn filename(&self) -> &str {
        &self.holding.options.filename
    }

    fn failed<'a>(&'a self, action: &'a str) -> impl Fn(io::Error) -> Error + 'a {
        move |error| Error::io(format!("Could not {action} '{}'", self.filename()), &error)
    }

    /// The end of the range, if the file may have it.
    fn end(&self, offset: u64, len: u64) -> Result<u64> {
        let growable = self.present().host.kind() == FileKind::Regular;
        offset
            .checked_add(len)
            .filter(|end| *end <= i64::MAX as u64 && (growable || *end <= self.size()))
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::OutOfRange,
                    format!(
                        "Request at {offset} of {len} bytes is outside of '{}'",
                        self.filename()
                    ),
                )
            })
    }

    fn check_writable(&self) -> Result<()> {
        let open = self.holding.open.load();
        if open.read_only || open.opens_for_writing() {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("'{}' is open for reading only", self.filename()),
            ));
        }
        Ok(())
    }

    async fn do_read(&self, offset: u64, len: u64) -> Result<Data> {
        self.end(offset, len)?;
        if len == 0 {
            return Ok(Data::new());
        }
        let open = self.present();
        let read = open.host.read_to_end(offset, len).await;
        let (bytes, there) = read.map_err(self.failed("read"))?;
        if offset + there < self.size().min(offset + len)
            && let Some(now) = self.cut_off(&open)?
        {
            let filename = self.filename();
            return Err(Error::new(
                ErrorKind::Io,
                format!("Could not read '{filename}': somebody has cut it off at {now} bytes"),
            ));
        }
        Ok(bytes.into())
    }

    /// Where the file ends by now, if others have cut it off. Zeroes are no answer in place of what was there; what lies behind the
    /// end that is known has never been there.
    fn cut_off(&self, open: &Open) -> Result<Option<u64>> {
        let now = open.host.size().map_err(self.failed("get the size of"))?;
        Ok((now < self.size()).then_some(now))
    }

    async fn do_write(&self, offset: u64, data: Data, flags: WriteFlags) -> Result<()> {
        self.check_writable()?;
        let end = self.end(offset, data.len())?;
        if data.is_empty() {
            return Ok(());
        }
        let _changing = self.extents.change(Change::Filled, offset..end);
        let open = self.present();
        self.make_room(&open, offset..end, flags.ahead);
        let durable = flags.fua && !open.no_flush;
        let written = open.host.write(offset, data, durable).await;
        written.map_err(self.failed("write"))?;
        self.size.fetch_max(end, Ordering::Relaxed);
        Ok(())
    }

    /// Shares the range of another file, as a write.
    async fn do_write_shared(&self, offset: u64, from: HostRange) -> Result<()> {
        self.check_writable()?;
        let end = self.end(offset, from.len())?;
        if from.is_empty() {
            return Ok(());
        }
        // Holes are shared too.
        let _filling = self.extents.change(Change::Filled, offset..end);
        let _freeing = self.extents.change(Change::Freed, offset..end);
        let open = self.present();
        let shared = match open.host.kind() {
            FileKind::Regular => open.host.share(offset, from).await,
            FileKind::BlockDevice => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        };
        shared.map_err(|error| match cannot_share(&error) {
            true => Error::new(
                ErrorKind::Unsupported,
                format!("'{}' cannot share these bytes: {error}", self.filename()),
            ),
            false => self.failed("write")(error),
        })?;
        self.size.fetch_max(end, Ordering::Relaxed);
        Ok(())
    }

    /// The range, as far as it lies in the file.
    fn do_host_range(&self, offset: u64, len: u64) -> Result<Option<HostRange>> {
        self.end(offset, len)?;
        let open = self.present();
        let inside = self.size().saturating_sub(offset).min(len);
        let is_plain = open.host.kind() == FileKind::Regular && inside > 0;
        Ok(is_plain.then(|| open.host.range(offset, inside)))
    }

    async fn do_flush(&self) -> Result<()> {
        let open = self.present();
        if open.no_flush {
            return Ok(());
        }
        let earlier = self.flush_error.load(Ordering::Relaxed);
        if earlier != 0 {
            return Err(self.failed("flush")(io::Error::from_raw_os_error(earlier)));
        }
        open.host.sync().await.map_err(|error| {
            if !open.direct {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                self.flush_error.store(errno, Ordering::Relaxed);
            }
            self.failed("flush")(error)
        })
    }

    async fn do_block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.end(offset, len)?;
        let open = self.present();
        let extent = self.extents.find(&open.host, offset).await;
        let extent = extent.map_err(self.failed("map"))?;
        let mut len = len.min(extent.end - offset);
        let mut zero = !extent.data;
        let may_be_cut_off = zero && (offset..extent.end).contains(&(self.size().max(1) - 1));
        if may_be_cut_off && let Some(now) = self.cut_off(&open)? {
            // Behind that it is no hole: who reads there finds out.
            zero = now > offset;
            len = if zero { len.min(now - offset) } else { len };
        }
        Ok(BlockStatus {
            len,
            allocated: true,
            zero,
            host_offset: Some(offset),
            compressed: false,
        })
    }

    async fn do_resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.check_writable()?;
        let (old, open) = (self.size(), self.present());
        if open.host.kind() == FileKind::BlockDevice {
            let now = open.host.size().map_err(self.failed("resize"))?;
            check_device_size(now, size)?;
            self.size.store(now, Ordering::Relaxed);
            return Ok(());
        }
        if size > i64::MAX as u64 {
            return Err(self.failed("resize")(io::Error::from_raw_os_error(
                libc::EFBIG,
            )));
        }
        let _changing = self.extents.change(Change::Freed, size.min(old)..u64::MAX);
        let truncated = open.host.truncate(size).await;
        truncated.map_err(self.failed("resize"))?;
        self.size.store(size, Ordering::Relaxed);
        let reserved = if size > old {
            self.fill_new_area(old, size - old, preallocation).await
        } else {
            Ok(())
        };
        if let Err(error) = reserved {
            // Failure is a no-op: the space goes back, and so does the size.
            self.size.store(old, Ordering::Relaxed);
            if let Err(undo) = open.host.truncate(old).await {
                log::error!("'{}' could not be cut back: {undo}", self.filename());
            }
            return Err(self.failed("preallocate")(error));
        }
        Ok(())
    }

    async fn fill_new_area(
        &self,
        offset: u64,
        len: u64,
        preallocation: Preallocation,
    ) -> io::Result<()> {
        let open = self.present();
        match preallocation {
            // A file has no metadata of ours to prepare.
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc => open.host.reserve(offset, len).await,
            Preallocation::Full => open.host.write(offset, Data::zeroes(len), false).await,
        }
    }
}

async fn open_host(context: &IoContext, options: &FileOptions, access: FileAccess) -> Result<Open> {
    let FileAccess {
        read_only,
        auto_read_only: auto,
        cache,
    } = access;
    let mode = OpenMode {
        writable: !read_only && !auto,
        direct: cache.direct,
        ring: options.aio == Aio::IoUring,
    };
    let host = HostFile::open(context, Path::new(&options.filename), mode).await;
    let host = host.map_err(|error| open_error(&options.filename, mode.direct, &error))?;
    Ok(Open {
        host,
        reading: None,
        read_only,
        auto,
        no_flush: cache.no_flush,
        direct: cache.direct,
    })
}

fn open_error(filename: &str, direct: bool, error: &io::Error) -> Error {
    match error.raw_os_error() {
        None if error.kind() == io::ErrorKind::InvalidInput => Error::new(
            ErrorKind::InvalidInput,
            format!("'file' driver requires '{filename}' to be a regular file or a block device"),
        ),
        Some(libc::EINVAL) if direct => Error::new(
            ErrorKind::Unsupported,
            format!("Could not open '{filename}': filesystem does not support O_DIRECT"),
        ),
        _ => Error::io(format!("Could not open '{filename}'"), error),
    }
}

/// A device has the size that it has: to ask for that one is how a user says that it was extended or cut.
fn check_device_size(now: u64, asked: u64) -> Result<()> {
    match asked.cmp(&now) {
        cmp::Ordering::Equal => Ok(()),
        cmp::Ordering::Greater => Err(Error::new(
            ErrorKind::InvalidInput,
            "Cannot grow device files",
        )),
        cmp::Ordering::Less => Err(Error::new(
            ErrorKind::Unsupported,
            "Cannot resize device files",
        )),
    }
}

impl Requests for File {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn size_by_now(&self) -> u64 {
        let host = &self.holding.open.load().host;
        if host.kind() == FileKind::BlockDevice
            && let Ok(size) = host.size()
        {
            self.size.fetch_max(size, Ordering::Relaxed);
        }
        self.size()
    }

    fn limits(&self) -> RequestLimits {
        let open = self.holding.open.load();
        RequestLimits {
            alignment: open.host.alignment(),
            preferred: open.host.alignment().max(4096),
            growable: open.host.kind() == FileKind::Regular,
        }
    }

    fn read(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        Box::pin(self.do_read(offset, len))
    }

    fn write(&self, offset: u64, data: Data, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.do_write(offset, data, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.do_write_zeroes(offset, len, flags))
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.do_discard(offset, len))
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.do_flush())
    }

    fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        Box::pin(self.do_block_status(offset, len))
    }

    fn host_range(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Option<HostRange>>> {
        Box::pin(async move { self.do_host_range(offset, len) })
    }

    fn write_shared(&self, offset: u64, from: HostRange) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.do_write_shared(offset, from))
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.do_resize(size, preallocation))
    }
}

impl Driver for File {
    fn host_file(&self) -> Option<FileIdentity> {
        Some(self.present().host.identity())
    }

    fn info(&self) -> DriverInfo {
        let open = self.holding.open.load();
        DriverInfo {
            driver: match open.host.kind() {
                FileKind::Regular => "file",
                FileKind::BlockDevice => "host_device",
            },
            filename: self.filename().to_owned(),
            actual_size: open.host.allocated().ok(),
            ..DriverInfo::default()
        }
    }

    fn claims(&self) -> Option<&dyn Claims> {
        Some(self)
    }

    fn children(&self) -> Vec<(&'static str, Child)> {
        Vec::new()
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            let flushed = match self.is_read_only() {
                true => Ok(()),
                false => self.do_flush().await,
            };
            self.give_back_room().await;
            // Now, and not with the last handle: the next to open the image need not wait for that.
            self.holding.close();
            flushed
        })
    }

    fn reopen(&self, options: ReopenOptions) -> BoxFuture<'_, Result<Box<dyn Reopening>>> {
        Box::pin(self.do_reopen(options))
    }
}

#[cfg(test)]
mod tests;
