//! What one L2 table says, out of its bytes alone: the part of a check that other threads do.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::Bounds;
use super::refcounts::StoredOnes;
use crate::formats::qcow2::entry::{AtStart, L2Entry, Mapping, l2_entries};
use crate::formats::qcow2::geometry::Geometry;
use crate::units::HostOffset;

/// Bits of a standard cluster descriptor that must be 0: 1 to 8 and 56 to 61.
const RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// Bit 0 of a standard cluster descriptor: it reads as zeroes.
const ZERO: u64 = 1;

/// The reserved bits of an image: bit 0 as well where subclusters say what reads as zeroes.
fn reserved(g: Geometry) -> u64 {
    match g.has_extended_l2() {
        true => RESERVED | ZERO,
        false => RESERVED,
    }
}

/// What is known before the first L2 table is read.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    /// Where things may lie.
    pub(super) bounds: Bounds,
    /// Guest data lie in an external data file, where nothing counts them.
    pub(super) data_outside: bool,
    /// What COPIED flags are held against, if they are.
    pub(super) stored: Option<Arc<StoredOnes>>,
}

/// An entry that is wrong.
#[derive(Debug, Clone, Copy)]
pub(super) struct Finding {
    /// Its index in the table.
    pub(super) index: u32,
    pub(super) entry: L2Entry,
    pub(super) what: Wrong,
}

/// What is wrong with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wrong {
    Reserved,
    Unaligned,
    Outside,
    /// The data lie behind the end of the file, not far: they are lost, and their place counts as used.
    Lost,
    CopiedStream,
    ImpossibleStream,
    /// There is a stream although guest data lie in an external data file.
    StreamWithDataFile,
    /// The bitmap of subclusters contradicts itself or the descriptor.
    Subclusters,
    /// The COPIED flag is not what the stored refcount asks for.
    Flag,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Wrong::Reserved => "reserved bits are set",
            Wrong::Unaligned => "the data cluster is not properly aligned",
            Wrong::Outside | Wrong::Lost => "the data lie behind the end of the file",
            Wrong::CopiedStream => "a compressed cluster has the copied flag",
            Wrong::ImpossibleStream => "the compressed cluster is impossible",
            Wrong::StreamWithDataFile => "there is a compressed cluster beside a data file",
            Wrong::Subclusters => "the bitmap of subclusters is impossible",
            Wrong::Flag => "OFLAG_COPIED disagrees with the refcount of the data cluster",
        })
    }
}

/// What a table says.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// Clusters that it refers to, one reference each: neighbours as one run, streams one by one.
    pub(super) runs: Vec<Range<u64>>,
    pub(super) allocated: u64,
    pub(super) fragmented: u64,
    pub(super) compressed: u64,
    pub(super) wrong: Vec<Finding>,
    /// Where the next data cluster lies if it goes on from the one before.
    expected: Option<HostOffset>,
}

/// Which of an entry's flags are of interest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flags {
    /// The table belongs to the active layer: COPIED has a meaning.
    Meant,
    /// Only snapshots have it.
    Ignored,
}

impl Table {
    /// Reads a table.
    pub(super) fn read(facts: &Facts, flags: Flags, bytes: &[u8]) -> Table {
        let mut table = Table::default();
        let reserved = reserved(facts.bounds.g);
        for (index, entry) in (0..).zip(l2_entries(facts.bounds.g, bytes)) {
            if entry.is_empty() {
                continue;
            }
            let wrong = |what| Finding { index, entry, what };
            if facts.data_outside {
                table.outside(facts, flags, entry, wrong);
                continue;
            }
            if entry.is_compressed() {
                table.compressed(facts, entry, wrong);
                continue;
            }
            if entry.descriptor() & reserved != 0 {
                table.wrong.push(wrong(Wrong::Reserved));
            }
            if !entry.has_sound_bitmap(AtStart::Header) {
                table.wrong.push(wrong(Wrong::Subclusters));
            }
            let Some(host) = entry.host_cluster() else {
                continue;
            };
            table.allocate(facts, host);
            if !facts.bounds.g.is_aligned(host.0) {
                table.wrong.push(wrong(Wrong::Unaligned));
            }
            if flags == Flags::Meant
                && let Some(stored) = &facts.stored
                && !stored.agree(facts.bounds.g.host_cluster(host).0, entry.is_copied())
            {
                table.wrong.push(wrong(Wrong::Flag));
            }
            match facts.bounds.clusters(host.0, facts.bounds.g.cluster_size()) {
                Some(clusters) => table.refer(clusters),
                None => match facts.bounds.lost_cluster(host) {
                    Some(cluster) => {
                        table.wrong.push(wrong(Wrong::Lost));
                        table.refer(cluster..cluster + 1);
                    }
                    None => table.wrong.push(wrong(Wrong::Outside)),
                },
            }
        }
        table
    }

    /// An entry whose data are in another file: it refers to nothing in this one, and is COPIED where it has a cluster.
    fn outside(
        &mut self,
        facts: &Facts,
        flags: Flags,
        entry: L2Entry,
        wrong: impl Fn(Wrong) -> Finding,
    ) {
        let host = entry.host_cluster();
        // The cluster at the file's start has COPIED only. As qemu-img, which takes it for unallocated when its flag says zeroes.
        let is_zero = !facts.bounds.g.has_extended_l2() && entry.descriptor() & ZERO != 0;
        let at_start = (entry.is_copied() && !is_zero).then_some(HostOffset(0));
        if let Some(host) = host.or(at_start) {
            self.allocate(facts, host);
        }
        if entry.is_compressed() {
            self.wrong.push(wrong(Wrong::StreamWithDataFile));
        } else if entry.descriptor() & reserved(facts.bounds.g) != 0 {
            self.wrong.push(wrong(Wrong::Reserved));
        }
        if !entry.has_sound_bitmap(AtStart::Cluster) {
            self.wrong.push(wrong(Wrong::Subclusters));
        }
        if host.is_some_and(|host| !facts.bounds.g.is_aligned(host.0)) {
            self.wrong.push(wrong(Wrong::Unaligned));
        }
        if host.is_some() && !entry.is_copied() && flags == Flags::Meant && facts.stored.is_some() {
            self.wrong.push(wrong(Wrong::Flag));
        }
    }

    /// Counts a data cluster.
    fn allocate(&mut self, facts: &Facts, host: HostOffset) {
        self.allocated += 1;
        if self.expected.is_some_and(|expected| expected != host) {
            self.fragmented += 1;
        }
        self.expected = Some(host + facts.bounds.g.cluster_size());
    }

    /// Adds a data cluster, or the two that an unaligned one touches.
    fn refer(&mut self, clusters: Range<u64>) {
        match self.runs.last_mut() {
            Some(last) if last.end == clusters.start => last.end = clusters.end,
            _ => self.runs.push(clusters),
        }
    }

    fn compressed(&mut self, facts: &Facts, entry: L2Entry, wrong: impl Fn(Wrong) -> Finding) {
        if entry.is_copied() {
            self.wrong.push(wrong(Wrong::CopiedStream));
        }
        if !entry.has_sound_bitmap(AtStart::Header) {
            self.wrong.push(wrong(Wrong::Subclusters));
            return;
        }
        let mapping = entry.with_copied(false).decode(facts.bounds.g, true);
        if let Ok(Mapping::Compressed(stream)) = mapping {
            let HostOffset(offset) = stream.host;
            match facts.bounds.clusters(offset, stream.len) {
                Some(clusters) => self.runs.push(clusters),
                None => self.wrong.push(wrong(Wrong::Outside)),
            }
        } else {
            self.wrong.push(wrong(Wrong::ImpossibleStream));
        }
        self.allocated += 1;
        self.compressed += 1;
        self.fragmented += 1;
    }
}
