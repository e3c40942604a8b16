//! Names in the header, and snapshots as programs before 2012 have written them.

use super::{Audit, Problem, be16, be32, be64, slice, text};

const BACKING_FORMAT: u32 = 0xe279_2aca;

impl Audit<'_> {
    /// The backing file's name and format, as the header has them.
    pub fn backing_name(&self) -> Result<(String, Option<String>), Problem> {
        let (at, len) = (be64(self.bytes, 8)?, u64::from(be32(self.bytes, 16)?));
        let name = text(self.bytes, at, len)?;
        let format = self.extension(BACKING_FORMAT)?;
        let format = format.map(|(at, len)| text(self.bytes, at, len));
        Ok((name, format.transpose()?))
    }

    /// Place and length of a header extension's data.
    pub(super) fn extension(&self, wanted: u32) -> Result<Option<(u64, u64)>, Problem> {
        let mut at = match be32(self.bytes, 4)? {
            2 => 72,
            _ => u64::from(be32(self.bytes, 100)?),
        };
        loop {
            let (kind, len) = (be32(self.bytes, at)?, be32(self.bytes, at + 4)?);
            match kind {
                0 => return Ok(None),
                _ if kind == wanted => return Ok(Some((at + 8, u64::from(len)))),
                _ => at = (at + 8 + u64::from(len)).next_multiple_of(8),
            }
        }
    }
}

/// A closed image of version 2 whose snapshots lack what version 3 requires of them. Nothing where it is none, or has no
/// snapshots.
pub fn with_old_snapshots(bytes: &[u8]) -> Result<Option<Vec<u8>>, Problem> {
    let audit = Audit::new(bytes)?;
    let mut table = Vec::new();
    let mut at = audit.table.0;
    for _ in audit.snapshots() {
        let extra = u64::from(be32(bytes, at + 36)?);
        let names = u64::from(be16(bytes, at + 12)?) + u64::from(be16(bytes, at + 14)?);
        table.extend(slice(bytes, at, 36)?);
        table.extend([0; 4]);
        table.extend(slice(bytes, at + 40 + extra, names)?);
        table.resize(table.len().next_multiple_of(8), 0);
        at = (at + 40 + extra + names).next_multiple_of(8);
    }
    if table.is_empty() || be32(bytes, 4)? != 2 {
        return Ok(None);
    }
    let mut image = bytes.to_vec();
    table.resize(audit.table.1 as usize, 0);
    let start = audit.table.0 as usize;
    image[start..start + table.len()].copy_from_slice(&table);
    Ok(Some(image))
}
