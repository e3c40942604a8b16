//! A disk in memory whose failures, delays and history a test controls.
//!
//! It behaves as a file does: sparse, growing when written behind its end, full when its space limit is
//! reached. A test can make the n-th request of a kind fail, hold requests back and release them in any
//! order, and read a log of everything that changed the disk with the order of issue and completion, from
//! which the states that a crash may leave can be made.
//!
//! Held requests belong to the disk and not to the future that waits for them: as with a kernel, dropping the
//! future does not stop the request. It still happens when it is released.

mod state;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, oneshot};

use crate::driver::{
    BlockStatus, BoxFuture, Child, Driver, DriverInfo, Preallocation, RequestLimits, Requests,
    WriteFlags, ZeroFlags,
};
use crate::error::{Error, ErrorKind, Result};
use crate::io::Data;

use state::{Answer, Held, Request, Rule, SharedTape, State};

/// The unit of allocation in bytes.
pub const PAGE: u64 = 4096;

/// The kinds of requests that can be made to fail or wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpKind {
    /// `read`
    Read,
    /// `write`
    Write,
    /// `write_zeroes`
    WriteZeroes,
    /// `discard`
    Discard,
    /// `flush`
    Flush,
    /// `block_status`
    BlockStatus,
    /// `resize`
    Resize,
}

/// How a request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// EIO, and nothing has happened.
    Io,
    /// ENOSPC, and nothing has happened.
    NoSpace,
    /// EIO after this many bytes of a write, zero write or discard have happened.
    Torn(u64),
}

/// What changed the disk.
#[derive(Debug, Clone)]
pub enum Change {
    /// Bytes were written.
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Data,
        /// Durable by itself.
        fua: bool,
    },
    /// Zeroes were written.
    WriteZeroes {
        /// Where.
        offset: u64,
        /// How many.
        len: u64,
        /// Durable by itself.
        fua: bool,
    },
    /// A range was discarded.
    Discard {
        /// Where.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// The size changed.
    Resize {
        /// To what.
        size: u64,
    },
    /// Everything completed before `issued` of this record is durable at `completed`.
    Flush,
}

/// A line of the log. `issued` and `completed` count events of the disk: a smaller number came earlier.
#[derive(Debug, Clone)]
pub struct Record {
    /// Which of the disks with one log: 0 for the first one.
    pub disk: usize,
    /// When the request came in.
    pub issued: u64,
    /// When it was applied. Requests still held have no record yet, and those that failed never get one
    /// (the front of a write that failed in its middle has).
    pub completed: u64,
    /// What it did.
    pub change: Change,
}

/// The disk. Share it in an [`Arc`]: the test keeps one handle and the node above has another.
#[derive(Debug, Default)]
pub struct Memory {
    state: Mutex<State>,
    /// The disks beside this one, whose changes are in the same log.
    others: Vec<Arc<Memory>>,
    /// Told whenever a request is put into `State::held`.
    held: Notify,
}

impl Memory {
    /// An empty disk of `size` bytes that grows when written behind its end, as a file does.
    pub fn new(size: u64) -> Arc<Self> {
        let memory = Memory::default();
        memory.state().size = size;
        Arc::new(memory)
    }

    /// Two empty disks, one beside the other, whose requests have one order and one log: that of the first, which is answered.
    pub fn pair() -> Arc<Self> {
        Memory::group(2)
    }

    /// As many empty disks beside each other, at least one, as [`Memory::pair`].
    pub fn group(count: usize) -> Arc<Self> {
        let tape = SharedTape::default();
        let empty = Memory::default();
        let others = (1..count).map(|number| empty.copy(&tape, number, Vec::new()));
        empty.copy(&tape, 0, others.collect())
    }

    /// The disk beside this one.
    pub fn second(&self) -> Option<&Arc<Memory>> {
        self.others.first()
    }

    /// A disk that starts with these bytes.
    pub fn with_content(content: &[u8]) -> Arc<Self> {
        let memory = Memory::new(content.len() as u64);
        for (index, page) in content.chunks(PAGE as usize).enumerate() {
            let mut bytes = [0; PAGE as usize];
            bytes[..page.len()].copy_from_slice(page);
            if bytes.iter().any(|byte| *byte != 0) {
                memory.state().pages.insert(index as u64, Arc::new(bytes));
            }
        }
        memory
    }

    /// A disk of its own with the same bytes, without faults, holds or log, beside forks of the others. Pages are
    /// shared until written, so this is cheap: the way to keep the state before a crash.
    pub fn fork(&self) -> Arc<Self> {
        let tape = SharedTape::default();
        let others = self.others.iter().zip(1..);
        let others = others.map(|(other, number)| other.copy(&tape, number, Vec::new()));
        self.copy(&tape, 0, others.collect())
    }

    fn copy(&self, tape: &SharedTape, number: usize, others: Vec<Arc<Self>>) -> Arc<Self> {
        let state = self.state();
        let copy = State {
            pages: state.pages.clone(),
            size: state.size,
            limits: state.limits,
            space_limit: state.space_limit,
            number,
            tape: tape.clone(),
            ..State::default()
        };
        Arc::new(Memory {
            state: Mutex::new(copy),
            others,
            held: Notify::new(),
        })
    }

    /// A handle for the layer above.
    pub fn child(self: &Arc<Self>) -> Child {
        Child::new(self.clone())
    }

    /// All bytes.
    pub fn content(&self) -> Vec<u8> {
        let state = self.state();
        let mut content = vec![0; state.size as usize];
        for (index, page) in &state.pages {
            let at = (index * PAGE) as usize;
            let len = content.len().saturating_sub(at).min(PAGE as usize);
            if len > 0 {
                content[at..at + len].copy_from_slice(&page[..len]);
            }
        }
        content
    }

    /// A number that differs, as good as always, for disks of different size or content. The other disks count too.
    pub fn digest(&self) -> u64 {
        let add = |sum: u64, other: &Arc<Memory>| sum.rotate_left(17) ^ other.digest();
        let others = self.others.iter().fold(0, add);
        let state = self.state();
        let mut digest = state.size ^ others.rotate_left(17);
        for (index, page) in &state.pages {
            let mut sum = *index;
            let mut any = 0;
            for word in page.as_chunks::<8>().0 {
                let word = u64::from_le_bytes(*word);
                any |= word;
                sum = (sum ^ word)
                    .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                    .rotate_left(29);
            }
            if any != 0 {
                digest = (digest ^ sum)
                    .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                    .rotate_left(31);
            }
        }
        digest
    }

    /// Bytes as they are, without a request.
    pub fn peek(&self, offset: u64, len: u64) -> Data {
        self.state().read(offset, len)
    }

    /// Bytes of memory in use: pages that were written and not discarded.
    pub fn allocated(&self) -> u64 {
        self.state().pages.len() as u64 * PAGE
    }

    /// From now on, fails with ENOSPC what would need more than `limit` bytes in pages. As on a file system, a
    /// write that runs out of space has written its front. `None` lifts the limit.
    pub fn set_space_limit(&self, limit: Option<u64>) {
        self.state().space_limit = limit;
    }

    /// What the node above sees as limits.
    pub fn set_limits(&self, limits: RequestLimits) {
        self.state().limits = limits;
    }

    /// Fails one request: after `skip` more of this kind have passed.
    pub fn fail_once(&self, kind: OpKind, skip: u64, fault: Fault) {
        self.add_rule(kind, skip, fault, true);
    }

    /// Fails every request of this kind after `skip` more have passed, until [`Memory::clear_faults`].
    pub fn fail_from(&self, kind: OpKind, skip: u64, fault: Fault) {
        self.add_rule(kind, skip, fault, false);
    }

    /// Lifts all faults that have not happened yet.
    pub fn clear_faults(&self) {
        self.state().faults.clear();
    }

    /// How many requests of this kind came in so far, including those that failed.
    pub fn count(&self, kind: OpKind) -> u64 {
        self.state().counts[kind as usize]
    }

    /// Holds back requests of this kind from now on.
    pub fn hold(&self, kind: OpKind) {
        let mut state = self.state();
        if !state.holding.contains(&kind) {
            state.holding.push(kind);
        }
    }

    /// How many requests wait for their release.
    pub fn held(&self) -> usize {
        self.state().held.len()
    }

    /// Waits until at least `count` requests are held. Cancellation: safe.
    pub async fn wait_held(&self, count: usize) {
        loop {
            let notified = self.held.notified();
            if self.held() >= count {
                return;
            }
            notified.await;
        }
    }

    /// Lets the held request number `index` (0 is the oldest) happen now, and holds on to the others.
    /// Answers whether there was one.
    pub fn release_one(&self, index: usize) -> bool {
        let mut state = self.state();
        let held = state.held.remove(index);
        let found = held.is_some();
        if let Some(held) = held {
            state.finish(held);
        }
        found
    }

    /// Holds no request from now on, and lets the held ones happen, oldest first.
    pub fn release_all(&self) {
        let mut state = self.state();
        state.holding.clear();
        while let Some(held) = state.held.pop_front() {
            state.finish(held);
        }
    }

    /// Starts a new log.
    pub fn start_log(&self) {
        self.state().tape().log = Some(Vec::new());
    }

    /// The log since `start_log`, in order of completion.
    pub fn log(&self) -> Vec<Record> {
        self.state().tape().log.clone().unwrap_or_default()
    }

    /// How many records the log has.
    pub fn log_len(&self) -> usize {
        self.state().tape().log.as_ref().map_or(0, Vec::len)
    }

    /// Applies a change of a log to this disk: how a crash state is built on a [`Memory::fork`].
    pub fn apply(&self, change: &Change) -> Result<()> {
        self.state().apply(change)
    }

    /// This disk, or one beside it, by the number that records have.
    ///
    /// # Panics
    /// When there is none with this number.
    pub fn numbered(&self, disk: usize) -> &Memory {
        match disk.checked_sub(1).map(|other| self.others.get(other)) {
            None => self,
            Some(Some(other)) => other,
            Some(None) => panic!("there is no disk number {disk}"),
        }
    }

    fn add_rule(&self, kind: OpKind, skip: u64, fault: Fault, once: bool) {
        self.state().faults.push(Rule {
            kind,
            skip,
            fault,
            once,
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A test that panics elsewhere must not hide behind a second panic here.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(&self, request: Request) -> Result<Answer> {
        let waiting = {
            let mut state = self.state();
            let kind = request.kind();
            let issued = state.tick();
            state.counts[kind as usize] += 1;
            let (answer, waiting) = oneshot::channel();
            let held = Held {
                request,
                issued,
                answer,
            };
            if state.holding.contains(&kind) {
                state.held.push_back(held);
                self.held.notify_waiters();
            } else {
                state.finish(held);
            }
            waiting
        };
        waiting
            .await
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "memory disk is gone")))
    }

    async fn change(&self, change: Change) -> Result<()> {
        self.run(Request::Change(change)).await.map(|_| ())
    }
}

impl Change {
    /// The change cut down to its first `max` bytes; a resize or flush is left whole or not done at all.
    fn front(&self, max: u64) -> Change {
        match self {
            Change::Write { offset, data, fua } => Change::Write {
                offset: *offset,
                data: data.slice(0, max.min(data.len())),
                fua: *fua,
            },
            Change::WriteZeroes { offset, len, fua } => Change::WriteZeroes {
                offset: *offset,
                len: max.min(*len),
                fua: *fua,
            },
            Change::Discard { offset, len } => Change::Discard {
                offset: *offset,
                len: max.min(*len),
            },
            Change::Resize { .. } | Change::Flush => Change::Discard { offset: 0, len: 0 },
        }
    }
}

impl Requests for Memory {
    fn size(&self) -> u64 {
        self.state().size
    }

    fn limits(&self) -> RequestLimits {
        self.state().limits
    }

    fn read(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        Box::pin(async move {
            self.state().check_range(offset, len)?;
            match self.run(Request::Read { offset, len }).await? {
                Answer::Read(data) => Ok(data),
                answer => unreachable!("a read was answered with {answer:?}"),
            }
        })
    }

    fn write(&self, offset: u64, data: Data, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.change(Change::Write {
            offset,
            data,
            fua: flags.fua,
        }))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.change(Change::WriteZeroes {
            offset,
            len,
            fua: flags.fua,
        }))
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.change(Change::Discard { offset, len }))
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.change(Change::Flush))
    }

    fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        Box::pin(async move {
            self.state().check_range(offset, len)?;
            match self.run(Request::BlockStatus { offset, len }).await? {
                Answer::BlockStatus(status) => Ok(status),
                answer => unreachable!("a status request was answered with {answer:?}"),
            }
        })
    }

    fn resize(&self, size: u64, _preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.change(Change::Resize { size }))
    }
}

impl Driver for Memory {
    fn info(&self) -> DriverInfo {
        DriverInfo {
            driver: "memory",
            actual_size: Some(self.allocated()),
            ..DriverInfo::default()
        }
    }

    fn children(&self) -> Vec<(&'static str, Child)> {
        Vec::new()
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

#[cfg(test)]
mod tests;
