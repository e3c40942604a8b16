//! The image locks of QEMU, by which programs that share a file keep out of each other's way.
//!
//! A program that wants to do something to an image (a permission) locks byte 100 + n, and one that does not
//! want others to do it locks byte 200 + n. All these locks are shared ones; a conflict is found by looking
//! whether anybody else has a byte locked. First lock, then look: of two programs that start at the same time,
//! at least one sees the other. The locks belong to the open file and vanish when it is closed.

use crate::error::{Error, ErrorKind, Result};
use crate::io::{HostFile, LockKind};
use crate::open::Locking;

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
            Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "Failed to get {conflict} lock. Is another process using the image [{filename}]?"
                ),
            ))
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
