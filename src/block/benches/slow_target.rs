//! A guest beside a copy to a slow target: `cargo bench -p block --bench slow_target [-- FOLDER]`.
//!
//! 4 KiB random writes to a qcow2 image whose 1 GiB is allocated, 16 at once and for four seconds at a time, while it is copied to a
//! target that takes 100 ms for each request, and to one that takes 20 MB/s. Prints how many there were per second, and
//! what the slowest hundredth of them and the slowest one took, for each way to keep the point in time.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::copy::{Copier, CopyOptions, PointInTime, Source, SyncMode};
use block::driver::{
    BlockStatus, BoxFuture, Child, Driver, Preallocation, RequestLimits, Requests, WriteFlags,
    ZeroFlags,
};
use block::error::{Error, Result};
use block::filters::copy_before_write::CopyBeforeWrite;
use block::formats::qcow2::create::{CreateOptions, create};
use block::formats::qcow2::{OpenOptions, Qcow2};
use block::io::{Data, IoContext};
use block::open::{Aio, FileOptions, Locking};
use block::protocols::file::{File, FileAccess};
use common::{Disk, Owner};
use tokio::sync::Mutex;

const SIZE: u64 = 1 << 30;
const DEPTH: u64 = 16;
const TIME: Duration = Duration::from_secs(4);

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Swallows writes, slowly.
struct Slow {
    latency: Duration,
    /// When the wire is free again, and what a byte takes.
    wire: Mutex<Instant>,
    per_byte: Duration,
}

impl Slow {
    async fn take(&self, bytes: u64) -> Result<()> {
        let free = {
            let mut wire = self.wire.lock().await;
            let free = (*wire).max(Instant::now()) + self.per_byte * bytes as u32;
            *wire = free;
            free
        };
        tokio::time::sleep_until((free + self.latency).into()).await;
        Ok(())
    }
}

impl Requests for Slow {
    fn size(&self) -> u64 {
        SIZE
    }

    fn limits(&self) -> RequestLimits {
        RequestLimits {
            alignment: 1,
            preferred: 4096,
            growable: false,
        }
    }

    fn read(&self, _offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        Box::pin(async move { Ok(Data::zeroes(len)) })
    }

    fn write(&self, _offset: u64, data: Data, _flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.take(data.len()).await })
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.take(0))
    }

    fn discard(&self, _offset: u64, _len: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.take(0))
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.take(0))
    }

    fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        Box::pin(async move {
            Ok(BlockStatus {
                len,
                allocated: true,
                zero: false,
                host_offset: Some(offset),
                compressed: false,
            })
        })
    }

    fn resize(&self, _size: u64, _preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

async fn image(folder: &Path) -> std::result::Result<(PathBuf, Arc<Qcow2>), Failure> {
    let path = folder.join("slow_target.bench");
    std::fs::File::create(&path)?;
    let options = FileOptions {
        filename: path.display().to_string(),
        aio: Aio::Threads,
        locking: Locking::Off,
    };
    let file = File::open(&IoContext::new(), &options, FileAccess::default()).await?;
    let file = Child::new(Arc::new(file));
    create(&file, &CreateOptions::new(SIZE)).await?;
    let opening = Qcow2::open(file, OpenOptions::default()).await?;
    let image = opening.finish(None).await?;
    for at in (0..SIZE).step_by(1 << 20) {
        let bytes = vec![(at >> 20) as u8 | 1; 1 << 20];
        image.write(at, bytes.into(), WriteFlags::default()).await?;
    }
    image.flush().await?;
    Ok((path, image))
}

/// What the writes took, sorted.
async fn guest(disk: Arc<dyn Requests>) -> std::result::Result<Vec<Duration>, Failure> {
    let end = Instant::now() + TIME;
    let writers = (0..DEPTH).map(|seed| {
        let disk = disk.clone();
        tokio::spawn(async move {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut times = Vec::new();
            while Instant::now() < end {
                let at = random.u64(0..SIZE / 4096) * 4096;
                let begun = Instant::now();
                let data = vec![7; 4096].into();
                disk.write(at, data, WriteFlags::default()).await?;
                times.push(begun.elapsed());
                // A guest thinks, too: a reactor must not be busy all the time.
                tokio::task::yield_now().await;
            }
            Ok::<_, Error>(times)
        })
    });
    let mut all = Vec::new();
    for writer in writers.collect::<Vec<_>>() {
        all.extend(writer.await??);
    }
    all.sort();
    Ok(all)
}

fn print(label: &str, times: &[Duration]) {
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    println!(
        "  {label:<44} {:>8.0}/s   p50 {:>8.3} ms   p99 {:>8.3} ms   longest {:>8.1} ms",
        times.len() as f64 / TIME.as_secs_f64(),
        at(0.5),
        at(0.99),
        at(1.0)
    );
}

async fn measure(
    folder: &Path,
    (latency, per_byte): (Duration, Duration),
    way: Option<(SyncMode, PointInTime)>,
) -> std::result::Result<Vec<Duration>, Failure> {
    let (path, image) = image(folder).await?;
    let Some((sync, point_in_time)) = way else {
        let times = guest(image.clone()).await?;
        image.close().await?;
        std::fs::remove_file(path)?;
        return Ok(times);
    };
    let target = Arc::new(Slow {
        latency,
        wire: Mutex::new(Instant::now()),
        per_byte,
    });
    let source = Source {
        disk: image.clone(),
        snapshots: Arc::new(Disk(image.clone())),
    };
    let options = CopyOptions {
        sync,
        point_in_time,
        ..CopyOptions::default()
    };
    let copier = Arc::new(Copier::new(source, target.clone(), options)?);
    let disk = CopyBeforeWrite::new(
        Child::new(image.clone()),
        Child::new(target),
        copier.before_change(),
        String::new(),
    );
    copier.activate()?;
    let running = tokio::spawn({
        let copier = copier.clone();
        async move { copier.run(Arc::new(Owner)).await }
    });
    let times = guest(Arc::new(disk)).await?;
    running.abort();
    let _ = running.await;
    copier.close().await?;
    image.close().await?;
    std::fs::remove_file(path)?;
    Ok(times)
}

fn main() -> std::result::Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let folder = args.find(|arg| !arg.starts_with("--"));
    let folder = PathBuf::from(folder.unwrap_or_else(|| ".".to_owned()));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let slow = (Duration::from_millis(100), Duration::ZERO);
    let narrow = (Duration::from_millis(1), Duration::from_nanos(50));
    for (title, target) in [("100 ms per request", slow), ("20 MB/s", narrow)] {
        println!("{title}");
        for (label, way) in [
            ("no copy", None),
            (
                "guests wait for the target (sync=none)",
                Some((SyncMode::None, PointInTime::CopyBeforeWrite)),
            ),
            (
                "copy before write, old content in memory",
                Some((SyncMode::Full, PointInTime::CopyBeforeWrite)),
            ),
            (
                "internal snapshot",
                Some((SyncMode::Full, PointInTime::InternalSnapshot)),
            ),
            ("auto", Some((SyncMode::Full, PointInTime::Auto))),
        ] {
            print(label, &runtime.block_on(measure(&folder, target, way))?);
        }
    }
    Ok(())
}
