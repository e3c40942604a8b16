//! Guests that write while a command runs, each to a sector of its disk that nothing else writes to.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use block::crashlab::content::{Content, SECTOR};
use block::driver::{BoxFuture, Requests as _, WriteFlags};
use block::error::Result;
use block::graph::Edge;
use futures_util::FutureExt as _;
use futures_util::future::{join, join_all};

use super::script::{DISK_BYTES, DISKS};
use super::tape::Tape;

/// Where they write.
const PLACE: u64 = DISK_BYTES - SECTOR;

/// A write of a guest: its sector full of one byte, which is greater with each write.
#[derive(Debug, Clone)]
pub(super) struct Written {
    pub(super) byte: u8,
    /// It was answered well.
    pub(super) is_done: bool,
    /// Records when it was sent, and when a flush behind it was answered, if one was.
    pub(super) begun: usize,
    pub(super) flushed: Option<usize>,
}

/// What a guest has done while a command ran.
#[derive(Debug)]
pub(super) struct Beside {
    pub(super) written: Vec<Written>,
    /// Before which of these its disk has gone back to what it was, if it has seen that.
    pub(super) gone_back: Option<usize>,
    /// Which of them it has sent when the command was over.
    pub(super) over: usize,
}

/// A disk has gone back to a snapshot while its guest wrote. Numbers are places among all that it has written.
#[derive(Debug, Clone)]
pub(super) struct Back {
    /// The moment behind it.
    pub(super) moment: usize,
    /// It has been decided, and then taken back.
    pub(super) is_taken_back: bool,
    /// Snapshots show writes before this one.
    pub(super) before: usize,
    /// This one and later ones may be behind it.
    pub(super) may: usize,
    /// They are.
    pub(super) must: usize,
}

/// Runs a command, and the guests of disks while it does; `firsts` are the bytes of their first writes. Answers what they have written.
pub(super) async fn beside<T>(
    command: impl Future<Output = T>,
    edges: Vec<Edge>,
    tape: &Tape,
    firsts: [u8; DISKS],
) -> (T, Vec<Beside>) {
    let done = AtomicBool::new(false);
    let command = async {
        let answer = command.await;
        done.store(true, Ordering::SeqCst);
        answer
    };
    let guests = edges.iter().zip(firsts);
    let guests = guests.map(|(edge, first)| Guest::new(edge, tape, first).write_on(&done));
    join(command, join_all(guests)).await
}

/// How often a guest writes for one command, at most.
const WRITES: usize = 12;

/// A guest: a write when a command begins, and others wherever that leads it and when a flush has been answered. While a flush is held
/// back it goes on writing.
struct Guest<'e> {
    edge: &'e Edge,
    tape: &'e Tape,
    first: u8,
    written: Vec<Written>,
    gone_back: Option<usize>,
    /// A flush that is not answered, and the last write that it covers.
    flush: Option<(usize, BoxFuture<'e, Result<()>>)>,
    /// One has been answered.
    is_answered: bool,
}

impl<'e> Guest<'e> {
    fn new(edge: &'e Edge, tape: &'e Tape, first: u8) -> Guest<'e> {
        Guest {
            edge,
            tape,
            first,
            written: Vec::new(),
            gone_back: None,
            flush: None,
            is_answered: false,
        }
    }

    async fn write_on(mut self, done: &AtomicBool) -> Beside {
        self.write().await;
        self.begin_flush();
        self.write().await;
        let mut led = self.edge.node();
        loop {
            let is_over = done.load(Ordering::SeqCst);
            let is_answered = self.flush_is_answered().await;
            let now = self.edge.node();
            let is_led = !Arc::ptr_eq(&now, &led);
            led = now;
            if is_over && self.flush.is_none() {
                break;
            }
            let goes_back = self.goes_back().await;
            if (is_led || is_answered || goes_back) && self.written.len() < WRITES {
                self.write().await;
                self.begin_flush();
                self.write().await;
            }
            tokio::task::yield_now().await;
        }
        self.goes_back().await;
        let over = self.written.len();
        self.write().await;
        self.begin_flush();
        while self.flush.is_some() {
            tokio::task::yield_now().await;
            self.flush_is_answered().await;
        }
        Beside {
            written: self.written,
            gone_back: self.gone_back,
            over,
        }
    }

    /// Looks whether its disk has lost what it has written: once.
    async fn goes_back(&mut self) -> bool {
        let last = self.written.iter().rfind(|written| written.is_done);
        let Some(last) = last.filter(|_| self.gone_back.is_none()) else {
            return false;
        };
        let last = last.byte;
        let edge = self.edge;
        let read = self.beside_flush(edge.read(PLACE, SECTOR)).await;
        let has_lost = read.is_ok_and(|data| data.to_bytes()[0] < last);
        if has_lost {
            self.gone_back = Some(self.written.len());
        }
        has_lost
    }

    async fn write(&mut self) {
        let byte = self.first + self.written.len() as u8;
        let begun = self.tape.len();
        let data = vec![byte; SECTOR as usize];
        let edge = self.edge;
        let written = edge.write(PLACE, data.into(), WriteFlags::default());
        let is_done = self.beside_flush(written).await.is_ok();
        self.written.push(Written {
            byte,
            is_done,
            begun,
            flushed: None,
        });
    }

    /// Flushes, unless a flush is under way.
    fn begin_flush(&mut self) {
        let last = self.written.iter().rposition(|written| written.is_done);
        if let (Some(last), None) = (last, &self.flush) {
            let edge = self.edge;
            self.flush = Some((last, Box::pin(async move { edge.flush().await })));
        }
    }

    /// Waits for a request while a flush goes on, as those of a guest do: neither waits for the other to be looked at.
    async fn beside_flush<T>(&mut self, request: impl Future<Output = T>) -> T {
        let mut request = pin!(request);
        poll_fn(|cx| {
            self.poll_flush(cx);
            request.as_mut().poll(cx)
        })
        .await
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) {
        if let Some((last, flush)) = &mut self.flush
            && let Poll::Ready(answer) = flush.poll_unpin(cx)
        {
            if answer.is_ok() {
                self.written[*last].flushed = Some(self.tape.len());
            }
            self.flush = None;
            self.is_answered = true;
        }
    }

    /// Looks whether a flush has been answered since this was asked.
    async fn flush_is_answered(&mut self) -> bool {
        poll_fn(|cx| {
            self.poll_flush(cx);
            Poll::Ready(())
        })
        .await;
        std::mem::take(&mut self.is_answered)
    }
}

/// The byte that a disk has where its guest writes, and the disk without it. An error if the sector is torn.
pub(super) fn split(mut content: Content) -> std::result::Result<(u8, Content), String> {
    let bytes = content.bytes(PLACE, SECTOR);
    content.zero(PLACE, SECTOR);
    match bytes.iter().all(|byte| *byte == bytes[0]) {
        true => Ok((bytes[0], content)),
        false => Err(format!("the guest's sector holds {bytes:?}")),
    }
}
