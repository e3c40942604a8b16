//! The snapshot table: decoded, encoded and searched (qcow2 specification, "Snapshots").
//!
//! ```text
//! header.snapshots_offset -> | entry | pad to 8 | entry | pad to 8 | entry |
//! entry = 40 bytes of fields, extra data, id, name
//! ```
//!
//! Entries have no fixed length and the header does not say how long the table is, so it is decoded as it is read.
//! Ids, names and extra data are kept as the bytes they are: what we do not know is written back unchanged.

use std::ops::ControlFlow;
use std::sync::Arc;

use crate::driver::{Child, NewSnapshot, SnapshotInfo, SnapshotSelector};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{
    QCOW2_MAX_SNAPSHOT_EXTRA_BYTES, QCOW2_MAX_SNAPSHOT_TABLE_BYTES, QCOW2_MAX_SNAPSHOTS,
};

/// Bytes of an entry in front of its extra data.
const FIXED_BYTES: usize = 40;

/// Extra data that version 3 requires: 64-bit VM state size and disk size.
const REQUIRED_EXTRA_BYTES: usize = 16;

/// Extra data that we write: the required fields and the instruction count.
const WRITTEN_EXTRA_BYTES: usize = 24;

/// What the icount field says when nothing was recorded.
const NO_ICOUNT: u64 = u64::MAX;

/// How much of the table is read at once, in bytes.
const READ_BYTES: u64 = 256 << 10;

/// One snapshot as the table has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TableEntry {
    /// Where the snapshot's L1 table lies, in bytes; not yet checked.
    pub(crate) l1_offset: u64,
    /// Entries of the snapshot's L1 table; not yet checked.
    pub(crate) l1_entries: u32,
    id: Vec<u8>,
    name: Vec<u8>,
    date_sec: u32,
    date_nsec: u32,
    vm_clock_nsec: u64,
    vm_state_size_32: u32,
    extra: Vec<u8>,
}

impl TableEntry {
    /// The entry of a snapshot that is taken now; no VM state.
    pub(crate) fn new(id: u64, new: &NewSnapshot, disk_size: u64) -> Self {
        let mut extra = vec![0; WRITTEN_EXTRA_BYTES];
        extra[8..16].copy_from_slice(&disk_size.to_be_bytes());
        extra[16..24].copy_from_slice(&NO_ICOUNT.to_be_bytes());
        TableEntry {
            l1_offset: 0,
            l1_entries: 0,
            id: id.to_string().into_bytes(),
            name: new.name.clone().into_bytes(),
            date_sec: new.date_sec,
            date_nsec: new.date_nsec,
            vm_clock_nsec: new.vm_clock_nsec,
            vm_state_size_32: 0,
            extra,
        }
    }

    /// The entry as the engine shows it. `active_size` stands in where the entry does not say its disk size.
    pub(crate) fn info(&self, active_size: u64) -> SnapshotInfo {
        SnapshotInfo {
            id: String::from_utf8_lossy(&self.id).into_owned(),
            name: String::from_utf8_lossy(&self.name).into_owned(),
            vm_state_size: self
                .extra_u64(0)
                .unwrap_or(u64::from(self.vm_state_size_32)),
            date_sec: self.date_sec,
            date_nsec: self.date_nsec,
            vm_clock_nsec: self.vm_clock_nsec,
            icount: self.extra_u64(16).filter(|&icount| icount != NO_ICOUNT),
            disk_size: self.extra_u64(8).unwrap_or(active_size),
        }
    }

    /// Whether the entry lacks the extra data that version 3 requires.
    pub(crate) fn is_incomplete(&self) -> bool {
        self.extra.len() < REQUIRED_EXTRA_BYTES
    }

    /// Adds the extra data that version 3 requires, where it is missing.
    pub(crate) fn complete(&mut self, active_size: u64) {
        if !self.is_incomplete() {
            return;
        }
        let info = self.info(active_size);
        self.extra.resize(REQUIRED_EXTRA_BYTES, 0);
        self.extra[..8].copy_from_slice(&info.vm_state_size.to_be_bytes());
        self.extra[8..16].copy_from_slice(&info.disk_size.to_be_bytes());
    }

    fn extra_u64(&self, at: usize) -> Option<u64> {
        self.extra.get(at..).and_then(|rest| be_u64(rest, 0))
    }

    /// Bytes of the entry without padding.
    fn encoded_len(&self) -> usize {
        FIXED_BYTES + self.extra.len() + self.id.len() + self.name.len()
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.resize(out.len().next_multiple_of(8), 0);
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.l1_entries.to_be_bytes());
        out.extend((self.id.len() as u16).to_be_bytes());
        out.extend((self.name.len() as u16).to_be_bytes());
        out.extend(self.date_sec.to_be_bytes());
        out.extend(self.date_nsec.to_be_bytes());
        out.extend(self.vm_clock_nsec.to_be_bytes());
        out.extend(self.vm_state_size_32.to_be_bytes());
        out.extend((self.extra.len() as u32).to_be_bytes());
        out.extend(&self.extra);
        out.extend(&self.id);
        out.extend(&self.name);
    }
}

/// All entries, in the order of the image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct SnapshotTable {
    /// Shared with other states of the table: it is copied while guests stand still.
    entries: Vec<Arc<TableEntry>>,
}

impl SnapshotTable {
    /// Reads the table of `count` entries at `offset`, both from the header.
    ///
    /// `Corrupt` when it breaks a limit, runs past the end of the file or does not parse.
    pub(crate) async fn read(file: &Child, offset: u64, count: u32) -> Result<Self> {
        if count > QCOW2_MAX_SNAPSHOTS {
            return Err(corrupt(format!(
                "Snapshot table has {count} entries, more than {QCOW2_MAX_SNAPSHOTS}"
            )));
        }
        let end = file
            .size()
            .min(offset.saturating_add(QCOW2_MAX_SNAPSHOT_TABLE_BYTES));
        let mut decoder = Decoder::new(count);
        let mut at = offset;
        while !decoder.is_done() {
            let len = READ_BYTES.min(end.saturating_sub(at));
            if len == 0 {
                return Err(corrupt(format!(
                    "Snapshot table at {offset:#x} runs past the end of the file or is too large \
                     in entry {}",
                    decoder.table.entries.len()
                )));
            }
            decoder.push(&file.read(at, len).await?.to_bytes())?;
            at += len;
        }
        Ok(decoder.table)
    }

    /// The entries in order.
    pub(crate) fn entries(&self) -> &[Arc<TableEntry>] {
        &self.entries
    }

    /// How many bytes are written; none for no entries.
    ///
    /// `InvalidInput` when the table would break the format's limits.
    pub(crate) fn encoded_len(&self) -> Result<usize> {
        if self.entries.len() > QCOW2_MAX_SNAPSHOTS as usize {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("Cannot have more than {QCOW2_MAX_SNAPSHOTS} snapshots in an image"),
            ));
        }
        let lengths = self.entries.iter().map(|entry| entry.encoded_len());
        let len = lengths.fold(0, |at: usize, len| at.next_multiple_of(8) + len);
        if len as u64 > QCOW2_MAX_SNAPSHOT_TABLE_BYTES {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "Snapshot table would become too large",
            ));
        }
        Ok(len)
    }

    /// The table as it is written. Errors as [`SnapshotTable::encoded_len`].
    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        let len = self.encoded_len()?;
        let mut bytes = Vec::with_capacity(len);
        for entry in &self.entries {
            entry.encode(&mut bytes);
        }
        debug_assert_eq!(bytes.len(), len);
        Ok(bytes)
    }

    /// The table with `entry` at its end.
    pub(crate) fn with(&self, entry: TableEntry) -> Self {
        let mut table = self.clone();
        table.entries.push(Arc::new(entry));
        table
    }

    /// The table without the entry at `index`.
    pub(crate) fn without(&self, index: usize) -> Self {
        let mut table = self.clone();
        table.entries.remove(index);
        table
    }

    /// Adds to every entry what version 3 requires.
    pub(crate) fn complete(&mut self, active_size: u64) {
        for entry in &mut self.entries {
            if entry.is_incomplete() {
                Arc::make_mut(entry).complete(active_size);
            }
        }
    }

    /// Where the snapshot is that matches all that `which` gives.
    pub(crate) fn find(&self, which: &SnapshotSelector) -> Option<usize> {
        if which.id.is_none() && which.name.is_none() {
            return None;
        }
        let same = |wanted: &Option<String>, is: &[u8]| {
            wanted.as_ref().is_none_or(|wanted| wanted.as_bytes() == is)
        };
        self.entries
            .iter()
            .position(|entry| same(&which.id, &entry.id) && same(&which.name, &entry.name))
    }

    /// As `find`; `NotFound` where there is none.
    pub(crate) fn index_of(&self, which: &SnapshotSelector) -> Result<usize> {
        let index = self.find(which);
        index.ok_or_else(|| Error::new(ErrorKind::NotFound, "Can't find the snapshot"))
    }

    /// Whether an entry has this name. That another has it as its id is no matter: who selects says which he means.
    pub(crate) fn has_name(&self, wanted: &str) -> bool {
        self.entries
            .iter()
            .any(|entry| entry.name == wanted.as_bytes())
    }

    /// The number for the next snapshot: one more than the largest, as in QEMU.
    ///
    /// Where an image made elsewhere has used up the largest number, the smallest free one.
    pub(crate) fn next_id(&self) -> u64 {
        let largest = self.entries.iter().map(|entry| number(&entry.id)).max();
        match largest.unwrap_or(0).checked_add(1) {
            Some(next) => next,
            None => {
                let used: std::collections::HashSet<u64> =
                    self.entries.iter().map(|entry| number(&entry.id)).collect();
                (1..).find(|id| !used.contains(id)).unwrap_or(1)
            }
        }
    }
}

/// The number that an id begins with (what strtoul makes of it), 0 for none.
fn number(id: &[u8]) -> u64 {
    let digits = id.iter().take_while(|byte| byte.is_ascii_digit());
    digits.fold(0u64, |sum, byte| {
        sum.saturating_mul(10)
            .saturating_add(u64::from(byte - b'0'))
    })
}

/// Decodes entries out of pieces of the table.
struct Decoder {
    table: SnapshotTable,
    count: usize,
    pending: Vec<u8>,
    /// Bytes of padding to skip in front of the next entry.
    padding: usize,
}

impl Decoder {
    fn new(count: u32) -> Self {
        Decoder {
            table: SnapshotTable::default(),
            count: count as usize,
            pending: Vec::new(),
            padding: 0,
        }
    }

    fn is_done(&self) -> bool {
        self.table.entries.len() == self.count
    }

    fn push(&mut self, piece: &[u8]) -> Result<()> {
        self.pending.extend_from_slice(piece);
        let mut used = 0;
        while !self.is_done() {
            match self.entry(used)? {
                ControlFlow::Continue(next) => used = next,
                ControlFlow::Break(()) => break,
            }
        }
        self.pending.drain(..used);
        Ok(())
    }

    /// Takes the entry at `at`: where the next one begins, or a break when there are too few bytes.
    fn entry(&mut self, at: usize) -> Result<ControlFlow<(), usize>> {
        let Some(bytes) = self.pending.get(at + self.padding..) else {
            return Ok(ControlFlow::Break(()));
        };
        let Some(fixed) = bytes.first_chunk::<FIXED_BYTES>() else {
            return Ok(ControlFlow::Break(()));
        };
        let u16_at = |at: usize| usize::from(u16::from_be_bytes([fixed[at], fixed[at + 1]]));
        let u32_at = |at: usize| {
            u32::from_be_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]])
        };
        let extra_len = u32_at(36);
        if extra_len > QCOW2_MAX_SNAPSHOT_EXTRA_BYTES {
            return Err(corrupt(format!(
                "Too much extra metadata in snapshot table entry {}",
                self.table.entries.len()
            )));
        }
        let id_at = FIXED_BYTES + extra_len as usize;
        let name_at = id_at + u16_at(12);
        let end = name_at + u16_at(14);
        let (Some(extra), Some(id), Some(name)) = (
            bytes.get(FIXED_BYTES..id_at),
            bytes.get(id_at..name_at),
            bytes.get(name_at..end),
        ) else {
            return Ok(ControlFlow::Break(()));
        };
        self.table.entries.push(Arc::new(TableEntry {
            l1_offset: be_u64(fixed, 0).unwrap_or(0),
            l1_entries: u32_at(8),
            id: id.to_vec(),
            name: name.to_vec(),
            date_sec: u32_at(16),
            date_nsec: u32_at(20),
            vm_clock_nsec: be_u64(fixed, 24).unwrap_or(0),
            vm_state_size_32: u32_at(32),
            extra: extra.to_vec(),
        }));
        let next = at + self.padding + end;
        // Entries begin at multiples of 8 from the table's start, which is cluster aligned; every entry so far
        // began at such a place, so its own length tells the padding.
        self.padding = end.next_multiple_of(8) - end;
        Ok(ControlFlow::Continue(next))
    }
}

fn be_u64(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..)?.first_chunk::<8>()?;
    Some(u64::from_be_bytes(*bytes))
}

fn corrupt(message: String) -> Error {
    Error::new(ErrorKind::Corrupt, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(name: &str) -> NewSnapshot {
        NewSnapshot {
            name: name.to_owned(),
            date_sec: 1_700_000_000,
            date_nsec: 5,
            vm_clock_nsec: 7,
        }
    }

    fn entry(id: u64, name: &str, extra: usize) -> TableEntry {
        let mut entry = TableEntry::new(id, &new(name), 1 << 30);
        entry.l1_offset = 0x30000;
        entry.l1_entries = 2;
        entry.extra.resize(extra, 0xab);
        entry
    }

    fn table(entries: impl IntoIterator<Item = TableEntry>) -> SnapshotTable {
        SnapshotTable {
            entries: entries.into_iter().map(Arc::new).collect(),
        }
    }

    fn decode(bytes: &[u8], count: u32, piece: usize) -> Result<Option<SnapshotTable>> {
        let mut decoder = Decoder::new(count);
        for piece in bytes.chunks(piece) {
            decoder.push(piece)?;
        }
        Ok(decoder.is_done().then_some(decoder.table))
    }

    #[test]
    fn what_is_encoded_decodes_to_the_same_whatever_the_pieces() {
        let table = table([
            entry(1, "one", 24),
            entry(2, "", 0),
            entry(30, "unknown extra data stays", 61),
            entry(4, "last", 1024),
        ]);
        let bytes = table.encode().unwrap();
        assert_eq!(table.encoded_len().unwrap(), bytes.len());
        for piece in [1, 7, 8, 64, 4096] {
            assert_eq!(decode(&bytes, 4, piece).unwrap().as_ref(), Some(&table));
        }
        assert_eq!(decode(&bytes[..bytes.len() - 1], 4, 64).unwrap(), None);
    }

    #[test]
    fn too_much_extra_data_is_refused() {
        let table = table([entry(1, "one", 1025)]);
        let error = decode(&table.encode().unwrap(), 1, 4096).unwrap_err();
        assert_eq!(
            error.message(),
            "Too much extra metadata in snapshot table entry 0"
        );
    }

    #[test]
    fn the_next_id_is_one_more_than_the_largest_number() {
        let ids = |ids: &[&str]| {
            table(ids.iter().map(|id| TableEntry {
                id: id.as_bytes().to_vec(),
                ..entry(1, "x", 24)
            }))
        };
        assert_eq!(ids(&[]).next_id(), 1);
        assert_eq!(ids(&["1", "7", "3"]).next_id(), 8);
        assert_eq!(ids(&["12ab", "weekly"]).next_id(), 13);
        assert_eq!(ids(&["99999999999999999999", "1"]).next_id(), 2);
    }

    #[test]
    fn a_selector_must_match_all_that_it_gives() {
        let table = table([entry(1, "a", 24), entry(2, "b", 24), entry(3, "1", 24)]);
        let find = |id: Option<&str>, name: Option<&str>| {
            table.find(&SnapshotSelector {
                id: id.map(str::to_owned),
                name: name.map(str::to_owned),
            })
        };
        assert_eq!(find(Some("1"), None), Some(0));
        assert_eq!(find(None, Some("1")), Some(2));
        assert_eq!(find(Some("2"), Some("b")), Some(1));
        assert_eq!(find(Some("2"), Some("a")), None);
        assert_eq!(find(None, None), None);
    }

    #[test]
    fn a_short_entry_gets_what_version_3_requires() {
        let mut short = entry(1, "old", 0);
        short.vm_state_size_32 = 9;
        assert!(short.is_incomplete());
        short.complete(77);
        assert!(!short.is_incomplete());
        let info = short.info(1);
        assert_eq!((info.vm_state_size, info.disk_size), (9, 77));
        assert_eq!(info.icount, None);
    }
}
