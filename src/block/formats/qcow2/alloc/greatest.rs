//! The greatest refcount of an image: found once, when it matters, and kept up from then on.

use super::block::Counters;
use super::*;
use crate::formats::qcow2::runs::read_clusters;

/// Bytes of refcount blocks that are looked at in one go.
const PIECE: u64 = 4 << 20;

/// What is known of the greatest refcount.
#[derive(Debug, Default)]
pub(super) struct Greatest {
    /// The greatest of the counters looked at, and of all that have grown.
    seen: u64,
    /// Blocks of lower index have been looked at.
    next: usize,
    /// All have been.
    known: bool,
}

impl Allocator {
    /// The greatest refcount of the image, if it is known: it is that or less.
    pub(crate) fn greatest_of_all(&self) -> Option<u64> {
        self.greatest.known.then_some(self.greatest.seen)
    }

    /// Looks for it in the next blocks; answers whether it is known now.
    pub(crate) async fn look_for_greatest(&mut self) -> Result<bool> {
        self.look_in_next(PIECE).await
    }

    /// As `look_for_greatest`, in so many bytes of blocks that are not in memory.
    pub(super) async fn look_in_next(&mut self, bytes: u64) -> Result<bool> {
        if self.greatest.known {
            return Ok(true);
        }
        let first = self.greatest.next;
        let most = (bytes >> self.g.cluster_bits()).max(1) as usize;
        // Blocks may be few and far between in the table.
        let regions = first..self.table.len();
        let mut next = self.table.len();
        let mut unread: Vec<HostOffset> = Vec::new();
        let mut seen = self.greatest.seen;
        for region in regions {
            if unread.len() >= most {
                next = region;
                break;
            }
            match self.blocks.get(&region) {
                Some(block) => seen = seen.max(block.counters.bounds(0, block.counters.len()).1),
                None if self.has_block(region) => unread.push(HostOffset(self.table[region])),
                None => {}
            }
        }
        unread.sort_unstable();
        let g = self.g;
        read_clusters(&self.file, &unread, g.cluster_size(), |_, bytes| {
            let counters = Counters::from_bytes(bytes.into(), g);
            seen = seen.max(counters.bounds(0, counters.len()).1);
            Ok(())
        })
        .await?;
        self.greatest.seen = self.greatest.seen.max(seen);
        self.greatest.next = next;
        self.greatest.known = next >= self.table.len();
        Ok(self.greatest.known)
    }

    /// A counter has grown to this.
    pub(super) fn note_count(&mut self, count: u64) {
        self.greatest.seen = self.greatest.seen.max(count);
    }

    /// No cluster takes another compressed stream beyond this count: room that references have that are still to be added.
    pub(crate) fn limit_streams(&mut self, most: u64) {
        self.stream_limit = most;
    }
}
