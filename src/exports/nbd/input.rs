//! Requests on their way from the socket.
//!
//! Small requests arrive many at a time in one buffer, and their payloads are slices of it. A payload that does not fit
//! gets memory of its own and is read straight into it, so that no large payload is copied.
//!
//! ```text
//!            28 bytes                      length bytes there
//! Header ----------------> Start(request) ----------------> Header     a write that is admitted
//!                                 |
//!                                 +------- length bytes gone --------> Header     one that is refused
//! ```

use std::future::Future;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll};

use block::io::Data;
use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::codec::constants::REQUEST_SIZE;
use super::codec::transmission::Request;
use crate::limits;

/// What the next bytes are.
enum Expect {
    /// The rest of a request header.
    Header,
    /// The rest of a payload that goes to memory of its own.
    Payload { into: BytesMut, length: usize },
    /// Payload that nobody wants.
    Discard { length: u64 },
}

/// The receiving side of one connection.
pub(super) struct Input {
    buffer: BytesMut,
    expect: Expect,
}

/// The stream does not hold what it must.
pub(super) struct BadMagic;

impl Input {
    /// `early` is what the client has sent ahead of the transmission phase.
    pub(super) fn new(early: BytesMut) -> Self {
        Input {
            buffer: early,
            expect: Expect::Header,
        }
    }

    /// The next request's header, if it is there.
    pub(super) fn header(&mut self) -> Result<Option<Request>, BadMagic> {
        let Some(bytes) = self.buffer.first_chunk::<REQUEST_SIZE>() else {
            return Ok(None);
        };
        let request = Request::decode(bytes).ok_or(BadMagic)?;
        self.buffer.advance(REQUEST_SIZE);
        Ok(Some(request))
    }

    /// The payload of `length` bytes that follows the header, if all of it is there. Call it again after each read.
    pub(super) fn payload(&mut self, length: usize) -> Option<Data> {
        match &mut self.expect {
            Expect::Payload { into, length } => {
                if into.len() < *length {
                    return None;
                }
                let payload = std::mem::take(into).freeze();
                self.expect = Expect::Header;
                return Some(payload.into());
            }
            Expect::Header | Expect::Discard { .. } => {}
        }
        if self.buffer.len() >= length {
            return Some(self.buffer.split_to(length).freeze().into());
        }
        if length > limits::NBD_READ_BUFFER / 2 {
            // Memory that is not written to costs nothing: what a client announces is free until it sends it.
            let mut into = BytesMut::with_capacity(length);
            into.extend_from_slice(&self.buffer);
            self.buffer.clear();
            self.expect = Expect::Payload { into, length };
        }
        None
    }

    /// Throws the next `length` bytes away. True when they are gone; call it with 0 after each read until then.
    pub(super) fn discard(&mut self, length: u64) -> bool {
        let before = match self.expect {
            Expect::Discard { length } => length,
            Expect::Header | Expect::Payload { .. } => 0,
        };
        let wanted = before + length;
        let now = wanted.min(self.buffer.len() as u64);
        self.buffer.advance(now as usize);
        if now == wanted {
            self.expect = Expect::Header;
            return true;
        }
        self.expect = Expect::Discard {
            length: wanted - now,
        };
        false
    }

    /// Whether the stream may end here without anything being lost.
    pub(super) fn is_between_requests(&self) -> bool {
        self.buffer.is_empty() && matches!(self.expect, Expect::Header)
    }

    /// Reads what the socket has. 0 is its end.
    pub(super) fn poll_fill<S: AsyncRead + Unpin>(
        &mut self,
        socket: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if let Expect::Payload { into, length } = &mut self.expect {
            let left = *length - into.len();
            let mut rest = into.limit(left);
            // The future keeps nothing between polls: dropping it when it is pending loses nothing.
            return pin!(socket.read_buf(&mut rest)).poll(cx);
        }
        // Less than half a buffer waits for its rest here. Moving it to the front, or to new memory when requests still
        // use the old, pays only once the room has become too small for a good batch.
        if self.buffer.capacity() - self.buffer.len() < limits::NBD_READ_BUFFER / 8 {
            self.buffer.reserve(
                limits::NBD_READ_BUFFER - self.buffer.len().min(limits::NBD_READ_BUFFER / 2),
            );
        }
        pin!(socket.read_buf(&mut self.buffer)).poll(cx)
    }
}
