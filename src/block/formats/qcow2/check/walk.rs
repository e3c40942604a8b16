//! From L1 tables to data clusters.

use std::collections::HashMap;

use super::Scan;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::entry::{L1Entry, L2Entry, Mapping, l2_entries};
use crate::formats::qcow2::geometry::ENTRY_SIZE;
use crate::formats::qcow2::runs::read_clusters;
use crate::limits;
use crate::units::HostOffset;

/// Bits of an L1 entry that must be 0: 0 to 8 and 56 to 62.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;

/// Bits of a standard L2 entry that must be 0: 1 to 8 and 56 to 61.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// Uses of L2 tables kept before equal ones are merged.
const MERGE_AT: usize = 1 << 20;

/// How often an L2 table is used.
#[derive(Debug, Clone, Copy)]
struct TableUse {
    offset: HostOffset,
    /// By all L1 tables.
    total: u64,
    /// By the active L1 table.
    active: u64,
}

/// Neighbouring data clusters that are not counted yet.
#[derive(Debug, Default)]
struct PendingRun {
    start: u64,
    len: u64,
}

impl Scan<'_> {
    /// Counts all L1 tables, L2 tables and data clusters.
    pub(super) async fn walk_tables(&mut self) -> Result<()> {
        let mut uses = Vec::new();
        let (offset, entries) = (self.header.l1_table_offset.0, self.header.l1_size);
        self.use_metadata("active L1 table", offset, u64::from(entries) * ENTRY_SIZE)?;
        self.l1_table(offset, entries, 1, &mut uses, true).await?;
        let snapshots = self.snapshot_l1_tables()?;
        // All of them before the first is read: an image with too many is refused at once.
        let l1_bytes = |table: &(u64, u32, u64)| u64::from(table.1) * ENTRY_SIZE;
        self.spend(snapshots.iter().map(l1_bytes).sum())?;
        for (offset, entries, times) in snapshots {
            self.l1_table(offset, entries, times, &mut uses, false)
                .await?;
        }
        merge(&mut uses)?;
        for table in &uses {
            self.own("L2 table", table.offset.0, self.g.cluster_size())?;
        }
        self.l2_tables(&uses).await
    }

    /// The L1 tables of snapshots, equal ones once with their number.
    fn snapshot_l1_tables(&mut self) -> Result<Vec<(u64, u32, u64)>> {
        let mut tables: HashMap<(u64, u32), u64> = HashMap::new();
        let entries = self.snapshots.entries().to_vec();
        for (index, entry) in entries.iter().enumerate() {
            let bytes = u64::from(entry.l1_entries) * ENTRY_SIZE;
            let usable = self.g.is_aligned(entry.l1_offset) && bytes <= limits::QCOW2_MAX_L1_BYTES;
            if !usable {
                self.structure_is_wrong(1, || {
                    format!("ERROR snapshot table entry {index} has an impossible L1 table")
                });
                continue;
            }
            self.use_metadata("L1 table of a snapshot", entry.l1_offset, bytes)?;
            *tables
                .entry((entry.l1_offset, entry.l1_entries))
                .or_default() += 1;
        }
        let mut tables: Vec<_> = tables.into_iter().map(|((o, e), n)| (o, e, n)).collect();
        tables.sort_unstable();
        Ok(tables)
    }

    async fn l1_table(
        &mut self,
        offset: u64,
        entries: u32,
        times: u64,
        uses: &mut Vec<TableUse>,
        active: bool,
    ) -> Result<()> {
        let bytes = u64::from(entries) * ENTRY_SIZE;
        // An L1 table outside of the file was counted as an error; what is behind the end is empty.
        let end = offset.saturating_add(bytes).min(self.file.size());
        let Some(len) = end.checked_sub(offset).filter(|len| *len > 0) else {
            return Ok(());
        };
        let table = self.file.read(offset, len).await?.to_bytes();
        for (index, entry) in table.as_chunks().0.iter().enumerate() {
            let entry = L1Entry(u64::from_be_bytes(*entry));
            if entry.0 == 0 {
                continue;
            }
            if entry.0 & L1_RESERVED != 0 {
                self.structure_is_wrong(times, || {
                    format!(
                        "ERROR found L1 entry with reserved bits set: {:#x}",
                        entry.0
                    )
                });
            }
            let l2 = entry.l2_offset().unwrap_or_default();
            self.count(l2.0, self.g.cluster_size(), times)?;
            if !self.g.is_aligned(l2.0) {
                self.structure_is_wrong(times, || {
                    format!("ERROR l2_offset={l2}: Table is not cluster aligned")
                });
            }
            if active {
                self.compare_copied("L2 table", index, entry.0, entry.is_copied(), l2, 1);
            }
            uses.push(TableUse {
                offset: l2,
                total: times,
                active: if active { times } else { 0 },
            });
            if uses.len() >= MERGE_AT && uses.len().is_power_of_two() {
                merge(uses)?;
            }
        }
        Ok(())
    }

    async fn l2_tables(&mut self, uses: &[TableUse]) -> Result<()> {
        let readable: Vec<TableUse> = uses
            .iter()
            .copied()
            .filter(|table| self.is_readable(table.offset))
            .collect();
        let offsets: Vec<HostOffset> = readable.iter().map(|table| table.offset).collect();
        let (file, cluster_size) = (self.file, self.g.cluster_size());
        read_clusters(file, &offsets, cluster_size, |index, bytes| {
            self.l2_table(readable[index], bytes)
        })
        .await
    }

    fn l2_table(&mut self, table: TableUse, bytes: &[u8]) -> Result<()> {
        let mut pending = PendingRun::default();
        let mut expected = None;
        let cluster_size = self.g.cluster_size();
        for (index, entry) in l2_entries(self.g, bytes).enumerate() {
            if entry.is_empty() {
                continue;
            }
            if entry.is_compressed() {
                self.compressed(entry, table)?;
                continue;
            }
            if entry.descriptor() & L2_RESERVED != 0 {
                self.structure_is_wrong(table.total, || {
                    format!("ERROR found L2 entry with reserved bits set: {entry}")
                });
            }
            let Some(host) = entry.host_cluster() else {
                continue;
            };
            self.report.allocated_clusters += table.active;
            if expected.is_some_and(|expected| expected != host) {
                self.report.fragmented_clusters += table.active;
            }
            expected = Some(host + cluster_size);
            let unaligned = !self.g.is_aligned(host.0);
            if unaligned {
                self.structure_is_wrong(table.total, || {
                    format!("ERROR offset={host}: Data cluster is not properly aligned")
                });
            }
            if table.active > 0 {
                let copied = entry.is_copied();
                let shown = entry.descriptor();
                self.compare_copied("data cluster", index, shown, copied, host, table.active);
            }
            if unaligned || self.clusters(host.0, cluster_size).is_none() {
                self.count(host.0, cluster_size, table.total)?;
                continue;
            }
            self.gather(&mut pending, self.g.host_cluster(host).0, table)?;
        }
        self.count_run(&pending, table)
    }

    fn gather(&mut self, pending: &mut PendingRun, cluster: u64, table: TableUse) -> Result<()> {
        if pending.len > 0 && pending.start + pending.len == cluster {
            pending.len += 1;
            return Ok(());
        }
        self.count_run(pending, table)?;
        *pending = PendingRun {
            start: cluster,
            len: 1,
        };
        Ok(())
    }

    fn count_run(&mut self, run: &PendingRun, table: TableUse) -> Result<()> {
        let clusters = run.start..run.start + run.len;
        self.find_overlaps(clusters.clone());
        let lost = self.counts.add(clusters, table.total)?;
        if lost > 0 {
            self.structure_is_wrong(lost, || {
                format!("ERROR refcount overflow behind cluster {}", run.start)
            });
        }
        Ok(())
    }

    fn compressed(&mut self, entry: L2Entry, table: TableUse) -> Result<()> {
        if entry.is_copied() {
            self.structure_is_wrong(table.total, || {
                format!("ERROR {entry}: copied flag must never be set for compressed clusters")
            });
        }
        if let Ok(Mapping::Compressed(stream)) = entry.with_copied(false).decode(self.g, true) {
            self.count(stream.host.0, stream.len, table.total)?;
            if let Some(clusters) = self.clusters(stream.host.0, stream.len) {
                self.find_overlaps(clusters);
            }
        } else {
            self.structure_is_wrong(table.total, || {
                format!("ERROR impossible compressed cluster: {entry}")
            });
        }
        self.report.allocated_clusters += table.active;
        self.report.compressed_clusters += table.active;
        self.report.fragmented_clusters += table.active;
        Ok(())
    }

    fn find_overlaps(&mut self, clusters: std::ops::Range<u64>) {
        let found = self.metadata.count(clusters.clone());
        if found > 0 {
            self.report.overlaps += found;
            self.structural += found;
            self.report
                .note(|| format!("ERROR data overlap metadata in clusters {clusters:?}"));
        }
    }

    fn compare_copied(
        &mut self,
        what: &str,
        index: usize,
        entry: u64,
        copied: bool,
        host: HostOffset,
        times: u64,
    ) {
        let cluster = self.g.host_cluster(host).0;
        let right = copied == self.stored_ones.get(cluster);
        if host.0 == 0 || right || self.is_unknown(cluster) {
            return;
        }
        self.report.corruptions += times;
        self.report
            .note(|| format!("ERROR OFLAG_COPIED {what}: entry {index} is {entry:#x}"));
    }

    fn structure_is_wrong(&mut self, times: u64, text: impl FnOnce() -> String) {
        self.report.corruptions += times;
        self.structural += times;
        self.report.note(text);
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
