//! Copying a disk: `cargo bench -p block --bench backup [-- FOLDER [ROUNDS]]`.
//!
//! 2 GiB of random data in a disk of 4 GiB, and a sparse one, copied to qcow2 and raw by the engine under backup, beside `cp` of the
//! image file and `qemu-img convert`, in turn. Prints medians in seconds. The figures beside qemu-storage-daemon are in
//! `benches/compare.py`, section `backup`.

mod common;

use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use block::copy::{Copier, CopyOptions, Source, TargetContent};
use block::driver::{Child, Driver, Preallocation, Requests};
use block::formats::qcow2::create::{CreateOptions, create};
use block::formats::qcow2::{CompressionType, OpenOptions, Qcow2};
use block::formats::raw::Raw;
use block::io::IoContext;
use block::open::{Aio, FileOptions, Locking};
use block::protocols::file::{File, FileAccess};
use common::{Disk, Owner};

const DISK: u64 = 4 << 30;
const DATA: u64 = 2 << 30;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Raw,
    Qcow2,
    Compressed(CompressionType),
}

type Failure = Box<dyn std::error::Error>;

async fn open_file(context: &IoContext, path: &Path, read_only: bool) -> Result<Child, Failure> {
    let options = FileOptions {
        filename: path.display().to_string(),
        aio: Aio::Threads,
        locking: Locking::Off,
    };
    let access = FileAccess {
        read_only,
        ..FileAccess::default()
    };
    let file = File::open(context, &options, access).await?;
    Ok(Child::new(Arc::new(file)))
}

async fn open_qcow2(file: Child, read_only: bool) -> Result<Arc<Qcow2>, Failure> {
    let options = OpenOptions {
        read_only,
        ..OpenOptions::default()
    };
    Ok(Qcow2::open(file, options).await?.finish(None).await?)
}

async fn backup(from: &Path, to: &Path, target: Target) -> Result<(), Failure> {
    let context = IoContext::default();
    let source = open_qcow2(open_file(&context, from, true).await?, true).await?;
    std::fs::File::create(to)?;
    let file = open_file(&context, to, false).await?;
    let disk: Arc<dyn Driver> = match target {
        Target::Raw => {
            file.resize(DISK, Preallocation::Off).await?;
            Arc::new(Raw::new(file, String::new(), None, None)?)
        }
        Target::Qcow2 | Target::Compressed(_) => {
            let mut options = CreateOptions::new(DISK);
            if let Target::Compressed(compression_type) = target {
                options.compression_type = compression_type;
            }
            create(&file, &options).await?;
            open_qcow2(file, false).await?
        }
    };
    let options = CopyOptions {
        target_cluster: disk.info().cluster_size,
        target_content: TargetContent::Zero,
        compress: matches!(target, Target::Compressed(_)),
        max_chunk: number("CHUNK_KIB").map_or(0, |kib| kib << 10),
        max_workers: number("WORKERS").map_or(64, |workers| workers as u32),
        ..CopyOptions::default()
    };
    let source = Source {
        disk: source.clone(),
        snapshots: Arc::new(Disk(source)),
    };
    let to: Arc<dyn Requests> = disk.clone();
    let copier = Copier::new(source, to, options)?;
    copier.activate()?;
    copier.run(Arc::new(Owner)).await?;
    copier.close().await?;
    disk.close().await?;
    Ok(())
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// An image with `data` bytes of noise, every cluster or one in sixteen.
fn make(path: &Path, raw: &Path, sparse: bool) -> Result<(), Failure> {
    let mut file = std::fs::File::create(raw)?;
    file.set_len(DISK)?;
    let mut random = std::fs::File::open("/dev/urandom")?;
    let mut bytes = vec![0; 1 << 20];
    for index in 0..DATA >> 20 {
        random.read_exact(&mut bytes)?;
        file.seek(SeekFrom::Start(index << 20))?;
        match sparse {
            true => file.write_all(&bytes[..64 << 10])?,
            false => file.write_all(&bytes)?,
        }
    }
    drop(file);
    run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2"],
        raw,
        path,
    )?;
    Ok(std::fs::remove_file(raw)?)
}

fn run(program: &str, args: &[&str], from: &Path, to: &Path) -> Result<(), Failure> {
    let mut command = Command::new(program);
    let status = command.args(args).arg(from).arg(to).stdout(Stdio::null());
    match status.status()?.success() {
        true => Ok(()),
        false => Err(format!("{program} failed").into()),
    }
}

fn main() -> Result<(), Failure> {
    let mut args = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with("--"));
    let folder = PathBuf::from(args.next().unwrap_or_else(|| ".".to_owned()));
    let rounds: usize = args.next().map_or(Ok(3), |rounds| rounds.parse())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let (source, target) = (folder.join("source.bench"), folder.join("target.bench"));
    for sparse in [false, true] {
        make(&source, &target, sparse)?;
        let ours = |kind| runtime.block_on(backup(&source, &target, kind));
        let convert = |format| run("qemu-img", &["convert", "-O", format], &source, &target);
        type Way<'a> = (&'a str, Box<dyn Fn() -> Result<(), Failure> + 'a>);
        let mut ways: Vec<Way<'_>> = vec![
            ("cp", Box::new(|| run("cp", &[], &source, &target))),
            ("copy to qcow2", Box::new(|| ours(Target::Qcow2))),
            ("copy to raw", Box::new(|| ours(Target::Raw))),
            ("qemu-img to qcow2", Box::new(|| convert("qcow2"))),
            ("qemu-img to raw", Box::new(|| convert("raw"))),
        ];
        if std::env::var_os("COMPRESS").is_some() {
            let zstd = Target::Compressed(CompressionType::Zstd);
            ways.push(("copy, zstd", Box::new(move || ours(zstd))));
        }
        if let Ok(only) = std::env::var("ONLY") {
            ways.retain(|(name, _)| name.starts_with(&only));
        }
        let mut times = vec![Vec::new(); ways.len()];
        for _ in 0..rounds {
            for ((_, way), times) in ways.iter().zip(&mut times) {
                let _ = std::fs::remove_file(&target);
                let start = Instant::now();
                way()?;
                times.push(start.elapsed().as_secs_f64());
            }
        }
        println!("{}", if sparse { "sparse" } else { "2 GiB of noise" });
        for ((name, _), mut times) in ways.iter().zip(times) {
            times.sort_by(f64::total_cmp);
            println!("  {name:<20} {:.3} s  {times:.3?}", times[times.len() / 2]);
        }
        std::fs::remove_file(&source)?;
        std::fs::remove_file(&target)?;
    }
    Ok(())
}
