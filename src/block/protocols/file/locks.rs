//! The image locks of QEMU, by which programs that share a file keep out of each other's way.
//!
//! A program that wants to do something to an image (a permission) locks byte 100 + n, and one that does not
//! want others to do it locks byte 200 + n. All these locks are shared ones; a conflict is found by looking
//! whether anybody else has a byte locked. First lock, then look: of two programs that start at the same time,
//! at least one sees the other. The locks belong to the open file and vanish when it is closed.

use crate::driver::Need;
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

/// What QEMU lets a format's file do.
fn permissions(need: Need) -> &'static [u64] {
    match need {
        Need::Nothing => &[],
        Need::Reads => &[CONSISTENT_READ],
        Need::Writes => &[CONSISTENT_READ, WRITE, RESIZE],
    }
}

/// What others must not do to what is in use.
fn refused(need: Need) -> &'static [u64] {
    match need {
        Need::Nothing => &[],
        Need::Reads | Need::Writes => &[WRITE, RESIZE],
    }
}

/// The locks of one need that another does not have, as permissions and refusals.
fn more(from: Need, to: Need) -> (Vec<u64>, Vec<u64>) {
    let missing = |bits: fn(Need) -> &'static [u64]| {
        let new = bits(to).iter().filter(|bit| !bits(from).contains(bit));
        new.copied().collect()
    };
    (missing(permissions), missing(refused))
}

/// Takes the locks that `to` has and `from` has not, or says who is in the way; then the locks are as before.
pub(super) fn raise(host: &HostFile, from: Need, to: Need, options: &FileOptions) -> Result<()> {
    let FileOptions {
        filename, locking, ..
    } = options;
    if *locking == Locking::Off {
        return Ok(());
    }
    match take(host, from, to) {
        Ok(None) => Ok(()),
        Ok(Some(conflict)) => {
            lower(host, to, from);
            Err(in_use(&conflict, filename))
        }
        Err(error) if *locking == Locking::Auto && is_without_locks(&error) => {
            log::warn!("'{filename}' is not locked, its file system has no locks: {error}");
            Ok(())
        }
        Err(error) => {
            lower(host, to, from);
            Err(Error::io(format!("Failed to lock '{filename}'"), &error))
        }
    }
}

/// Takes locks and answers the first conflict, as QEMU names it.
fn take(host: &HostFile, from: Need, to: Need) -> std::io::Result<Option<String>> {
    let (permissions, refused) = more(from, to);
    for permission in &permissions {
        host.lock_byte(PERMISSION_BASE + permission, LockKind::Shared)?;
    }
    for refusal in &refused {
        host.lock_byte(REFUSAL_BASE + refusal, LockKind::Shared)?;
    }
    for (bit, name) in (0..).zip(NAMES) {
        if permissions.contains(&bit) && host.byte_is_locked(REFUSAL_BASE + bit)? {
            return Ok(Some(format!("\"{name}\"")));
        }
        if refused.contains(&bit) && host.byte_is_locked(PERMISSION_BASE + bit)? {
            return Ok(Some(format!("shared \"{name}\"")));
        }
    }
    Ok(None)
}

/// Takes the locks of a further handle on a file that is locked. Nobody can be in the way who is not in the way of the other.
pub(super) fn acquire_again(host: &HostFile, need: Need, options: &FileOptions) -> Result<()> {
    if options.locking == Locking::Off {
        return Ok(());
    }
    let permissions = permissions(need).iter().map(|bit| PERMISSION_BASE + bit);
    for byte in permissions.chain(refused(need).iter().map(|bit| REFUSAL_BASE + bit)) {
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

/// Gives up the locks that `from` has and `to` has not.
pub(super) fn lower(host: &HostFile, from: Need, to: Need) {
    let (permissions, refused) = more(to, from);
    let permissions = permissions.iter().map(|bit| PERMISSION_BASE + bit);
    for byte in permissions.chain(refused.iter().map(|bit| REFUSAL_BASE + bit)) {
        // What this cannot release goes with the file.
        let _ = host.lock_byte(byte, LockKind::Unlock);
    }
}

/// Gives all locks up. Nothing is sent to the file any more.
pub(super) fn release(host: &HostFile) {
    lower(host, Need::Writes, Need::Nothing);
}

fn is_without_locks(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::ENOLCK | libc::ENOSYS | libc::EOPNOTSUPP)
    )
}
