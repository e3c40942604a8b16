//! Snapshots through the driver: who is refused and why, full disks, power cuts, and images from and for QEMU.

use super::model::layers::{pattern, snapshot_headers};
use super::*;
use crate::driver::{NewSnapshot, Preallocation, SnapshotInfo, SnapshotSelector, Snapshots};
use crate::error::ErrorKind;
use crate::formats::qcow2::check::{check, read_header};
use crate::formats::qcow2::create::Compat;
use crate::formats::qcow2::header::Incompatible;
use crate::formats::qcow2::testing::{qemu_io, run};
use crate::protocols::memory::{Change, Record};

fn named(name: &str) -> NewSnapshot {
    NewSnapshot {
        name: name.to_owned(),
        date_sec: 1_700_000_000,
        date_nsec: 42,
        vm_clock_nsec: 0,
    }
}

fn selector(id: Option<&str>, name: Option<&str>) -> SnapshotSelector {
    SnapshotSelector {
        id: id.map(str::to_owned),
        name: name.map(str::to_owned),
    }
}

fn ids_and_names(image: &Qcow2) -> Vec<(String, String)> {
    let list = image.list().into_iter();
    list.map(|info| (info.id, info.name)).collect()
}

fn options(size: u64, cluster_size: u64) -> CreateOptions {
    let mut options = CreateOptions::new(size);
    options.cluster_size = cluster_size;
    options
}

/// The content of every snapshot, by name.
async fn contents(disk: &Arc<Memory>) -> Vec<(String, Vec<u8>)> {
    let headers = snapshot_headers(&disk.child()).await;
    let list = open(disk).await.list();
    let mut contents = Vec::new();
    for (info, (id, header)) in list.into_iter().zip(headers) {
        assert_eq!(info.id, id);
        let disk = disk.fork();
        let change = Change::Write {
            offset: 0,
            data: header.into(),
            fua: false,
        };
        disk.apply(&change).unwrap();
        let options = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let opening = Qcow2::open(disk.child(), options).await.unwrap();
        let image = opening.finish(None).await.unwrap();
        contents.push((info.name, read(&image, 0, image.size()).await));
    }
    contents
}

#[tokio::test]
async fn ids_count_up_and_selectors_match_all_that_they_give() {
    let disk = new_image(&options(1 << 20, 4096)).await;
    let image = open(&disk).await;
    assert_eq!(image.create(named("a")).await.unwrap().id, "1");
    assert_eq!(image.create(named("b")).await.unwrap().id, "2");
    assert_eq!(image.create(named("c")).await.unwrap().id, "3");
    for (which, deleted) in [
        (selector(Some("1"), Some("b")), None),
        (selector(None, None), None),
        (selector(None, Some("3")), None),
        (selector(Some("2"), Some("b")), Some("b")),
        (selector(None, Some("a")), Some("a")),
    ] {
        match (image.delete(which.clone()).await, deleted) {
            (Ok(info), Some(name)) => assert_eq!(info.name, name),
            (Err(error), None) => assert_eq!(error.kind(), ErrorKind::NotFound),
            (other, _) => panic!("{which:?}: {other:?}"),
        }
    }
    let created = image.create(named("d")).await.unwrap();
    let wanted = SnapshotInfo {
        id: "4".to_owned(),
        name: "d".to_owned(),
        vm_state_size: 0,
        date_sec: 1_700_000_000,
        date_nsec: 42,
        vm_clock_nsec: 0,
        icount: None,
        disk_size: 1 << 20,
    };
    assert_eq!(created, wanted);
    image.close().await.unwrap();
    let image = open(&disk).await;
    let both = [("3", "c"), ("4", "d")].map(|(id, name)| (id.to_owned(), name.to_owned()));
    assert_eq!(ids_and_names(&image), both);
}

#[tokio::test]
async fn what_cannot_be_done_is_refused_and_nothing_has_changed() {
    let disk = new_image(&options(1 << 20, 4096)).await;
    let image = open(&disk).await;
    image.create(named("taken")).await.unwrap();
    image.close().await.unwrap();

    let image = open(&disk).await;
    let refused = [
        ("", ErrorKind::InvalidInput),
        ("taken", ErrorKind::AlreadyExists),
    ];
    for (name, kind) in refused {
        assert_eq!(image.create(named(name)).await.unwrap_err().kind(), kind);
    }
    image.close().await.unwrap();
    let report = check(&disk.child()).await.unwrap();
    assert!(report.is_clean(), "{:#?}", report.findings);
    let before = disk.content();
    let closed = image.create(named("late")).await.unwrap_err();
    assert_eq!(closed.kind(), ErrorKind::InUse);

    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let opening = Qcow2::open(disk.child(), options).await.unwrap();
    let image = opening.finish(None).await.unwrap();
    assert_eq!(image.list().len(), 1);
    let error = image.create(named("x")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    let error = image.delete(selector(Some("1"), None)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert_eq!(disk.content(), before);

    let mut narrow = super::CreateOptions::new(1 << 20);
    narrow.refcount_bits = 1;
    let disk = new_image(&narrow).await;
    let image = open(&disk).await;
    let before = disk.content();
    let error = image.create(named("x")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(disk.content(), before);
}

#[tokio::test]
async fn a_full_disk_refuses_a_snapshot_and_still_takes_writes() {
    let disk = new_image(&options(1 << 20, 4096)).await;
    let image = open(&disk).await;
    write(&image, 0, pattern(0, 300_000, 1)).await.unwrap();
    image.flush().await.unwrap();
    let used = disk.allocated();
    let mut refused = 0;
    for room in (0..40).map(|pages| pages * 4096) {
        disk.set_space_limit(Some(used + room));
        match image.create(named("full")).await {
            Ok(_) => break,
            Err(error) => {
                refused += 1;
                assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, 28));
            }
        }
        let report = check(&disk.child()).await.unwrap();
        assert!(report.is_clean(), "{:#?}", report.findings);
        let stamp = 100 + refused;
        write(&image, 8192, pattern(8192, 100_000, stamp))
            .await
            .unwrap();
        image.flush().await.unwrap();
        assert_same(
            &read(&image, 8192, 100_000).await,
            &pattern(8192, 100_000, stamp),
        );
    }
    assert!(refused > 0);
    assert_eq!(image.list().len(), 1, "with enough room it succeeds");
    disk.set_space_limit(None);
    let content = read(&image, 0, 1 << 20).await;
    verify(&disk, image, &content).await;
}

#[tokio::test]
async fn qemu_reverts_to_and_deletes_our_snapshots() {
    let disk = new_image(&options(2 << 20, 65536)).await;
    let image = open(&disk).await;
    write(&image, 0, pattern(0, 1 << 20, 1)).await.unwrap();
    image.create(named("one")).await.unwrap();
    let first = read(&image, 0, 2 << 20).await;
    write(&image, 500_000, pattern(500_000, 1 << 20, 2))
        .await
        .unwrap();
    image.create(named("two")).await.unwrap();
    image.close().await.unwrap();

    let scratch = Scratch::new();
    let path = scratch.save("ours.qcow2", &disk);
    let file = path.to_str().unwrap();
    qemu_img(&["snapshot", "-a", "one", file]);
    assert_qemu_clean(&path);
    assert_same(&qemu_content(&scratch, &path), &first);
    qemu_io(file, &["write -P 7 0 64k"]);
    qemu_img(&["snapshot", "-d", "one", file]);
    qemu_img(&["snapshot", "-c", "three", file]);
    qemu_img(&["snapshot", "-d", "two", file]);
    assert_qemu_clean(&path);

    // And back: what QEMU made is ours to delete.
    let disk = scratch.load("ours.qcow2");
    let image = open(&disk).await;
    let names: Vec<_> = image.list().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["three"]);
    let content = read(&image, 0, 2 << 20).await;
    write(&image, 0, vec![9; 70_000]).await.unwrap();
    assert_same(&contents(&disk).await[0].1, &content);
    image.delete(selector(None, Some("three"))).await.unwrap();
    let content = read(&image, 0, 2 << 20).await;
    verify(&disk, image, &content).await;
}

#[tokio::test]
async fn extra_data_of_others_and_vm_state_survive_our_table() {
    let scratch = Scratch::new();
    let path = scratch.path("old.qcow2");
    let file = path.to_str().unwrap();
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "compat=0.10",
        file,
        "1M",
    ]);
    qemu_img(&["snapshot", "-c", "theirs", file]);
    let before = qemu_img(&["snapshot", "-l", file]);
    let disk = scratch.load("old.qcow2");
    let image = open(&disk).await;
    image.create(named("ours")).await.unwrap();
    image.close().await.unwrap();
    scratch.save("old.qcow2", &disk);
    let after = qemu_img(&["snapshot", "-l", file]);
    let line = before.lines().find(|line| line.contains("theirs")).unwrap();
    assert!(after.contains(line), "{before}{after}");
    assert_qemu_clean(&path);
    let info = run("qemu-img", &["info", "--output=json", file]);
    assert!(String::from_utf8_lossy(&info.stdout).contains("ours"));
}

/// A disk after a power cut at `at`: what was flushed, and of the rest a random part, some of it torn at a sector.
fn power_cut(
    before: &Memory,
    log: &[Record],
    at: usize,
    random: &mut fastrand::Rng,
) -> Arc<Memory> {
    let flushed = log[..at]
        .iter()
        .filter(|record| matches!(record.change, Change::Flush))
        .map(|record| record.issued)
        .max()
        .unwrap_or(0);
    let disk = before.fork();
    let keep = random.u8(..4);
    for record in &log[..at] {
        let volatile = record.completed > flushed;
        if volatile && random.u8(..4) < keep {
            continue;
        }
        let mut change = record.change.clone();
        if let Change::Write { data, .. } = &mut change
            && volatile
            && data.len() > 512
            && random.bool()
        {
            *data = data.slice(
                0,
                random.u64(1..data.len() / 512 + 1).min(data.len() / 512) * 512,
            );
        }
        disk.apply(&change).unwrap();
    }
    disk
}

/// What is expected after an operation: how long the log was when it answered, and the snapshots.
struct Mark {
    answered: usize,
    snapshots: Vec<(String, Vec<u8>)>,
}

/// Writes, snapshots and deletions, with the log of what they did.
async fn workload(cluster_size: u64, refcount_bits: u32) -> (Arc<Memory>, Vec<Record>, Vec<Mark>) {
    const SIZE: u64 = 256 << 10;
    let mut made = options(SIZE, cluster_size);
    made.refcount_bits = refcount_bits;
    let disk = new_image(&made).await;
    let image = open(&disk).await;
    write(&image, 0, pattern(0, 100_000, 1)).await.unwrap();
    image.flush().await.unwrap();
    let before = disk.fork();
    disk.start_log();
    let mut marks = vec![Mark {
        answered: 0,
        snapshots: Vec::new(),
    }];
    let mut snapshots: Vec<(String, Vec<u8>)> = Vec::new();
    for (stamp, step) in ["+a", "+b", "-a", "+c", "+d", "-c", "-b"]
        .iter()
        .enumerate()
    {
        let (sign, name) = step.split_at(1);
        if sign == "+" {
            let content = read(&image, 0, SIZE).await;
            image.create(named(name)).await.unwrap();
            snapshots.push((name.to_owned(), content));
        } else {
            image.delete(selector(None, Some(name))).await.unwrap();
            snapshots.retain(|(other, _)| other != name);
        }
        marks.push(Mark {
            answered: disk.log().len(),
            snapshots: snapshots.clone(),
        });
        let at = 20_000 * stamp as u64;
        let bytes = pattern(at, 40_000, 10 + stamp as u32);
        write(&image, at, bytes).await.unwrap();
        image.discard(at / 2, 8192).await.unwrap();
        if stamp % 2 == 0 {
            image.flush().await.unwrap();
        }
    }
    (before, disk.log(), marks)
}

/// Whether the image says that its refcounts must be rebuilt.
async fn is_dirty(disk: &Arc<Memory>) -> bool {
    let header = read_header(&disk.child()).await.unwrap();
    header.incompatible.has(Incompatible::DIRTY)
}

/// Asserts that the snapshots are those before or after the operation that the cut has hit, and true.
async fn assert_old_or_new(disk: &Arc<Memory>, marks: &[Mark], cut: usize) {
    let report = check(&disk.child()).await.unwrap();
    let lost = |finding: &String| finding.starts_with("ERROR cluster");
    assert!(
        report.check_errors == 0
            && (is_dirty(disk).await || report.overlaps == 0 && !report.findings.iter().any(lost)),
        "cut at {cut}: {:#?}",
        report.findings
    );
    let is = contents(disk).await;
    let done = marks.iter().rposition(|mark| mark.answered <= cut).unwrap();
    let fits = marks[done..]
        .iter()
        .take(2)
        .any(|mark| mark.snapshots == is);
    let names: Vec<_> = is.iter().map(|(name, _)| name).collect();
    assert!(fits, "cut at {cut}, behind operation {done}: {names:?}");
}

#[tokio::test]
async fn a_power_cut_at_any_time_leaves_the_old_or_the_new_snapshots() {
    for (cluster_size, refcount_bits) in [(4096, 16), (512, 16), (512, 64)] {
        let (before, log, marks) = workload(cluster_size, refcount_bits).await;
        let mut random = fastrand::Rng::with_seed(cluster_size);
        // Every place where something changes at least once, as far as the time allows.
        let stride = (log.len() / 150).max(1);
        for cut in (0..=log.len()).step_by(stride) {
            let disk = power_cut(&before, &log, cut, &mut random);
            assert_old_or_new(&disk, &marks, cut).await;
            // Writes after the restart must not reach a snapshot.
            let image = open(&disk).await;
            for _ in 0..6 {
                let at = random.u64(..200_000);
                write(&image, at, pattern(at, 20_000, 99)).await.unwrap();
            }
            image.close().await.unwrap();
            assert_old_or_new(&disk, &marks, cut).await;
            assert!(!is_dirty(&disk).await);
        }
    }
}

#[tokio::test]
async fn a_view_shows_the_snapshot_while_the_image_is_written_and_keeps_it() {
    let disk = new_image(&options(1 << 20, 4096)).await;
    let image = open(&disk).await;
    write(&image, 0, pattern(0, 500_000, 1)).await.unwrap();
    image.create(named("kept")).await.unwrap();
    image.resize(2 << 20, Preallocation::Off).await.unwrap();
    let missing = image.view(selector(None, Some("none"))).await;
    assert_eq!(missing.err().unwrap().kind(), ErrorKind::NotFound);

    let view = image.view(selector(None, Some("kept"))).await.unwrap();
    let again = image.view(selector(Some("1"), None)).await.unwrap();
    write(&image, 0, pattern(0, 1 << 20, 2)).await.unwrap();
    assert_eq!(view.size(), 1 << 20);
    let mut before = pattern(0, 500_000, 1);
    before.resize(1 << 20, 0);
    let is = view.read(0, 1 << 20).await.unwrap().to_bytes();
    assert_same(&is, &before);
    assert!(view.block_status(600_000, 4096).await.unwrap().zero);
    let data = Data::from(vec![1; 512]);
    let refused = view.write(0, data, WriteFlags::default()).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::ReadOnly);
    view.flush().await.unwrap();

    let which = selector(None, Some("kept"));
    for view in [&view, &again] {
        let refused = image.delete(which.clone()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InUse);
        assert_eq!(refused.message(), "Snapshot 'kept' is being read");
        // Going back does not touch it.
        image.revert(which.clone()).await.unwrap();
        write(&image, 4096, pattern(4096, 9000, 3)).await.unwrap();
        let is = view.read(0, 1 << 20).await.unwrap().to_bytes();
        assert_same(&is, &before);
        view.close().await.unwrap();
        assert!(view.read(0, 1).await.is_err());
    }
    let dropped = image.view(which.clone()).await.unwrap();
    let mut content = before;
    content[4096..13096].copy_from_slice(&pattern(4096, 9000, 3));
    drop(dropped);
    // What is closed holds nothing, though somebody still has it, and lets go of it once.
    view.close().await.unwrap();
    image.delete(which).await.unwrap();
    assert!(view.read(0, 1).await.is_err());
    assert!(view.block_status(0, 1).await.is_err());
    verify(&disk, image, &content).await;
}

#[tokio::test]
async fn a_view_that_is_closed_twice_lets_go_of_the_snapshot_once() {
    let disk = new_image(&options(1 << 20, 4096)).await;
    let image = open(&disk).await;
    image.create(named("s")).await.unwrap();
    let which = selector(None, Some("s"));
    let first = image.view(which.clone()).await.unwrap();
    let second = image.view(which.clone()).await.unwrap();
    first.close().await.unwrap();
    first.close().await.unwrap();
    drop(first);
    let refused = image.delete(which.clone()).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InUse);
    second.close().await.unwrap();
    image.delete(which).await.unwrap();
}

#[tokio::test]
async fn a_view_of_a_closed_image_reads_nothing() {
    let disk = new_image(&options(1 << 20, 4096)).await;
    let image = open(&disk).await;
    write(&image, 0, vec![7; 8192]).await.unwrap();
    image.create(named("s")).await.unwrap();
    let view = image.view(selector(None, Some("s"))).await.unwrap();
    image.close().await.unwrap();
    let error = view.read(0, 512).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
}

#[tokio::test]
async fn steps_of_a_change_see_what_earlier_ones_have_done_and_happen_all_or_not_at_all() {
    for compat in [Compat::V1_1, Compat::V0_10] {
        let mut made = options(1 << 20, 4096);
        made.compat = compat;
        let disk = new_image(&made).await;
        let image = open(&disk).await;
        write(&image, 0, pattern(0, 100_000, 1)).await.unwrap();
        image.create(named("old")).await.unwrap();
        write(&image, 50_000, pattern(50_000, 100_000, 2))
            .await
            .unwrap();
        let written = read(&image, 0, 1 << 20).await;
        for end in ["dropped", "prepared", "rolled back", "finished"] {
            let mut change = image.change().await.unwrap();
            change.create(named("before")).await.unwrap();
            let taken = change.create(named("before")).await.unwrap_err();
            assert_eq!(taken.kind(), ErrorKind::AlreadyExists);
            change.revert(selector(None, Some("old"))).await.unwrap();
            change.create(named("between")).await.unwrap();
            change.delete(selector(None, Some("old"))).await.unwrap();
            change.revert(selector(None, Some("before"))).await.unwrap();
            change
                .delete(selector(None, Some("between")))
                .await
                .unwrap();
            let names = || ids_and_names(&image).into_iter().map(|(_, name)| name);
            if end != "dropped" {
                change.prepare().await.unwrap();
                assert!(change.create(named("late")).await.is_err());
            }
            if end == "rolled back" || end == "finished" {
                change.commit().await.unwrap();
            }
            if end == "rolled back" {
                change.roll_back().await.unwrap();
            }
            assert!(names().eq(["old"]), "nothing is seen before the end");
            if end != "finished" {
                drop(change);
                assert!(names().eq(["old"]), "{end}");
                assert_same(&read(&image, 0, 1 << 20).await, &written);
                continue;
            }
            change.finish();
            assert!(names().eq(["before"]));
            assert_same(&read(&image, 0, 1 << 20).await, &written);
        }
        write(&image, 0, pattern(0, 200_000, 3)).await.unwrap();
        image.revert(selector(None, Some("before"))).await.unwrap();
        verify(&disk, image, &written).await;
    }
}

#[tokio::test]
async fn a_revert_brings_the_old_size_back_and_leaves_saved_vm_state_where_it_is() {
    let disk = new_image(&options(1 << 20, 4096)).await;
    let image = open(&disk).await;
    write(&image, 0, pattern(0, 1 << 20, 1)).await.unwrap();
    image.create(named("small")).await.unwrap();
    let small = read(&image, 0, 1 << 20).await;
    image.resize(9 << 20, Preallocation::Off).await.unwrap();
    write(&image, 8 << 20, pattern(8 << 20, 1 << 20, 2))
        .await
        .unwrap();
    image.create(named("large")).await.unwrap();
    let large = read(&image, 0, 9 << 20).await;
    let info = image.revert(selector(None, Some("small"))).await.unwrap();
    assert_eq!((info.disk_size, image.size()), (1 << 20, 1 << 20));
    assert_same(&read(&image, 0, 1 << 20).await, &small);
    let behind = image.read(1 << 20, 512).await.unwrap_err();
    assert_eq!(behind.kind(), ErrorKind::OutOfRange);
    image.revert(selector(None, Some("large"))).await.unwrap();
    assert_same(&read(&image, 0, 9 << 20).await, &large);
    image.close().await.unwrap();

    // What QEMU's savevm leaves: a disk whose L1 table goes on with VM state, here the old end of the disk.
    let mut bytes = disk.content();
    let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap()) as usize;
    let entry = table + 40 + 24 + 1 + 5;
    let second = entry.next_multiple_of(8);
    bytes[second + 40..second + 48].copy_from_slice(&(1_u64 << 20).to_be_bytes());
    bytes[second + 48..second + 56].copy_from_slice(&(2_u64 << 20).to_be_bytes());
    let disk = Memory::with_content(&bytes);
    let image = open(&disk).await;
    assert_eq!(image.list()[1].vm_state_size, 1 << 20);
    let info = image.revert(selector(None, Some("large"))).await.unwrap();
    assert_eq!((info.disk_size, image.size()), (2 << 20, 2 << 20));
    assert_same(&read(&image, 0, 2 << 20).await, &large[..2 << 20]);
    write(&image, 0, vec![5; 100_000]).await.unwrap();
    assert_eq!(image.list()[1].vm_state_size, 1 << 20);
    let mut content = large[..2 << 20].to_vec();
    content[..100_000].fill(5);
    verify(&disk, image, &content).await;
}
