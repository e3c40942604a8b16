//! The repair of dirty images beside qemu-img: `cargo bench -p block --bench repair [-- FOLDER] [GIB...]`.
//!
//! Makes a fully mapped image of each size (`preallocation=metadata`, 64 KiB clusters, 16 bits), sets its dirty bit, and
//! lets the engine open one copy and `qemu-img check -r all` repair another. Three kinds of image:
//! * clean: every count is right
//! * snapshot: an internal snapshot that no refcount knows of, as a daemon leaves it that was killed
//! * shuffled: the same, and no cluster lies next to its neighbour; up to 64 GiB only for qemu-img, which takes hours beyond
//!
//! Prints seconds (ours: the median), per TiB too, and the ratio. The files are in the page cache, as they have just been written;
//! a folder in memory leaves the disk's flushes out. Every result must be found clean by the other's check, where that ends in time.
//! Needs qemu-utils.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::driver::{Child, Driver};
use block::formats::qcow2::check::check;
use block::formats::qcow2::{OpenOptions as ImageOptions, Qcow2};
use block::io::IoContext;
use block::open::{Aio, CacheMode, FileOptions, Locking};
use block::protocols::file::{File, FileAccess};

/// Repairs of ours. One of qemu-img's tells enough.
const ROUNDS: usize = 3;
const CLUSTER: u64 = 64 << 10;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

type Failure = Box<dyn std::error::Error>;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Clean,
    Snapshot,
    Shuffled,
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    let folder = PathBuf::from(arguments.first().map_or(".", String::as_str));
    let mut sizes: Vec<u64> = arguments.iter().skip(1).flat_map(|n| n.parse()).collect();
    if sizes.is_empty() {
        sizes = vec![1024];
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    println!(
        "{:>8}  {:<10} {:>8} {:>9} {:>8} {:>9} {:>7}",
        "GiB", "", "ours s", "per TiB", "QEMU s", "per TiB", "ratio"
    );
    for gib in sizes {
        let base = folder.join("repair.base");
        qemu_img(
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                "preallocation=metadata",
            ],
            &base,
            &[&format!("{gib}G")],
        )?;
        for kind in [Kind::Clean, Kind::Snapshot, Kind::Shuffled] {
            damage(&base, kind)?;
            let with_qemu = kind != Kind::Shuffled || gib <= 64;
            let (ours, theirs) = measure(&runtime, &folder, &base, with_qemu)?;
            print(gib, kind, ours, theirs);
        }
        fs::remove_file(&base)?;
    }
    Ok(())
}

/// The median of ours, and the time of qemu-img where it is asked for.
fn measure(
    runtime: &tokio::runtime::Runtime,
    folder: &Path,
    base: &Path,
    with_qemu: bool,
) -> Result<(Duration, Option<Duration>), Failure> {
    let check_by_qemu = |copy: &Path| match with_qemu {
        true => qemu_img(&["check", "-q"], copy, &[]),
        false => runtime.block_on(check_by_us(copy)),
    };
    let mut ours = Vec::new();
    for _ in 0..ROUNDS {
        let repair = |copy: &Path| runtime.block_on(open_and_close(copy));
        ours.push(once(folder, base, repair, check_by_qemu)?);
    }
    ours.sort();
    let theirs = match with_qemu {
        true => {
            let repair = |copy: &Path| qemu_img(&["check", "-q", "-r", "all"], copy, &[]);
            let check = |copy: &Path| runtime.block_on(check_by_us(copy));
            Some(once(folder, base, repair, check)?)
        }
        false => None,
    };
    Ok((ours[ours.len() / 2], theirs))
}

/// How long one repair of a copy takes.
fn once(
    folder: &Path,
    base: &Path,
    repair: impl FnOnce(&Path) -> Result<(), Failure>,
    check: impl FnOnce(&Path) -> Result<(), Failure>,
) -> Result<Duration, Failure> {
    let copy = folder.join("repair.copy");
    let copied = Command::new("cp")
        .args(["--sparse=always"])
        .args([base, &copy])
        .status()?;
    if !copied.success() {
        return Err("cp has failed".into());
    }
    // What the copy has left to write back is not part of the time.
    fs::File::open(&copy)?.sync_all()?;
    let started = Instant::now();
    repair(&copy)?;
    let took = started.elapsed();
    check(&copy)?;
    fs::remove_file(&copy)?;
    Ok(took)
}

fn print(gib: u64, kind: Kind, ours: Duration, theirs: Option<Duration>) {
    let label = match kind {
        Kind::Clean => "clean",
        Kind::Snapshot => "snapshot",
        Kind::Shuffled => "shuffled",
    };
    let tib = gib as f64 / 1024.0;
    let ours = ours.as_secs_f64();
    print!("{gib:>8}  {label:<10} {ours:>8.2} {:>9.2}", ours / tib);
    match theirs.map(|time| time.as_secs_f64()) {
        Some(theirs) => println!(
            " {theirs:>8.2} {:>9.2} {:>7.1}",
            theirs / tib,
            theirs / ours
        ),
        None => println!(),
    }
}

/// Runs qemu-img, which says millions of lines of what it repairs.
fn qemu_img(before: &[&str], image: &Path, behind: &[&str]) -> Result<(), Failure> {
    let status = Command::new("qemu-img")
        .args(before)
        .arg(image)
        .args(behind)
        .stderr(Stdio::null())
        .status()?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("qemu-img {before:?} has failed").into()),
    }
}

async fn open_and_close(path: &Path) -> Result<(), Failure> {
    let opening = Qcow2::open(file(path).await?, ImageOptions::default()).await?;
    Ok(opening.finish(None).await?.close().await?)
}

async fn check_by_us(path: &Path) -> Result<(), Failure> {
    let report = check(&file(path).await?).await?;
    match report.is_clean() {
        true => Ok(()),
        false => Err(format!("{:#?}", report.findings).into()),
    }
}

async fn file(path: &Path) -> Result<Child, Failure> {
    let options = FileOptions {
        filename: path
            .to_str()
            .ok_or("the folder's name is not text")?
            .to_owned(),
        aio: Aio::Threads,
        locking: Locking::Auto,
    };
    let access = FileAccess {
        read_only: false,
        auto_read_only: false,
        cache: CacheMode::default(),
    };
    let file = File::open(&IoContext::new(), &options, access).await?;
    Ok(Child::new(Arc::new(file)))
}

/// Makes an image of the kind out of the one before it in the list.
fn damage(path: &Path, kind: Kind) -> Result<(), Failure> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let word = |at: u64| -> io::Result<u64> {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at)?;
        Ok(u64::from_be_bytes(bytes))
    };
    let mut l1_entries = [0; 4];
    file.read_exact_at(&mut l1_entries, 36)?;
    let l1_entries = u32::from_be_bytes(l1_entries);
    let mut l1 = vec![0; l1_entries as usize * 8];
    file.read_exact_at(&mut l1, word(40)?)?;
    match kind {
        Kind::Clean => file.write_all_at(&[1], 79)?,
        Kind::Snapshot => {
            let at = file.metadata()?.len().next_multiple_of(CLUSTER);
            for entry in l1.chunks_exact_mut(8) {
                entry[0] &= 0x7f;
            }
            file.write_all_at(&l1, at)?;
            let table = (at + l1.len() as u64).next_multiple_of(CLUSTER);
            file.write_all_at(&snapshot_entry(at, l1_entries, word(24)?), table)?;
            file.set_len(table + CLUSTER)?;
            file.write_all_at(&1_u32.to_be_bytes(), 60)?;
            file.write_all_at(&table.to_be_bytes(), 64)?;
        }
        Kind::Shuffled => shuffle(&file, &l1)?,
    }
    Ok(())
}

/// The one entry of a snapshot table: id and name are "1" and "s".
fn snapshot_entry(l1_offset: u64, l1_entries: u32, disk_size: u64) -> Vec<u8> {
    let mut entry = Vec::new();
    entry.extend(l1_offset.to_be_bytes());
    entry.extend(l1_entries.to_be_bytes());
    entry.extend([0, 1, 0, 1]);
    entry.extend([0; 20]);
    entry.extend(16_u32.to_be_bytes());
    entry.extend([0; 8]);
    entry.extend(disk_size.to_be_bytes());
    entry.extend(b"1s");
    entry
}

/// Lets the entries of all L2 tables change places.
fn shuffle(file: &fs::File, l1: &[u8]) -> Result<(), Failure> {
    let mut tables: Vec<u64> = Vec::new();
    for entry in l1.as_chunks().0 {
        tables.push(u64::from_be_bytes(*entry) & OFFSET);
    }
    let mut entries = Vec::new();
    let mut table = vec![0; CLUSTER as usize];
    for at in &tables {
        file.read_exact_at(&mut table, *at)?;
        entries.extend_from_slice(table.as_chunks::<8>().0);
    }
    fastrand::Rng::with_seed(3).shuffle(&mut entries);
    let tables = tables.iter().zip(entries.chunks(CLUSTER as usize / 8));
    for (at, entries) in tables {
        file.write_all_at(entries.as_flattened(), *at)?;
    }
    Ok(())
}
