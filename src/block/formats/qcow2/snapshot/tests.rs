//! Snapshots of quiet images: against qemu-img, and with a fault at every request.

use std::sync::Arc;

use super::delete::Discard;
use super::table::SnapshotTable;
use super::*;
use crate::driver::{NewSnapshot, SnapshotSelector};
use crate::error::ErrorKind;
use crate::formats::qcow2::check::{CheckReport, check, read_header};
use crate::formats::qcow2::owners::Owners;
use crate::formats::qcow2::testing::{Scratch, assert_qemu_clean, block_on, qemu_img, qemu_io};
use crate::limits;
use crate::protocols::memory::{Fault, Memory, OpKind};

/// What an open image has of what snapshots need.
struct Open {
    disk: Arc<Memory>,
    file: Child,
    header: Arc<HeaderCell>,
    allocator: Allocator,
    l1: L1Table,
    l2: L2Cache,
    table: SnapshotTable,
}

impl Open {
    fn new(disk: &Arc<Memory>) -> Self {
        let file = disk.child();
        let header = block_on(read_header(&file)).unwrap();
        let g = header.geometry();
        let words = |offset: HostOffset, bytes: u64| {
            let data = block_on(file.read(offset.0, bytes)).unwrap().to_bytes();
            let words = data.as_chunks().0.iter();
            words
                .map(|word| u64::from_be_bytes(*word))
                .collect::<Vec<_>>()
        };
        let reftable = words(
            header.refcount_table_offset,
            u64::from(header.refcount_table_clusters) << g.cluster_bits(),
        );
        let l1 = L1Table::new(
            header.l1_table_offset,
            words(header.l1_table_offset, u64::from(header.l1_size) * 8),
        );
        let table = SnapshotTable::read(&file, header.snapshots_offset.0, header.nb_snapshots);
        let table = block_on(table).unwrap();
        let header = Arc::new(HeaderCell::new(file.clone(), header));
        let owners = Arc::new(Owners::default());
        let cache = limits::QCOW2_REFCOUNT_CACHE_BYTES;
        Open {
            disk: disk.clone(),
            allocator: Allocator::new(g, file.clone(), header.clone(), owners, reftable, cache),
            l2: L2Cache::new(g, file.clone(), 1 << 20, Default::default()),
            file,
            header,
            l1,
            table,
        }
    }

    fn quiet(&mut self) -> (Quiet<'_>, &SnapshotTable) {
        let quiet = Quiet {
            file: &self.file,
            header: &self.header,
            allocator: &mut self.allocator,
            l1: &self.l1,
            l2: &self.l2,
        };
        (quiet, &self.table)
    }

    fn create(&mut self, name: &str) -> Result<()> {
        let new = NewSnapshot {
            name: name.to_owned(),
            date_sec: 1_700_000_000,
            date_nsec: 0,
            vm_clock_nsec: 0,
        };
        let (mut quiet, table) = self.quiet();
        self.table = block_on(create::create(&mut quiet, table, &new))?;
        Ok(())
    }

    fn delete(&mut self, name: &str) -> Result<()> {
        let which = SnapshotSelector {
            id: None,
            name: Some(name.to_owned()),
        };
        let (mut quiet, table) = self.quiet();
        let index = table.find(&which).unwrap();
        self.table = block_on(delete::delete(&mut quiet, table, index, Discard::Yes))?;
        Ok(())
    }

    /// What a flush of the driver writes besides.
    fn flush(&mut self) {
        block_on(self.allocator.reclaim()).unwrap();
        block_on(self.allocator.write_back()).unwrap();
        for (_, at, bytes) in self.l1.take_dirty() {
            let flags = WriteFlags::default();
            block_on(self.file.write(at.0, bytes.into(), flags)).unwrap();
        }
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
        let mut image = Open::new(&disk);
        image.create("ours").unwrap();
        image.assert_clean();
        image.flush();
        image.assert_clean();
        assert_qemu_clean(&scratch.save("created.qcow2", &disk));
        let path = scratch.path("created.qcow2");
        let list = qemu_img(&["snapshot", "-l", path.to_str().unwrap()]);
        assert!(list.contains("theirs") && list.contains("ours"), "{list}");
        // A write by QEMU must not reach any snapshot.
        qemu_io(path.to_str().unwrap(), &["write -P 9 0 1M"]);
        let written = scratch.load("created.qcow2");
        assert_eq!(
            content(&scratch, &written, Some("ours")),
            before,
            "{options}"
        );
        assert_eq!(content(&scratch, &written, Some("theirs")), theirs);

        let mut image = Open::new(&written);
        image.delete("ours").unwrap();
        image.assert_clean();
        image.flush();
        image.assert_clean();
        assert_qemu_clean(&scratch.save("deleted.qcow2", &written));
        assert_eq!(content(&scratch, &written, Some("theirs")), theirs);
        image.delete("theirs").unwrap();
        image.flush();
        image.assert_clean();
        assert_qemu_clean(&scratch.save("deleted.qcow2", &written));
        assert_eq!(image.table.entries().len(), 0);
    }
}

#[test]
fn a_snapshot_that_cannot_be_counted_is_refused_before_anything_changes() {
    let scratch = Scratch::new();
    let disk = sample(&scratch, "cluster_size=32k,refcount_bits=2");
    let mut image = Open::new(&disk);
    image.create("two").unwrap();
    image.flush();
    let before = disk.content();
    let table = image.table.clone();
    let error = image.create("three").unwrap_err();
    assert_eq!(
        (error.kind(), error.message()),
        (
            ErrorKind::OutOfRange,
            "Refcounts of 2 bits cannot count another snapshot"
        )
    );
    assert_eq!(image.table, table);
    image.assert_clean();
    image.flush();
    let unchanged = disk.content();
    assert!(
        unchanged.starts_with(&before),
        "only free clusters may differ"
    );
}

#[test]
fn wrong_names_are_refused() {
    let scratch = Scratch::new();
    let disk = sample(&scratch, "cluster_size=4k");
    let before = disk.content();
    let mut image = Open::new(&disk);
    for (name, kind) in [
        ("", ErrorKind::InvalidInput),
        ("theirs", ErrorKind::AlreadyExists),
    ] {
        assert_eq!(image.create(name).unwrap_err().kind(), kind, "{name}");
    }
    assert_eq!(disk.content(), before);
}

/// Runs `operation` with a fault at every request of every kind. After the error nothing may have changed, and the
/// operation must succeed when it is tried again.
fn with_every_fault(
    options: &str,
    prepare: impl Fn(&mut Open),
    operation: impl Fn(&mut Open) -> Result<()>,
) {
    let scratch = Scratch::new();
    let sample = sample(&scratch, options);
    {
        let mut image = Open::new(&sample);
        prepare(&mut image);
        image.flush();
    }
    let active = content(&scratch, &sample, None);
    let theirs = content(&scratch, &sample, Some("theirs"));
    let mut failed = 0;
    for fault in [Fault::NoSpace, Fault::Io, Fault::Torn(700)] {
        for kind in [OpKind::Read, OpKind::Write, OpKind::Flush] {
            for skip in 0.. {
                let disk = sample.fork();
                let mut image = Open::new(&disk);
                let old = image.table.clone();
                let requests = disk.count(kind);
                disk.fail_once(kind, skip, fault);
                let result = operation(&mut image);
                disk.clear_faults();
                if disk.count(kind) - requests <= skip {
                    // The fault came too late to be met.
                    result.unwrap();
                    break;
                }
                if result.is_ok() {
                    // Behind the switch a fault may leak, and nothing else.
                    assert_ne!(image.table, old);
                    assert_nothing_lost(&disk);
                } else {
                    failed += 1;
                    assert_eq!(image.table, old);
                    let report = image.assert_clean();
                    assert_eq!(report.leaks, 0, "{fault:?} at {kind:?} {skip}");
                    operation(&mut image).unwrap();
                    image.flush();
                    image.assert_clean();
                }
                if skip % 7 == 0 {
                    assert_eq!(content(&scratch, &disk, None), active);
                    if image.table.find(&named("theirs")).is_some() {
                        assert_eq!(content(&scratch, &disk, Some("theirs")), theirs);
                    }
                }
                assert!(skip < 500);
            }
        }
    }
    assert!(failed > 20, "only {failed} faults hit before the switch");
}

/// Asserts that clusters are counted too often at most, which costs space but no data.
#[track_caller]
fn assert_nothing_lost(disk: &Arc<Memory>) {
    let report = block_on(check(&disk.child())).unwrap();
    let lost = report
        .findings
        .iter()
        .any(|finding| finding.starts_with("ERROR cluster"));
    assert!(!lost, "counted too little: {:#?}", report.findings);
    assert_eq!((report.overlaps, report.check_errors), (0, 0));
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
fn a_fault_anywhere_in_a_deletion_changes_nothing_or_leaks() {
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
fn a_deletion_on_a_full_disk_finds_a_free_cluster_that_is_no_hole() {
    let scratch = Scratch::new();
    let sample = sample(&scratch, "cluster_size=4k");
    let theirs = content(&scratch, &sample, Some("theirs"));
    let mut image = Open::new(&sample);
    image.create("ours").unwrap();
    for holes in 1..4 {
        let disk = sample.fork();
        let mut image = Open::new(&disk);
        for write in 0..holes {
            disk.fail_once(OpKind::Write, write, Fault::NoSpace);
        }
        image.delete("ours").unwrap();
        image.flush();
        assert_eq!(image.assert_clean().leaks, 0);
        assert_eq!(content(&scratch, &disk, Some("theirs")), theirs);
    }
}

#[test]
fn a_disk_that_fails_for_good_loses_space_at_most() {
    let scratch = Scratch::new();
    let sample = sample(&scratch, "cluster_size=4k");
    let active = content(&scratch, &sample, None);
    let theirs = content(&scratch, &sample, Some("theirs"));
    for fault in [Fault::NoSpace, Fault::Io] {
        for skip in 0.. {
            let disk = sample.fork();
            let mut image = Open::new(&disk);
            disk.fail_from(OpKind::Write, skip, fault);
            let result = image.create("ours");
            disk.clear_faults();
            assert_nothing_lost(&disk);
            // QEMU must be able to write without reaching the snapshot.
            let path = scratch.save("failed.qcow2", &disk);
            qemu_io(path.to_str().unwrap(), &["write -P 9 0 128k"]);
            let written = scratch.load("failed.qcow2");
            assert_eq!(content(&scratch, &written, Some("theirs")), theirs);
            if result.is_ok() {
                assert_eq!(content(&scratch, &written, Some("ours")), active);
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
    let mut image = Open::new(&after);
    after.start_log();
    image.create("ours").unwrap();
    let created = after.log().len();
    image.delete("theirs").unwrap();
    image.flush();
    let log = after.log();
    let mut seen = std::collections::BTreeSet::new();
    for killed_at in 0..=log.len() {
        let disk = before.fork();
        for record in &log[..killed_at] {
            disk.apply(&record.change).unwrap();
        }
        let image = Open::new(&disk);
        let has = |name: &str| image.table.find(&named(name)).is_some();
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
