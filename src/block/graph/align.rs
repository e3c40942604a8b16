//! Requests of any offset and length on a driver that takes whole blocks only.
//!
//! What covers a block in part reads it, changes it and writes it back, alone in its range: another writer in
//! between would be undone. Writes of whole blocks share their ranges among each other and are kept out only
//! by those.

use super::node::Inner;
use crate::driver::{BlockStatus, WriteFlags, ZeroFlags};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Access, Data, HostRange, RangeGuard};
use crate::units::{align_down, align_up};

impl Inner {
    fn block(&self) -> u64 {
        u64::from(self.driver.limits().alignment)
    }

    pub(super) async fn read_aligned(&self, offset: u64, len: u64) -> Result<Data> {
        let block = self.block();
        if is_aligned(offset, len, block) {
            return self.driver.read(offset, len).await;
        }
        let start = align_down(offset, block);
        let end = self.block_end(offset + len, block)?;
        let data = self.driver.read(start, end - start).await?;
        Ok(data.slice(offset - start, len))
    }

    pub(super) async fn write_aligned(
        &self,
        offset: u64,
        data: Data,
        flags: WriteFlags,
    ) -> Result<()> {
        let block = self.block();
        let end = offset + data.len();
        if data.is_empty() || block == 1 {
            return self.driver.write(offset, data, flags).await;
        }
        if is_aligned(offset, data.len(), block) {
            let _shared = self.lock(offset, end, Access::Shared).await;
            return self.driver.write(offset, data, flags).await;
        }
        let start = align_down(offset, block);
        let whole_end = self.block_end(end, block)?;
        let _alone = self.lock(start, whole_end, Access::Exclusive).await;
        let mut whole = Data::new();
        if start < offset {
            let first = self.driver.read(start, block).await?;
            whole.append(first.slice(0, offset - start));
        }
        whole.append(data);
        if end < whole_end {
            let last = self.driver.read(whole_end - block, block).await?;
            let rest = whole_end - end;
            whole.append(last.slice(block - rest, rest));
        }
        self.driver.write(start, whole, flags).await
    }

    pub(super) fn is_whole_blocks(&self, offset: u64, len: u64) -> bool {
        is_aligned(offset, len, self.block())
    }

    /// Writes pieces of whole blocks.
    pub(super) async fn pieces_aligned(&self, pieces: Vec<(u64, Data)>) -> Result<()> {
        let start = pieces.iter().map(|(at, _)| *at).min();
        let end = pieces.iter().map(|(at, data)| at + data.len()).max();
        let (Some(start), Some(end)) = (start, end) else {
            return Ok(());
        };
        if self.block() == 1 {
            return self.driver.write_pieces(pieces).await;
        }
        let _shared = self.lock(start, end, Access::Shared).await;
        self.driver.write_pieces(pieces).await
    }

    /// Shares whole blocks; `Unsupported` for others.
    pub(super) async fn share_aligned(&self, offset: u64, from: HostRange) -> Result<()> {
        let block = self.block();
        if block == 1 {
            return self.driver.write_shared(offset, from).await;
        }
        if !is_aligned(offset, from.len(), block) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "Parts of blocks cannot be shared",
            ));
        }
        let end = offset + from.len();
        let _shared = self.lock(offset, end, Access::Shared).await;
        self.driver.write_shared(offset, from).await
    }

    /// Zeroes whole blocks by the driver, and those at the ends that are covered in part by writing.
    pub(super) async fn zero_aligned(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let block = self.block();
        if len == 0 || block == 1 {
            return self.driver.write_zeroes(offset, len, flags).await;
        }
        let end = offset + len;
        let write = WriteFlags::fua(flags.fua);
        let middle_start = self.block_end(offset, block)?.min(end);
        let middle_end = align_down(end, block).max(middle_start);
        if middle_start < middle_end {
            let _shared = self.lock(middle_start, middle_end, Access::Shared).await;
            let middle = middle_end - middle_start;
            self.driver
                .write_zeroes(middle_start, middle, flags)
                .await?;
        }
        for (from, to) in [(offset, middle_start), (middle_end, end)] {
            if from < to {
                self.write_aligned(from, Data::zeroes(to - from), write)
                    .await?;
            }
        }
        Ok(())
    }

    /// Discards whole blocks only: a hint may be cut.
    pub(super) async fn discard_aligned(&self, offset: u64, len: u64) -> Result<()> {
        let block = self.block();
        if block == 1 {
            return self.driver.discard(offset, len).await;
        }
        let start = self.block_end(offset, block)?;
        let end = align_down(offset + len, block);
        if start >= end {
            return Ok(());
        }
        let _shared = self.lock(start, end, Access::Shared).await;
        self.driver.discard(start, end - start).await
    }

    pub(super) async fn status_aligned(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let block = self.block();
        if is_aligned(offset, len, block) {
            return self.driver.block_status(offset, len).await;
        }
        let start = align_down(offset, block);
        let end = self.block_end(offset + len, block)?;
        let status = self.driver.block_status(start, end - start).await?;
        let skipped = offset - start;
        Ok(BlockStatus {
            // A driver answers for whole blocks, so something is left after the part in front.
            len: status.len.saturating_sub(skipped).clamp(1, len.max(1)),
            host_offset: status.host_offset.map(|at| at + skipped),
            ..status
        })
    }

    fn block_end(&self, offset: u64, block: u64) -> Result<u64> {
        align_up(offset, block).ok_or_else(|| {
            Error::new(
                ErrorKind::OutOfRange,
                format!(
                    "Offset {offset} is outside of node '{}'",
                    self.name.as_str()
                ),
            )
        })
    }

    async fn lock(&self, start: u64, end: u64, access: Access) -> RangeGuard<'_> {
        self.ranges.lock(start..end, access).await
    }
}

fn is_aligned(offset: u64, len: u64, block: u64) -> bool {
    (offset | len) & (block - 1) == 0
}
