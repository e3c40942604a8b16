//! Zeroes and discards: the cheapest way that the file system has, and never a success that left old data.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use super::File;
use super::extents::Change;
use crate::driver::{Requests, ZeroFlags};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Data, FileKind, is_unsupported};
use crate::units::{align_down, align_up};

/// What the file system has said that it cannot do, so that it is not asked again.
#[derive(Debug, Default)]
pub(super) struct ZeroSupport {
    pub(super) no_punch: AtomicBool,
    pub(super) no_zero_range: AtomicBool,
    pub(super) no_discard: AtomicBool,
}

/// Discards of devices are cut to this: no disk has larger logical sectors, and the cut parts do not matter.
const DEVICE_DISCARD_ALIGNMENT: u64 = 4096;

/// Whether a way was open.
#[derive(Debug, PartialEq, Eq)]
enum Attempt {
    Done,
    Unsupported,
}

impl File {
    pub(super) async fn do_write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<()> {
        self.check_writable()?;
        let end = self.end(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        // Some of the ways below make holes and others fill them: both kinds of memory go.
        let _filling = self.extents.change(Change::Filled, offset..end);
        let _freeing = self.extents.change(Change::Freed, offset..end);
        let fast = match self.present().host.kind() {
            FileKind::Regular => self.zero_file(offset, len, flags).await,
            FileKind::BlockDevice => self.zero_device(offset, len, flags).await,
        };
        let fast = fast.map_err(self.failed("zero"))?;
        if fast == Attempt::Unsupported {
            if flags.no_fallback {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("'{}' has no fast way to write zeroes", self.filename()),
                ));
            }
            let written = self
                .present()
                .host
                .write(offset, Data::zeroes(len), false)
                .await;
            written.map_err(self.failed("zero"))?;
        }
        self.size.fetch_max(end, Ordering::Relaxed);
        if flags.fua {
            self.do_flush().await?;
        }
        Ok(())
    }

    pub(super) async fn do_discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        let end = self.end(offset, len)?.min(self.size());
        if end <= offset || self.zero.no_discard.load(Ordering::Relaxed) {
            return Ok(());
        }
        let _changing = self.extents.change(Change::Freed, offset..end);
        let discarded = match self.present().host.kind() {
            FileKind::Regular => self.present().host.punch_hole(offset, end - offset).await,
            FileKind::BlockDevice => self.discard_device(offset, end).await,
        };
        match discarded {
            Err(error) if is_unsupported(&error) => {
                self.zero.no_discard.store(true, Ordering::Relaxed);
                Ok(())
            }
            discarded => discarded.map_err(self.failed("discard")),
        }
    }

    async fn zero_file(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<Attempt> {
        if flags.may_unmap && self.punch(offset, len).await? == Attempt::Done {
            self.extend(offset + len).await?;
            return Ok(Attempt::Done);
        }
        let open = self.present();
        let ranged = attempt(&self.zero.no_zero_range, open.host.zero_range(offset, len));
        if ranged.await? == Attempt::Done {
            return Ok(Attempt::Done);
        }
        // The space shall be kept: a hole is made and filled again.
        if self.punch(offset, len).await? == Attempt::Done {
            match self.present().host.reserve(offset, len).await {
                Err(error) if is_unsupported(&error) => self.extend(offset + len).await?,
                reserved => reserved?,
            }
            return Ok(Attempt::Done);
        }
        if offset >= self.size() {
            self.extend(offset + len).await?;
            return Ok(Attempt::Done);
        }
        Ok(Attempt::Unsupported)
    }

    /// Makes a hole of the part inside of the file.
    async fn punch(&self, offset: u64, len: u64) -> io::Result<Attempt> {
        let inside = self.size().saturating_sub(offset).min(len);
        if inside == 0 {
            return Ok(Attempt::Done);
        }
        attempt(
            &self.zero.no_punch,
            self.present().host.punch_hole(offset, inside),
        )
        .await
    }

    /// Lets the file reach to `end` without touching what is there. Not by setting the size: a write that
    /// grows the file further at the same time would be cut off.
    async fn extend(&self, end: u64) -> io::Result<()> {
        if self.size() >= end {
            return Ok(());
        }
        match self.present().host.reserve(end - 1, 1).await {
            Err(error) if is_unsupported(&error) => {
                // The last block is part of the zeroes to be written.
                let block = u64::from(self.present().host.alignment());
                self.present()
                    .host
                    .write(end - block, Data::zeroes(block), false)
                    .await
            }
            extended => extended,
        }
    }

    async fn zero_device(&self, offset: u64, len: u64, flags: ZeroFlags) -> io::Result<Attempt> {
        let open = self.present();
        if flags.may_unmap {
            let punched = attempt(&self.zero.no_punch, open.host.punch_hole(offset, len));
            if punched.await? == Attempt::Done {
                return Ok(Attempt::Done);
            }
        }
        // The kernel may write zeroes itself here, which is no fast way.
        if flags.no_fallback {
            return Ok(Attempt::Unsupported);
        }
        attempt(
            &self.zero.no_zero_range,
            self.present().host.device_zero(offset, len),
        )
        .await
    }

    async fn discard_device(&self, offset: u64, end: u64) -> io::Result<()> {
        let start = align_up(offset, DEVICE_DISCARD_ALIGNMENT).unwrap_or(end);
        let end = align_down(end, DEVICE_DISCARD_ALIGNMENT);
        if start >= end {
            return Ok(());
        }
        self.present().host.device_discard(start, end - start).await
    }
}

/// Tries a way unless it is known to be closed. EINVAL closes it for this range only: it does not fit.
async fn attempt(
    closed: &AtomicBool,
    way: impl Future<Output = io::Result<()>>,
) -> io::Result<Attempt> {
    if closed.load(Ordering::Relaxed) {
        return Ok(Attempt::Unsupported);
    }
    match way.await {
        Ok(()) => Ok(Attempt::Done),
        Err(error) if is_unsupported(&error) => {
            closed.store(true, Ordering::Relaxed);
            Ok(Attempt::Unsupported)
        }
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(Attempt::Unsupported),
        Err(error) => Err(error),
    }
}
