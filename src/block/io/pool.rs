//! Threads for system calls that block and that no ring takes.
//!
//! Calls begin in the order in which they come, but for those that make something durable: so many of these are under way at most
//! that threads are left for others. A hundred disks may be flushed at once, and a guest's write must not wait for that.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use tokio::sync::oneshot;

use crate::limits::{MAX_POOL_FLUSHES, MAX_POOL_THREADS};

/// What a call waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waits {
    /// Nothing for long, as a rule.
    Little,
    /// The disk, to make something durable.
    ForDisk,
}

/// A pool that grows to `MAX_POOL_THREADS` while work waits. Its owner is the `IoContext`; dropping it
/// finishes what is queued and joins the threads.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
}

#[derive(Default)]
struct Queue {
    /// Each with its turn.
    jobs: VecDeque<(u64, Job)>,
    /// Those that wait for the disk, and how many of them are under way.
    flushes: VecDeque<(u64, Job)>,
    flushing: usize,
    /// Of the next job.
    turn: u64,
    idle: usize,
    closed: bool,
}

impl Queue {
    fn push(&mut self, job: Job, waits: Waits) {
        let lane = match waits {
            Waits::Little => &mut self.jobs,
            Waits::ForDisk => &mut self.flushes,
        };
        lane.push_back((self.turn, job));
        self.turn += 1;
    }

    /// How many jobs may begin now.
    fn ready(&self) -> usize {
        let flushes = MAX_POOL_FLUSHES.saturating_sub(self.flushing);
        self.jobs.len() + self.flushes.len().min(flushes)
    }

    /// The job whose turn it is. A flush is counted until `Queue::flushed`.
    fn pop(&mut self) -> Option<(Job, Waits)> {
        let turn = |lane: &VecDeque<(u64, Job)>| lane.front().map(|(turn, _)| *turn);
        let may_flush = self.flushing < MAX_POOL_FLUSHES;
        let flush = turn(&self.flushes).filter(|_| may_flush);
        let (lane, waits) = match (turn(&self.jobs), flush) {
            (Some(job), Some(flush)) if flush < job => (&mut self.flushes, Waits::ForDisk),
            (None, Some(_)) => (&mut self.flushes, Waits::ForDisk),
            _ => (&mut self.jobs, Waits::Little),
        };
        let (_, job) = lane.pop_front()?;
        self.flushing += usize::from(waits == Waits::ForDisk);
        Some((job, waits))
    }
}

type Job = Box<dyn FnOnce() + Send>;

impl Pool {
    pub(crate) fn new() -> Self {
        Pool {
            shared: Arc::default(),
            threads: Mutex::default(),
        }
    }

    /// Runs `call` on a thread of the pool.
    ///
    /// Cancellation: the call runs to its end anyway; its result is dropped.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        waits: Waits,
        call: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (answer, waiting) = oneshot::channel();
        let job = Box::new(move || {
            let _ = answer.send(call());
        });
        self.push(job, waits)?;
        waiting
            .await
            .unwrap_or_else(|_| Err(io::Error::other("a blocking call panicked")))
    }

    /// Has a call begun, in its turn, without waiting for it.
    pub(super) fn push(&self, job: Job, waits: Waits) -> io::Result<()> {
        let mut queue = self.shared.lock();
        let ready = queue.ready();
        queue.push(job, waits);
        if queue.ready() == ready {
            // A flush that another one is to end for.
            return Ok(());
        }
        if queue.idle >= queue.ready() {
            drop(queue);
            self.shared.work.notify_one();
            return Ok(());
        }
        drop(queue);
        self.grow()
    }

    /// Adds a thread if there may be one more. Work that is queued already is done by the others otherwise.
    fn grow(&self) -> io::Result<()> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if threads.len() >= MAX_POOL_THREADS {
            self.shared.work.notify_one();
            return Ok(());
        }
        let shared = self.shared.clone();
        let spawned = thread::Builder::new()
            .name(format!("block-io-{}", threads.len()))
            .spawn(move || shared.serve());
        match spawned {
            Ok(thread) => threads.push(thread),
            // The job waits for one of the threads that there are.
            Err(_) if !threads.is_empty() => self.shared.work.notify_one(),
            Err(error) => {
                let mut queue = self.shared.lock();
                queue.jobs.clear();
                queue.flushes.clear();
                return Err(error);
            }
        }
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut queue = self.lock();
        loop {
            if let Some((job, waits)) = queue.pop() {
                drop(queue);
                job();
                queue = self.lock();
                if waits == Waits::ForDisk {
                    queue.flushing -= 1;
                    if queue.idle > 0 && queue.ready() > 1 {
                        self.work.notify_one();
                    }
                }
            } else if queue.closed {
                return;
            } else {
                queue.idle += 1;
                queue = self
                    .work
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.work.notify_all();
        let threads = std::mem::take(
            self.threads
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for thread in threads {
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::future::join_all;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test]
    async fn flushes_leave_threads_to_others_and_all_of_them_end() {
        let pool = Pool::new();
        let hangs = Arc::new(AtomicBool::new(true));
        let flushes = (0..2 * MAX_POOL_THREADS).map(|_| {
            let hangs = hangs.clone();
            let flush = move || {
                while hangs.load(Ordering::SeqCst) {
                    thread::sleep(Duration::from_millis(1));
                }
                Ok(())
            };
            Box::pin(pool.run(Waits::ForDisk, flush))
        });
        let mut flushes = join_all(flushes);
        let none = timeout(Duration::from_millis(20), &mut flushes).await;
        assert!(none.is_err());
        for number in 0..2 * MAX_POOL_THREADS {
            let quick = pool.run(Waits::Little, move || Ok(number));
            let answer = timeout(Duration::from_secs(60), quick).await;
            assert_eq!(answer.unwrap().unwrap(), number);
        }
        hangs.store(false, Ordering::SeqCst);
        for flushed in flushes.await {
            flushed.unwrap();
        }
        assert!(pool.threads.lock().unwrap().len() <= MAX_POOL_THREADS);
        // A thread answers before it says that it has flushed; when the pool is gone all have ended.
        let shared = pool.shared.clone();
        drop(pool);
        assert_eq!(shared.lock().flushing, 0);
    }
}
