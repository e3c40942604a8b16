//! Files against a model for each engine and cache mode, locks against QEMU's tools, and what goes wrong.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use super::*;
use crate::open::Locking;

/// A directory beside the build: on a real file system, so that direct I/O is what it is in use.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
}

fn options(path: &Path, aio: Aio, locking: Locking) -> FileOptions {
    FileOptions {
        filename: path.to_str().unwrap().to_owned(),
        aio,
        locking,
    }
}

fn direct() -> FileAccess {
    FileAccess {
        cache: CacheMode {
            direct: true,
            ..CacheMode::default()
        },
        ..FileAccess::default()
    }
}

fn read_only() -> FileAccess {
    FileAccess {
        read_only: true,
        ..FileAccess::default()
    }
}

fn create(dir: &tempfile::TempDir, size: u64) -> PathBuf {
    let path = dir.path().join("image");
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    path
}

async fn open(path: &Path, aio: Aio, access: FileAccess) -> File {
    File::open(
        &IoContext::new(),
        &options(path, aio, Locking::Auto),
        access,
    )
    .await
    .unwrap()
}

/// A payload of several segments: bytes, a zero run, bytes.
fn payload(value: u8, len: usize, unit: usize) -> Data {
    let third = len / 3 / unit * unit;
    let mut data = Data::from(vec![value; third]);
    data.append(Data::zeroes(third as u64));
    data.append(Data::from(vec![value; len - 2 * third]));
    data
}

async fn run_model(aio: Aio, access: FileAccess, seed: u64) {
    let dir = scratch();
    let path = create(&dir, 100_000 / 4096 * 4096);
    let file = open(&path, aio, access).await;
    let unit = file.limits().alignment as usize;
    let mut model = vec![0; file.size() as usize];
    let mut random = fastrand::Rng::with_seed(seed);
    for step in 0..600u32 {
        let offset = random.usize(..300_000) / unit * unit;
        let len = (random.usize(1..60_000).div_ceil(unit)) * unit;
        let at = offset as u64;
        let flags = ZeroFlags {
            may_unmap: random.bool(),
            fua: random.u8(..20) == 0,
            no_fallback: false,
        };
        let changed = match random.u8(..8) {
            0..=2 => {
                let data = payload(step as u8, len, unit);
                let fua = random.u8(..20) == 0;
                file.write(at, data.clone(), WriteFlags::fua(fua))
                    .await
                    .unwrap();
                Some(data.to_bytes().to_vec())
            }
            3 => {
                file.write_zeroes(at, len as u64, flags).await.unwrap();
                Some(vec![0; len])
            }
            4 if offset + len <= model.len() => {
                file.discard(at, len as u64).await.unwrap();
                Some(vec![0; len])
            }
            5 if random.u8(..6) == 0 => {
                file.resize(at, Preallocation::Off).await.unwrap();
                model.resize(offset, 0);
                None
            }
            6 => {
                check_status(&file, &model, at).await;
                None
            }
            _ => {
                let read = file.read(at, len as u64).await.unwrap().to_bytes();
                let mut want = model.get(offset..).unwrap_or_default().to_vec();
                want.resize(len.max(want.len()), 0);
                assert_eq!(read, want[..len], "seed {seed} step {step}");
                None
            }
        };
        if let Some(bytes) = changed {
            model.resize(model.len().max(offset + len), 0);
            model[offset..offset + len].copy_from_slice(&bytes);
        }
        assert_eq!(file.size(), model.len() as u64, "seed {seed} step {step}");
    }
    file.close().await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), model);
}

/// What is said to be zero is, and answers move on.
async fn check_status(file: &File, model: &[u8], offset: u64) {
    if offset >= model.len() as u64 {
        return;
    }
    let rest = model.len() as u64 - offset;
    let status = file.block_status(offset, rest).await.unwrap();
    assert!((1..=rest).contains(&status.len));
    let range = offset as usize..(offset + status.len) as usize;
    assert!(!status.zero || model[range].iter().all(|byte| *byte == 0));
}

#[tokio::test]
async fn buffered_threads_match_the_model() {
    run_model(Aio::Threads, FileAccess::default(), 1).await;
}

#[tokio::test]
async fn buffered_ring_matches_the_model() {
    run_model(Aio::IoUring, FileAccess::default(), 2).await;
}

#[tokio::test]
async fn direct_threads_match_the_model() {
    run_model(Aio::Threads, direct(), 3).await;
}

#[tokio::test]
async fn direct_ring_matches_the_model() {
    run_model(Aio::IoUring, direct(), 4).await;
}

#[tokio::test]
async fn zeroes_have_a_right_fallback_whatever_the_file_system_lacks() {
    for lacking in 0..8u32 {
        let dir = scratch();
        let path = create(&dir, 0);
        let file = open(&path, Aio::Threads, FileAccess::default()).await;
        let ones = Data::from(vec![1; 100_000]);
        file.write(0, ones, WriteFlags::default()).await.unwrap();
        let lack = |bit: u32| lacking & (1 << bit) != 0;
        file.zero.no_punch.store(lack(0), Ordering::Relaxed);
        file.zero.no_zero_range.store(lack(1), Ordering::Relaxed);
        let flags = ZeroFlags {
            may_unmap: lack(2),
            ..ZeroFlags::default()
        };
        // In the middle, over the end, and behind it.
        for (offset, len) in [(10, 5000), (90_000, 20_000), (200_000, 10)] {
            file.write_zeroes(offset, len, flags).await.unwrap();
            assert_eq!(file.size(), file.present().host.size().unwrap());
        }
        let mut want = vec![1; 90_000];
        want[10..5010].fill(0);
        want.resize(200_010, 0);
        assert_eq!(std::fs::read(&path).unwrap(), want, "lacking {lacking:#b}");
        let strict = ZeroFlags {
            no_fallback: true,
            ..flags
        };
        let fast = file.write_zeroes(10, 10, strict).await;
        assert_eq!(fast.is_err(), lack(0) && lack(1));
    }
}

#[tokio::test]
async fn more_pieces_than_one_call_takes_arrive_in_order() {
    for aio in [Aio::Threads, Aio::IoUring] {
        let dir = scratch();
        let path = create(&dir, 0);
        let file = open(&path, aio, FileAccess::default()).await;
        let mut data = Data::new();
        for index in 0..5000u32 {
            data.append(Data::from(index.to_le_bytes().to_vec()));
        }
        // 80 MiB of zeroes take more than 1024 pieces of the zero page too.
        data.append(Data::zeroes(80 << 20));
        data.append(Data::from(vec![7]));
        file.write(3, data, WriteFlags::default()).await.unwrap();
        let read = file.read(3, 20_000).await.unwrap().to_bytes();
        for (index, word) in (0u32..).zip(read.chunks(4)) {
            assert_eq!(word, index.to_le_bytes());
        }
        let end = 3 + 20_000 + (80 << 20);
        assert_eq!(file.size(), end + 1);
        assert_eq!(
            &file.read(end - 1, 3).await.unwrap().to_bytes()[..],
            [0, 7, 0]
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_requests_harm_nobody() {
    for aio in [Aio::Threads, Aio::IoUring] {
        let dir = scratch();
        let path = create(&dir, 16 << 20);
        let file = Arc::new(open(&path, aio, direct()).await);
        let mut tasks = Vec::new();
        for index in 0..64u64 {
            let file = file.clone();
            tasks.push(tokio::spawn(async move {
                let data = Data::from(vec![index as u8; 64 << 10]);
                let offset = index * (64 << 10);
                file.write(offset, data, WriteFlags::default())
                    .await
                    .unwrap();
                file.read(offset, 64 << 10).await.unwrap();
            }));
        }
        for task in tasks.iter().step_by(2) {
            task.abort();
        }
        for (index, task) in tasks.into_iter().enumerate() {
            if task.await.is_ok() {
                let offset = index as u64 * (64 << 10);
                let read = file.read(offset, 64 << 10).await.unwrap().to_bytes();
                assert!(read.iter().all(|byte| *byte == index as u8));
            }
        }
    }
}

#[tokio::test]
async fn a_failed_preallocation_leaves_the_size_and_content() {
    let Some(mount) = Tmpfs::mount(1 << 20) else {
        eprintln!("skipped: tmpfs cannot be mounted here");
        return;
    };
    let path = create(&mount.0, 4096);
    let file = open(&path, Aio::Threads, FileAccess::default()).await;
    let error = file
        .resize(4 << 20, Preallocation::Falloc)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert_eq!(
        (file.size(), file.present().host.size().unwrap()),
        (4096, 4096)
    );
    for aio in [Aio::Threads, Aio::IoUring] {
        drop_and_fill(&path, aio).await;
    }
}

/// A full file system fails the write, and what is allocated can still be written.
async fn drop_and_fill(path: &Path, aio: Aio) {
    let file = File::open(
        &IoContext::new(),
        &options(path, aio, Locking::Off),
        FileAccess::default(),
    )
    .await
    .unwrap();
    let big = Data::from(vec![5; 4 << 20]);
    let error = file.write(0, big, WriteFlags::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    let small = Data::from(vec![6; 4096]);
    file.write(0, small.clone(), WriteFlags::default())
        .await
        .unwrap();
    assert_eq!(
        file.read(0, 4096).await.unwrap().to_bytes(),
        small.to_bytes()
    );
}

/// A small file system of its own; unmounted on drop.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn mount(size: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(dir.path())
            .output()
            .is_ok_and(|output| output.status.success());
        mounted.then_some(Tmpfs(dir))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).output();
    }
}

#[tokio::test]
async fn open_errors_name_the_file_and_the_reason() {
    let dir = scratch();
    let missing = dir.path().join("missing");
    for (path, want) in [
        (
            missing.to_str().unwrap(),
            format!(
                "Could not open '{}': No such file or directory",
                missing.display()
            ),
        ),
        ("/", "Could not open '/': Is a directory".to_owned()),
        (
            "/dev/null",
            "'file' driver requires '/dev/null' to be a regular file or a block device".to_owned(),
        ),
        (
            "",
            "The 'file' block driver requires a file name".to_owned(),
        ),
    ] {
        let error = File::open(
            &IoContext::new(),
            &options(Path::new(path), Aio::Threads, Locking::Auto),
            read_only(),
        )
        .await
        .unwrap_err();
        assert_eq!(error.message(), want);
    }
}

#[tokio::test]
async fn a_read_only_file_refuses_changes() {
    let dir = scratch();
    let path = create(&dir, 4096);
    let file = open(&path, Aio::Threads, read_only()).await;
    let write = file.write(0, Data::zeroes(1), WriteFlags::default()).await;
    let zero = file.write_zeroes(0, 1, ZeroFlags::default()).await;
    let resize = file.resize(0, Preallocation::Off).await;
    for result in [write, zero, file.discard(0, 1).await, resize] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
    }
}

#[tokio::test]
async fn one_writer_or_many_readers() {
    let dir = scratch();
    let path = create(&dir, 4096);
    let try_open = |access| {
        let options = options(&path, Aio::Threads, Locking::On);
        async move { File::open(&IoContext::new(), &options, access).await }
    };
    let writer = try_open(FileAccess::default()).await.unwrap();
    let second = try_open(FileAccess::default()).await.unwrap_err();
    assert_eq!(
        second.message(),
        format!(
            "Failed to get \"write\" lock. Is another process using the image [{}]?",
            path.display()
        )
    );
    let reader = try_open(read_only()).await.unwrap_err();
    assert!(
        reader
            .message()
            .starts_with("Failed to get shared \"write\" lock")
    );
    drop(writer);
    let _first = try_open(read_only()).await.unwrap();
    let _second = try_open(read_only()).await.unwrap();
    try_open(FileAccess::default()).await.unwrap_err();
}

fn qemu_io(args: &[&str], path: &Path) -> Option<Output> {
    Command::new("qemu-io").args(args).arg(path).output().ok()
}

#[tokio::test]
async fn qemu_refuses_our_open_images() {
    let dir = scratch();
    let path = create(&dir, 0);
    let mut create = Command::new("qemu-img");
    create
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg("1M");
    if create.status().is_err() {
        eprintln!("skipped: qemu-img is not installed");
        return;
    }
    let free = qemu_io(&["-f", "qcow2", "-c", "write 0 512"], &path).unwrap();
    assert!(free.status.success());
    let writer = open(&path, Aio::Threads, FileAccess::default()).await;
    let refused = qemu_io(&["-f", "qcow2", "-c", "write 0 512"], &path).unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains("Failed to get \"write\" lock"), "{text}");
    let refused = qemu_io(&["-r", "-f", "qcow2", "-c", "read 0 512"], &path).unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        text.contains("Failed to get shared \"write\" lock"),
        "{text}"
    );
    drop(writer);
    let _reader = open(&path, Aio::Threads, read_only()).await;
    let shared = qemu_io(&["-r", "-f", "qcow2", "-c", "read 0 512"], &path).unwrap();
    assert!(shared.status.success());
    let refused = qemu_io(&["-f", "qcow2", "-c", "write 0 512"], &path).unwrap();
    assert!(!refused.status.success());
}

#[tokio::test]
async fn we_refuse_the_images_that_qemu_has_open() {
    let dir = scratch();
    let path = create(&dir, 1 << 20);
    let mut command = Command::new("qemu-io");
    command.args(["-f", "raw"]).arg(&path);
    command.stdin(std::process::Stdio::piped());
    command.stdout(std::process::Stdio::null());
    command.stderr(std::process::Stdio::null());
    let Ok(mut qemu) = command.spawn() else {
        eprintln!("skipped: qemu-io is not installed");
        return;
    };
    let mut refused = None;
    // Until it has come as far as locking the image.
    for _ in 0..100 {
        let options = options(&path, Aio::Threads, Locking::On);
        match File::open(&IoContext::new(), &options, FileAccess::default()).await {
            Ok(_) => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
            Err(error) => {
                refused = Some(error);
                break;
            }
        }
    }
    drop(qemu.stdin.take());
    let status = qemu.wait().unwrap();
    if !status.success() {
        eprintln!("skipped: qemu-io was refused by us first");
        return;
    }
    let refused = refused.expect("qemu-io holds a lock");
    assert_eq!(refused.kind(), ErrorKind::InUse);
    assert!(
        refused
            .message()
            .contains("\" lock. Is another process using")
    );
}

#[tokio::test]
async fn a_failed_flush_is_not_forgotten() {
    let dir = scratch();
    let path = create(&dir, 4096);
    let file = open(&path, Aio::Threads, FileAccess::default()).await;
    file.flush().await.unwrap();
    file.flush_error.store(libc::EIO, Ordering::Relaxed);
    let error = file.flush().await.unwrap_err();
    assert_eq!(error.errno(), libc::EIO);
}

/// A block device on a file; detached on drop.
struct Loop(String);

impl Loop {
    fn attach(path: &Path, sector: u32) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector.to_string()])
            .arg(path)
            .output()
            .ok()?;
        let device = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        (output.status.success() && !device.is_empty()).then_some(Loop(device))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).output();
    }
}

#[tokio::test]
async fn a_block_device_is_zeroed_discarded_and_never_grown() {
    let dir = scratch();
    let image = create(&dir, 1 << 20);
    let Some(device) = Loop::attach(&image, 4096) else {
        eprintln!("skipped: no loop device can be attached here");
        return;
    };
    for access in [FileAccess::default(), direct()] {
        let file = open(Path::new(&device.0), Aio::Threads, access).await;
        assert_eq!(file.info().driver, "host_device");
        assert_eq!((file.size(), file.limits().growable), (1 << 20, false));
        if access.cache.direct {
            assert_eq!(file.limits().alignment, 4096);
        }
        let ones = Data::from(vec![1; 1 << 20]);
        file.write(0, ones, WriteFlags::default()).await.unwrap();
        for may_unmap in [false, true] {
            let flags = ZeroFlags {
                may_unmap,
                ..ZeroFlags::default()
            };
            let offset = 8192 + (u64::from(may_unmap) << 16);
            file.write_zeroes(offset, 4096, flags).await.unwrap();
            let read = file.read(offset - 4096, 12_288).await.unwrap().to_bytes();
            let zero = |part: &[u8], value| part.iter().all(|byte| *byte == value);
            assert!(zero(&read[..4096], 1) && zero(&read[4096..8192], 0) && zero(&read[8192..], 1));
        }
        file.discard(1000, 500_000).await.unwrap();
        assert_eq!(file.read(0, 4096).await.unwrap().to_bytes(), [1; 4096][..]);
        let beyond = file.write(1 << 20, Data::zeroes(4096), WriteFlags::default());
        assert_eq!(beyond.await.unwrap_err().kind(), ErrorKind::OutOfRange);
        let grown = file.resize(2 << 20, Preallocation::Off).await.unwrap_err();
        assert_eq!(grown.message(), "Cannot grow device files");
        file.flush().await.unwrap();
    }
}

#[tokio::test]
async fn what_others_have_cut_off_is_an_error_and_no_hole() {
    const MIB: u64 = 1 << 20;
    for access in [FileAccess::default(), direct()] {
        let dir = scratch();
        let path = create(&dir, 8 * MIB);
        let file = open(&path, Aio::Threads, access).await;
        for at in [0, 6 * MIB] {
            let bytes = Data::from(vec![3; MIB as usize]);
            file.write(at, bytes, WriteFlags::default()).await.unwrap();
        }
        let other = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        other.set_len(4 * MIB).unwrap();
        let start = file.read(0, MIB).await.unwrap().to_bytes();
        assert!(start.iter().all(|byte| *byte == 3));
        assert!(file.read(3 * MIB, MIB).await.unwrap().reads_as_zeroes());
        for (at, len) in [(3 * MIB, 2 * MIB), (4 * MIB, MIB), (6 * MIB, MIB)] {
            let error = file.read(at, len).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io);
            assert!(error.to_string().ends_with("cut it off at 4194304 bytes"));
        }
        // What was there is not said to be zero; what has never been there is.
        for (at, zero) in [(2, true), (4, false), (6, false), (8, true), (9, true)] {
            let status = file.block_status(at * MIB, MIB).await.unwrap();
            assert_eq!((status.zero, status.len), (zero, MIB), "at {at} MiB");
        }
        let hole = file.block_status(2 * MIB, 6 * MIB).await.unwrap();
        assert_eq!((hole.zero, hole.len), (true, 2 * MIB));
        assert!(file.read(8 * MIB, MIB).await.unwrap().reads_as_zeroes());
        // Then it is a file with a hole.
        other.set_len(8 * MIB).unwrap();
        assert!(file.read(4 * MIB, 4 * MIB).await.unwrap().reads_as_zeroes());
    }
}

#[tokio::test]
async fn a_short_write_needs_no_thread_of_the_pool_where_it_may_be_inline() {
    let dir = scratch();
    let path = create(&dir, 1 << 20);
    let context = IoContext::new();
    let options = options(&path, Aio::Threads, Locking::Auto);
    let file = File::open(&context, &options, FileAccess::default()).await;
    let file = Arc::new(file.unwrap());
    let (release, released) = std::sync::mpsc::channel::<()>();
    let released = Arc::new(std::sync::Mutex::new(released));
    // Each takes a thread of the pool and waits for the first, which waits for the release.
    for _ in 0..crate::limits::MAX_POOL_THREADS {
        let (context, released) = (context.clone(), released.clone());
        tokio::spawn(async move {
            let wait = move || {
                let _ = released.lock().unwrap().recv();
                Ok(())
            };
            context.call(wait).await
        });
    }
    tokio::task::yield_now().await;
    let (written, done) = tokio::sync::oneshot::channel();
    let writer = file.clone();
    std::thread::spawn(move || {
        crate::io::allow_inline_writes(crate::io::InlineThread::Guests);
        let data = Data::from(vec![7; 64 << 10]);
        let write = writer.write(64 << 10, data, WriteFlags::default());
        let _ = written.send(futures_util::FutureExt::now_or_never(write));
    });
    done.await.unwrap().expect("is inline").unwrap();
    drop(release);
    let read = file.read(64 << 10, 64 << 10).await.unwrap();
    assert_eq!(read.to_bytes(), vec![7; 64 << 10]);
}

/// Runs on a thread that copies disks.
fn copying<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    let thread = std::thread::spawn(|| {
        crate::io::allow_inline_writes(crate::io::InlineThread::Copies);
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(work)
    });
    thread.join().unwrap()
}

/// Whether space is taken ahead of writes there: on ext4, and nowhere else.
fn takes_room(path: &Path) -> bool {
    let file = std::fs::File::open(path).unwrap();
    rustix::fs::fstatfs(file).unwrap().f_type as u64 == 0xef53
}

#[test]
fn a_file_that_a_copy_makes_grow_has_space_ahead_until_it_is_closed() {
    const PIECE: u64 = 256 << 10;
    let dir = scratch();
    let path = create(&dir, 0);
    let used = |file: &File| file.info().actual_size.unwrap();
    let (file, beside) = (path.clone(), path.clone());
    copying(async move {
        let file = open(&file, Aio::Threads, FileAccess::default()).await;
        for piece in 0..8 {
            let data = Data::from(vec![piece as u8 + 1; PIECE as usize]);
            let flags = WriteFlags::default();
            file.write(piece * PIECE, data, flags).await.unwrap();
        }
        assert_eq!(file.size(), 8 * PIECE);
        if takes_room(&beside) {
            assert!(used(&file) >= crate::limits::GROWTH_ROOM);
        }
        file.close().await.unwrap();
        assert!(used(&file) < 9 * PIECE, "{} bytes are left", used(&file));
    });
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(bytes.len() as u64, 8 * PIECE);
    let is_right = |(at, byte): (usize, &u8)| u64::from(*byte) == at as u64 / PIECE + 1;
    assert!(bytes.iter().enumerate().all(is_right));
}

#[test]
fn space_ahead_of_a_write_reads_as_before_and_can_be_given_back() {
    const PIECE: u64 = 64 << 10;
    let dir = scratch();
    let path = create(&dir, 64 * PIECE);
    copying(async move {
        let file = open(&path, Aio::Threads, FileAccess::default()).await;
        let write = async |at: u64, ahead| {
            let flags = WriteFlags {
                ahead,
                ..WriteFlags::default()
            };
            let data = Data::from(vec![7; PIECE as usize]);
            file.write(at * PIECE, data, flags).await.unwrap();
        };
        write(9, 0).await;
        write(0, 31 * PIECE).await;
        let used = || file.info().actual_size.unwrap() / PIECE;
        if takes_room(&path) {
            assert!((32..34).contains(&used()), "{}", used());
        }
        let byte = |at| if at == 0 || at == 9 { 7 } else { 0 };
        // First: what has been read counts as data.
        for at in 0..64 {
            let status = file.block_status(at * PIECE, PIECE).await.unwrap();
            assert_eq!(status.zero, byte(at) == 0, "piece {at}");
        }
        for at in 0..64 {
            let data = file.read(at * PIECE, PIECE).await.unwrap();
            assert_eq!(
                data.to_bytes(),
                vec![byte(at); PIECE as usize],
                "piece {at}"
            );
        }
        let flags = ZeroFlags {
            may_unmap: true,
            ..ZeroFlags::default()
        };
        file.write_zeroes(10 * PIECE, 22 * PIECE, flags)
            .await
            .unwrap();
        assert!(used() < 12, "{}", used());
        // Behind the end of the file there is nothing to be taken for a write inside of it.
        write(63, u64::MAX).await;
        assert_eq!(file.size(), 64 * PIECE);
        file.close().await.unwrap();
    });
}
