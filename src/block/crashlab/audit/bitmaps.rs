//! Persistent bitmaps: what an image says of them, what must become of that when the disk changes, and images that have some.

use super::{Audit, Problem, be16, be32, be64, counter, slice, text, words};
use crate::crashlab::content::Content;

const EXTENSION: u32 = 0x2385_2875;
const AUTOCLEAR: u64 = 1;
const IN_USE: u32 = 1;
const AUTO: u32 = 2;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// A bitmap as the directory and its table have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// The user's name.
    pub name: String,
    /// Nothing may be concluded from its bits.
    pub in_use: bool,
    /// Enabled: it reflects every change of the disk.
    pub auto: bool,
    /// Where its entry of the directory lies in the file.
    pub at: u64,
    granularity_bits: u8,
    pub(super) table: (u64, u64),
    /// Its bits, cluster by cluster.
    parts: Vec<Part>,
}

/// A cluster of bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    Zeroes,
    Ones,
    Stored { at: u64, bits: Vec<u8> },
}

impl Bitmap {
    /// Where bits are stored.
    pub(super) fn clusters(&self) -> impl Iterator<Item = u64> {
        self.parts.iter().filter_map(|part| match part {
            Part::Stored { at, .. } => Some(*at),
            _ => None,
        })
    }

    /// What is wrong with this bitmap, which was `before` when the disk held `old` and now holds `new`.
    fn violation(
        &self,
        before: &Bitmap,
        (old, new): (&Content, &Content),
        cluster: u64,
    ) -> Option<&'static str> {
        if self.in_use {
            return None;
        }
        let bits = new.size().div_ceil(1 << self.granularity_bits);
        let both = self.parts.len().min(before.parts.len());
        let added = &self.parts[both..];
        let mut rules = [
            (before.in_use, "is not in use any more"),
            (self.auto && old != new, "does not know of a change"),
            (
                self.table.1 != bits.div_ceil(8).div_ceil(cluster),
                "does not have the size of the disk",
            ),
            (
                self.parts[..both] != before.parts[..both]
                    || added.iter().any(|part| *part != Part::Zeroes),
                "has other bits",
            ),
        ]
        .into_iter();
        rules.find_map(|(is_broken, text)| is_broken.then_some(text))
    }
}

/// What is wrong with the bitmaps of an image that had those of `before` when its disk held `old`.
pub fn bitmaps_differ(
    before: &[Bitmap],
    old: &Content,
    now: &Audit<'_>,
    new: &Content,
) -> Result<(), Problem> {
    let names = |bitmaps: &[Bitmap]| -> Vec<String> {
        bitmaps.iter().map(|bitmap| bitmap.name.clone()).collect()
    };
    if names(before) != names(now.bitmaps()) {
        let (wanted, is) = (names(before), names(now.bitmaps()));
        return Err(format!("bitmaps {is:?} instead of {wanted:?}"));
    }
    for (before, bitmap) in before.iter().zip(now.bitmaps()) {
        if let Some(text) = bitmap.violation(before, (old, new), now.cluster_size()) {
            return Err(format!("bitmap '{}' {text}", bitmap.name));
        }
    }
    Ok(())
}

impl Audit<'_> {
    /// Reads the directory, if the autoclear bit vouches for it.
    pub(super) fn read_bitmaps(&mut self) -> Result<(), Problem> {
        if be64(self.bytes, 88)? & AUTOCLEAR == 0 {
            return Ok(());
        }
        let Some((extension, _)) = self.extension(EXTENSION)? else {
            return Err("the autoclear bit of bitmaps without their extension".to_owned());
        };
        let len = be64(self.bytes, extension + 8)?;
        self.directory = (be64(self.bytes, extension + 16)?, len);
        let mut at = self.directory.0;
        for _ in 0..be32(self.bytes, extension)? {
            let flags = be32(self.bytes, at + 12)?;
            let kind = slice(self.bytes, at + 16, 2)?;
            let name_at = at + 24 + u64::from(be32(self.bytes, at + 20)?);
            let name_len = u64::from(be16(self.bytes, at + 18)?);
            let table = (be64(self.bytes, at)?, u64::from(be32(self.bytes, at + 8)?));
            if flags & !(IN_USE | AUTO) != 0 || kind[0] != 1 {
                return Err(format!(
                    "a bitmap of type {} with flags {flags:#x}",
                    kind[0]
                ));
            }
            self.bitmaps.push(Bitmap {
                name: text(self.bytes, name_at, name_len)?,
                in_use: flags & IN_USE != 0,
                auto: flags & AUTO != 0,
                at,
                granularity_bits: kind[1],
                table,
                parts: self.read_parts(table)?,
            });
            at = (name_at + name_len).next_multiple_of(8);
        }
        match at == self.directory.0 + len {
            true => Ok(()),
            false => Err("the directory of bitmaps has another length".to_owned()),
        }
    }

    fn read_parts(&self, (at, entries): (u64, u64)) -> Result<Vec<Part>, Problem> {
        let cluster = self.cluster_size();
        let entries = words(self.bytes, at, entries)?;
        let part = |entry: u64| match (entry & OFFSET, entry & !OFFSET) {
            (0, 0) => Ok(Part::Zeroes),
            (0, 1) => Ok(Part::Ones),
            (at, 0) if at % cluster == 0 => Ok(Part::Stored {
                at,
                bits: slice(self.bytes, at, cluster)?.to_vec(),
            }),
            _ => Err(format!("bitmap table entry {entry:#x}")),
        };
        entries.map(part).collect()
    }

    /// Clusters whose counters are there and 0, the first ones, each with the place of its counter's lowest bit: the number of bits in
    /// front of it, bytes and the bits of a byte counted from the lowest one on.
    fn unused(&self, wanted: usize) -> Result<Option<Vec<(u64, u64)>>, Problem> {
        let bits = u64::from(self.refcount_bits);
        let per_block = self.cluster_size() * 8 / bits;
        let mut found = Vec::new();
        for (index, block) in self.refcount_blocks()?.into_iter().enumerate() {
            if block == 0 {
                continue;
            }
            let counters = slice(self.bytes, block, self.cluster_size())?;
            for nth in (0..per_block).filter(|nth| counter(counters, *nth, bits) == 0) {
                let lowest = match bits {
                    1..8 => nth * bits,
                    // Big endian.
                    _ => nth * bits + bits - 8,
                };
                found.push((index as u64 * per_block + nth, block * 8 + lowest));
                if found.len() == wanted {
                    return Ok(Some(found));
                }
            }
        }
        Ok(None)
    }

    /// The bitmaps that the image vouches for.
    pub fn bitmaps(&self) -> &[Bitmap] {
        &self.bitmaps
    }
}

/// A closed image that has none with bitmaps, as another program would have left them: one is enabled, one is disabled, one is in
/// use. Nothing where the image has no room for them that its refcount blocks count.
pub fn with_bitmaps(bytes: &[u8]) -> Result<Option<Vec<u8>>, Problem> {
    const GRANULARITY_BITS: u8 = 9;
    const BITMAPS: [(&str, u32); 3] = [("enabled", AUTO), ("disabled", 0), ("lost", AUTO | IN_USE)];
    let audit = Audit::new(bytes)?;
    let cluster = audit.cluster_size();
    let Some(counters) = audit.unused(1 + 2 * BITMAPS.len())? else {
        return Ok(None);
    };
    let mut image = bytes.to_vec();
    let place = |nth: usize| counters[nth].0 * cluster;
    let entries = (audit.size.div_ceil(1 << GRANULARITY_BITS).div_ceil(8)).div_ceil(cluster);
    let mut directory = Vec::new();
    for (nth, (name, flags)) in BITMAPS.iter().enumerate() {
        let (table_at, bits_at) = (place(1 + 2 * nth), place(2 + 2 * nth));
        // The first cluster of bits is stored; of the others every second is all ones.
        let table =
            (0..entries).flat_map(|nth| if nth == 0 { bits_at } else { nth & 1 }.to_be_bytes());
        // What is behind a table may be anything.
        put(
            &mut image,
            table_at,
            [0xff].repeat(cluster as usize),
            cluster,
        );
        put(&mut image, table_at, table, 0);
        put(&mut image, bits_at, [1], cluster);
        directory.extend(table_at.to_be_bytes());
        directory.extend((entries as u32).to_be_bytes());
        directory.extend(flags.to_be_bytes());
        directory.extend([1, GRANULARITY_BITS]);
        directory.extend((name.len() as u16).to_be_bytes());
        directory.extend([0; 4]);
        directory.extend(name.as_bytes());
        directory.resize(directory.len().next_multiple_of(8), 0);
    }
    // In the place of other extensions, which are names for people.
    let mut extension = Vec::new();
    extension.extend(EXTENSION.to_be_bytes());
    extension.extend(24_u32.to_be_bytes());
    extension.extend((BITMAPS.len() as u32).to_be_bytes());
    extension.extend([0; 4]);
    extension.extend((directory.len() as u64).to_be_bytes());
    extension.extend(place(0).to_be_bytes());
    extension.extend([0; 8]);
    let at = u64::from(be32(bytes, 100)?);
    // In front of the name of a backing file.
    let name_at = be64(bytes, 8)?;
    if name_at != 0 && at + extension.len() as u64 > name_at {
        return Ok(None);
    }
    put(&mut image, place(0), directory, cluster);
    put(&mut image, at, extension, 0);
    put(
        &mut image,
        88,
        (be64(bytes, 88)? | AUTOCLEAR).to_be_bytes(),
        0,
    );
    for (_, last_bit) in &counters {
        image[(last_bit / 8) as usize] |= 1 << (last_bit % 8);
    }
    Ok(Some(image))
}

/// Stores bytes in an image, zeroes behind them up to `len`.
fn put(image: &mut Vec<u8>, at: u64, bytes: impl IntoIterator<Item = u8>, len: u64) {
    let mut bytes: Vec<u8> = bytes.into_iter().collect();
    bytes.resize(bytes.len().max(len as usize), 0);
    let range = at as usize..at as usize + bytes.len();
    image.resize(image.len().max(range.end), 0);
    image[range].copy_from_slice(&bytes);
}
