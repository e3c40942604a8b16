//! The temporary snapshot: when it is taken, what may be done meanwhile, and that it goes.

use std::time::Duration;

use tokio::time::timeout;

use super::super::TEMPORARY_SNAPSHOT;
use super::*;
use crate::driver::{NewSnapshot, SnapshotSelector};
use crate::error::ErrorKind;
use crate::protocols::memory::{Fault, OpKind};

const CLUSTER: u64 = 64 << 10;
const SIZE: u64 = 16 * CLUSTER;
const LONG: Duration = Duration::from_secs(60);

struct Relieved {
    file: Arc<Memory>,
    target: Arc<Memory>,
    setup: Setup,
    running: tokio::task::JoinHandle<Result<()>>,
    before: Vec<u8>,
}

/// A copy whose target takes nothing, and a guest that has written more than fits into memory.
async fn relieved(left: &[&str]) -> Relieved {
    let (file, source) = disk(Format::Qcow2(CLUSTER), SIZE, None).await;
    let (target, target_disk) = disk(Format::Raw, SIZE, None).await;
    for cluster in 0..SIZE / CLUSTER {
        let bytes = vec![cluster as u8 + 1; CLUSTER as usize];
        put(&*source, cluster * CLUSTER, bytes).await.unwrap();
    }
    for name in left {
        let new = NewSnapshot::named(*name);
        source.snapshots().unwrap().create(new).await.unwrap();
    }
    let before = content(&*source).await;
    let options = CopyOptions {
        guest_memory: CLUSTER,
        label: "job0".to_owned(),
        ..CopyOptions::default()
    };
    let setup = setup(
        Jitter::new(source, 1, 2),
        Jitter::new(target_disk, 2, 2),
        options,
    );
    setup.copier.activate().unwrap();
    target.hold(OpKind::Write);
    let copier = setup.copier.clone();
    let running = tokio::spawn(async move { copier.run(Owner::strict()).await });
    for cluster in (0..SIZE / CLUSTER).rev() {
        let written = put(&*setup.guest, cluster * CLUSTER, vec![0xee; 512]);
        timeout(LONG, written).await.unwrap().unwrap();
    }
    Relieved {
        file,
        target,
        setup,
        running,
        before,
    }
}

fn names(setup: &Setup) -> Vec<String> {
    let snapshots = setup.source.snapshots().unwrap().list();
    snapshots.into_iter().map(|info| info.name).collect()
}

async fn finish(relieved: Relieved) {
    relieved.target.release_all();
    timeout(LONG, relieved.running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    relieved.setup.copier.close().await.unwrap();
    assert_same(&relieved.target.content(), &relieved.before, "target");
    relieved.setup.source.inner.close().await.unwrap();
    let _ = open(&relieved.file, None).await;
}

#[tokio::test]
async fn guests_go_on_while_the_target_stands_still() {
    let relieved = relieved(&["mine"]).await;
    let found = names(&relieved.setup);
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[1].starts_with(&format!("{TEMPORARY_SNAPSHOT}job0.")));
    let setup = Setup {
        source: relieved.setup.source.clone(),
        guest: relieved.setup.guest.clone(),
        copier: relieved.setup.copier.clone(),
        target: relieved.setup.target.clone(),
    };
    finish(relieved).await;
    assert_eq!(names(&setup), ["mine"]);
}

#[tokio::test]
async fn what_a_killed_copy_has_left_is_cleared_away() {
    let old = format!("{TEMPORARY_SNAPSHOT}job7.12345");
    let relieved = relieved(&[&old, "mine"]).await;
    assert!(!names(&relieved.setup).contains(&old));
    finish(relieved).await;
}

#[tokio::test]
async fn it_cannot_be_deleted_while_it_is_read() {
    let relieved = relieved(&[]).await;
    let which = SnapshotSelector {
        id: None,
        name: names(&relieved.setup).pop(),
    };
    let guest = relieved.setup.guest.clone();
    let refused = guest.snapshots().unwrap().delete(which).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::InUse);
    finish(relieved).await;
}

#[tokio::test]
async fn the_disk_may_be_cut_off_and_reverted_behind_it() {
    let relieved = relieved(&["mine"]).await;
    let guest = relieved.setup.guest.clone();
    guest.resize(CLUSTER, Preallocation::Off).await.unwrap();
    let mine = SnapshotSelector {
        id: None,
        name: Some("mine".to_owned()),
    };
    guest.snapshots().unwrap().revert(mine).await.unwrap();
    assert_same(&content(&*guest).await, &relieved.before, "reverted");
    finish(relieved).await;
}

#[tokio::test]
async fn nothing_is_reverted_while_the_disk_itself_is_read() {
    let (_, source) = disk(Format::Qcow2(CLUSTER), SIZE, None).await;
    let (_, target) = disk(Format::Raw, SIZE, None).await;
    let snapshots = source.snapshots().unwrap();
    snapshots.create(NewSnapshot::named("mine")).await.unwrap();
    let setup = setup(
        Jitter::new(source, 1, 0),
        Jitter::new(target, 2, 0),
        CopyOptions::default(),
    );
    let mine = SnapshotSelector {
        id: None,
        name: Some("mine".to_owned()),
    };
    setup.copier.activate().unwrap();
    let through = setup.guest.snapshots().unwrap();
    let refused = through.revert(mine.clone()).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::InUse);
    setup.copier.run(Owner::strict()).await.unwrap();
    through.revert(mine).await.unwrap();
}

#[tokio::test]
async fn without_room_for_a_snapshot_guests_wait() {
    let (file, source) = disk(Format::Qcow2(CLUSTER), SIZE, None).await;
    let (target, target_disk) = disk(Format::Raw, SIZE, None).await;
    put(&*source, 0, vec![1; SIZE as usize]).await.unwrap();
    source.flush().await.unwrap();
    let options = CopyOptions {
        guest_memory: CLUSTER,
        ..CopyOptions::default()
    };
    let setup = setup(
        Jitter::new(source, 1, 0),
        Jitter::new(target_disk, 2, 0),
        options,
    );
    setup.copier.activate().unwrap();
    file.set_space_limit(Some(file.allocated()));
    target.hold(OpKind::Write);
    let copier = setup.copier.clone();
    let running = tokio::spawn(async move { copier.run(Owner::strict()).await });
    let guest = setup.guest.clone();
    let writes = tokio::spawn(async move {
        for cluster in (0..16).rev() {
            put(&*guest, cluster * CLUSTER, vec![2; 512]).await.unwrap();
        }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!writes.is_finished());
    assert!(names(&setup).is_empty());
    target.release_all();
    timeout(LONG, writes).await.unwrap().unwrap();
    running.await.unwrap().unwrap();
    assert_same(&target.content(), &vec![1; SIZE as usize], "target");
}

#[tokio::test]
async fn a_snapshot_is_not_promised_where_there_can_be_none() {
    for (format, sync) in [
        (Format::Raw, SyncMode::Full),
        (Format::Qcow2(CLUSTER), SyncMode::None),
    ] {
        let (_, source) = disk(format, SIZE, None).await;
        let (_, target) = disk(Format::Raw, SIZE, None).await;
        let source = Jitter::new(source, 1, 0);
        let from = Source {
            disk: source.clone(),
            snapshots: source,
        };
        let options = CopyOptions {
            sync,
            point_in_time: PointInTime::InternalSnapshot,
            ..CopyOptions::default()
        };
        assert!(Copier::new(from, Jitter::new(target, 1, 0), options).is_err());
    }
}

/// A copy whose target stands still and whose source makes nothing durable: a guest overwrites the whole disk, and then the source's
/// flushes do what `end` makes of them. Answers what the copy does.
async fn durable_late(end: impl FnOnce(&Memory)) -> (Setup, Arc<Memory>, Result<()>) {
    let (file, source) = disk(Format::Qcow2(CLUSTER), SIZE, None).await;
    let (target, target_disk) = disk(Format::Raw, SIZE, None).await;
    put(&*source, 0, vec![1; SIZE as usize]).await.unwrap();
    source.flush().await.unwrap();
    let options = CopyOptions {
        guest_memory: 4 * CLUSTER,
        ..CopyOptions::default()
    };
    let setup = setup(
        Jitter::new(source, 1, 0),
        Jitter::new(target_disk, 2, 0),
        options,
    );
    setup.copier.activate().unwrap();
    target.hold(OpKind::Write);
    file.hold(OpKind::Flush);
    let copier = setup.copier.clone();
    let running = tokio::spawn(async move { copier.run(Owner::strict()).await });
    let guest = setup.guest.clone();
    let writes = async {
        for cluster in (0..SIZE / CLUSTER).rev() {
            put(&*guest, cluster * CLUSTER, vec![2; 512]).await.unwrap();
        }
    };
    timeout(LONG, writes).await.unwrap();
    assert!(names(&setup).is_empty(), "it is not durable yet");
    end(&file);
    file.release_all();
    target.release_all();
    let result = timeout(LONG, running).await.unwrap().unwrap();
    let closed = setup.copier.close().await;
    assert!(closed.is_ok() || result.is_err());
    (setup, target, result)
}

#[tokio::test]
async fn guests_do_not_wait_until_the_snapshot_is_durable() {
    let (setup, target, result) = durable_late(|_| ()).await;
    result.unwrap();
    assert_same(&target.content(), &vec![1; SIZE as usize], "target");
    assert!(names(&setup).is_empty());
}

#[tokio::test]
async fn a_snapshot_that_does_not_become_durable_ends_the_copy_and_no_guest() {
    let fails = |file: &Memory| file.fail_once(OpKind::Write, 0, Fault::Io);
    let (setup, _, result) = durable_late(fails).await;
    result.unwrap_err();
    assert!(names(&setup).is_empty());
    let now = content(&*setup.guest).await;
    for cluster in now.chunks(CLUSTER as usize) {
        assert_eq!((cluster[0], cluster[511], cluster[512]), (2, 2, 1));
    }
}
