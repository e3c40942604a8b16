//! Byte positions as types, so that a guest offset is never used where a host offset belongs.
//!
//! Plain lengths stay `u64` in bytes. Arithmetic that input can drive to overflow is checked; `+` is for
//! sums that were validated before, and panics in debug builds where they were not.

use std::fmt;
use std::ops::{Add, Sub};

macro_rules! byte_offset {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The sum, or `None` where it does not fit 64 bits.
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map($name)
            }

            /// The cluster that this offset lies in.
            pub fn cluster(self, cluster_bits: u32) -> ClusterIndex {
                ClusterIndex(self.0 >> cluster_bits)
            }

            /// The distance from the start of its cluster.
            pub fn in_cluster(self, cluster_bits: u32) -> u64 {
                self.0 & ((1 << cluster_bits) - 1)
            }

            /// The start of its cluster.
            #[must_use]
            pub fn cluster_start(self, cluster_bits: u32) -> Self {
                $name(self.0 & !((1 << cluster_bits) - 1))
            }

            /// Whether it is a multiple of the power of two `alignment`.
            pub fn is_aligned(self, alignment: u64) -> bool {
                self.0 & (alignment - 1) == 0
            }
        }

        impl Add<u64> for $name {
            type Output = Self;

            fn add(self, bytes: u64) -> Self {
                $name(self.0 + bytes)
            }
        }

        impl Sub for $name {
            type Output = u64;

            fn sub(self, earlier: Self) -> u64 {
                self.0 - earlier.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

byte_offset! {
    /// A position in a format's virtual disk, in bytes.
    GuestOffset
}

byte_offset! {
    /// A position in the layer that holds a format's image, in bytes.
    HostOffset
}

/// A cluster's number: an offset (guest or host, the context says which) divided by the cluster size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ClusterIndex(pub u64);

impl ClusterIndex {
    /// The host offset of its first byte, or `None` where it does not fit 64 bits.
    pub fn host_offset(self, cluster_bits: u32) -> Option<HostOffset> {
        self.first_byte(cluster_bits).map(HostOffset)
    }

    /// The guest offset of its first byte, or `None` where it does not fit 64 bits.
    pub fn guest_offset(self, cluster_bits: u32) -> Option<GuestOffset> {
        self.first_byte(cluster_bits).map(GuestOffset)
    }

    fn first_byte(self, cluster_bits: u32) -> Option<u64> {
        self.0.checked_mul(1 << cluster_bits)
    }
}

impl Add<u64> for ClusterIndex {
    type Output = Self;

    fn add(self, clusters: u64) -> Self {
        ClusterIndex(self.0 + clusters)
    }
}

/// What a disk writes whole or not at all, and what the size of a disk in an image with a format is a multiple of, in bytes.
pub const SECTOR: u64 = 512;

/// `value` rounded down to a multiple of the power of two `alignment`.
pub fn align_down(value: u64, alignment: u64) -> u64 {
    debug_assert!(alignment.is_power_of_two());
    value & !(alignment - 1)
}

/// `value` rounded up to a multiple of the power of two `alignment`, or `None` where that overflows.
pub fn align_up(value: u64, alignment: u64) -> Option<u64> {
    debug_assert!(alignment.is_power_of_two());
    Some(value.checked_add(alignment - 1)? & !(alignment - 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_is_its_cluster_plus_the_rest() {
        let offset = HostOffset(0x5_4321);
        assert_eq!(offset.cluster(16), ClusterIndex(5));
        assert_eq!(offset.in_cluster(16), 0x4321);
        assert_eq!(
            offset.cluster(16).host_offset(16),
            Some(HostOffset(0x5_0000))
        );
        assert_eq!(offset.cluster_start(16), HostOffset(0x5_0000));
        assert_eq!(ClusterIndex(1 << 50).host_offset(16), None);
    }

    #[test]
    fn rounding_up_near_the_end_says_so() {
        assert_eq!(align_up(4097, 4096), Some(8192));
        assert_eq!(align_up(u64::MAX - 1, 4096), None);
        assert_eq!(align_down(8191, 4096), 4096);
    }
}
