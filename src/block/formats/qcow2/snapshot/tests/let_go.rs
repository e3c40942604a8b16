//! Requests that go on before a change of snapshots is durable.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::timeout;

use super::*;
use crate::crashlab::content::stamp;
use crate::driver::{Requests, SnapshotChange, WriteFlags};
use crate::formats::qcow2::create::{Compat, CreateOptions, create};

const SIZE: u64 = 1 << 20;
const CLUSTER: u64 = 4096;
const SHORT: Duration = Duration::from_millis(20);

/// All that a disk is asked for.
const KINDS: [OpKind; 5] = [
    OpKind::Read,
    OpKind::Write,
    OpKind::WriteZeroes,
    OpKind::Discard,
    OpKind::Flush,
];

fn requests(disk: &Memory) -> u64 {
    KINDS.iter().map(|kind| disk.count(*kind)).sum()
}

/// An open image whose disk is all ours, much of it not written back.
async fn image(compat: Compat) -> (Arc<Memory>, Arc<Qcow2>) {
    let disk = Memory::new(0);
    let mut options = CreateOptions::new(SIZE);
    options.cluster_size = CLUSTER;
    options.compat = compat;
    create(&disk.child(), &options).await.unwrap();
    let image = open(&disk).await;
    write(&image, 0, SIZE, 1).await;
    (disk, image)
}

async fn let_go(change: &mut Box<dyn SnapshotChange>) -> Result<bool> {
    change.let_go(Box::new(drop)).await
}

async fn one_snapshot(image: &Qcow2) -> Box<dyn SnapshotChange> {
    let mut change = image.change().await.unwrap();
    change.hold().await.unwrap();
    change.create(NewSnapshot::named("one")).await.unwrap();
    change
}

#[tokio::test]
async fn nothing_is_read_or_written_while_requests_wait() {
    let (disk, image) = image(Compat::V1_1).await;
    let mut change = image.change().await.unwrap();
    let before = requests(&disk);
    change.hold().await.unwrap();
    change.create(NewSnapshot::named("one")).await.unwrap();
    let late = image.write(0, stamp(0, CLUSTER, 2).into(), WriteFlags::default());
    assert!(timeout(SHORT, late).await.is_err());
    let asked = Arc::new(AtomicU64::new(u64::MAX));
    let (seen, counted) = (asked.clone(), disk.clone());
    let then = move |held| {
        seen.store(requests(&counted), Ordering::Relaxed);
        drop(held);
    };
    assert!(change.let_go(Box::new(then)).await.unwrap());
    assert_eq!(asked.load(Ordering::Relaxed), before);
    write(&image, 0, CLUSTER, 3).await;
}

#[tokio::test]
async fn a_guest_does_not_wait_for_the_flushes_of_a_snapshot() {
    let (disk, image) = image(Compat::V1_1).await;
    let mut change = one_snapshot(&image).await;
    assert!(let_go(&mut change).await.unwrap());
    disk.hold(OpKind::Flush);
    let prepared = tokio::spawn(async move {
        change.prepare().await.unwrap();
        change.commit().await.unwrap();
        drop(change.finish());
    });
    while disk.held() == 0 {
        tokio::task::yield_now().await;
    }
    write(&image, 0, CLUSTER, 2).await;
    assert!(!prepared.is_finished());
    disk.release_all();
    prepared.await.unwrap();
    let view = image.view(named("one")).await.unwrap();
    assert!(holds(&image, 0, CLUSTER, 2).await);
    let old = view.read(0, SIZE).await.unwrap().to_bytes();
    assert_eq!(old, stamp(0, SIZE, 1));
    view.close().await.unwrap();
    image.close().await.unwrap();
    assert!(check(&disk.child()).await.unwrap().is_clean());
}

#[tokio::test]
async fn a_change_that_is_given_up_leaves_what_guests_wrote_and_no_leak() {
    for is_prepared in [false, true] {
        let (disk, image) = image(Compat::V1_1).await;
        let mut change = one_snapshot(&image).await;
        assert!(let_go(&mut change).await.unwrap());
        write(&image, CLUSTER / 2, 3 * CLUSTER, 2).await;
        if is_prepared {
            change.prepare().await.unwrap();
            write(&image, 8 * CLUSTER, CLUSTER, 3).await;
        }
        drop(change);
        assert!(image.list().is_empty());
        write(&image, 12 * CLUSTER, CLUSTER, 4).await;
        image.close().await.unwrap();
        let report = check(&disk.child()).await.unwrap();
        assert!(report.is_clean(), "{:#?}", report.findings);
        let image = open(&disk).await;
        assert!(holds(&image, CLUSTER / 2, 3 * CLUSTER, 2).await);
        assert!(holds(&image, 12 * CLUSTER, CLUSTER, 4).await);
        assert!(holds(&image, 16 * CLUSTER, CLUSTER, 1).await);
    }
}

#[tokio::test]
async fn a_snapshot_that_is_being_deleted_cannot_be_viewed() {
    let (_, image) = image(Compat::V1_1).await;
    image.create(NewSnapshot::named("one")).await.unwrap();
    let mut change = image.change().await.unwrap();
    change.delete(named("one")).await.unwrap();
    assert!(let_go(&mut change).await.unwrap());
    let viewed = image.view(named("one")).await.map(drop);
    assert_eq!(viewed.unwrap_err().kind(), ErrorKind::InUse);
    drop(change);
    let view = image.view(named("one")).await.unwrap();
    let deleted = image.delete(named("one")).await.map(drop);
    assert_eq!(deleted.unwrap_err().kind(), ErrorKind::InUse);
    view.close().await.unwrap();
    image.delete(named("one")).await.unwrap();
    image.close().await.unwrap();
}

#[tokio::test]
async fn who_reverts_or_has_version_2_is_not_let_go() {
    let (_, v2) = image(Compat::V0_10).await;
    let mut change = one_snapshot(&v2).await;
    assert!(!let_go(&mut change).await.unwrap());
    change.prepare().await.unwrap();
    change.commit().await.unwrap();
    drop(change.finish());

    let (_, image) = image(Compat::V1_1).await;
    image.create(NewSnapshot::named("one")).await.unwrap();
    let mut change = image.change().await.unwrap();
    change.revert(named("one")).await.unwrap();
    assert!(!let_go(&mut change).await.unwrap());
}

#[tokio::test]
async fn a_flush_under_way_keeps_no_other_request_from_going_on() {
    let (disk, image) = image(Compat::V1_1).await;
    disk.hold(OpKind::Flush);
    let flushing = tokio::spawn({
        let image = image.clone();
        async move { image.flush().await }
    });
    while disk.held() == 0 {
        tokio::task::yield_now().await;
    }
    let snapshot = tokio::spawn({
        let image = image.clone();
        async move { image.create(NewSnapshot::named("one")).await }
    });
    tokio::time::sleep(SHORT).await;
    write(&image, 0, CLUSTER, 2).await;
    assert!(!flushing.is_finished() && !snapshot.is_finished());
    disk.release_all();
    flushing.await.unwrap().unwrap();
    snapshot.await.unwrap().unwrap();
    image.close().await.unwrap();
}

/// A header that could not be put back is put back by somebody else, later.
#[tokio::test]
async fn a_change_that_cannot_be_taken_back_leaves_what_both_states_need() {
    for (reverts, failures) in [(false, 1), (false, 2), (true, 1), (true, 2)] {
        let case = format!("{reverts} {failures}");
        let (disk, image) = image(Compat::V1_1).await;
        image.create(NewSnapshot::named("old")).await.unwrap();
        write(&image, 0, SIZE, 2).await;
        let mut change = image.change().await.unwrap();
        change.hold().await.unwrap();
        match reverts {
            true => drop(change.revert(named("old")).await.unwrap()),
            false => {
                change.create(NewSnapshot::named("new")).await.unwrap();
                assert!(let_go(&mut change).await.unwrap());
            }
        }
        change.prepare().await.unwrap();
        let switch = change.switch().await.unwrap().unwrap();
        change.commit().await.unwrap();
        for failure in 0..failures {
            // Behind each the new header is put back.
            disk.fail_once(OpKind::Write, 2 * failure, Fault::Io);
        }
        let rolled_back = change.roll_back().await;
        assert_eq!(rolled_back.is_ok(), failures == 1, "{case}");
        drop(change);
        // Much would be freed and taken.
        for number in 3..9 {
            let data = stamp(0, SIZE, number).into();
            let written = image.write(0, data, WriteFlags::default()).await;
            assert_eq!(written.is_ok(), failures == 1, "{case}");
            let _ = image.flush().await;
        }
        let crashed = disk.fork();
        if failures == 2 {
            let put_back = crashed.child();
            let header = put_back.read(0, 512).await.unwrap().to_bytes();
            assert_eq!(header, switch.after, "{case}");
            let data = switch.before.clone().into();
            put_back
                .write(0, data, WriteFlags::default())
                .await
                .unwrap();
        }
        let again = open(&crashed).await;
        let last = if failures == 2 { 2 } else { 8 };
        assert!(holds(&again, 0, SIZE, last).await, "{case}");
        assert_eq!(again.list().len(), 1, "{case}");
        let view = again.view(named("old")).await.unwrap();
        let old = view.read(0, SIZE).await.unwrap().to_bytes();
        assert_eq!(old, stamp(0, SIZE, 1), "{case}");
        view.close().await.unwrap();
        again.close().await.unwrap();
        let report = check(&crashed.child()).await.unwrap();
        assert_eq!(report.corruptions, 0, "{case} {:#?}", report.findings);
    }
}
