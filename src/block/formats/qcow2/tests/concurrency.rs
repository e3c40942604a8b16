//! Many requests at once: overlapping writes, discards racing allocating writes, dropped requests.

use std::time::Duration;

use super::*;
use crate::driver::Preallocation;
use crate::protocols::memory::OpKind;

const SIZE: u64 = 2 << 20;

fn options(cluster_size: u64) -> CreateOptions {
    let mut options = CreateOptions::new(SIZE);
    options.cluster_size = cluster_size;
    options
}

/// Each worker owns every 16th piece of 1000 bytes, so that all share clusters and none shares bytes.
const WORKERS: u64 = 16;
const PIECE: u64 = 1000;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn neighbours_in_a_cluster_never_lose_each_others_bytes() {
    for (cluster_size, extended_l2) in [(512, false), (4096, false), (65536, false), (65536, true)]
    {
        let mut options = options(cluster_size);
        options.extended_l2 = extended_l2;
        let disk = new_image(&options).await;
        let image = open(&disk).await;
        let mut tasks = Vec::new();
        for worker in 0..WORKERS {
            let image = image.clone();
            tasks.push(tokio::spawn(async move {
                let mut random = fastrand::Rng::with_seed(worker);
                let mut mine = std::collections::HashMap::new();
                for _ in 0..150 {
                    let piece = random.u64(..SIZE / PIECE / WORKERS) * WORKERS + worker;
                    let at = piece * PIECE;
                    if random.u8(..5) == 0 {
                        image.write_zeroes(at, PIECE, unmap()).await.unwrap();
                        mine.insert(at, 0);
                    } else {
                        let byte = random.u8(1..);
                        write(&image, at, vec![byte; PIECE as usize]).await.unwrap();
                        mine.insert(at, byte);
                    }
                    if random.u8(..30) == 0 {
                        image.flush().await.unwrap();
                    }
                }
                mine
            }));
        }
        let mut model = vec![0; SIZE as usize];
        for task in tasks {
            for (at, byte) in task.await.unwrap() {
                model[at as usize..(at + PIECE) as usize].fill(byte);
            }
        }
        assert_same(&read(&image, 0, SIZE).await, &model);
        verify(&disk, image, &model).await;
    }
}

/// Every cluster holds one worker's stamp, or zeroes, never a mix of clusters: what a freed cluster that is reused too
/// early would show.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn discards_that_race_writes_never_show_foreign_bytes() {
    const CLUSTER: u64 = 4096;
    let disk = new_image(&options(CLUSTER)).await;
    let image = open(&disk).await;
    let clusters = 64;
    let mut tasks = Vec::new();
    for worker in 0..12_u64 {
        let image = image.clone();
        tasks.push(tokio::spawn(async move {
            let mut random = fastrand::Rng::with_seed(worker);
            for _ in 0..400 {
                let cluster = random.u64(..clusters);
                let at = cluster * CLUSTER;
                match random.u8(..8) {
                    0..3 => {
                        let stamp = cluster as u8 + 1;
                        let part = random.u64(1..=CLUSTER);
                        write(&image, at, vec![stamp; part as usize]).await.unwrap();
                    }
                    3 => image.discard(at, CLUSTER * 3).await.unwrap(),
                    4 => image.write_zeroes(at, CLUSTER, unmap()).await.unwrap(),
                    5 => image.flush().await.unwrap(),
                    _ => {
                        let bytes = read(&image, at, CLUSTER).await;
                        let stamp = cluster as u8 + 1;
                        assert!(
                            bytes.iter().all(|byte| *byte == 0 || *byte == stamp),
                            "foreign bytes in cluster {cluster}"
                        );
                    }
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let content = read(&image, 0, SIZE).await;
    for (cluster, bytes) in content.chunks(CLUSTER as usize).enumerate().take(100) {
        let stamp = cluster as u8 + 1;
        assert!(bytes.iter().all(|byte| *byte == 0 || *byte == stamp));
    }
    verify(&disk, image, &content).await;
}

#[tokio::test]
async fn allocating_writes_to_one_new_table_run_side_by_side() {
    let disk = new_image(&options(4096)).await;
    let image = open(&disk).await;
    write(&image, 0, vec![1; 10]).await.unwrap();
    disk.hold(OpKind::Write);
    let mut tasks = Vec::new();
    for index in 1..9_u64 {
        let image = image.clone();
        tasks.push(tokio::spawn(async move {
            write(&image, index * 4096, vec![2; 100]).await.unwrap();
        }));
    }
    tokio::time::timeout(HANGS_AFTER, disk.wait_held(8))
        .await
        .expect("all eight writes are under way at once");
    disk.release_all();
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn a_dropped_write_keeps_its_cluster_until_it_has_landed() {
    let disk = new_image(&options(4096)).await;
    let image = open(&disk).await;
    write(&image, 0, vec![1; 4096]).await.unwrap();
    disk.hold(OpKind::Write);
    let late = write(&image, 40_960, vec![0xdd; 4096]);
    let dropped = tokio::time::timeout(Duration::from_millis(10), late).await;
    assert!(dropped.is_err());
    assert_eq!(disk.held(), 1);
    // Others go on meanwhile. Their writes are let through, the first one is not.
    let mut others = Vec::new();
    for index in 1..5_u64 {
        let image = image.clone();
        others.push(tokio::spawn(async move {
            write(&image, index * 4096, vec![index as u8; 4096])
                .await
                .unwrap();
        }));
    }
    disk.wait_held(5).await;
    for _ in 0..4 {
        assert!(disk.release_one(1));
    }
    for other in others {
        other.await.unwrap();
    }
    disk.release_all();
    let mut model = vec![0; SIZE as usize];
    for (index, byte) in [1, 1, 2, 3, 4].into_iter().enumerate() {
        model[index * 4096..][..4096].fill(byte);
    }
    // Closing waits for the dropped one, which has then happened.
    model[40_960..45_056].fill(0xdd);
    verify(&disk, image, &model).await;
}

#[tokio::test]
async fn a_freed_cluster_waits_for_those_who_read_it() {
    let disk = new_image(&options(4096)).await;
    let image = open(&disk).await;
    write(&image, 0, vec![1; 4096]).await.unwrap();
    image.flush().await.unwrap();
    disk.hold(OpKind::Read);
    let reader = {
        let image = image.clone();
        tokio::spawn(async move { read(&image, 0, 4096).await })
    };
    disk.wait_held(1).await;
    image.discard(0, 4096).await.unwrap();
    for _ in 0..4 {
        image.flush().await.unwrap();
    }
    for index in 1..20 {
        write(&image, index * 4096, vec![0xbb; 4096]).await.unwrap();
    }
    disk.release_all();
    assert_same(&reader.await.unwrap(), &[1; 4096]);
    image.close().await.unwrap();
}

/// The write-back has copied the tables before.
#[tokio::test]
async fn a_cluster_unlinked_in_the_middle_of_a_write_back_waits_for_the_next_one() {
    let disk = new_image(&options(4096)).await;
    let image = open(&disk).await;
    write(&image, 0, vec![1; 4096]).await.unwrap();
    image.flush().await.unwrap();
    write(&image, 8192, vec![2; 4096]).await.unwrap();
    disk.hold(OpKind::Flush);
    let flush = {
        let image = image.clone();
        tokio::spawn(async move { image.flush().await })
    };
    disk.wait_held(1).await;
    image.discard(0, 4096).await.unwrap();
    disk.release_all();
    flush.await.unwrap().unwrap();
    for index in 3..20 {
        write(&image, index * 4096, vec![0xbb; 4096]).await.unwrap();
    }
    // A crash: the old entry still leads to the cluster.
    let crashed = open(&disk.fork()).await;
    assert_same(&read(&crashed, 0, 4096).await, &[1; 4096]);
    image.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn resizes_among_requests_wait_for_them() {
    let disk = new_image(&options(512)).await;
    let image = open(&disk).await;
    let mut tasks = Vec::new();
    for worker in 0..8_u64 {
        let image = image.clone();
        tasks.push(tokio::spawn(async move {
            for step in 0..60_u64 {
                if worker == 0 {
                    let size = SIZE * (step % 5 + 1);
                    image.resize(size, Preallocation::Off).await.unwrap();
                } else {
                    let at = (worker * 60 + step) * 3000;
                    write(&image, at, vec![worker as u8; 3000]).await.unwrap();
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    image.resize(SIZE, Preallocation::Off).await.unwrap();
    let mut model = vec![0; SIZE as usize];
    for worker in 1..8 {
        model[worker * 180_000..(worker + 1) * 180_000].fill(worker as u8);
    }
    verify(&disk, image, &model).await;
}
