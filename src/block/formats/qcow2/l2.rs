//! L2 tables in memory: shared, with atomic entries, so that lookups take no exclusive lock.
//!
//! A table that is in use, or has changes that are not written yet, is never evicted: whoever holds it holds an `Arc`, and
//! so does the list of dirty tables. So there is never a second copy of a table.

mod entries;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::alloc::{dirty_ranges, slice_mask};
use super::damage::Damage;
use super::entry::L2Entry;
use super::geometry::Geometry;
use super::metadata::Metadata;
use super::owners::Owner;
use crate::driver::Child;
use crate::error::Result;
use crate::events::HostBytes;
use crate::io::{Access, Data, RangeLock};
use crate::units::HostOffset;
use entries::Entries;

const SHARDS: usize = 16;

/// An L2 table.
#[derive(Debug)]
pub(crate) struct L2Table {
    g: Geometry,
    host: HostOffset,
    entries: Entries,
    /// Which 64ths of the table differ from the disk.
    dirty: AtomicU64,
    /// Looked up since the last eviction came by.
    used: AtomicBool,
}

impl L2Table {
    /// An empty table that will lie at `host`.
    pub(crate) fn empty(g: Geometry, host: HostOffset) -> Arc<Self> {
        Self::new(g, host, Entries::empty(g))
    }

    /// A table as it lies at `host`.
    pub(crate) fn parse(g: Geometry, host: HostOffset, bytes: &[u8]) -> Arc<Self> {
        Self::new(g, host, Entries::parse(g, bytes))
    }

    /// A table with the same entries that will lie at `host`. What they point to is shared then: none of them has COPIED.
    pub(crate) fn copy_to(&self, host: HostOffset) -> Arc<Self> {
        let shared = |entry: L2Entry| match entry.is_compressed() {
            true => entry,
            false => entry.with_copied(false),
        };
        Self::new(
            self.g,
            host,
            Entries::collect(self.g, self.iter().map(shared)),
        )
    }

    fn new(g: Geometry, host: HostOffset, entries: Entries) -> Arc<Self> {
        Arc::new(L2Table {
            g,
            host,
            entries,
            dirty: AtomicU64::new(0),
            used: AtomicBool::new(true),
        })
    }

    /// Where it lies.
    pub(crate) fn host(&self) -> HostOffset {
        self.host
    }

    /// The entry at `index`. Takes no lock.
    pub(crate) fn get(&self, index: usize) -> L2Entry {
        self.entries.get(index)
    }

    /// All entries in order, each as it is when it is reached.
    pub(crate) fn iter(&self) -> impl Iterator<Item = L2Entry> {
        (0..self.entries.len()).map(|index| self.entries.get(index))
    }

    /// Whether no entry says anything.
    pub(crate) fn is_empty(&self) -> bool {
        self.iter().all(L2Entry::is_empty)
    }

    /// The table as it goes to disk.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.bytes(0..self.g.cluster_size() as usize)
    }

    /// A range of its bytes; the ends are those of entries.
    fn bytes(&self, range: std::ops::Range<usize>) -> Vec<u8> {
        let size = self.g.l2_entry_size() as usize;
        self.entries.to_bytes(range.start / size..range.end / size)
    }
}

/// What a write-back has taken of a table.
#[derive(Debug)]
pub(crate) struct TakenTable {
    table: Arc<L2Table>,
    mask: u64,
    parts: Vec<(HostOffset, Data)>,
}

/// The L2 tables in memory.
#[derive(Debug)]
pub(crate) struct L2Cache {
    g: Geometry,
    file: Child,
    shards: [RwLock<Shard>; SHARDS],
    /// Tables in memory and the number from which on tables are evicted.
    count: AtomicUsize,
    limit: AtomicUsize,
    dirty: Mutex<Vec<Arc<L2Table>>>,
    dirty_count: AtomicUsize,
    /// Loads of the same table wait for each other.
    loading: RangeLock,
    damage: Arc<Damage>,
}

#[derive(Debug, Default)]
struct Shard {
    tables: HashMap<u64, Arc<L2Table>>,
    order: VecDeque<u64>,
}

/// How many tables a cache of this size has; always some for each shard.
fn tables_in(g: Geometry, bytes: u64) -> usize {
    (bytes >> g.cluster_bits()).max(2 * SHARDS as u64) as usize
}

impl L2Cache {
    /// From now on it is for up to `bytes`. Tables that are too many go when others come.
    pub(crate) fn set_size(&self, bytes: u64) {
        self.limit
            .store(tables_in(self.g, bytes), Ordering::Relaxed);
    }

    /// An empty cache for up to `bytes` of tables that are neither in use nor dirty.
    pub(crate) fn new(g: Geometry, file: Child, bytes: u64, damage: Arc<Damage>) -> Self {
        L2Cache {
            shards: Default::default(),
            count: AtomicUsize::new(0),
            limit: tables_in(g, bytes).into(),
            dirty: Mutex::default(),
            dirty_count: AtomicUsize::new(0),
            loading: RangeLock::default(),
            damage,
            g,
            file,
        }
    }

    fn shard(&self, host: HostOffset) -> &RwLock<Shard> {
        &self.shards[(self.g.host_cluster(host).0 % SHARDS as u64) as usize]
    }

    /// The table at `host`, if it is in memory.
    pub(crate) fn lookup(&self, host: HostOffset) -> Option<Arc<L2Table>> {
        let shard = self
            .shard(host)
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let table = shard.tables.get(&host.0)?;
        if !table.used.load(Ordering::Relaxed) {
            table.used.store(true, Ordering::Relaxed);
        }
        Some(table.clone())
    }

    /// The table at `host`, read from the file when it is not in memory.
    pub(crate) async fn get(&self, host: HostOffset) -> Result<Arc<L2Table>> {
        if let Some(table) = self.lookup(host) {
            return Ok(table);
        }
        let cluster = self.g.host_cluster(host).0;
        let _loading = self
            .loading
            .lock(cluster..cluster + 1, Access::Exclusive)
            .await;
        if let Some(table) = self.lookup(host) {
            return Ok(table);
        }
        // What a file that was cut off has lost must not be taken for an empty part of the disk.
        if host.0 + self.g.cluster_size() > self.file.size() {
            let place = HostBytes {
                offset: host.0,
                len: self.g.cluster_size(),
            };
            let message = format!("L2 table offset {host} behind the end of the file");
            return Err(self.damage.met(message, Some(place)));
        }
        let data = self.file.read(host.0, self.g.cluster_size()).await?;
        let table = L2Table::parse(self.g, host, &data.to_bytes());
        self.insert(table.clone());
        Ok(table)
    }

    /// Puts a table in, in place of another one that lay there.
    pub(crate) fn insert(&self, table: Arc<L2Table>) {
        let host = table.host;
        let mut shard = self
            .shard(host)
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if shard.tables.insert(host.0, table).is_none() {
            shard.order.push_back(host.0);
            self.count.fetch_add(1, Ordering::Relaxed);
        }
        if self.count.load(Ordering::Relaxed) > self.limit.load(Ordering::Relaxed) {
            self.evict(&mut shard, host);
        }
    }

    /// Evicts a table or two that nobody uses and nobody has looked up lately.
    fn evict(&self, shard: &mut Shard, keep: HostOffset) {
        let mut tries = shard.order.len().min(64);
        let mut wanted = 2;
        while tries > 0 && wanted > 0 {
            tries -= 1;
            let Some(host) = shard.order.pop_front() else {
                return;
            };
            let Some(table) = shard.tables.get(&host) else {
                continue;
            };
            // Lookups take the shard's lock, so a count of one cannot grow here. Dirty tables have a second owner.
            let idle = Arc::strong_count(table) == 1 && host != keep.0;
            if idle && !table.used.swap(false, Ordering::Relaxed) {
                shard.tables.remove(&host);
                self.count.fetch_sub(1, Ordering::Relaxed);
                wanted -= 1;
            } else {
                shard.order.push_back(host);
            }
        }
    }

    /// Forgets the table at `host`: its cluster holds something else now, or nothing.
    pub(crate) fn forget(&self, host: HostOffset) {
        let mut shard = self
            .shard(host)
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = shard.tables.remove(&host.0) {
            shard.order.retain(|other| *other != host.0);
            self.count.fetch_sub(1, Ordering::Relaxed);
            // It may be in the list of dirty tables: nothing of it is written any more.
            table.dirty.store(0, Ordering::SeqCst);
        }
    }

    /// Changes an entry if it is still `old`; answers whether it was. It is written by the next write-back.
    pub(crate) fn replace(
        &self,
        table: &Arc<L2Table>,
        index: usize,
        old: L2Entry,
        new: L2Entry,
    ) -> bool {
        let replaced = table.entries.replace(index, old, new);
        if replaced {
            // Only now: a write-back that takes the mark before the entry would lose the entry.
            self.mark(table, index, 1);
        }
        replaced
    }

    /// Marks entries as different from the disk.
    pub(crate) fn mark(&self, table: &Arc<L2Table>, first: usize, count: usize) {
        let entry = self.g.l2_entry_size() as usize;
        let bytes = first * entry..(first + count) * entry;
        self.mark_slices(table, slice_mask(bytes, self.g.cluster_size() as usize));
    }

    fn mark_slices(&self, table: &Arc<L2Table>, mask: u64) {
        if table.dirty.fetch_or(mask, Ordering::SeqCst) == 0 && mask != 0 {
            let mut dirty = self.dirty.lock().unwrap_or_else(PoisonError::into_inner);
            dirty.push(table.clone());
            self.dirty_count.store(dirty.len(), Ordering::Relaxed);
        }
    }

    /// How many tables wait to be written.
    pub(crate) fn dirty_count(&self) -> usize {
        self.dirty_count.load(Ordering::Relaxed)
    }

    /// How many tables may wait before somebody should write them.
    pub(crate) fn dirty_limit(&self) -> usize {
        (self.limit.load(Ordering::Relaxed) / 2).max(1)
    }

    /// Takes what has changed, as it is now. What could not be written goes back with `put_back`.
    pub(crate) fn take_dirty(&self) -> Vec<TakenTable> {
        let tables = {
            let mut dirty = self.dirty.lock().unwrap_or_else(PoisonError::into_inner);
            self.dirty_count.store(0, Ordering::Relaxed);
            std::mem::take(&mut *dirty)
        };
        let size = self.g.cluster_size() as usize;
        let take = |table: Arc<L2Table>| {
            // The mask first: what changes from here on is marked again.
            let mask = table.dirty.swap(0, Ordering::SeqCst);
            let part = |range: std::ops::Range<usize>| {
                let bytes = table.bytes(range.clone());
                (table.host + range.start as u64, Data::from(bytes))
            };
            let parts = dirty_ranges(mask, size).into_iter().map(part).collect();
            TakenTable { table, mask, parts }
        };
        let mut taken: Vec<_> = tables.into_iter().map(take).collect();
        taken.sort_by_key(|taken| taken.table.host);
        taken
    }

    /// Marks what was taken as dirty again.
    pub(crate) fn put_back(&self, taken: &[TakenTable]) {
        for taken in taken {
            self.mark_slices(&taken.table, taken.mask);
        }
    }
}

impl TakenTable {
    /// Writes what was taken. Not durable before the file's next flush.
    pub(crate) async fn write(&self, metadata: &Metadata) -> Result<()> {
        for (at, data) in &self.parts {
            metadata.write(Owner::L2Table, *at, data.clone()).await?;
        }
        Ok(())
    }
}
