//! The allocator alone, on a disk in memory.

use super::grow::{Growth, plan};
use super::*;

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
