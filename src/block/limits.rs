//! Every bound of the engine, with its reason. Formats keep the bounds of their specification here too.

/// How many images a chain may have, from the active layer to the base. QEMU has no bound and recurses;
/// 200 is what QEMU's own tests go up to, and each layer costs a file handle and a request per read.
pub const MAX_CHAIN_DEPTH: usize = 200;

/// The longest node name, as QEMU's (`NodeName` is 32 bytes with its NUL): clients rely on it being refused.
pub const MAX_NODE_NAME: usize = 31;

/// How many nodes a graph may have: a client that adds nodes in a loop must not exhaust file handles.
pub const MAX_NODES: usize = 10_000;

/// The longest request that a node takes, in bytes. One read answers with memory of its own size, so this
/// bounds what a single request can make the process allocate. Callers split what is longer.
pub const MAX_REQUEST: u64 = 64 << 20;

/// The largest disk, in bytes: file offsets are signed, and rounding up to any cluster size must not overflow.
pub const MAX_DISK_SIZE: u64 = i64::MAX as u64 & !((64 << 20) - 1);

/// How many pieces of memory one system call takes (`UIO_MAXIOV` of Linux).
pub const MAX_IOVECS: usize = 1024;

/// The largest request alignment that is believed: 64 KiB pages with direct I/O need no more.
pub const MAX_ALIGNMENT: u32 = 64 << 10;
