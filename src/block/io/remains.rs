//! What is left of files that have lost their names: the space that they take.
//!
//! A file system gives it back with the last handle, which may take milliseconds for each piece (ext4 without a journal, on a disk that is
//! told what is free) or much longer for a large file in many pieces. Names are gone at once; nobody has to wait for the rest.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{Mode, OFlags, fstatfs, open};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::limits::MAX_REMAINS;

/// Keeps a file from being given back, whatever becomes of its names. Dropping it waits for the disk.
#[derive(Debug)]
#[must_use]
pub struct Remains {
    _file: Option<OwnedFd>,
}

impl Remains {
    /// Of the file of this name, which is about to lose it. Nothing is kept where that is not possible: the file is given back with its
    /// name then.
    pub fn of(path: &Path) -> Remains {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = open(path, flags, Mode::empty()).ok();
        Remains {
            _file: file.filter(|file| !is_renamed_when_removed(file)),
        }
    }
}

/// What is to be given back, by one thread, in order.
#[derive(Clone)]
pub(super) struct Heap(Arc<Inner>);

struct Inner {
    waiting: Mutex<Waiting>,
    room: Arc<Semaphore>,
}

#[derive(Default)]
struct Waiting {
    batches: VecDeque<(Vec<Remains>, Option<OwnedSemaphorePermit>)>,
    /// Somebody is at it.
    is_served: bool,
}

impl Heap {
    pub(super) fn new() -> Self {
        Heap(Arc::new(Inner {
            waiting: Mutex::default(),
            room: Arc::new(Semaphore::new(MAX_REMAINS as usize)),
        }))
    }

    /// Puts more on the heap, once there is room. Answers a service if nobody is at it: to be dropped where waiting does no harm.
    pub(super) async fn add(&self, remains: Vec<Remains>) -> Option<Service> {
        let count = u32::try_from(remains.len()).unwrap_or(MAX_REMAINS);
        let room = self.0.room.clone();
        let room = room.acquire_many_owned(count.min(MAX_REMAINS)).await;
        let mut waiting = self.0.lock();
        waiting.batches.push_back((remains, room.ok()));
        let is_served = std::mem::replace(&mut waiting.is_served, true);
        (!is_served).then(|| Service(self.clone()))
    }

    /// Gives back all that is there, and what comes meanwhile.
    fn serve(&self) {
        loop {
            let mut waiting = self.0.lock();
            let Some(batch) = waiting.batches.pop_front() else {
                waiting.is_served = false;
                return;
            };
            drop(waiting);
            drop(batch);
        }
    }
}

/// Serves the heap when it is dropped, also by those who cannot do it elsewhere.
pub(super) struct Service(Heap);

impl Drop for Service {
    fn drop(&mut self) {
        self.0.serve();
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the file system gives a file that somebody has open another name in its place, which a crash would leave.
fn is_renamed_when_removed(file: &OwnedFd) -> bool {
    const NFS: u64 = 0x6969;
    fstatfs(file).is_ok_and(|system| system.f_type as u64 == NFS)
}

#[cfg(test)]
mod tests {
    use rustix::fs::fstat;

    use super::*;

    #[tokio::test]
    async fn a_file_that_was_removed_takes_its_space_until_its_remains_are_released() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, vec![1; 1 << 16]).unwrap();
        let remains = Remains::of(&path);
        std::fs::remove_file(&path).unwrap();
        let file = remains._file.as_ref().unwrap().try_clone().unwrap();
        let left = fstat(&file).unwrap();
        assert_eq!(left.st_nlink, 0);
        assert!(left.st_blocks > 0);
        assert!(Remains::of(&path)._file.is_none(), "nothing is there");

        let io = crate::io::IoContext::new();
        for batch in [vec![remains], vec![Remains::of(folder.path())], Vec::new()] {
            io.release(batch).await;
        }
        let many = (0..2 * MAX_REMAINS).map(|_| Remains { _file: None });
        io.release(many.collect()).await;
        io.release(vec![Remains { _file: None }]).await;
        // The last clone waits for what is under way.
        drop(io);
        let open = std::fs::read_dir("/proc/self/fd").unwrap();
        let open = open.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
        let deleted = path.display().to_string() + " (deleted)";
        let ours = open.filter(|target| target.as_os_str() == deleted.as_str());
        assert_eq!(ours.count(), 1, "that of this test alone");
    }
}
