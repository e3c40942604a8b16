//! What a guest waits for, and what it does not wait for.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::super::OnCbwError;
use super::*;
use crate::error::ErrorKind;
use crate::protocols::memory::{Fault, OpKind};

const CLUSTER: u64 = 64 << 10;
const SIZE: u64 = 16 * CLUSTER;
const SHORT: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(60);

struct Raws {
    source: Arc<Memory>,
    target: Arc<Memory>,
    setup: Setup,
}

/// A copy from one raw disk to another; its source holds its cluster's number everywhere.
async fn raws(options: CopyOptions) -> Raws {
    let (source, source_disk) = disk(Format::Raw, SIZE, None).await;
    let (target, target_disk) = disk(Format::Raw, SIZE, None).await;
    for cluster in 0..SIZE / CLUSTER {
        let bytes = vec![cluster as u8 + 1; CLUSTER as usize];
        put(&*source, cluster * CLUSTER, bytes).await.unwrap();
    }
    let source_disk = Jitter::new(source_disk, 1, 0);
    let target_disk = Jitter::new(target_disk, 1, 0);
    Raws {
        source,
        target,
        setup: setup(source_disk, target_disk, options),
    }
}

fn write(raws: &Raws, cluster: u64) -> JoinHandle<Result<()>> {
    let guest = raws.setup.guest.clone();
    tokio::spawn(async move { put(&*guest, cluster * CLUSTER + 512, vec![0xee; 512]).await })
}

fn run(raws: &Raws, owner: Arc<Owner>) -> JoinHandle<Result<()>> {
    let copier = raws.setup.copier.clone();
    tokio::spawn(async move { copier.run(owner).await })
}

async fn original(raws: &Raws) {
    let mut expected = Vec::new();
    for cluster in 0..SIZE / CLUSTER {
        expected.extend(vec![cluster as u8 + 1; CLUSTER as usize]);
    }
    assert_same(&raws.target.content(), &expected, "target");
}

#[tokio::test]
async fn neighbours_do_not_wait_for_each_others_reads() {
    let raws = raws(CopyOptions::default()).await;
    raws.setup.copier.activate().unwrap();
    raws.source.hold(OpKind::Read);
    let first = write(&raws, 3);
    raws.source.wait_held(1).await;
    let second = write(&raws, 4);
    raws.source.wait_held(2).await;
    let same = write(&raws, 3);
    assert!(raws.source.release_one(1));
    timeout(LONG, second).await.unwrap().unwrap().unwrap();
    tokio::time::sleep(SHORT).await;
    assert!(!first.is_finished() && !same.is_finished());
    assert_eq!(raws.source.held(), 1, "one read per cluster");
    raws.source.release_all();
    timeout(LONG, first).await.unwrap().unwrap().unwrap();
    timeout(LONG, same).await.unwrap().unwrap().unwrap();
    run(&raws, Owner::strict()).await.unwrap().unwrap();
    original(&raws).await;
}

#[tokio::test]
async fn a_guest_does_not_wait_for_the_target() {
    let raws = raws(CopyOptions::default()).await;
    raws.setup.copier.activate().unwrap();
    raws.target.hold(OpKind::Write);
    let running = run(&raws, Owner::strict());
    raws.target.wait_held(1).await;
    for cluster in 0..SIZE / CLUSTER {
        let written = timeout(LONG, write(&raws, cluster)).await;
        written.unwrap().unwrap().unwrap();
    }
    raws.target.release_all();
    running.await.unwrap().unwrap();
    original(&raws).await;
}

#[tokio::test]
async fn with_sync_none_a_guest_waits_until_the_target_has_the_old_content() {
    let options = CopyOptions {
        sync: SyncMode::None,
        ..CopyOptions::default()
    };
    let raws = raws(options).await;
    raws.setup.copier.activate().unwrap();
    let running = run(&raws, Owner::strict());
    raws.target.hold(OpKind::Write);
    let mut guest = write(&raws, 2);
    raws.target.wait_held(1).await;
    assert!(timeout(SHORT, &mut guest).await.is_err());
    assert_eq!(raws.source.peek(2 * CLUSTER + 512, 1).to_bytes()[0], 3);
    raws.target.release_all();
    guest.await.unwrap().unwrap();
    let copied = raws.target.peek(2 * CLUSTER, CLUSTER).to_bytes();
    assert!(copied.iter().all(|byte| *byte == 3));
    assert_eq!(raws.target.allocated(), CLUSTER, "nothing else is copied");
    assert!(!running.is_finished());
    running.abort();
    let _ = running.await;
    raws.setup.copier.close().await.unwrap();
}

/// Memory for two clusters, and a target that takes nothing.
async fn full_memory(on_cbw_error: OnCbwError) -> (Raws, [JoinHandle<Result<()>>; 2]) {
    let options = CopyOptions {
        guest_memory: 2 * CLUSTER,
        on_cbw_error,
        ..CopyOptions::default()
    };
    let raws = raws(options).await;
    raws.setup.copier.activate().unwrap();
    write(&raws, 14).await.unwrap().unwrap();
    write(&raws, 15).await.unwrap().unwrap();
    let waiting = [write(&raws, 12), write(&raws, 13)];
    tokio::time::sleep(SHORT).await;
    assert!(waiting.iter().all(|guest| !guest.is_finished()));
    (raws, waiting)
}

#[tokio::test]
async fn guests_wait_for_memory_and_go_on_as_the_target_takes_it() {
    let (raws, waiting) = full_memory(OnCbwError::default()).await;
    run(&raws, Owner::strict()).await.unwrap().unwrap();
    for guest in waiting {
        guest.await.unwrap().unwrap();
    }
    original(&raws).await;
}

#[tokio::test]
async fn guests_that_wait_pass_when_the_copy_is_cancelled() {
    let (raws, waiting) = full_memory(OnCbwError::default()).await;
    raws.target.hold(OpKind::Write);
    let running = run(&raws, Owner::strict());
    raws.target.wait_held(2).await;
    running.abort();
    let _ = running.await;
    for guest in waiting {
        timeout(LONG, guest).await.unwrap().unwrap().unwrap();
    }
    raws.target.release_all();
    raws.setup.copier.close().await.unwrap();
    timeout(LONG, write(&raws, 1))
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn a_target_that_fails_breaks_guests_writes_when_memory_is_full() {
    let (raws, waiting) = full_memory(OnCbwError::BreakGuestWrite).await;
    raws.target.fail_from(OpKind::Write, 0, Fault::NoSpace);
    let running = run(&raws, Owner::new(OnCopyError::Ignore));
    for guest in waiting {
        let error = timeout(LONG, guest).await.unwrap().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
    }
    raws.target.clear_faults();
    running.await.unwrap().unwrap();
    original(&raws).await;
}

#[tokio::test]
async fn or_breaks_the_copy_if_that_is_asked_for() {
    let (raws, waiting) = full_memory(OnCbwError::BreakSnapshot).await;
    raws.target.fail_from(OpKind::Write, 0, Fault::NoSpace);
    let running = run(&raws, Owner::new(OnCopyError::Ignore));
    for guest in waiting {
        timeout(LONG, guest).await.unwrap().unwrap().unwrap();
    }
    let error = timeout(LONG, running).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
}

#[tokio::test]
async fn no_guest_meets_an_error_that_ends_the_copy() {
    let (raws, waiting) = full_memory(OnCbwError::BreakGuestWrite).await;
    raws.target.fail_from(OpKind::Write, 0, Fault::Io);
    let running = run(&raws, Owner::strict());
    for guest in waiting {
        timeout(LONG, guest).await.unwrap().unwrap().unwrap();
    }
    running.await.unwrap().unwrap_err();
}

#[tokio::test]
async fn old_content_that_cannot_be_read_breaks_the_guests_write_or_the_copy() {
    for on_cbw_error in [OnCbwError::BreakGuestWrite, OnCbwError::BreakSnapshot] {
        let options = CopyOptions {
            on_cbw_error,
            ..CopyOptions::default()
        };
        let raws = raws(options).await;
        raws.setup.copier.activate().unwrap();
        raws.source.fail_once(OpKind::Read, 0, Fault::Io);
        let written = write(&raws, 5).await.unwrap();
        let copied = run(&raws, Owner::strict()).await.unwrap();
        match on_cbw_error {
            OnCbwError::BreakGuestWrite => {
                written.unwrap_err();
                copied.unwrap();
                original(&raws).await;
            }
            OnCbwError::BreakSnapshot => {
                written.unwrap();
                copied.unwrap_err();
            }
        }
    }
}

#[tokio::test]
async fn what_is_still_to_be_copied_is_not_cut_off() {
    let raws = raws(CopyOptions::default()).await;
    let guest = raws.setup.guest.clone();
    guest
        .resize(SIZE - CLUSTER, Preallocation::Off)
        .await
        .unwrap();
    raws.setup.copier.activate().unwrap_err();
    guest.resize(SIZE, Preallocation::Off).await.unwrap();
    put(&*guest, SIZE - CLUSTER, vec![16; CLUSTER as usize])
        .await
        .unwrap();
    raws.setup.copier.activate().unwrap();
    let refused = guest.resize(SIZE - 1, Preallocation::Off).await;
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::InUse);
    guest.resize(2 * SIZE, Preallocation::Off).await.unwrap();
    put(&*guest, SIZE - 512, vec![0xee; 1024]).await.unwrap();
    guest
        .resize(SIZE - CLUSTER, Preallocation::Off)
        .await
        .unwrap();
    run(&raws, Owner::strict()).await.unwrap().unwrap();
    original(&raws).await;
}

#[tokio::test]
async fn a_guest_that_gives_up_leaves_its_cluster_to_others() {
    let raws = raws(CopyOptions::default()).await;
    raws.setup.copier.activate().unwrap();
    raws.source.hold(OpKind::Read);
    let gone = write(&raws, 3);
    raws.source.wait_held(1).await;
    gone.abort();
    let _ = gone.await;
    raws.source.release_all();
    run(&raws, Owner::strict()).await.unwrap().unwrap();
    original(&raws).await;
}
