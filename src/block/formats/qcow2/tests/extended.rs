//! Extended L2 entries: images that QEMU and this driver write in turns, what a write copies, and damaged entries.

use serde_json::Value;

use super::*;
use crate::driver::{NewSnapshot, Preallocation, Snapshots};
use crate::error::ErrorKind;
use crate::formats::qcow2::check::check;
use crate::formats::qcow2::create::BackingFile;
use crate::formats::qcow2::testing::{qemu_check, qemu_io};
use crate::protocols::memory::{Change, OpKind};

const SIZE: u64 = 4 << 20;
const BLOCK: usize = 512;

fn options(cluster_size: u64) -> CreateOptions {
    let mut options = CreateOptions::new(SIZE);
    options.cluster_size = cluster_size;
    options.extended_l2 = true;
    options
}

fn backing() -> BackingFile {
    BackingFile {
        name: Some("base.raw".to_owned()),
        format: Some("raw".to_owned()),
    }
}

/// An image file that is changed by QEMU and by this driver, and what it should hold.
struct Exchange {
    scratch: Scratch,
    random: fastrand::Rng,
    cluster_size: u64,
    base: Option<Arc<Memory>>,
    model: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

impl Exchange {
    fn new(seed: u64, cluster_size: u64, backed: bool) -> Self {
        let scratch = Scratch::new();
        let mut model = vec![0; SIZE as usize];
        let base = backed.then(|| {
            // Shorter than the disk, and not a multiple of a subcluster.
            let base: Vec<u8> = (0..SIZE / 2 + 1536)
                .map(|at| (at / 512) as u8 | 1)
                .collect();
            std::fs::write(scratch.path("base.raw"), &base).unwrap();
            model[..base.len()].copy_from_slice(&base);
            Memory::with_content(&base)
        });
        Exchange {
            scratch,
            random: fastrand::Rng::with_seed(seed),
            cluster_size,
            base,
            model,
            snapshots: Vec::new(),
        }
    }

    fn path(&self) -> String {
        let path = self.scratch.path("image.qcow2");
        path.to_str().unwrap().to_owned()
    }

    fn create_by_qemu(&self) {
        let path = self.path();
        let options = format!("extended_l2=on,cluster_size={}", self.cluster_size);
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if self.base.is_some() {
            args.extend(["-b", "base.raw", "-F", "raw"]);
        }
        let size = SIZE.to_string();
        args.extend([path.as_str(), &size]);
        qemu_img(&args);
    }

    async fn create_by_us(&self) {
        let mut options = options(self.cluster_size);
        if self.base.is_some() {
            options.backing = backing();
        }
        let disk = new_image(&options).await;
        self.scratch.save("image.qcow2", &disk);
    }

    async fn open(&self) -> (Arc<Memory>, Arc<Qcow2>) {
        let disk = self.scratch.load("image.qcow2");
        let base = self.base.as_ref().map(|base| base.child());
        let image = open_over(&disk, base).await;
        (disk, image)
    }

    /// A range of whole blocks, often of whole subclusters or clusters.
    fn range(&mut self) -> (u64, u64) {
        let units = [BLOCK as u64, self.cluster_size / 32, self.cluster_size];
        let unit = units[self.random.usize(..3)];
        let at = self.random.u64(..SIZE / unit) * unit;
        let len = self.random.u64(1..=12) * unit;
        (at, len.min(SIZE - at).min(600 << 10))
    }

    fn fill(&mut self, at: u64, len: u64, byte: u8) {
        self.model[at as usize..(at + len) as usize].fill(byte);
    }

    fn change_by_qemu(&mut self) {
        let mut commands = Vec::new();
        for _ in 0..15 {
            let (at, len) = self.range();
            let byte = self.random.u8(1..);
            let command = match self.random.u8(..10) {
                0 | 1 => {
                    self.fill(at, len, 0);
                    format!("write -z {at} {len}")
                }
                2 | 3 => {
                    self.fill(at, len, 0);
                    format!("write -z -u {at} {len}")
                }
                // At most one: QEMU adds streams to a cluster that has become one of data since. It refuses to compress
                // what is allocated.
                4 if !commands
                    .iter()
                    .any(|command: &String| command.contains("-c")) =>
                {
                    let size = self.cluster_size;
                    let at = at / size * size;
                    let len = size.min(SIZE - at);
                    self.fill(at, len, byte);
                    commands.push(format!("discard {at} {len}"));
                    format!("write -c -P {byte} {at} {len}")
                }
                _ => {
                    self.fill(at, len, byte);
                    format!("write -P {byte} {at} {len}")
                }
            };
            commands.push(command);
        }
        // Last, since it is a hint: what it leaves is asked.
        let (at, len) = self.range();
        commands.push(format!("discard {at} {len}"));
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        qemu_io(&self.path(), &commands);
        let is = qemu_content(&self.scratch, Path::new(&self.path()));
        self.accept_discard(at, &is[at as usize..(at + len) as usize]);
    }

    /// Blocks that were discarded are as before, or zeroes.
    fn accept_discard(&mut self, at: u64, is: &[u8]) {
        let model = &mut self.model[at as usize..][..is.len()];
        for (is, was) in is.chunks(BLOCK).zip(model.chunks_mut(BLOCK)) {
            assert!(is == was || is.iter().all(|byte| *byte == 0));
            was.copy_from_slice(is);
        }
    }

    async fn change_by_us(&mut self) {
        let (disk, image) = self.open().await;
        for step in 0..25 {
            let (at, len) = self.range();
            let byte = self.random.u8(1..);
            match self.random.u8(..12) {
                0 | 1 => {
                    let flags = ZeroFlags::default();
                    image.write_zeroes(at, len, flags).await.unwrap();
                    self.fill(at, len, 0);
                }
                2 | 3 => {
                    image.write_zeroes(at, len, unmap()).await.unwrap();
                    self.fill(at, len, 0);
                }
                4 | 5 => {
                    image.discard(at, len).await.unwrap();
                    let is = read(&image, at, len).await;
                    self.accept_discard(at, &is);
                }
                6 => {
                    let size = self.cluster_size;
                    let at = at / size * size;
                    let len = size.min(SIZE - at);
                    let bytes = Data::from(vec![byte; len as usize]);
                    image.write_compressed(at, bytes).await.unwrap();
                    self.fill(at, len, byte);
                }
                7 if self.snapshots.len() < 3 => {
                    let new = NewSnapshot {
                        name: format!("{step} of {}", self.snapshots.len()),
                        date_sec: 1,
                        date_nsec: 0,
                        vm_clock_nsec: 0,
                    };
                    self.snapshots.push((new.name.clone(), self.model.clone()));
                    image.create(new).await.unwrap();
                }
                _ => {
                    // Guests may write single bytes here.
                    let (from, less) = (self.random.u64(..BLOCK as u64), self.random.u64(..300));
                    let (at, len) = match len > 1000 {
                        true => (at + from, len - from - less),
                        false => (at, len),
                    };
                    write(&image, at, vec![byte; len as usize]).await.unwrap();
                    self.fill(at, len, byte);
                }
            }
        }
        assert_same(&read(&image, 0, SIZE).await, &self.model);
        image.close().await.unwrap();
        let report = check(&disk.child()).await.unwrap();
        assert!(report.is_clean(), "{report:#?}");
        self.scratch.save("image.qcow2", &disk);
    }

    /// Both find the image sound, read the same from it, and say the same of every block.
    async fn compare(&self) {
        let path = self.path();
        let theirs = assert_qemu_clean(Path::new(&path));
        let content = qemu_content(&self.scratch, Path::new(&path));
        assert_same(&content, &self.model);
        for (name, model) in &self.snapshots {
            let raw = self.scratch.path("snapshot.raw");
            let to = raw.to_str().unwrap();
            qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "-l", name, &path, to]);
            assert_same(&std::fs::read(raw).unwrap(), model);
        }
        let (disk, image) = self.open().await;
        assert_same(&read(&image, 0, SIZE).await, &self.model);
        let ours = check(&disk.child()).await.unwrap();
        assert!(ours.is_clean(), "{ours:#?}");
        for (field, number) in [
            ("allocated-clusters", ours.allocated_clusters),
            ("compressed-clusters", ours.compressed_clusters),
            ("fragmented-clusters", ours.fragmented_clusters),
            ("image-end-offset", ours.image_end_offset),
        ] {
            let theirs = theirs.get(field).and_then(Value::as_u64).unwrap_or(0);
            assert_eq!(theirs, number, "{field}");
        }
        self.compare_map(&image).await;
        image.close().await.unwrap();
    }

    /// Holds block_status against `qemu-img map`.
    async fn compare_map(&self, image: &Qcow2) {
        let map = qemu_img(&["map", "-f", "qcow2", "--output=json", &self.path()]);
        let map: Vec<Value> = serde_json::from_str(&map).unwrap();
        for part in map {
            let start = part["start"].as_u64().unwrap();
            let end = start + part["length"].as_u64().unwrap();
            let here = part["depth"] == 0 && part["present"] == true;
            let mut at = start;
            while at < end {
                let ours = image.block_status(at, end - at).await.unwrap();
                assert_eq!(ours.allocated, here, "at {at:#x}: {part} {ours:?}");
                if here {
                    // QEMU may know of holes in the file that data lie in.
                    assert_eq!(ours.zero, part["data"] == false, "at {at:#x}: {part}");
                    assert_eq!(ours.compressed, part["compressed"] == true, "{part}");
                    let offset = part["offset"].as_u64().map(|offset| offset + at - start);
                    if part["data"] == true {
                        assert_eq!(ours.host_offset, offset, "at {at:#x}: {part}");
                    }
                }
                at += ours.len;
            }
        }
    }
}

async fn exchange(seed: u64, cluster_size: u64, backed: bool) {
    println!("seed {seed}, cluster size {cluster_size}, backed {backed}");
    let mut exchange = Exchange::new(seed, cluster_size, backed);
    match seed.is_multiple_of(2) {
        true => exchange.create_by_qemu(),
        false => exchange.create_by_us().await,
    }
    for round in 0..3 {
        exchange.change_by_qemu();
        exchange.compare().await;
        exchange.change_by_us().await;
        exchange.compare().await;
        if round == 1 {
            let name = "theirs".to_owned();
            qemu_img(&["snapshot", "-c", &name, &exchange.path()]);
            exchange.snapshots.push((name, exchange.model.clone()));
        }
    }
}

#[tokio::test]
async fn qemu_and_we_change_images_in_turns() {
    let seed = std::env::var("QBLOCKD_EXCHANGE_SEED");
    let first = seed.ok().and_then(|seed| seed.parse().ok()).unwrap_or(0);
    let cases = [
        (16 << 10, true),
        (64 << 10, true),
        (64 << 10, false),
        (128 << 10, false),
        (2 << 20, true),
    ];
    for (seed, (cluster_size, backed)) in (first..).zip(cases) {
        exchange(seed, cluster_size, backed).await;
    }
}

/// The ranges of the file that were written.
fn written(disk: &Memory) -> Vec<(u64, u64)> {
    let log = disk.log();
    let write = |change: &Change| match change {
        Change::Write { offset, data, .. } => Some((*offset, data.len())),
        _ => None,
    };
    log.iter()
        .filter_map(|record| write(&record.change))
        .collect()
}

#[tokio::test]
async fn a_write_copies_only_what_it_touches() {
    let mut made = options(128 << 10);
    made.backing = backing();
    let disk = new_image(&made).await;
    let base = Memory::with_content(&vec![7; SIZE as usize]);
    let image = open_over(&disk, Some(base.child())).await;
    // So that the L2 table is there.
    write(&image, SIZE - 4096, vec![1; 4096]).await.unwrap();
    for (at, len, bytes) in [
        // A new cluster, then subclusters of it: whole ones, parts, and one that is there already.
        (8192, 4096, 4096),
        (16384, 8192, 8192),
        (40_000, 100, 4096),
        (36_864 + 10, 4096, 8192 - 10),
        (40_001, 1, 1),
        // From a subcluster that is there to one that is not.
        (16384 + 4096, 6000, 8192),
        // Two new clusters.
        ((128 << 10) * 4 - 100, 200, 8192),
    ] {
        let reads = base.count(OpKind::Read);
        disk.start_log();
        write(&image, at, vec![2; len as usize]).await.unwrap();
        let copied: u64 = written(&disk).iter().map(|(_, len)| len).sum();
        assert_eq!(copied, bytes, "{len} bytes at {at}");
        if at.is_multiple_of(4096) && len % 4096 == 0 {
            assert_eq!(base.count(OpKind::Read), reads, "{len} bytes at {at}");
        }
    }
}

#[tokio::test]
async fn a_shared_cluster_is_copied_where_it_has_data() {
    let disk = new_image(&options(64 << 10)).await;
    let image = open(&disk).await;
    for index in [0, 1, 5, 9, 31] {
        write(&image, index * 2048, vec![index as u8 + 1; 2048])
            .await
            .unwrap();
    }
    image.write_zeroes(2 * 2048, 2048, unmap()).await.unwrap();
    let new = NewSnapshot::named("s");
    image.create(new).await.unwrap();
    let mut model = read(&image, 0, SIZE).await;
    disk.start_log();
    // Part of subcluster 5 and of 6, which has no data.
    write(&image, 6 * 2048 - 10, vec![0xaa; 20]).await.unwrap();
    let mut data: Vec<_> = written(&disk).iter().map(|(_, len)| *len).collect();
    data.retain(|len| *len != 64 << 10);
    // 0 and 1; 5 and what is written of 6, whose rest is a hole; 9; 31. The new L2 table is not counted.
    assert_eq!(data, [4096, 2048 + 10, 2048, 2048]);
    model[6 * 2048 - 10..6 * 2048 + 10].fill(0xaa);
    assert_same(&read(&image, 0, SIZE).await, &model);
    verify(&disk, image, &model).await;
}

#[tokio::test]
async fn writes_side_by_side_in_one_cluster_do_not_wait_for_each_other() {
    let disk = new_image(&options(64 << 10)).await;
    let image = open(&disk).await;
    write(&image, 0, vec![1; 2048]).await.unwrap();
    disk.hold(OpKind::Write);
    let tasks: Vec<_> = (1..9_u64)
        .map(|index| {
            let image = image.clone();
            tokio::spawn(
                async move { write(&image, index * 2048 + 5, vec![index as u8; 2000]).await },
            )
        })
        .collect();
    disk.wait_held(8).await;
    disk.release_all();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    let mut model = vec![0; SIZE as usize];
    model[..2048].fill(1);
    for index in 1..9 {
        model[index * 2048 + 5..][..2000].fill(index as u8);
    }
    verify(&disk, image, &model).await;
}

#[tokio::test]
async fn preallocated_clusters_show_the_backing_and_take_writes_in_their_place() {
    let mut made = options(64 << 10);
    made.preallocation = Preallocation::Metadata;
    made.backing = backing();
    let disk = new_image(&made).await;
    let base: Vec<u8> = (0..SIZE).map(|at| (at / 512) as u8 | 1).collect();
    let image = open_over(&disk, Some(Memory::with_content(&base).child())).await;
    assert_same(&read(&image, 0, SIZE).await, &base);
    let mut model = base.clone();
    let len = disk.size();
    for at in [0, 70_000, 1_000_000, SIZE - 1000] {
        write(&image, at, vec![0; 1000]).await.unwrap();
        model[at as usize..][..1000].fill(0);
    }
    assert_eq!(disk.size(), len);
    image.close().await.unwrap();
    let scratch = Scratch::new();
    std::fs::write(scratch.path("base.raw"), &base).unwrap();
    let path = scratch.save("image.qcow2", &disk);
    assert_qemu_clean(&path);
    assert_same(&qemu_content(&scratch, &path), &model);
}

/// What lies in each subcluster of the first cluster: d(ata) or z(eroes) of the image, b(acking).
async fn states(image: &Qcow2) -> String {
    let mut states = String::new();
    for at in (0..64 << 10).step_by(2048) {
        let status = image.block_status(at, 2048).await.unwrap();
        assert_eq!(status.len, 2048);
        states.push(match (status.allocated, status.zero) {
            (false, _) => 'b',
            (true, true) => 'z',
            (true, false) => 'd',
        });
    }
    states
}

#[tokio::test]
async fn zeroes_and_discards_go_by_the_subclusters_that_they_cover() {
    let mut made = options(64 << 10);
    made.backing = backing();
    let disk = new_image(&made).await;
    let base = vec![9; SIZE as usize];
    let image = open_over(&disk, Some(Memory::with_content(&base).child())).await;
    let mut model = base.clone();
    write(&image, 0, vec![7; 32 << 10]).await.unwrap();
    model[..32 << 10].fill(7);
    let keep = ZeroFlags::default();
    disk.start_log();
    // Whole subclusters, with data and without; no byte of the file changes for them.
    for (at, len, flags) in [(3 * 2048, 4096, unmap()), (15 * 2048, 4096, keep)] {
        image.write_zeroes(at, len, flags).await.unwrap();
        model[at as usize..][..len as usize].fill(0);
    }
    // Only one of the three that it touches is covered.
    image.discard(8 * 2048 + 100, 4096).await.unwrap();
    model[9 * 2048..10 * 2048].fill(0);
    assert_eq!(written(&disk), []);
    // The ends are data: of the backing in the last one.
    image
        .write_zeroes(19 * 2048 - 10, 2048 + 20, unmap())
        .await
        .unwrap();
    model[19 * 2048 - 10..][..2048 + 20].fill(0);
    let bytes: Vec<u64> = written(&disk).iter().map(|(_, len)| *len).collect();
    assert_eq!(bytes, [2048, 2048]);
    assert_eq!(states(&image).await, "dddzzddddzdddddzzbdzdbbbbbbbbbbb");
    assert_same(&read(&image, 0, SIZE).await, &model);
    // As QEMU sees it, and with all of the cluster gone.
    image.close().await.unwrap();
    let scratch = Scratch::new();
    std::fs::write(scratch.path("base.raw"), &base).unwrap();
    let path = scratch.save("image.qcow2", &disk);
    assert_qemu_clean(&path);
    assert_same(&qemu_content(&scratch, &path), &model);
    let image = open_over(&disk, Some(Memory::with_content(&base).child())).await;
    image.discard(0, 64 << 10).await.unwrap();
    assert_eq!(states(&image).await, "z".repeat(32));
    image.close().await.unwrap();
    let report = check(&disk.child()).await.unwrap();
    assert!(
        report.is_clean() && report.allocated_clusters == 0,
        "{report:#?}"
    );
}

#[tokio::test]
async fn a_cluster_without_data_is_given_back() {
    let disk = new_image(&options(64 << 10)).await;
    let image = open(&disk).await;
    write(&image, 0, vec![1; 6000]).await.unwrap();
    write(&image, 64 << 10, vec![1; 6000]).await.unwrap();
    // A subcluster at a time; the first keeps its place, the second does not.
    for index in 0..3 {
        let at = index * 2048;
        image
            .write_zeroes(at, 2048, ZeroFlags::default())
            .await
            .unwrap();
        image.discard((64 << 10) + at, 2048).await.unwrap();
    }
    image.close().await.unwrap();
    let image = open(&disk).await;
    let report = check(&disk.child()).await.unwrap();
    assert!(report.is_clean(), "{report:#?}");
    assert_eq!(report.allocated_clusters, 1);
    let before = disk.size();
    write(&image, 0, vec![2; 100]).await.unwrap();
    write(&image, 64 << 10, vec![2; 100]).await.unwrap();
    assert_eq!(disk.size(), before, "both places are used again");
    let mut model = vec![0; SIZE as usize];
    model[..100].fill(2);
    model[64 << 10..][..100].fill(2);
    verify(&disk, image, &model).await;
}

/// Where the first L2 table of these images lies, and the first data cluster.
const L2: usize = 4 << 16;
const DATA: u64 = 5 << 16;
const COPIED: u64 = 1 << 63;

#[tokio::test]
async fn entries_that_contradict_themselves_fail_their_own_cluster_only() {
    let disk = new_image(&options(64 << 10)).await;
    let image = open(&disk).await;
    write(&image, 0, vec![1; 4096]).await.unwrap();
    write(&image, 64 << 10, vec![2; 4096]).await.unwrap();
    image.close().await.unwrap();
    let sound = disk.content();
    let word = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
    assert_eq!((word(L2), word(L2 + 8)), (COPIED | DATA, 3));
    for (what, descriptor, bitmap) in [
        ("data and zeroes", COPIED | DATA, 3 | 2 << 32),
        ("data without a place", 0, 3),
        ("the zero flag", COPIED | DATA | 1, 3),
        ("subclusters of a stream", 1 << 62 | DATA, 1),
        ("zeroes in a stream", 1 << 62 | DATA, 1 << 63),
    ] {
        let mut damaged = sound.clone();
        damaged[L2..L2 + 8].copy_from_slice(&u64::to_be_bytes(descriptor));
        damaged[L2 + 8..L2 + 16].copy_from_slice(&u64::to_be_bytes(bitmap));
        let disk = Memory::with_content(&damaged);
        let report = check(&disk.child()).await.unwrap();
        assert!(report.corruptions > 0, "{what}: {report:#?}");
        let scratch = Scratch::new();
        let (theirs, text) = qemu_check(&scratch.save("damaged.qcow2", &disk));
        if what != "the zero flag" {
            // QEMU does not look at it.
            assert_eq!(theirs["corruptions"], report.corruptions, "{what}: {text}");
        }
        let leaks = theirs["leaks"].as_u64().unwrap_or(0);
        assert_eq!(leaks, report.leaks, "{what}: {text} {report:#?}");
        let image = open(&disk).await;
        let error = image.read(0, 512).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
        assert!(image.block_status(0, 512).await.is_err(), "{what}");
        assert!(write(&image, 100, vec![9; 10]).await.is_err(), "{what}");
        assert!(image.write_zeroes(0, 64 << 10, unmap()).await.is_err());
        assert!(image.discard(0, 64 << 10).await.is_err(), "{what}");
        assert_eq!(read(&image, 64 << 10, 4096).await, vec![2; 4096]);
        image.close().await.unwrap();
    }
}
