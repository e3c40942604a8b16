//! Threads with a scheduler each, for what serves clients and what copies disks.
//!
//! Work stays on the thread that it was given: a client's request is woken, served and answered without another thread being asked,
//! and a piece of a copy is written by the thread that has read it. (A work-stealing scheduler answers a quarter fewer small
//! requests per second: with one connection it wakes a second thread for nothing. And what it wakes while a copy writes waits for the end
//! of the write.) Control work stays off these threads: writes to the page cache run on them, which may hold one up now and then.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use super::inline::{InlineThread, allow_inline_writes};

/// A set of threads, each started when it is first needed. Cheap to clone; the last clone to go ends the threads and
/// what still runs on them, and waits for that, but for the thread that it is on itself.
#[derive(Clone)]
pub struct IoThreads(Arc<Threads>);

impl fmt::Debug for IoThreads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IoThreads").field(&self.0.name).finish()
    }
}

struct Threads {
    name: &'static str,
    most: usize,
    inline: InlineThread,
    started: Mutex<Vec<IoThread>>,
}

struct IoThread {
    handle: Handle,
    /// Every seat holds a clone, so their number is the thread's load.
    load: Arc<()>,
    /// Dropping it ends the thread.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

/// A place on a thread, until it is dropped.
pub struct Seat {
    handle: Handle,
    _load: Arc<()>,
}

impl Seat {
    /// What to spawn on.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl IoThreads {
    /// At most `most` threads, at least one, which do this. They are named `name` and a number.
    pub fn new(name: &'static str, inline: InlineThread, most: usize) -> Self {
        IoThreads(Arc::new(Threads {
            name,
            most: most.max(1),
            inline,
            started: Mutex::default(),
        }))
    }

    /// As many as the machine runs at a time.
    pub fn for_this_machine(name: &'static str, inline: InlineThread) -> Self {
        let most = thread::available_parallelism().map_or(1, usize::from);
        IoThreads::new(name, inline, most)
    }

    /// A place on the thread with the fewest taken. Fails only when no thread can be started at all.
    pub fn seat(&self) -> io::Result<Seat> {
        let mut started = self.0.started();
        let full = started.len() >= self.0.most;
        let any_free = started.iter().any(|thread| thread.seats() == 0);
        if !full && !any_free {
            match IoThread::start(&self.0, started.len()) {
                Ok(thread) => started.push(thread),
                Err(error) if started.is_empty() => return Err(error),
                Err(error) => log::warn!("Could not start one more I/O thread: {error}"),
            }
        }
        let least = started.iter().min_by_key(|thread| thread.seats());
        let least = least.ok_or_else(|| io::Error::other("no I/O thread"))?;
        Ok(Seat {
            handle: least.handle.clone(),
            _load: least.load.clone(),
        })
    }
}

impl Threads {
    fn started(&self) -> MutexGuard<'_, Vec<IoThread>> {
        self.started.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IoThread {
    fn start(of: &Threads, number: usize) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let inline = of.inline;
        let thread = thread::Builder::new()
            .name(format!("{}-{number}", of.name))
            .spawn(move || {
                allow_inline_writes(inline);
                // Nothing is ever sent: the sender is dropped, which is an error here and the end.
                let _ = runtime.block_on(stopped);
            })?;
        Ok(IoThread {
            handle,
            load: Arc::new(()),
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    fn seats(&self) -> usize {
        Arc::strong_count(&self.load) - 1
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop = None;
        let Some(thread) = self.thread.take() else {
            return;
        };
        if thread.thread().id() == thread::current().id() {
            // What ran here had the last clone. The thread ends when that has, and cannot wait for itself.
            return;
        }
        if thread.join().is_err() {
            log::error!("An I/O thread has failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_spread_over_the_threads_and_the_threads_end() {
        let threads = IoThreads::new("export", InlineThread::Guests, 2);
        let names = |seats: &[Seat]| {
            let name = |seat: &Seat| {
                let (sender, receiver) = std::sync::mpsc::channel();
                seat.handle()
                    .spawn(async move { sender.send(thread::current().name().map(str::to_owned)) });
                receiver.recv().unwrap().unwrap()
            };
            seats.iter().map(name).collect::<Vec<_>>()
        };
        let mut seats: Vec<Seat> = (0..3).map(|_| threads.seat().unwrap()).collect();
        assert_eq!(names(&seats), ["export-0", "export-1", "export-0"]);
        seats.remove(1);
        seats.push(threads.seat().unwrap());
        assert_eq!(names(&seats), ["export-0", "export-0", "export-1"]);
        let running = seats[0].handle().spawn(std::future::pending::<()>());
        drop(threads);
        assert!(running.is_finished(), "what runs ends with the threads");
    }

    #[test]
    fn a_thread_may_let_go_of_the_last_clone() {
        let threads = IoThreads::new("copy", InlineThread::Copies, 1);
        let seat = threads.seat().unwrap();
        let (begin, begun) = oneshot::channel();
        let (sender, receiver) = std::sync::mpsc::channel();
        let last = seat.handle().spawn(async move {
            begun.await.unwrap();
            drop(threads);
            sender.send(()).unwrap();
        });
        begin.send(()).unwrap();
        receiver.recv().unwrap();
        drop(last);
    }
}
