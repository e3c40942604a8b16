//! Which parts of the disk are still to be copied, and which are being read at this moment.
//!
//! The disk is cut into clusters (the copy's granularity). A cluster is, in this order:
//!
//! ```text
//! pending ──claim──> being read ──read──> taken: its old content is on the target, or in memory on the way there
//!    ^                   |
//!    └───── gave up ─────┘
//! ```
//!
//! A guest may change what is taken, and must wait for what is being read. What is pending it claims itself.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The state of all clusters.
#[derive(Debug)]
pub(super) struct Map {
    /// Cluster size as a power of two.
    bits: u32,
    /// Disk size in bytes: the last cluster may be cut off.
    size: u64,
    state: Mutex<State>,
    /// Told when a claim or a question ends.
    ended: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// A bit per cluster.
    pending: Vec<u64>,
    /// Pending bytes.
    pending_bytes: u64,
    /// Clusters that are being read.
    reading: Vec<(u64, Range<u64>)>,
    /// Clusters of which somebody asks what they are.
    asked: Vec<(u64, Range<u64>)>,
    next_id: u64,
}

/// What a guest finds where it is about to change something.
#[derive(Debug)]
pub(super) enum Found {
    /// Nothing to wait for or copy.
    Free,
    /// Somebody reads there; try again when that has ended.
    Busy,
    /// The first pending clusters there, for the caller to copy.
    Claimed(Claim),
}

/// A range of which its owner asks what it is. What has not been taken by the time of the answer is as the answer says.
#[derive(Debug)]
pub(super) struct Asking<'a> {
    map: &'a Map,
    id: u64,
}

/// A run of clusters that its owner reads. Dropped without `taken`, they are pending again.
#[derive(Debug)]
pub(super) struct Claim {
    map: Arc<Map>,
    id: u64,
    clusters: Range<u64>,
    taken: bool,
}

impl Map {
    /// A disk of `size` bytes in clusters of `1 << bits`, all of them pending.
    pub(super) fn new(size: u64, bits: u32) -> Arc<Self> {
        let count = size.div_ceil(1 << bits);
        let words = count.div_ceil(64);
        let mut pending = vec![u64::MAX; words as usize];
        if let (Some(last), rest @ 1..) = (pending.last_mut(), count % 64) {
            *last = (1 << rest) - 1;
        }
        Arc::new(Map {
            bits,
            size,
            state: Mutex::new(State {
                pending,
                pending_bytes: size,
                ..State::default()
            }),
            ended: Notify::new(),
        })
    }

    /// Cluster size in bytes.
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.bits
    }

    /// Disk size in bytes when the copy began.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Bytes that nobody has claimed or dropped.
    #[cfg(test)]
    fn pending_bytes(&self) -> u64 {
        self.state().pending_bytes
    }

    /// Whether nothing is pending or being read.
    pub(super) fn is_done(&self) -> bool {
        let state = self.state();
        state.pending_bytes == 0 && state.reading.is_empty()
    }

    /// Whether something at or behind this byte is not taken yet.
    pub(super) fn is_needed_from(&self, offset: u64) -> bool {
        if offset >= self.size {
            return false;
        }
        let first = offset >> self.bits;
        let state = self.state();
        state.reading.iter().any(|(_, range)| range.end > first)
            || state.next_pending(first, self.count()).is_some()
    }

    /// A future that is ready when a claim or a question ends after this call.
    pub(super) fn ended(&self) -> tokio::sync::futures::Notified<'_> {
        self.ended.notified()
    }

    /// Tells those who wait for a claim or a question to end.
    pub(super) fn look_again(&self) {
        self.ended.notify_waiters();
    }

    /// For a guest that will change these bytes: the first of them that it must care for, at most `most` bytes at once.
    pub(super) fn find(self: &Arc<Self>, bytes: Range<u64>, most: u64) -> Found {
        let wanted = self.clusters(&bytes);
        let mut state = self.state();
        if let Some(first) = state.next_pending(wanted.start, wanted.end) {
            return Found::Claimed(self.claim_run(&mut state, first, wanted.end, most));
        }
        match overlaps(&state.reading, &wanted) {
            true => Found::Busy,
            false => Found::Free,
        }
    }

    /// Whether somebody reads clusters of these bytes, or asks what they are.
    pub(super) fn is_looked_at(&self, bytes: Range<u64>) -> bool {
        let wanted = self.clusters(&bytes);
        let state = self.state();
        overlaps(&state.reading, &wanted) || overlaps(&state.asked, &wanted)
    }

    /// Begins to ask what these bytes are. Guests that copy before they write need not wait for that.
    pub(super) fn ask(&self, bytes: Range<u64>) -> Asking<'_> {
        let clusters = self.clusters(&bytes);
        let mut state = self.state();
        let id = state.take_id();
        state.asked.push((id, clusters));
        Asking { map: self, id }
    }

    /// The number that the next claim or question will have.
    pub(super) fn next_look(&self) -> u64 {
        self.state().next_id
    }

    /// Whether claims or questions with a number below `look` have not ended.
    pub(super) fn is_looked_at_before(&self, look: u64) -> bool {
        let state = self.state();
        let mut all = state.reading.iter().chain(&state.asked);
        all.any(|(id, _)| *id < look)
    }

    /// The first pending run in these bytes, at most `most` of them.
    pub(super) fn claim(self: &Arc<Self>, bytes: Range<u64>, most: u64) -> Option<Claim> {
        let wanted = self.clusters(&bytes);
        let mut state = self.state();
        let first = state.next_pending(wanted.start, wanted.end)?;
        Some(self.claim_run(&mut state, first, wanted.end, most))
    }

    /// Where the next pending cluster lies, in bytes, from `offset` on.
    pub(super) fn next_pending(&self, offset: u64) -> Option<u64> {
        let first = offset >> self.bits;
        let found = self.state().next_pending(first, self.count())?;
        Some(found << self.bits)
    }

    /// What lies wholly in these bytes need not be copied; a cluster that is cut off by the end of the disk counts as whole. Answers
    /// how many bytes that were.
    pub(super) fn drop_range(&self, bytes: Range<u64>) -> u64 {
        let first = bytes.start.div_ceil(self.cluster_size());
        let last = match bytes.end >= self.size {
            true => self.count(),
            false => bytes.end >> self.bits,
        };
        let mut state = self.state();
        let mut dropped = 0;
        let mut at = first;
        while let Some(from) = state.next_pending(at, last) {
            let to = state.pending_end(from, last);
            state.set(from..to, false);
            dropped += self.bytes(&(from..to));
            at = to;
        }
        state.pending_bytes -= dropped;
        dropped
    }

    fn claim_run(self: &Arc<Self>, state: &mut State, first: u64, end: u64, most: u64) -> Claim {
        let longest = (most >> self.bits).max(1);
        let clusters = first..state.pending_end(first, end.min(first + longest));
        state.set(clusters.clone(), false);
        state.pending_bytes -= self.bytes(&clusters);
        let id = state.take_id();
        state.reading.push((id, clusters.clone()));
        Claim {
            map: self.clone(),
            id,
            clusters,
            taken: false,
        }
    }

    /// The clusters that these bytes touch, as far as the copy has them.
    fn clusters(&self, bytes: &Range<u64>) -> Range<u64> {
        let end = bytes.end.min(self.size).div_ceil(self.cluster_size());
        (bytes.start >> self.bits).min(end)..end
    }

    fn count(&self) -> u64 {
        self.size.div_ceil(self.cluster_size())
    }

    fn bytes(&self, clusters: &Range<u64>) -> u64 {
        (clusters.end << self.bits).min(self.size) - (clusters.start << self.bits)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn overlaps(ranges: &[(u64, Range<u64>)], wanted: &Range<u64>) -> bool {
    let overlaps = |range: &Range<u64>| range.start < wanted.end && wanted.start < range.end;
    ranges.iter().any(|(_, range)| overlaps(range))
}

impl State {
    fn take_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// The first cluster in `[first, end)` whose bit is as wanted, or `end`.
    fn search(&self, first: u64, end: u64, wanted: bool) -> u64 {
        let mut at = first;
        while at < end {
            let word = self.pending.get((at / 64) as usize).copied().unwrap_or(0);
            let word = if wanted { word } else { !word };
            let rest = word >> (at % 64);
            if rest != 0 {
                return (at + u64::from(rest.trailing_zeros())).min(end);
            }
            at = (at / 64 + 1) * 64;
        }
        end
    }

    fn next_pending(&self, first: u64, end: u64) -> Option<u64> {
        let found = self.search(first, end, true);
        (found < end).then_some(found)
    }

    fn pending_end(&self, first: u64, end: u64) -> u64 {
        self.search(first, end, false)
    }

    fn set(&mut self, clusters: Range<u64>, pending: bool) {
        let mut at = clusters.start;
        while at < clusters.end {
            let count = (64 - at % 64).min(clusters.end - at);
            let mask = (u64::MAX >> (64 - count)) << (at % 64);
            if let Some(word) = self.pending.get_mut((at / 64) as usize) {
                match pending {
                    true => *word |= mask,
                    false => *word &= !mask,
                }
            }
            at += count;
        }
    }
}

impl Claim {
    /// Where it begins, in bytes.
    pub(super) fn offset(&self) -> u64 {
        self.clusters.start << self.map.bits
    }

    /// How many bytes of the disk it has.
    pub(super) fn len(&self) -> u64 {
        self.map.bytes(&self.clusters)
    }

    /// The old content is safe: guests may change it.
    pub(super) fn taken(mut self) {
        self.taken = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        {
            let mut state = self.map.state();
            state.reading.retain(|(id, _)| *id != self.id);
            if !self.taken {
                state.set(self.clusters.clone(), true);
                state.pending_bytes += self.map.bytes(&self.clusters);
            }
        }
        self.map.ended.notify_waiters();
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.map.state().asked.retain(|(id, _)| *id != self.id);
        self.map.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 100 * 16 + 5;

    #[test]
    fn what_is_claimed_is_busy_until_it_is_taken_and_pending_again_when_it_is_not() {
        let map = Map::new(SIZE, 4);
        let claim = map.claim(20..70, 32).unwrap();
        assert_eq!((claim.offset(), claim.len()), (16, 32));
        assert!(matches!(map.find(16..17, 16), Found::Busy));
        assert!(matches!(map.find(30..31, 16), Found::Busy));
        assert!(matches!(map.find(48..49, 16), Found::Claimed(_)));
        assert_eq!(map.pending_bytes(), SIZE - 32);
        drop(claim);
        assert_eq!(map.pending_bytes(), SIZE);
        map.claim(16..17, 16).unwrap().taken();
        assert!(matches!(map.find(16..32, 16), Found::Free));
        assert_eq!(map.pending_bytes(), SIZE - 16);
    }

    #[test]
    fn questions_keep_nobody_from_copying_but_are_looks() {
        let map = Map::new(SIZE, 4);
        let first = map.next_look();
        let asking = map.ask(0..SIZE);
        assert!(matches!(map.find(16..17, 16), Found::Claimed(_)));
        map.claim(16..17, 16).unwrap().taken();
        assert!(matches!(map.find(16..17, 16), Found::Free));
        assert!(map.is_looked_at(16..17) && map.is_looked_at_before(first + 1));
        assert!(!map.is_looked_at_before(first));
        drop(asking);
        assert!(!map.is_looked_at(0..SIZE) && !map.is_looked_at_before(u64::MAX));
    }

    #[test]
    fn the_last_cluster_counts_what_the_disk_has_of_it() {
        let map = Map::new(SIZE, 4);
        let claim = map.claim(SIZE - 1..SIZE, 64).unwrap();
        assert_eq!((claim.offset(), claim.len()), (1600, 5));
        claim.taken();
        assert!(!map.is_needed_from(1600));
        assert!(map.is_needed_from(1599));
        assert_eq!(map.drop_range(0..SIZE), 1600);
        assert!(map.is_done());
        assert!(matches!(map.find(0..SIZE + 100, 16), Found::Free));
    }

    #[test]
    fn only_whole_clusters_are_dropped() {
        let map = Map::new(SIZE, 4);
        assert_eq!(map.drop_range(1..31), 0);
        assert_eq!(map.drop_range(1..48), 32);
        assert_eq!(map.next_pending(16), Some(48));
        assert_eq!(map.next_pending(0), Some(0));
        assert_eq!(map.drop_range(1595..SIZE), 5);
    }

    #[test]
    fn runs_across_words_are_found() {
        let map = Map::new(1000 * 16, 4);
        let claim = map.claim(60 * 16..400 * 16, u64::MAX).unwrap();
        assert_eq!((claim.offset(), claim.len()), (60 * 16, 340 * 16));
        assert_eq!(map.next_pending(70 * 16), Some(400 * 16));
    }
}
