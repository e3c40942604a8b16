//! Amended images beside what qemu-img makes of a copy, and amendments that fail or are cut short.

use std::sync::Arc;

use serde_json::Value;

use super::super::check::check;
use super::super::testing::{Scratch, assert_qemu_clean, block_on, qemu_img, qemu_io};
use super::super::{OpenOptions, Qcow2};
use super::*;
use crate::driver::{Driver, Preallocation, Requests, ZeroFlags};
use crate::protocols::memory::{Fault, Memory, OpKind};

const SIZE: u64 = 1 << 20;

/// A name that no header of a sector has room for.
fn long_name() -> String {
    "./".repeat(240) + "new.raw"
}

fn backing(name: &str, format: Option<&str>) -> AmendOptions {
    AmendOptions {
        backing: Some(BackingFile {
            name: Some(name.to_owned()),
            format: format.map(str::to_owned),
        }),
        ..AmendOptions::default()
    }
}

fn no_backing() -> AmendOptions {
    AmendOptions {
        backing: Some(BackingFile::default()),
        ..AmendOptions::default()
    }
}

fn upgrade() -> AmendOptions {
    AmendOptions {
        compat: Some(Compat::V1_1),
        ..AmendOptions::default()
    }
}

fn lazy(on: bool) -> AmendOptions {
    AmendOptions {
        lazy_refcounts: Some(on),
        ..AmendOptions::default()
    }
}

/// An image with data at 64 KiB, made by qemu-img.
fn image(scratch: &Scratch, options: &str) -> Arc<Memory> {
    for name in ["old.raw", "new.raw", "b"] {
        std::fs::write(scratch.path(name), [0; SIZE as usize]).unwrap();
    }
    let path = scratch.path("image.qcow2");
    let path = path.to_str().unwrap();
    qemu_img(&[
        "create", "-q", "-u", "-f", "qcow2", "-o", options, path, "1M",
    ]);
    qemu_io(path, &["write -q -P 5 64k 100k"]);
    scratch.load("image.qcow2")
}

/// The same with two snapshots, of which the first is as programs before 2012 made them: without extra data.
fn with_old_snapshot(scratch: &Scratch) -> Arc<Memory> {
    image(scratch, "compat=0.10");
    let path = scratch.path("image.qcow2");
    for name in ["first", "second"] {
        qemu_img(&["snapshot", "-c", name, path.to_str().unwrap()]);
    }
    let mut bytes = std::fs::read(&path).unwrap();
    let field = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    let at = field(64);
    let extra = field(at + 32) as u32 as usize;
    assert!(extra >= 16);
    // Id, name and the second entry move up.
    let end = bytes.len();
    bytes[at + 36..at + 40].fill(0);
    let id = at + 40;
    let len = "1first".len();
    bytes.copy_within(id + extra..id + extra + len, id);
    let second = |extra: usize| (id + extra + len).next_multiple_of(8);
    bytes.copy_within(second(extra)..(at + 4096).min(end), second(0));
    std::fs::write(&path, &bytes).unwrap();
    scratch.load("image.qcow2")
}

async fn open(disk: &Arc<Memory>) -> Result<Arc<Qcow2>> {
    let opening = Qcow2::open(disk.child(), OpenOptions::default()).await?;
    opening.finish(None).await
}

/// What qemu-img tells of an image, but for what differs between files of one content.
fn info(path: &str) -> Value {
    let text = qemu_img(&["info", "--output=json", path]);
    let mut info: Value = serde_json::from_str(&text).unwrap();
    let object = info.as_object_mut().unwrap();
    for name in [
        "filename",
        "actual-size",
        "children",
        "full-backing-filename",
    ] {
        object.remove(name);
    }
    info
}

/// The image after the amendment, closed; what it is like with qemu-img is compared.
fn amended(disk: &Arc<Memory>, options: AmendOptions) -> Arc<Memory> {
    let disk = disk.fork();
    block_on(async {
        let image = open(&disk).await.unwrap();
        image.amend(options).await.unwrap();
        let read = image.read(64 << 10, 100 << 10).await.unwrap();
        assert!(read.to_bytes().iter().all(|byte| *byte == 5));
        image.close().await.unwrap();
        assert!(check(&disk.child()).await.unwrap().is_clean());
    });
    disk
}

#[test]
fn an_amended_image_is_as_qemu_img_would_make_it() {
    let scratch = Scratch::new();
    let long = long_name();
    let rebase = |name: &str| {
        let words = ["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", name];
        words.map(str::to_owned).to_vec()
    };
    let amend = |options: &str| {
        let words = ["amend", "-f", "qcow2", "-o", options];
        words.map(str::to_owned).to_vec()
    };
    let v2 = "compat=0.10";
    let v2_backing = "compat=0.10,backing_file=old.raw,backing_fmt=raw";
    let v3_backing = "backing_file=old.raw,backing_fmt=raw";
    let both = AmendOptions {
        lazy_refcounts: Some(true),
        refcount_bits: Some(16),
        data_file_raw: Some(false),
        ..upgrade()
    };
    let cases = [
        (v2, upgrade(), amend("compat=1.1")),
        (v2, both, amend("compat=1.1,lazy_refcounts=on")),
        (v2_backing, upgrade(), amend("compat=1.1")),
        (v2_backing, backing(&long, Some("raw")), rebase(&long)),
        (v2_backing, no_backing(), rebase("")),
        ("compat=1.1", lazy(true), amend("lazy_refcounts=on")),
        (
            "lazy_refcounts=on",
            lazy(false),
            amend("lazy_refcounts=off"),
        ),
        (
            "compat=1.1",
            backing("new.raw", Some("raw")),
            rebase("new.raw"),
        ),
        ("compat=1.1", backing(&long, Some("raw")), rebase(&long)),
        (v3_backing, backing(&long, Some("raw")), rebase(&long)),
        (v3_backing, backing("b", Some("raw")), rebase("b")),
        (v3_backing, no_backing(), rebase("")),
    ];
    for (created, options, mut qemu) in cases {
        for cluster_size in [2048, 65536] {
            let what = format!("{created} {options:?} with clusters of {cluster_size}");
            let disk = image(&scratch, &format!("{created},cluster_size={cluster_size}"));
            let copy = scratch.path("image.qcow2");
            let ours = scratch.save("ours.qcow2", &amended(&disk, options.clone()));
            qemu.push(copy.to_str().unwrap().to_owned());
            qemu_img(&qemu.iter().map(String::as_str).collect::<Vec<_>>());
            qemu.pop();
            let told = [&ours, &copy].map(|path| info(path.to_str().unwrap()));
            assert_eq!(told[0], told[1], "{what}");
            assert_qemu_clean(&ours);
            if cluster_size == 65536 && told[0]["format-specific"]["data"]["compat"] == "1.1" {
                let header = std::fs::read(&ours).unwrap();
                let named = header[..2048].windows(9).any(|bytes| bytes == b"dirty bit");
                assert!(named, "{what}: the feature bits keep their names");
            }
        }
    }
}

#[test]
fn old_snapshots_get_what_version_3_requires() {
    let scratch = Scratch::new();
    let disk = with_old_snapshot(&scratch);
    let ours = amended(&disk, upgrade());
    block_on(async {
        let image = open(&ours.fork()).await.unwrap();
        let snapshots = image.snapshots().unwrap().list();
        let told: Vec<_> = snapshots.iter().map(|s| (&*s.name, s.disk_size)).collect();
        assert_eq!(told, [("first", SIZE), ("second", SIZE)]);
        // It does not depend on the disk's size any more.
        image.resize(2 * SIZE, Preallocation::Off).await.unwrap();
        assert_eq!(image.snapshots().unwrap().list()[0].disk_size, SIZE);
    });
    let copy = scratch.path("image.qcow2");
    let copy = copy.to_str().unwrap();
    let saved = scratch.save("ours.qcow2", &ours);
    qemu_img(&["amend", "-f", "qcow2", "-o", "compat=1.1", copy]);
    assert_eq!(info(saved.to_str().unwrap()), info(copy));
    assert_qemu_clean(&saved);
    for name in ["first", "second"] {
        qemu_img(&["snapshot", "-a", name, saved.to_str().unwrap()]);
    }
    assert_qemu_clean(&saved);
}

#[test]
fn an_upgraded_image_says_zero_where_it_could_not() {
    let scratch = Scratch::new();
    let disk = image(&scratch, "compat=0.10,backing_file=old.raw,backing_fmt=raw");
    block_on(async {
        let image = open(&disk).await.unwrap();
        let zero = ZeroFlags {
            no_fallback: true,
            ..ZeroFlags::default()
        };
        assert!(image.write_zeroes(0, SIZE, zero).await.is_err());
        image.amend(upgrade()).await.unwrap();
        image.write_zeroes(0, SIZE, zero).await.unwrap();
        assert!(image.read(0, SIZE).await.unwrap().is_known_zero());
        image.close().await.unwrap();
        let again = open(&disk).await.unwrap();
        assert!(again.read(0, SIZE).await.unwrap().is_known_zero());
    });
    assert_qemu_clean(&scratch.save("zero.qcow2", &disk));
}

#[test]
fn a_named_backing_file_is_not_shown_through_discarded_clusters() {
    let scratch = Scratch::new();
    let disk = image(&scratch, "compat=1.1");
    block_on(async {
        let image = open(&disk).await.unwrap();
        image.amend(backing("base.raw", Some("raw"))).await.unwrap();
        image.discard(64 << 10, 64 << 10).await.unwrap();
        image.close().await.unwrap();
        let base = Memory::with_content(&vec![7; SIZE as usize]);
        let opening = Qcow2::open(disk.child(), OpenOptions::default()).await;
        let opening = opening.unwrap();
        assert_eq!(opening.backing().unwrap().name, "base.raw");
        let image = opening.finish(Some(base.child())).await.unwrap();
        let read = image.read(64 << 10, 64 << 10).await.unwrap();
        assert!(read.is_known_zero());
        // What was never written shows the backing from now on.
        assert_eq!(image.read(0, 1).await.unwrap().to_bytes()[..], [7]);
    });
}

#[test]
fn what_cannot_be_amended_is_refused_and_nothing_changes() {
    let scratch = Scratch::new();
    let none = AmendOptions::default;
    let cases = [
        ("compat=0.10", lazy(true), ErrorKind::InvalidInput),
        (
            "compat=1.1",
            AmendOptions {
                compat: Some(Compat::V0_10),
                ..none()
            },
            ErrorKind::Unsupported,
        ),
        (
            "compat=1.1",
            AmendOptions {
                refcount_bits: Some(32),
                ..lazy(true)
            },
            ErrorKind::Unsupported,
        ),
        (
            "compat=1.1",
            AmendOptions {
                data_file_raw: Some(true),
                ..none()
            },
            ErrorKind::InvalidInput,
        ),
        ("compat=1.1", backing("", None), ErrorKind::InvalidInput),
        ("compat=1.1", backing("a\0b", None), ErrorKind::InvalidInput),
        (
            "compat=1.1",
            backing("a", Some("0123456789abcdef")),
            ErrorKind::InvalidInput,
        ),
        (
            "compat=1.1",
            backing(&"x".repeat(1024), None),
            ErrorKind::InvalidInput,
        ),
        (
            "cluster_size=512",
            backing(&long_name(), None),
            ErrorKind::InvalidInput,
        ),
        (
            "cluster_size=1024,backing_file=b,backing_fmt=raw",
            backing(&long_name().repeat(2), None),
            ErrorKind::InvalidInput,
        ),
    ];
    for (created, options, kind) in cases {
        let disk = image(&scratch, created);
        block_on(async {
            let image = open(&disk).await.unwrap();
            let before = disk.content();
            let told = image.info();
            let error = image.amend(options.clone()).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{options:?}: {error}");
            assert_eq!(image.info(), told);
            assert!(disk.content() == before, "{options:?}");
        });
    }
}

/// Every state on the way to an amended image is the image before or after.
#[test]
fn an_amendment_that_is_cut_short_has_happened_or_not() {
    let scratch = Scratch::new();
    let with_long = backing(&long_name(), Some("raw"));
    let with_backing = "backing_file=old.raw,backing_fmt=raw";
    for (fresh, options) in [
        (image(&scratch, "compat=1.1"), with_long.clone()),
        (image(&scratch, "compat=0.10"), upgrade()),
        (with_old_snapshot(&scratch), upgrade()),
        (image(&scratch, with_backing), with_long),
        (image(&scratch, with_backing), no_backing()),
    ] {
        let read_info = |disk: &Arc<Memory>| {
            block_on(async {
                let image = open(disk).await.unwrap();
                assert_eq!(check(&disk.child()).await.unwrap().corruptions, 0);
                image.info()
            })
        };
        let before = read_info(&fresh);
        let after = read_info(&amended(&fresh, options.clone()));
        assert_ne!(before, after);
        let disk = fresh.fork();
        disk.start_log();
        block_on(async {
            let image = open(&disk).await.unwrap();
            image.amend(options.clone()).await.unwrap();
        });
        let log = disk.log();
        let mut seen = Vec::new();
        for cut in 0..=log.len() {
            let state = fresh.fork();
            for record in &log[..cut] {
                state.apply(&record.change).unwrap();
            }
            let told = read_info(&state);
            assert!(told == before || told == after, "{cut} of {}", log.len());
            seen.push(told == after);
        }
        assert!(seen.is_sorted() && !seen[0] && seen[log.len()]);
    }
}

#[test]
fn an_amendment_that_fails_changes_nothing() {
    let scratch = Scratch::new();
    let named = image(&scratch, "backing_file=old.raw,backing_fmt=raw");
    let long = backing(&long_name(), Some("raw"));
    for (fresh, options) in [(named, long), (with_old_snapshot(&scratch), upgrade())] {
        let kinds = [OpKind::Read, OpKind::Write, OpKind::Flush];
        for (kind, fault) in kinds.into_iter().flat_map(|kind| {
            [Fault::Io, Fault::NoSpace, Fault::Torn(512)].map(|fault| (kind, fault))
        }) {
            let (mut failed, mut in_a_row) = (0, 0);
            // One that finds no space somewhere may find it elsewhere.
            for nth in 0.. {
                let disk = fresh.fork();
                let ok = block_on(async {
                    let image = open(&disk).await.unwrap();
                    let before = image.info();
                    disk.fail_once(kind, nth, fault);
                    let result = image.amend(options.clone()).await;
                    disk.clear_faults();
                    let told = image.info();
                    assert_eq!(told == before, result.is_err(), "{kind:?} {nth}");
                    let again = open(&disk).await.unwrap();
                    assert_eq!(again.info(), told, "{kind:?} {nth}");
                    result.is_ok()
                });
                in_a_row = if ok { in_a_row + 1 } else { 0 };
                failed += u64::from(!ok);
                if in_a_row == 3 {
                    break;
                }
            }
            assert!(failed >= 1, "{kind:?}");
        }
    }
}
