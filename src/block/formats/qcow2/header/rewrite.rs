//! Changes of the header that go beyond its fixed fields: extensions, backing name, version.
//!
//! A write of more than a sector may be torn, and extensions have their place right behind the fixed fields. So the change is
//! planned in stages, each of which is one write of the first sector. What a stage needs behind the first sector
//! is durable before it, in a place that the stage before does not use:
//!
//! ```text
//! all of the new header fits into a sector:   [fields, extensions, name]
//! else, first without the feature names:      [fields, extensions]           [name somewhere]
//! then with them again:                       [fields, extensions, na|mes]   [name]
//! ```
//!
//! The names of the feature bits are for people only; at any moment the header says the old or the new.

use std::ops::Range;

use super::{EXT_FEATURE_NAMES, Header, unsupported};
use crate::error::Result;
use crate::units;

/// The beginning of the header, which is written whole or not at all.
pub(crate) const SECTOR: usize = units::SECTOR as usize;

/// One write of the first sector, with what comes before it.
#[derive(Debug)]
pub(crate) struct Stage {
    /// What readers find from now on.
    pub(crate) header: Header,
    /// Bytes behind the first sector, with their offsets. Nobody reads them before.
    pub(crate) ahead: Vec<(usize, Vec<u8>)>,
    /// The first sector.
    pub(crate) sector: Vec<u8>,
}

/// A planned change of the header.
#[derive(Debug)]
pub(crate) struct Rewrite {
    /// One or two, to be made durable one after the other.
    pub(crate) stages: Vec<Stage>,
    /// What is behind the first sector in the end, with zeroes where something was before.
    pub(crate) rest: Vec<u8>,
}

impl Rewrite {
    /// Plans how the image's first cluster, which is `cluster` now, comes to hold `new`. `InvalidInput` when it has no room
    /// for that, `Unsupported` when there would be a moment at which a crash leaves neither.
    pub(crate) fn plan(cluster: &[u8], new: &Header) -> Result<Rewrite> {
        let old = used(cluster)?;
        let size = 1 << new.cluster_bits;
        let name = new.backing_name.clone().unwrap_or_default().into_bytes();
        let whole = new.front();
        let mut stages = Vec::new();
        if whole.len() + name.len() <= SECTOR {
            stages.push(Layout::new(new, &name, whole.len()));
        } else {
            let mut compact = new.clone();
            compact.extensions.retain(|e| e.kind != EXT_FEATURE_NAMES);
            compact.to_bytes()?;
            let front = compact.front().len();
            // Where the name can be in both stages; else where it can be in the first.
            let place = |from| free_place(from, name.len(), size, &old);
            let with_names = place(whole.len().max(SECTOR)).filter(|_| compact != *new);
            if front > SECTOR {
                return Err(no_room());
            }
            let at = match front + name.len() <= SECTOR {
                true => Some(front),
                false => with_names.or_else(|| place(SECTOR)),
            };
            stages.push(Layout::new(&compact, &name, at.ok_or_else(no_room)?));
            if let Some(outside) = with_names {
                stages.push(Layout::new(new, &name, outside));
            }
        }
        let mut rest = Vec::new();
        let ends = stages
            .iter()
            .flat_map(Layout::ahead)
            .map(|(at, b)| at + b.len());
        let end = ends.chain(old.iter().map(|range| range.end)).max();
        rest.resize(end.unwrap_or(0).saturating_sub(SECTOR), 0);
        for (at, bytes) in stages.last().into_iter().flat_map(Layout::ahead) {
            rest[at - SECTOR..][..bytes.len()].copy_from_slice(&bytes);
        }
        let stages = stages.into_iter().map(Layout::into_stage).collect();
        Ok(Rewrite { stages, rest })
    }
}

/// A header and where its name is.
struct Layout {
    header: Header,
    front: Vec<u8>,
    name: Vec<u8>,
    name_at: usize,
}

impl Layout {
    fn new(header: &Header, name: &[u8], name_at: usize) -> Self {
        let mut front = header.front();
        if header.backing_name.is_some() {
            Header::point_to_name(&mut front, name_at, name.len());
        }
        Layout {
            header: header.clone(),
            front,
            name: name.to_vec(),
            name_at,
        }
    }

    /// What lies behind the first sector.
    fn ahead(&self) -> Vec<(usize, Vec<u8>)> {
        let pieces = [(0, &self.front), (self.name_at, &self.name)];
        let ahead = pieces.into_iter().filter_map(|(at, bytes)| {
            let skip = SECTOR.saturating_sub(at);
            let outside = bytes.get(skip..).filter(|outside| !outside.is_empty())?;
            Some((at + skip, outside.to_vec()))
        });
        ahead.collect()
    }

    fn into_stage(self) -> Stage {
        let ahead = self.ahead();
        let mut sector = self.front;
        if self.name_at < SECTOR {
            sector.resize(self.name_at, 0);
            sector.extend(&self.name);
        }
        sector.resize(SECTOR, 0);
        Stage {
            header: self.header,
            ahead,
            sector,
        }
    }
}

/// The parts of the first cluster that are in use: fields with extensions, and the name.
fn used(cluster: &[u8]) -> Result<[Range<usize>; 2]> {
    let header = Header::parse(cluster)?;
    let name = match (Header::name_offset(cluster)?, &header.backing_name) {
        (0, _) | (_, None) => 0..0,
        (at, Some(name)) => at..at + name.len(),
    };
    Ok([0..header.front().len(), name])
}

/// The first place from `from` on where `len` bytes overlap nothing that is used.
fn free_place(from: usize, len: usize, size: usize, used: &[Range<usize>]) -> Option<usize> {
    let starts = std::iter::once(from).chain(used.iter().map(|range| range.end));
    let mut starts: Vec<_> = starts.map(|at| at.next_multiple_of(8)).collect();
    starts.sort_unstable();
    starts.into_iter().find(|&at| {
        let free = |range: &Range<usize>| at >= range.end || at + len <= range.start;
        at >= from && at + len <= size && used.iter().all(free)
    })
}

fn no_room() -> crate::error::Error {
    unsupported("The image's header has no room to be changed safely")
}

#[cfg(test)]
mod tests;
