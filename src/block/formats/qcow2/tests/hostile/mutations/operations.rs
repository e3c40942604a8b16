//! What is done with a damaged image.

use super::*;
use crate::driver::{AmendOptions, Driver, SnapshotChange};

/// One random operation; its answer does not matter.
pub(super) async fn operate(image: &Qcow2, random: &mut fastrand::Rng) {
    let size = image.size();
    let offset = match random.u8(..10) {
        0 => size.saturating_sub(random.u64(..100_000)),
        1 => random.u64(..),
        2 => random.u64(..=size),
        _ => random.u64(..400_000),
    };
    let most = [1, 600, 70_000, 300_000][random.usize(..4)];
    let len = random.u64(..=most);
    let flags = ZeroFlags {
        may_unmap: random.bool(),
        fua: random.u8(..8) == 0,
        no_fallback: random.u8(..8) == 0,
    };
    match random.u8(..29) {
        0..5 => {
            let bytes = Data::from(vec![random.u8(..); len as usize]);
            let fua = random.u8(..8) == 0;
            let _ = image.write(offset, bytes, WriteFlags::fua(fua)).await;
        }
        5..8 => drop(image.read(offset, len).await),
        8..10 => drop(image.write_zeroes(offset, len, flags).await),
        10..12 => drop(image.discard(offset, len).await),
        12 => {
            // As long as a client may ask for.
            let long = (u64::from(u32::MAX)).min(size);
            match random.bool() {
                true => drop(image.write_zeroes(0, long, flags).await),
                false => drop(image.discard(0, long).await),
            }
        }
        13..15 => drop(image.flush().await),
        15 => {
            let cluster = image.image.g.cluster_size();
            let bytes = Data::from(vec![random.u8(..); cluster as usize]);
            let offset = offset / cluster * cluster;
            let _ = image.write_compressed(offset, bytes).await;
        }
        16 => {
            let long = size.saturating_sub(offset).min(1 << 40);
            let _ = image.block_status(offset, long.max(1)).await;
        }
        17..19 => drop(snapshots(image).create(new(random)).await),
        19..21 => {
            if let Some(which) = one_of(image, random) {
                let _ = snapshots(image).delete(which).await;
            }
        }
        21 => {
            let size = match random.u8(..4) {
                0 => number(random, 4096),
                1 => size / 2 / 512 * 512,
                _ => random.u64(..4000) * 512,
            };
            let _ = image.resize(size, Preallocation::Off).await;
        }
        22 => drop(image.info()),
        23..26 => change_snapshots(image, random).await,
        26 => view(image, random).await,
        27 => drop(image.amend(amendment(random)).await),
        _ => {
            let (a, b) = (random.u64(..300_000), random.u64(..300_000));
            let bytes = Data::from(vec![1; 5000]);
            let writes = (
                image.write(a, bytes.clone(), WriteFlags::default()),
                image.write(b, bytes, WriteFlags::default()),
            );
            let _ = futures_util::future::join(writes.0, writes.1).await;
        }
    }
}

/// A change of what the header says.
fn amendment(random: &mut fastrand::Rng) -> AmendOptions {
    let backing = |random: &mut fastrand::Rng| match random.u8(..3) {
        0 => BackingFile::default(),
        bits => BackingFile {
            name: Some("a/".repeat(1 << random.u8(..=9)) + "b"),
            format: (bits == 1).then(|| "raw".to_owned()),
        },
    };
    AmendOptions {
        compat: [None, Some(Compat::V0_10), Some(Compat::V1_1)][random.usize(..3)],
        lazy_refcounts: random.bool().then(|| random.bool()),
        data_file_raw: (random.u8(..4) == 0).then(|| random.bool()),
        refcount_bits: (random.u8(..4) == 0).then_some(16),
        backing: random.bool().then(|| backing(random)),
    }
}

/// As commands reach them: images with an external data file have none.
fn snapshots(image: &Qcow2) -> &dyn Snapshots {
    image.snapshots().unwrap()
}

fn new(random: &mut fastrand::Rng) -> NewSnapshot {
    named(&format!("new{}", random.u8(..4)))
}

/// A snapshot that there is.
fn one_of(image: &Qcow2, random: &mut fastrand::Rng) -> Option<SnapshotSelector> {
    let list = snapshots(image).list();
    if list.is_empty() {
        return None;
    }
    let one = &list[random.usize(..list.len())];
    Some(SnapshotSelector {
        id: Some(one.id.clone()),
        name: random.bool().then(|| one.name.clone()),
    })
}

/// A change of a few steps that is given up, made, or made and taken back.
async fn change_snapshots(image: &Qcow2, random: &mut fastrand::Rng) {
    let Ok(mut change) = snapshots(image).change().await else {
        return;
    };
    for _ in 0..random.u8(1..4) {
        let which = one_of(image, random).unwrap_or_default();
        let step = match random.u8(..5) {
            0 => change.create(new(random)).await,
            1 => change.delete(which).await,
            _ => change.revert(which).await,
        };
        drop(step);
    }
    carry_out(change, random).await;
}

async fn carry_out(mut change: Box<dyn SnapshotChange>, random: &mut fastrand::Rng) {
    if random.u8(..8) == 0 || change.prepare().await.is_err() {
        return;
    }
    if random.u8(..8) == 0 || change.commit().await.is_err() {
        return;
    }
    match random.u8(..4) {
        0 => drop(change.roll_back().await),
        1 => drop(change),
        _ => drop(change.finish()),
    }
}

/// Reads a snapshot while the image is written to and the snapshot is to be deleted.
async fn view(image: &Qcow2, random: &mut fastrand::Rng) {
    let Some(which) = one_of(image, random) else {
        return;
    };
    let Ok(view) = snapshots(image).view(which.clone()).await else {
        return;
    };
    for _ in 0..4 {
        let offset = random.u64(..=view.size());
        let len = random.u64(..70_000).min(view.size() - offset);
        drop(view.read(offset, len).await);
        drop(view.block_status(offset, len.max(1)).await);
        let bytes = Data::from(vec![5; 3000]);
        let place = random.u64(..200_000);
        drop(image.write(place, bytes, WriteFlags::default()).await);
        drop(image.flush().await);
    }
    let bytes = Data::from(vec![1; 10]);
    let written = view.write(0, bytes, WriteFlags::default()).await;
    assert!(written.is_err(), "a snapshot was written to");
    if random.bool() {
        let deleted = snapshots(image).delete(which).await;
        assert!(deleted.is_err(), "a snapshot was deleted under its reader");
    }
    drop(view.close().await);
}
