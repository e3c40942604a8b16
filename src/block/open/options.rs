//! What a node is made of, as plain data.

use std::sync::Arc;

/// What a node is made of: the engine's form of `--blockdev` and `blockdev-add`.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeOptions {
    /// The node's name; one is made up (`#block123`) when it is missing.
    pub node_name: Option<String>,
    /// Refuse writes.
    pub read_only: bool,
    /// Fall back to read-only when the file cannot be opened for writing.
    pub auto_read_only: bool,
    /// Whether guest discards reach the driver.
    pub discard: DiscardMode,
    /// Whether written zeroes are turned into zero writes.
    pub detect_zeroes: DetectZeroes,
    /// The host's page cache and flushes.
    pub cache: CacheMode,
    /// The driver and its own options.
    pub driver: DriverOptions,
}

impl NodeOptions {
    /// A node with defaults for all but its driver.
    pub fn new(driver: DriverOptions) -> Self {
        NodeOptions {
            node_name: None,
            read_only: false,
            auto_read_only: false,
            discard: DiscardMode::default(),
            detect_zeroes: DetectZeroes::default(),
            cache: CacheMode::default(),
            driver,
        }
    }
}

/// What happens to guest discards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiscardMode {
    /// They are dropped.
    #[default]
    Ignore,
    /// They reach the driver.
    Unmap,
}

/// What happens to written zero bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// They are written.
    #[default]
    Off,
    /// They become zero writes.
    On,
    /// They become zero writes that may free space.
    Unmap,
}

/// How the host caches. `cache=none|writeback|writethrough|directsync|unsafe` are combinations of the three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheMode {
    /// Bypass the page cache (O_DIRECT).
    pub direct: bool,
    /// Ignore flush requests.
    pub no_flush: bool,
    /// Every write is followed by a flush (`writethrough`, `directsync`).
    pub writethrough: bool,
}

/// The driver of a node and what only it takes.
#[derive(Debug, Clone, PartialEq)]
pub enum DriverOptions {
    /// A file or block device of the host.
    File(FileOptions),
    /// A block device of the host, and nothing else.
    HostDevice(FileOptions),
    /// Reads zeroes, swallows writes.
    Null(NullOptions),
    /// The child's bytes as they are, or a window of them.
    Raw(RawOptions),
    /// A qcow2 image.
    Qcow2(Qcow2Options),
    /// Whatever the layer below holds: a qcow2 image if it begins as one, else raw. The formats of its backing files are
    /// found in the same way where headers name none. For users who ask for it, and for nobody else: a guest can
    /// write a header into a raw disk.
    Probed(NodeRef),
}

/// Options of `file`.
#[derive(Debug, Clone, PartialEq)]
pub struct FileOptions {
    /// The path.
    pub filename: String,
    /// How requests that would block are run.
    pub aio: Aio,
    /// Whether the image is locked against other programs.
    pub locking: Locking,
}

/// How requests that would block are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Aio {
    /// By a pool of threads.
    #[default]
    Threads,
    /// By io_uring; by threads where the kernel refuses it.
    IoUring,
}

/// Image locking.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Locking {
    /// With open-file-description locks where the kernel has them.
    #[default]
    Auto,
    /// Insist on locks.
    On,
    /// No locks.
    Off,
}

/// Options of `null-co`.
#[derive(Debug, Clone, PartialEq)]
pub struct NullOptions {
    /// Size in bytes.
    pub size: u64,
    /// Whether reads return zeroes (else the bytes are unspecified, and zeroes here too).
    pub read_zeroes: bool,
    /// Delay of each request in nanoseconds.
    pub latency_ns: u64,
}

impl Default for NullOptions {
    /// QEMU's.
    fn default() -> Self {
        NullOptions {
            size: 1 << 30,
            read_zeroes: false,
            latency_ns: 0,
        }
    }
}

/// Options of `raw`.
#[derive(Debug, Clone, PartialEq)]
pub struct RawOptions {
    /// The layer below.
    pub file: NodeRef,
    /// Start of the window in bytes.
    pub offset: Option<u64>,
    /// Length of the window in bytes.
    pub size: Option<u64>,
}

/// Options of `qcow2`.
#[derive(Debug, Clone, PartialEq)]
pub struct Qcow2Options {
    /// The layer below.
    pub file: NodeRef,
    /// What to read where the image has nothing.
    pub backing: BackingOption,
    /// The file with the guest's data, for images that keep them apart. The name in an image's header is never followed.
    pub data_file: Option<NodeRef>,
    /// Overrides the image's lazy refcounts setting.
    pub lazy_refcounts: Option<bool>,
    /// Whether discards of the guest are passed to the file (default: when the node discards).
    pub pass_discard_request: Option<bool>,
    /// Whether the file gets a hole where the deletion of a snapshot frees clusters (default: when the node discards).
    pub pass_discard_snapshot: Option<bool>,
    /// How much metadata is kept in memory.
    pub cache: Qcow2Cache,
    /// Show this internal snapshot instead of the disk: an id, or a name if no snapshot has that id. The node is read-only. If
    /// `file` is a qcow2 node, its image goes on being used as it is, and nothing else can be asked for here.
    pub snapshot: Option<String>,
}

impl Qcow2Options {
    /// An image in this file with nothing else asked for.
    pub fn new(file: NodeRef) -> Self {
        Qcow2Options {
            file,
            backing: BackingOption::FromImage(UnnamedFormat::Refused),
            data_file: None,
            lazy_refcounts: None,
            pass_discard_request: None,
            pass_discard_snapshot: None,
            cache: Qcow2Cache::default(),
            snapshot: None,
        }
    }
}

/// How much metadata of a qcow2 image is kept in memory, in bytes; what is not given gets a share or a default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Qcow2Cache {
    /// Both caches together.
    pub total: Option<u64>,
    /// L2 tables.
    pub l2: Option<u64>,
    /// Refcount blocks.
    pub refcounts: Option<u64>,
    /// Pieces in which QEMU would read L2 tables. Checked as QEMU does, and without effect.
    pub l2_entry: Option<u64>,
}

/// A node that exists, or one to make.
#[derive(Debug, Clone, PartialEq)]
pub enum NodeRef {
    /// By node name.
    Name(String),
    /// By options, of which nodes keep what they were asked to be.
    Inline(Arc<NodeOptions>),
}

/// Which backing file an image gets.
#[derive(Debug, Clone, PartialEq)]
pub enum BackingOption {
    /// The one that the image's header names, with the format that it names.
    FromImage(UnnamedFormat),
    /// None, whatever the header says.
    Detached,
    /// This one.
    Node(NodeRef),
    /// This one, which others go on writing: what is read through the image is of use only to who knows that.
    Written(NodeRef),
}

/// What happens to a backing file whose format the header that refers to it does not name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnnamedFormat {
    /// It is refused.
    #[default]
    Refused,
    /// It is found by a look at the file, as [`DriverOptions::Probed`].
    Probed,
}
