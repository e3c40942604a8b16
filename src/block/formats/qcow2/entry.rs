//! Entries of L1, L2 and refcount tables, and what they mean.
//!
//! The types wrap the 64-bit values in host byte order; tables are big endian on disk.

use std::fmt;

use super::geometry::Geometry;
use super::subclusters::{State, Subclusters};
use crate::units::{ClusterIndex, HostOffset};

/// Bits 9 to 55: a host offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63: the refcount of what the entry points to is exactly 1.
const COPIED: u64 = 1 << 63;
/// Bit 62: the cluster is stored compressed.
const COMPRESSED: u64 = 1 << 62;
/// Bit 0: the cluster reads as zeroes (version 3).
const ZERO: u64 = 1;

/// Why an entry cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BadEntry {
    /// The offset is not a multiple of the cluster size.
    Unaligned(HostOffset),
    /// Bits are set that the specification reserves.
    Reserved(u64),
    /// The zero flag in an image whose version has none.
    ZeroInV2,
    /// A bitmap of subclusters that contradicts itself or the descriptor.
    Subclusters(u64),
    /// A compressed cluster in an image with an external data file.
    CompressedOutside,
    /// A cluster of an external data file that is not where the guest cluster is.
    Misplaced {
        /// Where the entry says that it is.
        host: HostOffset,
        /// Where it must be.
        place: HostOffset,
    },
}

/// An entry of an L1 table (block by block: "L1 table entry" of the specification).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct L1Entry(pub(crate) u64);

impl L1Entry {
    /// Points to an L2 table.
    pub(crate) fn new(l2: HostOffset, copied: bool) -> Self {
        debug_assert_eq!(l2.0 & !OFFSET_MASK, 0);
        L1Entry(l2.0 | if copied { COPIED } else { 0 })
    }

    /// Where the L2 table lies; `None` when there is none. Reserved bits do not count.
    pub(crate) fn l2_offset(self) -> Option<HostOffset> {
        match self.0 & OFFSET_MASK {
            0 => None,
            offset => Some(HostOffset(offset)),
        }
    }

    /// The offset, checked for alignment and reserved bits.
    pub(crate) fn checked(self, g: Geometry) -> Result<Option<HostOffset>, BadEntry> {
        let reserved = self.0 & !(OFFSET_MASK | COPIED);
        if reserved != 0 {
            return Err(BadEntry::Reserved(reserved));
        }
        match self.l2_offset() {
            Some(offset) if !g.is_aligned(offset.0) => Err(BadEntry::Unaligned(offset)),
            offset => Ok(offset),
        }
    }

    /// The L2 table has a refcount of exactly 1, so it may be changed in place.
    pub(crate) fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The same with the COPIED flag as given.
    pub(crate) fn with_copied(self, copied: bool) -> Self {
        L1Entry(self.0 & !COPIED | if copied { COPIED } else { 0 })
    }
}

/// An entry of an L2 table ("L2 table entry", standard and compressed cluster descriptors, "Extended L2 Entries").
///
/// To go through a table: `L2Table::iter` in memory, [`l2_entries`] for bytes as they lie in the file. What an entry refers to
/// is one cluster at most ([`L2Entry::host_cluster`]) or a compressed stream, with subclusters as without them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct L2Entry {
    /// The cluster descriptor with its flags: all there is of a standard entry.
    pub(super) descriptor: u64,
    /// The second word of an extended entry: which subclusters are allocated, and which read as zeroes. 0 in standard ones.
    pub(super) bitmap: u64,
}

/// The entries of an L2 table, or of a part of one, as it lies in the file.
pub(crate) fn l2_entries(g: Geometry, table: &[u8]) -> impl Iterator<Item = L2Entry> {
    let size = g.l2_entry_size() as usize;
    table.chunks_exact(size).map(L2Entry::from_bytes)
}

/// What an L2 entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// A cluster whose data, as far as it has any, lie in the file as they are.
    Plain(PlainCluster),
    /// A compressed stream.
    Compressed(Compressed),
}

/// A cluster that is not compressed (specification: "standard cluster"). The default is unallocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct PlainCluster {
    /// The host cluster behind it. It may be there, kept for later writes, although no subcluster has data.
    pub(crate) host: Option<HostOffset>,
    /// The host cluster's refcount is exactly 1.
    pub(crate) copied: bool,
    /// What its parts hold. Those with data have a host cluster.
    pub(crate) subclusters: Subclusters,
}

impl PlainCluster {
    /// The host cluster, if it may be changed in place.
    pub(crate) fn ours(self) -> Option<HostOffset> {
        self.host.filter(|_| self.copied)
    }
}

/// What lies at offset 0 of the file that entries point to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AtStart {
    /// The image's header: an offset of 0 stands for no cluster.
    Header,
    /// A cluster as any other: with an external data file, COPIED tells whether there is one.
    Cluster,
}

impl AtStart {
    /// In a file that can have this cluster.
    fn of(host: Option<HostOffset>) -> Self {
        match host {
            Some(HostOffset(0)) => AtStart::Cluster,
            _ => AtStart::Header,
        }
    }
}

impl L2Entry {
    /// A standard entry.
    pub(crate) const fn standard(descriptor: u64) -> Self {
        L2Entry {
            descriptor,
            bitmap: 0,
        }
    }

    /// The entry in one or two big-endian words.
    fn from_bytes(bytes: &[u8]) -> Self {
        let word = |bytes: Option<&[u8; 8]>| bytes.map_or(0, |bytes| u64::from_be_bytes(*bytes));
        L2Entry {
            descriptor: word(bytes.first_chunk()),
            bitmap: word(bytes.get(8..).and_then(<[u8]>::first_chunk)),
        }
    }

    /// The entry as it lies in the file, in an image of this geometry.
    pub(crate) fn to_bytes(self, g: Geometry) -> impl Iterator<Item = u8> {
        let both = [self.descriptor.to_be_bytes(), self.bitmap.to_be_bytes()];
        let size = g.l2_entry_size() as usize;
        both.into_iter().flatten().take(size)
    }

    /// Overwrites the entry at `index` of a table as it lies in the file.
    ///
    /// # Panics
    /// When the index is beyond the end: a caller's error.
    pub(crate) fn put(self, g: Geometry, table: &mut [u8], index: usize) {
        let size = g.l2_entry_size() as usize;
        let place = &mut table[index * size..][..size];
        for (place, byte) in place.iter_mut().zip(self.to_bytes(g)) {
            *place = byte;
        }
    }

    /// The first word: the cluster descriptor with its flags.
    pub(crate) fn descriptor(self) -> u64 {
        self.descriptor
    }

    /// Nothing at all is said: the cluster is unallocated.
    pub(crate) fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// The entry of a cluster that is not compressed.
    ///
    /// # Panics
    /// In debug builds, for what the geometry's entries cannot say.
    pub(crate) fn plain(cluster: PlainCluster, g: Geometry) -> Self {
        let host = cluster.host.map_or(0, |host| host.0);
        let subclusters = cluster.subclusters;
        let mut entry = L2Entry::standard(host).with_copied(cluster.copied);
        if g.has_extended_l2() {
            entry.bitmap = u64::from(subclusters.zero()) << 32 | u64::from(subclusters.data());
        } else if subclusters.zero() != 0 {
            entry.descriptor |= ZERO;
        }
        debug_assert_eq!(
            entry.decode_from(g, true, AtStart::of(cluster.host)),
            Ok(Mapping::Plain(cluster))
        );
        entry
    }

    /// A compressed stream.
    pub(crate) fn compressed(stream: Compressed, g: Geometry) -> Self {
        let shift = 62 - (g.cluster_bits() - 8);
        let first = stream.host.0 >> 9;
        let last = (stream.host.0 + stream.len - 1) >> 9;
        L2Entry::standard(COMPRESSED | (last - first) << shift | stream.host.0)
    }

    /// What the entry says. `has_zero_flag` is false for version 2.
    pub(crate) fn decode(self, g: Geometry, has_zero_flag: bool) -> Result<Mapping, BadEntry> {
        self.decode_from(g, has_zero_flag, AtStart::Header)
    }

    /// The same, in a file with this at its start.
    pub(super) fn decode_from(
        self,
        g: Geometry,
        has_zero_flag: bool,
        at_start: AtStart,
    ) -> Result<Mapping, BadEntry> {
        if self.descriptor & COMPRESSED != 0 {
            return self.decode_compressed(g);
        }
        let flags = match g.has_extended_l2() {
            true => COPIED,
            false => COPIED | ZERO,
        };
        let reserved = self.descriptor & !(OFFSET_MASK | flags);
        if reserved != 0 {
            return Err(BadEntry::Reserved(reserved));
        }
        let zero = self.descriptor & ZERO != 0;
        if zero && !has_zero_flag {
            return Err(BadEntry::ZeroInV2);
        }
        let offset = HostOffset(self.descriptor & OFFSET_MASK);
        let copied = self.is_copied();
        if !g.is_aligned(offset.0) {
            return Err(BadEntry::Unaligned(offset));
        }
        let host = match at_start {
            AtStart::Cluster if copied => Some(offset),
            _ => (offset.0 != 0).then_some(offset),
        };
        if host.is_none() && copied {
            return Err(BadEntry::Reserved(COPIED));
        }
        let subclusters = match g.has_extended_l2() {
            true => Subclusters::new(self.bitmap as u32, (self.bitmap >> 32) as u32)
                .filter(|subclusters| host.is_some() || subclusters.data() == 0)
                .ok_or(BadEntry::Subclusters(self.bitmap))?,
            false => match (host, zero) {
                (_, true) => Subclusters::default().with(1, State::Zero),
                (Some(_), false) => Subclusters::default().with(1, State::Data),
                (None, false) => Subclusters::default(),
            },
        };
        Ok(Mapping::Plain(PlainCluster {
            host,
            copied,
            subclusters,
        }))
    }

    fn decode_compressed(self, g: Geometry) -> Result<Mapping, BadEntry> {
        let shift = 62 - (g.cluster_bits() - 8);
        let host = self.descriptor & ((1 << shift) - 1);
        let above = host & !((1 << 56) - 1);
        if self.is_copied() || above != 0 {
            return Err(BadEntry::Reserved(self.descriptor & COPIED | above));
        }
        if self.bitmap != 0 {
            return Err(BadEntry::Subclusters(self.bitmap));
        }
        let sectors = ((self.descriptor & !(COPIED | COMPRESSED)) >> shift) + 1;
        Ok(Mapping::Compressed(Compressed {
            host: HostOffset(host),
            len: sectors * 512 - (host & 511),
        }))
    }

    /// The COPIED flag as it stands.
    pub(crate) fn is_copied(self) -> bool {
        self.descriptor & COPIED != 0
    }

    /// The same with the COPIED flag as given; for entries with an uncompressed host cluster.
    pub(crate) fn with_copied(self, copied: bool) -> Self {
        L2Entry {
            descriptor: self.descriptor & !COPIED | if copied { COPIED } else { 0 },
            ..self
        }
    }

    /// The uncompressed host cluster behind the entry, by its bits alone: for bulk walks.
    pub(crate) fn host_cluster(self) -> Option<HostOffset> {
        match self.descriptor & OFFSET_MASK {
            _ if self.descriptor & COMPRESSED != 0 => None,
            0 => None,
            offset => Some(HostOffset(offset)),
        }
    }

    /// Whether the bitmap agrees with itself and the descriptor, by their bits alone. That of a standard entry does.
    pub(super) fn has_sound_bitmap(self, at_start: AtStart) -> bool {
        let (data, zero) = (self.bitmap as u32, (self.bitmap >> 32) as u32);
        let has_place = match at_start {
            AtStart::Header => self.host_cluster().is_some(),
            AtStart::Cluster => self.host_cluster().is_some() || self.is_copied(),
        };
        match self.is_compressed() {
            true => self.bitmap == 0,
            false => data & zero == 0 && (data == 0 || has_place),
        }
    }

    /// Whether the entry holds a compressed stream, by its bits alone.
    pub(crate) fn is_compressed(self) -> bool {
        self.descriptor & COMPRESSED != 0
    }
}

impl fmt::Display for L2Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.descriptor)?;
        match self.bitmap {
            0 => Ok(()),
            bitmap => write!(f, " (subclusters {bitmap:#018x})"),
        }
    }
}

/// Where a compressed stream lies: it needs no alignment and may straddle two host clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Compressed {
    /// The first byte.
    pub(crate) host: HostOffset,
    /// Bytes up to the end of the last 512-byte sector that the descriptor names; the stream may end before.
    pub(crate) len: u64,
}

impl Compressed {
    /// First and last host cluster that the stream touches. Each of them holds one refcount for it.
    pub(crate) fn clusters(self, g: Geometry) -> (ClusterIndex, ClusterIndex) {
        (
            g.host_cluster(self.host),
            g.host_cluster(self.host + (self.len - 1)),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry::new(16, 4)
    }

    fn plain(host: Option<HostOffset>, copied: bool, subclusters: Subclusters) -> Mapping {
        Mapping::Plain(PlainCluster {
            host,
            copied,
            subclusters,
        })
    }

    #[track_caller]
    fn assert_says(g: Geometry, entry: L2Entry, mapping: Mapping) {
        assert_eq!(entry.decode(g, true), Ok(mapping));
        let Mapping::Plain(cluster) = mapping else {
            return;
        };
        assert_eq!(L2Entry::plain(cluster, g), entry);
        let bytes: Vec<u8> = entry.to_bytes(g).collect();
        assert_eq!(bytes.len() as u64, g.l2_entry_size());
        assert_eq!(l2_entries(g, &bytes).next(), Some(entry));
    }

    #[test]
    fn each_kind_of_standard_entry_is_told_apart() {
        let g = geometry();
        let host = Some(HostOffset(0x50000));
        let none = Subclusters::default();
        let (data, zero) = (none.with(1, State::Data), none.with(1, State::Zero));
        for (descriptor, mapping) in [
            (0, plain(None, false, none)),
            (1, plain(None, false, zero)),
            (COPIED | 0x50000, plain(host, true, data)),
            (0x50000, plain(host, false, data)),
            (COPIED | 0x50001, plain(host, true, zero)),
        ] {
            assert_says(g, L2Entry::standard(descriptor), mapping);
        }
    }

    #[test]
    fn each_kind_of_extended_entry_is_told_apart() {
        let g = geometry().with_extended_l2();
        let host = Some(HostOffset(0x50000));
        let zero = Subclusters::default().with(0b110, State::Zero);
        let both = zero.with(0b1 << 31, State::Data);
        let entry = |descriptor, bitmap| L2Entry { descriptor, bitmap };
        for (entry, mapping) in [
            (entry(0, 0), plain(None, false, Subclusters::default())),
            (entry(0, 0b110 << 32), plain(None, false, zero)),
            (entry(0x50000, 0b110 << 32), plain(host, false, zero)),
            (
                entry(COPIED | 0x50000, 0b110 << 32 | 1 << 31),
                plain(host, true, both),
            ),
            (
                entry(COPIED | 0x50000, 0),
                plain(host, true, Subclusters::default()),
            ),
        ] {
            assert_says(g, entry, mapping);
        }
    }

    #[test]
    fn extended_entries_that_break_the_specification_are_refused() {
        let g = geometry().with_extended_l2();
        for (descriptor, bitmap, reason) in [
            (0x50000, 1 << 32 | 1, BadEntry::Subclusters(1 << 32 | 1)),
            (0, 1, BadEntry::Subclusters(1)),
            (COMPRESSED | 0x50000, 2, BadEntry::Subclusters(2)),
            (COPIED, 0, BadEntry::Reserved(COPIED)),
            (ZERO, 0, BadEntry::Reserved(ZERO)),
        ] {
            let entry = L2Entry { descriptor, bitmap };
            assert_eq!(entry.decode(g, true), Err(reason));
        }
    }

    #[test]
    fn entries_that_break_the_specification_are_refused() {
        let g = geometry();
        let unaligned = L2Entry::standard(0x50200).decode(g, true);
        assert_eq!(unaligned, Err(BadEntry::Unaligned(HostOffset(0x50200))));
        assert_eq!(
            L2Entry::standard(1).decode(g, false),
            Err(BadEntry::ZeroInV2)
        );
        assert_eq!(
            L2Entry::standard(0x50002).decode(g, true),
            Err(BadEntry::Reserved(2))
        );
        let high = L2Entry::standard(1 << 57 | 0x50000).decode(g, true);
        assert_eq!(high, Err(BadEntry::Reserved(1 << 57)));
        assert_eq!(
            L1Entry(0x50001).checked(g),
            Err(BadEntry::Reserved(1)),
            "the zero flag means nothing in an L1 entry"
        );
        let copied = L2Entry::standard(COMPRESSED | COPIED | 0x50000).decode(g, true);
        assert_eq!(copied, Err(BadEntry::Reserved(COPIED)));
    }

    #[test]
    fn compressed_descriptors_come_back_with_their_sectors() {
        for bits in 9..=21 {
            let g = Geometry::new(bits, 4);
            for (host, len) in [(0x51234_u64, 300_u64), (0x51200, 512), (0x511ff, 2)] {
                let stream = Compressed {
                    host: HostOffset(host),
                    len,
                };
                let Ok(Mapping::Compressed(read)) = L2Entry::compressed(stream, g).decode(g, true)
                else {
                    panic!("not compressed at {bits} bits");
                };
                assert_eq!(read.host, stream.host);
                let end = (host + len).next_multiple_of(512);
                assert_eq!(read.len, end - host, "{bits} bits, {host:#x}+{len}");
            }
        }
    }

    #[test]
    fn a_stream_knows_the_clusters_that_it_touches() {
        let g = geometry();
        let stream = Compressed {
            host: HostOffset(0x5ff00),
            len: 0x200,
        };
        assert_eq!(stream.clusters(g), (ClusterIndex(5), ClusterIndex(6)));
    }
}
