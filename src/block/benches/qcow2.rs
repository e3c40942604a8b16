//! What qcow2 costs: `cargo bench -p block --bench qcow2 [-- FOLDER]`.
//!
//! Microseconds per 4 KiB random request on the file alone and on an image in the same kind of file, one after the
//! other on one thread and 32 at once on two, with buffered I/O. The difference is the format's own cost; a
//! folder in memory shows it best.
//!
//! Then the same small writes to an image over a backing file, standard and with extended L2 entries: what copy on write
//! adds to the time and to the file.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use block::driver::{Child, Driver, WriteFlags};
use block::formats::qcow2::create::{CreateOptions, create};
use block::formats::qcow2::{OpenOptions, Qcow2};
use block::io::{Data, IoContext};
use block::open::{Aio, CacheMode, FileOptions, Locking};
use block::protocols::file::{File, FileAccess};
use bytes::Bytes;

const SIZE: u64 = 1 << 30;
const BLOCK: u64 = 4096;
const REQUESTS: u64 = 100_000;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Read,
    Write,
    /// Each request to another cluster that is not allocated yet.
    Allocate,
}

fn main() -> std::io::Result<()> {
    let folder = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with("--"))
        .unwrap_or_else(|| ".".to_owned());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let folder = Path::new(&folder);
    for depth in [1, 32] {
        for (label, kind) in [
            ("read", Kind::Read),
            ("write", Kind::Write),
            ("allocating write", Kind::Allocate),
        ] {
            let on_file = runtime.block_on(measure(folder, false, kind, depth));
            let on_image = runtime.block_on(measure(folder, true, kind, depth));
            println!(
                "{label:<17} qd{depth:<3} file {:>6.2} us   qcow2 {:>6.2} us",
                on_file.map_err(std::io::Error::other)?,
                on_image.map_err(std::io::Error::other)?
            );
        }
    }
    for depth in [1, 32] {
        let standard = runtime.block_on(over_backing(folder, false, depth));
        let (standard, copied) = standard.map_err(std::io::Error::other)?;
        let extended = runtime.block_on(over_backing(folder, true, depth));
        let (extended, written) = extended.map_err(std::io::Error::other)?;
        println!(
            "over a backing    qd{depth:<3} 64k standard {standard:>6.2} us {copied:>5} MiB   \
             128k extended {extended:>6.2} us {written:>5} MiB"
        );
    }
    Ok(())
}

/// Writes 4 KiB to each 64 KiB of an image over a full backing file, in random order. Answers microseconds per request,
/// and the MiB that the image has afterwards.
async fn over_backing(
    folder: &Path,
    extended: bool,
    depth: u64,
) -> block::error::Result<(f64, u64)> {
    let base_path = folder.join("base.bench");
    let base = open_file(&base_path).await?;
    fill(&base).await?;
    let path = folder.join("qcow2.bench");
    let file = Child::new(open_file(&path).await?);
    let mut options = CreateOptions::new(SIZE);
    options.extended_l2 = extended;
    options.cluster_size = if extended { 128 << 10 } else { 64 << 10 };
    create(&file, &options).await?;
    let opening = Qcow2::open(file, OpenOptions::default()).await?;
    let node = opening.finish(Some(Child::new(base.clone()))).await? as Arc<dyn Driver>;
    let mut places: Vec<u64> = (0..SIZE >> 16).collect();
    fastrand::Rng::with_seed(1).shuffle(&mut places);
    let count = places.len() as f64;
    let places: Arc<[u64]> = places.into();
    let start = Instant::now();
    let worker = |worker: u64| {
        let (node, places) = (node.clone(), places.clone());
        async move {
            let block = Bytes::from(vec![0xa5; BLOCK as usize]);
            for place in places.iter().skip(worker as usize).step_by(depth as usize) {
                let at = (place << 16) + (place % 16) * BLOCK;
                node.write(at, Data::from(block.clone()), WriteFlags::default())
                    .await?;
            }
            Ok(())
        }
    };
    join((0..depth).map(|nth| tokio::spawn(worker(nth)))).await?;
    let time = start.elapsed().as_secs_f64() * 1e6 / count;
    node.close().await?;
    let blocks = std::fs::metadata(&path).map(|metadata| metadata.blocks());
    let blocks = blocks.map_err(|error| block::error::Error::io("stat", &error))?;
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_file(&base_path);
    Ok((time, blocks >> 11))
}

async fn join(
    tasks: impl Iterator<Item = tokio::task::JoinHandle<block::error::Result<()>>>,
) -> block::error::Result<()> {
    // All of them have been started.
    for task in tasks.collect::<Vec<_>>() {
        task.await
            .map_err(|e| block::error::Error::new(block::error::ErrorKind::Io, e.to_string()))??;
    }
    Ok(())
}

async fn open_file(path: &Path) -> block::error::Result<Arc<dyn Driver>> {
    std::fs::write(path, []).map_err(|e| block::error::Error::io("create", &e))?;
    let options = FileOptions {
        filename: path.to_string_lossy().into_owned(),
        aio: Aio::Threads,
        locking: Locking::Off,
    };
    let access = FileAccess {
        cache: CacheMode::default(),
        ..FileAccess::default()
    };
    Ok(Arc::new(
        File::open(&IoContext::new(), &options, access).await?,
    ))
}

async fn fill(node: &Arc<dyn Driver>) -> block::error::Result<()> {
    let piece = Bytes::from(vec![0x5a; 1 << 20]);
    for index in 0..SIZE >> 20 {
        let data = Data::from(piece.clone());
        node.write(index << 20, data, WriteFlags::default()).await?;
    }
    Ok(())
}

async fn measure(folder: &Path, qcow2: bool, kind: Kind, depth: u64) -> block::error::Result<f64> {
    let path = folder.join("qcow2.bench");
    let file = open_file(&path).await?;
    let node = if qcow2 {
        let child = Child::new(file.clone());
        let mut create_options = CreateOptions::new(SIZE);
        if kind == Kind::Allocate {
            create_options.size = SIZE * 16;
        }
        create(&child, &create_options).await?;
        Qcow2::open(child, OpenOptions::default())
            .await?
            .finish(None)
            .await? as Arc<dyn Driver>
    } else {
        file
    };
    if kind != Kind::Allocate {
        fill(&node).await?;
    }
    let start = Instant::now();
    let worker = |worker| tokio::spawn(run(node.clone(), kind, worker, REQUESTS / depth));
    join((0..depth).map(worker)).await?;
    let time = start.elapsed().as_secs_f64() * 1e6 / REQUESTS as f64;
    node.close().await?;
    let _ = std::fs::remove_file(&path);
    Ok(time)
}

async fn run(
    node: Arc<dyn Driver>,
    kind: Kind,
    worker: u64,
    count: u64,
) -> block::error::Result<()> {
    let mut random = fastrand::Rng::with_seed(worker);
    let block = Bytes::from(vec![0xa5; BLOCK as usize]);
    for step in 0..count {
        let at = random.u64(..SIZE / BLOCK) * BLOCK;
        match kind {
            Kind::Read => drop(node.read(at, BLOCK).await?),
            Kind::Write => {
                node.write(at, Data::from(block.clone()), WriteFlags::default())
                    .await?;
            }
            Kind::Allocate => {
                let cluster = worker * count + step;
                let data = Data::from(block.clone());
                node.write(cluster * 65536 + 8192, data, WriteFlags::default())
                    .await?;
            }
        }
    }
    Ok(())
}
