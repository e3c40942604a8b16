//! Replies on their way to the socket.
//!
//! Replies queue up as headers, shared payload bytes and zero runs, and leave in batches with one vectored write: a
//! payload is never copied here, and many small replies cost one system call.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use block::io::{Data, Segment};
use bytes::Bytes;
use tokio::io::AsyncWrite;

use super::codec::transmission::Header;

/// Source of the bytes of zero runs.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// The most pieces that one system call takes; more gain nothing measurable.
const BATCH: usize = 64;

/// Something to send.
enum Piece {
    Header(Header),
    Bytes(Bytes),
    Zeroes(u64),
}

impl Piece {
    fn len(&self) -> u64 {
        match self {
            Piece::Header(header) => header.as_bytes().len() as u64,
            Piece::Bytes(bytes) => bytes.len() as u64,
            Piece::Zeroes(len) => *len,
        }
    }

    /// What is left after `sent` bytes, or as much of it as lies in one place.
    fn rest(&self, sent: u64) -> &[u8] {
        match self {
            Piece::Header(header) => &header.as_bytes()[sent as usize..],
            Piece::Bytes(bytes) => &bytes[sent as usize..],
            Piece::Zeroes(len) => {
                let left = (len - sent).min(ZEROES.len() as u64);
                &ZEROES[..left as usize]
            }
        }
    }
}

/// The queue of one connection.
#[derive(Default)]
pub(super) struct Output {
    pieces: VecDeque<Piece>,
    /// How much of the first piece has been sent.
    sent: u64,
    /// What is still to be sent.
    queued: u64,
}

impl Output {
    pub(super) fn header(&mut self, header: Header) {
        self.push(Piece::Header(header));
    }

    pub(super) fn bytes(&mut self, bytes: Bytes) {
        self.push(Piece::Bytes(bytes));
    }

    pub(super) fn data(&mut self, data: &Data) {
        for segment in data.segments() {
            self.push(match segment {
                Segment::Bytes(bytes) => Piece::Bytes(bytes.clone()),
                Segment::Zeroes(len) => Piece::Zeroes(*len),
            });
        }
    }

    fn push(&mut self, piece: Piece) {
        if piece.len() > 0 {
            self.queued += piece.len();
            self.pieces.push_back(piece);
        }
    }

    /// Bytes that wait.
    pub(super) fn queued(&self) -> u64 {
        self.queued
    }

    /// Pieces that wait: what the queue costs beyond its payload.
    pub(super) fn pieces(&self) -> usize {
        self.pieces.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Drops what waits: the peer is gone.
    pub(super) fn clear(&mut self) {
        *self = Output::default();
    }

    /// Sends as much as the socket takes; ready when nothing is left.
    pub(super) fn poll_send<S: AsyncWrite + Unpin>(
        &mut self,
        socket: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.pieces.is_empty() {
            let mut slices = [IoSlice::new(&[]); BATCH];
            let mut count = 0;
            for (index, (slice, piece)) in slices.iter_mut().zip(&self.pieces).enumerate() {
                let sent = if index == 0 { self.sent } else { 0 };
                *slice = IoSlice::new(piece.rest(sent));
                count = index + 1;
                // Nothing may follow a run of which this batch holds only a part.
                if slice.len() as u64 != piece.len() - sent {
                    break;
                }
            }
            let written = ready!(Pin::new(&mut *socket).poll_write_vectored(cx, &slices[..count]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(written as u64);
        }
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, mut written: u64) {
        self.queued -= written;
        while let Some(first) = self.pieces.front() {
            let left = first.len() - self.sent;
            if written < left {
                self.sent += written;
                return;
            }
            written -= left;
            self.sent = 0;
            self.pieces.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn pieces_leave_in_order_through_a_socket_of_any_size() {
        for size in [1, 7, 100, 1 << 20] {
            let mut data = Data::from(vec![7; 100]);
            data.push(Segment::Zeroes(200_000));
            data.push(Segment::Bytes(Bytes::from_static(b"end")));
            let mut output = Output::default();
            output.header(Header::simple_reply(1, 0));
            output.data(&data);
            let expected = [Header::simple_reply(1, 0).as_bytes(), &data.to_bytes()].concat();
            assert_eq!(output.queued(), expected.len() as u64);
            let (mut near, mut far) = tokio::io::duplex(size);
            let reader = async {
                let mut all = Vec::new();
                far.read_to_end(&mut all).await.unwrap();
                all
            };
            let writer = async {
                poll_fn(|cx| output.poll_send(&mut near, cx)).await.unwrap();
                drop(near);
            };
            let (all, ()) = tokio::join!(reader, writer);
            assert!(all == expected, "socket buffer of {size}");
            assert!(output.is_empty() && output.queued() == 0);
        }
    }
}
