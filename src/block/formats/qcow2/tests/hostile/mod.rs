//! Images made to hurt: every field of the format's limits damaged in turn, and random damage.
//!
//! The sample that is damaged, by clusters of 4 KiB: header, refcount table, refcount block, L1 table, L2 table of guest
//! 0, data of guest 0 and of guest 8 KiB, L2 table of guest 2 MiB, data of guest 3 MiB.

use super::*;
use crate::driver::{NewSnapshot, Snapshots};
use crate::error::ErrorKind;
use crate::events::{Corruption, Happening, NodeEvent, channel};
use crate::formats::qcow2::CompressionType;
use crate::formats::qcow2::create::{BackingFile, Compat};
use crate::formats::qcow2::testing::{block_on, qemu_io};
use crate::protocols::memory::Change;
use tokio::sync::mpsc::Receiver;

mod damage;
mod fields;
mod headers;
mod lost;
mod metadata;
mod mutations;

/// Puts a big-endian number of `width` bytes into the image.
fn put(image: &mut [u8], at: usize, width: usize, value: u64) {
    let bytes = value.to_be_bytes();
    image[at..at + width].copy_from_slice(&bytes[8 - width..]);
}

/// Makes the disk hold these bytes and nothing else.
fn replace(disk: &Memory, bytes: &[u8]) {
    disk.apply(&Change::Resize { size: 0 }).unwrap();
    let data = Data::from(bytes.to_vec());
    let (offset, fua) = (0, false);
    disk.apply(&Change::Write { offset, data, fua }).unwrap();
}

fn named(name: &str) -> NewSnapshot {
    NewSnapshot {
        name: name.to_owned(),
        date_sec: 7,
        date_nsec: 8,
        vm_clock_nsec: 9,
    }
}

/// Small valid images with one of everything: data, zeroes, compressed clusters, shared tables, snapshots.
async fn valid_images() -> Vec<Arc<Memory>> {
    let mut images = Vec::new();
    for (cluster_bits, refcount_bits, compat, backing) in [
        (9, 16, Compat::V1_1, false),
        (9, 1, Compat::V1_1, false),
        (9, 64, Compat::V1_1, true),
        (10, 2, Compat::V1_1, false),
        (12, 16, Compat::V0_10, false),
        (12, 8, Compat::V1_1, true),
        (16, 16, Compat::V1_1, false),
        (14, 16, Compat::V1_1, true),
    ] {
        let mut options = CreateOptions::new(300 << 10);
        if cluster_bits == 10 {
            options.compression_type = CompressionType::Zstd;
        }
        options.extended_l2 = cluster_bits == 14;
        options.cluster_size = 1 << cluster_bits;
        options.refcount_bits = refcount_bits;
        options.compat = compat;
        if backing {
            options.backing = BackingFile {
                name: Some("base.raw".to_owned()),
                format: Some("raw".to_owned()),
            };
        }
        images.push(filled_image(&options).await);
    }
    images.extend(images_of_qemu());
    images
}

async fn filled_image(options: &CreateOptions) -> Arc<Memory> {
    let disk = new_image(options).await;
    let image = open(&disk).await;
    let cluster = options.cluster_size;
    write(&image, 0, vec![0x11; 9000]).await.unwrap();
    write(&image, 150_000, vec![0x22; 5000]).await.unwrap();
    if options.refcount_bits > 1 {
        Snapshots::create(&*image, named("first")).await.unwrap();
        write(&image, 4000, vec![0x33; 9000]).await.unwrap();
        Snapshots::create(&*image, named("second")).await.unwrap();
    }
    image.write_zeroes(0, cluster, unmap()).await.unwrap();
    for index in 1..4 {
        let bytes = Data::from(vec![index as u8; cluster as usize]);
        image
            .write_compressed(index * cluster, bytes)
            .await
            .unwrap();
    }
    write(&image, 290_000, vec![0x44; 3000]).await.unwrap();
    image.close().await.unwrap();
    disk
}

/// Images with what only QEMU writes: bitmaps, lazy refcounts.
fn images_of_qemu() -> Vec<Arc<Memory>> {
    let scratch = Scratch::new();
    let mut images = Vec::new();
    for (name, options) in [
        ("plain.qcow2", "cluster_size=512"),
        ("lazy.qcow2", "cluster_size=4k,lazy_refcounts=on"),
        ("bitmaps.qcow2", "cluster_size=1k"),
        ("zstd.qcow2", "cluster_size=2k,compression_type=zstd"),
        ("extended.qcow2", "cluster_size=16k,extended_l2=on"),
    ] {
        let path = scratch.path(name);
        let path = path.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path, "300k"]);
        qemu_io(
            path,
            &["write -P 1 0 20k", "write -P 2 100k 9k", "write -z 0 4k"],
        );
        if name.starts_with("bitmaps") {
            qemu_img(&["bitmap", "--add", path, "one"]);
            qemu_img(&["bitmap", "--add", "-g", "512", path, "two"]);
        }
        qemu_img(&["snapshot", "-c", "theirs", path]);
        qemu_io(path, &["write -P 3 10k 9k", "write -c 64k 16k"]);
        images.push(scratch.load(name));
    }
    images.push(image_without_data(&scratch));
    images
}

/// An image whose guest data lie in another file.
fn image_without_data(scratch: &Scratch) -> Arc<Memory> {
    let (path, data) = (scratch.path("outside.qcow2"), scratch.path("outside.raw"));
    let (path, data) = (path.to_str().unwrap(), data.to_str().unwrap());
    let options = format!("cluster_size=4k,data_file={data}");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, path, "300k"]);
    qemu_io(path, &["write -P 1 0 20k", "write -z 8k 4k"]);
    scratch.load("outside.qcow2")
}

const CLUSTER: usize = 4096;
const REFTABLE: usize = CLUSTER;
const REFBLOCK: usize = 2 * CLUSTER;
const L1: usize = 3 * CLUSTER;
const L2: usize = 4 * CLUSTER;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const FAR: u64 = 3 << 20;

fn options() -> CreateOptions {
    let mut options = CreateOptions::new(4 << 20);
    options.cluster_size = CLUSTER as u64;
    options
}

async fn sample() -> Vec<u8> {
    let disk = new_image(&options()).await;
    let image = open(&disk).await;
    write(&image, 0, vec![1; CLUSTER]).await.unwrap();
    write(&image, 8192, vec![2; CLUSTER]).await.unwrap();
    write(&image, FAR, vec![3; CLUSTER]).await.unwrap();
    image.close().await.unwrap();
    let bytes = disk.content();
    // What the tests below rely on.
    assert_eq!(&bytes[L1..L1 + 8], &(COPIED | L2 as u64).to_be_bytes());
    let first = COPIED | (5 * CLUSTER as u64);
    assert_eq!(&bytes[L2..L2 + 8], &first.to_be_bytes());
    bytes
}

/// An image for writing, with what it reports.
async fn open_reporting(disk: &Arc<Memory>) -> (Arc<Qcow2>, Receiver<NodeEvent>) {
    let (sink, events) = channel();
    let options = OpenOptions {
        reporter: sink.reporter("node"),
        ..OpenOptions::default()
    };
    let opening = Qcow2::open(disk.child(), options).await.unwrap();
    (opening.finish(None).await.unwrap(), events)
}

/// What was reported since the last call.
fn reported(events: &mut Receiver<NodeEvent>) -> Vec<Corruption> {
    let next = || events.try_recv().ok();
    let corruption = |event: NodeEvent| {
        assert_eq!(event.node, "node");
        match event.what {
            Happening::ImageCorrupted(corruption) => corruption,
            other => panic!("{other:?}"),
        }
    };
    std::iter::from_fn(next).map(corruption).collect()
}

async fn try_open(disk: &Arc<Memory>, read_only: bool) -> Result<Arc<Qcow2>> {
    let options = OpenOptions {
        read_only,
        ..OpenOptions::default()
    };
    Qcow2::open(disk.child(), options).await?.finish(None).await
}

/// Gives the image a snapshot `s` with this L1 table. Its clusters are not counted.
fn snapshot(image: &mut Vec<u8>, l1_offset: u64, l1_entries: u64) {
    image.resize(20 * CLUSTER, 0);
    let at = 16 * CLUSTER;
    put(image, 60, 4, 1);
    put(image, 64, 8, at as u64);
    put(image, at, 8, l1_offset);
    put(image, at + 8, 4, l1_entries);
    put(image, at + 12, 4, 0x0001_0001);
    put(image, at + 36, 4, 16);
    image[at + 56..at + 58].copy_from_slice(b"1s");
}

fn assert_corrupt<T>(what: &str, result: Result<T>) {
    match result {
        Ok(_) => panic!("{what}: worked"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}"),
    }
}

/// Everything that changes guest cluster 0.
const CHANGES: [&str; 6] = [
    "write",
    "small write",
    "zeroes",
    "unmap",
    "discard",
    "compressed",
];

async fn change(image: &Qcow2, how: &str) -> Result<()> {
    let cluster = CLUSTER as u64;
    let data = Data::from(vec![9; CLUSTER]);
    match how {
        "write" => image.write(0, data, WriteFlags::default()).await,
        "small write" => write(image, 100, vec![9; 100]).await,
        "zeroes" => image.write_zeroes(0, cluster, ZeroFlags::default()).await,
        "unmap" => image.write_zeroes(0, cluster, unmap()).await,
        "discard" => image.discard(0, cluster).await,
        _ => image.write_compressed(0, data).await,
    }
}

/// The rest of the disk reads and takes writes.
async fn assert_rest_works(what: &str, image: &Qcow2) {
    assert_eq!(read(image, FAR, 10).await, [3; 10], "{what}");
    write(image, FAR + 8192, vec![7; CLUSTER]).await.unwrap();
    assert_eq!(read(image, FAR + 8192, 10).await, [7; 10], "{what}");
}
