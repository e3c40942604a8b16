//! One entry damaged at a time in an image that opens: only its own range fails, and no metadata changes.

use super::*;
use crate::driver::SnapshotSelector;
use crate::error::ErrorKind;
use crate::formats::qcow2::check::{CheckOptions, Repair, check, repair};

/// A damage that does not keep the image from being opened.
type Case = (&'static str, fn(&mut Vec<u8>));

#[test]
fn a_damaged_entry_fails_its_own_range_only() {
    let cases: &[Case] = &[
        ("an unaligned L2 table", |i| put(i, L1, 8, COPIED | 0x4200)),
        ("reserved bits in an L1 entry", |i| {
            put(i, L1, 8, COPIED | 0x4001)
        }),
        ("high reserved bits in an L1 entry", |i| {
            put(i, L1, 8, 1 << 57 | 0x4000)
        }),
        ("an L2 table behind the end", |i| {
            put(i, L1, 8, COPIED | 1 << 50)
        }),
        ("an unaligned data cluster", |i| {
            put(i, L2, 8, COPIED | 0x5200)
        }),
        ("reserved bits in an L2 entry", |i| {
            put(i, L2, 8, COPIED | 0x5002)
        }),
        ("COPIED without a cluster", |i| put(i, L2, 8, COPIED)),
        ("a compressed cluster with COPIED", |i| {
            put(i, L2, 8, COPIED | COMPRESSED | 0x5000)
        }),
    ];
    block_on(async {
        let image = sample().await;
        for (what, damage) in cases {
            let mut damaged = image.clone();
            damage(&mut damaged);
            let disk = Memory::with_content(&damaged);
            let image = open(&disk).await;
            assert_corrupt(what, image.read(0, 512).await);
            assert_corrupt(what, image.block_status(0, 512).await);
            for how in CHANGES {
                assert_corrupt(what, change(&image, how).await);
            }
            image.flush().await.unwrap();
            assert_same(&disk.content(), &damaged);
            assert_rest_works(what, &image).await;
            image.close().await.unwrap();
        }
    });
}

#[test]
fn a_table_of_which_the_file_has_only_a_part_is_not_taken_for_an_empty_one() {
    block_on(async {
        let mut image = sample().await;
        // The L2 table of guest 2 MiB comes last, and loses its end.
        let table = image[7 * CLUSTER..8 * CLUSTER].to_vec();
        image.resize(10 * CLUSTER, 0);
        image[9 * CLUSTER..].copy_from_slice(&table);
        put(&mut image, L1 + 8, 8, COPIED | (9 * CLUSTER as u64));
        image.truncate(10 * CLUSTER - 512);
        let disk = Memory::with_content(&image);
        let report = check(&disk.child()).await.unwrap();
        let text =
            "entry 1 (0x8000000000009000): the L2 table lies partly behind the end of the file";
        assert!(
            report.findings.iter().any(|found| found.contains(text)),
            "{report:?}"
        );
        assert_corrupt(
            text,
            repair(&disk.child(), Repair::All, &CheckOptions::default()).await,
        );
        let (image, mut events) = open_reporting(&disk).await;
        assert_corrupt(text, image.read(FAR, 1).await);
        assert_corrupt(text, write(&image, FAR, vec![1; CLUSTER]).await);
        assert_eq!(reported(&mut events).len(), 1);
        assert_eq!(read(&image, 0, 4).await, [1; 4]);
        write(&image, 65536, vec![1; CLUSTER]).await.unwrap();
        image.close().await.unwrap();
    });
}

#[test]
fn a_compressed_cluster_that_cannot_be_read_can_be_replaced() {
    let descriptors = [
        ("behind the end", COMPRESSED | 1 << 50),
        ("nonsense", COMPRESSED | 0x5000),
        (
            "over the end and three clusters long",
            COMPRESSED | 0xf << 58 | 0x8fff,
        ),
    ];
    block_on(async {
        let image = sample().await;
        let cases = descriptors
            .iter()
            .flat_map(|(what, descriptor)| [(*what, *descriptor, 0), (*what, *descriptor, 1)]);
        for (what, descriptor, compression) in cases {
            let mut damaged = image.clone();
            put(&mut damaged, L2, 8, descriptor);
            put(&mut damaged, 72, 8, compression << 3);
            damaged[104] = compression as u8;
            let disk = Memory::with_content(&damaged);
            let image = open(&disk).await;
            assert_corrupt(what, image.read(0, 512).await);
            assert_rest_works(what, &image).await;
            // All of it is replaced, so nothing of it must be read.
            write(&image, 0, vec![5; CLUSTER]).await.unwrap();
            assert_eq!(
                read(&image, 0, CLUSTER as u64).await,
                vec![5; CLUSTER],
                "{what}"
            );
            image.close().await.unwrap();
        }
    });
}

#[test]
fn a_damaged_snapshot_is_not_deleted_and_harms_nothing() {
    let cases: &[Case] = &[
        ("an L1 table behind the end", |i| snapshot(i, 1 << 50, 2)),
        ("a large L1 table", |i| {
            snapshot(i, 17 * CLUSTER as u64, u32::MAX.into())
        }),
        ("an unaligned L1 table", |i| {
            snapshot(i, 17 * CLUSTER as u64 + 8, 2)
        }),
        ("an L2 table behind the end", |i| {
            put(i, 17 * CLUSTER, 8, 1 << 50)
        }),
        ("an L2 table twice", |i| {
            put(i, 17 * CLUSTER + 8, 8, 18 * CLUSTER as u64)
        }),
        ("the header as an L2 table", |i| {
            put(i, 17 * CLUSTER, 8, 512)
        }),
    ];
    block_on(async {
        for (what, damage) in cases {
            let damaged = with_snapshot(damage).await;
            let disk = Memory::with_content(&damaged);
            let image = open(&disk).await;
            assert_eq!(image.list().len(), 1, "{what}");
            assert_corrupt(what, image.delete(of_name("s")).await);
            assert_corrupt(what, image.revert(of_name("s")).await);
            assert_eq!(image.list().len(), 1, "{what}");
            assert_eq!(read(&image, 0, 10).await, [1; 10], "{what}");
            assert_rest_works(what, &image).await;
            image.close().await.unwrap();
            let (after, len) = (disk.content(), 8 * CLUSTER);
            let same_tables =
                |from: usize| after[from..from + CLUSTER] == damaged[from..from + CLUSTER];
            assert!(
                same_tables(0) && same_tables(REFTABLE) && same_tables(L1),
                "{what}"
            );
            assert!(after.len() >= len);
        }
    });
}

/// The sample with a snapshot `s` whose L1 table and L2 table are counted, damaged.
async fn with_snapshot(damage: &fn(&mut Vec<u8>)) -> Vec<u8> {
    let mut image = sample().await;
    snapshot(&mut image, 17 * CLUSTER as u64, 2);
    put(&mut image, 17 * CLUSTER, 8, 18 * CLUSTER as u64);
    put(&mut image, 16 * CLUSTER + 48, 8, 4 << 20);
    for cluster in 16..20 {
        put(&mut image, REFBLOCK + 2 * cluster, 2, 1);
    }
    damage(&mut image);
    image
}

fn of_name(name: &str) -> SnapshotSelector {
    SnapshotSelector {
        id: None,
        name: Some(name.to_owned()),
    }
}

#[test]
fn a_snapshot_that_claims_what_the_image_lives_on_does_not_take_it_along() {
    let cases: &[Case] = &[
        ("clusters that are not counted", |i| {
            for cluster in 18..20 {
                put(i, REFBLOCK + 2 * cluster, 2, 0);
            }
        }),
        ("the active L2 table", |i| {
            put(i, 17 * CLUSTER, 8, L2 as u64)
        }),
        ("the refcount block as data", |i| {
            put(i, 18 * CLUSTER, 8, REFBLOCK as u64)
        }),
        ("the active L1 table as data", |i| {
            put(i, 18 * CLUSTER, 8, L1 as u64)
        }),
        ("a compressed stream on the refcount table", |i| {
            put(i, 18 * CLUSTER, 8, COMPRESSED | REFTABLE as u64)
        }),
    ];
    block_on(async {
        for (what, damage) in cases {
            let damaged = with_snapshot(damage).await;
            let disk = Memory::with_content(&damaged);
            let image = open(&disk).await;
            image.delete(of_name("s")).await.unwrap();
            image.image.settle_now().await.unwrap();
            assert_eq!(image.info().unsettled_tables, 0, "{what}");
            assert_eq!(read(&image, 0, 10).await, [1; 10], "{what}");
            assert_rest_works(what, &image).await;
            image.close().await.unwrap();
            let after = disk.content();
            for from in [REFTABLE, L1] {
                let same = after[from..from + CLUSTER] == damaged[from..from + CLUSTER];
                assert!(same, "{what}: {from:#x}");
            }
            let counts = &after[REFBLOCK..][..2 * 9];
            assert!(counts.chunks(2).all(|count| count != [0, 0]), "{what}");
        }
    });
}

#[test]
fn snapshots_of_one_name_or_id_are_told_apart_by_what_is_given() {
    block_on(async {
        let disk = new_image(&options()).await;
        let image = open(&disk).await;
        let long = "x".repeat(65535);
        for name in ["a", "b", &long] {
            Snapshots::create(&*image, named(name)).await.unwrap();
        }
        let error = Snapshots::create(&*image, named(&"x".repeat(65536))).await;
        assert_eq!(error.unwrap_err().kind(), ErrorKind::InvalidInput);
        image.close().await.unwrap();
        // The second becomes another `1` and another `a`.
        let mut bytes = disk.content();
        let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
        let second = table + 72;
        assert_eq!(&bytes[second + 64..second + 66], b"2b");
        bytes[second + 64..second + 66].copy_from_slice(b"1a");
        replace(&disk, &bytes);
        let image = open(&disk).await;
        let names: Vec<_> = image.list().into_iter().map(|s| (s.id, s.name)).collect();
        assert_eq!(names[1], ("1".to_owned(), "a".to_owned()));
        assert_eq!(names[2], ("3".to_owned(), long));
        for left in [2, 1] {
            let which = SnapshotSelector {
                id: Some("1".to_owned()),
                name: Some("a".to_owned()),
            };
            Snapshots::delete(&*image, which).await.unwrap();
            assert_eq!(image.list().len(), left);
        }
        image.close().await.unwrap();
        assert_qemu_clean(&Scratch::new().save("image.qcow2", &disk));
    });
}

#[test]
fn extra_data_and_the_length_of_the_snapshot_table_are_bounded() {
    block_on(async {
        let image = sample().await;
        let at = 16 * CLUSTER;
        let mut long_extra = image.clone();
        snapshot(&mut long_extra, 17 * CLUSTER as u64, 0);
        put(&mut long_extra, at + 36, 4, 1025);
        let error = try_open(&Memory::with_content(&long_extra), true).await;
        let error = error.err().map(|error| error.message().to_owned());
        let text = "Could not read snapshots: Too much extra metadata in snapshot table entry 0";
        assert_eq!(error.as_deref(), Some(text));
        // 65536 names of 65535 bytes in a sparse file would be 4 GiB.
        let mut many = image;
        snapshot(&mut many, 17 * CLUSTER as u64, 0);
        put(&mut many, 60, 4, 65536);
        let disk = Memory::with_content(&many);
        disk.apply(&Change::Resize { size: 1 << 40 }).unwrap();
        // Empty entries of 40 bytes each: few enough, and refused for no other reason than their number or places.
        let opened = try_open(&disk, true).await;
        assert_eq!(opened.unwrap().list().len(), 65536);
    });
}

#[test]
fn one_host_cluster_for_two_guest_clusters_stays_a_matter_of_guest_data() {
    block_on(async {
        let mut image = sample().await;
        let first = image[L2..L2 + 8].to_vec();
        image[L2 + 16..L2 + 24].copy_from_slice(&first);
        let disk = Memory::with_content(&image);
        let report = check(&disk.child()).await.unwrap();
        assert!(report.corruptions > 0, "{report:?}");
        let image = open(&disk).await;
        assert_eq!(read(&image, 8192, 4).await, [1; 4]);
        image.discard(0, 4096).await.unwrap();
        image.flush().await.unwrap();
        write(&image, 65536, vec![8; 65536]).await.unwrap();
        image.discard(8192, 4096).await.unwrap();
        image.flush().await.unwrap();
        assert_rest_works("shared", &image).await;
        image.close().await.unwrap();
    });
}

#[test]
fn a_huge_disk_in_a_tiny_file_costs_its_l1_table_and_no_more() {
    block_on(async {
        let mut options = CreateOptions::new(1 << 20);
        options.cluster_size = 2 << 20;
        let disk = new_image(&options).await;
        let mut bytes = disk.content();
        // The largest L1 table, in a hole of the file.
        put(&mut bytes, 24, 8, 1 << 61);
        put(&mut bytes, 36, 4, 4 << 20);
        put(&mut bytes, 40, 8, 1 << 40);
        replace(&disk, &bytes);
        let size = (1 << 40) + (32 << 20);
        disk.apply(&Change::Resize { size }).unwrap();
        disk.set_space_limit(Some(64 << 20));
        let began = std::time::Instant::now();
        let image = open(&disk).await;
        assert_eq!(read(&image, 1 << 60, 10).await, [0; 10]);
        image.discard(0, 1 << 61).await.unwrap();
        let status = image.block_status(0, 1 << 61).await.unwrap();
        assert!(!status.allocated);
        image
            .resize(1 << 30, crate::driver::Preallocation::Off)
            .await
            .unwrap();
        image.close().await.unwrap();
        assert!(began.elapsed() < HANGS_AFTER);
        assert!(disk.allocated() < 64 << 20);
    });
}

#[test]
fn a_repair_is_not_kept_busy_by_tables_that_overlap() {
    block_on(async {
        let mut image = sample().await;
        image[79] |= 1;
        // 1024 snapshots whose L1 tables of 32 MiB lie over each other in a hole, each a cluster further.
        snapshot(&mut image, 0, 0);
        let entry = image[16 * CLUSTER..16 * CLUSTER + 58].to_vec();
        put(&mut image, 60, 4, 1024);
        image.resize(64 * CLUSTER, 0);
        for index in 0..1024 {
            let at = 16 * CLUSTER + 64 * index;
            image[at..at + 58].copy_from_slice(&entry);
            put(&mut image, at, 8, ((100 + index) * CLUSTER) as u64);
            put(&mut image, at + 8, 4, 4 << 20);
        }
        // And as many refcount blocks as the table has entries, none of them readable.
        for entry in 1..512 {
            put(&mut image, REFTABLE + 8 * entry, 8, (1 << 40) | 512);
        }
        let disk = Memory::with_content(&image);
        disk.apply(&Change::Resize { size: 1 << 32 }).unwrap();
        let began = std::time::Instant::now();
        let error = try_open(&disk, false).await.err().unwrap();
        assert!(error.message().contains("too many tables"), "{error}");
        assert!(began.elapsed() < HANGS_AFTER, "{:?}", began.elapsed());
    });
}

#[test]
fn the_repair_of_a_truncated_file_spares_its_last_table() {
    block_on(async {
        let mut image = sample().await;
        // The file ends in front of the L1 table, of which nothing is left but its place.
        image.truncate(L1);
        image[79] |= 1;
        put(&mut image, 96, 4, 0);
        let disk = Memory::with_content(&image);
        repair(&disk.child(), Repair::All, &CheckOptions::default())
            .await
            .unwrap();
        let report = check(&disk.child()).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
    });
}
