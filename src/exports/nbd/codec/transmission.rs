//! The transmission phase: requests, simple replies and the chunks of structured replies.

use super::Fields;
use super::constants::*;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
    Unknown(u16),
}

impl Command {
    fn of_wire(number: u16) -> Self {
        match number {
            NBD_CMD_READ => Command::Read,
            NBD_CMD_WRITE => Command::Write,
            NBD_CMD_DISC => Command::Disconnect,
            NBD_CMD_FLUSH => Command::Flush,
            NBD_CMD_TRIM => Command::Trim,
            NBD_CMD_CACHE => Command::Cache,
            NBD_CMD_WRITE_ZEROES => Command::WriteZeroes,
            NBD_CMD_BLOCK_STATUS => Command::BlockStatus,
            other => Command::Unknown(other),
        }
    }

    /// For error texts.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Command::Read => "read",
            Command::Write => "write",
            Command::Disconnect => "disconnect",
            Command::Flush => "flush",
            Command::Trim => "trim",
            Command::Cache => "cache",
            Command::WriteZeroes => "write zeroes",
            Command::BlockStatus => "block status",
            Command::Unknown(_) => "<unknown>",
        }
    }
}

/// A request header. Only a write has a payload, of `length` bytes, behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    /// NBD_CMD_FLAG_* bits, not checked.
    pub(crate) flags: u16,
    pub(crate) command: Command,
    /// The client's name for the request; it comes back in the reply.
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u32,
}

impl Request {
    /// `None` when the magic is wrong: the streams are out of step and the connection must be closed.
    pub(crate) fn decode(bytes: &[u8; REQUEST_SIZE]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u32()? != NBD_REQUEST_MAGIC {
            return None;
        }
        Some(Request {
            flags: fields.u16()?,
            command: Command::of_wire(fields.u16()?),
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?,
        })
    }

    /// Whether `flag` (an NBD_CMD_FLAG_* bit) is set.
    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// The error numbers of the protocol; a server sends no others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum NbdErrno {
    Perm = 1,
    Io = 5,
    NoMem = 12,
    Inval = 22,
    NoSpc = 28,
    Overflow = 75,
    NotSup = 95,
    Shutdown = 108,
}

impl NbdErrno {
    /// The protocol's number for a positive errno of the system.
    pub(crate) fn of_system(errno: i32) -> Self {
        use rustix::io::Errno;
        let is = |numbers: &[Errno]| numbers.iter().any(|number| number.raw_os_error() == errno);
        if is(&[Errno::PERM, Errno::ACCESS, Errno::ROFS]) {
            NbdErrno::Perm
        } else if is(&[Errno::NOSPC, Errno::DQUOT, Errno::FBIG]) {
            NbdErrno::NoSpc
        } else if is(&[Errno::NOMEM]) {
            NbdErrno::NoMem
        } else if is(&[Errno::OVERFLOW]) {
            NbdErrno::Overflow
        } else if is(&[Errno::OPNOTSUPP]) {
            NbdErrno::NotSup
        } else if is(&[Errno::SHUTDOWN]) {
            NbdErrno::Shutdown
        } else if is(&[Errno::INVAL]) {
            NbdErrno::Inval
        } else {
            NbdErrno::Io
        }
    }
}

/// The fixed bytes in front of a reply's payload, built without touching the heap.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    bytes: [u8; Header::CAPACITY],
    len: u8,
}

impl Header {
    const CAPACITY: usize = 32;

    fn new() -> Self {
        Header {
            bytes: [0; Header::CAPACITY],
            len: 0,
        }
    }

    /// Appends a field. The headers below are all that is ever built, and the longest fills the array exactly.
    fn put<const N: usize>(mut self, field: [u8; N]) -> Self {
        let at = usize::from(self.len);
        self.bytes[at..at + N].copy_from_slice(&field);
        self.len += N as u8;
        self
    }

    /// What goes on the wire.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    /// A simple reply; `error` 0 is success.
    pub(crate) fn simple_reply(cookie: u64, error: u32) -> Self {
        Header::new()
            .put(NBD_SIMPLE_REPLY_MAGIC.to_be_bytes())
            .put(error.to_be_bytes())
            .put(cookie.to_be_bytes())
    }

    /// A structured reply chunk with `length` bytes of payload behind it.
    fn chunk(cookie: u64, position: Position, kind: u16, length: u32) -> Self {
        Header::new()
            .put(NBD_STRUCTURED_REPLY_MAGIC.to_be_bytes())
            .put(position.flags().to_be_bytes())
            .put(kind.to_be_bytes())
            .put(cookie.to_be_bytes())
            .put(length.to_be_bytes())
    }

    /// The end of a structured reply without content.
    pub(crate) fn done(cookie: u64) -> Self {
        Header::chunk(cookie, Position::Last, NBD_REPLY_TYPE_NONE, 0)
    }

    /// `length` bytes of data at `offset` follow.
    pub(crate) fn data(cookie: u64, position: Position, offset: u64, length: u32) -> Self {
        Header::chunk(cookie, position, NBD_REPLY_TYPE_OFFSET_DATA, length + 8)
            .put(offset.to_be_bytes())
    }

    /// `length` bytes at `offset` are zero.
    pub(crate) fn hole(cookie: u64, position: Position, offset: u64, length: u32) -> Self {
        Header::chunk(cookie, position, NBD_REPLY_TYPE_OFFSET_HOLE, 12)
            .put(offset.to_be_bytes())
            .put(length.to_be_bytes())
    }

    /// `extents` descriptors of 8 bytes of context `context` follow.
    pub(crate) fn block_status(cookie: u64, context: u32, extents: u32) -> Self {
        Header::chunk(
            cookie,
            Position::Last,
            NBD_REPLY_TYPE_BLOCK_STATUS,
            4 + 8 * extents,
        )
        .put(context.to_be_bytes())
    }

    /// The request failed; a text of `text` bytes follows, and after it the offset, if `with_offset`.
    pub(crate) fn error(cookie: u64, error: NbdErrno, text: u16, with_offset: bool) -> Self {
        let (kind, tail) = match with_offset {
            false => (NBD_REPLY_TYPE_ERROR, 0),
            true => (NBD_REPLY_TYPE_ERROR_OFFSET, 8),
        };
        Header::chunk(cookie, Position::Last, kind, 6 + u32::from(text) + tail)
            .put((error as u32).to_be_bytes())
            .put(text.to_be_bytes())
    }
}

/// Whether more chunks of the same reply follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Position {
    More,
    Last,
}

impl Position {
    fn flags(self) -> u16 {
        match self {
            Position::More => 0,
            Position::Last => NBD_REPLY_FLAG_DONE,
        }
    }
}
