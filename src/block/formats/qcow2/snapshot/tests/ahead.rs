//! Requests that go on while a change of snapshots is made durable, before the disk follows.

use std::time::Duration;

use tokio::time::timeout;

use super::*;
use crate::crashlab::content::stamp;
use crate::driver::{Requests, SnapshotChange, WriteFlags};
use crate::formats::qcow2::create::{Compat, CreateOptions, create};

const SIZE: u64 = 1 << 20;
const CLUSTER: u64 = 4096;
const SHORT: Duration = Duration::from_millis(20);
/// What no request has to wait for.
const LONG: Duration = Duration::from_secs(20);

/// An image with a snapshot, `one`, in which everything was written with 1, and then again with 2.
async fn image(options: CreateOptions) -> (Arc<Memory>, Arc<Qcow2>) {
    let disk = Memory::new(0);
    create(&disk.child(), &options).await.unwrap();
    let image = open(&disk).await;
    write(&image, 0, options.size, 1).await;
    image.create(NewSnapshot::named("one")).await.unwrap();
    write(&image, 0, options.size, 2).await;
    (disk, image)
}

fn options(cluster: u64, compat: Compat) -> CreateOptions {
    let mut options = CreateOptions::new(SIZE);
    options.cluster_size = cluster;
    options.compat = compat;
    options
}

/// A change that goes back to the snapshot, as far as the switch of the header.
async fn switched(image: &Qcow2) -> Box<dyn SnapshotChange> {
    let mut change = image.change().await.unwrap();
    assert!(change.go_ahead().await.unwrap());
    change.revert(named("one")).await.unwrap();
    change.prepare().await.unwrap();
    assert!(change.switch().await.unwrap().is_some());
    change.commit().await.unwrap();
    change
}

async fn is_sound(disk: &Arc<Memory>) {
    let report = check(&disk.child()).await.unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
}

#[tokio::test]
async fn a_disk_follows_when_requests_have_been_held_back() {
    let (disk, image) = image(options(CLUSTER, Compat::V1_1)).await;
    let mut change = switched(&image).await;
    // A guest sees nothing of it.
    write(&image, 0, 8 * CLUSTER, 3).await;
    image.flush().await.unwrap();
    assert!(holds(&image, 0, 8 * CLUSTER, 3).await);
    let at = 8 * CLUSTER;
    assert!(holds(&image, at, SIZE - at, 2).await);
    // A crash is one behind the revert.
    let crashed = open(&disk.fork()).await;
    assert!(holds(&crashed, 0, SIZE, 1).await);
    change.hold().await.unwrap();
    let late = image.read(0, CLUSTER);
    assert!(timeout(SHORT, late).await.is_err());
    drop(change.finish());
    assert!(holds(&image, 0, SIZE, 1).await);
    write(&image, 0, CLUSTER, 4).await;
    image.close().await.unwrap();
    is_sound(&disk).await;
    let again = open(&disk).await;
    assert!(holds(&again, 0, CLUSTER, 4).await);
    assert!(holds(&again, CLUSTER, SIZE - CLUSTER, 1).await);
}

#[tokio::test]
async fn what_is_taken_back_has_all_that_was_written() {
    for holds_requests in [false, true] {
        let (disk, image) = image(options(CLUSTER, Compat::V1_1)).await;
        let mut change = switched(&image).await;
        write(&image, 0, CLUSTER, 3).await;
        image.flush().await.unwrap();
        write(&image, CLUSTER, CLUSTER, 4).await;
        if holds_requests {
            change.hold().await.unwrap();
        }
        change.roll_back().await.unwrap();
        drop(change);
        let crashed = open(&disk.fork()).await;
        assert!(holds(&crashed, 0, CLUSTER, 3).await);
        write(&image, 2 * CLUSTER, CLUSTER, 5).await;
        image.close().await.unwrap();
        is_sound(&disk).await;
        let again = open(&disk).await;
        for (nth, number) in [3, 4, 5, 2].into_iter().enumerate() {
            assert!(holds(&again, nth as u64 * CLUSTER, CLUSTER, number).await);
        }
        again.revert(named("one")).await.unwrap();
        assert!(holds(&again, 0, SIZE, 1).await);
    }
}

#[tokio::test]
async fn a_header_that_cannot_be_switched_changes_nothing() {
    let (disk, image) = image(options(CLUSTER, Compat::V1_1)).await;
    let mut change = image.change().await.unwrap();
    assert!(change.go_ahead().await.unwrap());
    change.revert(named("one")).await.unwrap();
    change.prepare().await.unwrap();
    disk.fail_once(OpKind::Flush, 0, Fault::Io);
    change.commit().await.unwrap_err();
    change.roll_back().await.unwrap();
    drop(change);
    write(&image, 0, CLUSTER, 3).await;
    assert!(holds(&image, 0, CLUSTER, 3).await);
    image.close().await.unwrap();
    is_sound(&disk).await;
    assert!(holds(&*open(&disk).await, CLUSTER, SIZE - CLUSTER, 2).await);
}

/// The file is not what the disk is then: nothing is written to either that the other does not have.
#[tokio::test]
async fn a_header_that_cannot_be_put_back_ends_all_changes() {
    let (disk, image) = image(options(CLUSTER, Compat::V1_1)).await;
    let mut change = switched(&image).await;
    disk.fail_from(OpKind::Write, 0, Fault::Io);
    change.roll_back().await.unwrap_err();
    disk.clear_faults();
    drop(change);
    assert!(holds(&image, 0, SIZE, 2).await);
    let data = stamp(0, CLUSTER, 3).into();
    let written = image.write(0, data, WriteFlags::default()).await;
    assert_eq!(written.unwrap_err().kind(), ErrorKind::Io);
}

#[tokio::test]
async fn a_change_that_is_dropped_before_the_disk_follows_ends_all_changes() {
    let (disk, image) = image(options(CLUSTER, Compat::V1_1)).await;
    drop(switched(&image).await);
    let data = stamp(0, CLUSTER, 3).into();
    let written = image.write(0, data, WriteFlags::default()).await;
    assert_eq!(written.unwrap_err().kind(), ErrorKind::Io);
    assert!(holds(&*open(&disk.fork()).await, 0, SIZE, 1).await);
}

/// A write-back has taken tables that nobody needs any more, and comes to write them late: their clusters must not be somebody
/// else's by then.
#[tokio::test]
async fn tables_that_are_still_to_be_written_are_not_freed() {
    let (disk, image) = image(options(512, Compat::V1_1)).await;
    let mut change = switched(&image).await;
    write(&image, 0, SIZE, 3).await;
    change.hold().await.unwrap();
    drop(change.finish());
    disk.hold(OpKind::Flush);
    let flush = {
        let image = image.clone();
        tokio::spawn(async move { image.flush().await })
    };
    disk.wait_held(1).await;
    // What settles has all the time that it needs, more than once.
    for _ in 0..4 {
        let end = tokio::time::Instant::now() + LONG;
        let settled = timeout(10 * SHORT, image.image.settle_until(end)).await;
        assert!(settled.is_err(), "it waits for the tables");
    }
    disk.release_all();
    flush.await.unwrap().unwrap();
    write(&image, 0, SIZE / 2, 4).await;
    image.image.damage.check().unwrap();
    image.close().await.unwrap();
    is_sound(&disk).await;
    let again = open(&disk).await;
    assert!(holds(&again, 0, SIZE / 2, 4).await);
    assert!(holds(&again, SIZE / 2, SIZE / 2, 1).await);
}

/// A refcount table that has grown is switched to by the header, which is kept.
#[tokio::test]
async fn a_flush_does_not_wait_for_the_header() {
    let mut options = options(512, Compat::V1_1);
    (options.refcount_bits, options.size) = (64, 4 * SIZE);
    let disk = Memory::new(0);
    create(&disk.child(), &options).await.unwrap();
    let image = open(&disk).await;
    write(&image, 0, CLUSTER, 1).await;
    image.create(NewSnapshot::named("one")).await.unwrap();
    let mut change = switched(&image).await;
    let before = image.image.header.get().refcount_table_offset;
    write(&image, 0, 3 * SIZE, 3).await;
    timeout(LONG, image.flush()).await.unwrap().unwrap();
    assert!(image.image.alloc.lock().await.has_grown());
    timeout(LONG, change.hold()).await.unwrap().unwrap();
    let header = change.finish();
    assert!(holds(&image, 0, CLUSTER, 1).await);
    write(&image, 0, SIZE / 2, 4).await;
    timeout(LONG, image.flush()).await.unwrap().unwrap();
    assert!(holds(&*open(&disk.fork()).await, 0, SIZE / 2, 4).await);
    drop(header);
    image.close().await.unwrap();
    assert_ne!(image.image.header.get().refcount_table_offset, before);
    is_sound(&disk).await;
    assert!(holds(&*open(&disk).await, 0, SIZE / 2, 4).await);
}

/// A request that meets a full disk frees what is on its way to be free, without waiting for the change, which waits for it.
#[tokio::test]
async fn a_full_disk_does_not_wait_for_the_change() {
    let (disk, image) = image(options(CLUSTER, Compat::V1_1)).await;
    let mut change = switched(&image).await;
    let flags = crate::driver::ZeroFlags {
        may_unmap: true,
        ..Default::default()
    };
    image.write_zeroes(0, SIZE / 2, flags).await.unwrap();
    disk.set_space_limit(Some(disk.allocated()));
    write_within(&image, 0, 8 * CLUSTER, 3).await;
    disk.set_space_limit(None);
    timeout(LONG, change.hold()).await.unwrap().unwrap();
    drop(change.finish());
    assert!(holds(&image, 0, SIZE, 1).await);
    image.close().await.unwrap();
    is_sound(&disk).await;
}

async fn write_within(image: &Qcow2, at: u64, len: u64, number: u32) {
    let data = stamp(at, len, number).into();
    let written = timeout(LONG, image.write(at, data, WriteFlags::default())).await;
    written.unwrap().unwrap();
}

#[tokio::test]
async fn a_snapshot_that_is_deleted_gets_no_viewers() {
    let (disk, image) = image(options(CLUSTER, Compat::V1_1)).await;
    let view = image.view(named("one")).await.unwrap();
    let mut change = image.change().await.unwrap();
    assert!(change.go_ahead().await.unwrap());
    let error = change.delete(named("one")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    view.close().await.unwrap();
    drop(view);
    change.revert(named("one")).await.unwrap();
    change.delete(named("one")).await.unwrap();
    assert!(image.view(named("one")).await.is_err());
    let new = NewSnapshot::named("two");
    assert_eq!(
        change.create(new).await.unwrap_err().kind(),
        ErrorKind::InvalidInput
    );
    change.prepare().await.unwrap();
    change.commit().await.unwrap();
    change.hold().await.unwrap();
    drop(change.finish());
    assert!(image.list().is_empty());
    assert!(holds(&image, 0, SIZE, 1).await);
    image.close().await.unwrap();
    is_sound(&disk).await;
}

#[tokio::test]
async fn images_without_a_dirty_bit_do_not_go_ahead() {
    let (_, image) = image(options(CLUSTER, Compat::V0_10)).await;
    let mut change = image.change().await.unwrap();
    assert!(!change.go_ahead().await.unwrap());
    change.revert(named("one")).await.unwrap();
    change.prepare().await.unwrap();
    change.commit().await.unwrap();
    drop(change.finish());
    assert!(holds(&image, 0, SIZE, 1).await);
}
