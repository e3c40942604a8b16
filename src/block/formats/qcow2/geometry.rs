//! Arithmetic of one image's geometry: clusters, L2 tables, refcount blocks.
//!
//! Everything here is total for values that passed `Header::validate`.

use std::ops::Range;

use crate::limits::QCOW2_MIN_EXTENDED_CLUSTER_BITS;
use crate::units::{ClusterIndex, GuestOffset, HostOffset};

/// Bytes of an L1 entry, and of a refcount table entry. L2 entries may be larger: [`Geometry::l2_entry_size`].
pub(crate) const ENTRY_SIZE: u64 = 8;

/// log2 of the number of subclusters of a cluster, where it has any (specification: "Extended L2 Entries").
pub(crate) const SUBCLUSTER_ORDER: u32 = 5;

/// The number of a cluster of the guest's disk; `ClusterIndex` numbers those of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct GuestCluster(pub(crate) u64);

/// What cluster size, refcount width and the kind of L2 entries fix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    cluster_bits: u32,
    refcount_order: u32,
    extended_l2: bool,
}

impl Geometry {
    /// A geometry within the specification's limits.
    ///
    /// # Panics
    /// When `cluster_bits` is not 9..=21 or `refcount_order` above 6; the header's validation comes first.
    pub(crate) fn new(cluster_bits: u32, refcount_order: u32) -> Self {
        assert!((9..=21).contains(&cluster_bits) && refcount_order <= 6);
        Geometry {
            cluster_bits,
            refcount_order,
            extended_l2: false,
        }
    }

    /// The same with extended L2 entries: two words each, and clusters of 32 subclusters.
    ///
    /// # Panics
    /// When a subcluster would be smaller than a sector; the header's validation comes first.
    pub(crate) fn with_extended_l2(self) -> Self {
        assert!(self.cluster_bits >= QCOW2_MIN_EXTENDED_CLUSTER_BITS);
        Geometry {
            extended_l2: true,
            ..self
        }
    }

    /// Whether L2 entries are extended.
    pub(crate) fn has_extended_l2(self) -> bool {
        self.extended_l2
    }

    /// log2 of the cluster size.
    pub(crate) fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    /// Bytes of a cluster.
    pub(crate) fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// log2 of the refcount width in bits.
    pub(crate) fn refcount_order(self) -> u32 {
        self.refcount_order
    }

    /// Width of a refcount in bits.
    pub(crate) fn refcount_bits(self) -> u32 {
        1 << self.refcount_order
    }

    /// The greatest count that a refcount can hold.
    pub(crate) fn refcount_max(self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Bytes of an L2 entry.
    pub(crate) fn l2_entry_size(self) -> u64 {
        ENTRY_SIZE << u32::from(self.extended_l2)
    }

    /// log2 of the entries of an L2 table.
    fn l2_bits(self) -> u32 {
        self.cluster_bits - ENTRY_SIZE.trailing_zeros() - u32::from(self.extended_l2)
    }

    /// Entries of an L2 table.
    pub(crate) fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    /// Subclusters of a cluster. A cluster with a standard entry is its only subcluster.
    pub(crate) fn subclusters(self) -> u32 {
        1 << (self.cluster_bits - self.subcluster_bits())
    }

    /// log2 of the size of a subcluster.
    pub(crate) fn subcluster_bits(self) -> u32 {
        match self.extended_l2 {
            true => self.cluster_bits - SUBCLUSTER_ORDER,
            false => self.cluster_bits,
        }
    }

    /// Bytes of a subcluster: the unit in which guest data are allocated, zeroed and discarded.
    pub(crate) fn subcluster_size(self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// The subclusters that a range inside of a cluster touches.
    pub(crate) fn subclusters_of(self, from: u64, len: u64) -> Range<u32> {
        let first = from >> self.subcluster_bits();
        let end = (from + len).div_ceil(self.subcluster_size());
        first as u32..end as u32
    }

    /// Bytes of guest disk behind one L2 table.
    pub(crate) fn l2_span(self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// Counters of a refcount block.
    pub(crate) fn refcounts_per_block(self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub(crate) fn l1_entries_for(self, size: u64) -> u64 {
        size.div_ceil(self.l2_span())
    }

    /// Clusters that hold `bytes` bytes.
    pub(crate) fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// Offset inside its cluster.
    pub(crate) fn in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// Whether the offset is the start of a cluster.
    pub(crate) fn is_aligned(self, offset: u64) -> bool {
        self.in_cluster(offset) == 0
    }

    /// The guest cluster that holds the offset.
    pub(crate) fn guest_cluster(self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.cluster_bits)
    }

    /// Where the guest cluster starts.
    pub(crate) fn guest_offset(self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset(cluster.0 << self.cluster_bits)
    }

    /// Index in the L1 table of the entry for a guest cluster.
    pub(crate) fn l1_index(self, cluster: GuestCluster) -> usize {
        (cluster.0 >> self.l2_bits()) as usize
    }

    /// Index in the L2 table of the entry for a guest cluster.
    pub(crate) fn l2_index(self, cluster: GuestCluster) -> usize {
        (cluster.0 & (self.l2_entries() - 1)) as usize
    }

    /// The host cluster that holds the offset.
    pub(crate) fn host_cluster(self, offset: HostOffset) -> ClusterIndex {
        ClusterIndex(offset.0 >> self.cluster_bits)
    }

    /// Where the host cluster starts.
    pub(crate) fn host_offset(self, cluster: ClusterIndex) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// Which refcount block counts a cluster: the index in the refcount table.
    pub(crate) fn refblock_of(self, cluster: ClusterIndex) -> usize {
        (cluster.0 / self.refcounts_per_block()) as usize
    }

    /// Index of a cluster's counter inside its refcount block.
    pub(crate) fn in_refblock(self, cluster: ClusterIndex) -> usize {
        (cluster.0 & (self.refcounts_per_block() - 1)) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_geometry_has_the_well_known_numbers() {
        let g = Geometry::new(16, 4);
        assert_eq!(g.l2_entries(), 8192);
        assert_eq!(g.l2_span(), 512 << 20);
        assert_eq!(g.refcounts_per_block(), 32768);
        assert_eq!(g.refcount_max(), 65535);
        assert_eq!(g.l1_entries_for(1 << 40), 2048);
        assert_eq!(g.l1_entries_for((1 << 40) + 1), 2049);
    }

    #[test]
    fn extended_entries_halve_the_tables_and_divide_the_clusters() {
        let g = Geometry::new(17, 4).with_extended_l2();
        assert_eq!(g.l2_entries(), 8192);
        assert_eq!(g.l2_span(), 1 << 30);
        assert_eq!(g.subclusters(), 32);
        assert_eq!(g.subcluster_size(), 4096);
        assert_eq!(g.subclusters_of(4095, 2), 0..2);
        assert_eq!(g.subclusters_of(4096, 4096), 1..2);
        assert_eq!(Geometry::new(17, 4).subclusters(), 1);
        let smallest = Geometry::new(14, 4).with_extended_l2();
        assert_eq!(smallest.subcluster_size(), 512);
        assert_eq!(g.l1_index(g.guest_cluster(GuestOffset(5 << 30))), 5);
    }

    #[test]
    fn extreme_geometries_do_not_overflow() {
        let small = Geometry::new(9, 6);
        assert_eq!(small.refcounts_per_block(), 64);
        assert_eq!(small.refcount_max(), u64::MAX);
        let large = Geometry::new(21, 0);
        assert_eq!(large.refcounts_per_block(), 1 << 24);
        assert_eq!(large.refcount_max(), 1);
        let last = large.guest_cluster(GuestOffset(u64::MAX));
        assert_eq!(large.l1_index(last), (1 << 25) - 1);
        assert_eq!(large.l2_index(last), (1 << 18) - 1);
    }
}
