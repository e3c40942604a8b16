//! Making a new image (QEMU's `blockdev-create` and `qemu-img create` with format qcow2).
//!
//! Everything is laid out ahead and written front to back in large pieces, the header last:
//!
//! ```text
//! | header | refcount table | refcount blocks | L1 table | L2 tables | data (a hole) |
//! |                always                                | preallocation=metadata    |
//! ```
//!
//! With `preallocation=metadata` 256 GiB take 40 MiB of sequential writes. The data clusters are a hole at the end
//! of the file, which reads as zeroes.

use bytes::Bytes;

use super::codec::CompressionType;
use super::counters::CounterWidth;
use super::entry::{L1Entry, L2Entry, PlainCluster};
use super::geometry::{ENTRY_SIZE, Geometry};
use super::header::{Autoclear, Compatible, Header, Incompatible, Version};
use super::subclusters::{State, Subclusters, mask};
pub use crate::driver::{BackingFile, Compat};
use crate::driver::{Child, Preallocation, WriteFlags, ZeroFlags};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Data, Segment};
use crate::limits;
use crate::units::{ClusterIndex, HostOffset, SECTOR};

/// How much metadata is written at once, in bytes.
const PIECE: u64 = 4 << 20;

/// Bytes of the header behind the fields of version 3: compression type and padding.
const TRAILING_BYTES: usize = 8;

/// What image to make. The defaults are QEMU's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// Disk size in bytes, a multiple of 512.
    pub size: u64,
    /// Cluster size in bytes: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Version.
    pub compat: Compat,
    /// Width of a refcount in bits: 1, 2, 4, 8, 16, 32 or 64. Version 2 has 16.
    pub refcount_bits: u32,
    /// Allow refcount updates to be postponed under the dirty bit; version 3 only.
    pub lazy_refcounts: bool,
    /// How clusters are compressed; `Zlib` only in version 2.
    pub compression_type: CompressionType,
    /// Extended L2 entries: clusters of 32 subclusters; version 3 only, from 16 KiB clusters on.
    pub extended_l2: bool,
    /// `Falloc` and `Full` take space in files only; on a device they are refused.
    pub preallocation: Preallocation,
    /// The backing file, as text.
    pub backing: BackingFile,
    /// Guest data go to a file of their own; version 3 only.
    pub data_file: Option<DataFileOptions>,
}

/// An external data file, as the image describes it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DataFileOptions {
    /// Its name as written to the image. Nothing is opened for that.
    pub name: Option<String>,
    /// It can be read as a raw image without the metadata. What it holds is what the new disk shows; otherwise a new disk is zero.
    pub raw: bool,
}

impl CreateOptions {
    /// An image of `size` bytes with QEMU's defaults.
    pub fn new(size: u64) -> Self {
        CreateOptions {
            size,
            cluster_size: 64 << 10,
            compat: Compat::default(),
            refcount_bits: 16,
            lazy_refcounts: false,
            compression_type: CompressionType::default(),
            extended_l2: false,
            preallocation: Preallocation::Off,
            backing: BackingFile::default(),
            data_file: None,
        }
    }

    /// Whether [`create`] would take the options, apart from what the file has to say.
    pub fn check(&self) -> Result<()> {
        let layout = Layout::new(self.validate()?, self)?;
        header(&layout, self).map(drop)
    }

    /// How many bytes from the beginning of a device [`create`] writes to. Errors as of [`CreateOptions::check`].
    pub fn overwritten_bytes(&self) -> Result<u64> {
        Ok(Layout::new(self.validate()?, self)?.metadata_bytes())
    }

    /// Holds the options against the format's limits, with QEMU's texts.
    fn validate(&self) -> Result<Geometry> {
        let cluster_bits = self.cluster_size.trailing_zeros();
        let bits = limits::QCOW2_MIN_CLUSTER_BITS..=limits::QCOW2_MAX_CLUSTER_BITS;
        if !self.cluster_size.is_power_of_two() || !bits.contains(&cluster_bits) {
            return Err(invalid(
                "Cluster size must be a power of two between 512 and 2048k",
            ));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err(invalid(
                "Refcount width must be a power of two and may not exceed 64 bits",
            ));
        }
        if self.compat == Compat::V0_10 {
            self.validate_version_2()?;
        }
        if !self.size.is_multiple_of(SECTOR) {
            return Err(invalid("Image size must be a multiple of 512 bytes"));
        }
        self.validate_backing()?;
        self.validate_data_file()?;
        let mut g = Geometry::new(cluster_bits, self.refcount_bits.trailing_zeros());
        if self.extended_l2 {
            if cluster_bits < limits::QCOW2_MIN_EXTENDED_CLUSTER_BITS {
                return Err(invalid(
                    "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
                ));
            }
            g = g.with_extended_l2();
        }
        let l1_bytes = g.l1_entries_for(self.size).checked_mul(ENTRY_SIZE);
        if self.size > limits::MAX_DISK_SIZE
            || l1_bytes.is_none_or(|bytes| bytes > limits::QCOW2_MAX_L1_BYTES)
        {
            return Err(invalid(
                "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
            ));
        }
        Ok(g)
    }

    fn validate_version_2(&self) -> Result<()> {
        if self.refcount_bits != 16 {
            return Err(invalid(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use version=v3 or greater)",
            ));
        }
        if self.lazy_refcounts {
            return Err(invalid(
                "Lazy refcounts only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            ));
        }
        if self.extended_l2 {
            return Err(invalid(
                "Extended L2 entries are only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            ));
        }
        if self.compression_type != CompressionType::Zlib {
            return Err(invalid(
                "Non-zlib compression type is only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            ));
        }
        Ok(())
    }

    fn validate_data_file(&self) -> Result<()> {
        let Some(DataFileOptions { name: _, raw }) = &self.data_file else {
            return Ok(());
        };
        if self.compat == Compat::V0_10 {
            return Err(invalid(
                "External data files are only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            ));
        }
        if *raw && self.backing.name.is_some() {
            return Err(invalid(
                "Backing file and data-file-raw cannot be used at the same time",
            ));
        }
        Ok(())
    }

    fn validate_backing(&self) -> Result<()> {
        if self.backing.name.is_none() && self.backing.format.is_some() {
            return Err(invalid(
                "Backing format cannot be used without backing file",
            ));
        }
        let preallocates = self.preallocation != Preallocation::Off;
        if preallocates && self.backing.name.is_some() && !self.extended_l2 {
            return Err(invalid(
                "Backing file and preallocation can only be used at the same time if \
                 extended_l2 is on",
            ));
        }
        Ok(())
    }
}

/// Makes an image in `file`, over whatever was there. Durable when it answers.
///
/// `InvalidInput` with QEMU's text when an option is wrong; nothing is written then. After any other error `file` holds no
/// usable image: the header is written last.
///
/// Cancellation: as an error in the middle.
pub async fn create(file: &Child, options: &CreateOptions) -> Result<()> {
    if options.data_file.is_some() {
        return Err(invalid("The data file is missing"));
    }
    create_over(file, None, options).await
}

/// Makes an image in `file` whose guest data go to `data`, which is made as large as the disk if it is smaller.
///
/// Errors and cancellation as for [`create`]; `data` may have grown then.
pub async fn create_with_data_file(
    file: &Child,
    data: &Child,
    options: &CreateOptions,
) -> Result<()> {
    if options.data_file.is_none() {
        return Err(invalid("The options do not describe the data file"));
    }
    create_over(file, Some(data), options).await
}

async fn create_over(file: &Child, data: Option<&Child>, options: &CreateOptions) -> Result<()> {
    let geometry = options.validate()?;
    let layout = Layout::new(geometry, options)?;
    // Encoded first, so that a name that does not fit is refused before anything is written.
    let header = header(&layout, options)?;
    clear(file, &layout, options).await?;
    write_reftable(file, &layout).await?;
    write_refblocks(file, &layout).await?;
    write_l1(file, &layout).await?;
    if layout.l2_tables > 0 {
        let state = match data {
            Some(data) => state_outside(data, &layout, options),
            None => preallocated_state(file, &layout, options)?,
        };
        write_l2_tables(file, &layout, state).await?;
    }
    if let Some(data) = data {
        prepare_data_file(data, options).await?;
    }
    file.flush().await?;
    write(file, HostOffset(0), header).await?;
    file.flush().await
}

/// Which cluster holds what; all areas follow each other.
#[derive(Debug, Clone, Copy)]
struct Layout {
    geometry: Geometry,
    reftable_clusters: u64,
    refblocks: u64,
    l1_entries: u64,
    l1_clusters: u64,
    l2_tables: u64,
    /// Clusters that L2 entries point to.
    data_clusters: u64,
    /// They lie in a file of their own.
    data_outside: bool,
}

impl Layout {
    fn new(geometry: Geometry, options: &CreateOptions) -> Result<Self> {
        let g = geometry;
        // An L1 table of no entries would make its cluster a leak.
        let l1_entries = g.l1_entries_for(options.size).max(1);
        // A raw data file can be written by others too: every byte of it shows.
        let is_raw = options.data_file.as_ref().is_some_and(|file| file.raw);
        let (data_clusters, l2_tables) = match options.preallocation {
            preallocation if is_raw || preallocation != Preallocation::Off => {
                let clusters = g.clusters_for(options.size);
                (clusters, clusters.div_ceil(g.l2_entries()))
            }
            _ => (0, 0),
        };
        let mut layout = Layout {
            geometry,
            reftable_clusters: 1,
            refblocks: 1,
            l1_entries,
            l1_clusters: g.clusters_for(l1_entries * ENTRY_SIZE),
            l2_tables,
            data_clusters,
            data_outside: options.data_file.is_some(),
        };
        // Refcounts count their own clusters too: grow until all fit. Each round adds less than the one before.
        loop {
            let refblocks = layout.clusters().div_ceil(g.refcounts_per_block());
            let reftable_clusters = g.clusters_for(refblocks * ENTRY_SIZE);
            if (refblocks, reftable_clusters) == (layout.refblocks, layout.reftable_clusters) {
                break;
            }
            layout.refblocks = refblocks.max(layout.refblocks);
            layout.reftable_clusters = reftable_clusters.max(layout.reftable_clusters);
        }
        let too_large = layout.reftable_clusters << g.cluster_bits()
            > limits::QCOW2_MAX_REFTABLE_BYTES
            || layout.clusters() << g.cluster_bits() > limits::QCOW2_MAX_HOST_OFFSET;
        if too_large {
            return Err(invalid(
                "The image is too large to be preallocated (try using a larger cluster size)",
            ));
        }
        Ok(layout)
    }

    fn reftable(&self) -> ClusterIndex {
        ClusterIndex(1)
    }

    fn first_refblock(&self) -> ClusterIndex {
        self.reftable() + self.reftable_clusters
    }

    fn l1(&self) -> ClusterIndex {
        self.first_refblock() + self.refblocks
    }

    fn first_l2(&self) -> ClusterIndex {
        self.l1() + self.l1_clusters
    }

    fn first_data(&self) -> ClusterIndex {
        self.first_l2() + self.l2_tables
    }

    /// Clusters of the whole image.
    fn clusters(&self) -> u64 {
        match self.data_outside {
            true => self.first_data().0,
            false => self.first_data().0 + self.data_clusters,
        }
    }

    /// The host cluster of the n-th guest cluster.
    fn data(&self, nth: u64) -> ClusterIndex {
        match self.data_outside {
            true => ClusterIndex(nth),
            false => self.first_data() + nth,
        }
    }

    fn offset(&self, cluster: ClusterIndex) -> HostOffset {
        self.geometry.host_offset(cluster)
    }

    fn metadata_bytes(&self) -> u64 {
        self.offset(self.first_data()).0
    }

    fn bytes(&self) -> u64 {
        self.clusters() << self.geometry.cluster_bits()
    }
}

fn header(layout: &Layout, options: &CreateOptions) -> Result<Vec<u8>> {
    let version = match options.compat {
        Compat::V0_10 => Version::V2,
        Compat::V1_1 => Version::V3,
    };
    let compression = match options.compression_type {
        CompressionType::Zlib => 0,
        CompressionType::Zstd => Incompatible::COMPRESSION,
    };
    let data_file = match &options.data_file {
        Some(_) => Incompatible::DATA_FILE,
        None => 0,
    };
    let autoclear = match &options.data_file {
        Some(DataFileOptions { raw: true, .. }) => Autoclear::DATA_FILE_RAW,
        _ => 0,
    };
    let extended = match options.extended_l2 {
        true => Incompatible::EXTENDED_L2,
        false => 0,
    };
    let lazy = match options.lazy_refcounts {
        true => Compatible::LAZY_REFCOUNTS,
        false => 0,
    };
    let mut header = Header {
        version,
        backing_name: options.backing.name.clone(),
        cluster_bits: layout.geometry.cluster_bits(),
        size: options.size,
        crypt_method: 0,
        l1_size: layout.l1_entries as u32,
        l1_table_offset: layout.offset(layout.l1()),
        refcount_table_offset: layout.offset(layout.reftable()),
        refcount_table_clusters: layout.reftable_clusters as u32,
        nb_snapshots: 0,
        snapshots_offset: HostOffset(0),
        incompatible: Incompatible(compression | data_file | extended),
        compatible: Compatible(lazy),
        autoclear: Autoclear(autoclear),
        refcount_order: layout.geometry.refcount_order(),
        trailing: match version {
            Version::V2 => Vec::new(),
            Version::V3 => trailing(options.compression_type),
        },
        extensions: Vec::new(),
    };
    header.set_backing_format(options.backing.format.as_deref());
    let data_file = options.data_file.as_ref();
    if let Some(name) = data_file.and_then(|file| file.name.as_deref()) {
        header.set_data_file_name(name);
    }
    if version == Version::V3 {
        let without_names = header.clone();
        header.set_feature_names();
        // The names only help other readers; with 512-byte clusters and a backing file there is no room for them.
        if header.to_bytes().is_err() {
            header = without_names;
        }
    }
    header.validate()?;
    header.to_bytes()
}

/// The header's bytes behind the fields of version 3.
fn trailing(compression: CompressionType) -> Vec<u8> {
    let mut bytes = vec![0; TRAILING_BYTES];
    bytes[0] = compression.field();
    bytes
}

/// Drops what `file` holds, and makes it large enough.
async fn clear(file: &Child, layout: &Layout, options: &CreateOptions) -> Result<()> {
    if file.limits().growable {
        // What was cut off even once is written out when it is closed, by ext4: whoever closes it would wait for that.
        if file.size() > 0 {
            file.resize(0, Preallocation::Off).await?;
        }
        // Data elsewhere take their space there.
        let preallocation = match layout.data_outside {
            true => Preallocation::Off,
            false => options.preallocation,
        };
        return file.resize(layout.bytes(), preallocation).await;
    }
    if takes_space(options.preallocation) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "Preallocation modes 'falloc' and 'full' are not supported on a device",
        ));
    }
    if file.size() < layout.bytes() {
        return Err(Error::new(
            ErrorKind::NoSpace,
            format!(
                "The image needs {} bytes, but the device has {}",
                layout.bytes(),
                file.size()
            ),
        ));
    }
    // Also wipes the old header first: an interrupted creation must not leave an image that opens.
    let flags = ZeroFlags::default();
    file.write_zeroes(0, layout.metadata_bytes(), flags).await
}

fn takes_space(preallocation: Preallocation) -> bool {
    matches!(preallocation, Preallocation::Falloc | Preallocation::Full)
}

/// What the subclusters of preallocated clusters are.
fn preallocated_state(file: &Child, layout: &Layout, options: &CreateOptions) -> Result<State> {
    if layout.geometry.has_extended_l2() {
        // They have their place, and show the backing.
        return Ok(State::Unallocated);
    }
    if file.limits().growable {
        return Ok(State::Data);
    }
    // The device has old bytes where a file has a hole.
    match options.compat {
        Compat::V1_1 => Ok(State::Zero),
        Compat::V0_10 => Err(Error::new(
            ErrorKind::Unsupported,
            "Preallocation on a device needs compatibility level 1.1 or above",
        )),
    }
}

/// What the subclusters of preallocated clusters in a data file are.
fn state_outside(data: &Child, layout: &Layout, options: &CreateOptions) -> State {
    let is_raw = options.data_file.as_ref().is_some_and(|file| file.raw);
    let is_empty = data.limits().growable && data.size() == 0;
    if is_raw {
        return State::Data;
    }
    match (layout.geometry.has_extended_l2(), is_empty) {
        // As in the image's own file.
        (true, _) => State::Unallocated,
        (false, true) => State::Data,
        // What it holds must not show in a new disk.
        (false, false) => State::Zero,
    }
}

/// Makes the data file large enough.
async fn prepare_data_file(data: &Child, options: &CreateOptions) -> Result<()> {
    if data.size() < options.size {
        let resized = data.resize(options.size, options.preallocation).await;
        resized.map_err(|error| error.context("The data file cannot grow"))?;
    }
    data.flush().await
}

async fn write_reftable(file: &Child, layout: &Layout) -> Result<()> {
    let entries = (0..layout.refblocks).map(|index| {
        let block = layout.first_refblock() + index;
        layout.offset(block).0
    });
    write(file, layout.offset(layout.reftable()), table(entries)).await
}

async fn write_refblocks(file: &Child, layout: &Layout) -> Result<()> {
    let g = layout.geometry;
    let width = CounterWidth::new(g.refcount_order());
    let per_block = g.refcounts_per_block();
    let mut full = vec![0; g.cluster_size() as usize];
    width.fill(&mut full, 0..per_block as usize, 1);
    let full = Bytes::from(full);
    let mut pieces = Pieces::new(file, layout.offset(layout.first_refblock()));
    let whole_blocks = layout.clusters() / per_block;
    for _ in 0..whole_blocks {
        pieces.push(full.clone()).await?;
    }
    let rest = (layout.clusters() % per_block) as usize;
    if rest > 0 {
        let mut last = vec![0; g.cluster_size() as usize];
        width.fill(&mut last, 0..rest, 1);
        pieces.push(last.into()).await?;
    }
    pieces.finish().await
}

/// Writes the whole table, so that it has its space when the host's disk is full: a flush has to write to it then.
async fn write_l1(file: &Child, layout: &Layout) -> Result<()> {
    let entries = (0..layout.l1_entries).map(|index| match index < layout.l2_tables {
        true => L1Entry::new(layout.offset(layout.first_l2() + index), true).0,
        false => 0,
    });
    write(file, layout.offset(layout.l1()), table(entries)).await
}

async fn write_l2_tables(file: &Child, layout: &Layout, state: State) -> Result<()> {
    let g = layout.geometry;
    let subclusters = Subclusters::default().with(mask(0..g.subclusters()), state);
    let entry = |data| {
        let cluster = PlainCluster {
            host: Some(layout.offset(layout.data(data))),
            copied: true,
            subclusters,
        };
        L2Entry::plain(cluster, g).to_bytes(g)
    };
    let mut pieces = Pieces::new(file, layout.offset(layout.first_l2()));
    for index in 0..layout.l2_tables {
        let first = index * g.l2_entries();
        let count = g.l2_entries().min(layout.data_clusters - first);
        let mut bytes: Vec<u8> = (first..first + count).flat_map(entry).collect();
        bytes.resize(g.cluster_size() as usize, 0);
        pieces.push(bytes.into()).await?;
    }
    pieces.finish().await
}

/// Gathers neighbouring bytes into large writes.
struct Pieces<'a> {
    file: &'a Child,
    at: HostOffset,
    data: Data,
}

impl<'a> Pieces<'a> {
    fn new(file: &'a Child, at: HostOffset) -> Self {
        let data = Data::new();
        Pieces { file, at, data }
    }

    async fn push(&mut self, bytes: Bytes) -> Result<()> {
        self.data.push(Segment::Bytes(bytes));
        // The number of segments is bounded too: one per call costs the file engine an iovec.
        let many = self.data.segments().len() >= limits::MAX_IOVECS;
        match self.data.len() >= PIECE || many {
            true => self.write().await,
            false => Ok(()),
        }
    }

    async fn finish(mut self) -> Result<()> {
        self.write().await
    }

    async fn write(&mut self) -> Result<()> {
        let data = std::mem::take(&mut self.data);
        let len = data.len();
        let flags = WriteFlags::default();
        self.file.write(self.at.0, data, flags).await?;
        self.at = self.at + len;
        Ok(())
    }
}

fn table(entries: impl Iterator<Item = u64>) -> Vec<u8> {
    entries.flat_map(u64::to_be_bytes).collect()
}

async fn write(file: &Child, at: HostOffset, bytes: Vec<u8>) -> Result<()> {
    file.write(at.0, bytes.into(), WriteFlags::default()).await
}

fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

#[cfg(test)]
mod tests;
