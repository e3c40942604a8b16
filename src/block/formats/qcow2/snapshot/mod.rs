//! Internal snapshots: a snapshot is a copy of the L1 table, and one reference more on all that it reaches
//! (specification: "Snapshots").
//!
//! Refcounts are changed in bulk while the image is quiet. The next scheme, whose cost does not depend on the disk's size,
//! replaces `bulk` for images with a dirty bit and keeps the rest: table, order, roll-back.
//!
//! ```text
//! create: L1 copy, new table | refcounts up | COPIED cleared | flush | header | flush | old table freed
//! delete: new table | flush | header | flush | refcounts down | COPIED set | flush
//!                             ^ the switch: before it an error changes nothing, after it a failure only leaks
//! ```
//!
//! * `table`: the snapshot table
//! * `bulk`: refcounts and COPIED flags of many clusters at once
//! * `create`, `delete`: the operations on a quiet image
//! * `driver`: the contract around them

mod bulk;
mod create;
mod delete;
mod driver;
pub(super) mod table;

pub(super) use driver::SnapshotList;

use super::alloc::{Allocator, Reserved, Run};
use super::entry::L1Entry;
use super::geometry::{ENTRY_SIZE, Geometry};
use super::header::Version;
use super::header_cell::HeaderCell;
use super::l1::L1Table;
use super::l2::L2Cache;
use super::owners::Owner;
use crate::driver::{Child, WriteFlags};
use crate::error::Result;
use crate::units::HostOffset;
use table::SnapshotTable;

/// What the log says where clusters stay counted for nobody.
const LEAK_ADVICE: &str = "space is lost, no data; qemu-img check -r leaks gives it back";

/// Bytes that file systems allocate at a time, most of them: to write less saves no space.
const HOST_BLOCK: usize = 4096;

/// An image that nobody else uses at the moment, with all its metadata written to the file.
pub(super) struct Quiet<'a> {
    pub(super) file: &'a Child,
    pub(super) header: &'a HeaderCell,
    pub(super) allocator: &'a mut Allocator,
    pub(super) l1: &'a L1Table,
    pub(super) l2: &'a L2Cache,
}

impl Quiet<'_> {
    fn geometry(&self) -> Geometry {
        self.header.get().geometry()
    }

    /// Takes clusters for the table, with the bytes that go there; none for an empty table.
    async fn place_table(
        &mut self,
        table: &mut SnapshotTable,
    ) -> Result<(Option<Reserved>, Vec<u8>)> {
        let header = self.header.get();
        if header.version == Version::V3 {
            table.complete(header.size);
        }
        let bytes = table.encode()?;
        if bytes.is_empty() {
            return Ok((None, bytes));
        }
        let clusters = self.geometry().clusters_for(bytes.len() as u64);
        let area = self
            .allocator
            .allocate_metadata(clusters, Owner::SnapshotTable)
            .await?;
        Ok((Some(area), bytes))
    }

    /// Where the table in use lies; `None` for an image without snapshots.
    fn old_table(&self, old: &SnapshotTable) -> Result<Option<Run>> {
        let bytes = old.encode()?.len() as u64;
        let start = self
            .geometry()
            .host_cluster(self.header.get().snapshots_offset);
        let count = self.geometry().clusters_for(bytes);
        Ok((count > 0).then_some(Run { start, count }))
    }

    /// Writes `bytes` to the start of an area, zeroes behind them up to the end of the host's block. No more: a cluster that
    /// a table was in then has space for a table of that length, also when the host's disk is full. Taking back a
    /// snapshot relies on it.
    async fn write_area(&self, area: &Reserved, mut bytes: Vec<u8>) -> Result<()> {
        let g = self.geometry();
        let clusters = (area.run().count << g.cluster_bits()) as usize;
        bytes.resize(bytes.len().next_multiple_of(HOST_BLOCK).min(clusters), 0);
        let at = g.host_offset(area.run().start).0;
        self.file
            .write(at, bytes.into(), WriteFlags::default())
            .await
    }

    /// Makes the header point to the new table, durably.
    async fn switch_table(&self, area: Option<&Reserved>, table: &SnapshotTable) -> Result<()> {
        let offset = match area {
            Some(area) => self.geometry().host_offset(area.run().start),
            None => HostOffset(0),
        };
        let count = table.entries().len() as u32;
        self.header
            .update(|header| {
                header.nb_snapshots = count;
                header.snapshots_offset = offset;
            })
            .await
    }

    /// Writes the active L1 table with the COPIED flags that `wanted` gives its entries. Not durable before a flush.
    async fn write_l1(&self, wanted: impl Fn(usize, L1Entry) -> L1Entry) -> Result<()> {
        let entries = self.l1.entries().into_iter().enumerate();
        let bytes: Vec<u8> = entries
            .flat_map(|(index, entry)| wanted(index, L1Entry(entry)).0.to_be_bytes())
            .collect();
        if bytes.is_empty() {
            return Ok(());
        }
        self.file
            .write(self.l1.offset().0, bytes.into(), WriteFlags::default())
            .await
    }

    /// After an error: what was reserved and is not used goes back, in memory and in the file.
    async fn give_back(&mut self) {
        let given = match self.allocator.reclaim().await {
            Ok(()) => self.allocator.write_back().await,
            Err(error) => Err(error),
        };
        if let Err(error) = given {
            // What is in memory is right and is written with the next flush.
            log::warn!("qcow2: reserved clusters could not be given back yet: {error}");
        }
    }
}

/// The L2 tables of an L1 table, ascending by host offset.
fn l2_offsets(entries: &[u64]) -> Vec<HostOffset> {
    let mut offsets: Vec<HostOffset> = entries
        .iter()
        .filter_map(|entry| L1Entry(*entry).l2_offset())
        .collect();
    offsets.sort_unstable();
    offsets
}

/// Bytes of an L1 table.
fn l1_bytes(entries: usize) -> u64 {
    entries as u64 * ENTRY_SIZE
}

#[cfg(test)]
mod tests;
