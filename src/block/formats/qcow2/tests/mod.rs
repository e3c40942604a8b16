//! The driver end to end, on a disk in memory, with QEMU's tools as oracles.

use std::path::Path;
use std::sync::Arc;

use super::create::{CreateOptions, create};
use super::testing::{HANGS_AFTER, Scratch, assert_qemu_clean, qemu_img};
use super::{OpenOptions, Qcow2};
use crate::driver::{Child, Driver, Requests, WriteFlags, ZeroFlags};
use crate::error::Result;
use crate::io::Data;
use crate::protocols::memory::Memory;

mod concurrency;
mod crashes;
mod data_file;
mod extended;
mod faults;
mod geometries;
mod hostile;
mod model;
mod no_op;
mod operations;
mod refcount_blocks;
mod reflinks;
mod scattered;
mod sharing;
mod snapshots;
mod space;

/// A new image of `size` bytes on a disk in memory.
async fn new_image(options: &CreateOptions) -> Arc<Memory> {
    let disk = Memory::new(0);
    create(&disk.child(), options).await.unwrap();
    disk
}

async fn open(disk: &Arc<Memory>) -> Arc<Qcow2> {
    open_over(disk, None).await
}

async fn open_over(disk: &Arc<Memory>, backing: Option<Child>) -> Arc<Qcow2> {
    let opening = Qcow2::open(disk.child(), OpenOptions::default())
        .await
        .unwrap();
    opening.finish(backing).await.unwrap()
}

async fn read(image: &Qcow2, offset: u64, len: u64) -> Vec<u8> {
    image.read(offset, len).await.unwrap().to_bytes().to_vec()
}

async fn write(image: &Qcow2, offset: u64, bytes: Vec<u8>) -> Result<()> {
    image
        .write(offset, Data::from(bytes), WriteFlags::default())
        .await
}

fn unmap() -> ZeroFlags {
    ZeroFlags {
        may_unmap: true,
        ..ZeroFlags::default()
    }
}

/// What qemu-img reads from the image.
fn qemu_content(scratch: &Scratch, path: &Path) -> Vec<u8> {
    let raw = scratch.path("content.raw");
    let (from, to) = (path.to_str().unwrap(), raw.to_str().unwrap());
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", from, to]);
    std::fs::read(raw).unwrap()
}

/// Closes the image, has qemu-img check it, and compares what qemu-img reads.
async fn verify(disk: &Arc<Memory>, image: Arc<Qcow2>, expected: &[u8]) {
    image.close().await.unwrap();
    let scratch = Scratch::new();
    let path = scratch.save("image.qcow2", disk);
    assert_qemu_clean(&path);
    let content = qemu_content(&scratch, &path);
    assert_same(&content, expected);
}

/// Compares contents without printing megabytes.
#[track_caller]
fn assert_same(content: &[u8], expected: &[u8]) {
    assert_eq!(content.len(), expected.len());
    let differs = (0..content.len()).find(|&at| content[at] != expected[at]);
    if let Some(at) = differs {
        let end = (at + 16).min(content.len());
        panic!(
            "differs at {at:#x}: {:x?} instead of {:x?}",
            &content[at..end],
            &expected[at..end]
        );
    }
}
