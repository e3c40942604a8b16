//! What an overlay has got, written to what is below it: before an overlay that guests have written to is taken away from them.

use super::node::{Node, Quiesced};
use crate::driver::{Requests as _, WriteFlags, ZeroFlags};
use crate::error::Result;
use crate::limits::COPY_CHUNK;

/// Writes all that `overlay` has to `below`, so that this shows what the overlay shows. `held` holds the overlay; `below` answers. Not
/// durable when it answers, as writes are not.
///
/// After an error, and when it is dropped in its middle, the overlay shows what it has shown, and can stay where it is.
pub async fn write_down(overlay: &Node, held: &Quiesced, below: &Node) -> Result<()> {
    assert!(held.is_of(overlay), "node '{}' is not held", overlay.name());
    // Not through the node, which is held.
    let driver = overlay.driver();
    let end = driver.size();
    let mut at = 0;
    while at < end {
        let status = driver.block_status(at, end - at).await?;
        let mut piece = at..at + status.len;
        at = piece.end;
        if !status.allocated {
            continue;
        }
        if status.zero {
            let flags = ZeroFlags {
                may_unmap: true,
                ..ZeroFlags::default()
            };
            let len = piece.end - piece.start;
            below.write_zeroes(piece.start, len, flags).await?;
            continue;
        }
        while !piece.is_empty() {
            let len = (piece.end - piece.start).min(COPY_CHUNK);
            let data = driver.read(piece.start, len).await?;
            let flags = WriteFlags::default();
            below.write(piece.start, data, flags).await?;
            piece.start += len;
        }
    }
    Ok(())
}
