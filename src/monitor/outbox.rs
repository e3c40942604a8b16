//! What waits to be written to one client: bounded, and never a reason for anybody else to wait.
//!
//! Replies are always taken, because their number is bounded elsewhere: the session runs no
//! further command while [`Outbox::room`] waits. Events come at any time from anywhere, so they
//! are dropped when the client does not read.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

use qapi::rt::json::Style;

use super::session::Session;
use crate::limits;

/// The messages on their way to one client.
#[derive(Debug)]
pub(super) struct Outbox {
    owner: Session,
    style: Style,
    queue: Mutex<Queue>,
    /// Something was pushed, or the end was declared. For the writer.
    pushed: Notify,
    /// Something was written. For the session, which waits for room.
    written: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    messages: VecDeque<Bytes>,
    /// Events that wait for an answer.
    behind: Vec<Bytes>,
    /// Bytes of both, and of the batch that is being written.
    bytes: usize,
    /// Events that a client which does not read has missed since the last one it got.
    dropped: u64,
    finished: bool,
}

impl Outbox {
    pub(super) fn new(owner: Session, style: Style) -> Outbox {
        Outbox {
            owner,
            style,
            queue: Mutex::default(),
            pushed: Notify::new(),
            written: Notify::new(),
        }
    }

    /// How messages for this client are laid out.
    pub(super) fn style(&self) -> Style {
        self.style
    }

    /// Queues a reply or the greeting. Never dropped.
    pub(super) fn push_reply(&self, message: Bytes) {
        let mut queue = self.lock();
        queue.bytes += message.len();
        queue.messages.push_back(message);
        drop(queue);
        self.pushed.notify_one();
    }

    /// Queues an event, or drops it if the client has too much unread already. While the session holds events it waits.
    pub(super) fn push_event(&self, message: Bytes) {
        let mut queue = self.lock();
        if queue.bytes + message.len() > limits::QMP_OUTBOX_EVENT_BYTES {
            queue.dropped += 1;
            if queue.dropped == 1 {
                log::warn!(
                    "QMP client {}: does not read, events are dropped",
                    self.owner.id()
                );
            }
            return;
        }
        if queue.dropped > 0 {
            let missed = std::mem::take(&mut queue.dropped);
            log::warn!(
                "QMP client {}: reads again, missed {missed} events",
                self.owner.id()
            );
        }
        queue.bytes += message.len();
        if self.owner.holds_events() {
            queue.behind.push(message);
            return;
        }
        queue.messages.push_back(message);
        drop(queue);
        self.pushed.notify_one();
    }

    /// The command that runs has been answered: events go on.
    pub(super) fn release_events(&self) {
        if !self.owner.holds_events() {
            return;
        }
        let mut queue = self.lock();
        // Under the lock, so that an event which comes now does not overtake.
        self.owner.release_events();
        queue.release();
        drop(queue);
        self.pushed.notify_one();
    }

    /// Waits until the client has read enough to be sent another reply.
    pub(super) async fn room(&self) {
        loop {
            let mut written = pin!(self.written.notified());
            // Counted as waiting before the check, so that no write falls between the two.
            written.as_mut().enable();
            if self.lock().bytes <= limits::QMP_OUTBOX_REPLY_BYTES {
                return;
            }
            written.await;
        }
    }

    /// Nothing will be pushed any more: the writer ends when all is written.
    pub(super) fn finish(&self) {
        let mut queue = self.lock();
        queue.finished = true;
        // A command that has not ended is not answered any more.
        queue.release();
        drop(queue);
        self.pushed.notify_one();
    }

    /// The next bytes to write, several messages at once if they are small; `None` at the end.
    ///
    /// They count until [`Outbox::wrote`] says that they are gone.
    pub(super) async fn batch(&self) -> Option<Bytes> {
        loop {
            {
                let mut queue = self.lock();
                if let Some(batch) = queue.batch() {
                    return Some(batch);
                }
                if queue.finished {
                    return None;
                }
            }
            self.pushed.notified().await;
        }
    }

    /// `bytes` of a batch have been given to the kernel.
    pub(super) fn wrote(&self, bytes: usize) {
        let mut queue = self.lock();
        queue.bytes = queue.bytes.saturating_sub(bytes);
        drop(queue);
        self.written.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // The queue is whole between any two statements: a panic elsewhere does not spoil it.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn release(&mut self) {
        self.messages.extend(self.behind.drain(..));
    }

    fn batch(&mut self) -> Option<Bytes> {
        let first = self.messages.pop_front()?;
        if self.messages.is_empty() || first.len() >= limits::QMP_WRITE_BYTES {
            return Some(first);
        }
        let mut batch = Vec::from(first);
        while let Some(next) = self.messages.front() {
            if batch.len() + next.len() > limits::QMP_WRITE_BYTES {
                break;
            }
            batch.extend_from_slice(next);
            self.messages.pop_front();
        }
        Some(Bytes::from(batch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outbox() -> Outbox {
        let session = crate::monitor::Session::new(&[]);
        Outbox::new(session, Style::Compact)
    }

    #[tokio::test]
    async fn events_are_dropped_when_nobody_reads_and_replies_are_not() {
        let outbox = outbox();
        let event = Bytes::from(vec![b'e'; 1000]);
        for _ in 0..10 * limits::QMP_OUTBOX_EVENT_BYTES / event.len() {
            outbox.push_event(event.clone());
        }
        let held = outbox.lock().bytes;
        assert!(held <= limits::QMP_OUTBOX_EVENT_BYTES);
        outbox.push_reply(Bytes::from_static(b"reply"));
        outbox.finish();
        let mut last = Bytes::new();
        while let Some(batch) = outbox.batch().await {
            outbox.wrote(batch.len());
            last = batch;
        }
        assert!(last.ends_with(b"reply"));
        assert_eq!(outbox.lock().bytes, 0);
    }

    #[tokio::test]
    async fn events_that_are_held_come_behind_the_answer_or_with_the_end() {
        let outbox = outbox();
        let push = |text: &'static str| outbox.push_event(Bytes::from_static(text.as_bytes()));
        push("before ");
        outbox.owner.hold_events();
        push("since ");
        outbox.push_reply(Bytes::from_static(b"answer "));
        outbox.release_events();
        push("later");
        let batch = outbox.batch().await.unwrap();
        assert_eq!(batch, "before answer since later");
        outbox.wrote(batch.len());
        outbox.owner.hold_events();
        push("last");
        outbox.finish();
        assert_eq!(outbox.batch().await.unwrap(), "last");
        assert_eq!(outbox.batch().await, None);
    }

    #[tokio::test]
    async fn a_session_waits_for_its_reader() {
        let outbox = outbox();
        let big = vec![0; limits::QMP_OUTBOX_REPLY_BYTES + 1];
        outbox.push_reply(Bytes::from(big));
        let batch = outbox.batch().await.unwrap();
        let waits = tokio::time::timeout(std::time::Duration::from_millis(20), outbox.room());
        assert!(waits.await.is_err());
        outbox.wrote(batch.len());
        outbox.room().await;
    }
}
