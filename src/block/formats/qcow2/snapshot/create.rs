//! Taking a snapshot.

use super::bulk::{BulkRefcounts, Step, rewrite_copied};
use super::table::{SnapshotTable, TableEntry};
use super::{LEAK_ADVICE, Quiet, l1_bytes, l2_offsets};
use crate::driver::NewSnapshot;
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::alloc::{Reserved, Run};
use crate::formats::qcow2::entry::L1Entry;
use crate::formats::qcow2::owners::Owner;
use crate::limits::QCOW2_MAX_SNAPSHOTS;
use crate::units::HostOffset;

/// What is written before the header is switched.
struct Prepared {
    table: SnapshotTable,
    table_bytes: Vec<u8>,
    table_area: Option<Reserved>,
    /// The table that is in use until the switch.
    old_table: Option<Run>,
    l1_area: Reserved,
    /// The active L2 tables, ascending.
    l2_tables: Vec<HostOffset>,
    /// Those of them that have a COPIED flag.
    with_copied: Vec<HostOffset>,
}

/// Takes a snapshot of a quiet image whose snapshots are `old`, and answers the table that is in use from now on.
///
/// On error nothing has changed, in memory or in the file. Should taking back fail too, clusters are counted once too
/// often, and the log says so. Not to be dropped half way.
pub(in crate::formats::qcow2) async fn create(
    image: &mut Quiet<'_>,
    old: &SnapshotTable,
    new: &NewSnapshot,
) -> Result<SnapshotTable> {
    validate(image, old, new)?;
    let mut prepared = match prepare(image, old, new).await {
        Ok(prepared) => prepared,
        Err(error) => {
            image.give_back().await;
            return Err(error);
        }
    };
    let raised = raise(image, &mut prepared).await;
    let mut bulk = match raised {
        Ok(bulk) => bulk,
        Err(error) => {
            drop(prepared);
            image.give_back().await;
            return Err(error);
        }
    };
    if let Err(error) = switch(image, &bulk, &prepared).await {
        bulk.take_back();
        if image.header.check().is_err() {
            // The header may point to the new table: all that it reaches must stay as it is.
            keep(&mut prepared);
            log::error!("qcow2: a snapshot was neither taken nor taken back: {LEAK_ADVICE}");
        } else if let Err(second) = take_back(image, &mut bulk, &prepared).await {
            log::error!("qcow2: a failed snapshot was not taken back ({second}): {LEAK_ADVICE}");
        }
        image.allocator.forget_blocks();
        forget_tables(image, &prepared);
        drop(prepared);
        image.give_back().await;
        return Err(error);
    }
    keep(&mut prepared);
    image.allocator.forget_blocks();
    forget_tables(image, &prepared);
    for (index, entry) in image.l1.entries().into_iter().map(L1Entry).enumerate() {
        if entry.is_copied() {
            image.l1.set(index, entry.with_copied(false));
        }
    }
    if let Some(run) = prepared.old_table
        && let Err(error) = free(image, run).await
    {
        log::warn!("qcow2: the old snapshot table is not freed ({error}): {LEAK_ADVICE}");
    }
    Ok(prepared.table)
}

fn validate(image: &Quiet<'_>, old: &SnapshotTable, new: &NewSnapshot) -> Result<()> {
    image.header.check()?;
    if new.name.is_empty() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "Snapshot name is empty",
        ));
    }
    if new.name.len() > usize::from(u16::MAX) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "Snapshot name is too long",
        ));
    }
    if old.has_name(&new.name) {
        return Err(Error::new(
            ErrorKind::AlreadyExists,
            format!("Snapshot with name '{}' already exists", new.name),
        ));
    }
    if old.entries().len() >= QCOW2_MAX_SNAPSHOTS as usize {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("The image has {QCOW2_MAX_SNAPSHOTS} snapshots and can have no more"),
        ));
    }
    if image.geometry().refcount_max() < 2 {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "Images with refcounts of 1 bit cannot have snapshots",
        ));
    }
    Ok(())
}

/// Takes the space. Nothing points to it yet.
async fn prepare(
    image: &mut Quiet<'_>,
    old: &SnapshotTable,
    new: &NewSnapshot,
) -> Result<Prepared> {
    let g = image.geometry();
    let entries = image.l1.entries();
    // An empty L1 table still has a place of its own.
    let l1_clusters = g.clusters_for(l1_bytes(entries.len())).max(1);
    let l1_area = image
        .allocator
        .allocate_metadata(l1_clusters, Owner::L1Table)
        .await?;
    let mut entry = TableEntry::new(old.next_id(), new, image.header.get().size);
    entry.l1_offset = g.host_offset(l1_area.run().start).0;
    entry.l1_entries = entries.len() as u32;
    let mut table = old.with(entry);
    let (table_area, table_bytes) = image.place_table(&mut table).await?;
    // Counters of the new clusters, and all others, are in the file before they are changed there.
    image.allocator.write_back().await?;
    Ok(Prepared {
        table,
        table_bytes,
        table_area,
        old_table: image.old_table(old)?,
        l1_area,
        l2_tables: l2_offsets(&entries),
        with_copied: Vec::new(),
    })
}

/// Raises the counts in memory, and writes what nothing points to.
async fn raise<'a>(image: &mut Quiet<'a>, prepared: &mut Prepared) -> Result<BulkRefcounts<'a>> {
    let table = image.allocator.refcount_table().to_vec();
    let mut bulk = BulkRefcounts::new(image.file, image.geometry(), table);
    let flags = bulk.change_tables(&prepared.l2_tables, Step::Up).await?;
    let tables = prepared.l2_tables.iter().zip(flags);
    prepared.with_copied = tables
        .filter_map(|(table, copied)| copied.then_some(*table))
        .collect();
    let copy: Vec<u8> = image
        .l1
        .entries()
        .into_iter()
        .flat_map(|entry| L1Entry(entry).with_copied(false).0.to_be_bytes())
        .collect();
    image.write_area(&prepared.l1_area, copy).await?;
    if let Some(area) = &prepared.table_area {
        let bytes = std::mem::take(&mut prepared.table_bytes);
        image.write_area(area, bytes).await?;
    }
    Ok(bulk)
}

/// Makes the snapshot: what comes before the header's write is harmless without it, whatever of it is durable.
///
/// A count too high costs a copy at most, and so does a flag that is missing; a flag that is set on a cluster with a
/// higher count is wrong only when the header points to a table that shares the cluster. So one flush before the switch
/// is enough for all of them.
async fn switch(image: &Quiet<'_>, bulk: &BulkRefcounts<'_>, prepared: &Prepared) -> Result<()> {
    let g = image.geometry();
    bulk.write().await?;
    rewrite_copied(image.file, g, &prepared.with_copied, |_, _| false).await?;
    image.write_l1(|_, entry| entry.with_copied(false)).await?;
    image.file.flush().await?;
    image
        .switch_table(prepared.table_area.as_ref(), &prepared.table)
        .await
}

/// Puts refcounts, then flags, back to what they were. `bulk` has been taken back in memory.
async fn take_back(
    image: &Quiet<'_>,
    bulk: &mut BulkRefcounts<'_>,
    prepared: &Prepared,
) -> Result<()> {
    bulk.write_old().await?;
    rewrite_copied(
        image.file,
        image.geometry(),
        &prepared.with_copied,
        |cluster, _| bulk.count(cluster) == 1,
    )
    .await?;
    image.write_l1(|_, entry| entry).await?;
    image.file.flush().await
}

fn forget_tables(image: &Quiet<'_>, prepared: &Prepared) {
    for table in &prepared.with_copied {
        image.l2.forget(*table);
    }
}

fn keep(prepared: &mut Prepared) {
    let areas = [Some(&mut prepared.l1_area), prepared.table_area.as_mut()];
    for area in areas.into_iter().flatten() {
        area.publish(area.run().count);
    }
}

/// Gives back clusters that nothing points to any more.
async fn free(image: &mut Quiet<'_>, run: Run) -> Result<()> {
    for run in image.allocator.subtract(run, 1).await? {
        image.allocator.adopt_freed(run);
    }
    image.allocator.write_back().await
}
