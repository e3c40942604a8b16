//! New refcount blocks: nobody who allocates waits for them, and the refcount table is led to them in an order that a crash may end
//! anywhere.

use std::time::Duration;

use tokio::time::timeout;

use super::*;
use crate::driver::Preallocation;
use crate::formats::qcow2::check::check;
use crate::protocols::memory::{Change, Fault, OpKind, Record};

const SIZE: u64 = 1 << 20;
/// What a block counts: 64 clusters.
const BLOCK: u64 = 32 << 10;

fn options() -> CreateOptions {
    let mut options = CreateOptions::new(SIZE);
    (options.cluster_size, options.refcount_bits) = (512, 64);
    options
}

async fn assert_clean(disk: &Arc<Memory>) {
    let report = check(&disk.child()).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
}

#[tokio::test]
async fn who_allocates_does_not_wait_for_a_flush() {
    const SOON: Duration = Duration::from_secs(20);
    let disk = new_image(&options()).await;
    let image = open(&disk).await;
    let blocks = async || image.image.alloc.lock().await.unlinked().len();
    let flushes = disk.count(OpKind::Flush);
    disk.hold(OpKind::Flush);
    let written = write(&image, 0, vec![1; 4 * BLOCK as usize]);
    timeout(SOON, written).await.unwrap().unwrap();
    assert_eq!(disk.count(OpKind::Flush), flushes);
    assert!(blocks().await >= 4);
    // Nor while somebody else waits for one.
    let flushing = tokio::spawn({
        let image = image.clone();
        async move { image.flush().await }
    });
    disk.wait_held(1).await;
    let written = write(&image, 4 * BLOCK, vec![2; 4 * BLOCK as usize]);
    timeout(SOON, written).await.unwrap().unwrap();
    disk.release_all();
    flushing.await.unwrap().unwrap();
    // Those that were made meanwhile are left to the next flush.
    assert!(blocks().await >= 4);
    image.flush().await.unwrap();
    assert_eq!(blocks().await, 0);
    let mut expected = vec![1; SIZE as usize];
    expected[4 * BLOCK as usize..].fill(2);
    expected[8 * BLOCK as usize..].fill(0);
    verify(&disk, image, &expected).await;
}

/// Each request is lost alone, and each is kept alone, between any two flushes: also entries of the table in one sector, which a page
/// cache would keep together. `crashed` is the disk before the log. Answers how many flushes there were.
async fn assert_losses_do_no_harm(crashed: &Memory, log: &[Record]) -> usize {
    let is_flush = |at: &usize| matches!(log[*at].change, Change::Flush);
    let (mut start, mut flushes) = (0, 0);
    for end in (0..log.len()).filter(is_flush) {
        for chosen in start..end {
            for keep in [true, false] {
                let state = crashed.fork();
                for at in (start..end).filter(|at| (*at == chosen) == keep) {
                    state.apply(&log[at].change).unwrap();
                }
                let report = check(&state.child()).await.unwrap();
                assert_eq!(
                    report.corruptions, 0,
                    "{start}..{end}, {chosen}: {report:?}"
                );
            }
        }
        for record in &log[start..end] {
            crashed.apply(&record.change).unwrap();
        }
        start = end + 1;
        flushes += 1;
    }
    flushes
}

#[tokio::test]
async fn a_lost_entry_of_the_table_leaves_no_block_without_a_count() {
    let disk = new_image(&options()).await;
    let crashed = disk.fork();
    disk.start_log();
    let image = open(&disk).await;
    for nth in 0..3 {
        let at = nth * 5 * BLOCK;
        write(&image, at, vec![1; 5 * BLOCK as usize])
            .await
            .unwrap();
        image.flush().await.unwrap();
    }
    // Chains of blocks that count each other are linked one flush after another.
    assert!(assert_losses_do_no_harm(&crashed, &disk.log()).await > 9);
    image.close().await.unwrap();
    assert_clean(&disk).await;
}

#[tokio::test]
async fn a_grown_table_leads_to_no_block_without_a_count() {
    let disk = new_image(&options()).await;
    // The last but one of the blocks that the table has entries for is there, and counts the last one.
    disk.resize(62 * BLOCK + 1024, Preallocation::Off)
        .await
        .unwrap();
    let image = open(&disk).await;
    write(&image, 0, vec![1; 64]).await.unwrap();
    image.flush().await.unwrap();
    let crashed = disk.fork();
    disk.start_log();
    let table = image.image.header.get().refcount_table_clusters;
    disk.hold(OpKind::Flush);
    write(&image, BLOCK, vec![2; 5 * BLOCK as usize])
        .await
        .unwrap();
    // Nobody who allocates waits for it.
    assert_eq!(image.image.header.get().refcount_table_clusters, table);
    disk.release_all();
    image.flush().await.unwrap();
    assert!(image.image.header.get().refcount_table_clusters > table);
    assert!(assert_losses_do_no_harm(&crashed, &disk.log()).await > 2);
    image.close().await.unwrap();
    assert_clean(&disk).await;
}

/// What the second cluster of a refcount table makes room for.
const TABLE: u64 = 64 * BLOCK;

/// Lets an image outgrow its table, and the next one while the header is being led to that. Answers the disk as it was before.
async fn grow_while_switching(disk: &Arc<Memory>, image: &Arc<Qcow2>) -> Arc<Memory> {
    write(image, 0, vec![1; TABLE as usize]).await.unwrap();
    assert!(image.image.alloc.lock().await.has_grown());
    let crashed = disk.fork();
    disk.start_log();
    // That of the counters, and that of the table in front of the header.
    disk.hold(OpKind::Flush);
    let flushing = tokio::spawn({
        let image = image.clone();
        async move { image.flush().await }
    });
    disk.wait_held(1).await;
    write(image, TABLE, vec![2; 3 * TABLE as usize])
        .await
        .unwrap();
    disk.release_all();
    let _ = flushing.await.unwrap();
    crashed
}

#[tokio::test]
async fn a_table_grows_again_while_the_header_is_led_to_it() {
    let mut options = options();
    options.size = 4 * TABLE;
    for fault in [None, Some(0), Some(1), Some(2)] {
        let disk = new_image(&options).await;
        let image = open(&disk).await;
        if let Some(nth) = fault {
            disk.fail_once(OpKind::Flush, nth, Fault::Io);
        }
        let crashed = grow_while_switching(&disk, &image).await;
        let before = image.image.header.get().refcount_table_clusters;
        image.flush().await.unwrap();
        assert!(image.image.header.get().refcount_table_clusters > before);
        if fault.is_none() {
            assert!(assert_losses_do_no_harm(&crashed, &disk.log()).await > 3);
        }
        let mut expected = vec![1; 4 * TABLE as usize];
        expected[TABLE as usize..].fill(2);
        assert_same(&read(&image, 0, 4 * TABLE).await, &expected);
        image.close().await.unwrap();
        assert_clean(&disk).await;
    }
}

#[tokio::test]
async fn a_flush_needs_no_space_for_a_block() {
    let disk = new_image(&CreateOptions::new(1 << 30)).await;
    let image = open(&disk).await;
    write(&image, 0, vec![1; 4096]).await.unwrap();
    image.close().await.unwrap();
    // The next entry of the table lies in a part of it that was never written.
    disk.resize(1 << 40, Preallocation::Off).await.unwrap();
    let image = open(&disk).await;
    let before = disk.allocated();
    // Another L2 table goes to the end of the file.
    write(&image, 512 << 20, vec![1; 4096]).await.unwrap();
    let written = disk.allocated();
    assert!(written > before);
    assert_eq!(image.image.alloc.lock().await.unlinked(), [512]);
    disk.set_space_limit(Some(written));
    image.flush().await.unwrap();
    assert!(image.image.alloc.lock().await.unlinked().is_empty());
    assert_eq!(disk.allocated(), written);
}

#[tokio::test]
async fn what_could_not_be_linked_is_linked_by_the_next_flush() {
    // How many writes, and how many flushes, succeed behind the first that is to come.
    let cases = (0..12).map(|nth| (OpKind::Write, nth));
    let cases = cases.chain((0..4).map(|nth| (OpKind::Flush, nth)));
    for (kind, nth) in cases {
        let disk = new_image(&options()).await;
        let image = open(&disk).await;
        write(&image, 0, vec![1; 5 * BLOCK as usize]).await.unwrap();
        disk.fail_once(kind, nth, Fault::Io);
        let failed = image.flush().await.is_err();
        disk.clear_faults();
        // Writes go on as before.
        write(&image, 5 * BLOCK, vec![1; 5 * BLOCK as usize])
            .await
            .unwrap();
        image.flush().await.unwrap();
        assert!(failed || nth > 2, "{kind:?} {nth}");
        let mut expected = vec![1; SIZE as usize];
        expected[10 * BLOCK as usize..].fill(0);
        assert_same(&read(&image, 0, SIZE).await, &expected);
        image.close().await.unwrap();
        assert_clean(&disk).await;
    }
}
