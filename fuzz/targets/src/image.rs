//! A damaged image and operations on it.
//!
//! ```text
//! which image | how it is opened | how many edits | the edits | operations until the end
//! ```
//!
//! Nothing may panic, hang, or take memory without bound. An image that nobody edited must be sound at the end, whatever
//! was done with it.

use std::sync::{Arc, OnceLock};

use block::driver::{
    Driver, NewSnapshot, Preallocation, Requests, SnapshotSelector, Snapshots, WriteFlags,
    ZeroFlags,
};
use block::formats::qcow2::check::{CheckOptions, Repair, check, repair};
use block::formats::qcow2::create::{Compat, CreateOptions, create};
use block::formats::qcow2::{OpenOptions, Qcow2};
use block::io::Data;
use block::protocols::memory::{Change, Memory};

use crate::input::Input;

/// Bytes of the disk in every image.
const SIZE: u64 = 400 << 10;

/// Host bytes that a case may use beyond its image.
const SPACE: u64 = 16 << 20;

/// Operations on one image.
const MAX_OPERATIONS: usize = 64;

/// One that stands for the bytes themselves as the image.
const RAW: u8 = 255;

/// Runs one input.
pub fn run(data: &[u8]) {
    runtime().block_on(case(data));
}

fn runtime() -> &'static tokio::runtime::Runtime {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime")
    })
}

async fn case(data: &[u8]) {
    let mut input = Input::new(data);
    let which = input.byte();
    let how = input.byte();
    let edits = input.byte();
    let disk = if which == RAW {
        let image = input.take(data.len().saturating_sub(64));
        Memory::with_content(image)
    } else {
        let images = sound_images().await;
        images[usize::from(which) % images.len()].fork()
    };
    for _ in 0..edits.min(16) {
        edit(&disk, &mut input).await;
    }
    disk.set_space_limit(Some(disk.allocated() + SPACE));
    if how & 8 != 0 {
        check_and_repair(&disk.fork()).await;
    }
    operate(&disk, how, &mut input).await;
    let report = check(&disk.child()).await;
    if which != RAW && edits == 0 {
        let report = report.expect("a sound image can be checked");
        assert!(!report.is_broken(), "{report:?}");
    }
}

/// The images that inputs begin with.
async fn sound_images() -> &'static [Arc<Memory>] {
    static IMAGES: tokio::sync::OnceCell<Vec<Arc<Memory>>> = tokio::sync::OnceCell::const_new();
    let make = || async {
        let mut images = Vec::new();
        let kinds = [
            (512, 16, Compat::V1_1),
            (4096, 64, Compat::V1_1),
            (4096, 2, Compat::V1_1),
            (65536, 16, Compat::V1_1),
            (4096, 16, Compat::V0_10),
        ];
        for (cluster_size, refcount_bits, compat) in kinds {
            let mut options = CreateOptions::new(SIZE);
            options.cluster_size = cluster_size;
            options.refcount_bits = refcount_bits;
            options.compat = compat;
            images.push(sound_image(&options).await.expect("an image"));
        }
        images
    };
    IMAGES.get_or_init(make).await
}

/// Plain, zero and compressed clusters, a snapshot and what came after it.
async fn sound_image(options: &CreateOptions) -> block::error::Result<Arc<Memory>> {
    let disk = Memory::new(0);
    create(&disk.child(), options).await?;
    let opening = Qcow2::open(disk.child(), OpenOptions::default()).await?;
    let image = opening.finish(None).await?;
    let bytes = |byte: u8, len: usize| Data::from(vec![byte; len]);
    let size = options.cluster_size;
    image
        .write(1000, bytes(1, 70_000), WriteFlags::default())
        .await?;
    let at = (100_000_u64).next_multiple_of(size);
    image.write_compressed(at, bytes(2, size as usize)).await?;
    image
        .write_zeroes(40_000, 9000, ZeroFlags::default())
        .await?;
    Snapshots::create(&*image, NewSnapshot::named("old")).await?;
    image
        .write(3000, bytes(3, 5000), WriteFlags::default())
        .await?;
    image.close().await?;
    Ok(disk)
}

/// Damages a place of the image. Most metadata lie in the first clusters.
async fn edit(disk: &Arc<Memory>, input: &mut Input<'_>) {
    let kind = input.byte();
    let at = match kind & 7 {
        // A byte of the header, an aligned field of it, an entry of a table, any byte.
        0 => input.number(1),
        1 => input.number(1) / 4 * 4,
        2..5 => input.number(2) * 8,
        _ => input.number(3),
    };
    let bytes = match kind >> 4 & 3 {
        0 => input.take(1).to_vec(),
        1 => (input.number(4) as u32).to_be_bytes().to_vec(),
        2 => input.number(8).to_be_bytes().to_vec(),
        // An entry: a place in units of sectors, and the flags at the top.
        _ => {
            let flags = input.number(1) << 56;
            (flags | input.number(2) << 9 | input.number(1) & 1)
                .to_be_bytes()
                .to_vec()
        }
    };
    let end = at + bytes.len() as u64;
    if !bytes.is_empty() && end <= disk.size() {
        let write = disk.write(at, Data::from(bytes), WriteFlags::default());
        write.await.expect("memory can be written");
    }
    if kind & 0x40 != 0 {
        let size = input.number(3) * 16;
        disk.apply(&Change::Resize { size }).expect("a new size");
    }
}

async fn check_and_repair(disk: &Arc<Memory>) {
    let _ = check(&disk.child()).await;
    if let Err(error) = repair(&disk.child(), Repair::All, &CheckOptions::default()).await {
        assert!(!error.message().is_empty());
    }
}

async fn operate(disk: &Arc<Memory>, how: u8, input: &mut Input<'_>) {
    let options = OpenOptions {
        read_only: how & 1 != 0,
        pass_discard: how & 2 != 0,
        pass_discard_snapshot: how & 2 != 0,
        l2_cache_bytes: if how & 4 != 0 { 0 } else { 1 << 20 },
        refcount_cache_bytes: if how & 4 != 0 { 0 } else { 1 << 20 },
        ..OpenOptions::default()
    };
    let Ok(opening) = Qcow2::open(disk.child(), options).await else {
        return;
    };
    let backing = (how & 16 != 0).then(|| Memory::with_content(&[9; 50_000]).child());
    let Ok(image) = opening.finish(backing).await else {
        return;
    };
    for _ in 0..MAX_OPERATIONS {
        if input.is_empty() {
            break;
        }
        operation(&image, input).await;
    }
    let _ = image.close().await;
}

/// One operation; its answer does not matter.
async fn operation(image: &Qcow2, input: &mut Input<'_>) {
    let kind = input.byte();
    let offset = match kind & 0x80 {
        0 => input.number(3),
        _ => input.number(8),
    };
    let len = input.number(2) * if kind & 0x40 == 0 { 1 } else { 16 };
    let flags = ZeroFlags {
        may_unmap: kind & 0x20 != 0,
        ..ZeroFlags::default()
    };
    match kind & 15 {
        0..4 => {
            let fua = kind & 0x10 != 0;
            let bytes = Data::from(vec![kind; len as usize]);
            let _ = image.write(offset, bytes, WriteFlags::fua(fua)).await;
        }
        4 | 5 => drop(image.read(offset, len).await),
        6 => drop(image.write_zeroes(offset, len, flags).await),
        7 => drop(image.discard(offset, len).await),
        8 => drop(image.flush().await),
        9 => {
            let size = u64::from(image.limits().preferred);
            let bytes = Data::from(vec![kind; size as usize]);
            let _ = image.write_compressed(offset / size * size, bytes).await;
        }
        10 => drop(image.block_status(offset, len.max(1)).await),
        11 | 12 => {
            let name = ["a", "b", "c", "old"][usize::from(input.byte() & 3)];
            let _ = Snapshots::create(image, NewSnapshot::named(name)).await;
        }
        13 | 14 => snapshot_operation(image, input).await,
        _ => {
            let _ = image.resize(offset / 512 * 512, Preallocation::Off).await;
        }
    }
}

async fn snapshot_operation(image: &Qcow2, input: &mut Input<'_>) {
    let list = image.list();
    let kind = input.byte();
    let Some(chosen) = list.get(usize::from(kind & 7) % list.len().max(1)) else {
        return;
    };
    let which = SnapshotSelector {
        id: Some(chosen.id.clone()),
        name: None,
    };
    match kind >> 3 & 3 {
        0 | 1 => drop(Snapshots::delete(image, which).await),
        _ => {
            if let Ok(view) = image.view(which).await {
                let len = view.size().min(300_000);
                let _ = view.read(0, len).await;
                let _ = view.close().await;
            }
        }
    }
}
