//! What a disk holds, sector by sector, and the stamps that tell where a sector's bytes belong.
//!
//! Every 8-byte word that a script writes names its place on the guest's disk and the write that it came with, so bytes of
//! another place (foreign) or of a forgotten write (stale) never pass for right ones.

use std::collections::BTreeMap;
use std::sync::Arc;

/// What a power cut leaves whole, old or new.
pub use crate::units::SECTOR;

/// The bytes of one sector.
pub type Sector = [u8; SECTOR as usize];

const ZERO: Sector = [0; SECTOR as usize];

/// The content of a disk. Sectors that are zero are not kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Content {
    size: u64,
    sectors: BTreeMap<u64, Arc<Sector>>,
}

impl Content {
    /// A disk of `size` bytes that reads as zeroes.
    pub fn new(size: u64) -> Self {
        Content {
            size,
            sectors: BTreeMap::new(),
        }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The sectors that are not zero, ascending.
    pub fn sectors(&self) -> impl Iterator<Item = (u64, &Sector)> {
        self.sectors.iter().map(|(at, sector)| (*at, &**sector))
    }

    /// A sector by its number.
    pub fn sector(&self, number: u64) -> &Sector {
        self.sectors.get(&number).map_or(&ZERO, |sector| sector)
    }

    /// Overwrites bytes; what lies behind the end is left out.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        let end = (at + bytes.len() as u64).min(self.size);
        let mut from = at;
        while from < end {
            let number = from / SECTOR;
            let to = ((number + 1) * SECTOR).min(end);
            let mut sector = *self.sector(number);
            let within = (from - number * SECTOR) as usize..(to - number * SECTOR) as usize;
            sector[within].copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
            self.set(number, sector);
            from = to;
        }
    }

    /// Overwrites a range with zeroes.
    pub fn zero(&mut self, at: u64, len: u64) {
        let end = (at + len).min(self.size);
        let touched: Vec<u64> = self
            .sectors
            .range(at / SECTOR..end.div_ceil(SECTOR).max(at / SECTOR))
            .map(|(number, _)| *number)
            .collect();
        for number in touched {
            let from = at.max(number * SECTOR) - number * SECTOR;
            let to = end.min((number + 1) * SECTOR) - number * SECTOR;
            let mut sector = *self.sector(number);
            sector[from as usize..to as usize].fill(0);
            self.set(number, sector);
        }
    }

    /// Replaces a sector.
    pub fn set(&mut self, number: u64, sector: Sector) {
        if sector == ZERO {
            self.sectors.remove(&number);
        } else {
            self.sectors.insert(number, Arc::new(sector));
        }
    }

    /// Changes the size; new bytes are zero.
    pub fn resize(&mut self, size: u64) {
        if size < self.size {
            self.zero(size, self.size - size);
        }
        self.size = size;
    }

    /// The bytes of a range.
    pub fn bytes(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        let end = at + len;
        for (number, sector) in self.sectors.range(at / SECTOR..end.div_ceil(SECTOR)) {
            let from = at.max(number * SECTOR);
            let to = end.min((number + 1) * SECTOR);
            let within = (from - number * SECTOR) as usize..(to - number * SECTOR) as usize;
            bytes[(from - at) as usize..(to - at) as usize].copy_from_slice(&sector[within]);
        }
        bytes
    }

    /// How another content differs from this one, as text.
    pub fn difference(&self, other: &Content) -> Option<String> {
        if self.size != other.size {
            return Some(format!("size {} instead of {}", other.size, self.size));
        }
        let numbers = self.sectors.keys().chain(other.sectors.keys());
        let number = *numbers
            .filter(|number| self.sector(**number) != other.sector(**number))
            .min()?;
        Some(format!(
            "sector {number} holds {} instead of {}",
            explain(other.sector(number)),
            explain(self.sector(number))
        ))
    }
}

/// What each sector may hold after a crash: what it held at any of several moments, all of them or some.
#[derive(Debug, Default)]
pub struct Versions {
    sizes: Vec<u64>,
    /// Sectors that were not zero at one of the moments, with all that they held.
    sectors: BTreeMap<u64, Vec<Arc<Sector>>>,
}

impl Versions {
    /// The contents that a disk went through.
    pub fn new<'a>(contents: impl IntoIterator<Item = &'a Content>) -> Self {
        let contents: Vec<&Content> = contents.into_iter().collect();
        let mut versions = Versions::default();
        for content in &contents {
            versions.sizes.push(content.size);
            for number in content.sectors.keys() {
                versions.sectors.entry(*number).or_default();
            }
        }
        for (number, held) in &mut versions.sectors {
            for content in &contents {
                let sector = content.sectors.get(number);
                let sector = sector.cloned().unwrap_or_else(|| Arc::new(ZERO));
                if !held.contains(&sector) {
                    held.push(sector);
                }
            }
        }
        versions
    }

    /// What of `content` is none of the versions, as text.
    pub fn violation(&self, content: &Content) -> Option<String> {
        if !self.sizes.contains(&content.size) {
            return Some(format!("size {}, not {:?}", content.size, self.sizes));
        }
        for (number, sector) in content.sectors() {
            if !self.sectors.contains_key(&number) {
                return Some(format!(
                    "sector {number} holds {}, but was never written",
                    explain(sector)
                ));
            }
        }
        for (number, held) in &self.sectors {
            let is = content.sector(*number);
            if (number * SECTOR) < content.size && !held.iter().any(|sector| **sector == *is) {
                let held: Vec<String> = held.iter().map(|sector| explain(sector)).collect();
                return Some(format!(
                    "sector {number} holds {}, not {}",
                    explain(is),
                    held.join(" or ")
                ));
            }
        }
        None
    }
}

/// Bytes for a write at `at`: each word tells its place and the write's number.
pub fn stamp(at: u64, len: u64, number: u32) -> Vec<u8> {
    let words = (at / 8..(at + len).div_ceil(8)).flat_map(|word| {
        let word = u64::from(number) << 32 | word & 0xffff_ffff;
        word.to_le_bytes()
    });
    words.skip((at % 8) as usize).take(len as usize).collect()
}

/// What a sector holds, for people: which writes its words came with, and where they belong.
pub fn explain(sector: &Sector) -> String {
    if *sector == ZERO {
        return "zeroes".to_owned();
    }
    let mut parts: Vec<(u64, u64)> = Vec::new();
    for word in sector.as_chunks::<8>().0 {
        let word = u64::from_le_bytes(*word);
        let part = match word {
            0 => (0, 0),
            word => (word >> 32, (word & 0xffff_ffff) * 8 / SECTOR),
        };
        if parts.last() != Some(&part) {
            parts.push(part);
        }
    }
    let parts: Vec<String> = parts
        .iter()
        .take(4)
        .map(|(number, place)| match number {
            0 => "zeroes".to_owned(),
            number => format!("write {number} of sector {place}"),
        })
        .collect();
    parts.join(", ")
}
