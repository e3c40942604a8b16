//! Data clusters wholly behind the end of the file: a file that was cut off, or what an unclean end of a writer left.

use super::*;
use crate::driver::Preallocation;
use crate::formats::qcow2::check::{CheckOptions, Repair, check, repair};
use crate::formats::qcow2::testing::{Scratch, qemu_check};

/// The sample without the data of guest 3 MiB, with which its file ends.
async fn cut_off() -> Vec<u8> {
    let mut image = sample().await;
    assert_eq!(image.len(), 9 * CLUSTER);
    image.truncate(8 * CLUSTER);
    image
}

/// The sample with guest cluster 0 somewhere behind the end of the file.
async fn elsewhere(host: u64, flags: u64) -> Vec<u8> {
    let mut image = sample().await;
    put(&mut image, L2, 8, host | flags);
    image
}

#[test]
fn lost_data_are_not_read_as_zeroes() {
    block_on(async {
        for (image, at, host) in [
            (cut_off().await, FAR, 0x8000),
            (elsewhere(0x9000, COPIED).await, 0, 0x9000),
            (elsewhere(0x9000, 0).await, 0, 0x9000),
            (elsewhere(1 << 50, COPIED).await, 0, 1_u64 << 50),
        ] {
            let disk = Memory::with_content(&image);
            let (image, mut events) = open_reporting(&disk).await;
            let what = format!("{host:#x}");
            for _ in 0..2 {
                assert_corrupt(&what, image.read(at + 100, 10).await);
                assert_corrupt(&what, image.read(at, 2 * CLUSTER as u64).await);
                assert_corrupt(&what, image.block_status(at, 512).await);
                // A part of it cannot be written: the rest would seem to be zero.
                assert_corrupt(&what, write(&image, at + 512, vec![1; 512]).await);
                let zeroes = image.write_zeroes(at + 512, 512, ZeroFlags::default());
                assert_corrupt(&what, zeroes.await);
            }
            let events = reported(&mut events);
            assert_eq!((events.len(), events[0].fatal), (1, false), "{what}");
            let text = format!("Data cluster at {host:#x} behind the end of the file (L2 offset: ");
            assert!(events[0].message.starts_with(&text), "{events:?}");
            assert_eq!(read(&image, 8192, 10).await, [2; 10], "{what}");
            write(&image, 8192, vec![7; CLUSTER]).await.unwrap();
            image.close().await.unwrap();
        }
    });
}

#[test]
fn lost_data_can_be_overwritten_zeroed_and_discarded() {
    block_on(async {
        for (image, at) in [
            (cut_off().await, FAR),
            (elsewhere(0x9000, COPIED).await, 0),
            (elsewhere(0x9000, COPIED | 1).await, 0),
            (elsewhere(1 << 50, 0).await, 0),
        ] {
            for how in ["write", "zeroes", "unmap", "discard", "compressed"] {
                let disk = Memory::with_content(&image);
                let open_image = open(&disk).await;
                let image = &open_image;
                let cluster = CLUSTER as u64;
                let data = Data::from(vec![9; CLUSTER]);
                match how {
                    "write" => write(image, at, vec![9; CLUSTER]).await,
                    "compressed" => image.write_compressed(at, data).await,
                    "zeroes" => image.write_zeroes(at, cluster, ZeroFlags::default()).await,
                    "unmap" => image.write_zeroes(at, cluster, unmap()).await,
                    _ => image.discard(at, cluster).await,
                }
                .unwrap();
                let wanted = if how == "write" || how == "compressed" {
                    9
                } else {
                    0
                };
                // New clusters, some of them where the lost one was, leave it as it is.
                for index in 0..20 {
                    write(
                        image,
                        (1 << 20) + index * cluster,
                        vec![index as u8 + 1; CLUSTER],
                    )
                    .await
                    .unwrap();
                }
                image.flush().await.unwrap();
                assert_eq!(
                    read(image, at, cluster).await,
                    vec![wanted; CLUSTER],
                    "{how}"
                );
                image.close().await.unwrap();
                let report = check(&disk.child()).await.unwrap();
                assert_eq!(report.corruptions, 0, "{how}: {report:?}");
            }
        }
    });
}

#[test]
fn lost_data_do_not_keep_a_dirty_image_from_being_opened_and_get_no_foreign_content() {
    block_on(async {
        // What an unclean end of a writer with lazy refcounts leaves: the last tables, without the data, nor counts.
        for (clusters, stored) in [(1, false), (1, true), (300, false), (3000, false)] {
            let disk = new_image(&options()).await;
            let image = open(&disk).await;
            write(&image, 0, vec![1; CLUSTER]).await.unwrap();
            image.flush().await.unwrap();
            let size = disk.size();
            for index in 0..clusters.min(300) {
                write(&image, 65536 + index * 4096, vec![2; CLUSTER])
                    .await
                    .unwrap();
            }
            image.close().await.unwrap();
            let mut bytes = disk.content();
            bytes.truncate(size as usize);
            let lost = match clusters {
                // Far behind, in a place that no refcount block covers yet.
                3000 => {
                    put(&mut bytes, L2 + 16 * 8, 8, COPIED | (3000 << 12));
                    1
                }
                count => count,
            };
            bytes[79] |= 1;
            if !stored {
                bytes[REFBLOCK + 2 * (size as usize / CLUSTER)..REFBLOCK + CLUSTER].fill(0);
            }
            let disk = Memory::with_content(&bytes);
            let report = check(&disk.child()).await.unwrap();
            assert!(report.corruptions >= lost, "{clusters}: {report:?}");
            let image = open(&disk).await;
            assert_corrupt("lost", image.read(65536, 1).await);
            for index in 0..30 {
                write(&image, (2 << 20) + index * 65536, vec![7; 65536])
                    .await
                    .unwrap();
            }
            write(&image, 4096, vec![6; 3 * CLUSTER]).await.unwrap();
            assert_eq!(read(&image, 0, 4).await, [1; 4]);
            assert_eq!(read(&image, 4096, 4).await, [6; 4]);
            image.flush().await.unwrap();
            // The file reaches beyond the place now, and nobody else has got it.
            for index in 0..lost {
                let read = image.read(65536 + index * 4096, 4096).await;
                if let Ok(data) = read {
                    assert!(data.to_bytes().iter().all(|byte| *byte == 0), "{clusters}");
                }
            }
            image.close().await.unwrap();
            let report = check(&disk.child()).await.unwrap();
            assert!(report.corruptions <= lost, "{clusters}: {report:?}");
            assert_eq!((report.leaks, disk.content()[79]), (0, 0), "{clusters}");
        }
    });
}

#[test]
fn a_repair_counts_lost_data_and_says_what_is_left() {
    block_on(async {
        let disk = Memory::with_content(&cut_off().await);
        let done = repair(&disk.child(), Repair::All, &CheckOptions::default()).await;
        assert_eq!(done.unwrap().corruptions_fixed, 0);
        let report = check(&disk.child()).await.unwrap();
        assert_eq!(report.corruptions, 1, "{report:?}");
        assert!(report.findings[0].contains("behind the end"), "{report:?}");
        let (theirs, _) = qemu_check(&Scratch::new().save("image.qcow2", &disk));
        assert_eq!(theirs["corruptions"], 1);
        assert_eq!(theirs["image-end-offset"], report.image_end_offset);
        // Too far for any writer: nothing is done about it.
        let disk = Memory::with_content(&elsewhere(1 << 50, COPIED).await);
        let error = repair(&disk.child(), Repair::All, &CheckOptions::default()).await;
        assert_corrupt("far", error);
    });
}

#[test]
fn what_qemu_preallocates_lies_in_the_file() {
    let scratch = Scratch::new();
    for options in [
        "preallocation=metadata",
        "preallocation=metadata,cluster_size=2M",
    ] {
        let path = scratch.path("image.qcow2");
        let path = path.to_str().unwrap();
        qemu_img(&[
            "create", "-q", "-f", "qcow2", "-o", options, path, "10000000",
        ]);
        qemu_img(&["resize", "-q", "--preallocation=metadata", path, "64M"]);
        let disk = scratch.load("image.qcow2");
        block_on(async {
            let image = open(&disk).await;
            let all = image.read(0, 64 << 20).await.unwrap();
            assert!(all.to_bytes().iter().all(|byte| *byte == 0));
            write(&image, (64 << 20) - 512, vec![1; 512]).await.unwrap();
            image.resize(128 << 20, Preallocation::Off).await.unwrap();
            image.close().await.unwrap();
            assert!(check(&disk.child()).await.unwrap().is_clean());
        });
    }
}
