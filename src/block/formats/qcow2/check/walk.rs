//! From L1 tables to data clusters.

use std::collections::HashMap;
use std::sync::Arc;

use super::tables::{Facts, Finding, Flags, Table, Wrong};
use super::{Scan, refcounts};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::entry::L1Entry;
use crate::formats::qcow2::geometry::ENTRY_SIZE;
use crate::formats::qcow2::runs::map_clusters;
use crate::limits;
use crate::units::HostOffset;

/// Bits of an L1 entry that must be 0: 0 to 8 and 56 to 62.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;

/// Uses of L2 tables kept before equal ones are merged.
const MERGE_AT: usize = 1 << 20;

/// Bytes of L2 tables above which the file is asked for holes before they are read. An image that is made to annoy can have
/// terabytes of tables in a hole; others have so many only at some 8 TiB of disk, where the questions cost little.
const LOOK_ABOVE: u64 = 1 << 30;

/// How often an L2 table is used.
#[derive(Debug, Clone, Copy)]
struct TableUse {
    offset: HostOffset,
    /// By all L1 tables.
    total: u64,
    /// By the active L1 table.
    active: u64,
}

/// An L1 table, or several in the same place.
struct L1 {
    /// What it is, for messages.
    what: &'static str,
    offset: u64,
    entries: u32,
    /// How many have this place.
    times: u64,
    flags: Flags,
}

impl L1 {
    fn bytes(&self) -> u64 {
        u64::from(self.entries) * ENTRY_SIZE
    }
}

impl Scan<'_> {
    /// Counts all L1 tables, L2 tables and data clusters.
    pub(super) async fn walk_tables(&mut self) -> Result<()> {
        let active = L1 {
            what: "active L1 table",
            offset: self.header.l1_table_offset.0,
            entries: self.header.l1_size,
            times: 1,
            flags: Flags::Meant,
        };
        self.use_metadata(active.what, active.offset, active.bytes())?;
        let mut uses = Vec::new();
        self.l1_table(&active, &mut uses).await?;
        let snapshots = self.snapshot_l1_tables()?;
        // All of them before the first is read: an image with too many is refused at once.
        self.spend(snapshots.iter().map(L1::bytes).sum())?;
        for table in snapshots {
            self.l1_table(&table, &mut uses).await?;
        }
        merge(&mut uses)?;
        for table in &uses {
            self.own("L2 table", table.offset.0, self.g.cluster_size())?;
        }
        self.l2_tables(uses).await
    }

    /// The L1 tables of snapshots, equal ones once with their number.
    fn snapshot_l1_tables(&mut self) -> Result<Vec<L1>> {
        let mut tables: HashMap<(u64, u32), u64> = HashMap::new();
        let entries = self.snapshots.entries().to_vec();
        for (index, entry) in entries.iter().enumerate() {
            let (at, bytes) = (entry.l1_offset, u64::from(entry.l1_entries) * ENTRY_SIZE);
            if !self.g.is_aligned(at) || bytes > limits::QCOW2_MAX_L1_BYTES {
                self.corrupt(1, || {
                    format!(
                        "ERROR snapshot table entry {index} has an impossible L1 table at {at:#x}"
                    )
                });
                continue;
            }
            self.use_metadata("L1 table of a snapshot", at, bytes)?;
            *tables.entry((at, entry.l1_entries)).or_default() += 1;
        }
        let mut tables: Vec<_> = tables.into_iter().collect();
        tables.sort_unstable();
        let tables = tables.into_iter().map(|((offset, entries), times)| L1 {
            what: "L1 table of a snapshot",
            offset,
            entries,
            times,
            flags: Flags::Ignored,
        });
        Ok(tables.collect())
    }

    async fn l1_table(&mut self, table: &L1, uses: &mut Vec<TableUse>) -> Result<()> {
        // An L1 table outside of the file was counted as an error; what is behind the end is empty.
        let end = table.offset.saturating_add(table.bytes());
        let end = end.min(self.file.size());
        let Some(len) = end.checked_sub(table.offset).filter(|len| *len > 0) else {
            return Ok(());
        };
        let bytes = self.file.read(table.offset, len).await?.to_bytes();
        for (index, entry) in bytes.as_chunks().0.iter().enumerate() {
            let entry = L1Entry(u64::from_be_bytes(*entry));
            if entry.0 == 0 {
                continue;
            }
            let L1 { what, offset, .. } = table;
            let place = || format!("{what} at {offset:#x}, entry {index} ({:#x})", entry.0);
            if entry.0 & L1_RESERVED != 0 {
                self.corrupt(table.times, || {
                    format!("ERROR {}: reserved bits are set", place())
                });
            }
            let l2 = entry.l2_offset().unwrap_or_default();
            let clusters = self.bounds.clusters(l2.0, self.g.cluster_size());
            if let Some(clusters) = clusters.clone() {
                self.add(clusters, table.times)?;
            }
            if !self.bounds.is_readable(l2) {
                self.corrupt(table.times, || {
                    let part = if clusters.is_some() { "partly " } else { "" };
                    format!(
                        "ERROR {}: the L2 table lies {part}behind the end of the file",
                        place()
                    )
                });
            }
            if !self.g.is_aligned(l2.0) {
                self.corrupt(table.times, || {
                    format!("ERROR {}: the L2 table is not properly aligned", place())
                });
                // Tables that overlap are read many times over.
                self.spend(self.g.cluster_size())?;
            }
            if table.flags == Flags::Meant && l2.0 != 0 && !self.agrees(l2, entry.is_copied()) {
                self.report.corruptions += 1;
                self.report.note(|| {
                    format!(
                        "ERROR {}: OFLAG_COPIED disagrees with the refcount of the L2 table",
                        place()
                    )
                });
            }
            uses.push(TableUse {
                offset: l2,
                total: table.times,
                active: match table.flags {
                    Flags::Meant => table.times,
                    Flags::Ignored => 0,
                },
            });
            if uses.len() >= MERGE_AT && uses.len().is_power_of_two() {
                merge(uses)?;
            }
        }
        Ok(())
    }

    /// Whether a COPIED flag is what the stored refcount asks for, as far as that matters and is known.
    fn agrees(&self, host: HostOffset, copied: bool) -> bool {
        let cluster = self.g.host_cluster(host).0;
        let stored: Option<&refcounts::StoredOnes> = self.stored.as_deref();
        stored.is_none_or(|stored| stored.agree(cluster, copied))
    }

    async fn l2_tables(&mut self, mut uses: Vec<TableUse>) -> Result<()> {
        uses.retain(|table| self.bounds.is_readable(table.offset));
        if uses.len() as u64 * self.g.cluster_size() > LOOK_ABOVE {
            self.drop_holes(&mut uses).await?;
        }
        if let Some(progress) = &self.progress {
            progress.expect(uses.len());
        }
        let offsets: Vec<HostOffset> = uses.iter().map(|table| table.offset).collect();
        let facts = Facts {
            bounds: self.bounds,
            data_outside: self.header.has_data_file(),
            stored: self.stored.clone(),
        };
        let uses: Arc<[TableUse]> = uses.into();
        let work = {
            let uses = uses.clone();
            move |nth: usize, bytes: &[u8]| {
                let flags = match uses[nth].active {
                    0 => Flags::Ignored,
                    _ => Flags::Meant,
                };
                Table::read(&facts, flags, bytes)
            }
        };
        let (file, cluster_size) = (self.file, self.g.cluster_size());
        map_clusters(file, &offsets, cluster_size, work, |nth, table| {
            self.count_table(uses[nth], table)
        })
        .await?;
        let lost = self.counts.count_waiting()?;
        self.note_overflow(lost);
        Ok(())
    }

    /// Leaves out tables that lie in holes of the file: they say nothing.
    async fn drop_holes(&self, uses: &mut Vec<TableUse>) -> Result<()> {
        let size = self.file.size();
        let mut extent = 0..0;
        let mut is_hole = false;
        let mut kept = Vec::new();
        for table in uses.drain(..) {
            let start = table.offset.0;
            let end = start + self.g.cluster_size();
            if start >= extent.end && end <= size {
                let status = self.file.block_status(start, size - start).await?;
                extent = start..start + status.len;
                is_hole = status.zero;
            }
            if !(is_hole && end <= extent.end) {
                kept.push(table);
            }
        }
        *uses = kept;
        Ok(())
    }

    /// Counts what an L2 table says as often as it is used.
    fn count_table(&mut self, used: TableUse, table: Table) -> Result<()> {
        self.report.allocated_clusters += table.allocated * used.active;
        self.report.fragmented_clusters += table.fragmented * used.active;
        self.report.compressed_clusters += table.compressed * used.active;
        for Finding { index, entry, what } in table.wrong {
            let at = used.offset;
            let text = || format!("ERROR L2 table at {at}, entry {index} ({entry}): {what}");
            match what {
                Wrong::Flag => {
                    self.report.corruptions += used.active;
                    self.report.note(text);
                }
                Wrong::Lost => {
                    self.report.corruptions += used.total;
                    self.report.note(text);
                }
                _ => self.corrupt(used.total, text),
            }
        }
        for run in table.runs {
            let overlaps = self.metadata.count(run.clone());
            if overlaps > 0 {
                self.report.overlaps += overlaps;
                let at = used.offset;
                self.cannot_cure(|| {
                    format!(
                        "ERROR L2 table at {at}: data in clusters {} to {} overlap metadata",
                        run.start,
                        run.end - 1
                    )
                });
            }
            if run.end == run.start + 1 {
                // Single ones come in no order, and there are many of them.
                let lost = self.counts.add_soon(run.start, used.total)?;
                self.note_overflow(lost);
            } else {
                self.add(run, used.total)?;
            }
        }
        if let Some(progress) = &self.progress {
            progress.advance();
        }
        Ok(())
    }
}

/// Sorts by host offset and adds up the uses of the same table.
fn merge(uses: &mut Vec<TableUse>) -> Result<()> {
    uses.sort_unstable_by_key(|table| table.offset);
    uses.dedup_by(|next, kept| {
        let same = next.offset == kept.offset;
        if same {
            kept.total = kept.total.saturating_add(next.total);
            kept.active = kept.active.saturating_add(next.active);
        }
        same
    });
    if uses.len() > limits::QCOW2_MAX_CHECK_L2_TABLES {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "The image has too many L2 tables to be checked in memory",
        ));
    }
    Ok(())
}
