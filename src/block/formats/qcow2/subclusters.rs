//! Which parts of a cluster hold data, read as zeroes, or say nothing (specification: "Extended L2 Entries").
//!
//! With extended L2 entries a cluster has 32 subclusters with a state each. Without, the cluster is its only subcluster:
//! the operations work on subclusters and know no difference.

use std::ops::Range;

/// The state of a subcluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// The backing decides.
    Unallocated,
    /// It reads as zeroes.
    Zero,
    /// Its data lie in the host cluster.
    Data,
}

/// The states of a cluster's subclusters: bit n for subcluster n. No bit is set in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Subclusters {
    data: u32,
    zero: u32,
}

impl Subclusters {
    /// Those with data and those that read as zeroes; `None` when a subcluster is both.
    pub(crate) fn new(data: u32, zero: u32) -> Option<Self> {
        (data & zero == 0).then_some(Subclusters { data, zero })
    }

    /// Those with data.
    pub(crate) fn data(self) -> u32 {
        self.data
    }

    /// Those that read as zeroes.
    pub(crate) fn zero(self) -> u32 {
        self.zero
    }

    /// The state of the subcluster at `index`.
    pub(crate) fn state(self, index: u32) -> State {
        match (self.data >> index & 1, self.zero >> index & 1) {
            (1, _) => State::Data,
            (_, 1) => State::Zero,
            _ => State::Unallocated,
        }
    }

    /// The state of the first of these subclusters, and how many of them in a row have it.
    pub(crate) fn run(self, range: Range<u32>) -> (State, u32) {
        let state = self.state(range.start);
        let have_it = match state {
            State::Data => self.data,
            State::Zero => self.zero,
            State::Unallocated => !(self.data | self.zero),
        };
        let count = (have_it >> range.start).trailing_ones();
        (state, count.min(range.end - range.start))
    }

    /// The same, but those in `mask` in this state.
    pub(crate) fn with(self, mask: u32, state: State) -> Self {
        let (data, zero) = (self.data & !mask, self.zero & !mask);
        match state {
            State::Unallocated => Subclusters { data, zero },
            State::Zero => Subclusters {
                data,
                zero: zero | mask,
            },
            State::Data => Subclusters {
                data: data | mask,
                zero,
            },
        }
    }
}

/// The bits of a range of subclusters.
pub(crate) fn mask(range: Range<u32>) -> u32 {
    let below = |index: u32| u32::MAX.checked_shl(index).map_or(u32::MAX, |above| !above);
    below(range.end) & !below(range.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_reach_from_none_to_all() {
        assert_eq!(mask(0..32), u32::MAX);
        assert_eq!(mask(0..1), 1);
        assert_eq!(mask(31..32), 1 << 31);
        assert_eq!(mask(3..5), 0b11000);
        assert_eq!((mask(7..7), mask(32..32)), (0, 0));
    }

    #[test]
    fn runs_end_where_the_state_or_the_range_does() {
        let states = Subclusters::default()
            .with(mask(0..4), State::Data)
            .with(mask(2..3), State::Zero)
            .with(mask(30..32), State::Zero);
        assert_eq!(states.run(0..32), (State::Data, 2));
        assert_eq!(states.run(2..32), (State::Zero, 1));
        assert_eq!(states.run(3..32), (State::Data, 1));
        assert_eq!(states.run(4..32), (State::Unallocated, 26));
        assert_eq!(states.run(4..9), (State::Unallocated, 5));
        assert_eq!(states.run(30..32), (State::Zero, 2));
        assert_eq!(Subclusters::default().run(0..1), (State::Unallocated, 1));
        assert_eq!(Subclusters::new(3, 2), None);
    }
}
