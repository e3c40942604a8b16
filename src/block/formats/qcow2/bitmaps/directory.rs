//! The directory of persistent bitmaps as it is in the image (specification: "Bitmaps extension", "Bitmap directory").
//!
//! ```text
//! header extension -> directory: | entry | extra data | name | padding to 8 | entry ...
//!                                    -> bitmap table -> clusters of bits
//! ```
//!
//! An entry starts at a multiple of 8 and a directory at a cluster, so the 8 bytes of table size and flags never cross a sector.

use std::collections::HashSet;

use crate::driver::Child;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::geometry::Geometry;
use crate::formats::qcow2::header::{Autoclear, Header, check_table};
use crate::limits::{
    QCOW2_BITMAP_GRANULARITY_BITS, QCOW2_MAX_BITMAP_BYTES, QCOW2_MAX_BITMAP_DIRECTORY_BYTES,
    QCOW2_MAX_BITMAP_NAME, QCOW2_MAX_BITMAP_TABLE_ENTRIES, QCOW2_MAX_BITMAPS,
};
use crate::units::HostOffset;

/// Bytes of an entry in front of its extra data and name.
const FIXED_BYTES: usize = 24;
/// Where in an entry the size of the table stands; the flags follow.
const TABLE_SIZE_AT: u64 = 8;
/// The only type of bitmap that is defined: dirty tracking.
const TYPE_DIRTY_TRACKING: u8 = 1;

/// The flags of a bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Flags(pub(crate) u32);

impl Flags {
    /// Not saved in order: nothing may be concluded from its bits.
    pub(crate) const IN_USE: u32 = 1;
    /// Enabled: it must reflect every change of the disk.
    pub(crate) const AUTO: u32 = 1 << 1;
    /// Bits that are not defined; bit 2 is about extra data.
    const RESERVED: u32 = !0b111;

    /// Whether the bits may not be used.
    pub(crate) fn is_in_use(self) -> bool {
        self.0 & Self::IN_USE != 0
    }

    /// Whether it must reflect every change of the disk.
    pub(crate) fn is_auto(self) -> bool {
        self.0 & Self::AUTO != 0
    }
}

/// A bitmap as the directory has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Where in the file the entry is.
    pub(crate) at: HostOffset,
    pub(crate) table: HostOffset,
    pub(crate) table_entries: u32,
    pub(crate) flags: Flags,
    pub(crate) granularity_bits: u8,
    /// As text for people; what is not UTF-8 is replaced.
    pub(crate) name: String,
}

impl Entry {
    /// Bytes of the table.
    pub(crate) fn table_bytes(&self) -> u64 {
        u64::from(self.table_entries) * 8
    }

    /// How many table entries a bitmap for a disk of `size` bytes has.
    pub(crate) fn entries_for(&self, g: Geometry, size: u64) -> u64 {
        let bits = size.div_ceil(1 << self.granularity_bits);
        g.clusters_for(bits.div_ceil(8))
    }

    /// Where the size of the table and the flags are in the file, and their bytes. One write of them happens whole or not
    /// at all.
    pub(crate) fn switch_bytes(&self) -> (HostOffset, Vec<u8>) {
        let mut bytes = self.table_entries.to_be_bytes().to_vec();
        bytes.extend(self.flags.0.to_be_bytes());
        (self.at + TABLE_SIZE_AT, bytes)
    }
}

/// The directory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Directory {
    /// Where it starts; 0 without bitmaps.
    pub(crate) offset: HostOffset,
    /// Its bytes.
    pub(crate) len: u64,
    pub(crate) entries: Vec<Entry>,
}

impl Directory {
    /// Reads the directory that the header points to. Without bitmaps, or where the autoclear bit says that a writer did not
    /// know them, it is empty.
    ///
    /// `Corrupt` when anything in it breaks the specification or QEMU's limits.
    pub(crate) async fn read(file: &Child, header: &Header) -> Result<Directory> {
        let Some(extension) = header.bitmaps_extension() else {
            return Ok(Directory::default());
        };
        if !header.autoclear.has(Autoclear::BITMAPS) {
            return Ok(Directory::default());
        }
        let (count, offset, len) = extension_fields(header.geometry(), extension)?;
        if offset.0 + len > file.size() {
            return Err(corrupt("directory is outside of the file"));
        }
        let bytes = file.read(offset.0, len).await?.to_bytes();
        let entries = parse(&bytes, offset, count)?;
        for entry in &entries {
            check_entry(entry, header, file.size())?;
        }
        Ok(Directory {
            offset,
            len,
            entries,
        })
    }
}

/// Number of bitmaps, offset and size of the directory.
fn extension_fields(g: Geometry, extension: &[u8]) -> Result<(u32, HostOffset, u64)> {
    let Ok(fields) = <&[u8; 24]>::try_from(extension) else {
        return Err(corrupt("extension has a wrong length"));
    };
    let (count, reserved) = (u32_at(fields, 0), u32_at(fields, 4));
    let (len, offset) = (u64_at(fields, 8), HostOffset(u64_at(fields, 16)));
    if reserved != 0 {
        return Err(corrupt("extension has reserved bits set"));
    }
    if count == 0 || count > QCOW2_MAX_BITMAPS {
        return Err(corrupt(format!("extension counts {count} bitmaps")));
    }
    if len == 0 || len > QCOW2_MAX_BITMAP_DIRECTORY_BYTES {
        return Err(corrupt(format!("directory has {len} bytes")));
    }
    check_table(g, "Bitmap directory", offset, len).map_err(|error| corrupt(error.message()))?;
    Ok((count, offset, len))
}

fn parse(bytes: &[u8], offset: HostOffset, count: u32) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut names = HashSet::new();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let Some(fixed) = rest.first_chunk::<FIXED_BYTES>() else {
            return Err(corrupt("directory ends inside an entry"));
        };
        let name_len = usize::from(u16::from_be_bytes([fixed[18], fixed[19]]));
        let name_start = FIXED_BYTES.saturating_add(u32_at(fixed, 20) as usize);
        let name_end = name_start.saturating_add(name_len);
        let len = name_end
            .checked_next_multiple_of(8)
            .filter(|len| *len <= rest.len())
            .ok_or_else(|| corrupt("directory ends inside an entry"))?;
        let name = &rest[name_start..name_end];
        if name.is_empty() || name_len > QCOW2_MAX_BITMAP_NAME {
            return Err(corrupt(format!("name has {name_len} bytes")));
        }
        let text = String::from_utf8_lossy(name).into_owned();
        if !names.insert(name) {
            return Err(corrupt(format!("name '{text}' appears twice")));
        }
        if fixed[16] != TYPE_DIRTY_TRACKING {
            return Err(corrupt(format!("'{text}' has type {}", fixed[16])));
        }
        entries.push(Entry {
            at: offset + at as u64,
            table: HostOffset(u64_at(fixed, 0)),
            table_entries: u32_at(fixed, 8),
            flags: Flags(u32_at(fixed, 12)),
            granularity_bits: fixed[17],
            name: text,
        });
        at += len;
    }
    if entries.len() as u64 != u64::from(count) {
        return Err(corrupt(format!(
            "directory has {} entries, the extension counts {count}",
            entries.len()
        )));
    }
    Ok(entries)
}

/// Holds an entry's fields against the specification, QEMU's limits, the disk and the file.
fn check_entry(entry: &Entry, header: &Header, file_size: u64) -> Result<()> {
    let g = header.geometry();
    let name = &entry.name;
    if entry.flags.0 & Flags::RESERVED != 0 {
        return Err(corrupt(format!("'{name}' has reserved flags set")));
    }
    if !QCOW2_BITMAP_GRANULARITY_BITS.contains(&entry.granularity_bits) {
        let bits = entry.granularity_bits;
        return Err(corrupt(format!("'{name}' has a granularity of 2^{bits}")));
    }
    let most = QCOW2_MAX_BITMAP_BYTES >> g.cluster_bits();
    let count = entry.table_entries;
    if count == 0 || count > QCOW2_MAX_BITMAP_TABLE_ENTRIES || u64::from(count) > most {
        return Err(corrupt(format!("table of '{name}' has {count} entries")));
    }
    let bytes = entry.table_bytes();
    check_table(g, "table", entry.table, bytes)
        .map_err(|error| corrupt(format!("'{name}': {error}")))?;
    if entry.table.0 + bytes > file_size {
        return Err(corrupt(format!("table of '{name}' is outside of the file")));
    }
    // One that was in use during a resize may have any size.
    if !entry.flags.is_in_use() && u64::from(count) < entry.entries_for(g, header.size) {
        return Err(corrupt(format!(
            "'{name}' is too short for a disk of this size"
        )));
    }
    Ok(())
}

pub(crate) fn corrupt(what: impl std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!("qcow2: Image is corrupt: bitmap {what}"),
    )
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
