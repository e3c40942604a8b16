//! Opening an image, in two steps: the header first, which names the backing; then the rest.
//!
//! Everything that the header and the tables in memory say is checked before anything is used. An image opened for
//! writing must also be sound in what it says about its metadata: clusters claimed twice refuse the open.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, RwLock};

use arc_swap::ArcSwapOption;

use super::Qcow2;
use super::alloc::Allocator;
use super::bitmaps::Bitmaps;
use super::check::{self, CheckOptions, Repair};
use super::damage::Damage;
use super::data_file::DataFile;
use super::entry::L1Entry;
use super::gate::Gate;
use super::geometry::{ENTRY_SIZE, Geometry};
use super::header::{Header, Incompatible, Version};
use super::header_cell::HeaderCell;
use super::image::Image;
use super::l1::L1Table;
use super::l2::L2Cache;
use super::metadata::Metadata;
use super::owners::{Owner, Owners};
use super::quarantine::Quarantine;
use super::snapshot::{Settler, Settling, SnapshotList};
use super::tuning::Tuning;
use super::write_back::{Commits, Early};
use crate::driver::Child;
use crate::error::{Error, ErrorKind, Result};
use crate::events::Reporter;
use crate::io::{BriefMutex, RangeLock};
use crate::limits;
use crate::units::{ClusterIndex, HostOffset};

/// How an image is opened.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// The file at the bottom as the user named it, for queries.
    pub filename: String,
    /// Refuse writes, and change nothing in the file.
    pub read_only: bool,
    /// Punch holes into the file where clusters are freed, but by the deletion of a snapshot.
    pub pass_discard: bool,
    /// Punch holes into the file where the deletion of a snapshot frees clusters.
    pub pass_discard_snapshot: bool,
    /// Bytes of L2 tables kept in memory.
    pub l2_cache_bytes: u64,
    /// Bytes of refcount blocks kept in memory.
    pub refcount_cache_bytes: u64,
    /// Where damage is reported that is found while the image is in use.
    pub reporter: Reporter,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            filename: String::new(),
            read_only: false,
            pass_discard: true,
            pass_discard_snapshot: true,
            l2_cache_bytes: limits::QCOW2_L2_CACHE_BYTES,
            refcount_cache_bytes: limits::QCOW2_REFCOUNT_CACHE_BYTES,
            reporter: Reporter::default(),
        }
    }
}

/// The backing file as the image names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingReference {
    /// Its name, relative to the image's folder unless it is absolute or has a protocol.
    pub name: String,
    /// Its format. Without one it would have to be guessed from bytes that the guest may have written.
    pub format: Option<String>,
}

/// An image whose header has been read and found usable.
#[derive(Debug)]
pub struct Opening {
    file: Child,
    header: Header,
    damage: Arc<Damage>,
    options: OpenOptions,
    data_file: Option<Child>,
}

impl Qcow2 {
    /// Reads and checks the header of the image in `file`. A dirty image is repaired first when it is opened for
    /// writing. Errors: `InvalidInput` for what is not qcow2 or breaks a limit, `Unsupported` with the names of features,
    /// `Corrupt` for an image that says so itself. Cancellation: safe, but for the repair, which begins anew next time.
    pub async fn open(file: Child, options: OpenOptions) -> Result<Opening> {
        let mut header = read_header(&file).await?;
        if !options.read_only {
            if header.incompatible.has(Incompatible::CORRUPT) {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    "qcow2: Image is corrupt; cannot be opened read/write",
                ));
            }
            if header.incompatible.has(Incompatible::DIRTY) {
                log::warn!("qcow2: the image was not closed; its refcounts are repaired");
                let repaired = check::repair(&file, Repair::All, &CheckOptions::default()).await?;
                log::info!(
                    "qcow2: {} leaks and {} errors repaired",
                    repaired.leaks_fixed,
                    repaired.corruptions_fixed
                );
                header = read_header(&file).await?;
            }
        }
        Ok(Opening {
            file,
            header,
            damage: Arc::new(Damage::new(options.reporter.clone())),
            options,
            data_file: None,
        })
    }
}

pub(super) async fn read_header(file: &Child) -> Result<Header> {
    let size = file.size();
    let start = file.read(0, size.min(512)).await?.to_bytes();
    let needed = Header::bytes_needed(&start)?;
    let cluster = file.read(0, size.min(needed)).await?.to_bytes();
    let header = Header::parse(&cluster)?;
    header.validate()?;
    Ok(header)
}

impl Opening {
    /// An open image once more, with this header, whatever the one in the file is. They share what is known of its damage.
    pub(super) fn again(image: &Image, header: Header, options: OpenOptions) -> Result<Self> {
        header.validate()?;
        Ok(Opening {
            file: image.file.clone(),
            header,
            damage: image.damage.clone(),
            options,
            data_file: None,
        })
    }

    /// The backing that the image names; the caller decides whether and how to open it.
    pub fn backing(&self) -> Option<BackingReference> {
        Some(BackingReference {
            name: self.header.backing_name.clone()?,
            format: self.header.backing_format(),
        })
    }

    /// Gives the image its external data file, which it must have if it needs one.
    #[must_use]
    pub fn with_data_file(mut self, data_file: Option<Child>) -> Self {
        self.data_file = data_file;
        self
    }

    /// Disk size in bytes.
    pub fn size(&self) -> u64 {
        self.header.size
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.header.geometry().cluster_size()
    }

    /// Reads the tables and makes the node. `backing` is what unallocated clusters show; none means zeroes.
    /// Cancellation: safe.
    pub async fn finish(self, backing: Option<Child>) -> Result<Arc<Qcow2>> {
        let Opening {
            file,
            header,
            damage,
            options,
            data_file,
        } = self;
        let (g, size) = (header.geometry(), header.size);
        let data = DataFile::new(&header, &file, data_file)?;
        data.check_backing(backing.is_some())?;
        let Tables {
            l1,
            reftable,
            snapshots,
            bitmaps,
            owners,
        } = Tables::load(&file, &header, options.read_only).await?;
        let owners = Arc::new(owners);
        let has_zero_flag = (header.version == Version::V3).into();
        let compression = header.compression_type().unwrap_or_default();
        let may_have_backing = (backing.is_some() || header.backing_name.is_some()).into();
        let l1 = Arc::new(L1Table::new(header.l1_table_offset, l1));
        let header = Arc::new(HeaderCell::new(file.clone(), header));
        let metadata = Metadata {
            g,
            file: file.clone(),
            owners: owners.clone(),
            damage: damage.clone(),
        };
        let tuning = Arc::new(Tuning::new(&options));
        let alloc = Allocator::new(metadata.clone(), header.clone(), reftable, tuning.clone());
        let l2 = L2Cache::new(g, file.clone(), options.l2_cache_bytes, damage.clone());
        let image = Image {
            g,
            l2: Arc::new(l2),
            file,
            data,
            may_have_backing,
            backing: ArcSwapOption::from(backing.map(Arc::new)),
            read_only: options.read_only.into(),
            can_write: (!options.read_only).into(),
            tuning,
            has_zero_flag,
            compression,
            header,
            size: size.into(),
            l1: RwLock::new(l1),
            owners,
            damage,
            metadata,
            alloc: BriefMutex::new(alloc),
            gate: Arc::new(Gate::default()),
            clusters: RangeLock::default(),
            tables: RangeLock::default(),
            quarantine: Quarantine::default(),
            snapshots,
            settling: Settling::default(),
            settler: Settler::default(),
            bitmaps,
            commits: Commits::default(),
            early: Early::default(),
            prepared: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        };
        let image = Arc::new(image);
        Ok(Arc::new(Qcow2 { image }))
    }
}

/// What opening reads behind the header.
pub(super) struct Tables {
    l1: Vec<u64>,
    /// Empty where nothing is written.
    pub(super) reftable: Vec<u64>,
    snapshots: SnapshotList,
    bitmaps: Bitmaps,
    /// Who has which cluster; empty where nothing is written.
    pub(super) owners: Owners,
}

impl Tables {
    pub(super) async fn load(file: &Child, header: &Header, read_only: bool) -> Result<Tables> {
        let g = header.geometry();
        let l1_at = (header.l1_table_offset, header.l1_size.into());
        let mut tables = Tables {
            l1: read_table(file, g, "Active L1 table", l1_at).await?,
            reftable: Vec::new(),
            snapshots: SnapshotList::load(file, header).await?,
            bitmaps: Bitmaps::load(file, header, read_only).await?,
            owners: Owners::default(),
        };
        if !read_only {
            tables.reftable = read_reftable(g, file, header).await?;
            claim_metadata(g, &tables.owners, header, &tables.reftable, &tables.l1)?;
            tables.bitmaps.claim(file, g, &tables.owners).await?;
            tables.snapshots.claim(file, header, &tables.owners).await?;
        }
        Ok(tables)
    }
}

/// Reads a table whose place the header's validation has found possible. The file must reach into its last cluster:
/// what a shorter file has lost must not be taken for an empty disk, or for free space.
pub(super) async fn read_table(
    file: &Child,
    g: Geometry,
    what: &str,
    (offset, entries): (HostOffset, u64),
) -> Result<Vec<u64>> {
    if entries == 0 {
        return Ok(Vec::new());
    }
    let (len, size) = (entries * ENTRY_SIZE, file.size());
    if g.clusters_for(offset.0 + len) > g.clusters_for(size) {
        return Err(Error::new(
            ErrorKind::Corrupt,
            format!(
                "qcow2: Image is corrupt: {what} at {offset} with {len} bytes is outside of the file, which has {size}"
            ),
        ));
    }
    let table = file.read(offset.0, len).await?.to_bytes();
    let entries = table.as_chunks().0.iter();
    Ok(entries.map(|entry| u64::from_be_bytes(*entry)).collect())
}

async fn read_reftable(g: Geometry, file: &Child, header: &Header) -> Result<Vec<u64>> {
    let entries = u64::from(header.refcount_table_clusters) * (g.cluster_size() / ENTRY_SIZE);
    let at = (header.refcount_table_offset, entries);
    let table = read_table(file, g, "Reference count table", at).await?;
    check_reftable(g, file, &table)?;
    Ok(table)
}

fn check_reftable(g: Geometry, file: &Child, table: &[u64]) -> Result<()> {
    let size = file.size();
    for (index, entry) in table.iter().enumerate() {
        let end = entry.checked_add(g.cluster_size());
        if *entry != 0 && (!g.is_aligned(*entry) || end.is_none_or(|end| end > size)) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "qcow2: Image is corrupt: refcount block offset {entry:#x} is not valid (table index {index})"
                ),
            ));
        }
    }
    Ok(())
}

/// Puts the image's metadata into the owner map; two kinds on one cluster are an error. L1 entries that are not valid
/// are left to those who use them.
fn claim_metadata(
    g: Geometry,
    owners: &Owners,
    header: &Header,
    reftable: &[u64],
    l1: &[u64],
) -> Result<()> {
    owners.claim_alone(ClusterIndex(0), 1, Owner::Header)?;
    let start = g.host_cluster(header.refcount_table_offset);
    let count = header.refcount_table_clusters.into();
    owners.claim_alone(start, count, Owner::RefcountTable)?;
    if header.l1_size > 0 {
        let start = g.host_cluster(header.l1_table_offset);
        let count = g.clusters_for(l1.len() as u64 * ENTRY_SIZE);
        owners.claim_alone(start, count, Owner::L1Table)?;
    }
    for entry in reftable.iter().filter(|entry| **entry != 0) {
        let cluster = g.host_cluster(HostOffset(*entry));
        owners.claim_alone(cluster, 1, Owner::RefcountBlock)?;
    }
    for entry in l1 {
        if let Ok(Some(host)) = L1Entry(*entry).checked(g) {
            owners.claim_alone(g.host_cluster(host), 1, Owner::L2Table)?;
        }
    }
    Ok(())
}
