//! Faults at every request of both disks, and copies that end anywhere.

use std::future::poll_fn;
use std::task::Poll;

use super::*;
use crate::protocols::memory::{Fault, OpKind};

const SIZE: u64 = 512 << 10;
/// Requests of a copy of this size are fewer.
const ENOUGH: u64 = 200;

struct Copy {
    files: [Arc<Memory>; 2],
    setup: Setup,
    before: Vec<u8>,
}

async fn prepare(format: Format, point_in_time: PointInTime, most: usize) -> Copy {
    let (source_file, source) = disk(format, SIZE, None).await;
    let (target_file, target) = disk(format, SIZE, None).await;
    for at in (0..SIZE / 2).step_by(96 << 10) {
        put(&*source, at, vec![(at >> 12) as u8 | 1; 64 << 10])
            .await
            .unwrap();
    }
    put(&*target, 0, vec![0xff; SIZE as usize]).await.unwrap();
    source.flush().await.unwrap();
    target.flush().await.unwrap();
    let before = content(&*source).await;
    let options = CopyOptions {
        point_in_time,
        max_workers: 2,
        max_chunk: 64 << 10,
        target_cluster: target.info().cluster_size,
        ..CopyOptions::default()
    };
    let source = Jitter::new(source, 7, most);
    let target = Jitter::new(target, 8, most);
    Copy {
        files: [source_file, target_file],
        setup: setup(source, target, options),
        before,
    }
}

/// The source is what it was, and nothing of the copy is left in it.
async fn assert_source(copy: &Copy, what: &str) {
    copy.files[0].clear_faults();
    let source = content(&*copy.setup.source).await;
    assert_same(&source, &copy.before, what);
    if let Some(snapshots) = copy.setup.source.snapshots() {
        assert!(snapshots.list().is_empty(), "{what}");
    }
}

async fn copy_with_fault(
    (format, point_in_time): (Format, PointInTime),
    (disk, kind, index): (usize, OpKind, u64),
    action: OnCopyError,
) -> bool {
    let what = format!("{format:?}, {point_in_time:?}, disk {disk}, {kind:?} {index}, {action:?}");
    let copy = prepare(format, point_in_time, 0).await;
    copy.setup.copier.activate().unwrap();
    let before = copy.files[disk].count(kind);
    copy.files[disk].fail_once(kind, index, Fault::Io);
    let owner = Owner::new(action);
    let result = copy.setup.copier.run(owner.clone()).await;
    let reached = copy.files[disk].count(kind) - before > index;
    // The snapshot may have been in the way of its own end.
    let closed = copy.setup.copier.close().await;
    copy.files[1].clear_faults();
    if let Err(error) = closed {
        assert!(
            disk == 0 && point_in_time == PointInTime::InternalSnapshot,
            "{what}: {error}"
        );
        copy.files[0].clear_faults();
        let snapshots = copy.setup.source.snapshots().unwrap();
        for left in snapshots.list() {
            assert!(
                left.name.starts_with(super::super::TEMPORARY_SNAPSHOT),
                "{what}"
            );
        }
        return reached;
    }
    assert_source(&copy, &what).await;
    if result.is_ok() {
        let target = content(&*copy.setup.target).await;
        assert_same(&target, &copy.before, &what);
        let progress = copy.setup.copier.progress();
        assert_eq!(progress.done, progress.total, "{what}");
    } else {
        assert!(reached, "{what}: failed by itself");
        assert!(
            action == OnCopyError::Fail
                || disk == 0 && point_in_time == PointInTime::InternalSnapshot,
            "{what}: {result:?}"
        );
    }
    reached
}

#[tokio::test]
async fn a_fault_anywhere_leaves_the_source_alone_and_is_said_or_made_good() {
    let kinds = [
        (0, OpKind::Read),
        (0, OpKind::BlockStatus),
        (0, OpKind::Write),
        (0, OpKind::Flush),
        (1, OpKind::Read),
        (1, OpKind::BlockStatus),
        (1, OpKind::Write),
        (1, OpKind::WriteZeroes),
        (1, OpKind::Discard),
        (1, OpKind::Flush),
    ];
    for case in [
        (Format::Raw, PointInTime::Auto),
        (Format::Qcow2(64 << 10), PointInTime::Auto),
        (Format::Qcow2(64 << 10), PointInTime::InternalSnapshot),
    ] {
        let mut met = 0;
        for (disk, kind) in kinds {
            for action in [OnCopyError::Fail, OnCopyError::Retry] {
                let mut index = 0;
                while copy_with_fault(case, (disk, kind, index), action).await {
                    index += 1;
                    assert!(index < ENOUGH);
                }
                met += index;
            }
        }
        assert!(met > 20, "{case:?}: {met} faults");
    }
}

/// Who takes the snapshot is a task of its own, which goes when it is its turn, and not with the copy.
#[tokio::test]
async fn a_snapshot_that_is_just_being_looked_at_is_deleted_too() {
    for steps in 0..300 {
        let copy = prepare(Format::Qcow2(64 << 10), PointInTime::InternalSnapshot, 3).await;
        let file = copy.files[0].clone();
        copy.setup.copier.activate().unwrap();
        let mut run = Box::pin(copy.setup.copier.run(Owner::strict()));
        for step in 0..steps {
            if step == steps / 2 {
                file.hold(OpKind::Read);
            }
            let done = poll_fn(|cx| Poll::Ready(run.as_mut().poll(cx))).await;
            if done.is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(run);
        file.release_all();
        let closed = copy.setup.copier.close().await;
        assert!(closed.is_ok(), "{steps} steps: {closed:?}");
    }
}

#[tokio::test]
async fn a_copy_can_be_cancelled_anywhere() {
    for point_in_time in [PointInTime::Auto, PointInTime::InternalSnapshot] {
        for steps in 0..150 {
            let copy = prepare(Format::Qcow2(64 << 10), point_in_time, 3).await;
            copy.setup.copier.activate().unwrap();
            let copier = copy.setup.copier.clone();
            let running = tokio::spawn(async move { copier.run(Owner::strict()).await });
            for _ in 0..steps * 3 {
                tokio::task::yield_now().await;
            }
            running.abort();
            let _ = running.await;
            put(&*copy.setup.guest, 0, copy.before[..512].to_vec())
                .await
                .unwrap();
            copy.setup.copier.close().await.unwrap();
            copy.setup.copier.close().await.unwrap();
            assert_source(&copy, &format!("cancelled after {steps} steps")).await;
        }
    }
}
