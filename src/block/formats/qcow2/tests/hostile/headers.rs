//! Images that are refused: always, for what breaks a limit, or for writing, for metadata in one place twice.

use super::*;

/// A damage: what it is called, what it does, and what the error says.
type Case = (&'static str, fn(&mut Vec<u8>), &'static str);

/// Opens the damaged image, which must be refused with the text and leave the file as it is.
async fn assert_refused(image: &[u8], read_only: bool, (what, damage, text): Case) {
    let mut image = image.to_vec();
    damage(&mut image);
    let disk = Memory::with_content(&image);
    let error = match try_open(&disk, read_only).await {
        Ok(_) => panic!("{what}: opened"),
        Err(error) => error,
    };
    assert!(error.message().contains(text), "{what}: {error}");
    assert_same(&disk.content(), &image);
}

fn extension(image: &mut [u8], at: usize, kind: u64, len: u64) {
    put(image, at, 4, kind);
    put(image, at + 4, 4, len);
}

const NEVER: &[Case] = &[
    ("magic", |i| i[3] = 0, "not in qcow2 format"),
    (
        "version",
        |i| put(i, 4, 4, 4),
        "Unsupported qcow2 version 4",
    ),
    ("no file", |i| i.truncate(0), "too short"),
    ("a short file", |i| i.truncate(100), "too short"),
    (
        "small clusters",
        |i| put(i, 20, 4, 8),
        "Unsupported cluster size",
    ),
    (
        "large clusters",
        |i| put(i, 20, 4, 22),
        "Unsupported cluster size",
    ),
    (
        "a cluster size that overflows",
        |i| put(i, 20, 4, u32::MAX.into()),
        "Unsupported cluster size",
    ),
    (
        "backing name outside",
        |i| put(i, 8, 8, 4097),
        "Invalid backing file offset",
    ),
    (
        "a backing name in the header's fields",
        |i| put(i, 8, 8, 104),
        "Invalid backing file offset",
    ),
    (
        "a long backing name",
        |i| {
            put(i, 8, 8, 1024);
            put(i, 16, 4, 1024);
        },
        "Backing file name too long",
    ),
    (
        "a backing name that leaves the cluster",
        |i| {
            put(i, 8, 8, 4090);
            put(i, 16, 4, 7);
        },
        "Backing file name too long",
    ),
    (
        "NUL in the backing name",
        |i| {
            put(i, 8, 8, 1024);
            put(i, 16, 4, 3);
            i[1024..1027].copy_from_slice(b"a\0b");
        },
        "The backing file's name is not valid text",
    ),
    (
        "a backing name that is not UTF-8",
        |i| {
            put(i, 8, 8, 1024);
            put(i, 16, 4, 1);
            i[1024] = 0xff;
        },
        "The backing file's name is not valid text",
    ),
    ("encryption", |i| put(i, 32, 4, 1), "AES-encrypted"),
    (
        "unknown encryption",
        |i| put(i, 32, 4, 77),
        "Unsupported encryption method 77",
    ),
    (
        "a disk larger than its L1 table",
        |i| put(i, 24, 8, 1 << 30),
        "L1 table is too small",
    ),
    (
        "the largest disk",
        |i| put(i, 24, 8, u64::MAX),
        "Image is too big",
    ),
    (
        "a large L1 table",
        |i| put(i, 36, 4, (4 << 20) + 1),
        "Active L1 table too large",
    ),
    ("no L1 table", |i| put(i, 36, 4, 0), "L1 table is too small"),
    (
        "an unaligned L1 table",
        |i| put(i, 40, 8, L1 as u64 + 512),
        "Active L1 table offset invalid",
    ),
    (
        "L1 table at 0",
        |i| put(i, 40, 8, 0),
        "Active L1 table offset invalid",
    ),
    (
        "L1 table that overflows",
        |i| put(i, 40, 8, !4095),
        "Active L1 table offset invalid",
    ),
    (
        "an L1 table behind the end",
        |i| put(i, 40, 8, 1 << 40),
        "Active L1 table at 0x10000000000 with 16 bytes is outside of the file, which has 36864",
    ),
    (
        "an L1 table that leaves the file",
        |i| put(i, 36, 4, 512 * 6 + 1),
        "Active L1 table at 0x3000 with 24584 bytes is outside of the file",
    ),
    (
        "an unaligned refcount table",
        |i| put(i, 48, 8, 4097),
        "Reference count table offset invalid",
    ),
    (
        "refcount table at 0",
        |i| put(i, 48, 8, 0),
        "Reference count table offset invalid",
    ),
    (
        "refcount table that overflows",
        |i| put(i, 48, 8, 1 << 63),
        "Reference count table offset invalid",
    ),
    (
        "no refcount table",
        |i| put(i, 56, 4, 0),
        "does not contain a reference count table",
    ),
    (
        "a large refcount table",
        |i| put(i, 56, 4, 2049),
        "valid refcount table: too large",
    ),
    (
        "many snapshots",
        |i| put(i, 60, 4, 65537),
        "Snapshot table too large",
    ),
    (
        "an unaligned snapshot table",
        |i| {
            put(i, 60, 4, 1);
            put(i, 64, 8, 513);
        },
        "Snapshot table offset invalid",
    ),
    (
        "a snapshot table behind the end",
        |i| {
            put(i, 60, 4, 1);
            put(i, 64, 8, 1 << 40);
        },
        "Could not read snapshots: Snapshot table at 0x10000000000 runs past the end",
    ),
    (
        "more snapshots than in the table",
        |i| {
            put(i, 60, 4, 65536);
            put(i, 64, 8, 8 * CLUSTER as u64);
        },
        "in snapshot table entry 0",
    ),
    (
        "an unknown feature",
        |i| put(i, 72, 8, 1 << 62),
        "Unknown incompatible feature: 4000000000000000",
    ),
    (
        "a named feature",
        |i| {
            put(i, 72, 8, 1 << 9);
            // In place of the first record of the feature name table.
            i[120..132].copy_from_slice(b"\0\x09shiny new\0");
        },
        "Unsupported qcow2 feature(s): shiny new",
    ),
    (
        "an external data file",
        |i| put(i, 72, 8, 4),
        "'data-file' is required for this image (the image does not name it)",
    ),
    (
        "an external data file that is named",
        |i| {
            put(i, 72, 8, 4);
            extension(i, 112, 0x4441_5441, 11);
            i[120..131].copy_from_slice(b"/etc/passwd");
        },
        "the image names '/etc/passwd', which is not opened for that",
    ),
    (
        "two names of a data file",
        |i| {
            put(i, 72, 8, 4);
            extension(i, 112, 0x4441_5441, 0);
            extension(i, 120, 0x4441_5441, 0);
        },
        "appears twice",
    ),
    (
        "a raw data file that is none",
        |i| put(i, 88, 8, 2),
        "data-file-raw requires a data file",
    ),
    (
        "snapshots with a data file",
        |i| {
            put(i, 72, 8, 4);
            snapshot(i, L1 as u64, 1);
        },
        "Internal snapshots are not possible with an external data file",
    ),
    (
        "subclusters smaller than a sector",
        |i| put(i, 72, 8, 16),
        "Unsupported subcluster size",
    ),
    (
        "a compression type without its bit",
        |i| i[104] = 1,
        "Compression type field does not match",
    ),
    (
        "a compression bit without a type",
        |i| put(i, 72, 8, 8),
        "Compression type field does not match",
    ),
    (
        "an unknown compression type",
        |i| {
            put(i, 72, 8, 8);
            i[104] = 2;
        },
        "unknown compression type: 2",
    ),
    (
        "wide refcounts",
        |i| put(i, 96, 4, 7),
        "Reference count entry width too large",
    ),
    (
        "a short header",
        |i| put(i, 100, 4, 96),
        "qcow2 header too short",
    ),
    (
        "an odd header length",
        |i| put(i, 100, 4, 109),
        "not a multiple of 8",
    ),
    (
        "a long header",
        |i| put(i, 100, 4, 4104),
        "qcow2 header exceeds cluster size",
    ),
    (
        "an extension that leaves the cluster",
        |i| extension(i, 112, 0x1234, 4000),
        "Header extension too large: type 0x1234",
    ),
    (
        "an extension that overflows",
        |i| extension(i, 112, 0x1234, u32::MAX.into()),
        "Header extension too large",
    ),
    (
        "an extension twice",
        |i| {
            extension(i, 112, 0xe279_2aca, 3);
            extension(i, 128, 0xe279_2aca, 3);
            i[120..123].copy_from_slice(b"raw");
        },
        "appears twice",
    ),
    (
        "NUL in the backing format",
        |i| extension(i, 112, 0xe279_2aca, 3),
        "format name is not valid",
    ),
    (
        "an encryption header without encryption",
        |i| extension(i, 112, 0x0537_be77, 16),
        "CRYPTO header extension only expected with LUKS encryption method",
    ),
    (
        "bitmaps without their extension",
        |i| put(i, 88, 8, 1),
        "has no bitmaps extension",
    ),
];

#[test]
fn what_breaks_a_limit_of_the_header_is_never_opened() {
    block_on(async {
        let image = sample().await;
        for case in NEVER {
            assert_refused(&image, true, *case).await;
            assert_refused(&image, false, *case).await;
        }
    });
}

const NOT_FOR_WRITING: &[Case] = &[
    ("the corrupt bit", |i| i[79] = 2, "Image is corrupt"),
    (
        "an unaligned refcount block",
        |i| put(i, REFTABLE, 8, 0x2200),
        "refcount block offset 0x2200 is not valid (table index 0)",
    ),
    (
        "reserved bits of a refcount table entry",
        |i| put(i, REFTABLE, 8, 0x2001),
        "refcount block offset 0x2001",
    ),
    (
        "a refcount table behind the end",
        |i| put(i, 48, 8, 1 << 40),
        "Reference count table at 0x10000000000 with 4096 bytes is outside of the file, which has 36864",
    ),
    (
        "a refcount table that leaves the file",
        |i| put(i, 56, 4, 9),
        "Reference count table at 0x1000 with 36864 bytes is outside of the file",
    ),
    (
        "a refcount block behind the end",
        |i| put(i, REFTABLE, 8, 1 << 50),
        "refcount block offset",
    ),
    (
        "a refcount block that leaves the file",
        |i| {
            put(i, REFTABLE + 8, 8, 9 * CLUSTER as u64);
            i.resize(10 * CLUSTER - 8, 0);
        },
        "refcount block offset 0x9000 is not valid (table index 1)",
    ),
    (
        "a refcount block on the refcount table",
        |i| put(i, REFTABLE, 8, REFTABLE as u64),
        "used for a refcount block, but holds the refcount table",
    ),
    (
        "a refcount block on the L1 table",
        |i| put(i, REFTABLE, 8, L1 as u64),
        "used for a refcount block, but holds an L1 table",
    ),
    (
        "a refcount block twice",
        |i| put(i, REFTABLE + 8, 8, REFBLOCK as u64),
        "used for a refcount block, but holds a refcount block",
    ),
    (
        "a refcount block on an L2 table",
        |i| put(i, REFTABLE + 8, 8, L2 as u64),
        "used for an L2 table, but holds a refcount block",
    ),
    (
        "the refcount table on the L1 table",
        |i| put(i, 48, 8, L1 as u64),
        "corrupt",
    ),
    (
        "the L1 table on the refcount table",
        |i| put(i, 40, 8, REFTABLE as u64),
        "used for an L1 table, but holds the refcount table",
    ),
    (
        "the L1 table on the refcount block",
        |i| put(i, 40, 8, REFBLOCK as u64),
        "but holds an L1 table",
    ),
    (
        "an L2 table on the refcount block",
        |i| put(i, L1, 8, COPIED | REFBLOCK as u64),
        "used for an L2 table, but holds a refcount block",
    ),
    (
        "an L2 table on the L1 table",
        |i| put(i, L1, 8, COPIED | L1 as u64),
        "used for an L2 table, but holds an L1 table",
    ),
    (
        "an L2 table twice",
        |i| put(i, L1 + 8, 8, COPIED | L2 as u64),
        "used for an L2 table, but holds an L2 table",
    ),
    (
        "the snapshot table on the L1 table",
        |i| {
            put(i, 60, 4, 1);
            put(i, 64, 8, L1 as u64);
            // An entry of no length and no L1 table.
            i[L1..L1 + 64].fill(0);
        },
        "used for the snapshot table, but holds an L1 table",
    ),
    (
        "a snapshot on the active L1 table",
        |i| snapshot(i, L1 as u64, 2),
        "used for an L1 table, but holds an L1 table",
    ),
    (
        "a snapshot's L1 table on the refcounts",
        |i| snapshot(i, REFBLOCK as u64, 2),
        "used for an L1 table, but holds a refcount block",
    ),
    (
        "a snapshot's L1 table on the snapshot table",
        |i| snapshot(i, 16 * CLUSTER as u64, 2),
        "used for an L1 table, but holds the snapshot table",
    ),
];

#[test]
fn metadata_in_one_place_twice_are_not_opened_for_writing_but_can_be_read() {
    block_on(async {
        let image = sample().await;
        for case in NOT_FOR_WRITING {
            assert_refused(&image, false, *case).await;
            let mut damaged = image.clone();
            (case.1)(&mut damaged);
            let disk = Memory::with_content(&damaged);
            let opened = try_open(&disk, true).await;
            let image = opened.unwrap_or_else(|error| panic!("{}: {error}", case.0));
            // What is read may be nonsense, or an error.
            let _ = image.read(0, 4 << 20).await;
            image.close().await.unwrap();
            assert_same(&disk.content(), &damaged);
        }
    });
}

#[test]
fn unknown_promises_are_taken_back_with_the_first_change() {
    block_on(async {
        let mut image = sample().await;
        // An autoclear bit and a compatible one that nobody knows.
        put(&mut image, 88, 8, 1 << 40);
        put(&mut image, 80, 8, 1 << 41);
        let disk = Memory::with_content(&image);
        let opened = open(&disk).await;
        assert_eq!(read(&opened, 0, 4).await, [1; 4]);
        opened.flush().await.unwrap();
        assert_same(&disk.content(), &image);
        write(&opened, 0, vec![9; 1]).await.unwrap();
        let header = &disk.content()[..104];
        assert_eq!(header[88..96], [0; 8]);
        assert_eq!(header[80..88], (1_u64 << 41).to_be_bytes());
        opened.close().await.unwrap();
    });
}
