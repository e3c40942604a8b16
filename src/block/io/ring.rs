//! A thread with an io_uring: operations in by queue and eventfd, answers out by waking the task.
//!
//! The thread owns every operation from submission to completion in its table, so that neither memory nor
//! file go away under the kernel. It ends when the ring is dropped and its table is empty.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};

use io_uring::{IoUring, Probe, opcode, squeue, types};
use rustix::event::EventfdFlags;
use tokio::sync::oneshot;

use super::operation::{Operation, Progress};
use crate::limits::MAX_RING_IN_FLIGHT;

/// Entries of the submission queue: what one system call takes at most.
const ENTRIES: u32 = 256;
/// The completion token of the eventfd; operations use their index in the table.
const WAKE: u64 = u64::MAX;

/// A handle on the thread. Dropping it waits for what is in flight.
pub(crate) struct Ring {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    queue: Mutex<Queue>,
    wake: OwnedFd,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Submission>,
    closed: bool,
}

struct Submission {
    /// Boxed: the kernel holds pointers into it, so it must not move.
    operation: Box<Operation>,
    answer: oneshot::Sender<io::Result<Box<Operation>>>,
}

impl Ring {
    /// Starts the thread. Fails where the kernel refuses io_uring or lacks an operation.
    pub(crate) fn start() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            wake: rustix::event::eventfd(0, flags)?,
        });
        let (started, starting) = mpsc::channel();
        let thread = thread::Builder::new().name("block-ring".into()).spawn({
            let shared = shared.clone();
            move || match Driver::new(shared) {
                Ok(driver) => {
                    let _ = started.send(Ok(()));
                    driver.serve();
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                }
            }
        })?;
        starting
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the ring thread is gone")))?;
        Ok(Ring {
            shared,
            thread: Some(thread),
        })
    }

    /// Runs an operation to its end and gives it back.
    ///
    /// Cancellation: the operation runs to its end anyway.
    pub(crate) async fn run(&self, operation: Operation) -> io::Result<Operation> {
        let (answer, waiting) = oneshot::channel();
        let submission = Submission {
            operation: Box::new(operation),
            answer,
        };
        let first = {
            let mut queue = self.shared.lock();
            queue.waiting.push_back(submission);
            queue.waiting.len() == 1
        };
        // The thread takes the whole queue at once: whoever came first has woken it already.
        if first {
            self.shared.wake();
        }
        match waiting.await {
            Ok(result) => result.map(|operation| *operation),
            Err(_) => Err(io::Error::other("the ring thread is gone")),
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the thread is about to wake anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// What runs on the thread.
struct Driver {
    ring: IoUring,
    shared: Arc<Shared>,
    /// Operations that the kernel knows, by token.
    table: Vec<Option<Submission>>,
    free: Vec<usize>,
    /// Taken from the queue and not yet submitted: the table is full.
    backlog: VecDeque<Submission>,
    wake_armed: bool,
}

impl Driver {
    fn new(shared: Arc<Shared>) -> io::Result<Self> {
        // One thread submits and waits, so completions need not interrupt it. Kernels before 6.1 lack this.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(ENTRIES)
            .or_else(|_| IoUring::new(ENTRIES))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::PollAdd::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        Ok(Driver {
            ring,
            shared,
            table: Vec::new(),
            free: Vec::new(),
            backlog: VecDeque::new(),
            wake_armed: false,
        })
    }

    fn serve(mut self) {
        loop {
            let closed = self.take_queue();
            if closed && self.backlog.is_empty() && self.in_flight() == 0 {
                return;
            }
            while self.in_flight() < MAX_RING_IN_FLIGHT
                && let Some(submission) = self.backlog.pop_front()
            {
                self.submit(submission);
            }
            if !self.wake_armed {
                let poll = opcode::PollAdd::new(
                    types::Fd(self.shared.wake.as_raw_fd()),
                    libc::POLLIN as u32,
                );
                self.push(poll.build().user_data(WAKE));
                self.wake_armed = true;
            }
            if let Err(error) = self.ring.submit_and_wait(1)
                && !is_transient(&error)
            {
                log::error!("io_uring_enter: {error}");
            }
            self.complete();
        }
    }

    fn in_flight(&self) -> usize {
        self.table.len() - self.free.len()
    }

    fn take_queue(&mut self) -> bool {
        let mut queue = self.shared.lock();
        self.backlog.append(&mut queue.waiting);
        queue.closed
    }

    fn submit(&mut self, submission: Submission) {
        let token = self.free.pop().unwrap_or_else(|| {
            self.table.push(None);
            self.table.len() - 1
        });
        self.table[token] = Some(submission);
        self.resubmit(token);
    }

    fn resubmit(&mut self, token: usize) {
        if let Some(submission) = &mut self.table[token] {
            let entry = submission.operation.entry().user_data(token as u64);
            self.push(entry);
        }
    }

    fn push(&mut self, entry: squeue::Entry) {
        loop {
            // SAFETY: the entry points into a boxed operation that the table keeps until its completion, or to
            // the eventfd that `shared` keeps open.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            if pushed.is_ok() {
                return;
            }
            // Full: hand over what is there. Busy means completions must be taken first.
            if self.ring.submit().is_err() {
                self.complete();
            }
        }
    }

    fn complete(&mut self) {
        let done: Vec<(u64, i32)> = self
            .ring
            .completion()
            .map(|entry| (entry.user_data(), entry.result()))
            .collect();
        for (token, result) in done {
            if token == WAKE {
                self.wake_armed = false;
                let mut count = [0; 8];
                let _ = rustix::io::read(&self.shared.wake, &mut count);
            } else {
                self.complete_one(token as usize, result);
            }
        }
    }

    fn complete_one(&mut self, token: usize, result: i32) {
        let Some(submission) = self.table.get_mut(token).and_then(Option::as_mut) else {
            debug_assert!(false, "a completion without operation");
            return;
        };
        let progress = match usize::try_from(result) {
            Ok(count) => submission.operation.advance(count),
            Err(_) => match io::Error::from_raw_os_error(-result) {
                error if is_transient(&error) => Ok(Progress::More),
                error => Err(error),
            },
        };
        if let Ok(Progress::More) = progress {
            self.resubmit(token);
            return;
        }
        if let Some(Submission { operation, answer }) = self.table[token].take() {
            self.free.push(token);
            let _ = answer.send(progress.map(|_| operation));
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.in_flight() > 0 {
            // Only a panic leads here. The kernel may still write to the memory of these operations.
            std::mem::forget(std::mem::take(&mut self.table));
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
}
