//! 4 KiB random requests on a file: `cargo bench -p block --bench file_io [-- FOLDER]`.
//!
//! Prints thousands of requests per second for each engine, cache mode and queue depth, and the same loop over plain
//! system calls for comparison. The file has 256 MiB and is read once before, so buffered reads hit the page cache.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::driver::{Requests, WriteFlags};
use block::io::{Data, IoContext};
use block::open::{Aio, CacheMode, FileOptions, Locking};
use block::protocols::file::{File, FileAccess};
use bytes::Bytes;

const SIZE: u64 = 256 << 20;
const BLOCK: u64 = 4096;
const TIME: Duration = Duration::from_secs(2);

#[derive(Clone, Copy)]
enum Kind {
    Read,
    Write,
}

fn main() -> std::io::Result<()> {
    let folder = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with("--"))
        .unwrap_or_else(|| ".".to_owned());
    let path = Path::new(&folder).join("file_io.bench");
    let content = vec![0x5a; 1 << 20];
    {
        use std::io::Write;
        let mut file = std::fs::File::create(&path)?;
        for _ in 0..SIZE >> 20 {
            file.write_all(&content)?;
        }
        file.sync_all()?;
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    println!("plain pread, one thread: {:.1}", plain_reads(&path)?);
    for (label, kind) in [("read", Kind::Read), ("write", Kind::Write)] {
        for (cache, direct) in [("page cache", false), ("direct", true)] {
            for (engine, aio) in [("threads", Aio::Threads), ("io_uring", Aio::IoUring)] {
                let rates: Vec<String> = [1, 32]
                    .iter()
                    .map(|depth| runtime.block_on(rate(&path, aio, direct, kind, *depth)))
                    .map(|rate| format!("{rate:>8.1}"))
                    .collect();
                println!(
                    "{label:<6} {cache:<10} {engine:<9} qd1 {} qd32 {}",
                    rates[0], rates[1]
                );
            }
        }
    }
    std::fs::remove_file(&path)
}

/// The bound for one thread: nothing between the loop and the kernel.
fn plain_reads(path: &Path) -> std::io::Result<f64> {
    let file = std::fs::File::open(path)?;
    let mut buffer = vec![0; BLOCK as usize];
    let mut random = fastrand::Rng::with_seed(1);
    let start = Instant::now();
    let mut count = 0u64;
    while start.elapsed() < TIME {
        for _ in 0..64 {
            file.read_exact_at(&mut buffer, random.u64(..SIZE / BLOCK) * BLOCK)?;
        }
        count += 64;
    }
    Ok(count as f64 / start.elapsed().as_secs_f64() / 1000.0)
}

async fn rate(path: &Path, aio: Aio, direct: bool, kind: Kind, depth: u64) -> f64 {
    let options = FileOptions {
        filename: path.to_string_lossy().into_owned(),
        aio,
        locking: Locking::Off,
    };
    let access = FileAccess {
        cache: CacheMode {
            direct,
            ..CacheMode::default()
        },
        ..FileAccess::default()
    };
    let file = match File::open(&IoContext::new(), &options, access).await {
        Ok(file) => Arc::new(file),
        Err(error) => {
            eprintln!("{error}");
            return f64::NAN;
        }
    };
    let start = Instant::now();
    let workers: Vec<_> = (0..depth)
        .map(|seed| tokio::spawn(work(file.clone(), kind, seed, start)))
        .collect();
    let mut count = 0;
    for worker in workers {
        count += worker.await.unwrap_or(0);
    }
    count as f64 / start.elapsed().as_secs_f64() / 1000.0
}

async fn work(file: Arc<File>, kind: Kind, seed: u64, start: Instant) -> u64 {
    let mut random = fastrand::Rng::with_seed(seed);
    let payload = Bytes::from(vec![seed as u8; BLOCK as usize]);
    let mut count = 0;
    while start.elapsed() < TIME {
        let offset = random.u64(..SIZE / BLOCK) * BLOCK;
        let done = match kind {
            Kind::Read => file.read(offset, BLOCK).await.map(|_| ()),
            Kind::Write => {
                let data = Data::from(payload.clone());
                file.write(offset, data, WriteFlags::default()).await
            }
        };
        if let Err(error) = done {
            eprintln!("{error}");
            break;
        }
        count += 1;
    }
    count
}
