//! The allocator alone, on a disk in memory.

use super::blocks::joined;
use super::grow::{Growth, plan};
use super::*;
use crate::formats::qcow2::create::{CreateOptions, create};
use crate::formats::qcow2::testing::block_on;
use crate::formats::qcow2::{OpenOptions, Qcow2};
use crate::protocols::memory::Memory;

#[test]
fn a_grown_table_counts_its_own_area_at_every_geometry() {
    for bits in 9..=21 {
        for order in 0..=6 {
            let g = Geometry::new(bits, order);
            let per_cluster = g.cluster_size() / ENTRY_SIZE;
            for old in [1, 2, 7] {
                let entries = old * per_cluster;
                let Ok(Growth { blocks, clusters }) = plan(g, entries, entries) else {
                    continue;
                };
                assert!(blocks * g.refcounts_per_block() >= blocks + clusters);
                assert!(clusters * per_cluster >= entries + blocks);
                assert!(clusters << bits <= limits::QCOW2_MAX_REFTABLE_BYTES);
            }
        }
    }
}

#[test]
fn a_full_table_says_so() {
    let g = Geometry::new(9, 4);
    let entries = limits::QCOW2_MAX_REFTABLE_BYTES / ENTRY_SIZE;
    let error = plan(g, entries, entries).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
}

#[test]
fn dirty_bits_cover_the_bytes_that_changed() {
    for size in [512, 4096, 65536, 2 << 20] {
        let slice = slice_size(size);
        assert_eq!(dirty_ranges(slice_mask(0..1, size), size)[0], 0..slice);
        assert_eq!(dirty_ranges(slice_mask(0..size, size), size), vec![0..size]);
        let last = slice_mask(size - 8..size, size);
        assert_eq!(dirty_ranges(last, size)[0], size - slice..size);
    }
}

#[test]
fn small_gaps_are_written_with_what_is_around_them() {
    let ranges = vec![0..1024, 2048..3072, 7168..8192, 11264..12288];
    assert_eq!(joined(ranges), [0..3072, 7168..12288]);
    assert_eq!(joined(vec![0..1024, 5120..6144]).len(), 2);
    assert!(joined(Vec::new()).is_empty());
}

/// What was counted of `runs`, one cluster after the other.
async fn counts(alloc: &mut Allocator, runs: &[Run]) -> Vec<u64> {
    let mut counts = Vec::new();
    for index in runs.iter().flat_map(|run| run.start.0..run.end()) {
        counts.push(alloc.count(ClusterIndex(index)).await.unwrap());
    }
    counts
}

#[test]
fn references_of_many_blocks_are_added_and_taken_as_one() {
    block_on(async {
        let disk = Memory::new(0);
        let mut options = CreateOptions::new(4 << 20);
        (options.cluster_size, options.refcount_bits) = (512, 4);
        create(&disk.child(), &options).await.unwrap();
        let image = open(&disk).await;
        let mut alloc = image.image.alloc.lock().await;
        // Three blocks count these.
        let mut reserved = alloc.allocate(3000).await.unwrap();
        let start = reserved.run().start;
        let runs: Vec<Run> = (0..3000)
            .filter(|nth| nth % 3 < 2 && nth % 7 != 0)
            .map(|nth| Run {
                start: start + nth,
                count: 1,
            })
            .collect();
        let twice = [&runs[..], &runs[runs.len() - 1..]].concat();
        assert_eq!(alloc.raise(&twice, 6).await.unwrap(), 0);
        let mut expected = vec![7; runs.len()];
        *expected.last_mut().unwrap() = 13;
        assert_eq!(counts(&mut alloc, &runs).await, expected);
        // The last one is too narrow for it.
        let error = alloc.raise(&runs, 3).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        assert_eq!(counts(&mut alloc, &runs).await, expected);
        let lowered = alloc.lower(&runs, 7).await.unwrap();
        assert_eq!(lowered.uncounted, 0);
        let clusters = lowered.last.iter().map(|run| run.count).sum::<u64>();
        assert_eq!(clusters, runs.len() as u64 - 1);
        *expected.last_mut().unwrap() = 6;
        expected[..runs.len() - 1].fill(1);
        assert_eq!(counts(&mut alloc, &runs).await, expected);
        let all: Vec<_> = runs.iter().map(|run| run.start).collect();
        let singles = alloc.singles(&all).await.unwrap();
        assert_eq!(singles.iter().filter(|single| !**single).count(), 1);
        reserved.publish(3000);
    });
}

/// An allocator of a new image with small blocks, where these clusters are in use: eight blocks count them.
async fn many_blocks(disk: &Arc<Memory>) -> (Arc<Qcow2>, Run) {
    let mut options = CreateOptions::new(4 << 20);
    options.cluster_size = 512;
    create(&disk.child(), &options).await.unwrap();
    let image = open(disk).await;
    let mut alloc = image.image.alloc.lock().await;
    let mut reserved = alloc.allocate(2000).await.unwrap();
    let run = reserved.run();
    reserved.publish(2000);
    drop(alloc);
    (image, run)
}

async fn open(disk: &Arc<Memory>) -> Arc<Qcow2> {
    let opening = Qcow2::open(disk.child(), OpenOptions::default()).await;
    opening.unwrap().finish(None).await.unwrap()
}

#[test]
fn the_greatest_count_is_found_piece_by_piece_and_kept_up() {
    block_on(async {
        for (grows_by, wanted) in [(2, 7), (20, 21)] {
            let disk = Memory::new(0);
            let (image, run) = many_blocks(&disk).await;
            let at = |nth| Run {
                start: run.start + nth,
                count: 1,
            };
            {
                let mut alloc = image.image.alloc.lock().await;
                alloc.raise(&[at(1500)], 6).await.unwrap();
                let dirty = alloc.dirty_blocks();
                alloc.write_blocks(&dirty).await.unwrap();
                let new = alloc.unlinked();
                alloc.link(&new).await.unwrap();
            }
            let image = open(&disk).await;
            let mut alloc = image.image.alloc.lock().await;
            let mut pieces = 1;
            while !alloc.look_in_next(1024).await.unwrap() {
                assert_eq!(alloc.greatest_of_all(), None);
                if pieces == 1 {
                    // In a block that has been looked at.
                    alloc.raise(&[at(0)], grows_by).await.unwrap();
                }
                pieces += 1;
            }
            assert!(pieces > 3, "only {pieces} pieces");
            assert_eq!(alloc.greatest_of_all(), Some(wanted));
            alloc.raise(&[at(700)], 30).await.unwrap();
            assert_eq!(alloc.greatest_of_all(), Some(31));
            assert!(alloc.look_for_greatest().await.unwrap());
            // It may be less again: what is known is a bound.
            alloc.lower(&[at(700)], 30).await.unwrap();
            assert_eq!(alloc.greatest_of_all(), Some(31));
        }
    });
}
