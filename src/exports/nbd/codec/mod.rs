//! The NBD wire format, without I/O: bytes to typed messages and back.
//!
//! Every decoder takes a slice that a peer may have filled with anything and answers with a message or an error;
//! none allocates more than its input. The limits on how long an input may be are the caller's.
//!
//! * `constants`: the numbers, under the names of the specification
//! * `handshake`: greeting, options and option replies
//! * `transmission`: requests, simple replies and structured reply chunks

pub(crate) mod constants;
pub(crate) mod handshake;
pub(crate) mod transmission;

#[cfg(test)]
mod tests;

/// Reads big-endian fields off the front of a message.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
}
