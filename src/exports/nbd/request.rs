//! One request: the checks on it, the call into the node, and the reply.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use block::driver::{BoxFuture, Requests, WriteFlags, ZeroFlags};
use block::error::{Error, Result};
use block::io::{Data, Segment};
use bytes::{BufMut, Bytes, BytesMut};

use super::codec::constants::*;
use super::codec::transmission::{Command, Header, NbdErrno, Position, Request};
use super::output::Output;
use crate::limits;

/// The id that this server gives to base:allocation, its only metadata context.
pub(super) const BASE_ALLOCATION_ID: u32 = 0;

/// What a connection has negotiated, as far as requests depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Terms {
    /// Writes are allowed.
    pub(super) writable: bool,
    /// Every write is durable before its reply.
    pub(super) writethrough: bool,
    /// NBD_OPT_STRUCTURED_REPLY was acknowledged.
    pub(super) structured: bool,
    /// base:allocation was selected for this export.
    pub(super) base_allocation: bool,
}

/// Why a request failed: what the client is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) errno: NbdErrno,
    pub(super) text: String,
    /// Where in the range the trouble begins, if known.
    pub(super) offset: Option<u64>,
}

impl Failure {
    fn new(errno: NbdErrno, text: impl Into<String>) -> Self {
        Failure {
            errno,
            text: text.into(),
            offset: None,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::new(NbdErrno::of_system(error.errno()), error.message())
    }
}

/// Checks a request before anything is done, and before the payload of a write is read.
pub(super) fn check(
    request: &Request,
    terms: Terms,
    node: &dyn Requests,
) -> std::result::Result<(), Failure> {
    let invalid = |text: String| Err(Failure::new(NbdErrno::Inval, text));
    let (length, most) = (request.length, limits::NBD_MAX_PAYLOAD);
    if matches!(request.command, Command::Read | Command::Write) && length > most {
        return invalid(format!("len ({length}) is larger than max len ({most})"));
    }
    let (known_flags, writes) = match request.command {
        Command::Read if terms.structured => (NBD_CMD_FLAG_DF, false),
        Command::Read | Command::Flush | Command::Cache => (0, false),
        Command::Write | Command::Trim => (0, true),
        Command::WriteZeroes => (NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO, true),
        Command::BlockStatus if terms.base_allocation => (NBD_CMD_FLAG_REQ_ONE, false),
        Command::BlockStatus => return invalid("CMD_BLOCK_STATUS not negotiated".into()),
        Command::Disconnect => return Ok(()),
        Command::Unknown(number) => {
            return invalid(format!("invalid request type ({number}) received"));
        }
    };
    if writes && !terms.writable {
        return Err(Failure::new(NbdErrno::Perm, "Export is read-only"));
    }
    let unknown = request.flags & !(known_flags | NBD_CMD_FLAG_FUA);
    if unknown != 0 {
        let name = request.command.name();
        return invalid(format!(
            "unsupported flags for command {name} (got 0x{unknown:x})"
        ));
    }
    if request.command == Command::Flush {
        // Offset and length are reserved; some clients leave rubbish in them.
        return Ok(());
    }
    if request.length == 0 && request.command == Command::BlockStatus {
        return invalid("need non-zero length".into());
    }
    check_range(request, node)
}

fn check_range(request: &Request, node: &dyn Requests) -> std::result::Result<(), Failure> {
    let (offset, length) = (request.offset, u64::from(request.length));
    let size = node.size();
    if offset > size || length > size - offset {
        let behind_end = matches!(request.command, Command::Write | Command::WriteZeroes);
        let mut failure = Failure::new(
            if behind_end {
                NbdErrno::NoSpc
            } else {
                NbdErrno::Inval
            },
            format!("operation past EOF; From: {offset}, Len: {length}, Size: {size}"),
        );
        // Of a read the client may use what lies before this offset, had it been sent.
        failure.offset = (request.command == Command::Read && length > 0).then(|| size.max(offset));
        return Err(failure);
    }
    let alignment = u64::from(node.limits().alignment.max(1));
    if offset % alignment != 0 || length % alignment != 0 {
        return Err(Failure::new(
            NbdErrno::Inval,
            format!(
                "unaligned offset {offset} or length {length}: multiples of {alignment} are needed"
            ),
        ));
    }
    Ok(())
}

/// What a request came to.
enum Outcome {
    Done,
    Data(Data),
    Extents(Bytes),
}

/// The call into the node. An enum rather than one more boxed future: the frequent commands are one virtual call, and
/// the lot can move from the first poll into the set of pending requests.
enum Call<'n> {
    Ready(Option<std::result::Result<Outcome, Failure>>),
    Read(BoxFuture<'n, Result<Data>>),
    Unit(BoxFuture<'n, Result<()>>),
    Steps(BoxFuture<'n, Result<Outcome>>),
}

/// A request under way. Resolves to itself being finished; `reply` then says what came out.
pub(super) struct Running<'n> {
    request: Request,
    call: Call<'n>,
}

/// A finished request.
pub(super) struct Finished {
    request: Request,
    result: std::result::Result<Outcome, Failure>,
}

impl<'n> Running<'n> {
    /// Starts a request that has passed `check`; `payload` is that of a write.
    pub(super) fn start(
        request: Request,
        payload: Data,
        terms: Terms,
        node: &'n dyn Requests,
    ) -> Self {
        let (offset, length) = (request.offset, u64::from(request.length));
        let fua = request.has(NBD_CMD_FLAG_FUA);
        let durable = fua || terms.writethrough;
        let call = match request.command {
            Command::Read if fua => Call::Steps(Box::pin(async move {
                // The specification wants what is read to be on stable storage.
                node.flush().await?;
                node.read(offset, length).await.map(Outcome::Data)
            })),
            Command::Read => Call::Read(node.read(offset, length)),
            Command::Write => {
                let flags = WriteFlags::fua(durable);
                Call::Unit(node.write(offset, payload, flags))
            }
            Command::WriteZeroes => {
                let flags = ZeroFlags {
                    may_unmap: !request.has(NBD_CMD_FLAG_NO_HOLE),
                    fua: durable,
                    no_fallback: request.has(NBD_CMD_FLAG_FAST_ZERO),
                };
                Call::Unit(node.write_zeroes(offset, length, flags))
            }
            Command::Trim if durable => Call::Steps(Box::pin(async move {
                node.discard(offset, length).await?;
                node.flush().await.map(|()| Outcome::Done)
            })),
            Command::Trim => Call::Unit(node.discard(offset, length)),
            Command::Flush => Call::Unit(node.flush()),
            Command::BlockStatus => {
                let most = match request.has(NBD_CMD_FLAG_REQ_ONE) {
                    true => 1,
                    false => limits::NBD_MAX_EXTENTS,
                };
                Call::Steps(Box::pin(extents(node, offset, length, most)))
            }
            // Reading ahead is a hint; the host's page cache does it better unasked.
            Command::Cache => Call::Ready(Some(Ok(Outcome::Done))),
            // The session handles the first and `check` refuses the second.
            Command::Disconnect | Command::Unknown(_) => Call::Ready(Some(Err(Failure::new(
                NbdErrno::Inval,
                "unexpected command",
            )))),
        };
        Running { request, call }
    }

    /// Bytes of payload that the request holds, or will hold.
    pub(super) fn cost(&self) -> u64 {
        cost(&self.request)
    }
}

/// Bytes of payload that a request holds while it is under way.
pub(super) fn cost(request: &Request) -> u64 {
    match request.command {
        Command::Read | Command::Write => u64::from(request.length),
        _ => 0,
    }
}

impl Future for Running<'_> {
    type Output = Finished;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Finished> {
        let poll = match &mut self.call {
            Call::Ready(result) => match result.take() {
                Some(result) => Poll::Ready(result),
                None => Poll::Pending,
            },
            Call::Read(read) => read
                .as_mut()
                .poll(cx)
                .map(|result| result.map(Outcome::Data).map_err(Failure::from)),
            Call::Unit(call) => call
                .as_mut()
                .poll(cx)
                .map(|result| result.map(|()| Outcome::Done).map_err(Failure::from)),
            Call::Steps(steps) => steps
                .as_mut()
                .poll(cx)
                .map(|result| result.map_err(Failure::from)),
        };
        let request = self.request;
        poll.map(|result| Finished { request, result })
    }
}

/// The descriptors of base:allocation for a range: at most `most`, neighbours of the same state merged. They may end
/// before the range does; the client asks again.
async fn extents(node: &dyn Requests, offset: u64, length: u64, most: usize) -> Result<Outcome> {
    let mut descriptors = BytesMut::new();
    let end = offset + length;
    let mut at = offset;
    let mut count = 0;
    let mut run: Option<(u64, u32)> = None;
    // The number of looks is bounded too: a node that answers in small pieces must not make this endless.
    for _ in 0..limits::NBD_MAX_EXTENTS {
        if at == end {
            break;
        }
        let status = node.block_status(at, end - at).await?;
        let len = status.len.clamp(1, end - at);
        // What comes from a backing file is data for a client, which sees one disk.
        let state = if status.zero {
            NBD_STATE_HOLE | NBD_STATE_ZERO
        } else {
            0
        };
        run = match run {
            Some((before, same)) if same == state => Some((before + len, same)),
            Some(other) => {
                put_extent(&mut descriptors, other);
                count += 1;
                if count == most {
                    run = None;
                    break;
                }
                Some((len, state))
            }
            None => Some((len, state)),
        };
        at += len;
    }
    if let Some(last) = run {
        put_extent(&mut descriptors, last);
    }
    Ok(Outcome::Extents(descriptors.freeze()))
}

/// A run is part of a request, whose length has 32 bits.
fn put_extent(descriptors: &mut BytesMut, (len, state): (u64, u32)) {
    descriptors.put_u32(len as u32);
    descriptors.put_u32(state);
}

impl Finished {
    /// Bytes of payload that the request held.
    pub(super) fn cost(&self) -> u64 {
        cost(&self.request)
    }

    /// Queues the reply.
    pub(super) fn reply(self, terms: Terms, output: &mut Output) {
        let cookie = self.request.cookie;
        match self.result {
            Err(failure) => reply_failure(&self.request, failure, terms, output),
            Ok(Outcome::Data(data)) if terms.structured => {
                structured_read(&self.request, &data, output);
            }
            Ok(Outcome::Data(data)) => {
                output.header(Header::simple_reply(cookie, 0));
                output.data(&data);
            }
            Ok(Outcome::Extents(extents)) => {
                let count = (extents.len() / 8) as u32;
                output.header(Header::block_status(cookie, BASE_ALLOCATION_ID, count));
                output.bytes(extents);
            }
            // Only reads and block status must be structured; this is four bytes shorter.
            Ok(Outcome::Done) => output.header(Header::simple_reply(cookie, 0)),
        }
    }
}

/// Queues the reply of a request that failed or was refused.
pub(super) fn reply_failure(
    request: &Request,
    failure: Failure,
    terms: Terms,
    output: &mut Output,
) {
    log::debug!(
        "NBD: {:?} at {} of {} bytes fails: {}",
        request.command,
        request.offset,
        request.length,
        failure.text
    );
    if !terms.structured {
        output.header(Header::simple_reply(request.cookie, failure.errno as u32));
        return;
    }
    let text = clip(failure.text).into_bytes();
    output.header(Header::error(
        request.cookie,
        failure.errno,
        text.len() as u16,
        failure.offset.is_some(),
    ));
    output.bytes(text.into());
    if let Some(offset) = failure.offset {
        output.bytes(Bytes::copy_from_slice(&offset.to_be_bytes()));
    }
}

/// At most as much of a text as the protocol allows.
fn clip(mut text: String) -> String {
    let fits = |end: &usize| text.is_char_boundary(*end);
    if text.len() > NBD_MAX_STRING {
        let end = (0..=NBD_MAX_STRING).rev().find(fits).unwrap_or(0);
        text.truncate(end);
    }
    text
}

/// Queues a read's reply as data and holes. A short zero run stays data, because a chunk costs the client more than its
/// bytes; with NBD_CMD_FLAG_DF the answer is one chunk.
fn structured_read(request: &Request, data: &Data, output: &mut Output) {
    if data.is_empty() {
        output.header(Header::done(request.cookie));
        return;
    }
    let whole = request.has(NBD_CMD_FLAG_DF);
    let mut chunks = Chunks {
        cookie: request.cookie,
        offset: request.offset,
        left: data.len(),
    };
    let mut bytes = Data::new();
    for segment in data.segments() {
        match segment {
            Segment::Zeroes(len)
                if *len >= limits::NBD_MIN_HOLE && (!whole || *len == data.len()) =>
            {
                chunks.data(std::mem::take(&mut bytes), output);
                chunks.hole(*len, output);
            }
            other => bytes.push(other.clone()),
        }
    }
    chunks.data(bytes, output);
}

/// The chunks of one reply: where the next begins, and how much the reply still has to cover. All lengths are parts of
/// the request's, which has 32 bits.
struct Chunks {
    cookie: u64,
    offset: u64,
    left: u64,
}

impl Chunks {
    fn data(&mut self, data: Data, output: &mut Output) {
        if data.is_empty() {
            return;
        }
        let (len, offset) = (data.len(), self.offset);
        let position = self.advance(len);
        output.header(Header::data(self.cookie, position, offset, len as u32));
        output.data(&data);
    }

    fn hole(&mut self, len: u64, output: &mut Output) {
        let offset = self.offset;
        let position = self.advance(len);
        output.header(Header::hole(self.cookie, position, offset, len as u32));
    }

    fn advance(&mut self, len: u64) -> Position {
        self.offset += len;
        self.left -= len;
        match self.left {
            0 => Position::Last,
            _ => Position::More,
        }
    }
}
