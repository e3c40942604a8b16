//! Bitmap tables: which clusters hold a bitmap's bits (specification: "Bitmap table").

use super::directory::{Entry, corrupt};
use crate::driver::Child;
use crate::error::Result;
use crate::formats::qcow2::geometry::Geometry;
use crate::units::HostOffset;

/// How much of a table is read at once, in bytes.
const PIECE: u64 = 1 << 20;

/// Bits of an entry that must be 0: 1 to 8 and 56 to 63.
const RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Bits 9 to 55: where the cluster lies.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Without a cluster: all bits are ones.
const ALL_ONES: u64 = 1;

/// The cluster that a table entry points to; none where its bits are all alike. `Corrupt` for an impossible entry.
pub(crate) fn cluster_of(g: Geometry, entry: u64) -> Result<Option<HostOffset>> {
    let host = HostOffset(entry & OFFSET);
    let both = host.0 != 0 && entry & ALL_ONES != 0;
    if entry & RESERVED != 0 || both || !g.is_aligned(host.0) {
        return Err(corrupt(format!("table entry {entry:#x} is not valid")));
    }
    Ok((host.0 != 0).then_some(host))
}

/// Reads a bitmap's table and hands each entry to `each`, in order; stops at the first error.
pub(crate) async fn read_table(
    file: &Child,
    bitmap: &Entry,
    mut each: impl FnMut(u64) -> Result<()>,
) -> Result<()> {
    let mut at = bitmap.table;
    let end = bitmap.table + bitmap.table_bytes();
    while at < end {
        let len = PIECE.min(end - at);
        let piece = file.read(at.0, len).await?.to_bytes();
        for entry in piece.as_chunks().0 {
            each(u64::from_be_bytes(*entry))?;
        }
        at = at + len;
    }
    Ok(())
}
