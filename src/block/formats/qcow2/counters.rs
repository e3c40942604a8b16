//! Counters of refcount blocks: 1 to 64 bits wide, one at a time and in runs (specification: "Refcount block entry").
//!
//! Counters narrower than a byte lie with the first in the least significant bits; wider ones are big-endian.
//! Runs are what snapshots are made of: neighbouring clusters mostly have neighbouring counters.

use std::ops::Range;

/// The counters of one refcount block, or of any bytes laid out as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CounterWidth {
    order: u32,
}

impl CounterWidth {
    /// Counters of `1 << order` bits.
    ///
    /// # Panics
    /// When `order` is above 6; the header's validation comes first.
    pub(crate) fn new(order: u32) -> Self {
        assert!(order <= 6);
        CounterWidth { order }
    }

    /// The greatest count.
    pub(crate) fn max(self) -> u64 {
        u64::MAX >> (64 - (1 << self.order))
    }

    /// The width of nearly all images.
    pub(crate) fn is_16_bits(self) -> bool {
        self.order == 4
    }

    /// How many counters `bytes` bytes hold.
    pub(crate) fn per_bytes(self, bytes: u64) -> u64 {
        (bytes * 8) >> self.order
    }

    /// The counter at `index`.
    ///
    /// # Panics
    /// When there is none: a caller's error.
    pub(crate) fn get(self, block: &[u8], index: usize) -> u64 {
        match self.order {
            0..=2 => {
                let (byte, shift) = self.sub_byte(index);
                u64::from(block[byte] >> shift) & self.max()
            }
            3 => u64::from(block[index]),
            4 => u64::from(u16::from_be_bytes(array(block, index))),
            5 => u64::from(u32::from_be_bytes(array(block, index))),
            _ => u64::from_be_bytes(array(block, index)),
        }
    }

    /// Sets the counter at `index`.
    ///
    /// # Panics
    /// When there is none, or `value` is above the maximum: a caller's error.
    pub(crate) fn set(self, block: &mut [u8], index: usize, value: u64) {
        assert!(value <= self.max(), "refcount above its maximum");
        match self.order {
            0..=2 => {
                let (byte, shift) = self.sub_byte(index);
                let mask = (self.max() as u8) << shift;
                block[byte] = block[byte] & !mask | (value as u8) << shift;
            }
            3 => block[index] = value as u8,
            4 => block[2 * index..][..2].copy_from_slice(&(value as u16).to_be_bytes()),
            5 => block[4 * index..][..4].copy_from_slice(&(value as u32).to_be_bytes()),
            _ => block[8 * index..][..8].copy_from_slice(&value.to_be_bytes()),
        }
    }

    /// Sets all counters of `range` to `value`.
    ///
    /// # Panics
    /// As for `set`.
    pub(crate) fn fill(self, block: &mut [u8], range: Range<usize>, value: u64) {
        let (head, bytes, tail) = self.whole_bytes(&range);
        for index in head.chain(tail) {
            self.set(block, index, value);
        }
        if bytes.is_empty() {
            return;
        }
        // One unit of the repeating pattern: a byte of narrow counters, or one wide counter.
        let per_unit = (8usize >> self.order).max(1);
        let unit_bytes = (1usize << self.order) / 8;
        let mut unit = [0; 8];
        for index in 0..per_unit {
            self.set(&mut unit, index, value);
        }
        for chunk in block[bytes].chunks_exact_mut(unit_bytes.max(1)) {
            chunk.copy_from_slice(&unit[..chunk.len()]);
        }
    }

    /// The smallest and the greatest counter of `range`, which is not empty.
    ///
    /// # Panics
    /// When the range is not inside: a caller's error.
    pub(crate) fn bounds(self, block: &[u8], range: Range<usize>) -> (u64, u64) {
        if self.order == 4 {
            return bounds_16(&block[2 * range.start..2 * range.end]);
        }
        range.fold((u64::MAX, 0), |(least, most), index| {
            let count = self.get(block, index);
            (least.min(count), most.max(count))
        })
    }

    /// Adds `more` to every counter of `range`.
    ///
    /// # Panics
    /// When the range is not inside, or a counter cannot take it: the caller has looked at `bounds`.
    pub(crate) fn add(self, block: &mut [u8], range: Range<usize>, more: u64) {
        if self.order == 4 && more <= self.max() {
            return change_16(&mut block[2 * range.start..2 * range.end], more as u16);
        }
        for index in range {
            self.set(block, index, self.get(block, index) + more);
        }
    }

    /// Takes `less` from every counter of `range`.
    ///
    /// # Panics
    /// As `add`.
    pub(crate) fn subtract(self, block: &mut [u8], range: Range<usize>, less: u64) {
        if self.order == 4 && less <= self.max() {
            let less = (less as u16).wrapping_neg();
            return change_16(&mut block[2 * range.start..2 * range.end], less);
        }
        for index in range {
            self.set(block, index, self.get(block, index) - less);
        }
    }

    fn sub_byte(self, index: usize) -> (usize, usize) {
        let bit = index << self.order;
        (bit / 8, bit % 8)
    }

    /// Splits a range into counters before the first whole byte, whole bytes, and counters after the last.
    fn whole_bytes(self, range: &Range<usize>) -> (Range<usize>, Range<usize>, Range<usize>) {
        if self.order >= 3 {
            let size = (1usize << self.order) / 8;
            let bytes = range.start * size..range.end * size;
            return (0..0, bytes, 0..0);
        }
        let per_byte = 8usize >> self.order;
        let first = range.start.next_multiple_of(per_byte).min(range.end);
        let last = (range.end / per_byte * per_byte).max(first);
        (
            range.start..first,
            first / per_byte..last / per_byte,
            last..range.end,
        )
    }
}

fn array<const N: usize>(block: &[u8], index: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&block[N * index..][..N]);
    bytes
}

/// The width of nearly all images, in a form that compilers turn into vector code.
fn bounds_16(bytes: &[u8]) -> (u64, u64) {
    let (mut least, mut most) = (u16::MAX, 0);
    for counter in bytes.as_chunks().0 {
        let count = u16::from_be_bytes(*counter);
        least = least.min(count);
        most = most.max(count);
    }
    (least.into(), most.into())
}

fn change_16(bytes: &mut [u8], more: u16) {
    for counter in bytes.as_chunks_mut().0 {
        *counter = u16::from_be_bytes(*counter)
            .wrapping_add(more)
            .to_be_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_narrow_counter_lies_in_the_lowest_bits() {
        let mut block = [0; 2];
        CounterWidth::new(0).set(&mut block, 1, 1);
        assert_eq!(block, [0b10, 0]);
        CounterWidth::new(2).set(&mut block, 3, 0xa);
        assert_eq!(block, [0b10, 0xa0]);
        let mut wide = [0; 8];
        CounterWidth::new(4).set(&mut wide, 1, 0x1234);
        assert_eq!(wide, [0, 0, 0x12, 0x34, 0, 0, 0, 0]);
    }

    #[test]
    fn runs_do_what_single_counters_do_at_every_width() {
        for order in 0..=6 {
            let width = CounterWidth::new(order);
            let count = width.per_bytes(64) as usize;
            for range in [0..count, 3..count - 2, 1..2, 5..5] {
                let mut block = vec![0; 64];
                width.fill(&mut block, range.clone(), 1);
                for index in 0..count {
                    let wanted = u64::from(range.contains(&index));
                    assert_eq!(width.get(&block, index), wanted, "order {order}, {range:?}");
                }
                if order > 0 && !range.is_empty() {
                    width.add(&mut block, range.clone(), width.max() - 1);
                    assert_eq!(
                        width.bounds(&block, range.clone()),
                        (width.max(), width.max())
                    );
                    width.subtract(&mut block, range.clone(), width.max() - 1);
                }
                width.subtract(&mut block, range.clone(), 1);
                assert!(block.iter().all(|byte| *byte == 0));
            }
        }
    }

    #[test]
    fn the_bounds_of_a_run_see_nothing_beside_it() {
        for order in 0..=6 {
            let width = CounterWidth::new(order);
            let mut block = vec![0; 64];
            width.set(&mut block, 4, width.max());
            assert_eq!(width.bounds(&block, 2..6), (0, width.max()));
            assert_eq!(width.bounds(&block, 4..5), (width.max(), width.max()));
            assert_eq!(width.bounds(&block, 5..8), (0, 0), "order {order}");
        }
    }
}
