//! Content on its way into the target: zeroes stay zeroes, clusters are compressed if that is asked for.

use std::ops::Range;

use futures_util::future::try_join_all;

use super::TargetContent;
use super::shared::Shared;
use crate::driver::{BoxFuture, WriteFlags, ZeroFlags};
use crate::error::{ErrorKind, Result};
use crate::io::{Data, Segment};

impl Shared {
    /// Gives the target what belongs at `offset`, the start of a cluster.
    pub(super) async fn put(&self, offset: u64, data: Data, ahead: u64) -> Result<()> {
        let runs = runs(&data, self.unit);
        if let [(_, false)] = runs[..]
            && !self.options.compress
        {
            self.learnt.data(data.len());
            let flags = WriteFlags {
                ahead,
                ..WriteFlags::default()
            };
            return self.target.write(offset, data, flags).await;
        }
        let mut writes: Vec<BoxFuture<'_, Result<()>>> = Vec::new();
        let mut pieces = Vec::new();
        for (range, zero) in runs {
            let at = offset + range.start;
            let len = range.end - range.start;
            if zero {
                if self.learnt.zeroes(at) {
                    writes.push(self.give_back(at, len));
                }
                if !self.has_zeroes(at, len) {
                    writes.push(Box::pin(self.put_zeroes(at, len)));
                }
                continue;
            }
            let part = data.slice(range.start, len);
            match self.options.compress {
                true => self.put_compressed(at, part, &mut writes),
                false => pieces.push((at, part)),
            }
        }
        if !pieces.is_empty() {
            writes.push(self.target.write_pieces(pieces));
        }
        match writes.pop() {
            Some(only) if writes.is_empty() => only.await,
            last => try_join_all(writes.into_iter().chain(last)).await.map(drop),
        }
    }

    /// Whether the target is known to read as zeroes there.
    fn has_zeroes(&self, offset: u64, len: u64) -> bool {
        let known = |end| end >= offset + len;
        self.options.target_content == TargetContent::Zero
            || self.learnt.target_zero(offset).is_some_and(known)
    }

    /// Makes the target read zeroes, with no more than that takes.
    pub(super) async fn put_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        if self.options.target_content == TargetContent::Zero {
            return Ok(());
        }
        let end = offset + len;
        let mut at = offset;
        while at < end {
            if let Some(zero) = self.learnt.target_zero(at) {
                at = zero;
                continue;
            }
            let status = self.target.block_status(at, end - at).await?;
            if !status.zero {
                let flags = ZeroFlags {
                    may_unmap: true,
                    ..ZeroFlags::default()
                };
                self.target.write_zeroes(at, status.len, flags).await?;
            }
            at += status.len;
        }
        Ok(())
    }

    /// The target may have taken space for what turns out to be zeroes, and reads as zeroes there in any case.
    fn give_back(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        let flags = ZeroFlags {
            may_unmap: true,
            no_fallback: true,
            ..ZeroFlags::default()
        };
        Box::pin(async move {
            let given = self.target.write_zeroes(offset, len, flags).await;
            given.or_else(|error| match error.kind() {
                ErrorKind::Unsupported => Ok(()),
                _ => Err(error),
            })
        })
    }

    fn put_compressed<'a>(
        &'a self,
        offset: u64,
        mut data: Data,
        writes: &mut Vec<BoxFuture<'a, Result<()>>>,
    ) {
        let cluster = self.options.target_cluster.unwrap_or(self.unit);
        let mut at = offset;
        while !data.is_empty() {
            let part = data.split_to(cluster.min(data.len()));
            let len = part.len();
            writes.push(self.target.write_compressed(at, part));
            at += len;
        }
    }
}

/// The content as runs of units that are all zero, and of those that are not.
fn runs(data: &Data, unit: u64) -> Vec<(Range<u64>, bool)> {
    let mut runs: Vec<(Range<u64>, bool)> = Vec::with_capacity(1);
    let mut note = |range: Range<u64>, zero: bool| match runs.last_mut() {
        Some((run, last)) if *last == zero => run.end = range.end,
        _ => runs.push((range, zero)),
    };
    let (mut at, mut start) = (0, 0);
    for segment in data.segments() {
        let end = start + segment.len();
        // What begins in this segment: whole units of it, and then one that may go on in the next.
        while at < end {
            let inside = (end - at) / unit * unit;
            match segment {
                Segment::Zeroes(_) if inside > 0 => {
                    note(at..at + inside, true);
                    at += inside;
                }
                Segment::Zeroes(_) | Segment::Bytes(_) => {
                    let unit_end = (at + unit).min(data.len());
                    let zero = data.slice(at, unit_end - at).reads_as_zeroes();
                    note(at..unit_end, zero);
                    at = unit_end;
                }
            }
        }
        start = end;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_units_are_told_from_others_wherever_the_segments_end() {
        let mut data = Data::from(vec![0; 6]);
        data.push(Segment::Zeroes(3));
        data.append(Data::from(vec![0, 0, 1, 0, 0, 0]));
        assert_eq!(
            runs(&data, 4),
            [(0..8, true), (8..12, false), (12..15, true)]
        );
        assert_eq!(runs(&data, 16), [(0..15, false)]);
        assert!(runs(&Data::new(), 4).is_empty());
    }
}
