//! A raw NBD client: it builds messages byte by byte, so that it can build wrong ones. The numbers are written out here,
//! apart from the server's, so that a wrong one there is seen.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::harness::PATIENCE;

pub(crate) const EXPORT_NAME: u32 = 1;
pub(crate) const ABORT: u32 = 2;
pub(crate) const LIST: u32 = 3;
pub(crate) const STARTTLS: u32 = 5;
pub(crate) const INFO: u32 = 6;
pub(crate) const GO: u32 = 7;
pub(crate) const STRUCTURED_REPLY: u32 = 8;
pub(crate) const LIST_META: u32 = 9;
pub(crate) const SET_META: u32 = 10;

pub(crate) const ACK: u32 = 1;
pub(crate) const ERR_UNSUP: u32 = 0x8000_0001;
pub(crate) const ERR_POLICY: u32 = 0x8000_0002;
pub(crate) const ERR_INVALID: u32 = 0x8000_0003;
pub(crate) const ERR_UNKNOWN: u32 = 0x8000_0006;
pub(crate) const ERR_BLOCK_SIZE_REQD: u32 = 0x8000_0008;
pub(crate) const ERR_TOO_BIG: u32 = 0x8000_0009;

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const DISC: u16 = 2;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const CACHE: u16 = 5;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const BLOCK_STATUS: u16 = 7;

pub(crate) const FUA: u16 = 1;
pub(crate) const NO_HOLE: u16 = 2;
pub(crate) const DF: u16 = 4;
pub(crate) const REQ_ONE: u16 = 8;
pub(crate) const FAST_ZERO: u16 = 16;

pub(crate) const EPERM: u32 = 1;
pub(crate) const EIO: u32 = 5;
pub(crate) const EINVAL: u32 = 22;
pub(crate) const ENOSPC: u32 = 28;

pub(crate) struct Client(pub(super) UnixStream);

/// A reply to an option.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OptionReply {
    pub(crate) option: u32,
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
}

/// A chunk of a structured reply.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) done: bool,
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    pub(crate) payload: Vec<u8>,
}

/// A string with its length in front.
pub(crate) fn counted(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

/// The bytes of an option.
pub(crate) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The data of NBD_OPT_INFO and NBD_OPT_GO.
pub(crate) fn info_data(name: &str, requests: &[u16]) -> Vec<u8> {
    let mut data = counted(name);
    data.extend((requests.len() as u16).to_be_bytes());
    data.extend(requests.iter().flat_map(|request| request.to_be_bytes()));
    data
}

/// The data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
pub(crate) fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = counted(name);
    data.extend((queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| counted(query)));
    data
}

/// The header of a request.
pub(crate) fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

impl Client {
    pub(crate) fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).expect("a listening server");
        stream
            .set_read_timeout(Some(PATIENCE))
            .expect("a time limit");
        stream
            .set_write_timeout(Some(PATIENCE))
            .expect("a time limit");
        Client(stream)
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("a server that reads");
    }

    pub(crate) fn take(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0
            .read_exact(&mut bytes)
            .expect("a server that answers");
        bytes
    }

    fn take_u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }

    fn take_u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }

    fn take_u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    /// Reads the greeting and answers with these flags.
    pub(crate) fn handshake(&mut self, flags: u32) {
        assert_eq!(self.take(18), b"NBDMAGICIHAVEOPT\x00\x03");
        self.send(&flags.to_be_bytes());
    }

    pub(crate) fn reply(&mut self) -> OptionReply {
        assert_eq!(self.take_u64(), 0x0003_e889_0455_65a9);
        let (option, kind) = (self.take_u32(), self.take_u32());
        let length = self.take_u32();
        OptionReply {
            option,
            kind,
            data: self.take(length as usize),
        }
    }

    /// Sends an option and expects one reply of this kind; answers its text.
    pub(crate) fn refused(&mut self, number: u32, data: &[u8], kind: u32) -> String {
        self.send(&option(number, data));
        let reply = self.reply();
        assert_eq!((reply.option, reply.kind), (number, kind));
        String::from_utf8(reply.data).expect("a text")
    }

    pub(crate) fn structured(&mut self) {
        self.send(&option(STRUCTURED_REPLY, b""));
        assert_eq!(self.reply().kind, ACK);
    }

    pub(crate) fn select_base_allocation(&mut self, name: &str) {
        self.send(&option(SET_META, &meta_data(name, &["base:allocation"])));
        let selected = self.reply();
        assert_eq!(
            (selected.kind, &selected.data[4..]),
            (4, &b"base:allocation"[..])
        );
        assert_eq!(self.reply().kind, ACK);
    }

    /// Chooses the export; answers the information sent.
    pub(crate) fn go(&mut self, name: &str) -> Vec<Vec<u8>> {
        self.send(&option(GO, &info_data(name, &[])));
        let mut information = Vec::new();
        loop {
            let reply = self.reply();
            match reply.kind {
                ACK => return information,
                3 => information.push(reply.data),
                _ => panic!("{reply:?}"),
            }
        }
    }

    /// Reads a simple reply: cookie and error.
    pub(crate) fn simple_reply(&mut self) -> (u64, u32) {
        assert_eq!(self.take_u32(), 0x6744_6698);
        let error = self.take_u32();
        (self.take_u64(), error)
    }

    /// Sends a request and reads its simple reply: the error.
    pub(crate) fn simple(&mut self, request: &[u8]) -> u32 {
        self.send(request);
        self.simple_reply().1
    }

    /// Reads with simple replies.
    pub(crate) fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        assert_eq!(self.simple(&request(0, READ, 1, offset, length)), 0);
        self.take(length as usize)
    }

    /// Writes, with simple replies or structured ones (success is a simple reply in both).
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let mut message = request(0, WRITE, 1, offset, data.len() as u32);
        message.extend(data);
        assert_eq!(self.simple(&message), 0);
    }

    pub(crate) fn chunk(&mut self) -> Chunk {
        assert_eq!(self.take_u32(), 0x668e_33ef);
        let (flags, kind) = (self.take_u16(), self.take_u16());
        let cookie = self.take_u64();
        let length = self.take_u32();
        Chunk {
            done: flags == 1,
            kind,
            cookie,
            payload: self.take(length as usize),
        }
    }

    /// Sends a request and reads the chunks of its reply.
    pub(crate) fn chunks(&mut self, request: &[u8]) -> Vec<Chunk> {
        self.send(request);
        let mut chunks = Vec::new();
        loop {
            chunks.push(self.chunk());
            if chunks.last().is_some_and(|chunk| chunk.done) {
                return chunks;
            }
        }
    }

    /// Sends a request that fails with a structured reply: error, text, offset.
    pub(crate) fn error(&mut self, request: &[u8]) -> (u32, String, Option<u64>) {
        let chunks = self.chunks(request);
        assert_eq!(chunks.len(), 1, "{chunks:?}");
        let Chunk { kind, payload, .. } = &chunks[0];
        let error = u32::from_be_bytes(payload[..4].try_into().unwrap());
        let length = usize::from(u16::from_be_bytes(payload[4..6].try_into().unwrap()));
        let text = String::from_utf8(payload[6..6 + length].to_vec()).expect("a text");
        let tail = &payload[6 + length..];
        let offset = match kind {
            0x8001 => None,
            0x8002 => Some(u64::from_be_bytes(tail.try_into().unwrap())),
            _ => panic!("not an error: {chunks:?}"),
        };
        (error, text, offset)
    }

    /// Whether the server has closed the connection, with nothing more to read.
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        match self.0.read(&mut byte) {
            Ok(0) => true,
            Ok(_) => panic!("an unexpected byte {byte:?}"),
            Err(error) => match error.kind() {
                ErrorKind::ConnectionReset => true,
                ErrorKind::WouldBlock => false,
                _ => panic!("{error}"),
            },
        }
    }
}
