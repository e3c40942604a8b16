//! A refcount block in memory.

use std::ops::Range;

use super::super::counters::CounterWidth;
use super::super::geometry::Geometry;
use crate::units::HostOffset;

/// A block, where it lies, and what of it differs from the disk.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) host: HostOffset,
    pub(super) counters: Counters,
    /// Which 64ths of the block differ from the disk.
    pub(super) dirty: u64,
}

/// The counters of one block.
#[derive(Debug, Clone)]
pub(super) struct Counters {
    bytes: Box<[u8]>,
    order: u32,
    width: CounterWidth,
}

impl Counters {
    /// A block of zeroes.
    pub(super) fn zeroed(g: Geometry) -> Self {
        Counters::from_bytes(vec![0; g.cluster_size() as usize].into(), g)
    }

    /// A block as read; `bytes` is a cluster.
    pub(super) fn from_bytes(bytes: Box<[u8]>, g: Geometry) -> Self {
        assert_eq!(bytes.len() as u64, g.cluster_size());
        Counters {
            bytes,
            order: g.refcount_order(),
            width: CounterWidth::new(g.refcount_order()),
        }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn len(&self) -> usize {
        self.width.per_bytes(self.bytes.len() as u64) as usize
    }

    pub(super) fn get(&self, index: usize) -> u64 {
        self.width.get(&self.bytes, index)
    }

    pub(super) fn set(&mut self, index: usize, value: u64) {
        self.width.set(&mut self.bytes, index, value);
    }

    /// The smallest and the greatest counter of a run.
    pub(super) fn bounds(&self, first: usize, count: usize) -> (u64, u64) {
        self.width.bounds(&self.bytes, first..first + count)
    }

    /// Adds to a run of counters that have been checked to take it.
    pub(super) fn add(&mut self, first: usize, count: usize, more: u64) {
        self.width.add(&mut self.bytes, first..first + count, more);
    }

    /// Takes from a run of counters that have been checked to have it.
    pub(super) fn subtract(&mut self, first: usize, count: usize, less: u64) {
        self.width
            .subtract(&mut self.bytes, first..first + count, less);
    }

    /// How many counters from `first` on, at most `max`, are zero.
    pub(super) fn zero_run(&self, first: usize, max: usize) -> usize {
        let end = self.len().min(first.saturating_add(max));
        (first..end)
            .take_while(|&index| self.get(index) == 0)
            .count()
    }

    /// The first zero counter at or behind `first`.
    pub(super) fn next_zero(&self, first: usize) -> Option<usize> {
        (first..self.len()).find(|&index| self.get(index) == 0)
    }

    /// The bytes that hold a run of counters.
    pub(super) fn byte_range(&self, first: usize, count: usize) -> Range<usize> {
        let start = (first << self.order) / 8;
        let end = ((first + count) << self.order).div_ceil(8);
        start..end
    }
}
