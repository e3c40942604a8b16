//! Copy on write: what a cluster keeps of its old content when a part of it is written.
//!
//! Subclusters that are written in part get the rest of what they show. In a new cluster, those that are not written
//! need their data copied, if they have any; the others keep their state in the L2 entry alone:
//!
//! ```text
//! old cluster, shared:  | data | data | backing | zero | backing | data |
//! written:                               xx
//! copied:               |  all |  all |  rest   |      |         |  all |
//! ```

use std::ops::Range;

use super::entry::Mapping;
use super::geometry::GuestCluster;
use super::image::Image;
use super::subclusters::State;
use crate::error::Result;
use crate::io::{Data, Segment};

impl Image {
    /// Which ranges of a cluster, in bytes inside of it, a copy of it needs besides `written`. Each has one source.
    pub(super) fn kept(&self, mapping: Mapping, written: Range<u64>) -> Vec<Range<u64>> {
        let touched = self.touched(&written);
        let sides = [0..written.start, written.end..self.g.cluster_size()];
        let mut kept = Vec::new();
        for side in sides.into_iter().filter(|side| !side.is_empty()) {
            let Mapping::Plain(cluster) = mapping else {
                kept.push(side);
                continue;
            };
            let mut at = side.start;
            while at < side.end {
                let first = (at >> self.g.subcluster_bits()) as u32;
                let (state, count) = cluster.subclusters.run(first..self.g.subclusters());
                let end = u64::from(first + count) << self.g.subcluster_bits();
                let end = end.min(side.end);
                let needed = match state {
                    State::Data => at..end,
                    State::Zero | State::Unallocated => at.max(touched.start)..end.min(touched.end),
                };
                if !needed.is_empty() {
                    kept.push(needed);
                }
                at = end;
            }
        }
        kept
    }

    /// The subclusters that are written in whole or in part, in bytes.
    fn touched(&self, written: &Range<u64>) -> Range<u64> {
        let size = self.g.subcluster_size();
        written.start / size * size..written.end.next_multiple_of(size)
    }

    /// Whether a range with one source reads as zeroes, as far as that is known without I/O.
    pub(super) fn surely_zero(&self, mapping: Mapping, range: &Range<u64>) -> bool {
        let Mapping::Plain(plain) = mapping else {
            return false;
        };
        let index = (range.start >> self.g.subcluster_bits()) as u32;
        match plain.subclusters.state(index) {
            State::Data => false,
            State::Zero => true,
            State::Unallocated => self.backing.load().is_none(),
        }
    }

    /// What a cluster shows in a range inside of it, to be copied. The range has one source.
    pub(super) async fn read_old(
        &self,
        mapping: Mapping,
        cluster: GuestCluster,
        range: Range<u64>,
    ) -> Result<Data> {
        let len = range.end - range.start;
        if len == 0 {
            return Ok(Data::new());
        }
        let plain = match mapping {
            Mapping::Plain(plain) => plain,
            Mapping::Compressed(stream) => {
                let bytes = self.decompress(stream).await?;
                let range = range.start as usize..range.end as usize;
                return Ok(Data::from(bytes.slice(range)));
            }
        };
        let index = (range.start >> self.g.subcluster_bits()) as u32;
        match (plain.subclusters.state(index), plain.host) {
            (State::Data, Some(host)) if self.is_behind_end(host) => Err(self.lost(cluster, host)),
            (State::Data, Some(host)) => self.data.child().read((host + range.start).0, len).await,
            (State::Zero, _) => Ok(Data::zeroes(len)),
            _ => {
                let offset = self.g.guest_offset(cluster).0 + range.start;
                // Bytes behind the end of the disk are zero, even where the backing is longer.
                let inside = self.size().saturating_sub(offset).min(len);
                let mut data = self.read_backing_to_copy(offset, inside).await?;
                data.push(Segment::Zeroes(len - inside));
                Ok(data)
            }
        }
    }
}
