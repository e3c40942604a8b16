//! Each operation by itself.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::driver::{Compat, Preallocation};
use crate::error::ErrorKind;
use crate::formats::qcow2::CompressionType;

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn an_empty_image_reads_as_zeroes_and_stays_clean() {
    let disk = new_image(&CreateOptions::new(8 * MIB)).await;
    let image = open(&disk).await;
    assert_eq!(image.size(), 8 * MIB);
    assert!(image.read(0, 8 * MIB).await.unwrap().is_known_zero());
    verify(&disk, image, &vec![0; 8 << 20]).await;
}

#[tokio::test]
async fn small_writes_keep_what_lies_around_them() {
    let disk = new_image(&CreateOptions::new(4 * MIB)).await;
    let image = open(&disk).await;
    let mut model = vec![0; 4 << 20];
    for (at, len, byte) in [
        (100, 50, 1),
        (65_500, 100, 2),
        (200_000, 300_000, 3),
        (120, 5, 4),
    ] {
        write(&image, at, vec![byte; len]).await.unwrap();
        model[at as usize..at as usize + len].fill(byte);
    }
    assert_same(&read(&image, 0, 4 * MIB).await, &model);
    verify(&disk, image, &model).await;
    let again = open(&disk).await;
    assert_same(&read(&again, 0, 4 * MIB).await, &model);
}

#[tokio::test]
async fn zero_writes_and_discards_free_what_they_unmap() {
    let disk = new_image(&CreateOptions::new(4 * MIB)).await;
    let image = open(&disk).await;
    let mut model = vec![7; 4 << 20];
    write(&image, 0, model.clone()).await.unwrap();
    image.flush().await.unwrap();
    let full = disk.allocated();
    image.write_zeroes(1000, MIB, unmap()).await.unwrap();
    model[1000..1000 + (1 << 20)].fill(0);
    let kept = ZeroFlags::default();
    image.write_zeroes(2 * MIB, 65536, kept).await.unwrap();
    model[2 << 20..(2 << 20) + 65536].fill(0);
    image.discard(3 * MIB, MIB).await.unwrap();
    model[3 << 20..].fill(0);
    assert_same(&read(&image, 0, 4 * MIB).await, &model);
    let status = image.block_status(2 * MIB, MIB).await.unwrap();
    assert!(status.zero && status.allocated && status.len == 65536);
    let status = image.block_status(3 * MIB, MIB).await.unwrap();
    assert!(status.zero && !status.allocated && status.len == MIB);
    image.flush().await.unwrap();
    image.flush().await.unwrap();
    assert!(disk.allocated() < full - MIB, "holes are punched");
    // The freed clusters are used again.
    let end = disk.size();
    write(&image, 3 * MIB, vec![9; 1 << 20]).await.unwrap();
    model[3 << 20..].fill(9);
    assert_eq!(disk.size(), end);
    // Kept clusters too, when written in part.
    write(&image, 2 * MIB + 10, vec![8; 10]).await.unwrap();
    model[(2 << 20) + 10..(2 << 20) + 20].fill(8);
    verify(&disk, image, &model).await;
}

#[tokio::test]
async fn a_backing_shows_until_it_is_written_over() {
    let base_disk = Memory::with_content(&vec![5; 3 << 20]);
    let mut options = CreateOptions::new(4 * MIB);
    options.backing.name = Some("base.raw".into());
    options.backing.format = Some("raw".into());
    let disk = new_image(&options).await;
    let opening = Qcow2::open(disk.child(), OpenOptions::default())
        .await
        .unwrap();
    let named = opening.backing().unwrap();
    assert_eq!(
        (named.name.as_str(), named.format.as_deref()),
        ("base.raw", Some("raw"))
    );
    let image = opening.finish(Some(base_disk.child())).await.unwrap();
    let mut model = vec![5; 3 << 20];
    model.resize(4 << 20, 0);
    assert_same(&read(&image, 0, 4 * MIB).await, &model);
    let (tail, zeroes, dropped) = (3 * MIB - 10, MIB + 5, 131_072);
    write(&image, tail, vec![6; 20]).await.unwrap();
    model[tail as usize..tail as usize + 20].fill(6);
    image.write_zeroes(zeroes, 200_000, unmap()).await.unwrap();
    model[zeroes as usize..zeroes as usize + 200_000].fill(0);
    image.discard(dropped, 65536).await.unwrap();
    model[dropped as usize..dropped as usize + 65536].fill(0);
    assert_same(&read(&image, 0, 4 * MIB).await, &model);
    image.close().await.unwrap();
    let scratch = Scratch::new();
    std::fs::write(scratch.path("base.raw"), base_disk.content()).unwrap();
    let path = scratch.save("image.qcow2", &disk);
    assert_qemu_clean(&path);
    assert_same(&qemu_content(&scratch, &path), &model);
}

/// It has no zero flag, and what lies below is older than what was discarded.
#[tokio::test]
async fn a_discard_in_version_2_does_not_uncover_the_backing() {
    let base_disk = Memory::with_content(&vec![5; 1 << 20]);
    let mut options = CreateOptions::new(MIB);
    options.compat = Compat::V0_10;
    options.backing.name = Some("base.raw".into());
    let disk = new_image(&options).await;
    let image = open_over(&disk, Some(base_disk.child())).await;
    write(&image, 0, vec![9; 256 << 10]).await.unwrap();
    image.discard(64 << 10, 64 << 10).await.unwrap();
    assert_same(&read(&image, 0, 256 << 10).await, &vec![9; 256 << 10]);
}

#[tokio::test]
async fn full_cluster_writes_read_nothing_and_are_one_write() {
    use crate::protocols::memory::OpKind;
    let base_disk = Memory::with_content(&vec![5; 4 << 20]);
    let disk = new_image(&CreateOptions::new(4 * MIB)).await;
    let image = open_over(&disk, Some(base_disk.child())).await;
    write(&image, 0, vec![1; 65536]).await.unwrap();
    let before = (disk.count(OpKind::Write), disk.count(OpKind::Read));
    write(&image, 65536, vec![2; 8 * 65536]).await.unwrap();
    assert_eq!(disk.count(OpKind::Write), before.0 + 1);
    assert_eq!(disk.count(OpKind::Read), before.1);
    assert_eq!(base_disk.count(OpKind::Read), 0);
}

#[tokio::test]
async fn a_fresh_cluster_takes_only_what_the_guest_wrote() {
    let disk = new_image(&CreateOptions::new(64 * MIB)).await;
    let image = open(&disk).await;
    write(&image, 0, vec![1; 512]).await.unwrap();
    let before = disk.allocated();
    for index in 1..100 {
        write(&image, index * 65536 + 8192, vec![1; 4096])
            .await
            .unwrap();
    }
    assert!(disk.allocated() - before <= 110 * 4096);
    let mut model = vec![0; 64 << 20];
    model[..512].fill(1);
    for index in 1..100 {
        model[index * 65536 + 8192..][..4096].fill(1);
    }
    verify(&disk, image, &model).await;
}

#[tokio::test]
async fn resizes_show_zeroes_and_drop_the_tail() {
    let base = Memory::with_content(&vec![5; 4 << 20]);
    let mut options = CreateOptions::new(MIB + 512);
    options.cluster_size = 4096;
    let disk = new_image(&options).await;
    let image = open_over(&disk, Some(base.child())).await;
    write(&image, MIB, vec![1; 512]).await.unwrap();
    image.resize(3 * MIB, Preallocation::Off).await.unwrap();
    let mut model = vec![5; 1 << 20];
    model.extend([1; 512]);
    model.resize(3 << 20, 0);
    assert_same(&read(&image, 0, 3 * MIB).await, &model);
    // The L1 table must move for this.
    image.resize(4096 * MIB, Preallocation::Off).await.unwrap();
    write(&image, 4095 * MIB, vec![3; 512]).await.unwrap();
    assert_same(&read(&image, 0, 3 * MIB).await, &model);
    image.resize(2 * MIB, Preallocation::Off).await.unwrap();
    image.resize(3 * MIB, Preallocation::Off).await.unwrap();
    assert_eq!(
        image.read(4 * MIB, 1).await.unwrap_err().kind(),
        ErrorKind::OutOfRange
    );
    model.truncate(2 << 20);
    model.resize(3 << 20, 0);
    assert_same(&read(&image, 0, 3 * MIB).await, &model);
    image.close().await.unwrap();
    let scratch = Scratch::new();
    let path = scratch.save("image.qcow2", &disk);
    assert_qemu_clean(&path);
}

#[tokio::test]
async fn compressed_clusters_share_host_clusters_and_are_copied_on_write() {
    let disk = new_image(&CreateOptions::new(4 * MIB)).await;
    let image = open(&disk).await;
    let mut model = vec![0; 4 << 20];
    for index in 0..20_u64 {
        let cluster = vec![index as u8 + 1; 65536];
        model[index as usize * 65536..][..65536].copy_from_slice(&cluster);
        image
            .write_compressed(index * 65536, Data::from(cluster))
            .await
            .unwrap();
    }
    let mut random = fastrand::Rng::with_seed(1);
    let noise: Vec<u8> = (0..65536).map(|_| random.u8(..)).collect();
    model[20 * 65536..][..65536].copy_from_slice(&noise);
    image
        .write_compressed(20 * 65536, Data::from(noise))
        .await
        .unwrap();
    assert!(disk.allocated() < 12 * 65536, "20 clusters went into one");
    let status = image.block_status(0, MIB).await.unwrap();
    assert!(status.compressed && status.host_offset.is_none());
    write(&image, 3 * 65536 + 77, vec![200; 1000])
        .await
        .unwrap();
    model[3 * 65536 + 77..][..1000].fill(200);
    image.discard(5 * 65536, 65536).await.unwrap();
    model[5 * 65536..6 * 65536].fill(0);
    assert_same(&read(&image, 0, 4 * MIB).await, &model);
    verify(&disk, image, &model).await;
}

/// Streams of 0.6 clusters: every other one lies in two host clusters.
#[tokio::test]
async fn compressed_clusters_go_on_in_the_next_host_cluster() {
    let disk = new_image(&CreateOptions::new(8 * MIB)).await;
    let image = open(&disk).await;
    let mut random = fastrand::Rng::with_seed(2);
    let mut model = vec![0; 8 << 20];
    let mut put = async |image: &Qcow2, model: &mut [u8], index: usize| {
        let mut cluster = vec![0; 65536];
        cluster[..40_000].fill_with(|| random.u8(..));
        model[index * 65536..][..65536].copy_from_slice(&cluster);
        let at = index as u64 * 65536;
        image.write_compressed(at, cluster.into()).await.unwrap();
    };
    let empty = disk.allocated();
    for index in 0..100 {
        put(&image, &mut model, index).await;
    }
    let used = (disk.allocated() - empty) / 65536;
    assert!((61..=64).contains(&used), "{used} clusters for 61.0");
    // What goes leaves what shares clusters with it, and what comes uses them again.
    for index in (0..100).step_by(3) {
        image.discard(index * 65536, 65536).await.unwrap();
        model[index as usize * 65536..][..65536].fill(0);
    }
    image.flush().await.unwrap();
    for index in (0..120).step_by(7) {
        put(&image, &mut model, index).await;
    }
    for index in (0..120).step_by(10) {
        write(&image, index * 65536 + 9, vec![5; 100])
            .await
            .unwrap();
        model[index as usize * 65536 + 9..][..100].fill(5);
    }
    assert_same(&read(&image, 0, 8 * MIB).await, &model);
    verify(&disk, image, &model).await;
}

#[tokio::test]
async fn a_read_only_image_is_not_touched() {
    use crate::protocols::memory::OpKind;
    let disk = new_image(&CreateOptions::new(MIB)).await;
    let writes = disk.count(OpKind::Write);
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let opening = Qcow2::open(disk.child(), options).await.unwrap();
    let image = opening.finish(None).await.unwrap();
    let error = write(&image, 0, vec![1; 512]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert!(image.discard(0, MIB).await.is_err());
    assert!(image.resize(2 * MIB, Preallocation::Off).await.is_err());
    image.flush().await.unwrap();
    image.close().await.unwrap();
    assert_eq!(disk.count(OpKind::Write), writes);
}

#[tokio::test]
async fn a_corrupt_image_opens_only_for_reading() {
    let disk = new_image(&CreateOptions::new(MIB)).await;
    disk.write(79, Data::from(vec![2]), WriteFlags::default())
        .await
        .unwrap();
    let error = Qcow2::open(disk.child(), OpenOptions::default())
        .await
        .unwrap_err();
    assert_eq!(
        error.message(),
        "qcow2: Image is corrupt; cannot be opened read/write"
    );
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    Qcow2::open(disk.child(), options).await.unwrap();
}

#[tokio::test]
async fn damaged_tables_give_errors_and_take_no_data() {
    let disk = new_image(&CreateOptions::new(8 * MIB)).await;
    let image = open(&disk).await;
    write(&image, 0, vec![1; 4 << 20]).await.unwrap();
    image.close().await.unwrap();
    let l1 = image.image.l1();
    let l2 = l1.get(0).l2_offset().unwrap();
    let entry = |value: u64| Data::from(value.to_be_bytes().to_vec());
    let flags = WriteFlags::default();
    // Cluster 0: onto the header; 1: onto the L2 table itself; 2: unaligned; 3: behind the end, compressed.
    disk.write(l2.0, entry(1 << 63 | 0x200), flags)
        .await
        .unwrap();
    disk.write(l2.0 + 8, entry(1 << 63 | l2.0), flags)
        .await
        .unwrap();
    disk.write(l2.0 + 16, entry(0x0123_4567_89ab_cdef), flags)
        .await
        .unwrap();
    disk.write(l2.0 + 24, entry(1 << 62 | 0x7000_0000_0000), flags)
        .await
        .unwrap();
    let before = disk.content();
    let image = open(&disk).await;
    for cluster in [0, 1, 2] {
        let error = write(&image, cluster * 65536, vec![9; 512])
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
    assert!(image.read(2 * 65536, 512).await.is_err());
    assert!(image.read(3 * 65536, 512).await.is_err());
    image.flush().await.unwrap();
    let after = disk.content();
    // The corrupt bit, and nothing else.
    assert_eq!(after[79] ^ before[79], 2);
    assert_same(&after[80..65536], &before[80..65536]);
    let at = l2.0 as usize;
    assert_same(&disk.content()[at..at + 64], &before[at..at + 64]);
}

#[tokio::test]
async fn an_image_on_a_device_uses_its_space_and_no_more() {
    let made = new_image(&CreateOptions::new(8 * MIB)).await;
    let mut content = made.content();
    // A device is longer than the image on it, holds old bytes there, and does not grow.
    content.resize(4 << 20, 0xdd);
    let disk = Memory::with_content(&content);
    disk.set_limits(crate::driver::RequestLimits {
        alignment: 1,
        preferred: 4096,
        growable: false,
    });
    let image = open(&disk).await;
    let mut model = vec![0; 8 << 20];
    let mut full = None;
    for cluster in 0..100_u64 {
        match write(&image, cluster * 65536 + 100, vec![1; 1000]).await {
            Ok(()) => model[cluster as usize * 65536 + 100..][..1000].fill(1),
            Err(error) => full = full.or(Some(error.kind())),
        }
    }
    assert_eq!(full, Some(ErrorKind::NoSpace));
    let written = model.iter().filter(|byte| **byte != 0).count() / 1000;
    assert!(written >= 55, "{written} of 64 clusters");
    assert_same(&read(&image, 0, 8 * MIB).await, &model);
    image.flush().await.unwrap();
    assert!(
        super::super::check::check(&disk.child())
            .await
            .unwrap()
            .is_clean()
    );
}

#[tokio::test]
async fn metadata_that_overlap_refuse_to_be_written() {
    let disk = new_image(&CreateOptions::new(8 * MIB)).await;
    let image = open(&disk).await;
    let l1 = image.image.l1().offset();
    let reftable = image.image.header.get().refcount_table_offset;
    image.close().await.unwrap();
    let entry = Data::from((1 << 63 | reftable.0).to_be_bytes().to_vec());
    disk.write(l1.0, entry, WriteFlags::default())
        .await
        .unwrap();
    let opening = Qcow2::open(disk.child(), OpenOptions::default())
        .await
        .unwrap();
    let error = opening.finish(None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

/// An image with compressed clusters of 2 MiB.
async fn compressed_image(compression_type: CompressionType) -> Arc<Qcow2> {
    let mut options = CreateOptions::new(16 * MIB);
    options.cluster_size = 2 * MIB;
    options.compression_type = compression_type;
    let image = open(&new_image(&options).await).await;
    for at in (0..16 * MIB).step_by(2 << 20) {
        let cluster: Vec<u8> = (0..2_u32 << 20).map(|byte| (byte / 7) as u8).collect();
        let data = Data::from(cluster);
        image.write_compressed(at, data).await.unwrap();
        assert!(image.block_status(at, 1).await.unwrap().compressed);
    }
    image
}

#[tokio::test]
async fn large_compressed_clusters_do_not_hold_the_reactor() {
    for compression_type in [CompressionType::Zlib, CompressionType::Zstd] {
        let image = compressed_image(compression_type).await;
        let turns = AtomicU64::new(0);
        let others = async {
            loop {
                turns.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            content = read(&image, 0, 16 * MIB) => assert_eq!(content[7 * 9], 9),
            () = others => {}
        }
        // Decoded here, all eight would take one turn or a few.
        let turns = turns.into_inner();
        assert!(turns > 100, "{compression_type:?}: {turns}");
    }
}

#[tokio::test]
async fn a_damaged_stream_is_an_io_error_of_its_cluster_only() {
    for compression_type in [CompressionType::Zlib, CompressionType::Zstd] {
        let mut options = CreateOptions::new(4 * MIB);
        options.compression_type = compression_type;
        let disk = new_image(&options).await;
        let image = open(&disk).await;
        for at in [0, 65536] {
            let cluster: Vec<u8> = (0..65536_u32).map(|byte| (byte / 7) as u8).collect();
            image.write_compressed(at, cluster.into()).await.unwrap();
        }
        image.close().await.unwrap();
        // The streams are in the cluster behind the L2 table.
        let mut content = disk.content();
        content[5 * 65536..][..8].fill(0xff);
        let image = open(&Memory::with_content(&content)).await;
        let error = image.read(0, 512).await.unwrap_err();
        assert_eq!(error.errno(), libc::EIO, "{error}");
        assert_eq!(read(&image, 65536, 8).await, [0, 0, 0, 0, 0, 0, 0, 1]);
        write(&image, 100, vec![9; 10]).await.unwrap_err();
        write(&image, 0, vec![9; 65536]).await.unwrap();
        assert_eq!(read(&image, 0, 2).await, [9, 9]);
    }
}
