//! COPIED flags of tables that only snapshots had: nobody keeps them up, so they are not trusted when such a table is active again.

use super::*;
use crate::driver::WriteFlags;
use crate::formats::qcow2::entry::{L1Entry, l2_entries};

const CLUSTER: u64 = 4096;

/// An image whose snapshots `a` and `b` share an L2 table that the disk does not have, and flags in that table that a repair has left.
/// Before them it has `empty`, of a disk without data.
fn with_stale_flags(scratch: &Scratch, compat: &str) -> Arc<Memory> {
    let path = scratch.path("stale.qcow2");
    let path = path.to_str().unwrap();
    let options = format!("cluster_size={CLUSTER},compat={compat}");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, path, "4M"]);
    qemu_img(&["snapshot", "-c", "empty", path]);
    qemu_io(path, &["write -P 1 0 64k"]);
    let disk = scratch.load("stale.qcow2");
    let image = Open::new(&disk);
    image.create("a").unwrap();
    image.create("b").unwrap();
    image.close();
    let path = scratch.save("stale.qcow2", &disk);
    qemu_io(path.to_str().unwrap(), &["write -P 2 0 4k"]);
    let disk = scratch.load("stale.qcow2");
    set_flags(&disk, "a");
    assert_qemu_clean(&scratch.save("stale.qcow2", &disk));
    disk
}

/// Sets the flags in the first L2 table of a snapshot.
fn set_flags(disk: &Arc<Memory>, snapshot: &str) {
    let image = Open::new(disk);
    let g = image.image.image.g;
    let table = image.image.image.snapshots.get();
    let entry = &table.entries()[table.find(&named(snapshot)).unwrap()];
    let l1 = block_on(image.image.image.read_snapshot_l1(entry)).unwrap();
    let at = L1Entry(l1[0]).l2_offset().unwrap().0;
    image.close();
    let file = disk.child();
    let old = block_on(file.read(at, CLUSTER)).unwrap().to_bytes();
    let mut new = old.to_vec();
    let mut flags = 0;
    for (index, entry) in l2_entries(g, &old).enumerate() {
        if entry.host_cluster().is_some() {
            assert!(!entry.is_copied(), "it is shared");
            entry.with_copied(true).put(g, &mut new, index);
            flags += 1;
        }
    }
    assert_eq!(flags, 16);
    block_on(file.write(at, new.into(), WriteFlags::default())).unwrap();
}

/// One change: deletes `b` and reverts to `a`. What they share has as many references as before.
fn delete_and_revert(image: &Open) {
    image.runtime.block_on(async {
        let mut change = image.image.change().await.unwrap();
        change.delete(named("b")).await.unwrap();
        change.revert(named("a")).await.unwrap();
        change.prepare().await.unwrap();
        change.commit().await.unwrap();
        change.finish();
    });
}

/// Has QEMU write to the disk, which must not reach the snapshot.
#[track_caller]
fn assert_kept(scratch: &Scratch, disk: &Memory, expected: &[u8], place: &str) {
    let path = scratch.save("written.qcow2", disk);
    qemu_io(path.to_str().unwrap(), &["write -P 9 0 64k"]);
    let written = scratch.load("written.qcow2");
    let kept = content(scratch, &written, Some("a")) == expected;
    assert!(kept, "a write has changed the snapshot: {place}");
}

#[test]
fn flags_of_a_table_that_is_active_again_are_not_trusted() {
    let scratch = Scratch::new();
    for (compat, to_empty) in [("1.1", false), ("1.1", true), ("0.10", false)] {
        let before = with_stale_flags(&scratch, compat);
        let expected = content(&scratch, &before, Some("a"));
        let image = Open::new(&before);
        if to_empty {
            // Then no table has more or fewer references after the change.
            image.revert("empty").unwrap();
        }
        image.close();
        let after = before.fork();
        let image = Open::new(&after);
        after.start_log();
        delete_and_revert(&image);
        image.close();
        let report = block_on(check(&after.child())).unwrap();
        assert!(report.is_clean(), "{compat}: {:#?}", report.findings);
        assert_qemu_clean(&scratch.save("after.qcow2", &after));
        assert!(content(&scratch, &after, None) == expected);
        assert_kept(&scratch, &after, &expected, "after an orderly end");
        assert_qemu_clean(&scratch.path("written.qcow2"));
        // Whoever finds the image after a crash repairs it, or needs not.
        let log = after.log();
        let disk = before.fork();
        for (nth, record) in log.iter().enumerate() {
            disk.apply(&record.change).unwrap();
            let place = format!("{compat}, killed after {nth}");
            assert_kept(&scratch, &disk, &expected, &place);
        }
    }
}

/// A snapshot is taken, reverted to and deleted in one change: no table has more or fewer references than before, but the disk has a
/// copy of its L1 table.
#[test]
fn a_disk_that_comes_back_to_its_tables_keeps_their_flags() {
    let scratch = Scratch::new();
    let path = scratch.path("image.qcow2");
    let path = path.to_str().unwrap();
    let options = format!("cluster_size={CLUSTER}");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, path, "4M"]);
    qemu_io(path, &["write -P 1 0 64k"]);
    let before = scratch.load("image.qcow2");
    let after = before.fork();
    let image = Open::new(&after);
    after.start_log();
    image.runtime.block_on(async {
        let mut change = image.image.change().await.unwrap();
        change.create(NewSnapshot::named("a")).await.unwrap();
        change.revert(named("a")).await.unwrap();
        change.delete(named("a")).await.unwrap();
        change.prepare().await.unwrap();
        change.commit().await.unwrap();
        change.finish();
    });
    image.close();
    assert_qemu_clean(&scratch.save("after.qcow2", &after));
    let disk = before;
    let mut marked = 0;
    for (nth, record) in after.log().iter().enumerate() {
        disk.apply(&record.change).unwrap();
        let header = block_on(read_header(&disk.child())).unwrap();
        if header.incompatible.has(Incompatible::DIRTY) {
            marked += 1;
            continue;
        }
        let report = block_on(check(&disk.child())).unwrap();
        assert_eq!(report.corruptions, 0, "killed after {nth}: {report:#?}");
    }
    assert!(marked > 0);
}
