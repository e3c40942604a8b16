//! Snapshots of an image that nobody writes to: against qemu-img, and with a fault at every request.

mod ahead;
mod close;
mod flags;
mod let_go;

use std::sync::Arc;

use super::table::SnapshotTable;
use crate::crashlab::content::stamp;
use crate::driver::{Driver, NewSnapshot, Requests, SnapshotSelector, Snapshots, WriteFlags};
use crate::error::{ErrorKind, Result};
use crate::formats::qcow2::check::{CheckReport, check, read_header};
use crate::formats::qcow2::header::Incompatible;
use crate::formats::qcow2::testing::{Scratch, assert_qemu_clean, block_on, qemu_img, qemu_io};
use crate::formats::qcow2::{OpenOptions, Qcow2};
use crate::protocols::memory::{Fault, Memory, OpKind};

async fn open(disk: &Arc<Memory>) -> Arc<Qcow2> {
    let opening = Qcow2::open(disk.child(), OpenOptions::default()).await;
    opening.unwrap().finish(None).await.unwrap()
}

async fn write(image: &Qcow2, at: u64, len: u64, number: u32) {
    let data = stamp(at, len, number).into();
    image.write(at, data, WriteFlags::default()).await.unwrap();
}

async fn holds(disk: &Qcow2, at: u64, len: u64, number: u32) -> bool {
    let data = disk.read(at, len).await.unwrap();
    data.to_bytes() == stamp(at, len, number)
}

/// An open image, with a scheduler of its own: what goes on behind it goes on while something is asked of it.
struct Open {
    disk: Arc<Memory>,
    image: Arc<Qcow2>,
    runtime: tokio::runtime::Runtime,
}

impl Open {
    fn new(disk: &Arc<Memory>) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let image = runtime.block_on(open(disk));
        Open {
            disk: disk.clone(),
            image,
            runtime,
        }
    }

    fn create(&self, name: &str) -> Result<()> {
        let new = NewSnapshot {
            name: name.to_owned(),
            date_sec: 1_700_000_000,
            date_nsec: 0,
            vm_clock_nsec: 0,
        };
        self.runtime.block_on(self.image.create(new)).map(|_| ())
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.runtime
            .block_on(self.image.delete(named(name)))
            .map(|_| ())
    }

    fn revert(&self, name: &str) -> Result<()> {
        self.runtime
            .block_on(self.image.revert(named(name)))
            .map(|_| ())
    }

    fn names(&self) -> Vec<String> {
        self.image
            .list()
            .into_iter()
            .map(|info| info.name)
            .collect()
    }

    /// Everything that is left to be done behind the operations.
    fn try_settle(&self) -> Result<()> {
        let image = &self.image.image;
        self.runtime.block_on(image.settle_now())
    }

    fn settle(&self) {
        self.try_settle().unwrap();
        let info = self.image.info();
        assert_eq!((info.unsettled_tables, info.dirty), (0, false));
    }

    fn close(self) {
        self.runtime.block_on(self.image.close()).unwrap();
    }

    #[track_caller]
    fn assert_clean(&self) -> CheckReport {
        let report = block_on(check(&self.disk.child())).unwrap();
        assert!(report.is_clean(), "{:#?}", report.findings);
        report
    }
}

/// An image of qemu-img's with data, zeroes, a compressed cluster and a snapshot.
fn sample(scratch: &Scratch, options: &str) -> Arc<Memory> {
    let path = scratch.path("sample.qcow2");
    let path = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path, "4M"]);
    qemu_io(path, &["write -P 1 0 1M", "write -P 3 3M 64k"]);
    qemu_img(&["snapshot", "-c", "theirs", path]);
    qemu_io(path, &["write -P 4 64k 256k", "discard 512k 128k"]);
    if !options.contains("bits=2") {
        qemu_io(path, &["write -c -P 2 2M 128k"]);
    }
    scratch.load("sample.qcow2")
}

/// The bytes of the active layer, or of a snapshot, as qemu-img reads them.
fn content(scratch: &Scratch, disk: &Memory, snapshot: Option<&str>) -> Vec<u8> {
    let image = scratch.save("content.qcow2", disk);
    let raw = scratch.path("content.raw");
    let (image, raw) = (image.to_str().unwrap(), raw.to_str().unwrap());
    let selector = snapshot.map(|name| format!("snapshot.name={name}"));
    let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
    if let Some(selector) = &selector {
        args.extend(["-l", selector]);
    }
    args.extend([image, raw]);
    qemu_img(&args);
    std::fs::read(raw).unwrap()
}

const OPTIONS: [&str; 6] = [
    "cluster_size=4k",
    "cluster_size=512,refcount_bits=32",
    "cluster_size=64k,compat=0.10",
    "cluster_size=4k,refcount_bits=64",
    "cluster_size=1k,refcount_bits=16",
    "cluster_size=32k,refcount_bits=2",
];

#[test]
fn qemu_reads_our_snapshots_and_finds_the_image_sound() {
    let scratch = Scratch::new();
    for options in OPTIONS {
        let disk = sample(&scratch, options);
        let before = content(&scratch, &disk, None);
        let theirs = content(&scratch, &disk, Some("theirs"));
        let image = Open::new(&disk);
        image.create("ours").unwrap();
        image.settle();
        image.assert_clean();
        image.close();
        let path = scratch.save("created.qcow2", &disk);
        assert_qemu_clean(&path);
        let path = path.to_str().unwrap();
        let list = qemu_img(&["snapshot", "-l", path]);
        assert!(list.contains("theirs") && list.contains("ours"), "{list}");
        // A write by QEMU must not reach any snapshot.
        qemu_io(path, &["write -P 9 0 1M"]);
        let written = scratch.load("created.qcow2");
        assert_eq!(
            content(&scratch, &written, Some("ours")),
            before,
            "{options}"
        );
        assert_eq!(content(&scratch, &written, Some("theirs")), theirs);

        let image = Open::new(&written);
        // Two bits cannot count new references beside the old ones, but no cluster has more of them than before.
        image.revert("theirs").unwrap();
        image.delete("ours").unwrap();
        image.close();
        assert_qemu_clean(&scratch.save("deleted.qcow2", &written));
        assert_eq!(content(&scratch, &written, Some("theirs")), theirs);
        assert_eq!(content(&scratch, &written, None), theirs, "{options}");
        let image = Open::new(&written);
        image.delete("theirs").unwrap();
        assert_eq!(image.names().len(), 0);
        image.settle();
        image.assert_clean();
        image.close();
        assert_qemu_clean(&scratch.save("deleted.qcow2", &written));
        assert_eq!(content(&scratch, &written, None), theirs);
    }
}

#[test]
fn a_snapshot_that_cannot_be_counted_is_refused_before_anything_changes() {
    let scratch = Scratch::new();
    let disk = sample(&scratch, "cluster_size=32k,refcount_bits=2");
    let image = Open::new(&disk);
    image.create("two").unwrap();
    image.settle();
    let before = ["theirs", "two"].map(|name| content(&scratch, &disk, Some(name)));
    for _ in 0..2 {
        let error = image.create("three").unwrap_err();
        assert_eq!(
            (error.kind(), error.message()),
            (
                ErrorKind::OutOfRange,
                "Refcounts of 2 bits cannot count another snapshot"
            )
        );
        assert_eq!(image.names(), ["theirs", "two"]);
        image.settle();
        image.assert_clean();
    }
    image.close();
    let after = ["theirs", "two"].map(|name| content(&scratch, &disk, Some(name)));
    assert!(after == before);
    assert_eq!(content(&scratch, &disk, None), before[1]);
}

#[test]
fn narrow_refcounts_are_passed_on_from_change_to_change() {
    let scratch = Scratch::new();
    let disk = sample(&scratch, "cluster_size=32k,refcount_bits=2");
    let theirs = content(&scratch, &disk, Some("theirs"));
    let active = content(&scratch, &disk, None);
    let image = Open::new(&disk);
    image.image.image.hold_settler(true);
    image.create("ours").unwrap();
    for name in ["theirs", "ours", "theirs"] {
        image.revert(name).unwrap();
        assert!(image.image.info().unsettled_tables > 0);
    }
    image.delete("ours").unwrap();
    image.revert("theirs").unwrap();
    image.settle();
    assert_eq!(image.assert_clean().leaks, 0);
    image.create("again").unwrap();
    image.close();
    assert_qemu_clean(&scratch.save("narrow.qcow2", &disk));
    for snapshot in [None, Some("theirs"), Some("again")] {
        assert!(content(&scratch, &disk, snapshot) == theirs);
    }
    assert!(active != theirs);
}

#[test]
fn wrong_names_are_refused() {
    let scratch = Scratch::new();
    let disk = sample(&scratch, "cluster_size=4k");
    let before = content(&scratch, &disk, None);
    let image = Open::new(&disk);
    for (name, kind) in [
        ("", ErrorKind::InvalidInput),
        ("theirs", ErrorKind::AlreadyExists),
    ] {
        assert_eq!(image.create(name).unwrap_err().kind(), kind, "{name}");
    }
    image.settle();
    assert_eq!(image.assert_clean().leaks, 0);
    assert_eq!(content(&scratch, &disk, None), before);
}

/// Runs `operation` with a fault at every request of every kind, also behind its answer. After an error nothing may have changed,
/// and the operation must succeed when it is tried again; nothing is leaked for good wherever the fault was.
fn with_every_fault(
    options: &str,
    prepare: impl Fn(&Open),
    operation: impl Fn(&Open) -> Result<()>,
) {
    let scratch = Scratch::new();
    let sample = sample(&scratch, options);
    {
        let image = Open::new(&sample);
        prepare(&image);
        image.close();
    }
    let theirs = content(&scratch, &sample, Some("theirs"));
    let active = content(&scratch, &sample, None);
    let done = {
        let disk = sample.fork();
        let image = Open::new(&disk);
        operation(&image).unwrap();
        let names = image.names();
        image.close();
        (names, content(&scratch, &disk, None))
    };
    let mut failed = 0;
    for fault in [Fault::NoSpace, Fault::Io, Fault::Torn(700)] {
        for kind in [OpKind::Read, OpKind::Write, OpKind::Flush] {
            for skip in 0.. {
                let disk = sample.fork();
                let image = Open::new(&disk);
                let old = image.names();
                let requests = disk.count(kind);
                disk.fail_once(kind, skip, fault);
                let result = operation(&image);
                let settled = image.try_settle();
                disk.clear_faults();
                let place = format!("{fault:?} at {kind:?} {skip}");
                let late = disk.count(kind) - requests <= skip;
                if let Err(error) = &result {
                    failed += 1;
                    assert_eq!(image.names(), old, "{place}: {error}");
                    image.settle();
                    assert_eq!(image.assert_clean().leaks, 0, "{place}");
                    if skip % 7 == 0 {
                        assert_eq!(content(&scratch, &disk, None), active, "{place}");
                    }
                    operation(&image).unwrap();
                }
                image.settle();
                image.assert_clean();
                assert_eq!(image.names(), done.0, "{place}");
                image.close();
                if skip % 7 == 0 {
                    assert_eq!(content(&scratch, &disk, None), done.1, "{place}");
                    if done.0.iter().any(|name| name == "theirs") {
                        assert_eq!(content(&scratch, &disk, Some("theirs")), theirs);
                    }
                }
                if late {
                    result.unwrap();
                    settled.unwrap();
                    break;
                }
                assert!(skip < 500);
            }
        }
    }
    assert!(failed > 12, "only {failed} faults hit before the switch");
}

fn named(name: &str) -> SnapshotSelector {
    SnapshotSelector {
        id: None,
        name: Some(name.to_owned()),
    }
}

#[test]
fn a_fault_anywhere_in_a_creation_changes_nothing() {
    with_every_fault("cluster_size=4k", |_| {}, |image| image.create("ours"));
    with_every_fault(
        "cluster_size=512,refcount_bits=32",
        |_| {},
        |image| image.create("ours"),
    );
}

#[test]
fn a_fault_anywhere_in_a_deletion_changes_nothing() {
    with_every_fault(
        "cluster_size=4k",
        |image| image.create("ours").unwrap(),
        |image| image.delete("theirs"),
    );
    with_every_fault(
        "cluster_size=512,refcount_bits=32",
        |image| image.create("ours").unwrap(),
        |image| image.delete("ours"),
    );
}

#[test]
fn a_fault_anywhere_in_a_revert_changes_nothing() {
    with_every_fault("cluster_size=4k", |_| {}, |image| image.revert("theirs"));
    for options in [
        "cluster_size=4k,compat=0.10",
        "cluster_size=32k,refcount_bits=2",
    ] {
        with_every_fault(
            options,
            |image| image.create("ours").unwrap(),
            |image| image.revert("theirs"),
        );
    }
}

#[test]
fn a_deletion_on_a_full_disk_finds_a_free_cluster_that_is_no_hole() {
    let scratch = Scratch::new();
    let sample = sample(&scratch, "cluster_size=4k");
    let theirs = content(&scratch, &sample, Some("theirs"));
    let image = Open::new(&sample);
    image.create("ours").unwrap();
    image.close();
    for holes in 1..4 {
        let disk = sample.fork();
        let image = Open::new(&disk);
        image.settle();
        for write in 0..holes {
            disk.fail_once(OpKind::Write, write, Fault::NoSpace);
        }
        image.delete("ours").unwrap();
        image.settle();
        assert_eq!(image.assert_clean().leaks, 0);
        assert_eq!(content(&scratch, &disk, Some("theirs")), theirs);
    }
}

/// Asserts that no cluster is counted too little, unless the image says that its refcounts must be rebuilt.
#[track_caller]
fn assert_nothing_lost(disk: &Arc<Memory>) {
    let header = block_on(read_header(&disk.child())).unwrap();
    let report = block_on(check(&disk.child())).unwrap();
    let dirty = header.incompatible.has(Incompatible::DIRTY);
    let lost = |finding: &String| finding.starts_with("ERROR cluster");
    assert!(
        dirty || !report.findings.iter().any(lost),
        "counted too little: {:#?}",
        report.findings
    );
    assert_eq!(report.check_errors, 0);
}

#[test]
fn a_disk_that_fails_for_good_loses_nothing() {
    let scratch = Scratch::new();
    let sample = sample(&scratch, "cluster_size=4k");
    let active = content(&scratch, &sample, None);
    let theirs = content(&scratch, &sample, Some("theirs"));
    for fault in [Fault::NoSpace, Fault::Io] {
        for skip in 0.. {
            let disk = sample.fork();
            let image = Open::new(&disk);
            disk.fail_from(OpKind::Write, skip, fault);
            let result = image.create("ours").and_then(|()| image.try_settle());
            let created = image.names().iter().any(|name| name == "ours");
            drop(image);
            disk.clear_faults();
            assert_nothing_lost(&disk);
            // QEMU must be able to write without reaching the snapshot.
            let path = scratch.save("failed.qcow2", &disk);
            qemu_io(path.to_str().unwrap(), &["write -P 9 0 128k"]);
            let written = scratch.load("failed.qcow2");
            assert_eq!(content(&scratch, &written, Some("theirs")), theirs);
            if created {
                assert_eq!(content(&scratch, &written, Some("ours")), active);
            }
            if result.is_ok() {
                break;
            }
        }
    }
}

#[test]
fn a_kill_at_any_write_leaves_the_old_or_the_new_table_and_true_snapshots() {
    let scratch = Scratch::new();
    let before = sample(&scratch, "cluster_size=4k");
    let active = content(&scratch, &before, None);
    let theirs = content(&scratch, &before, Some("theirs"));
    let after = before.fork();
    let image = Open::new(&after);
    after.start_log();
    image.create("ours").unwrap();
    let created = after.log().len();
    image.delete("theirs").unwrap();
    image.settle();
    let log = after.log();
    let mut seen = std::collections::BTreeSet::new();
    for killed_at in 0..=log.len() {
        let disk = before.fork();
        for record in &log[..killed_at] {
            disk.apply(&record.change).unwrap();
        }
        let file = disk.child();
        let header = block_on(read_header(&file)).unwrap();
        let offset = header.snapshots_offset.0;
        let table = SnapshotTable::read(&file, offset, header.nb_snapshots);
        let table = block_on(table).unwrap();
        let has = |name: &str| table.find(&named(name)).is_some();
        seen.insert((has("theirs"), has("ours")));
        assert!(
            killed_at < created || has("ours"),
            "an answered snapshot is gone"
        );
        assert_nothing_lost(&disk);
        assert_eq!(content(&scratch, &disk, None), active);
        // The step that finds images that only look sound: writes must not reach a snapshot.
        let path = scratch.save("killed.qcow2", &disk);
        let io = [
            "write -P 9 0 512k",
            "write -P 8 3M 64k",
            "write -P 7 1M 256k",
        ];
        qemu_io(path.to_str().unwrap(), &io);
        let written = scratch.load("killed.qcow2");
        if has("theirs") {
            assert_eq!(content(&scratch, &written, Some("theirs")), theirs);
        }
        if has("ours") {
            assert_eq!(content(&scratch, &written, Some("ours")), active);
        }
    }
    let wanted = [(true, false), (true, true), (false, true)];
    assert_eq!(seen, wanted.into());
}
