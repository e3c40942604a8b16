//! Repairs against qemu-img's, at every crash and fault, and of what they must leave alone.

use std::path::Path;
use std::sync::Arc;

use super::super::tests::{OPTIONS, overwrite, sample, u64_at};
use super::super::{CheckOptions, Repair, check, read_header, repair};
use super::*;
use crate::driver::{Driver, Requests};
use crate::formats::qcow2::counters::CounterWidth;
use crate::formats::qcow2::testing::{
    Scratch, assert_qemu_clean, block_on, qemu_check, qemu_img, run,
};
use crate::formats::qcow2::{OpenOptions, Qcow2};
use crate::protocols::memory::{Change, Fault, Memory, OpKind};

/// Whether nothing has been written since the log was begun.
fn is_unchanged(disk: &Memory) -> bool {
    let is_flush = |change: &Change| matches!(change, Change::Flush);
    disk.log().iter().all(|record| is_flush(&record.change))
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

fn repaired(disk: &Arc<Memory>, what: Repair) -> Result<RepairReport> {
    block_on(repair(&disk.child(), what, &CheckOptions::default()))
}

/// The active layer and both snapshots of a sample, as qemu-img reads them.
fn contents(scratch: &Scratch, path: &Path) -> Vec<Vec<u8>> {
    let raw = scratch.path("content.raw");
    let (path, target) = (path.to_str().unwrap(), raw.to_str().unwrap());
    let layers = [
        &["-U"][..],
        &["-U", "-l", "snapshot.name=first"],
        &["-U", "-l", "snapshot.name=second"],
    ];
    let read = |layer: &[&str]| {
        let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
        args.extend(layer);
        args.extend([path, target]);
        qemu_img(&args);
        std::fs::read(&raw).unwrap()
    };
    layers.iter().map(|layer| read(layer)).collect()
}

/// Offsets of refcount blocks, and of the entries of the active L1 table and its L2 tables that point to something.
fn places(disk: &Memory) -> (Vec<u64>, Vec<u64>) {
    let header = block_on(read_header(&Child::new(disk.fork()))).unwrap();
    let cluster_size = header.geometry().cluster_size();
    let l1 = header.l1_table_offset.0;
    let mut entries: Vec<u64> = (0..u64::from(header.l1_size)).map(|n| l1 + 8 * n).collect();
    for entry in entries.clone() {
        let l2 = u64_at(disk, entry) & OFFSET;
        if l2 != 0 {
            entries.extend((0..cluster_size / 8).map(|n| l2 + 8 * n));
        }
    }
    entries.retain(|&at| u64_at(disk, at) & OFFSET != 0 && u64_at(disk, at) & 1 << 62 == 0);
    let reftable = header.refcount_table_offset.0;
    let blocks = (0..cluster_size / 8).map(|n| u64_at(disk, reftable + 8 * n));
    (blocks.filter(|&at| at != 0).collect(), entries)
}

fn set_dirty(disk: &Memory) {
    overwrite(disk, 79, &[1]);
}

fn is_dirty(disk: &Memory) -> bool {
    u64_at(disk, 72) & Incompatible::DIRTY != 0
}

/// Makes counts and COPIED flags wrong in ways that a killed daemon leaves and in ways that none does.
fn spoil(disk: &Memory, random: &mut fastrand::Rng) {
    let (blocks, entries) = places(disk);
    let header = block_on(read_header(&Child::new(disk.fork()))).unwrap();
    let g = header.geometry();
    for block in blocks {
        match random.u8(..4) {
            0 => overwrite(disk, block, &vec![0; g.cluster_size() as usize]),
            1 => {
                let bytes: Vec<u8> = (0..g.cluster_size()).map(|_| random.u8(..)).collect();
                overwrite(disk, block, &bytes);
            }
            2 => {
                let width = CounterWidth::new(g.refcount_order());
                let read = block_on(disk.read(block, g.cluster_size())).unwrap();
                let mut bytes = read.to_bytes().to_vec();
                for _ in 0..random.usize(..10) {
                    let index = random.usize(..g.refcounts_per_block() as usize);
                    width.set(&mut bytes, index, random.u64(..4) & width.max());
                }
                overwrite(disk, block, &bytes);
            }
            _ => {}
        }
    }
    for entry in entries {
        if random.u8(..4) == 0 {
            let flipped = u64_at(disk, entry) ^ COPIED;
            overwrite(disk, entry, &flipped.to_be_bytes());
        }
    }
}

#[test]
fn dirty_images_are_repaired_in_place_to_what_qemu_makes_of_them() {
    let scratch = Scratch::new();
    let mut random = fastrand::Rng::with_seed(11);
    for options in OPTIONS {
        let sound = sample(&scratch, options);
        for round in 0..6 {
            let disk = sound.fork();
            spoil(&disk, &mut random);
            if !options.contains("0.10") {
                set_dirty(&disk);
            }
            let theirs = scratch.save("theirs.qcow2", &disk);
            let path = theirs.to_str().unwrap();
            run("qemu-img", &["check", "-q", "-r", "all", path]);
            assert_qemu_clean(&theirs);
            let before = read_header_of(&disk);
            let size = disk.size();
            repaired(&disk, Repair::All).unwrap();
            let ours = scratch.save("ours.qcow2", &disk);
            assert_qemu_clean(&ours);
            let what = format!("{options}, round {round}");
            assert!(
                contents(&scratch, &ours) == contents(&scratch, &theirs),
                "{what}"
            );
            assert_eq!(disk.size(), size, "{what}: in place needs no space");
            let mut wanted = before;
            wanted.incompatible.0 = 0;
            assert_eq!(read_header_of(&disk), wanted, "{what}");
            // A second repair has nothing to do.
            disk.start_log();
            let second = repaired(&disk, Repair::All).unwrap();
            assert_eq!(second, RepairReport::default(), "{what}");
            assert!(is_unchanged(&disk), "{what}");
        }
    }
}

fn read_header_of(disk: &Memory) -> Header {
    block_on(read_header(&Child::new(disk.fork()))).unwrap()
}

#[test]
fn a_snapshot_that_no_refcount_knows_of_is_counted() {
    let scratch = Scratch::new();
    for options in OPTIONS {
        if options.contains("0.10") {
            continue;
        }
        let disk = sample(&scratch, options);
        let sound = contents(&scratch, &scratch.save("sound.qcow2", &disk));
        // The refcounts and flags of the time when the second snapshot was not there.
        let path = scratch.save("older.qcow2", &disk);
        qemu_img(&["snapshot", "-d", "second", path.to_str().unwrap()]);
        let older = scratch.load("older.qcow2");
        let (blocks, entries) = places(&older);
        let cluster_size = read_header_of(&disk).geometry().cluster_size();
        for block in blocks {
            let bytes = block_on(older.read(block, cluster_size)).unwrap();
            overwrite(&disk, block, &bytes.to_bytes());
        }
        for entry in entries {
            overwrite(&disk, entry, &u64_at(&older, entry).to_be_bytes());
        }
        set_dirty(&disk);
        assert!(block_on(check(&disk.child())).unwrap().is_broken());
        let report = repaired(&disk, Repair::All).unwrap();
        assert!(report.corruptions_fixed > 0, "{options}: {report:?}");
        let path = scratch.save("ours.qcow2", &disk);
        assert_qemu_clean(&path);
        assert!(contents(&scratch, &path) == sound, "{options}");
    }
}

#[test]
fn leaks_are_given_back_and_nothing_else_is_changed() {
    let scratch = Scratch::new();
    for options in OPTIONS {
        let disk = sample(&scratch, options);
        let sound = contents(&scratch, &scratch.save("sound.qcow2", &disk));
        let header = read_header_of(&disk);
        let g = header.geometry();
        let width = CounterWidth::new(g.refcount_order());
        let (blocks, entries) = places(&disk);
        // What is counted once is counted twice, and some free clusters once; flags as those counts ask for.
        let first = blocks[0];
        let read = block_on(disk.read(first, g.cluster_size())).unwrap();
        let mut counters = read.to_bytes().to_vec();
        let mut leaked = 0;
        for index in 5..g.clusters_for(disk.size()).min(g.refcounts_per_block()) as usize {
            let count = width.get(&counters, index);
            if count < 2 {
                width.set(&mut counters, index, count + 1);
                leaked += 1;
            }
        }
        overwrite(&disk, first, &counters);
        for entry in entries {
            let value = u64_at(&disk, entry);
            let cluster = (value & OFFSET) >> g.cluster_bits();
            if cluster < g.refcounts_per_block() && width.get(&counters, cluster as usize) == 2 {
                overwrite(&disk, entry, &(value & !COPIED).to_be_bytes());
            }
        }
        let before = block_on(check(&disk.child())).unwrap();
        assert_eq!(
            (before.leaks, before.corruptions),
            (leaked, 0),
            "{options}: {before:?}"
        );
        let size = disk.size();
        let report = repaired(&disk, Repair::Leaks).unwrap();
        assert_eq!(report.leaks_fixed, leaked, "{options}");
        let path = scratch.save("ours.qcow2", &disk);
        assert_qemu_clean(&path);
        assert!(contents(&scratch, &path) == sound, "{options}");
        assert_eq!((read_header_of(&disk), disk.size()), (header, size));
    }
}

#[test]
fn a_repair_of_leaks_leaves_errors_alone() {
    let scratch = Scratch::new();
    let disk = sample(&scratch, "cluster_size=4k");
    let (blocks, entries) = places(&disk);
    let free = disk.size().div_ceil(4096);
    overwrite(&disk, free * 4096, &[7; 4096]);
    let leak = 2 * free;
    let cluster = (u64_at(&disk, entries[3]) & OFFSET) / 4096;
    overwrite(&disk, blocks[0] + leak, &[0, 9]);
    overwrite(&disk, blocks[0] + 2 * cluster, &[0, 0]);
    set_dirty(&disk);
    let before = block_on(check(&disk.child())).unwrap();
    let report = repaired(&disk, Repair::Leaks).unwrap();
    assert_eq!((report.leaks_fixed, report.corruptions_fixed), (1, 0));
    let after = block_on(check(&disk.child())).unwrap();
    assert_eq!((after.leaks, after.corruptions), (0, before.corruptions));
    assert!(is_dirty(&disk), "errors are left");
    repaired(&disk, Repair::All).unwrap();
    assert!(!is_dirty(&disk));
    assert_qemu_clean(&scratch.save("ours.qcow2", &disk));
    // Damaged refcount blocks do not tell what leaks.
    let reftable = read_header_of(&disk).refcount_table_offset.0;
    overwrite(&disk, reftable, &(blocks[0] + 512).to_be_bytes());
    let error = repaired(&disk, Repair::Leaks).unwrap_err();
    assert!(
        error
            .message()
            .contains("refcount block is not cluster aligned"),
        "{error}"
    );
}

#[test]
fn leaked_clusters_become_holes_where_that_is_asked_for() {
    let scratch = Scratch::new();
    let disk = sample(&scratch, "cluster_size=4k");
    let (blocks, _) = places(&disk);
    let end = disk.size().div_ceil(4096);
    for cluster in end..end + 10 {
        overwrite(&disk, cluster * 4096, &[7; 4096]);
        overwrite(&disk, blocks[0] + 2 * cluster, &[0, 1]);
    }
    let allocated = disk.allocated();
    let options = CheckOptions {
        discard_leaks: true,
        ..CheckOptions::default()
    };
    let report = block_on(repair(&disk.child(), Repair::Leaks, &options)).unwrap();
    assert_eq!(report.leaks_fixed, 10);
    assert_eq!(disk.allocated(), allocated - 10 * 4096);
    assert_qemu_clean(&scratch.save("ours.qcow2", &disk));
}

/// Damages of refcount structures: sound contents, nothing to be kept of the counts.
fn structural_damages(disk: &Memory) -> Vec<(&'static str, u64, u64)> {
    let header = read_header_of(disk);
    let (blocks, entries) = places(disk);
    let reftable = header.refcount_table_offset.0;
    vec![
        ("no block at all", reftable, 0),
        ("block unaligned", reftable, blocks[0] + 512),
        ("reserved bits", reftable, blocks[0] | 1),
        ("block outside", reftable, 1 << 40),
        ("block beyond all files", reftable, 1 << 62 | 1 << 63),
        ("two entries for one block", reftable + 8, blocks[0]),
        (
            "block on the header",
            reftable,
            header.geometry().cluster_size() << 30,
        ),
        ("block on the L1 table", reftable, header.l1_table_offset.0),
        ("block on data", reftable, u64_at(disk, entries[2]) & OFFSET),
        (
            "block on an L2 table",
            reftable,
            u64_at(disk, entries[0]) & OFFSET,
        ),
        ("block on the table", reftable, reftable),
        ("table on data", 48, u64_at(disk, entries[2]) & OFFSET),
        ("table on the L1 table", 48, header.l1_table_offset.0),
        ("table outside", 48, 1 << 40),
    ]
}

#[test]
fn damaged_refcount_structures_are_replaced() {
    let scratch = Scratch::new();
    for options in ["cluster_size=4k", "cluster_size=512,refcount_bits=32"] {
        let sound = sample(&scratch, options);
        let content = contents(&scratch, &scratch.save("sound.qcow2", &sound));
        for (what, at, value) in structural_damages(&sound) {
            let disk = sound.fork();
            overwrite(&disk, at, &value.to_be_bytes());
            set_dirty(&disk);
            repaired(&disk, Repair::All).unwrap_or_else(|error| panic!("{what}: {error}"));
            let path = scratch.save("ours.qcow2", &disk);
            assert_qemu_clean(&path);
            assert!(contents(&scratch, &path) == content, "{options}, {what}");
        }
    }
}

#[test]
fn what_counting_does_not_cure_is_named_and_left_as_it_was() {
    let scratch = Scratch::new();
    let sound = sample(&scratch, "cluster_size=4k");
    let header = read_header_of(&sound);
    let (_, entries) = places(&sound);
    let l1 = header.l1_table_offset.0;
    let l2 = u64_at(&sound, l1) & OFFSET;
    let entry = *entries
        .iter()
        .find(|&&at| at > l2 && at < l2 + 4096)
        .unwrap();
    let index = (entry - l2) / 8;
    let snapshots = header.snapshots_offset.0;
    let in_l2 = format!("L2 table at {l2:#x}, entry {index} (");
    let cases = [
        (
            l1,
            1 << 40,
            "entry 0 (0x10000000000): the L2 table lies behind the end of the file".to_owned(),
        ),
        (
            l1,
            l2 + 512,
            format!(
                "active L1 table at {l1:#x}, entry 0 ({:#x}): the L2 table is not properly aligned",
                l2 + 512
            ),
        ),
        (
            l1,
            l2 | 1,
            format!("entry 0 ({:#x}): reserved bits are set", l2 | 1),
        ),
        (l1, l1, "overlaps other metadata".to_owned()),
        (l1, snapshots, "overlaps other metadata".to_owned()),
        (entry, 1 << 40, in_l2.clone()),
        (entry, u64_at(&sound, entry) + 512, in_l2.clone()),
        (entry, u64_at(&sound, entry) | 2, in_l2.clone()),
        (entry, 0, String::new()),
        (entry, l1, format!("L2 table at {l2:#x}: data in clusters")),
        (entry, l2, format!("L2 table at {l2:#x}: data in clusters")),
        (
            entry,
            snapshots,
            format!("L2 table at {l2:#x}: data in clusters"),
        ),
        (entry, COPIED | 1 << 62 | 0x5000, in_l2.clone()),
        (entry, 1 << 62 | 1 << 40, in_l2),
        (
            snapshots,
            512,
            "snapshot table entry 0 has an impossible L1 table at 0x200".to_owned(),
        ),
        (snapshots, l1, "L1 table of a snapshot at".to_owned()),
        (
            snapshots + 32,
            u64::MAX,
            "Too much extra metadata in snapshot table entry 0".to_owned(),
        ),
        (
            64,
            1 << 40,
            "Snapshot table at 0x10000000000 runs past the end of the file".to_owned(),
        ),
    ];
    for (at, value, text) in cases {
        let disk = sound.fork();
        overwrite(&disk, at, &value.to_be_bytes());
        set_dirty(&disk);
        disk.start_log();
        match repaired(&disk, Repair::All) {
            Ok(_) => assert_eq!(value, 0, "{at:#x} {value:#x}: {text}"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                assert!(
                    error.message().contains(&text),
                    "{value:#x} at {at:#x}: {error}"
                );
                assert!(is_unchanged(&disk), "{text}");
                let error = repaired(&disk, Repair::Leaks).unwrap_err();
                assert!(error.message().contains(&text), "{error}");
                assert!(is_unchanged(&disk) && !text.is_empty(), "{text}");
            }
        }
    }
}

#[test]
fn a_dirty_image_beyond_repair_is_opened_for_reading_only() {
    let scratch = Scratch::new();
    let disk = sample(&scratch, "cluster_size=4k");
    let l1 = read_header_of(&disk).l1_table_offset.0;
    let l2 = u64_at(&disk, l1) & OFFSET;
    overwrite(&disk, l2, &(u64_at(&disk, l2) | 2).to_be_bytes());
    set_dirty(&disk);
    let before = disk.content();
    let open = |read_only| {
        let options = OpenOptions {
            read_only,
            ..OpenOptions::default()
        };
        block_on(async { Qcow2::open(disk.child(), options).await?.finish(None).await })
    };
    let error = open(false).unwrap_err();
    let wanted = format!("L2 table at {l2:#x}, entry 0 (");
    assert!(error.message().contains(&wanted), "{error}");
    let image = open(true).unwrap();
    assert!(block_on(image.read(0, 1)).is_err());
    let last = block_on(image.read(3 << 20, 1)).unwrap();
    assert_eq!(&last.to_bytes()[..], [3]);
    assert!(image.info().dirty);
    block_on(image.close()).unwrap();
    assert!(disk.content() == before);
}

#[test]
fn counts_beyond_the_refcount_width_are_named() {
    let scratch = Scratch::new();
    let path = scratch.path("narrow.qcow2");
    let path = path.to_str().unwrap();
    let options = "cluster_size=4k,refcount_bits=1";
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path, "4M"]);
    crate::formats::qcow2::testing::qemu_io(path, &["write -P 1 0 64k"]);
    let disk = scratch.load("narrow.qcow2");
    let (_, entries) = places(&disk);
    let first = u64_at(&disk, entries[1]);
    overwrite(&disk, entries[2], &first.to_be_bytes());
    set_dirty(&disk);
    disk.start_log();
    let error = repaired(&disk, Repair::All).unwrap_err();
    let wanted = format!(
        "more references than 1 bits count, first in cluster {}",
        (first & OFFSET) / 4096
    );
    assert!(error.message().contains(&wanted), "{error}");
    assert!(is_unchanged(&disk));
}

#[test]
fn snapshots_get_the_extra_data_that_version_3_requires() {
    let scratch = Scratch::new();
    let path = scratch.path("two.qcow2");
    let name = path.to_str().unwrap();
    let options = "cluster_size=4k,compat=0.10";
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, "1M"]);
    crate::formats::qcow2::testing::qemu_io(name, &["write -P 1 0 64k"]);
    qemu_img(&["snapshot", "-c", "first", name]);
    qemu_img(&["snapshot", "-c", "second", name]);
    let disk = scratch.load("two.qcow2");
    // Version 2 entries without extra data: ids, names and padding follow the fixed part.
    let header = read_header_of(&disk);
    let mut table = Vec::new();
    let old = block_on(disk.read(header.snapshots_offset.0, 4096))
        .unwrap()
        .to_bytes();
    let mut at = 0;
    for _ in 0..2 {
        let len = |at: usize| usize::from(u16::from_be_bytes([old[at], old[at + 1]]));
        let extra = len(at + 38);
        let names = len(at + 12) + len(at + 14);
        table.extend_from_slice(&old[at..at + 36]);
        table.extend([0; 4]);
        table.extend_from_slice(&old[at + 40 + extra..][..names]);
        table.resize(table.len().next_multiple_of(8), 0);
        at = (at + 40 + extra + names).next_multiple_of(8);
    }
    overwrite(&disk, header.snapshots_offset.0, &table);
    // Version 3 in the header, as a careless upgrade leaves it.
    overwrite(&disk, 4, &3_u32.to_be_bytes());
    let mut fields = vec![0; 40];
    fields[27] = 4;
    fields[31] = 104;
    overwrite(&disk, 72, &fields);
    let before = block_on(check(&disk.child())).unwrap();
    assert_eq!(before.corruptions, 2, "{before:?}");
    let content = contents(&scratch, &scratch.save("before.qcow2", &disk));
    for step in 0..20 {
        // Cut off behind every write.
        let cut = disk.fork();
        cut.fail_from(OpKind::Write, step, Fault::Io);
        if repaired(&cut, Repair::All).is_ok() {
            assert!(step > 2, "few writes: {step}");
            break;
        }
        cut.clear_faults();
        repaired(&cut, Repair::All).unwrap();
        let path = scratch.save("cut.qcow2", &cut);
        assert_qemu_clean(&path);
        assert!(contents(&scratch, &path) == content);
    }
    let report = repaired(&disk, Repair::All).unwrap();
    assert!(report.corruptions_fixed >= 2, "{report:?}");
    let path = scratch.save("ours.qcow2", &disk);
    assert_qemu_clean(&path);
    assert!(contents(&scratch, &path) == content);
}

/// The states that a crash in the middle of the repair of `disk` may leave: everything up to a write, which may have happened in
/// part, with any of the writes since the last flush lost.
fn crash_states(disk: &Arc<Memory>, random: &mut fastrand::Rng) -> Vec<Arc<Memory>> {
    let before = disk.fork();
    let after = disk.fork();
    after.start_log();
    repaired(&after, Repair::All).unwrap();
    let log = after.log();
    let mut states = Vec::new();
    let mut flushed = 0;
    for (nth, record) in log.iter().enumerate() {
        if matches!(record.change, Change::Flush) {
            flushed = nth;
            continue;
        }
        let state = before.fork();
        for (at, record) in log[..nth].iter().enumerate() {
            if at < flushed || random.bool() {
                state.apply(&record.change).unwrap();
            }
        }
        if let Change::Write { offset, data, fua } = &record.change {
            let sectors = data.len() / 512;
            let torn = data.slice(0, 512 * random.u64(..=sectors));
            let change = Change::Write {
                offset: *offset,
                data: torn,
                fua: *fua,
            };
            state.apply(&change).unwrap();
        }
        states.push(state);
    }
    states
}

#[test]
fn a_crash_in_a_repair_leaves_an_image_that_can_be_repaired() {
    let scratch = Scratch::new();
    let seed = 5;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut tried = 0;
    for options in [
        "cluster_size=4k",
        "cluster_size=512,refcount_bits=32",
        "cluster_size=4k,compat=0.10",
    ] {
        let sound = sample(&scratch, options);
        let content = contents(&scratch, &scratch.save("sound.qcow2", &sound));
        let damages = structural_damages(&sound);
        for round in 0..6 {
            let disk = sound.fork();
            spoil(&disk, &mut random);
            let dirty = !options.contains("0.10") && random.bool();
            if dirty {
                set_dirty(&disk);
            }
            if round % 2 == 1 {
                let (_, at, value) = damages[random.usize(..damages.len())];
                overwrite(&disk, at, &value.to_be_bytes());
            }
            for state in crash_states(&disk, &mut random) {
                let what = format!("{options}, seed {seed}, round {round}, state {tried}");
                tried += 1;
                let theirs = scratch.save("theirs.qcow2", &state);
                if is_dirty(&disk) {
                    assert!(
                        is_dirty(&state) || block_on(check(&state.child())).unwrap().is_clean(),
                        "{what}"
                    );
                }
                repaired(&state, Repair::All).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert!(!is_dirty(&state), "{what}");
                let report = block_on(check(&state.child())).unwrap();
                assert!(report.is_clean(), "{what}: {report:?}");
                if random.u8(..4) > 0 {
                    continue;
                }
                let ours = scratch.save("ours.qcow2", &state);
                assert_qemu_clean(&ours);
                assert!(contents(&scratch, &ours) == content, "{what}");
                if round % 2 == 0 {
                    let path = theirs.to_str().unwrap();
                    run("qemu-img", &["check", "-q", "-r", "all", path]);
                    assert_qemu_clean(&theirs);
                    assert!(contents(&scratch, &theirs) == content, "{what}, QEMU's");
                }
            }
        }
    }
    assert!(tried > 30, "only {tried} states");
}

#[test]
fn a_fault_in_a_repair_leaves_an_image_that_can_be_repaired() {
    let scratch = Scratch::new();
    let mut random = fastrand::Rng::with_seed(6);
    let sound = sample(&scratch, "cluster_size=4k");
    let content = contents(&scratch, &scratch.save("sound.qcow2", &sound));
    let damages = structural_damages(&sound);
    for round in 0..6 {
        let spoilt = sound.fork();
        spoil(&spoilt, &mut random);
        let (what, at, value) = damages[random.usize(..damages.len())];
        if round % 2 == 1 {
            overwrite(&spoilt, at, &value.to_be_bytes());
        }
        for (kind, fault) in [
            (OpKind::Write, Fault::NoSpace),
            (OpKind::Write, Fault::Torn(512)),
            (OpKind::Flush, Fault::Io),
            (OpKind::Read, Fault::Io),
        ] {
            for skip in 0.. {
                let disk = spoilt.fork();
                disk.fail_once(kind, skip, fault);
                let result = repaired(&disk, Repair::All);
                disk.clear_faults();
                if result.is_ok() {
                    break;
                }
                // A header whose flush has failed may be either.
                if kind != OpKind::Flush {
                    assert!(
                        !is_dirty(&disk),
                        "an image that was not dirty is not left so"
                    );
                }
                repaired(&disk, Repair::All).unwrap();
                let report = block_on(check(&disk.child())).unwrap();
                assert!(report.is_clean(), "{what}, {kind:?} {skip}: {report:?}");
                if random.u8(..4) == 0 {
                    let path = scratch.save("ours.qcow2", &disk);
                    assert_qemu_clean(&path);
                    let same = contents(&scratch, &path) == content;
                    assert!(same, "{what}, {kind:?} {skip}");
                }
            }
        }
    }
}

#[test]
fn a_full_disk_does_not_keep_a_dirty_image_from_being_repaired() {
    let scratch = Scratch::new();
    let mut random = fastrand::Rng::with_seed(8);
    for options in OPTIONS {
        let disk = sample(&scratch, options);
        spoil(&disk, &mut random);
        disk.set_space_limit(Some(disk.allocated()));
        repaired(&disk, Repair::All).unwrap_or_else(|error| panic!("{options}: {error}"));
        let (report, findings) = qemu_check(&scratch.save("ours.qcow2", &disk));
        assert_eq!(report["check-errors"], 0, "{findings}");
        assert_qemu_clean(&scratch.path("ours.qcow2"));
    }
}
