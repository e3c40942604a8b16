//! One L1 table and what is below it.

use flate2::{Decompress, FlushDecompress};

use super::{COPIED, DATA_FILE, OFFSET, Problem, words};
use crate::crashlab::content::{Content, SECTOR, Sector};
use crate::protocols::memory::Memory;

const COMPRESSED: u64 = 1 << 62;
const EXTENDED_L2: u64 = 1 << 4;
const SUBCLUSTERS: u64 = 32;

/// A layer: the disk as one L1 table shows it.
#[derive(Debug)]
pub struct Layer<'a> {
    bytes: &'a [u8],
    cluster_bits: u32,
    extended: bool,
    outside: bool,
    data: Option<&'a Memory>,
    backing: Option<&'a Content>,
    l1: Vec<u64>,
}

/// An L1 entry in use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table {
    index: u64,
    pub(super) at: u64,
    pub(super) copied: bool,
}

/// An L2 entry that is not empty.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    /// Number of the guest cluster.
    pub(super) guest: u64,
    pub(super) copied: bool,
    word: u64,
    bitmap: u64,
    cluster_bits: u32,
    outside: bool,
}

impl Entry {
    fn stream(&self) -> Option<(u64, u64)> {
        if self.word & COMPRESSED == 0 {
            return None;
        }
        let offset_bits = 62 - (self.cluster_bits - 8);
        let at = self.word & ((1 << offset_bits) - 1);
        let more = (self.word & (COMPRESSED - 1)) >> offset_bits;
        Some((at, (at / SECTOR + more + 1) * SECTOR - at))
    }

    /// Where its data lie, if it has a place for them. In an external data file offset 0 is one, with the flag COPIED.
    fn place(&self) -> Option<u64> {
        match self.word & OFFSET {
            0 if !(self.outside && self.copied) => None,
            at => Some(at),
        }
    }

    /// The host clusters that it refers to, and whether as a compressed stream. Those of an external data file are not counted.
    pub(super) fn clusters(&self, cluster: u64) -> impl Iterator<Item = (u64, bool)> + use<> {
        let (range, stream) = match (self.stream(), self.place()) {
            (Some((at, len)), _) => (at / cluster..(at + len).div_ceil(cluster), true),
            (None, Some(at)) if !self.outside => (at / cluster..at / cluster + 1, false),
            _ => (0..0, false),
        };
        range.map(move |number| (number, stream))
    }
}

impl<'a> Layer<'a> {
    pub(super) fn new(
        bytes: &'a [u8],
        cluster_bits: u32,
        incompatible: u64,
        (at, entries): (u64, u64),
    ) -> Result<Layer<'a>, Problem> {
        if entries > 1 << 22 {
            return Err(format!("L1 table of {entries} entries"));
        }
        let l1: Vec<u64> = words(bytes, at, entries)?.collect();
        for entry in &l1 {
            if entry & !(OFFSET | COPIED) != 0 || entry & OFFSET & ((1 << cluster_bits) - 1) != 0 {
                return Err(format!("L1 entry {entry:#x}"));
            }
        }
        Ok(Layer {
            bytes,
            cluster_bits,
            extended: incompatible & EXTENDED_L2 != 0,
            outside: incompatible & DATA_FILE != 0,
            data: None,
            backing: None,
            l1,
        })
    }

    /// The layer of an image with this external data file.
    pub(super) fn with_data(self, data: Option<&'a Memory>) -> Layer<'a> {
        Layer { data, ..self }
    }

    /// The layer of an image that shows this where it has nothing of its own.
    pub(super) fn with_backing(self, backing: Option<&'a Content>) -> Layer<'a> {
        Layer { backing, ..self }
    }

    pub(super) fn tables(&self) -> impl Iterator<Item = Table> {
        let entries = self.l1.iter().enumerate();
        entries
            .filter(|(_, entry)| **entry & OFFSET != 0)
            .map(|(index, entry)| Table {
                index: index as u64,
                at: entry & OFFSET,
                copied: entry & COPIED != 0,
            })
    }

    pub(super) fn entries(&self, table: Table) -> Result<Vec<Entry>, Problem> {
        let cluster = 1_u64 << self.cluster_bits;
        let entry_words = if self.extended { 2 } else { 1 };
        let per_table = cluster / 8 / entry_words;
        let mut raw = words(self.bytes, table.at, cluster / 8)?;
        let mut entries = Vec::new();
        for nth in 0..per_table {
            let word = raw.next().unwrap_or(0);
            let bitmap = match self.extended {
                true => raw.next().unwrap_or(0),
                false => 0,
            };
            if word == 0 && bitmap == 0 {
                continue;
            }
            let entry = Entry {
                guest: table.index * per_table + nth,
                copied: word & COPIED != 0,
                word,
                bitmap,
                cluster_bits: self.cluster_bits,
                outside: self.outside,
            };
            self.validate(&entry)?;
            entries.push(entry);
        }
        Ok(entries)
    }

    fn validate(&self, entry: &Entry) -> Result<(), Problem> {
        let cluster = 1_u64 << self.cluster_bits;
        let zero_flag = u64::from(!self.extended);
        let bad = match entry.stream() {
            Some((at, _)) => {
                self.outside || at >= self.bytes.len() as u64 || entry.copied || entry.bitmap != 0
            }
            None => {
                let (data, zero) = (entry.bitmap & 0xffff_ffff, entry.bitmap >> 32);
                let place = entry.place();
                let wrong_place = |at: u64| match self.outside {
                    true => at != entry.guest * cluster,
                    false => !at.is_multiple_of(cluster) || at >= self.bytes.len() as u64,
                };
                entry.word & !(OFFSET | COPIED | zero_flag) != 0
                    || data & zero != 0
                    || data != 0 && place.is_none()
                    || place.is_some_and(wrong_place)
            }
        };
        match bad {
            true => Err(format!(
                "L2 entry {:#x} of guest cluster {:#x}",
                entry.word, entry.guest
            )),
            false => Ok(()),
        }
    }

    /// What the layer shows, as a disk of `size` bytes.
    pub fn content(&self, size: u64) -> Result<Content, Problem> {
        let mut content = self.backing.cloned().unwrap_or_default();
        content.resize(size);
        for table in self.tables() {
            for entry in self.entries(table)? {
                self.read(&entry, &mut content)?;
            }
        }
        Ok(content)
    }

    fn read(&self, entry: &Entry, content: &mut Content) -> Result<(), Problem> {
        let cluster = 1_u64 << self.cluster_bits;
        let first = entry.guest * cluster / SECTOR;
        if let Some((at, len)) = entry.stream() {
            let inflated = self.inflate(at, len).ok_or_else(|| {
                let guest = entry.guest;
                format!("the compressed guest cluster {guest:#x} at {at:#x} is damaged")
            })?;
            put(content, first, &inflated);
            return Ok(());
        }
        let place = entry.place();
        let outside = match place {
            Some(at) if self.outside => {
                let data = self.data.ok_or("the data file is missing")?;
                Some(data.peek(at, cluster)).filter(|data| !data.is_known_zero())
            }
            _ => None,
        };
        let is_hole = self.outside && place.is_some() && outside.is_none();
        if !self.extended && (is_hole || entry.word & 1 == 1) {
            // Raw data files have entries for all of the disk.
            content.zero(first * SECTOR, cluster);
            return Ok(());
        }
        for sector in 0..cluster / SECTOR {
            let bytes = match (self.shows(entry, sector), place) {
                (Shown::Backing, _) => continue,
                (Shown::Zeroes, _) | (Shown::Data, None) => Vec::new(),
                (Shown::Data, Some(_)) if self.outside => match &outside {
                    Some(data) => data.slice(sector * SECTOR, SECTOR).to_bytes().to_vec(),
                    None => Vec::new(),
                },
                (Shown::Data, Some(at)) => {
                    let from = (at + sector * SECTOR) as usize;
                    // A file may end in the middle of its last cluster, which reads as zeroes from there on.
                    let end = (from + SECTOR as usize).min(self.bytes.len());
                    self.bytes.get(from..end).unwrap_or_default().to_vec()
                }
            };
            put_sector(content, first + sector, &bytes);
        }
        Ok(())
    }

    /// What a sector of a cluster shows.
    fn shows(&self, entry: &Entry, sector: u64) -> Shown {
        let nth = sector * SECTOR / ((1 << self.cluster_bits) / SUBCLUSTERS).max(1);
        let (data, zero) = match self.extended {
            true => (
                entry.bitmap >> nth & 1 == 1,
                entry.bitmap >> (nth + SUBCLUSTERS) & 1 == 1,
            ),
            false => (
                entry.word & 1 == 0 && entry.place().is_some(),
                entry.word & 1 == 1,
            ),
        };
        match (data, zero) {
            (true, _) => Shown::Data,
            (false, true) => Shown::Zeroes,
            (false, false) => Shown::Backing,
        }
    }

    fn inflate(&self, at: u64, len: u64) -> Option<Vec<u8>> {
        let end = (at + len).min(self.bytes.len() as u64);
        let mut cluster = vec![0; 1 << self.cluster_bits];
        let mut inflater = Decompress::new(false);
        let stream = self.bytes.get(at as usize..end as usize)?;
        let done = inflater.decompress(stream, &mut cluster, FlushDecompress::Finish);
        // The stream may end before its last sector does, and a full cluster ends it too.
        let _ = done.ok()?;
        (inflater.total_out() == cluster.len() as u64).then_some(cluster)
    }
}

/// Where a sector comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shown {
    Data,
    Zeroes,
    Backing,
}

/// Stores sectors from `first` on, as far as the disk reaches.
fn put(content: &mut Content, first: u64, bytes: &[u8]) {
    for (number, chunk) in (first..).zip(bytes.chunks(SECTOR as usize)) {
        put_sector(content, number, chunk);
    }
}

/// Stores a sector, of which bytes that are not there are zeroes, if the disk reaches so far.
fn put_sector(content: &mut Content, number: u64, bytes: &[u8]) {
    if number * SECTOR < content.size() {
        let mut sector: Sector = [0; SECTOR as usize];
        sector[..bytes.len()].copy_from_slice(bytes);
        content.set(number, sector);
    }
}
