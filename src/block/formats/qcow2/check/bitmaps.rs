//! Clusters of persistent bitmaps (specification: "Bitmaps extension", "Bitmap directory", "Bitmap table").

use super::Scan;
use crate::error::Result;
use crate::limits::{QCOW2_MAX_BITMAP_DIRECTORY_BYTES, QCOW2_MAX_BITMAP_TABLE_ENTRIES};

/// Bytes of a directory entry in front of its extra data and name.
const FIXED_BYTES: usize = 24;

/// How much of a bitmap table is read at once, in bytes.
const PIECE: u64 = 1 << 20;

/// Bits of a bitmap table entry that must be 0: 1 to 8 and 56 to 63.
const RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Bits 9 to 55: where a cluster of the bitmap lies.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

impl Scan<'_> {
    /// Counts directory, tables and data of the bitmaps that the header points to.
    pub(super) async fn count_bitmaps(&mut self) -> Result<()> {
        let Some(extension) = self.header.bitmaps_extension() else {
            return Ok(());
        };
        let Some(fields) = extension.first_chunk::<24>() else {
            self.bitmaps_are_wrong("extension is too short");
            return Ok(());
        };
        let directory_bytes = u64_at(fields, 8);
        let directory_offset = u64_at(fields, 16);
        if directory_bytes > QCOW2_MAX_BITMAP_DIRECTORY_BYTES {
            self.bitmaps_are_wrong("directory is too large");
            return Ok(());
        }
        self.use_metadata("bitmap directory", directory_offset, directory_bytes)?;
        let inside = directory_offset
            .checked_add(directory_bytes)
            .is_some_and(|end| end <= self.file.size());
        if !inside {
            return Ok(());
        }
        let directory = self.file.read(directory_offset, directory_bytes).await?;
        let directory = directory.to_bytes();
        let mut rest = &directory[..];
        while let Some(fixed) = rest.first_chunk::<FIXED_BYTES>() {
            let name = usize::from(u16::from_be_bytes([fixed[18], fixed[19]]));
            let extra = u32_at(fixed, 20) as usize;
            self.count_bitmap(u64_at(fixed, 0), u32_at(fixed, 8))
                .await?;
            let len = (FIXED_BYTES + extra + name).next_multiple_of(8);
            match rest.get(len..) {
                Some(next) => rest = next,
                None => {
                    self.bitmaps_are_wrong("directory does not parse");
                    break;
                }
            }
        }
        Ok(())
    }

    async fn count_bitmap(&mut self, offset: u64, entries: u32) -> Result<()> {
        if entries > QCOW2_MAX_BITMAP_TABLE_ENTRIES {
            self.bitmaps_are_wrong("table is too large");
            return Ok(());
        }
        let bytes = u64::from(entries) * 8;
        self.use_metadata("bitmap table", offset, bytes)?;
        let end = offset.saturating_add(bytes).min(self.file.size());
        self.spend(end.saturating_sub(offset))?;
        let mut at = offset;
        while at < end {
            let piece = self.file.read(at, PIECE.min(end - at)).await?.to_bytes();
            at += piece.len() as u64;
            for entry in piece.as_chunks().0 {
                let entry = u64::from_be_bytes(*entry);
                let cluster = entry & OFFSET;
                if entry & RESERVED != 0 || !self.g.is_aligned(cluster) {
                    self.bitmaps_are_wrong("table has an impossible entry");
                } else if cluster != 0 {
                    self.use_metadata("bitmap", cluster, self.g.cluster_size())?;
                }
            }
        }
        Ok(())
    }

    fn bitmaps_are_wrong(&mut self, what: &str) {
        self.report.corruptions += 1;
        self.structural += 1;
        self.report.note(|| format!("ERROR bitmap {what}"));
    }
}

fn u64_at(bytes: &[u8; 24], at: usize) -> u64 {
    bytes[at..at + 8]
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn u32_at(bytes: &[u8; 24], at: usize) -> u32 {
    bytes[at..at + 4]
        .iter()
        .fold(0, |value, byte| value << 8 | u32::from(*byte))
}
