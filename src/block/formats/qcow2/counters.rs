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

    /// Adds one to every counter of `range`. Changes nothing and answers the first counter that cannot take it.
    ///
    /// # Panics
    /// When the range is not inside: a caller's error.
    pub(crate) fn increment(self, block: &mut [u8], range: Range<usize>) -> Result<(), usize> {
        if self.order == 4 {
            return increment_16(&mut block[2 * range.start..2 * range.end])
                .map_err(|index| range.start + index);
        }
        if let Some(full) = range
            .clone()
            .find(|&index| self.get(block, index) == self.max())
        {
            return Err(full);
        }
        for index in range {
            self.set(block, index, self.get(block, index) + 1);
        }
        Ok(())
    }

    /// Takes one from every counter of `range`. Changes nothing and answers the first counter that is zero.
    ///
    /// # Panics
    /// When the range is not inside: a caller's error.
    pub(crate) fn decrement(self, block: &mut [u8], range: Range<usize>) -> Result<(), usize> {
        if self.order == 4 {
            return decrement_16(&mut block[2 * range.start..2 * range.end])
                .map_err(|index| range.start + index);
        }
        if let Some(zero) = range.clone().find(|&index| self.get(block, index) == 0) {
            return Err(zero);
        }
        for index in range {
            self.set(block, index, self.get(block, index) - 1);
        }
        Ok(())
    }

    /// Whether all counters of `range` are `value`.
    ///
    /// # Panics
    /// When the range is not inside: a caller's error.
    pub(crate) fn all_are(self, block: &[u8], mut range: Range<usize>, value: u64) -> bool {
        if self.order == 4 && value <= self.max() {
            let wanted = (value as u16).to_be_bytes();
            let bytes = &block[2 * range.start..2 * range.end];
            return bytes.chunks_exact(2).all(|counter| counter == wanted);
        }
        range.all(|index| self.get(block, index) == value)
    }

    /// The first counter of `range` that is `value`.
    ///
    /// # Panics
    /// When the range is not inside: a caller's error.
    pub(crate) fn find(self, block: &[u8], mut range: Range<usize>, value: u64) -> Option<usize> {
        if self.order == 4 && value <= self.max() {
            let wanted = (value as u16).to_be_bytes();
            let bytes = &block[2 * range.start..2 * range.end];
            let found = bytes.chunks_exact(2).position(|counter| counter == wanted);
            return found.map(|index| range.start + index);
        }
        range.find(|&index| self.get(block, index) == value)
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
fn increment_16(bytes: &mut [u8]) -> Result<(), usize> {
    let full = |counter: &[u8]| counter == [0xff, 0xff];
    if let Some(index) = bytes.chunks_exact(2).position(full) {
        return Err(index);
    }
    for counter in bytes.chunks_exact_mut(2) {
        let value = u16::from_be_bytes([counter[0], counter[1]]).wrapping_add(1);
        counter.copy_from_slice(&value.to_be_bytes());
    }
    Ok(())
}

fn decrement_16(bytes: &mut [u8]) -> Result<(), usize> {
    let zero = |counter: &[u8]| counter == [0, 0];
    if let Some(index) = bytes.chunks_exact(2).position(zero) {
        return Err(index);
    }
    for counter in bytes.chunks_exact_mut(2) {
        let value = u16::from_be_bytes([counter[0], counter[1]]).wrapping_sub(1);
        counter.copy_from_slice(&value.to_be_bytes());
    }
    Ok(())
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
                assert_eq!(width.find(&block, 0..count, 1).is_some(), !range.is_empty());
                if order > 0 {
                    assert_eq!(width.increment(&mut block, range.clone()), Ok(()));
                    assert!(width.all_are(&block, range.clone(), 2));
                    assert_eq!(width.decrement(&mut block, range.clone()), Ok(()));
                }
                assert_eq!(width.decrement(&mut block, range.clone()), Ok(()));
                assert!(block.iter().all(|byte| *byte == 0));
            }
        }
    }

    #[test]
    fn a_run_with_a_full_or_empty_counter_changes_nothing() {
        for order in 0..=6 {
            let width = CounterWidth::new(order);
            let mut block = vec![0; 64];
            width.set(&mut block, 4, width.max());
            let before = block.clone();
            assert_eq!(width.increment(&mut block, 2..6), Err(4), "order {order}");
            assert_eq!(width.decrement(&mut block, 4..6), Err(5), "order {order}");
            assert_eq!(block, before);
        }
    }
}
