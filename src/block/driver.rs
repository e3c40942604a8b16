//! The contracts of the engine: what a node's driver does, and the handle a driver has on what lies below.
//!
//! `Requests` is the data path, `Driver` adds what the control side asks. Formats, filters and protocols
//! implement `Driver`; they reach the layer below only through `Child` and never see the graph.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::future::try_join_all;

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Data, FileIdentity, HostRange};

pub(crate) use snapshots::complete;
pub use snapshots::{
    GoOn, HeaderHeld, HeaderSwitch, NewSnapshot, RequestsHeld, SnapshotChange, SnapshotInfo,
    SnapshotSelector, SnapshotSource, Snapshots,
};

mod snapshots;

/// A boxed future: what makes the contracts object safe.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What a node asks of the requests sent to it. All in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestLimits {
    /// Offsets and lengths must be multiples of this power of two (1 for most; 512 or 4096 with `cache=none`).
    /// The node above a driver widens or splits what does not fit, so drivers see fitting requests only.
    pub alignment: u32,
    /// The size that suits the node best (a cluster, a page); a hint for exports.
    pub preferred: u32,
    /// Whether the node grows when written behind its end. Such a node answers reads behind its end with zeroes.
    pub growable: bool,
}

/// How a write is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteFlags {
    /// The data, and the metadata needed to find it, are durable before the answer.
    pub fua: bool,
    /// A hint: so many bytes directly behind these are about to be written too, and space may be taken for all of them at once.
    pub ahead: u64,
}

impl WriteFlags {
    /// Durable before the answer if `fua` says so, and nothing more.
    pub fn fua(fua: bool) -> Self {
        WriteFlags {
            fua,
            ..WriteFlags::default()
        }
    }
}

/// How zeroes are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ZeroFlags {
    /// The space may be given back to the host.
    pub may_unmap: bool,
    /// As for writes.
    pub fua: bool,
    /// Fail with `Unsupported` instead of writing zero bytes where no fast way exists.
    pub no_fallback: bool,
}

/// What a range holds, for `block_status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockStatus {
    /// How many bytes from the asked offset the answer holds for; at least 1, at most what was asked.
    pub len: u64,
    /// This layer, not its backing, decides what is read here.
    pub allocated: bool,
    /// Reads return zeroes, as far as the driver knows without reading.
    pub zero: bool,
    /// Where the bytes lie in the layer below, when they lie there as they are (not compressed).
    pub host_offset: Option<u64>,
    /// The bytes are stored compressed.
    pub compressed: bool,
}

/// What a resize does with the new area.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing is allocated.
    #[default]
    Off,
    /// Metadata is written so that the first guest write needs none.
    Metadata,
    /// Host space is reserved as well.
    Falloc,
    /// Host space is written with zeroes.
    Full,
}

/// The data path of a node. Offsets and lengths in bytes of the node's own address space.
///
/// Concurrency: every method may be called from many tasks at once. Requests that overlap in time and range
/// have no order among each other, but each is atomic towards metadata: no request corrupts another's.
///
/// Cancellation: a future may be dropped at any time. The operation may then have happened, in part or whole,
/// and may still happen; nothing is leaked or corrupted by it.
///
/// Ranges: the caller keeps `offset + len` within `size()`; a node that gets more answers `OutOfRange`, except
/// one whose limits say `growable`. A length of 0 succeeds and does nothing.
pub trait Requests: Send + Sync {
    /// The present size in bytes.
    fn size(&self) -> u64;

    /// The size, looked at again: a device may have been extended while it is open, which nothing else notices. No I/O.
    fn size_by_now(&self) -> u64 {
        self.size()
    }

    /// What requests must fit.
    fn limits(&self) -> RequestLimits;

    /// Reads exactly `len` bytes: an error or all of them, as bytes and known-zero runs.
    fn read(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Data>>;

    /// Writes all of `data`, or answers with an error; after an error the range holds old or new bytes.
    /// Durable after the next `flush` only, unless `flags.fua`.
    fn write(&self, offset: u64, data: Data, flags: WriteFlags) -> BoxFuture<'_, Result<()>>;

    /// Writes several pieces, each as `write` does, in any order: some may be written when others are not. Quicker than a write for each
    /// where drivers can do them at once. Pieces do not overlap.
    fn write_pieces(&self, pieces: Vec<(u64, Data)>) -> BoxFuture<'_, Result<()>> {
        let write = |(at, data)| self.write(at, data, WriteFlags::default());
        let writes: Vec<BoxFuture<'_, Result<()>>> = pieces.into_iter().map(write).collect();
        Box::pin(async move { try_join_all(writes).await.map(drop) })
    }

    /// Makes the range read as zeroes.
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> BoxFuture<'_, Result<()>>;

    /// A hint that the content is no longer needed. What is read afterwards is unspecified for a protocol;
    /// qcow2 reads zeroes or, in images that cannot say zero, the backing's content. Never an error for being unsupported.
    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>>;

    /// Every write answered before this call is durable when it succeeds.
    fn flush(&self) -> BoxFuture<'_, Result<()>>;

    /// What lies at `offset`, for as many of the next `len` bytes as share one answer.
    fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>>;

    /// Writes exactly one cluster of the format compressed, or what there is of the disk's last one; as it is where that is not smaller.
    /// Errors and durability as for `write`; `Unsupported` for what cannot store compressed clusters.
    fn write_compressed(&self, offset: u64, data: Data) -> BoxFuture<'_, Result<()>> {
        let _ = (offset, data);
        Box::pin(async { Err(unsupported("Writing compressed clusters")) })
    }

    /// Where the bytes from `offset` on lie in a file of the host, as they are, for as many of the next `len` bytes as lie there in a row.
    /// `None` where that is not so, or not known. Holds for as long as the caller keeps everybody from changing these bytes of the node.
    fn host_range(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Option<HostRange>>> {
        let _ = (offset, len);
        Box::pin(async { Ok(None) })
    }

    /// Makes the range hold what `from` holds, by sharing it in the file system: as a write otherwise, but for `Unsupported` where it
    /// cannot be shared. Nobody may change what `from` holds meanwhile.
    fn write_shared(&self, offset: u64, from: HostRange) -> BoxFuture<'_, Result<()>> {
        let _ = (offset, from);
        Box::pin(async { Err(unsupported("Sharing the bytes of a file")) })
    }

    /// Changes the size. Shrinking drops the tail; new bytes read as zeroes.
    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>>;

    /// A handle for one client alone, where it matters which one asks: see [`Requests::hang_up`].
    fn for_client(&self) -> Option<Arc<dyn Requests>> {
        None
    }

    /// The client of this handle is gone, or is sent away: its requests that wait for somebody's decision (on a drive whose machine
    /// stands still) fail now, and so do later ones that would have to. Those under way end as they do.
    fn hang_up(&self) {}
}

/// What queries show of a driver. Strings as QEMU prints them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DriverInfo {
    /// `qcow2`, `raw`, `file`, `null-co`.
    pub driver: &'static str,
    /// The file at the bottom, as the user named it.
    pub filename: String,
    /// Cluster size in bytes, for formats that have clusters.
    pub cluster_size: Option<u64>,
    /// The backing file as written in the image, if any.
    pub backing_filename: Option<String>,
    /// The backing format as written in the image, if any.
    pub backing_format: Option<String>,
    /// Bytes of host storage in use, where the driver can tell.
    pub actual_size: Option<u64>,
    /// What only this format has.
    pub specific: FormatSpecific,
    /// The image's refcounts are known to need repair (qcow2's dirty bit).
    pub dirty: bool,
    /// L2 tables whose refcounts are still to be brought up to date behind snapshot operations.
    pub unsettled_tables: u64,
    /// The internal snapshot that is shown, for a view of one.
    pub snapshot: Option<SnapshotInfo>,
}

/// Format-specific facts for queries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum FormatSpecific {
    /// Nothing beyond the common facts.
    #[default]
    None,
    /// qcow2's.
    Qcow2 {
        /// `0.10` (version 2) or `1.1` (version 3).
        compat: &'static str,
        /// Compatible feature bit 0.
        lazy_refcounts: Option<bool>,
        /// Width of a refcount in bits.
        refcount_bits: u32,
        /// Incompatible feature bit 1.
        corrupt: Option<bool>,
        /// Incompatible feature bit 4.
        extended_l2: Option<bool>,
        /// `zlib` or `zstd`.
        compression_type: &'static str,
        /// Bitmaps stored in the image, in the order of its directory.
        bitmaps: Vec<PersistentBitmap>,
        /// The name of the external data file as the image has it.
        data_file: Option<String>,
        /// Autoclear feature bit 1, in images with an external data file.
        data_file_raw: Option<bool>,
    },
}

/// The version of the qcow2 format, by QEMU's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compat {
    /// `compat=0.10`: version 2.
    V0_10,
    /// `compat=1.1`: version 3.
    #[default]
    V1_1,
}

/// What an image says about its backing file. Only text: nothing is opened.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BackingFile {
    /// The file name as written to the image.
    pub name: Option<String>,
    /// The format as written to the image; not without a name.
    pub format: Option<String>,
}

/// What to change about an open image's format. `None` leaves it as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AmendOptions {
    /// The version. It can only go up.
    pub compat: Option<Compat>,
    /// Whether refcount updates may be postponed under the dirty bit; version 3 only.
    pub lazy_refcounts: Option<bool>,
    /// The width of a refcount in bits; no other than it has.
    pub refcount_bits: Option<u32>,
    /// Whether the external data file can be read as a raw image. It can only be turned off.
    pub data_file_raw: Option<bool>,
    /// What is said about the backing file. What the image shows now does not change.
    pub backing: Option<BackingFile>,
}

/// A bitmap that is stored in an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PersistentBitmap {
    /// Unique in the image.
    pub name: String,
    /// Bytes of the disk behind one bit.
    pub granularity: u32,
    /// It was not saved in order: its bits are of no use.
    pub in_use: bool,
    /// It reflects changes of the disk: QEMU starts with it enabled.
    pub auto: bool,
}

/// What is going to be done to something, by all who use it together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Need {
    /// Nothing: other programs may do what they like.
    #[default]
    Nothing,
    /// It is read, and does not change meanwhile.
    Reads,
    /// It is read and written.
    Writes,
}

/// Something is held ready while this exists.
#[must_use]
pub struct Claim(#[allow(dead_code, reason = "dropped")] Vec<Box<dyn Send + Sync>>);

impl Claim {
    /// Held by `guard`.
    pub fn of(guard: impl Send + Sync + 'static) -> Self {
        Claim(vec![Box::new(guard)])
    }

    /// Nothing is held by it.
    pub fn none() -> Self {
        Claim(Vec::new())
    }

    /// Holds what the other does, too.
    pub fn add(&mut self, other: Claim) {
        self.0.extend(other.0);
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Claim").field(&self.0.len()).finish()
    }
}

/// How something that other programs may use too is held ready for its users.
pub trait Claims: Send + Sync {
    /// Makes it ready for this, for as long as the answer exists: locks are taken, what has to be opened for it is. `InUse` when
    /// another program excludes it, and what opening answers. Cancellation: nothing is held.
    fn claim(&self, need: Need) -> BoxFuture<'_, Result<Claim>>;

    /// What it is held ready for.
    fn held(&self) -> Need;

    /// Holds it as it is held now, for as long as the answer exists.
    fn keep(&self) -> Claim;

    /// What its users need from now on. What nobody has claimed and it is more than before may be missing: that is logged.
    fn set_need(&self, need: Need);
}

/// The control side of a node's driver.
pub trait Driver: Requests {
    /// Facts for queries; cheap, never blocks on I/O for long.
    fn info(&self) -> DriverInfo;

    /// Which file of the host it has open, if it has one.
    fn host_file(&self) -> Option<FileIdentity> {
        None
    }

    /// Whether it comes between a disk and its users for a time, and shows the disk that is its `file`.
    fn is_filter(&self) -> bool {
        false
    }

    /// Whether it shows bytes of its `file` as they are: what is done to it is done to that.
    fn is_window(&self) -> bool {
        self.is_filter()
    }

    /// How it is held ready for its users, for what other programs may use too.
    fn claims(&self) -> Option<&dyn Claims> {
        None
    }

    /// The layers below, with the role each has (`file`, `data-file`, `backing`).
    fn children(&self) -> Vec<(&'static str, Child)>;

    /// Writes back all state and marks the image clean. Called once, after the last request has drained.
    fn close(&self) -> BoxFuture<'_, Result<()>>;

    /// Changes what the image says about its format, all of the options at once, durably. After an error nothing has changed.
    ///
    /// `InvalidInput` for what the format does not allow, `Unsupported` for what cannot be done to an open image.
    /// Cancellation: runs to its end.
    fn amend(&self, options: AmendOptions) -> BoxFuture<'_, Result<()>> {
        let _ = options;
        Box::pin(async { Err(unsupported("Amending this format")) })
    }

    /// Whether the node can show another one where it has nothing itself. `Unsupported`, with QEMU's sentence, where it cannot.
    fn check_backing(&self) -> Result<()> {
        Err(Error::new(
            ErrorKind::Unsupported,
            "The overlay does not support backing images",
        ))
    }

    /// Shows `backing` from now on where the node has nothing itself, or zeroes. What the image says about its backing stays. Only
    /// after [`Driver::check_backing`], and while no request is under way; it does no I/O and cannot fail.
    fn set_backing(&self, backing: Option<Child>) {
        let _ = backing;
    }

    /// Prepares to go on in another way: everything that can fail, and with no effect before [`Reopening::commit`].
    ///
    /// Before an image becomes read-only all state is written back and the image is marked clean, so that other programs can read it.
    /// Errors: `InUse` when another program excludes it, `Unsupported`, and what I/O answers. Dropping the future, or what it
    /// answers, leaves the driver as it was.
    fn reopen(&self, options: ReopenOptions) -> BoxFuture<'_, Result<Box<dyn Reopening>>> {
        let _ = options;
        Box::pin(async { Ok(Box::new(NothingToChange) as Box<dyn Reopening>) })
    }

    /// Internal snapshots, for formats that have them.
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        None
    }
}

/// How an open driver is to go on. What concerns nodes only (zero detection, writethrough) is not here.
#[derive(Debug, Clone)]
pub struct ReopenOptions {
    /// Refuse writes, and let other programs know that they need not fear any.
    pub read_only: bool,
    /// Bypass the page cache.
    pub direct: bool,
    /// Ignore flush requests.
    pub no_flush: bool,
    /// What only this driver has; `None` leaves it as it is.
    pub settings: Option<DriverSettings>,
    /// The layer that takes the place of the driver's `file` with the commit; until then the driver's child leads to the old one.
    pub file: Option<NewFile>,
}

/// A layer that takes the place of a driver's `file`.
#[derive(Debug, Clone)]
pub struct NewFile {
    /// The layer.
    pub child: Child,
    /// The file at the bottom of it, as the user named it.
    pub filename: String,
}

/// What only some drivers have, and can have changed while they are open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DriverSettings {
    /// That of a file of the host.
    File {
        /// Open for writing only while somebody writes.
        auto_read_only: bool,
    },
    /// raw's window, in bytes of the file.
    Raw {
        /// Where it begins.
        offset: u64,
        /// How long it is; up to the end without one.
        size: Option<u64>,
    },
    /// qcow2's.
    Qcow2 {
        /// Discards of the guest reach the file.
        pass_discard: bool,
        /// What the deletion of a snapshot frees becomes holes.
        pass_discard_snapshot: bool,
        /// Greatest size of the L2 cache in bytes.
        l2_cache_bytes: u64,
        /// Greatest size of the refcount cache in bytes.
        refcount_cache_bytes: u64,
    },
}

/// A driver that is ready to go on in another way. Dropped, it goes on as before.
pub trait Reopening: Send {
    /// Goes on in the new way. No I/O, and it cannot fail.
    fn commit(self: Box<Self>);
}

/// What a driver answers that is the same with the options.
pub(crate) struct NothingToChange;

impl Reopening for NothingToChange {
    fn commit(self: Box<Self>) {}
}

/// A driver's handle on a layer below it.
///
/// Cheap to clone. The graph decides what it points to; the driver only sends requests.
#[derive(Clone)]
pub struct Child(Arc<dyn Requests>);

impl Child {
    /// A handle on `below`: a node of the graph, or a bare driver in tests.
    pub fn new(below: Arc<dyn Requests>) -> Self {
        Child(below)
    }
}

impl std::ops::Deref for Child {
    type Target = dyn Requests;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl fmt::Debug for Child {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Child")
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}

fn unsupported(what: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("{what} is not supported"))
}
