//! A guest's disk over NBD that takes an error, and the end of the server, as an answer. The client in `nbd/` insists on
//! success and builds wrong messages; this one is for load.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::harness::PATIENCE;

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const WRITE_ZEROES: u16 = 6;

/// Bytes per read of [`Guest::content`].
const PIECE: u32 = 1 << 20;

/// A request that changes the disk.
#[derive(Debug, Clone)]
pub(crate) enum Request {
    Write { offset: u64, data: Vec<u8> },
    Zero { offset: u64, length: u32 },
    Flush,
}

/// A connection in its transmission phase, with simple replies.
pub(crate) struct Guest {
    stream: UnixStream,
    size: u64,
}

impl Guest {
    /// Connects to an export.
    pub(crate) fn connect(socket: &Path, export: &str) -> io::Result<Guest> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut guest = Guest { stream, size: 0 };
        guest.handshake(export)?;
        Ok(guest)
    }

    fn handshake(&mut self, export: &str) -> io::Result<()> {
        let greeting: [u8; 18] = self.take()?;
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        let mut message = 3u32.to_be_bytes().to_vec();
        message.extend(b"IHAVEOPT");
        message.extend(7u32.to_be_bytes());
        message.extend((export.len() as u32 + 6).to_be_bytes());
        message.extend((export.len() as u32).to_be_bytes());
        message.extend(export.as_bytes());
        message.extend([0, 0]);
        self.stream.write_all(&message)?;
        loop {
            let head: [u8; 20] = self.take()?;
            let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
            let mut data = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
            self.stream.read_exact(&mut data)?;
            match (kind, data.as_slice()) {
                (1, _) => return Ok(()),
                (3, [0, 0, size @ .., _, _]) => {
                    self.size = u64::from_be_bytes(size.try_into().unwrap());
                }
                (3, _) => {}
                _ => {
                    return Err(io::Error::other(format!(
                        "the export is refused: {kind:#x}"
                    )));
                }
            }
        }
    }

    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn send(&mut self, command: u16, cookie: u64, offset: u64, length: u32) -> io::Result<()> {
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend(0u16.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        self.stream.write_all(&bytes)
    }

    /// Sends a request and does not wait for its reply.
    pub(crate) fn submit(&mut self, cookie: u64, request: &Request) -> io::Result<()> {
        match request {
            Request::Write { offset, data } => {
                self.send(WRITE, cookie, *offset, data.len() as u32)?;
                self.stream.write_all(data)
            }
            Request::Zero { offset, length } => self.send(WRITE_ZEROES, cookie, *offset, *length),
            Request::Flush => self.send(FLUSH, cookie, 0, 0),
        }
    }

    /// Asks for a part of the disk, whose content follows the reply, and does not wait for it.
    pub(crate) fn submit_read(&mut self, offset: u64, length: u32) -> io::Result<()> {
        self.send(READ, 0, offset, length)
    }

    /// The next reply: its cookie and its error, 0 for none.
    pub(crate) fn reply(&mut self) -> io::Result<(u64, u32)> {
        let reply: [u8; 16] = self.take()?;
        assert_eq!(reply[..4], 0x6744_6698u32.to_be_bytes());
        let error = u32::from_be_bytes(reply[4..8].try_into().unwrap());
        Ok((u64::from_be_bytes(reply[8..].try_into().unwrap()), error))
    }

    /// Runs one request: its error, 0 for none.
    pub(crate) fn run(&mut self, request: &Request) -> io::Result<u32> {
        self.submit(0, request)?;
        Ok(self.reply()?.1)
    }

    /// Reads a part of the disk.
    pub(crate) fn read(&mut self, offset: u64, length: u32) -> io::Result<Vec<u8>> {
        self.send(READ, 0, offset, length)?;
        match self.reply()? {
            (_, 0) => {
                let mut content = vec![0; length as usize];
                self.stream.read_exact(&mut content)?;
                Ok(content)
            }
            (_, error) => Err(io::Error::from_raw_os_error(error as i32)),
        }
    }

    /// Reads all of the disk.
    pub(crate) fn content(&mut self) -> io::Result<Vec<u8>> {
        let mut content = Vec::new();
        while (content.len() as u64) < self.size {
            let at = content.len() as u64;
            let length = (self.size - at).min(PIECE.into()) as u32;
            content.append(&mut self.read(at, length)?);
        }
        Ok(content)
    }
}
