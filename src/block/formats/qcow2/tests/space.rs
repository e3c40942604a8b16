//! Full disks: what the guest has discarded, and what deleted snapshots held, is there for its next write.

use std::time::Duration;

use super::*;
use crate::driver::{NewSnapshot, Preallocation, RequestLimits, SnapshotSelector, Snapshots};
use crate::error::ErrorKind;
use crate::formats::qcow2::check::check;
use crate::protocols::memory::{Fault, OpKind};

const SIZE: u64 = 4 << 20;
const CLUSTER: u64 = 4096;

fn options() -> CreateOptions {
    let mut options = CreateOptions::new(SIZE);
    options.cluster_size = CLUSTER;
    options
}

async fn open_with(disk: &Arc<Memory>, pass_discard: bool) -> Arc<Qcow2> {
    let options = OpenOptions {
        pass_discard,
        pass_discard_snapshot: pass_discard,
        ..OpenOptions::default()
    };
    let opening = Qcow2::open(disk.child(), options).await.unwrap();
    opening.finish(None).await.unwrap()
}

/// An image whose first MiB is written, on a disk that has no page left.
async fn full(pass_discard: bool) -> (Arc<Memory>, Arc<Qcow2>) {
    let disk = new_image(&options()).await;
    let image = open_with(&disk, pass_discard).await;
    write(&image, 0, vec![1; 1 << 20]).await.unwrap();
    image.flush().await.unwrap();
    disk.set_space_limit(Some(disk.allocated()));
    assert_full(&image).await;
    (disk, image)
}

async fn assert_full(image: &Qcow2) {
    let error = write(image, 3 << 20, vec![2; 4096]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
}

async fn assert_sound(disk: &Arc<Memory>, image: Arc<Qcow2>, expected: &[u8]) {
    assert_same(&read(&image, 0, SIZE).await, expected);
    image.close().await.unwrap();
    let report = check(&disk.child()).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
}

#[tokio::test]
async fn discarded_clusters_take_the_next_write_without_a_flush() {
    for pass_discard in [true, false] {
        let (disk, image) = full(pass_discard).await;
        let mut expected = vec![0; SIZE as usize];
        expected[..1 << 20].fill(1);
        image.discard(64 << 10, 64 << 10).await.unwrap();
        expected[64 << 10..128 << 10].fill(0);
        write(&image, 1 << 20, vec![3; 64 << 10]).await.unwrap();
        expected[1 << 20..][..64 << 10].fill(3);
        assert_full(&image).await;
        // Zeroes free as well, and more than one write uses what they free.
        image.write_zeroes(0, 64 << 10, unmap()).await.unwrap();
        expected[..64 << 10].fill(0);
        for index in 0..8 {
            let at = (1 << 20) + (64 << 10) + index * 8192;
            write(&image, at, vec![4; 8192]).await.unwrap();
            expected[at as usize..][..8192].fill(4);
        }
        assert_full(&image).await;
        image.discard(512 << 10, 4096).await.unwrap();
        expected[512 << 10..][..4096].fill(0);
        let bytes = Data::from(vec![5; 4096]);
        image.write_compressed(1536 << 10, bytes).await.unwrap();
        expected[1536 << 10..][..4096].fill(5);
        assert_sound(&disk, image, &expected).await;
    }
}

#[tokio::test]
async fn a_device_without_free_clusters_is_full_in_the_same_way() {
    let disk = Memory::with_content(&vec![0xee; 1 << 20]);
    disk.set_limits(RequestLimits {
        alignment: 1,
        preferred: 512,
        growable: false,
    });
    create(&disk.child(), &options()).await.unwrap();
    let image = open_with(&disk, false).await;
    let mut expected = vec![0; SIZE as usize];
    let mut written = 0;
    while write(&image, written, vec![1; 4096]).await.is_ok() {
        expected[written as usize..][..4096].fill(1);
        written += 4096;
    }
    assert!(written > 900 << 10);
    image.discard(0, 32 << 10).await.unwrap();
    expected[..32 << 10].fill(0);
    write(&image, 2 << 20, vec![2; 28 << 10]).await.unwrap();
    expected[2 << 20..][..28 << 10].fill(2);
    assert_sound(&disk, image, &expected).await;
}

#[tokio::test]
async fn what_a_deleted_snapshot_held_takes_the_next_write() {
    for pass_discard in [true, false] {
        let disk = new_image(&options()).await;
        let image = open_with(&disk, pass_discard).await;
        write(&image, 0, vec![1; 1 << 20]).await.unwrap();
        image.create(NewSnapshot::named("old")).await.unwrap();
        write(&image, 0, vec![2; 1 << 20]).await.unwrap();
        image.flush().await.unwrap();
        disk.set_space_limit(Some(disk.allocated()));
        assert_full(&image).await;
        let which = SnapshotSelector {
            id: None,
            name: Some("old".to_owned()),
        };
        image.delete(which).await.unwrap();
        write(&image, 1 << 20, vec![3; 512 << 10]).await.unwrap();
        let mut expected = vec![0; SIZE as usize];
        expected[..1 << 20].fill(2);
        expected[1 << 20..][..512 << 10].fill(3);
        assert_sound(&disk, image, &expected).await;
    }
}

#[tokio::test]
async fn a_resize_on_a_full_disk_uses_what_was_discarded() {
    let (disk, image) = full(true).await;
    // The L1 table has to move.
    let size = 8 << 30;
    let refused = image.resize(size, Preallocation::Off).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NoSpace);
    assert_eq!(image.size(), SIZE);
    image.discard(0, 256 << 10).await.unwrap();
    image.resize(size, Preallocation::Off).await.unwrap();
    let mut expected = vec![0; SIZE as usize];
    expected[256 << 10..1 << 20].fill(1);
    assert_sound(&disk, image, &expected).await;
}

#[tokio::test]
async fn storage_that_fails_meanwhile_leaves_the_disk_full() {
    for kind in [OpKind::Flush, OpKind::Write] {
        for skip in 0..6 {
            let (disk, image) = full(false).await;
            image.discard(0, 64 << 10).await.unwrap();
            disk.fail_once(kind, skip, Fault::Io);
            let written = write(&image, 1 << 20, vec![7; 4096]).await;
            disk.clear_faults();
            let mut expected = vec![0; SIZE as usize];
            expected[64 << 10..1 << 20].fill(1);
            if written.is_err() {
                write(&image, 1 << 20, vec![7; 4096]).await.unwrap();
            }
            expected[1 << 20..][..4096].fill(7);
            assert_sound(&disk, image, &expected).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_writers_on_a_full_disk_do_not_wait_for_each_other_for_ever() {
    let (disk, image) = full(true).await;
    let mut tasks = Vec::new();
    for worker in 0..6_u64 {
        let image = image.clone();
        tasks.push(tokio::spawn(async move {
            let mut random = fastrand::Rng::with_seed(worker);
            let mut full = 0;
            for step in 0..150 {
                let at = random.u64(..SIZE / CLUSTER - 8) * CLUSTER;
                let len = random.u64(1..8) * CLUSTER;
                match step % 3 {
                    0 => image.discard(at, len).await.unwrap(),
                    _ => match write(&image, at, vec![9; len as usize]).await {
                        Ok(()) => {}
                        Err(error) if error.kind() == ErrorKind::NoSpace => full += 1,
                        Err(error) => panic!("{error}"),
                    },
                }
            }
            full
        }));
    }
    let mut full = 0;
    for task in tasks {
        let ended = tokio::time::timeout(Duration::from_secs(60), task).await;
        full += ended.unwrap().unwrap();
    }
    assert!(full > 0, "the disk was never full");
    disk.set_space_limit(None);
    image.close().await.unwrap();
    let report = check(&disk.child()).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
}

#[tokio::test]
async fn the_first_flush_of_a_new_image_needs_no_space() {
    // Tables of one page and of several: their entries at the end are used first.
    for size in [SIZE, 1 << 34] {
        let mut options = options();
        options.size = size;
        let disk = new_image(&options).await;
        let image = open_with(&disk, true).await;
        write(&image, size - CLUSTER, vec![1; CLUSTER as usize])
            .await
            .unwrap();
        disk.set_space_limit(Some(disk.allocated()));
        image.flush().await.unwrap();
        image.close().await.unwrap();
        let report = check(&disk.child()).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
    }
}
