//! The state of an open image, and how its tables are found and made ours.
//!
//! Locks, in the order in which they are taken:
//!
//! 1. `gate`: every request is inside, operations on the whole image are alone
//! 2. `clusters`: ranges of guest subclusters; allocating writes, discards and zero writes of the same one follow each
//!    other, all others run in parallel. Who changes which host cluster an entry has holds all of the cluster
//! 3. `tables`: L1 indices; who makes or copies an L2 table
//! 4. `committing` (write-back), then `alloc` (refcounts and free clusters)
//!
//! The standard locks below them are never held across an await. Reads take none of 2 to 4.
//!
//! A write in place needs no range lock: whoever unlinks its cluster meanwhile does not give it away before
//! the write has left the gate. A cluster gains the COPIED flag only under the closed gate or under its range lock.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use arc_swap::ArcSwapOption;

use super::alloc::{Allocator, Run};
use super::bitmaps::Bitmaps;
use super::codec::CompressionType;
use super::damage::{Damage, Hex};
use super::data_file::DataFile;
use super::entry::{BadEntry, L1Entry, L2Entry, Mapping, PlainCluster};
use super::gate::Gate;
use super::geometry::{ENTRY_SIZE, Geometry, GuestCluster};
use super::header::{Autoclear, Header};
use super::header_cell::HeaderCell;
use super::l1::L1Table;
use super::l2::{L2Cache, L2Table};
use super::metadata::Metadata;
use super::owners::{Owner, Owners};
use super::quarantine::Quarantine;
use super::snapshot::{Settler, Settling, SnapshotList};
use super::tuning::Tuning;
use super::write_back::{Commits, Early};
use crate::driver::Child;
use crate::error::{Error, ErrorKind, Result};
use crate::events::HostBytes;
use crate::io::{Access, BriefMutex, Data, RangeGuard, RangeLock};
use crate::units::{ClusterIndex, GuestOffset, HostOffset};

/// An open image.
#[derive(Debug)]
pub(crate) struct Image {
    pub(super) g: Geometry,
    /// The file as the user named it.
    pub(super) file: Child,
    pub(super) data: DataFile,
    /// What unallocated clusters show. Changed while nobody uses the image.
    pub(super) backing: ArcSwapOption<Child>,
    /// Unallocated clusters may show something other than zeroes, now or when the image is opened otherwise.
    pub(super) may_have_backing: AtomicBool,
    /// Nothing is changed. Changed itself under the closed gate only.
    pub(super) read_only: AtomicBool,
    /// What writing needs is in memory: refcounts and owners.
    pub(super) can_write: AtomicBool,
    pub(super) tuning: Arc<Tuning>,
    /// Version 3: zeroes need no cluster. Changed under the closed gate only.
    pub(super) has_zero_flag: AtomicBool,
    pub(super) compression: CompressionType,
    pub(super) header: Arc<HeaderCell>,
    /// Disk size in bytes.
    pub(super) size: AtomicU64,
    /// The active L1 table. Replaced under the closed gate only.
    pub(super) l1: RwLock<Arc<L1Table>>,
    pub(super) l2: Arc<L2Cache>,
    pub(super) owners: Arc<Owners>,
    pub(super) damage: Arc<Damage>,
    /// Where tables are written.
    pub(super) metadata: Metadata,
    pub(super) alloc: BriefMutex<Allocator>,
    pub(super) gate: Arc<Gate>,
    pub(super) clusters: RangeLock,
    pub(super) tables: RangeLock,
    pub(super) quarantine: Quarantine,
    pub(super) snapshots: SnapshotList,
    pub(super) settling: Settling,
    pub(super) settler: Settler,
    pub(super) bitmaps: Bitmaps,
    pub(super) commits: Commits,
    pub(super) early: Early,
    /// The header and the bitmaps have been made ready for changes of what the guest sees.
    pub(super) prepared: AtomicBool,
    pub(super) closed: AtomicBool,
}

impl Image {
    /// Disk size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Whether zeroes need no cluster.
    pub(super) fn has_zero_flag(&self) -> bool {
        self.has_zero_flag.load(Ordering::Acquire)
    }

    /// Whether unallocated clusters may show something other than zeroes.
    pub(super) fn may_have_backing(&self) -> bool {
        self.may_have_backing.load(Ordering::Acquire)
    }

    /// What unallocated clusters show; zeroes, without one.
    pub(super) fn backing(&self) -> Option<Arc<Child>> {
        self.backing.load_full()
    }

    /// Shows another backing from now on.
    pub(super) fn set_backing(&self, backing: Option<Child>) {
        let named = self.header.get().backing_name.is_some();
        let may_show = backing.is_some() || named;
        // Before it can be read: a discard that still believed that there is none would show it.
        self.may_have_backing.fetch_or(may_show, Ordering::AcqRel);
        self.backing.store(backing.map(Arc::new));
    }

    /// The active L1 table.
    pub(super) fn l1(&self) -> Arc<L1Table> {
        let l1 = self.l1.read().unwrap_or_else(PoisonError::into_inner);
        l1.clone()
    }

    /// Makes another table the active one, under the closed gate.
    pub(super) fn set_l1(&self, table: Arc<L1Table>) {
        *self.l1.write().unwrap_or_else(PoisonError::into_inner) = table;
    }

    /// Whether nothing is changed.
    pub(super) fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }

    /// Whether `close` has ended.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn l1_entry(&self, index: usize) -> L1Entry {
        let l1 = self.l1.read().unwrap_or_else(PoisonError::into_inner);
        l1.get(index)
    }

    /// Refuses ranges beyond the end, and everything after `close`.
    pub(super) fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        if self.is_closed() {
            return Err(Error::new(ErrorKind::InUse, "The image is closed"));
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.size() => Ok(()),
            _ => Err(Error::new(
                ErrorKind::OutOfRange,
                format!("Request at {offset:#x} of {len} bytes is outside of the disk"),
            )),
        }
    }

    /// What each change begins with that may touch what the guest sees: ready for changes, and no enabled bitmap says any more
    /// what has changed.
    pub(super) async fn prepare_change(&self) -> Result<()> {
        if self.prepared.load(Ordering::Acquire) {
            self.damage.check()?;
            return self.header.check();
        }
        self.prepare_metadata_change().await?;
        self.bitmaps.mark_enabled(&self.metadata).await?;
        self.prepared.store(true, Ordering::Release);
        Ok(())
    }

    /// What each change of the image begins with: not read-only, not corrupt, not broken, and feature bits cleared that a
    /// writer that does not keep them up must clear. Enough for changes that leave the guest's bytes as they are.
    pub(super) async fn prepare_metadata_change(&self) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, "The image is read-only"));
        }
        self.damage.check()?;
        self.header.check()?;
        if self.header.get().autoclear.0 & !Autoclear::KEPT == 0 {
            // Nobody waits for a change that another one makes of the header.
            return Ok(());
        }
        let keep = |header: &mut Header| header.autoclear.0 &= Autoclear::KEPT;
        self.header.update(keep).await
    }

    /// The L2 table of an L1 entry with the entry, if there is one.
    pub(super) async fn table(&self, index: usize) -> Result<Option<(Arc<L2Table>, L1Entry)>> {
        let entry = self.l1_entry(index);
        match self.l2_offset(index, entry)? {
            None => Ok(None),
            Some(host) => Ok(Some((self.l2.get(host).await?, entry))),
        }
    }

    fn l2_offset(&self, index: usize, entry: L1Entry) -> Result<Option<HostOffset>> {
        entry.checked(self.g).map_err(|bad| {
            let what = match bad {
                BadEntry::Unaligned(host) => format!("L2 table offset {host} unaligned"),
                _ => format!("L1 entry {:#x} has reserved bits set", entry.0),
            };
            let index = Hex(index as u64);
            self.damage.met(format!("{what} (L1 index: {index})"), None)
        })
    }

    /// What the entry of a guest cluster says. A host cluster behind the end of the file is never ours.
    pub(super) fn decode(&self, entry: L2Entry, cluster: GuestCluster) -> Result<Mapping> {
        let decoded = self
            .data
            .decode(entry, cluster, (self.g, self.has_zero_flag()));
        let mapping = decoded.map_err(|bad| {
            let what = match bad {
                BadEntry::Unaligned(host) => format!("Cluster allocation offset {host} unaligned"),
                BadEntry::Reserved(bits) => {
                    format!("L2 entry {entry} has reserved bits {bits:#x} set")
                }
                BadEntry::ZeroInV2 => "Zero cluster entry found in pre-v3 image".to_owned(),
                BadEntry::Subclusters(bitmap) => {
                    format!("L2 entry {entry} has an invalid subcluster bitmap {bitmap:#x}")
                }
                BadEntry::CompressedOutside => {
                    "Compressed cluster entry found in image with external data file".to_owned()
                }
                BadEntry::Misplaced { host, place } => format!(
                    "External data file host cluster offset {host} does not match guest cluster offset: {place}"
                ),
            };
            let place = self.entry_place(cluster);
            self.damage.met(format!("{what} ({place})"), None)
        })?;
        Ok(match mapping {
            Mapping::Plain(plain) if plain.host.is_some_and(|host| self.is_behind_end(host)) => {
                Mapping::Plain(PlainCluster {
                    copied: false,
                    ..plain
                })
            }
            mapping => mapping,
        })
    }

    /// Whether a data cluster lies behind the end of the image's file. No image that was written in order has one: tables that lead to
    /// a cluster are written after it. The file was cut off, or never got what an unclean end of a writer with lazy refcounts
    /// took along; and nothing tells whether the place is free.
    pub(super) fn is_behind_end(&self, host: HostOffset) -> bool {
        !self.data.is_external() && host.0 >= self.file.size()
    }

    /// The error for a guest cluster whose data are not there. It can be overwritten as a whole.
    pub(super) fn lost(&self, cluster: GuestCluster, host: HostOffset) -> Error {
        let entry = self.entry_place(cluster);
        let text = format!("Data cluster at {host} behind the end of the file ({entry})");
        let place = HostBytes {
            offset: host.0,
            len: self.g.cluster_size(),
        };
        self.damage.met(text, Some(place))
    }

    /// Where the entry of a guest cluster lies, for messages.
    fn entry_place(&self, cluster: GuestCluster) -> String {
        let table = self.l1_entry(self.g.l1_index(cluster)).l2_offset();
        let table = Hex(table.unwrap_or_default().0);
        let index = Hex(self.g.l2_index(cluster) as u64);
        format!("L2 offset: {table}, L2 index: {index}")
    }

    /// What an entry says that is about to be replaced. Its clusters go back to the allocator, so none of them may hold
    /// metadata, whatever a damaged table says.
    pub(super) fn decode_to_replace(
        &self,
        entry: L2Entry,
        cluster: GuestCluster,
    ) -> Result<Mapping> {
        let mapping = self.decode(entry, cluster)?;
        if let Some(run) = self.references(mapping)
            && let Some((metadata, owner)) = self.owners.first_owned(run)
        {
            let name = self.metadata_name(metadata, owner);
            let place = self.entry_place(cluster);
            return Err(self.damage.prevented(
                format!("Preventing metadata from being freed as a data cluster ({name}; {place})"),
                Some(self.bytes_of(run)),
            ));
        }
        Ok(mapping)
    }

    /// Keeps guest data off metadata, whatever a damaged table says.
    pub(super) fn check_data_place(&self, host: HostOffset, len: u64) -> Result<()> {
        let first = self.g.host_cluster(host);
        let last = self.g.host_cluster(host + (len - 1));
        let run = Run {
            start: first,
            count: last.0 - first.0 + 1,
        };
        let Some((metadata, owner)) = self.owners.first_owned(run) else {
            return Ok(());
        };
        let name = self.metadata_name(metadata, owner);
        let place = HostBytes {
            offset: host.0,
            len,
        };
        Err(self.damage.prevented(
            format!("Preventing invalid write on metadata (overlaps with {name})"),
            Some(place),
        ))
    }

    /// What QEMU calls the metadata in a cluster.
    fn metadata_name(&self, cluster: ClusterIndex, owner: Owner) -> &'static str {
        let (header, l1) = (self.header.get(), self.l1());
        let is_active = match owner {
            Owner::L1Table => {
                let first = self.g.host_cluster(l1.offset()).0;
                (first..first + self.g.clusters_for(u64::from(header.l1_size) * ENTRY_SIZE))
                    .contains(&cluster.0)
            }
            Owner::L2Table => {
                let table = Some(self.g.host_offset(cluster));
                let mut entries = l1.entries().into_iter();
                entries.any(|entry| L1Entry(entry).l2_offset() == table)
            }
            _ => true,
        };
        owner.qemu_name(is_active)
    }

    /// Where a run of host clusters lies.
    pub(super) fn bytes_of(&self, run: Run) -> HostBytes {
        HostBytes {
            offset: self.g.host_offset(run.start).0,
            len: run.count << self.g.cluster_bits(),
        }
    }

    /// The L2 table of an L1 entry as one that may be changed: made when there is none, copied when it is shared.
    ///
    /// A new table is written to the file before the L1 entry points to it, so that its space exists, and the
    /// write-back makes it durable before the entry. Cancellation: run to the end by the caller.
    pub(super) async fn own_table(&self, index: usize) -> Result<Arc<L2Table>> {
        if let Some((table, entry)) = self.table(index).await?
            && entry.is_copied()
        {
            return Ok(table);
        }
        let lock = index as u64..index as u64 + 1;
        let _making = self.tables.lock(lock, Access::Exclusive).await;
        let old = match self.table(index).await? {
            Some((table, entry)) if entry.is_copied() => return Ok(table),
            Some((table, _)) => {
                self.settle_before_copy(table.host()).await?;
                Some(table)
            }
            None => None,
        };
        let mut reserved = {
            let mut alloc = self.alloc.lock().await;
            alloc.allocate_metadata(1, Owner::L2Table).await?
        };
        let host = self.g.host_offset(reserved.run().start);
        let table = match &old {
            Some(old) => old.copy_to(host),
            None => L2Table::empty(self.g, host),
        };
        let bytes = Data::from(table.to_bytes());
        self.metadata.write(Owner::L2Table, host, bytes).await?;
        self.l2.insert(table.clone());
        reserved.publish(1);
        self.l1().set(index, L1Entry::new(host, true));
        if let Some(old) = old {
            self.quarantine.unlinked([self.cluster_run(old.host())]);
        }
        self.commits.touch();
        Ok(table)
    }

    /// Has the guest clusters from `first` to `last` alone: lock 2 (see the module's documentation).
    pub(super) async fn lock_clusters(
        &self,
        first: GuestCluster,
        last: GuestCluster,
    ) -> RangeGuard<'_> {
        let start = self.g.guest_offset(first).0;
        let count = last.0 - first.0 + 1;
        self.lock_subclusters(start, count << self.g.cluster_bits())
            .await
    }

    /// Has the subclusters that a guest range touches alone: lock 2. Enough to write to clusters that stay where they are.
    pub(super) async fn lock_subclusters(&self, offset: u64, len: u64) -> RangeGuard<'_> {
        let first = offset >> self.g.subcluster_bits();
        let last = (offset + len - 1) >> self.g.subcluster_bits();
        self.clusters.lock(first..last + 1, Access::Exclusive).await
    }

    /// The run of the one cluster at `host`.
    pub(super) fn cluster_run(&self, host: HostOffset) -> Run {
        Run {
            start: self.g.host_cluster(host),
            count: 1,
        }
    }

    /// The references that go when an entry with this meaning is replaced: of each of these clusters one. Nothing counts
    /// the clusters of an external data file, and for what lies behind the end of the file it is not certain; so it must be asked
    /// before new data are written, which may get that very place.
    pub(super) fn references(&self, mapping: Mapping) -> Option<Run> {
        let (host, run) = match mapping {
            _ if self.data.is_external() => return None,
            Mapping::Plain(cluster) => (cluster.host?, self.cluster_run(cluster.host?)),
            Mapping::Compressed(stream) => {
                let (start, last) = stream.clusters(self.g);
                let count = last.0 - start.0 + 1;
                (stream.host, Run { start, count })
            }
        };
        (!self.is_behind_end(host)).then_some(run)
    }

    /// The part of `[offset, offset + len)` that one L2 table maps.
    pub(super) fn within_table(&self, offset: u64, len: u64) -> u64 {
        len.min(self.g.l2_span() - offset % self.g.l2_span())
    }

    /// The guest cluster at a byte offset.
    pub(super) fn cluster_at(&self, offset: u64) -> GuestCluster {
        self.g.guest_cluster(GuestOffset(offset))
    }
}
