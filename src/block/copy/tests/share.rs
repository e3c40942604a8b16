//! Targets that share what the source holds, beside guests: what is shared is what the source held at the point in time.
//!
//! The source is a real file. The target takes what it is to share by reading it late, with guests in between if they are let in, and
//! refuses or fails at random moments. What file systems really do is in the integration tests.

use std::sync::atomic::{AtomicU64, Ordering};

use super::model::{SIZE, fill, guest, noise, rounds, rude_guest};
use super::*;
use crate::error::ErrorKind;
use crate::io::{HostRange, IoContext};
use crate::open::{Aio, FileOptions, Locking};
use crate::protocols::file::{File, FileAccess};

/// A target that can share.
struct Sharing {
    inner: Arc<Jitter>,
    random: Mutex<fastrand::Rng>,
    /// Requests to share until one does not succeed, and how that ends.
    left: AtomicU64,
    end: ErrorKind,
    shared: AtomicU64,
}

impl Requests for Sharing {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> RequestLimits {
        self.inner.limits()
    }

    fn read(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        self.inner.read(offset, len)
    }

    fn write(&self, offset: u64, data: Data, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        self.inner.write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        self.inner.write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        self.inner.discard(offset, len)
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        self.inner.flush()
    }

    fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        self.inner.block_status(offset, len)
    }

    fn write_shared(&self, offset: u64, from: HostRange) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let turns = self.random.lock().unwrap().usize(0..60);
            for _ in 0..turns {
                tokio::task::yield_now().await;
            }
            let fewer = |left: u64| left.checked_sub(1);
            let left = self
                .left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer);
            let part = match left {
                Ok(_) => from.len(),
                // Whatever it has done by then: half of it.
                Err(_) => from.len() / 2,
            };
            let bytes = from.slice(0, part).content().unwrap();
            put(&*self.inner, offset, bytes).await?;
            if part < from.len() {
                return Err(Error::new(self.end, "no more is shared"));
            }
            self.shared.fetch_add(part, Ordering::Relaxed);
            Ok(())
        })
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        self.inner.resize(size, preallocation)
    }
}

/// An empty file, with its name gone as soon as it is open.
async fn file(size: u64) -> Child {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size).unwrap();
    let options = FileOptions {
        filename: file.path().display().to_string(),
        aio: Aio::Threads,
        locking: Locking::Off,
    };
    let open = File::open(&IoContext::default(), &options, FileAccess::default()).await;
    Child::new(Arc::new(open.unwrap()))
}

async fn source(format: Format) -> Arc<dyn Driver> {
    match format {
        Format::Raw => Arc::new(Raw::new(file(SIZE).await, String::new(), None, None).unwrap()),
        Format::Qcow2(cluster_size) => {
            let file = file(0).await;
            let options = CreateOptions {
                cluster_size,
                ..CreateOptions::new(SIZE)
            };
            create(&file, &options).await.unwrap();
            let opening = Qcow2::open(file, OpenOptions::default()).await;
            opening.unwrap().finish(None).await.unwrap()
        }
    }
}

/// Copies once, with guests; answers how much was shared.
async fn run_case(format: Format, seed: u64) -> u64 {
    let mut random = fastrand::Rng::with_seed(seed);
    let source = source(format).await;
    fill(&*source, &mut random, 15).await;
    put(&*source, 0, noise(&mut random, 4096)).await.unwrap();
    let before = content(&*source).await;
    let (_, target) = disk(Format::Raw, SIZE, None).await;
    let target = Arc::new(Sharing {
        inner: Jitter::new(target, random.u64(..), 20),
        random: Mutex::new(random.fork()),
        left: AtomicU64::new(random.u64(0..12)),
        end: [ErrorKind::Unsupported, ErrorKind::NoSpace, ErrorKind::Io][random.usize(0..3)],
        shared: AtomicU64::new(0),
    });
    let source = Jitter::new(source, random.u64(..), 6);
    let from = Source {
        disk: source.inner.clone(),
        snapshots: source.clone(),
    };
    let options = CopyOptions {
        max_workers: random.u32(1..6),
        max_chunk: [0, 1 << 16, 1 << 18][random.usize(0..3)],
        guest_memory: 1 << random.u32(16..20),
        point_in_time: [PointInTime::Auto, PointInTime::CopyBeforeWrite][random.usize(0..2)],
        ..CopyOptions::default()
    };
    let copier = Arc::new(Copier::new(from, target.clone(), options).unwrap());
    let disk = Arc::new(CopyBeforeWrite::new(
        Child::new(source.clone()),
        Child::new(target.inner.clone()),
        copier.before_change(),
        String::new(),
    ));
    copier.activate().unwrap();
    let rude = tokio::spawn(rude_guest(disk.clone(), random.fork()));
    let polite = tokio::spawn(guest(disk, 0, random.fork()));
    let cancelled = random.u8(0..4) == 0;
    if cancelled {
        let running = copier.clone();
        let running = tokio::spawn(async move { running.run(Owner::strict()).await });
        for _ in 0..random.usize(0..200) {
            tokio::task::yield_now().await;
        }
        running.abort();
        let _ = running.await;
    } else {
        copier.run(Owner::strict()).await.unwrap();
    }
    if cancelled {
        // It may never have begun. Guests end whatever becomes of the copy.
        copier.close().await.unwrap();
    }
    rude.await.unwrap();
    polite.await.unwrap();
    copier.close().await.unwrap();
    if !cancelled {
        assert_same(&content(&*target.inner).await, &before, "target");
    }
    target.shared.load(Ordering::Relaxed)
}

#[test]
fn what_is_shared_is_of_the_point_in_time() {
    for seed in rounds() {
        let mut shared = 0;
        for index in 0..24 {
            let formats = [Format::Raw, Format::Qcow2(64 << 10), Format::Qcow2(4 << 10)];
            let format = formats[index as usize % 3];
            println!("seed {seed}, case {index}: {format:?}");
            let runtime = tokio::runtime::Builder::new_current_thread();
            let run = run_case(format, seed * 1000 + index);
            shared += { runtime }.enable_time().build().unwrap().block_on(run);
        }
        assert!(shared > 0, "nothing was shared");
    }
}
