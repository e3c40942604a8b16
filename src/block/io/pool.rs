//! Threads for system calls that block and that no ring takes.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use tokio::sync::oneshot;

use crate::limits::MAX_POOL_THREADS;

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
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
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
        call: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (answer, waiting) = oneshot::channel();
        self.push(Box::new(move || {
            let _ = answer.send(call());
        }))?;
        waiting
            .await
            .unwrap_or_else(|_| Err(io::Error::other("a blocking call panicked")))
    }

    fn push(&self, job: Job) -> io::Result<()> {
        let mut queue = self.shared.lock();
        queue.jobs.push_back(job);
        if queue.idle >= queue.jobs.len() {
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
                self.shared.lock().jobs.clear();
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
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                job();
                queue = self.lock();
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
