//! Deleting a snapshot.

use std::collections::HashSet;

use super::bulk::{BulkRefcounts, Step, rewrite_copied};
use super::table::SnapshotTable;
use super::{LEAK_ADVICE, Quiet, l1_bytes, l2_offsets};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::alloc::{Reserved, Run};
use crate::formats::qcow2::entry::L1Entry;
use crate::formats::qcow2::owners::Owner;
use crate::limits::QCOW2_MAX_L1_BYTES;
use crate::units::HostOffset;

/// Places that are tried for a table on a full disk.
const MAX_HOLES: usize = 32;

/// What is known before the header is switched.
struct Prepared<'a> {
    table: SnapshotTable,
    table_area: Option<Reserved>,
    /// The L1 table of the snapshot.
    l1: Vec<u64>,
    /// Refcounts without the snapshot, in memory.
    bulk: BulkRefcounts<'a>,
}

/// Deletes the snapshot at `index` of the table `old` from a quiet image, and answers the table that is in use from now on.
///
/// On error nothing has changed. What fails after the header's switch only leaks, and the log says so. Not to be
/// dropped half way. The clusters that became free are handed to the allocator; `discard` decides whether the host gets them.
pub(in crate::formats::qcow2) async fn delete(
    image: &mut Quiet<'_>,
    old: &SnapshotTable,
    index: usize,
    discard: Discard,
) -> Result<SnapshotTable> {
    image.header.check()?;
    let mut prepared = match prepare(image, old, index).await {
        Ok(prepared) => prepared,
        Err(error) => {
            image.give_back().await;
            return Err(error);
        }
    };
    let area = prepared.table_area.as_ref();
    if let Err(error) = image.switch_table(area, &prepared.table).await {
        if image.header.check().is_err() {
            // The header may point to the new table.
            keep(&mut prepared);
        }
        drop(prepared);
        image.give_back().await;
        return Err(error);
    }
    keep(&mut prepared);
    if let Err(error) = settle(image, &prepared, discard).await {
        log::error!("qcow2: clusters of a deleted snapshot stay counted ({error}): {LEAK_ADVICE}");
    }
    Ok(prepared.table)
}

/// Whether freed clusters are given back to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::formats::qcow2) enum Discard {
    /// The file keeps them.
    No,
    /// The file is told.
    Yes,
}

/// Computes the refcounts and writes the new table. Nothing points to it yet.
async fn prepare<'a>(
    image: &mut Quiet<'a>,
    old: &SnapshotTable,
    index: usize,
) -> Result<Prepared<'a>> {
    let l1 = read_l1(image, old, index).await?;
    let mut table = old.without(index);
    let table_area = write_table(image, &mut table).await?;
    // Counters of the new clusters, and all others, are in the file before they are changed there.
    image.allocator.write_back().await?;
    let reftable = image.allocator.refcount_table().to_vec();
    let g = image.geometry();
    let mut bulk = BulkRefcounts::new(image.file, g, reftable);
    let tables = l2_offsets(&l1);
    if let Some(twice) = tables.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "The image needs a repair (qemu-img check -r all): the snapshot has its L2 table at {} twice",
                twice[0]
            ),
        ));
    }
    bulk.change_tables(&tables, Step::Down).await?;
    let own = Run {
        start: g.host_cluster(HostOffset(old.entries()[index].l1_offset)),
        count: g.clusters_for(l1_bytes(l1.len())),
    };
    let areas = [(own.count > 0).then_some(own), image.old_table(old)?];
    let runs: Vec<Run> = areas.into_iter().flatten().collect();
    bulk.change_runs(&runs, Step::Down).await?;
    // A damaged snapshot may claim what the active layer or the image itself lives on. Its own L2 tables may go, which
    // may have been the active layer's before.
    let active = l2_offsets(&image.l1.entries());
    image
        .allocator
        .check_freed(bulk.freed(), |cluster, owner| {
            let host = g.host_offset(cluster);
            let is_own_area = runs
                .iter()
                .any(|run| run.start <= cluster && cluster.0 < run.end());
            let is_own_table = owner == Owner::L2Table
                && tables.binary_search(&host).is_ok()
                && active.binary_search(&host).is_err();
            is_own_area || is_own_table
        })?;
    image.file.flush().await?;
    Ok(Prepared {
        table,
        table_area,
        l1,
        bulk,
    })
}

/// Writes the table to free clusters; nothing points to it yet.
///
/// On a full disk a free cluster may be a hole, which cannot be written, and another may not: after a creation there is the
/// one that the table before was in. So several are tried: taking back a snapshot must not need space.
async fn write_table(image: &mut Quiet<'_>, table: &mut SnapshotTable) -> Result<Option<Reserved>> {
    // Kept until the end, so that each try gets another place.
    let mut holes = Vec::new();
    let written = loop {
        let (area, bytes) = image.place_table(table).await?;
        let Some(area) = area else { break Ok(None) };
        match image.write_area(&area, bytes).await {
            Err(error) if error.kind() == ErrorKind::NoSpace && holes.len() < MAX_HOLES => {
                holes.push(area);
            }
            result => break result.map(|()| Some(area)),
        }
    };
    drop(holes);
    image.allocator.reclaim().await?;
    written
}

/// The L1 table of a snapshot, held against the limits: nobody has looked at it before.
async fn read_l1(image: &Quiet<'_>, old: &SnapshotTable, index: usize) -> Result<Vec<u64>> {
    let g = image.geometry();
    let entry = &old.entries()[index];
    let bytes = l1_bytes(entry.l1_entries as usize);
    let end = entry.l1_offset.checked_add(bytes);
    if bytes > QCOW2_MAX_L1_BYTES
        || !g.is_aligned(entry.l1_offset)
        || (bytes > 0 && entry.l1_offset == 0)
        || end.is_none_or(|end| g.clusters_for(end) > g.clusters_for(image.file.size()))
    {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "The image needs a repair (qemu-img check -r all): the snapshot's L1 table is out of \
             bounds",
        ));
    }
    let data = image.file.read(entry.l1_offset, bytes).await?.to_bytes();
    let entries = data.as_chunks().0.iter();
    Ok(entries.map(|entry| u64::from_be_bytes(*entry)).collect())
}

fn keep(prepared: &mut Prepared<'_>) {
    if let Some(area) = &mut prepared.table_area {
        area.publish(area.run().count);
    }
}

/// Makes the file agree with the switched header: counts, then flags, then free clusters.
async fn settle(image: &mut Quiet<'_>, prepared: &Prepared<'_>, discard: Discard) -> Result<()> {
    let written = prepared.bulk.write().await;
    image.allocator.forget_blocks();
    written?;
    let flagged = restore_copied(image, prepared).await;
    image.file.flush().await?;
    let cluster_bits = image.geometry().cluster_bits();
    let freed: HashSet<u64> = l2_offsets(&prepared.l1)
        .into_iter()
        .filter(|table| prepared.bulk.count(table.cluster(cluster_bits)) == 0)
        .map(|table| table.0)
        .collect();
    for table in freed {
        image.l2.forget(HostOffset(table));
    }
    for run in prepared.bulk.freed() {
        if discard == Discard::Yes {
            let (at, len) = (run.start.0 << cluster_bits, run.count << cluster_bits);
            if let Err(error) = image.file.discard(at, len).await {
                log::debug!("qcow2: freed clusters keep their space in the file: {error}");
            }
        }
        image.allocator.adopt_freed(*run);
    }
    if let Err(error) = flagged {
        log::warn!("qcow2: COPIED flags are not set again ({error}): later writes copy once more");
    }
    Ok(())
}

/// Sets COPIED where the active layer is the only user now. Only the slots of the snapshot's L1 table can have changed.
async fn restore_copied(image: &Quiet<'_>, prepared: &Prepared<'_>) -> Result<()> {
    let g = image.geometry();
    let alone = |host: HostOffset| prepared.bulk.count(g.host_cluster(host)) == 1;
    let active: Vec<u64> = image.l1.entries();
    let slots = active.iter().zip(&prepared.l1);
    let touched: Vec<u64> = slots
        .filter(|(_, theirs)| L1Entry(**theirs).l2_offset().is_some())
        .map(|(ours, _)| *ours)
        .collect();
    let mut tables = l2_offsets(&touched);
    tables.dedup();
    let written = rewrite_copied(image.file, g, &tables, |cluster, copied| {
        copied || prepared.bulk.count(cluster) == 1
    })
    .await;
    // Also after an error: any of them may have been written.
    for table in &tables {
        image.l2.forget(*table);
    }
    written?;
    let mut changed = false;
    for (index, entry) in active.iter().map(|entry| L1Entry(*entry)).enumerate() {
        if !entry.is_copied() && entry.l2_offset().is_some_and(alone) {
            image.l1.set(index, entry.with_copied(true));
            changed = true;
        }
    }
    match changed {
        true => image.write_l1(|_, entry| entry).await,
        false => Ok(()),
    }
}
