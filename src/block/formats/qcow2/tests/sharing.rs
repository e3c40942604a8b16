//! What others refer to stays as it is: snapshots that qemu-img took, and backing files.

use super::*;
use crate::formats::qcow2::create::Compat;

const SIZE: u64 = 3 << 20;

/// Random writes, zero writes and discards; discards where they show zeroes.
async fn change(image: &Qcow2, model: &mut [u8], random: &mut fastrand::Rng) {
    let cluster = image.image.g.subcluster_size();
    for _ in 0..25 {
        let at = random.u64(..SIZE);
        let len = random.u64(1..150_000).min(SIZE - at);
        let range = at as usize..(at + len) as usize;
        match random.u8(..6) {
            0 => {
                image.write_zeroes(at, len, unmap()).await.unwrap();
                model[range].fill(0);
            }
            1 => {
                image
                    .write_zeroes(at, len, ZeroFlags::default())
                    .await
                    .unwrap();
                model[range].fill(0);
            }
            2 if image.image.has_zero_flag() => {
                let (start, end) = (at.next_multiple_of(cluster), (at + len) / cluster * cluster);
                image.discard(at, len).await.unwrap();
                if start < end {
                    model[start as usize..end as usize].fill(0);
                }
                let tail = end.max(start) as usize;
                if at + len == SIZE && tail < model.len() && start < SIZE {
                    model[tail..].fill(0);
                }
            }
            _ => {
                let byte = random.u8(1..);
                write(image, at, vec![byte; len as usize]).await.unwrap();
                model[range].fill(byte);
            }
        }
    }
    assert_same(&read(image, 0, SIZE).await, model);
}

/// What qemu-img reads from a snapshot.
fn snapshot_content(scratch: &Scratch, image: &str, name: &str) -> Vec<u8> {
    let raw = scratch.path("snapshot.raw");
    let to = raw.to_str().unwrap();
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "-l", name, image, to]);
    std::fs::read(raw).unwrap()
}

#[tokio::test]
async fn snapshots_of_qemu_img_keep_their_content_while_we_write() {
    for (seed, (cluster_size, compat, refcount_bits)) in [
        (512, Compat::V1_1, 16),
        (4096, Compat::V0_10, 16),
        (65536, Compat::V1_1, 2),
        (65536, Compat::V1_1, 64),
        // With subclusters.
        (32768, Compat::V1_1, 8),
    ]
    .into_iter()
    .enumerate()
    {
        let mut options = CreateOptions::new(SIZE);
        options.cluster_size = cluster_size;
        options.compat = compat;
        options.refcount_bits = refcount_bits;
        options.extended_l2 = cluster_size == 32768;
        let mut disk = new_image(&options).await;
        let mut random = fastrand::Rng::with_seed(seed as u64);
        let mut model = vec![0; SIZE as usize];
        let scratch = Scratch::new();
        let mut snapshots: Vec<(&str, Vec<u8>)> = Vec::new();
        for name in ["one", "two"] {
            let image = open(&disk).await;
            change(&image, &mut model, &mut random).await;
            verify(&disk, image, &model).await;
            let path = scratch.save("image.qcow2", &disk);
            qemu_img(&["snapshot", "-c", name, path.to_str().unwrap()]);
            snapshots.push((name, model.clone()));
            disk = scratch.load("image.qcow2");
        }
        let image = open(&disk).await;
        change(&image, &mut model, &mut random).await;
        image.flush().await.unwrap();
        change(&image, &mut model, &mut random).await;
        verify(&disk, image, &model).await;
        let path = scratch.save("image.qcow2", &disk);
        let path = path.to_str().unwrap();
        for (name, content) in &snapshots {
            assert_same(&snapshot_content(&scratch, path, name), content);
        }
        // Deleting them frees all that was shared: no count was lost.
        qemu_img(&["snapshot", "-d", "one", path]);
        qemu_img(&["snapshot", "-d", "two", path]);
        let disk = scratch.load("image.qcow2");
        let image = open(&disk).await;
        change(&image, &mut model, &mut random).await;
        verify(&disk, image, &model).await;
    }
}

#[tokio::test]
async fn a_chain_of_three_shows_the_topmost_bytes() {
    for (seed, compat) in [Compat::V0_10, Compat::V1_1].into_iter().enumerate() {
        let mut random = fastrand::Rng::with_seed(seed as u64);
        let scratch = Scratch::new();
        // The base is shorter than the rest, and not of whole clusters.
        let mut model: Vec<u8> = (0..SIZE / 2 + 700).map(|at| at as u8 | 1).collect();
        std::fs::write(scratch.path("base.raw"), &model).unwrap();
        let mut below = Memory::with_content(&model).child();
        model.resize(SIZE as usize, 0);
        let mut backing = ("base.raw", "raw");
        for name in ["mid.qcow2", "top.qcow2"] {
            let mut options = CreateOptions::new(SIZE);
            options.cluster_size = if name == "mid.qcow2" { 4096 } else { 65536 };
            options.compat = compat;
            options.backing.name = Some(backing.0.into());
            options.backing.format = Some(backing.1.into());
            let disk = new_image(&options).await;
            let image = open_over(&disk, Some(below.clone())).await;
            change(&image, &mut model, &mut random).await;
            image.close().await.unwrap();
            let path = scratch.save(name, &disk);
            assert_qemu_clean(&path);
            assert_same(&qemu_content(&scratch, &path), &model);
            below = Child::new(open_over(&disk, Some(below)).await);
            backing = (name, "qcow2");
        }
    }
}
