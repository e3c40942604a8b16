//! Bitmaps made by qemu-img and filled by qemu-io, through our changes, and looked at by qemu-img again.

use std::path::Path;

use super::super::testing::{Scratch, assert_qemu_clean, block_on, qemu_img, qemu_io};
use super::super::{OpenOptions, Qcow2};
use super::*;
use crate::driver::{
    Driver, FormatSpecific, NewSnapshot, Preallocation, Requests, SnapshotSelector, Snapshots,
    WriteFlags, ZeroFlags,
};
use crate::formats::qcow2::check::{CheckOptions, Repair, check, read_header, repair};
use crate::io::Data;
use crate::protocols::memory::{Change, Fault, Memory, OpKind};

const SIZE: u64 = 16 << 20;

/// An image with an enabled bitmap `en`, a disabled one `dis` and one in use `lost`. Both of the former have seen a write at 1
/// MiB, only the enabled one another at 5 MiB.
fn image(scratch: &Scratch, cluster_size: u32) -> Arc<Memory> {
    let path = scratch.path("bitmaps.qcow2");
    let path = path.to_str().unwrap();
    let options = format!("cluster_size={cluster_size}");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, path, "16M"]);
    qemu_img(&["bitmap", "--add", path, "lost"]);
    qemu_img(&["bitmap", "--add", path, "en"]);
    qemu_img(&["bitmap", "--add", "-g", "32k", path, "dis"]);
    qemu_io(path, &["write -P 1 1M 200k"]);
    qemu_img(&["bitmap", "--disable", path, "dis"]);
    qemu_io(path, &["write -P 2 5M 200k"]);
    let disk = scratch.load("bitmaps.qcow2");
    let entry = entry_named(&disk, "lost");
    block_on(async {
        let mut flags = entry.clone();
        flags.flags.0 |= Flags::IN_USE;
        let (at, bytes) = flags.switch_bytes();
        let written = disk.write(at.0, bytes.into(), WriteFlags::default()).await;
        written.unwrap();
    });
    disk
}

fn directory(disk: &Arc<Memory>) -> Directory {
    block_on(async {
        let header = read_header(&disk.child()).await.unwrap();
        Directory::read(&disk.child(), &header).await.unwrap()
    })
}

fn entry_named(disk: &Arc<Memory>, name: &str) -> Entry {
    let directory = directory(disk);
    let found = directory.entries.iter().find(|entry| entry.name == name);
    found.unwrap().clone()
}

/// The numbers of the bits that are set.
fn bits(disk: &Arc<Memory>, name: &str) -> Vec<usize> {
    let entry = entry_named(disk, name);
    let content = disk.content();
    let mut set = Vec::new();
    let mut at = 0;
    block_on(async {
        let g = read_header(&disk.child()).await.unwrap().geometry();
        let cluster = g.cluster_size() as usize;
        read_table(&disk.child(), &entry, |table_entry| {
            if let Some(host) = cluster_of(g, table_entry).unwrap() {
                let bytes = &content[host.0 as usize..][..cluster];
                set.extend(
                    (0..cluster * 8)
                        .filter(|bit| bytes[bit / 8] >> (bit % 8) & 1 != 0)
                        .map(|bit| at + bit),
                );
            } else if table_entry != 0 {
                set.extend(at..at + cluster * 8);
            }
            at += cluster * 8;
            Ok(())
        })
        .await
        .unwrap();
    });
    set
}

async fn open(disk: &Arc<Memory>) -> Arc<Qcow2> {
    try_open(disk, false).await.unwrap()
}

async fn try_open(disk: &Arc<Memory>, read_only: bool) -> Result<Arc<Qcow2>> {
    let options = OpenOptions {
        read_only,
        ..OpenOptions::default()
    };
    Qcow2::open(disk.child(), options).await?.finish(None).await
}

async fn write(image: &Qcow2, at: u64) -> Result<()> {
    let data = Data::from(vec![9; 5000]);
    image.write(at, data, WriteFlags::default()).await
}

/// Name, in use and enabled of each bitmap, as the driver tells.
fn flags(image: &Qcow2) -> Vec<(String, bool, bool)> {
    let FormatSpecific::Qcow2 { bitmaps, .. } = image.info().specific else {
        panic!("not qcow2");
    };
    let flags = bitmaps.into_iter().map(|b| (b.name, b.in_use, b.auto));
    flags.collect()
}

fn expected(en_in_use: bool, dis_in_use: bool) -> Vec<(String, bool, bool)> {
    vec![
        ("lost".to_owned(), true, true),
        ("en".to_owned(), en_in_use, true),
        ("dis".to_owned(), dis_in_use, false),
    ]
}

/// The same as qemu-img tells it, of a file.
fn qemu_flags(path: &Path) -> Vec<(String, bool, bool)> {
    let text = qemu_img(&["info", "--output=json", path.to_str().unwrap()]);
    let info: serde_json::Value = serde_json::from_str(&text).unwrap();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array();
    let has = |bitmap: &serde_json::Value, flag: &str| {
        bitmap["flags"].as_array().unwrap().contains(&flag.into())
    };
    bitmaps
        .into_iter()
        .flatten()
        .map(|b| {
            (
                b["name"].as_str().unwrap().to_owned(),
                has(b, "in-use"),
                has(b, "auto"),
            )
        })
        .collect()
}

#[test]
fn a_write_makes_enabled_bitmaps_stale_and_no_others() {
    for cluster_size in [512, 65536] {
        let scratch = Scratch::new();
        let disk = image(&scratch, cluster_size);
        let before = bits(&disk, "dis");
        assert_eq!(before, (32..39).collect::<Vec<_>>());
        block_on(async {
            let image = open(&disk).await;
            assert_eq!(flags(&image), expected(false, false));
            let read = image.read(1 << 20, 100).await.unwrap();
            assert_eq!(read.to_bytes()[..], [1; 100]);
            image.flush().await.unwrap();
            assert_eq!(flags(&image), expected(false, false));
            write(&image, 9 << 20).await.unwrap();
            assert_eq!(flags(&image), expected(true, false));
            image.close().await.unwrap();
            assert!(check(&disk.child()).await.unwrap().is_clean());
        });
        let path = scratch.save("after.qcow2", &disk);
        assert_qemu_clean(&path);
        assert_eq!(qemu_flags(&path), expected(true, false));
        // QEMU takes the disabled one as it is, and makes others of it.
        let path = path.to_str().unwrap();
        qemu_img(&["bitmap", "--remove", path, "lost"]);
        qemu_img(&["bitmap", "--remove", path, "en"]);
        qemu_img(&["bitmap", "--add", "-g", "32k", "--disable", path, "copy"]);
        qemu_img(&["bitmap", "--merge", "dis", path, "copy"]);
        qemu_io(path, &["write -P 3 3M 64k"]);
        let disk = scratch.load("after.qcow2");
        assert_eq!(bits(&disk, "copy"), before);
        assert_eq!(bits(&disk, "dis"), before);
        block_on(async {
            let image = open(&disk).await;
            write(&image, 0).await.unwrap();
            image.close().await.unwrap();
        });
        assert_eq!(bits(&disk, "copy"), before);
        assert_qemu_clean(&scratch.save("again.qcow2", &disk));
    }
}

#[test]
fn every_change_of_the_content_counts_and_a_snapshot_is_none() {
    type Step = fn(Arc<Qcow2>) -> crate::driver::BoxFuture<'static, Result<()>>;
    let changes: [(Step, bool); 6] = [
        (
            |i| Box::pin(async move { i.write_zeroes(0, 512, ZeroFlags::default()).await }),
            true,
        ),
        (
            |i| Box::pin(async move { i.discard(1 << 20, 65536).await }),
            true,
        ),
        (
            |i| Box::pin(async move { i.write_compressed(0, Data::from(vec![1; 65536])).await }),
            true,
        ),
        (
            |i| Box::pin(async move { i.resize(SIZE, Preallocation::Off).await }),
            false,
        ),
        (|i| Box::pin(async move { i.flush().await }), false),
        (
            |i| {
                Box::pin(async move {
                    Snapshots::create(&*i, new_snapshot("s")).await?;
                    Snapshots::create(&*i, new_snapshot("t")).await?;
                    i.delete(named("s")).await.map(drop)
                })
            },
            false,
        ),
    ];
    let scratch = Scratch::new();
    let fresh = image(&scratch, 65536);
    for (index, (change, stale)) in changes.into_iter().enumerate() {
        let disk = fresh.fork();
        block_on(async {
            let image = open(&disk).await;
            change(image.clone()).await.unwrap();
            assert_eq!(flags(&image), expected(stale, false), "change {index}");
            image.close().await.unwrap();
        });
        let path = scratch.save("changed.qcow2", &disk);
        assert_eq!(qemu_flags(&path), expected(stale, false), "change {index}");
        assert_qemu_clean(&path);
        assert_eq!(bits(&disk, "dis"), bits(&fresh, "dis"));
    }
}

fn new_snapshot(name: &str) -> NewSnapshot {
    NewSnapshot {
        name: name.to_owned(),
        date_sec: 1,
        date_nsec: 0,
        vm_clock_nsec: 0,
    }
}

fn named(name: &str) -> SnapshotSelector {
    SnapshotSelector {
        id: None,
        name: Some(name.to_owned()),
    }
}

#[test]
fn a_revert_is_a_change_of_the_content_when_it_happens() {
    let scratch = Scratch::new();
    for grown in [false, true] {
        let disk = image(&scratch, 512);
        block_on(async {
            let image = open(&disk).await;
            Snapshots::create(&*image, new_snapshot("s")).await.unwrap();
            if grown {
                image.resize(1 << 30, Preallocation::Off).await.unwrap();
                assert_eq!(flags(&image), expected(true, false));
            }
            let before = flags(&image);
            // Dropped, refused by storage, taken back: nothing has happened.
            let mut change = image.change().await.unwrap();
            change.revert(named("s")).await.unwrap();
            change.prepare().await.unwrap();
            drop(change);
            assert_eq!(flags(&image), before);
            for kind in [OpKind::Write, OpKind::Flush] {
                for skip in 0..2 {
                    let mut change = image.change().await.unwrap();
                    change.revert(named("s")).await.unwrap();
                    change.prepare().await.unwrap();
                    disk.fail_once(kind, skip, Fault::Io);
                    change.commit().await.unwrap_err();
                    disk.clear_faults();
                    drop(change);
                    assert_eq!(flags(&image), before, "{kind:?} {skip}");
                }
            }
            for takes_back in [true, false] {
                let mut change = image.change().await.unwrap();
                change.revert(named("s")).await.unwrap();
                change.prepare().await.unwrap();
                change.commit().await.unwrap();
                if takes_back {
                    change.roll_back().await.unwrap();
                }
                change.finish();
                assert_eq!(flags(&image) == before, takes_back);
            }
            assert_eq!(flags(&image), expected(true, grown));
            assert_eq!(image.size(), SIZE);
            image.close().await.unwrap();
            assert!(check(&disk.child()).await.unwrap().is_clean());
        });
        let path = scratch.save("reverted.qcow2", &disk);
        assert_qemu_clean(&path);
        assert_eq!(qemu_flags(&path), expected(true, grown));
    }
}

#[test]
fn bitmaps_nobody_vouches_for_are_nobodys() {
    let scratch = Scratch::new();
    let disk = image(&scratch, 65536);
    block_on(async {
        // A writer that does not know them has cleared the autoclear bit.
        let data = Data::from(vec![0; 8]);
        disk.write(88, data, WriteFlags::default()).await.unwrap();
        let image = open(&disk).await;
        assert_eq!(flags(&image), []);
        write(&image, 0).await.unwrap();
        image.close().await.unwrap();
        let report = check(&disk.child()).await.unwrap();
        assert!(report.leaks > 0 && !report.is_broken(), "{report:?}");
        let path = scratch.save("forgotten.qcow2", &disk);
        let (found, _) = super::super::testing::qemu_check(&path);
        assert_eq!(found["leaks"], report.leaks);
        repair(&disk.child(), Repair::All, &CheckOptions::default())
            .await
            .unwrap();
    });
    assert_qemu_clean(&scratch.save("repaired.qcow2", &disk));
}

#[test]
fn no_crash_leaves_a_bitmap_that_hides_a_change() {
    let scratch = Scratch::new();
    for cluster_size in [512, 65536] {
        let disk = image(&scratch, cluster_size);
        let start = disk.fork();
        disk.start_log();
        let (content, log) = block_on(async {
            let image = open(&disk).await;
            let content = image.read(0, SIZE).await.unwrap().to_bytes();
            write(&image, 1 << 20).await.unwrap();
            write(&image, 10 << 20).await.unwrap();
            image.close().await.unwrap();
            (content, disk.log())
        });
        assert!(log.len() >= 6);
        // What is not flushed yet may be there in any part.
        let mut durable = 0;
        for cut in 0..=log.len() {
            for kept in 0..1_usize << (cut - durable).min(6) {
                let state = start.fork();
                let lost = |at: usize| at >= durable && kept >> ((at - durable) % 6) & 1 == 0;
                for (at, record) in log[..cut].iter().enumerate() {
                    if !lost(at) {
                        state.apply(&record.change).unwrap();
                    }
                }
                let what = format!("{cut} records, {kept:b} kept");
                assert_no_lies(&state, &content, &what);
            }
            if cut < log.len() && matches!(log[cut].change, Change::Flush) {
                durable = cut;
            }
        }
    }
}

/// An enabled bitmap that is not in use, and a disk that is not as it was: a backup would miss the change.
fn assert_no_lies(disk: &Arc<Memory>, content: &[u8], what: &str) {
    let entries = directory(disk).entries;
    assert_eq!(entries.len(), 3, "{what}");
    let trusted = entries
        .iter()
        .any(|e| e.flags.is_auto() && !e.flags.is_in_use());
    assert!(!entries[2].flags.is_in_use(), "{what}");
    block_on(async {
        let image = try_open(disk, true).await.unwrap();
        let now = image.read(0, SIZE).await.unwrap().to_bytes();
        assert!(!trusted || now == content, "{what}");
        assert_eq!(check(&disk.child()).await.unwrap().corruptions, 0, "{what}");
    });
}

#[test]
fn a_mark_that_fails_fails_the_write_and_changes_nothing() {
    let scratch = Scratch::new();
    let fresh = image(&scratch, 65536);
    let content = block_on(async {
        let image = try_open(&fresh, true).await.unwrap();
        image.read(0, SIZE).await.unwrap().to_bytes()
    });
    for kind in [OpKind::Write, OpKind::Flush] {
        for fault in [Fault::Io, Fault::NoSpace, Fault::Torn(3)] {
            let disk = fresh.fork();
            block_on(async {
                let image = open(&disk).await;
                disk.fail_once(kind, 0, fault);
                let error = write(&image, 0).await.unwrap_err();
                assert!(error.message().contains("persistent bitmaps"), "{error}");
                assert_eq!(flags(&image), expected(false, false));
                assert_no_change(&disk, &content).await;
                write(&image, 0).await.unwrap();
                assert_eq!(flags(&image), expected(true, false));
                image.close().await.unwrap();
                assert!(check(&disk.child()).await.unwrap().is_clean());
            });
            assert!(entry_named(&disk, "en").flags.is_in_use());
        }
    }
}

async fn assert_no_change(disk: &Arc<Memory>, content: &[u8]) {
    let again = try_open(disk, true).await.unwrap();
    assert_eq!(flags(&again), expected(false, false));
    let now = again.read(0, SIZE).await.unwrap().to_bytes();
    assert!(now == content);
}

#[test]
fn a_resize_keeps_the_bitmaps_that_it_can_keep() {
    let scratch = Scratch::new();
    // With 512 bytes a cluster, one of a bitmap of 32 KiB covers 128 MiB, and a cluster of its table 8 GiB.
    let grown = 8_u64 << 30;
    let cases = [
        (65536, 100 << 20, false),
        (65536, 8 << 20, true),
        (512, 100 << 20, false),
        (512, 1 << 30, false),
        (512, grown, false),
        (512, grown + (1 << 20), true),
    ];
    for (cluster_size, size, stale) in cases {
        let disk = image(&scratch, cluster_size);
        let before = bits(&disk, "dis");
        block_on(async {
            let image = open(&disk).await;
            image.resize(size, Preallocation::Off).await.unwrap();
            assert_eq!(flags(&image), expected(true, stale), "{size}");
            image.close().await.unwrap();
        });
        assert_eq!(bits(&disk, "dis"), before);
        let path = scratch.save("resized.qcow2", &disk);
        assert_qemu_clean(&path);
        assert_eq!(qemu_flags(&path), expected(true, stale));
        if !stale {
            // QEMU loads it with the new size.
            let path = path.to_str().unwrap();
            qemu_img(&["bitmap", "--remove", path, "lost"]);
            qemu_img(&["bitmap", "--add", "-g", "32k", "--disable", path, "copy"]);
            qemu_img(&["bitmap", "--merge", "dis", path, "copy"]);
            assert_eq!(bits(&scratch.load("resized.qcow2"), "copy"), before);
        }
    }
}

#[test]
fn a_resize_that_fails_leaves_the_bitmaps_as_they_were() {
    let scratch = Scratch::new();
    let fresh = image(&scratch, 512);
    for kind in [OpKind::Write, OpKind::Flush] {
        let mut reached = 0;
        loop {
            let disk = fresh.fork();
            let resized = block_on(async {
                let image = open(&disk).await;
                disk.fail_once(kind, reached, Fault::Io);
                let resized = image.resize(1 << 30, Preallocation::Off).await;
                let wanted = expected(resized.is_ok(), false);
                if resized.is_err() {
                    assert_eq!(image.size(), SIZE);
                    assert_eq!(flags(&image), wanted, "{kind:?} {reached}");
                } else {
                    // A bitmap that could not be fitted any more stays in use.
                    assert_eq!(flags(&image)[1], wanted[1]);
                }
                disk.clear_faults();
                image.close().await.unwrap();
                let report = check(&disk.child()).await.unwrap();
                assert!(report.is_clean(), "{kind:?} {reached}: {report:?}");
                resized
            });
            assert_qemu_clean(&scratch.save("failed.qcow2", &disk));
            reached += 1;
            if resized.is_ok() && disk.count(kind) - fresh.count(kind) < reached {
                break;
            }
        }
        assert!(reached > 4, "{kind:?}: {reached}");
    }
}

#[test]
fn a_damaged_directory_is_named_and_refused_for_writing() {
    let scratch = Scratch::new();
    let fresh = image(&scratch, 65536);
    let directory = directory(&fresh);
    let extension = extension_at(&fresh);
    let first = directory.entries[0].at.0;
    let second = directory.entries[1].at.0;
    let table = directory.entries[2].table.0;
    let entry = |at: u64, bytes: &[u8]| (first + at, bytes.to_vec());
    let mut cases = vec![
        // The extension.
        (extension, vec![0, 0, 0, 0]),
        (extension, vec![0, 0, 0, 2]),
        (extension, vec![0, 1, 0, 0]),
        (extension + 4, vec![1]),
        (extension + 8, vec![0; 8]),
        (extension + 15, vec![0x10]),
        (extension + 8, vec![0xff; 8]),
        (extension + 16, vec![0; 8]),
        (extension + 23, vec![1]),
        (extension + 16, vec![0x7f; 8]),
        (extension + 18, vec![0xff]),
        // An entry.
        entry(0, &[0; 8]),
        entry(7, &[1]),
        entry(2, &[0xff]),
        entry(8, &[0; 4]),
        entry(8, &[0xff; 4]),
        entry(12, &[0x80]),
        entry(16, &[0]),
        entry(16, &[2]),
        entry(17, &[8]),
        entry(17, &[32]),
        entry(18, &[0, 0]),
        entry(18, &[4, 0]),
        entry(18, &[0xff, 0xff]),
        entry(20, &[0xff; 4]),
        // Two of one name.
        (second + 18, vec![0, 4, 0, 0, 0, 0, b'l', b'o', b's', b't']),
        // Its table: reserved bits, an unaligned cluster, a place that is taken, one twice.
        (table, vec![0x80]),
        (table + 7, vec![2]),
        (table + 7, vec![1]),
        (table + 6, vec![2, 0]),
        (table, 0x10000_u64.to_be_bytes().to_vec()),
    ];
    let taken = directory.offset.0.to_be_bytes();
    cases.push((table, taken.to_vec()));
    cases.push(entry(0, &taken));
    for (at, bytes) in cases {
        assert_refused(&fresh, &[(at, bytes)]);
    }
    // A cluster of bits for 256 MiB, and a disk of 300.
    let granularity = (directory.entries[2].at.0 + 17, vec![9]);
    let size = (24, (300_u64 << 20).to_be_bytes().to_vec());
    assert_refused(&fresh, &[granularity, size]);
}

/// With these bytes written, the image is refused for writing, the check names it, and the disk can still be read.
fn assert_refused(fresh: &Arc<Memory>, writes: &[(u64, Vec<u8>)]) {
    let disk = fresh.fork();
    block_on(async {
        let what = format!("{writes:x?}");
        for (at, bytes) in writes {
            let data = Data::from(bytes.clone());
            disk.write(*at, data, WriteFlags::default()).await.unwrap();
        }
        let refused = try_open(&disk, false).await.err();
        let kind = refused.as_ref().map(Error::kind);
        assert_eq!(kind, Some(ErrorKind::Corrupt), "{what}: {refused:?}");
        let report = check(&disk.child()).await.unwrap();
        assert!(report.is_broken(), "{what}: {report:?}");
        let image = try_open(&disk, true).await.unwrap();
        let read = image.read(5 << 20, 9).await.unwrap();
        assert_eq!(read.to_bytes()[..], [2; 9], "{what}");
    });
}

/// Where the data of the bitmaps extension is.
fn extension_at(disk: &Arc<Memory>) -> u64 {
    let content = disk.content();
    let kind = 0x2385_2875_u32.to_be_bytes();
    let found = content[..4096].windows(4).position(|bytes| bytes == kind);
    found.unwrap() as u64 + 8
}
