//! Copies of disks in memory, under guests that write: what the target holds is what the source held.

use std::sync::{Arc, Mutex};

use super::{
    Copier, CopyHooks, CopyOptions, OnCopyError, PointInTime, Progress, Side, Source, SyncMode,
    TargetContent,
};
use crate::driver::{
    BlockStatus, BoxFuture, Child, Driver, Preallocation, RequestLimits, Requests, SnapshotSource,
    Snapshots, WriteFlags, ZeroFlags,
};
use crate::error::{Error, Result};
use crate::filters::copy_before_write::CopyBeforeWrite;
use crate::formats::qcow2::create::{CreateOptions, create};
use crate::formats::qcow2::{OpenOptions, Qcow2};
use crate::formats::raw::Raw;
use crate::io::Data;
use crate::protocols::memory::Memory;

mod before;
mod faults;
mod learnt;
mod model;
mod relief;
mod rest;
mod share;

/// An owner that lets a copy go on, and answers errors as it is told.
struct Owner {
    action: OnCopyError,
    errors: Mutex<Vec<(Side, String)>>,
    last: Mutex<Progress>,
}

impl Owner {
    fn new(action: OnCopyError) -> Arc<Self> {
        Arc::new(Owner {
            action,
            errors: Mutex::default(),
            last: Mutex::default(),
        })
    }

    fn strict() -> Arc<Self> {
        Self::new(OnCopyError::Fail)
    }
}

impl CopyHooks for Owner {
    fn admit(&self, _bytes: u64) -> BoxFuture<'_, ()> {
        Box::pin(tokio::task::yield_now())
    }

    fn progress(&self, progress: Progress) {
        let mut last = self.last.lock().unwrap();
        assert!(progress.done <= progress.total, "{progress:?}");
        if progress.done > last.done {
            *last = progress;
        }
    }

    fn on_error(&self, side: Side, error: &Error) -> BoxFuture<'_, OnCopyError> {
        self.errors.lock().unwrap().push((side, error.to_string()));
        Box::pin(async { self.action })
    }
}

/// A disk that takes a while for each request, so that others come in between.
struct Jitter {
    inner: Arc<dyn Driver>,
    random: Mutex<fastrand::Rng>,
    most: usize,
}

impl Jitter {
    fn new(inner: Arc<dyn Driver>, seed: u64, most: usize) -> Arc<Self> {
        Arc::new(Jitter {
            inner,
            random: Mutex::new(fastrand::Rng::with_seed(seed)),
            most,
        })
    }

    fn around<'a, T: Send + 'a>(&self, request: BoxFuture<'a, T>) -> BoxFuture<'a, T> {
        let (before, after) = {
            let mut random = self.random.lock().unwrap();
            (random.usize(0..=self.most), random.usize(0..=self.most))
        };
        Box::pin(async move {
            for _ in 0..before {
                tokio::task::yield_now().await;
            }
            let answer = request.await;
            for _ in 0..after {
                tokio::task::yield_now().await;
            }
            answer
        })
    }
}

impl Requests for Jitter {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> RequestLimits {
        self.inner.limits()
    }

    fn read(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        self.around(self.inner.read(offset, len))
    }

    fn write(&self, offset: u64, data: Data, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        self.around(self.inner.write(offset, data, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        self.around(self.inner.write_zeroes(offset, len, flags))
    }

    fn write_compressed(&self, offset: u64, data: Data) -> BoxFuture<'_, Result<()>> {
        self.around(self.inner.write_compressed(offset, data))
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        self.around(self.inner.discard(offset, len))
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        self.around(self.inner.flush())
    }

    fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        self.around(self.inner.block_status(offset, len))
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        self.around(self.inner.resize(size, preallocation))
    }
}

impl SnapshotSource for Jitter {
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        self.inner.snapshots()
    }
}

/// What a disk of the tests is stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Raw,
    /// Clusters of so many bytes.
    Qcow2(u64),
}

/// An empty disk of a format, over a backing if there is one. The first answer is the file.
async fn disk(format: Format, size: u64, backing: Option<Child>) -> (Arc<Memory>, Arc<dyn Driver>) {
    match format {
        Format::Raw => {
            let memory = Memory::new(size);
            let raw = Raw::new(memory.child(), String::new(), None, None).unwrap();
            (memory, Arc::new(raw))
        }
        Format::Qcow2(cluster_size) => {
            let memory = Memory::new(0);
            let options = CreateOptions {
                cluster_size,
                ..CreateOptions::new(size)
            };
            create(&memory.child(), &options).await.unwrap();
            (memory.clone(), open(&memory, backing).await)
        }
    }
}

async fn open(memory: &Arc<Memory>, backing: Option<Child>) -> Arc<Qcow2> {
    let opening = Qcow2::open(memory.child(), OpenOptions::default()).await;
    opening.unwrap().finish(backing).await.unwrap()
}

async fn content(disk: &dyn Requests) -> Vec<u8> {
    let data = disk.read(0, disk.size()).await.unwrap();
    data.to_bytes().to_vec()
}

async fn put(disk: &dyn Requests, offset: u64, bytes: Vec<u8>) -> Result<()> {
    disk.write(offset, Data::from(bytes), WriteFlags::default())
        .await
}

#[track_caller]
fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: size");
    if let Some(at) = (0..found.len()).find(|&at| found[at] != expected[at]) {
        panic!(
            "{what}: byte {at:#x} is {:#x} and not {:#x}",
            found[at], expected[at]
        );
    }
}

/// A copy with its filter, not active yet.
struct Setup {
    copier: Arc<Copier>,
    guest: Arc<CopyBeforeWrite>,
    source: Arc<Jitter>,
    target: Arc<Jitter>,
}

fn setup(source: Arc<Jitter>, target: Arc<Jitter>, options: CopyOptions) -> Setup {
    let from = Source {
        disk: source.clone(),
        snapshots: source.clone(),
    };
    let copier = Copier::new(from, target.clone(), options).unwrap();
    let guest = CopyBeforeWrite::new(
        Child::new(source.clone()),
        Child::new(target.clone()),
        copier.before_change(),
        String::new(),
    );
    Setup {
        copier: Arc::new(copier),
        guest: Arc::new(guest),
        source,
        target,
    }
}
