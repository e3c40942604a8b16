//! The memory of messages that have begun to arrive, over all clients.
//!
//! A message may be as large as in QEMU, but not for every client at once: what a message takes beyond a small share of
//! its own comes out of one budget. Where that is used up the message is refused as too large, and the client goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use qapi::rt::json::{Decoder, Limits};

use crate::limits;

/// What is left for large messages. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Budget(Arc<AtomicUsize>);

impl Default for Budget {
    fn default() -> Self {
        Budget(Arc::new(AtomicUsize::new(limits::QMP_LARGE_MESSAGES_BYTES)))
    }
}

/// What one client has taken of it; given back when dropped.
#[derive(Debug)]
pub(super) struct Share {
    budget: Budget,
    taken: usize,
}

impl Budget {
    /// A client that has taken nothing.
    pub(super) fn share(&self) -> Share {
        Share {
            budget: self.clone(),
            taken: 0,
        }
    }
}

impl Share {
    /// A reader for a client that has not negotiated yet.
    pub(super) fn stranger() -> Decoder {
        Decoder::new(Limits {
            token_bytes: limits::QMP_STRANGER_BYTES,
            tokens: limits::QMP_STRANGER_BYTES,
            ..Limits::default()
        })
    }

    /// Takes or gives back what the message under way needs more or less than before. Where there is not enough left the
    /// reader's limit is what it has already, so that the message ends as one that is too large.
    pub(super) fn settle(&mut self, decoder: &mut Decoder) {
        let needed = decoder
            .held_bytes()
            .saturating_sub(limits::QMP_MESSAGE_BYTES);
        if self.resize(needed) {
            decoder.set_limits(Limits::default());
        } else {
            decoder.set_limits(Limits {
                token_bytes: 0,
                tokens: 0,
                ..Limits::default()
            });
        }
    }

    /// Makes the share `bytes` large. Answers whether there is enough left.
    fn resize(&mut self, bytes: usize) -> bool {
        let left = &self.budget.0;
        if bytes <= self.taken {
            left.fetch_add(self.taken - bytes, Ordering::Relaxed);
            self.taken = bytes;
            return true;
        }
        let more = bytes - self.taken;
        let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            left.checked_sub(more)
        });
        if taken.is_ok() {
            self.taken = bytes;
        }
        taken.is_ok()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.resize(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends pieces of one endless string until the reader has had enough; answers how many bytes it took.
    fn flood(share: &mut Share, decoder: &mut Decoder) -> usize {
        let piece = vec![b'x'; limits::QMP_READ_BYTES];
        let mut start: &[u8] = b"{'execute':'";
        assert!(decoder.next(&mut start).is_none());
        let mut sent = 0;
        loop {
            let mut rest = &piece[..];
            if let Some(message) = decoder.next(&mut rest) {
                let error = message.unwrap_err().to_string();
                assert_eq!(error, "JSON token size limit exceeded");
                return sent;
            }
            sent += piece.len();
            share.settle(decoder);
        }
    }

    #[test]
    fn a_stranger_sends_little() {
        let sent = flood(&mut Budget::default().share(), &mut Share::stranger());
        assert!(sent <= limits::QMP_STRANGER_BYTES, "{sent}");
    }

    #[test]
    fn many_clients_share_the_memory_for_large_messages() {
        let budget = Budget::default();
        let mut small = budget.share();
        let held: Vec<_> = (0..8)
            .map(|_| {
                let mut share = budget.share();
                let size = limits::QMP_LARGE_MESSAGES_BYTES / 8;
                assert!(share.resize(size));
                share
            })
            .collect();
        // Nothing is left; what every client has for itself still is.
        let mut decoder = Decoder::default();
        let sent = flood(&mut small, &mut decoder);
        assert!(sent.abs_diff(limits::QMP_MESSAGE_BYTES) <= 2 * limits::QMP_READ_BYTES);
        let mut end: &[u8] = b"'} {'execute': 'quit'}";
        while let Some(message) = decoder.next(&mut end) {
            drop(message);
        }
        small.settle(&mut decoder);
        drop(held);
        let sent = flood(&mut small, &mut Decoder::default());
        assert!(
            sent.abs_diff(64 << 20) <= 2 * limits::QMP_READ_BYTES,
            "{sent}"
        );
        drop(small);
        assert_eq!(
            budget.0.load(Ordering::Relaxed),
            limits::QMP_LARGE_MESSAGES_BYTES
        );
    }
}
