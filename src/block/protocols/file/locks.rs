//! The image locks of QEMU, by which programs that share a file keep out of each other's way.
//!
//! A program that wants to do something to an image (a permission) locks byte 100 + n, and one that does not
//! want others to do it locks byte 200 + n. All these locks are shared ones; a conflict is found by looking
//! whether anybody else has a byte locked. First lock, then look: of two programs that start at the same time,
//! at least one sees the other. The locks belong to the open file and vanish when it is closed.

use std::sync::Arc;

use super::Open;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{HostFile, LockKind};
use crate::open::{FileOptions, Locking};

/// Bit numbers of the permissions are offsets from these bytes.
const PERMISSION_BASE: u64 = 100;
const REFUSAL_BASE: u64 = 200;

const CONSISTENT_READ: u64 = 0;
const WRITE: u64 = 1;
const RESIZE: u64 = 3;

/// As the messages call them, in order of their bits.
const NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];

/// What QEMU lets a format's file do: it is never changed by others, and changed by us if it is writable.
fn permissions(writable: bool) -> &'static [u64] {
    if writable {
        &[CONSISTENT_READ, WRITE, RESIZE]
    } else {
        &[CONSISTENT_READ]
    }
}

const REFUSED: [u64; 2] = [WRITE, RESIZE];

/// Locks the file until it is closed, or says who is in the way.
pub(super) fn acquire(
    host: &HostFile,
    filename: &str,
    writable: bool,
    locking: Locking,
) -> Result<()> {
    if locking == Locking::Off {
        return Ok(());
    }
    let result = take(host, writable);
    match result {
        Ok(None) => Ok(()),
        Ok(Some(conflict)) => {
            release(host);
            Err(in_use(&conflict, filename))
        }
        Err(error) if locking == Locking::Auto && is_without_locks(&error) => {
            log::warn!("'{filename}' is not locked, its file system has no locks: {error}");
            Ok(())
        }
        Err(error) => {
            release(host);
            Err(Error::io(format!("Failed to lock '{filename}'"), &error))
        }
    }
}

/// Takes the locks and answers the first conflict, as QEMU names it.
fn take(host: &HostFile, writable: bool) -> std::io::Result<Option<String>> {
    for permission in permissions(writable) {
        host.lock_byte(PERMISSION_BASE + permission, LockKind::Shared)?;
    }
    for refused in REFUSED {
        host.lock_byte(REFUSAL_BASE + refused, LockKind::Shared)?;
    }
    for (bit, name) in (0..).zip(NAMES) {
        if permissions(writable).contains(&bit) && host.byte_is_locked(REFUSAL_BASE + bit)? {
            return Ok(Some(format!("\"{name}\"")));
        }
        if REFUSED.contains(&bit) && host.byte_is_locked(PERMISSION_BASE + bit)? {
            return Ok(Some(format!("shared \"{name}\"")));
        }
    }
    Ok(None)
}

/// More locks for a file that has some already: those that another handle on it needs, which must not find these in its way.
/// They are given up when this is dropped, unless the file is.
pub(super) struct More {
    open: Arc<Open>,
    bytes: Vec<u64>,
}

impl More {
    /// None more.
    pub(super) fn none(open: &Arc<Open>) -> More {
        More {
            open: open.clone(),
            bytes: Vec::new(),
        }
    }

    /// Takes what a writer locks and a reader does not, or says who is in the way.
    pub(super) fn acquire(open: &Arc<Open>, options: &FileOptions) -> Result<More> {
        let mut more = More::none(open);
        if options.locking == Locking::Off || !open.read_only {
            return Ok(more);
        }
        let filename = &options.filename;
        for bit in permissions(true) {
            if permissions(false).contains(bit) {
                continue;
            }
            let name = NAMES.get(*bit as usize).copied().unwrap_or_default();
            match more.take(*bit) {
                Ok(false) => {}
                Ok(true) => return Err(in_use(&format!("\"{name}\""), filename)),
                Err(error) if options.locking == Locking::Auto && is_without_locks(&error) => {}
                Err(error) => {
                    return Err(Error::io(format!("Failed to lock '{filename}'"), &error));
                }
            }
        }
        Ok(more)
    }

    /// Locks a permission, and answers whether somebody refuses it.
    fn take(&mut self, bit: u64) -> std::io::Result<bool> {
        let host = &self.open.host;
        host.lock_byte(PERMISSION_BASE + bit, LockKind::Shared)?;
        self.bytes.push(PERMISSION_BASE + bit);
        host.byte_is_locked(REFUSAL_BASE + bit)
    }
}

impl Drop for More {
    fn drop(&mut self) {
        for byte in &self.bytes {
            // What this cannot release goes with the file.
            let _ = self.open.host.lock_byte(*byte, LockKind::Unlock);
        }
    }
}

/// Takes the locks of a further handle on a file that is locked. Nobody can be in the way who is not in the way of the other.
pub(super) fn acquire_again(host: &HostFile, writable: bool, options: &FileOptions) -> Result<()> {
    if options.locking == Locking::Off {
        return Ok(());
    }
    let permissions = permissions(writable)
        .iter()
        .map(|bit| PERMISSION_BASE + bit);
    for byte in permissions.chain(REFUSED.map(|bit| REFUSAL_BASE + bit)) {
        match host.lock_byte(byte, LockKind::Shared) {
            Ok(()) => {}
            Err(error) if options.locking == Locking::Auto && is_without_locks(&error) => {}
            Err(error) => {
                let text = format!("Failed to lock '{}'", options.filename);
                return Err(Error::io(text, &error));
            }
        }
    }
    Ok(())
}

fn in_use(conflict: &str, filename: &str) -> Error {
    Error::new(
        ErrorKind::InUse,
        format!("Failed to get {conflict} lock. Is another process using the image [{filename}]?"),
    )
}

/// Gives all locks up. Nothing is sent to the file any more.
pub(super) fn release(host: &HostFile) {
    for bit in 0..NAMES.len() as u64 {
        for base in [PERMISSION_BASE, REFUSAL_BASE] {
            // What this cannot release goes with the file.
            let _ = host.lock_byte(base + bit, LockKind::Unlock);
        }
    }
}

fn is_without_locks(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP)
    )
}
