//! The engine's error: a small kind to act on, a text that names the thing, and the system's number.

use std::fmt;
use std::io;

/// The engine's result.
pub type Result<T> = std::result::Result<T, Error>;

/// What a caller may want to act on. Few on purpose: the text says the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request itself is wrong: a bad option, an unaligned offset, an empty name.
    InvalidInput,
    /// The named thing does not exist.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// The node or image is read-only.
    ReadOnly,
    /// The host has no space left.
    NoSpace,
    /// The driver or the image cannot do this.
    Unsupported,
    /// The image contradicts its specification.
    Corrupt,
    /// Something else uses the node, file or snapshot.
    InUse,
    /// The range lies outside of the disk.
    OutOfRange,
    /// The file may not be opened: permissions or the daemon's policy.
    PermissionDenied,
    /// The system failed a read, write or flush.
    Io,
}

/// An error of the engine.
///
/// `message` is a sentence without a trailing dot that names the node, file or field. It is what the
/// client sees. `errno` is what an NBD client or guest is told.
#[derive(Debug, Clone)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    errno: i32,
}

impl Error {
    /// An error with the kind's usual errno.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error {
            kind,
            message: message.into(),
            errno: kind.errno(),
        }
    }

    /// What the system answered, with what was tried: `Could not open 'x': No such file or directory`.
    pub fn io(context: impl fmt::Display, source: &io::Error) -> Self {
        let errno = source.raw_os_error().unwrap_or(libc::EIO);
        Error {
            kind: ErrorKind::of_errno(errno),
            message: format!("{context}: {}", system_text(source)),
            errno,
        }
    }

    /// That a node has this name.
    pub(crate) fn name_of_node(name: &str) -> Self {
        let text = format!("Duplicate nodes with node-name='{name}'");
        Error::new(ErrorKind::AlreadyExists, text)
    }

    /// That a node cannot have this name, since a drive has it.
    pub(crate) fn name_of_drive(name: &str) -> Self {
        let text = format!("node-name={name} is conflicting with a device id");
        Error::new(ErrorKind::AlreadyExists, text)
    }

    /// The same error with `context: ` in front of its message.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// The kind to act on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The sentence for the client.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The positive errno for guests and NBD clients.
    pub fn errno(&self) -> i32 {
        self.errno
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl ErrorKind {
    fn errno(self) -> i32 {
        match self {
            ErrorKind::InvalidInput | ErrorKind::OutOfRange => libc::EINVAL,
            ErrorKind::NotFound => libc::ENOENT,
            ErrorKind::AlreadyExists => libc::EEXIST,
            ErrorKind::ReadOnly | ErrorKind::PermissionDenied => libc::EPERM,
            ErrorKind::NoSpace => libc::ENOSPC,
            ErrorKind::Unsupported => libc::ENOTSUP,
            ErrorKind::InUse => libc::EBUSY,
            ErrorKind::Corrupt | ErrorKind::Io => libc::EIO,
        }
    }

    fn of_errno(errno: i32) -> Self {
        match errno {
            libc::ENOENT => ErrorKind::NotFound,
            libc::EEXIST => ErrorKind::AlreadyExists,
            libc::ENOSPC | libc::EDQUOT => ErrorKind::NoSpace,
            libc::EOPNOTSUPP | libc::ENOSYS => ErrorKind::Unsupported,
            libc::EROFS => ErrorKind::ReadOnly,
            libc::EACCES | libc::EPERM => ErrorKind::PermissionDenied,
            libc::EBUSY | libc::EAGAIN | libc::ETXTBSY => ErrorKind::InUse,
            libc::EINVAL => ErrorKind::InvalidInput,
            _ => ErrorKind::Io,
        }
    }
}

/// strerror without Rust's ` (os error N)` tail, as QEMU's users know it.
pub fn system_text(source: &io::Error) -> String {
    let text = source.to_string();
    match text.find(" (os error") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_error_keeps_its_number_and_loses_rusts_tail() {
        let error = Error::io(
            "Could not open 'a.img'",
            &io::Error::from_raw_os_error(libc::ENOENT),
        );
        assert_eq!(
            error.message(),
            "Could not open 'a.img': No such file or directory"
        );
        assert_eq!(
            (error.kind(), error.errno()),
            (ErrorKind::NotFound, libc::ENOENT)
        );
    }
}
