//! Internal snapshots beside qemu-storage-daemon: `cargo bench -p block --bench snapshots [-- FOLDER] [GIB...]`.
//!
//! Makes a fully mapped image (`preallocation=metadata`, 64 KiB clusters) of each size, then creates a snapshot, reverts to it and
//! deletes it in turn with the engine, and creates and deletes one with qemu-storage-daemon, and prints medians in
//! milliseconds and their ratio; for the engine also how long its refcounts take to settle behind each. Both work on
//! the same file. Needs qemu-utils and qemu-storage-daemon. Above 1 TiB the engine is measured alone.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child as Process, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::driver::{Child, Driver, NewSnapshot, Preallocation, SnapshotSelector, Snapshots};
use block::formats::qcow2::create::{CreateOptions, create};
use block::formats::qcow2::{OpenOptions, Qcow2};
use block::io::IoContext;
use block::open::{Aio, CacheMode, FileOptions, Locking};
use block::protocols::file::{File, FileAccess};

const ROUNDS: usize = 5;

/// The same where the engine is alone: creating the image takes most of the time.
const ALONE_ROUNDS: usize = 2;

/// The largest image that is given to qemu-storage-daemon, which takes half a minute for a snapshot of it.
const COMPARED_GIB: u64 = 1024;

/// What is measured of the engine.
const OURS: [&str; 6] = ["create", "settle", "revert", "settle", "delete", "settle"];

/// Which of them qemu-storage-daemon does.
const THEIRS: [usize; 2] = [0, 4];

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    let folder = arguments.first().map_or(".", String::as_str);
    let sizes: Vec<u64> = arguments
        .iter()
        .skip(1)
        .flat_map(|gib| gib.parse())
        .collect();
    let sizes = if sizes.is_empty() {
        vec![1, 64, 1024, 16384]
    } else {
        sizes
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    println!(
        "{:>8}  {:<8} {:>10} {:>10} {:>7}",
        "GiB", "", "ours ms", "QSD ms", "ratio"
    );
    for gib in sizes {
        runtime.block_on(compare(Path::new(folder), gib))?;
    }
    Ok(())
}

async fn compare(folder: &Path, gib: u64) -> Result<(), Failure> {
    let path = folder.join("snapshots.bench");
    let name = path.to_str().ok_or("the folder's name is not text")?;
    let context = IoContext::new();
    std::fs::File::create(&path)?;
    let mut options = CreateOptions::new(gib << 30);
    options.preallocation = Preallocation::Metadata;
    let started = Instant::now();
    create(&file(&context, name).await?, &options).await?;
    let ours = started.elapsed();
    if gib > COMPARED_GIB {
        print(gib, "image", [vec![ours], Vec::new()]);
        for _ in 0..ALONE_ROUNDS {
            let times = ours_once(&context, name).await?;
            for (label, time) in OURS.into_iter().zip(times) {
                print(gib, label, [vec![time], Vec::new()]);
            }
        }
        std::fs::remove_file(&path)?;
        return Ok(());
    }
    let theirs = folder.join("snapshots.theirs");
    let size = format!("{gib}G");
    let started = Instant::now();
    let made = Command::new("qemu-img")
        .args([
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "preallocation=metadata",
        ])
        .arg(&theirs)
        .arg(&size)
        .status()?;
    let created = [vec![ours], vec![started.elapsed()]];
    std::fs::remove_file(&theirs)?;
    if !made.success() {
        return Err("qemu-img create has failed".into());
    }
    print(gib, "image", created);
    let mut times: [[Vec<Duration>; 2]; OURS.len()] = Default::default();
    for _ in 0..ROUNDS {
        for (operation, time) in ours_once(&context, name).await?.into_iter().enumerate() {
            times[operation][0].push(time);
        }
        for (operation, time) in THEIRS.into_iter().zip(theirs_once(folder, name)?) {
            times[operation][1].push(time);
        }
    }
    for (label, times) in OURS.into_iter().zip(times) {
        print(gib, label, times);
    }
    std::fs::remove_file(&path)?;
    Ok(())
}

fn print(gib: u64, label: &str, times: [Vec<Duration>; 2]) {
    let [ours, theirs] = times.map(|mut times| {
        times.sort();
        let median = times.get(times.len() / 2);
        median.map(|time| time.as_secs_f64() * 1000.0)
    });
    let text = |number: Option<f64>| number.map_or(String::new(), |number| format!("{number:.1}"));
    let ratio = ours.zip(theirs).map(|(ours, theirs)| theirs / ours);
    println!(
        "{gib:>8}  {label:<8} {:>10} {:>10} {:>7}",
        text(ours),
        text(theirs),
        text(ratio)
    );
}

async fn file(context: &IoContext, name: &str) -> Result<Child, Failure> {
    let options = FileOptions {
        filename: name.to_owned(),
        aio: Aio::Threads,
        locking: Locking::Auto,
    };
    let access = FileAccess {
        read_only: false,
        auto_read_only: false,
        cache: CacheMode::default(),
    };
    Ok(Child::new(Arc::new(
        File::open(context, &options, access).await?,
    )))
}

/// Creates a snapshot with the engine, reverts to it and deletes it, each with the time until its refcounts are settled.
async fn ours_once(context: &IoContext, name: &str) -> Result<[Duration; OURS.len()], Failure> {
    let opening = Qcow2::open(file(context, name).await?, OpenOptions::default()).await?;
    let image = opening.finish(None).await?;
    let new = NewSnapshot::named("bench");
    let which = SnapshotSelector {
        id: None,
        name: Some(new.name.clone()),
    };
    let started = Instant::now();
    image.create(new).await?;
    let created = started.elapsed();
    let create_settled = settled(&image).await;
    let started = Instant::now();
    image.revert(which.clone()).await?;
    let reverted = started.elapsed();
    let revert_settled = settled(&image).await;
    let started = Instant::now();
    image.delete(which).await?;
    let deleted = started.elapsed();
    let delete_settled = settled(&image).await;
    image.close().await?;
    Ok([
        created,
        create_settled,
        reverted,
        revert_settled,
        deleted,
        delete_settled,
    ])
}

/// Waits until nothing is left to be done behind an operation.
async fn settled(image: &Qcow2) -> Duration {
    let started = Instant::now();
    loop {
        let info = image.info();
        if !info.dirty && info.unsettled_tables == 0 {
            return started.elapsed();
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Creates and deletes a snapshot with qemu-storage-daemon.
fn theirs_once(folder: &Path, name: &str) -> Result<[Duration; 2], Failure> {
    let socket = folder.join("snapshots.sock");
    let _ = std::fs::remove_file(&socket);
    let path = socket.to_str().ok_or("the folder's name is not text")?;
    let mut daemon = Command::new("qemu-storage-daemon")
        .arg(format!(
            "--chardev=socket,id=qmp,path={path},server=on,wait=off"
        ))
        .arg("--monitor=chardev=qmp")
        .arg(format!(
            "--blockdev=qcow2,node-name=disk,file.driver=file,file.filename={name}"
        ))
        .spawn()?;
    let times = qmp_times(&mut daemon, &socket);
    daemon.wait()?;
    times
}

fn qmp_times(daemon: &mut Process, socket: &Path) -> Result<[Duration; 2], Failure> {
    let mut tries = 0;
    let mut stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(error) if tries > 500 => {
                daemon.kill()?;
                return Err(error.into());
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
        tries += 1;
    };
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    lines.next().ok_or("no greeting")??;
    let mut run = |request: &str| -> Result<Duration, Failure> {
        let started = Instant::now();
        stream.write_all(request.as_bytes())?;
        loop {
            let line = lines.next().ok_or("the daemon has gone")??;
            if line.contains("\"error\"") {
                return Err(line.into());
            }
            if line.contains("\"return\"") {
                return Ok(started.elapsed());
            }
        }
    };
    run(r#"{"execute":"qmp_capabilities"}"#)?;
    let arguments = r#""arguments":{"device":"disk","name":"bench"}"#;
    let created = run(&format!(
        r#"{{"execute":"blockdev-snapshot-internal-sync",{arguments}}}"#
    ))?;
    let deleted = run(&format!(
        r#"{{"execute":"blockdev-snapshot-delete-internal-sync",{arguments}}}"#
    ))?;
    run(r#"{"execute":"quit"}"#)?;
    Ok([created, deleted])
}
