//! L2 entries of images whose data lie elsewhere, sound and damaged.

use super::*;

#[test]
fn entries_that_point_elsewhere_are_corrupt_and_the_rest_works() {
    const COPIED: u64 = 1 << 63;
    const COMPRESSED: u64 = 1 << 62;
    block_on(async {
        let pair = Pair::new(MIB, false).await;
        let image = pair.open().await;
        write(&image, 0, vec![5; 4 << 16]).await.unwrap();
        image.close().await.unwrap();
        for (what, entry, text) in [
            (
                "elsewhere",
                COPIED | 0x20000,
                "does not match guest cluster offset: 0x10000",
            ),
            (
                "elsewhere, zero",
                COPIED | 0x20001,
                "does not match guest cluster offset",
            ),
            (
                "at the start",
                COPIED,
                "does not match guest cluster offset",
            ),
            ("unaligned", COPIED | 0x10200, "unaligned"),
            (
                "compressed",
                COMPRESSED | 0x10000,
                "Compressed cluster entry found in image with external data file",
            ),
            ("reserved", COPIED | 0x10002, "reserved bits"),
        ] {
            let mut content = pair.disk.content();
            content[4 * 65536 + 8..][..8].copy_from_slice(&entry.to_be_bytes());
            let damaged = pair.damaged(&content);
            let image = damaged.open().await;
            let error = image.read(CLUSTER, 10).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}");
            assert!(error.message().contains(text), "{what}: {error}");
            write(&image, CLUSTER, vec![1; 65536]).await.unwrap_err();
            image
                .write_zeroes(CLUSTER, CLUSTER, unmap())
                .await
                .unwrap_err();
            assert_eq!(read(&image, 2 * CLUSTER, 2).await, [5, 5], "{what}");
            write(&image, 0, vec![6; 10]).await.unwrap();
            image.close().await.unwrap();
            assert_same(&damaged.data.content()[10..], &pair.data.content()[10..]);
        }
    });
}

#[test]
fn bitmaps_of_subclusters_are_held_against_their_place_in_the_data_file() {
    const COPIED: u64 = 1 << 63;
    const DATA: u64 = 0xffff_ffff;
    const L2: usize = 4 * 65536;
    block_on(async {
        let mut made = options(MIB, false);
        made.extended_l2 = true;
        let pair = Pair::make(&made).await;
        let image = pair.open().await;
        write(&image, 0, vec![5; 2 << 16]).await.unwrap();
        image.close().await.unwrap();
        let sound = pair.disk.content();
        let word = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
        assert_eq!([word(L2), word(L2 + 8)], [COPIED, DATA]);
        for (what, nth, descriptor, bitmap, corruptions) in [
            ("sound at the start", 0, COPIED, DATA, 0),
            ("data without a place", 0, 0, DATA, 1),
            ("data without a place", 1, 0, DATA, 1),
            ("data and zeroes", 1, COPIED | CLUSTER, DATA | 1 << 32, 1),
            ("the zero flag", 1, COPIED | CLUSTER | 1, DATA, 1),
        ] {
            let mut content = sound.clone();
            content[L2 + nth * 16..][..8].copy_from_slice(&u64::to_be_bytes(descriptor));
            content[L2 + nth * 16 + 8..][..8].copy_from_slice(&u64::to_be_bytes(bitmap));
            let damaged = pair.damaged(&content);
            let report = check(&damaged.disk.child()).await.unwrap();
            assert_eq!(report.corruptions, corruptions, "{what}: {report:?}");
            let image = damaged.open().await;
            let at = nth as u64 * CLUSTER;
            assert_eq!(image.read(at, 1).await.is_err(), corruptions > 0, "{what}");
            assert_eq!(read(&image, CLUSTER - at, 1).await, [5], "{what}");
            image.close().await.unwrap();
        }
    });
}

#[test]
fn entries_without_the_copied_flag_are_used_as_they_are() {
    block_on(async {
        let pair = Pair::new(MIB, false).await;
        let image = pair.open().await;
        write(&image, 0, vec![5; 3 << 16]).await.unwrap();
        image.close().await.unwrap();
        let mut content = pair.disk.content();
        content[4 * 65536 + 8] = 0;
        let pair = pair.damaged(&content);
        let report = check(&pair.disk.child()).await.unwrap();
        assert_eq!(report.corruptions, 1, "{report:?}");
        let image = pair.open().await;
        assert_eq!(read(&image, CLUSTER, 2).await, [5, 5]);
        write(&image, CLUSTER + 7, vec![6; 10]).await.unwrap();
        let now = read(&image, CLUSTER, 20).await;
        assert_eq!(now[6..18], [5, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 5]);
        image.close().await.unwrap();
    });
}
