//! Random operations at many geometries against a model, and images that qemu-img made.

use super::*;
use crate::driver::Preallocation;
use crate::formats::qcow2::CompressionType;
use crate::formats::qcow2::create::Compat;

const SIZE: u64 = 6 << 20;

fn geometries() -> Vec<CreateOptions> {
    let mut all = extended_geometries();
    for (cluster_bits, refcount_bits, compat) in [
        (9, 16, Compat::V1_1),
        (9, 64, Compat::V1_1),
        (9, 1, Compat::V1_1),
        (12, 2, Compat::V1_1),
        (12, 16, Compat::V0_10),
        (16, 16, Compat::V1_1),
        (16, 4, Compat::V1_1),
        (16, 32, Compat::V1_1),
        (16, 8, Compat::V1_1),
        (18, 16, Compat::V0_10),
        (21, 16, Compat::V1_1),
    ] {
        let mut options = CreateOptions::new(SIZE);
        options.cluster_size = 1 << cluster_bits;
        options.refcount_bits = refcount_bits;
        options.compat = compat;
        all.push(options);
    }
    for cluster_bits in [9, 12, 16, 21] {
        let mut options = CreateOptions::new(SIZE);
        options.cluster_size = 1 << cluster_bits;
        options.compression_type = CompressionType::Zstd;
        all.push(options);
    }
    all
}

fn extended_geometries() -> Vec<CreateOptions> {
    let extended = |cluster_bits: u32| {
        let mut options = CreateOptions::new(SIZE);
        options.cluster_size = 1 << cluster_bits;
        options.extended_l2 = true;
        options
    };
    [14, 16, 21].map(extended).into()
}

/// One random step on the image and on the model.
async fn step(image: &Qcow2, model: &mut [u8], random: &mut fastrand::Rng) {
    let size = model.len() as u64;
    let offset = random.u64(..size);
    let most = [100, 5000, 70_000, 600_000][random.usize(..4)];
    let len = random.u64(1..=most).min(size - offset);
    let range = offset as usize..(offset + len) as usize;
    let cluster = image.image.g.cluster_size();
    match random.u8(..20) {
        0..10 => {
            let bytes: Vec<u8> = (0..len).map(|at| (at as u8) ^ random.u8(1..)).collect();
            write(image, offset, bytes.clone()).await.unwrap();
            model[range].copy_from_slice(&bytes);
        }
        10..12 => {
            image
                .write_zeroes(offset, len, ZeroFlags::default())
                .await
                .unwrap();
            model[range].fill(0);
        }
        12..14 => {
            image.write_zeroes(offset, len, unmap()).await.unwrap();
            model[range].fill(0);
        }
        14..16 => {
            // Without a backing, whole clusters read as zeroes afterwards. Parts of them may.
            image.discard(offset, len).await.unwrap();
            let is = read(image, offset, len).await;
            for (old, is) in model[range].iter_mut().zip(is) {
                assert!(is == 0 || is == *old);
                *old = is;
            }
            let start = offset.next_multiple_of(cluster);
            let end = match offset + len == size {
                true => size,
                false => (offset + len) / cluster * cluster,
            };
            if start < end {
                let cleared = &model[start as usize..end as usize];
                assert!(cleared.iter().all(|byte| *byte == 0));
            }
        }
        16 => image.flush().await.unwrap(),
        17 => {
            let start = offset / cluster * cluster;
            let end = (start + cluster).min(size);
            let bytes = vec![random.u8(..); (end - start) as usize];
            image
                .write_compressed(start, Data::from(bytes.clone()))
                .await
                .unwrap();
            model[start as usize..end as usize].copy_from_slice(&bytes);
        }
        _ => assert_same(&read(image, offset, len).await, &model[range]),
    }
}

#[tokio::test]
async fn random_operations_leave_what_the_model_says_at_every_geometry() {
    for (seed, options) in geometries().into_iter().enumerate() {
        let disk = new_image(&options).await;
        let mut random = fastrand::Rng::with_seed(seed as u64);
        let mut model = vec![0; SIZE as usize];
        for _ in 0..3 {
            let image = open(&disk).await;
            for _ in 0..60 {
                step(&image, &mut model, &mut random).await;
            }
            assert_same(&read(&image, 0, SIZE).await, &model);
            verify(&disk, image, &model).await;
        }
    }
}

#[tokio::test]
async fn tiny_caches_change_nothing() {
    for options in geometries().into_iter().take(7) {
        let disk = new_image(&options).await;
        let mut random = fastrand::Rng::with_seed(99);
        let mut model = vec![0; SIZE as usize];
        let small = OpenOptions {
            l2_cache_bytes: 0,
            refcount_cache_bytes: 0,
            ..OpenOptions::default()
        };
        let opening = Qcow2::open(disk.child(), small).await.unwrap();
        let image = opening.finish(None).await.unwrap();
        for _ in 0..80 {
            step(&image, &mut model, &mut random).await;
        }
        verify(&disk, image, &model).await;
    }
}

#[tokio::test]
async fn images_of_qemu_img_are_read_and_written() {
    let scratch = Scratch::new();
    let raw = scratch.path("source.raw");
    let mut random = fastrand::Rng::with_seed(3);
    let mut model = vec![0_u8; SIZE as usize];
    for _ in 0..40 {
        let at = random.usize(..model.len() - 40_000);
        let byte = random.u8(1..);
        model[at..at + 40_000].fill(byte);
    }
    std::fs::write(&raw, &model).unwrap();
    let path = scratch.path("made.qcow2");
    let (from, to) = (raw.to_str().unwrap(), path.to_str().unwrap());
    for (cluster_size, more) in [
        ("512", "refcount_bits=16"),
        ("4k", "compat=0.10"),
        ("64k", "refcount_bits=1"),
        ("64k", "refcount_bits=64,lazy_refcounts=on"),
        ("64k", "preallocation=metadata"),
        ("2M", "refcount_bits=8"),
        ("16k", "extended_l2=on"),
        ("128k", "extended_l2=on"),
        ("64k", "extended_l2=on,preallocation=metadata"),
        ("512", "compression_type=zstd"),
        ("64k", "compression_type=zstd"),
        ("2M", "compression_type=zstd"),
    ] {
        for compressed in [false, true] {
            let options = format!("cluster_size={cluster_size},{more}");
            if compressed && more.contains("preallocation") {
                continue;
            }
            let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", &options];
            if compressed {
                args.push("-c");
            }
            args.extend([from, to]);
            qemu_img(&args);
            let disk = scratch.load("made.qcow2");
            let image = open(&disk).await;
            assert_same(&read(&image, 0, SIZE).await, &model);
            let mut changed = model.clone();
            for _ in 0..15 {
                step(&image, &mut changed, &mut random).await;
            }
            verify(&disk, image, &changed).await;
        }
    }
}

#[tokio::test]
async fn the_refcount_table_grows_while_data_are_written() {
    let mut options = CreateOptions::new(24 << 20);
    options.cluster_size = 512;
    options.refcount_bits = 64;
    let disk = new_image(&options).await;
    let image = open(&disk).await;
    let model: Vec<u8> = (0..24 << 20).map(|at: u32| (at / 512) as u8 | 1).collect();
    for (index, piece) in model.chunks(1 << 20).enumerate() {
        write(&image, (index as u64) << 20, piece.to_vec())
            .await
            .unwrap();
    }
    image.flush().await.unwrap();
    assert!(image.image.header.get().refcount_table_clusters > 8);
    verify(&disk, image, &model).await;
}

#[tokio::test]
async fn a_large_disk_needs_a_long_contiguous_l1_table() {
    let mut options = CreateOptions::new(1 << 20);
    options.cluster_size = 512;
    options.refcount_bits = 64;
    let disk = new_image(&options).await;
    let image = open(&disk).await;
    image.resize(32 << 30, Preallocation::Off).await.unwrap();
    write(&image, (32 << 30) - 512, vec![1; 512]).await.unwrap();
    image.close().await.unwrap();
    let scratch = Scratch::new();
    assert_qemu_clean(&scratch.save("image.qcow2", &disk));
}
