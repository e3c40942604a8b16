//! Every bound of the engine, with its reason. Formats keep the bounds of their specification here too.

use std::ops::RangeInclusive;
use std::time::Duration;

/// How many images a chain may have, from the active layer to the base. QEMU has no bound and recurses;
/// 200 is what QEMU's own tests go up to, and each layer costs a file handle and a request per read.
pub const MAX_CHAIN_DEPTH: usize = 200;

/// Requests inside of each other on one stack: a read of a chain asks each image by way of the one above. Threads have
/// 2 MiB, and a debug build's frames are large.
pub const NESTED_REQUESTS: usize = 32;

/// Layers that are opened inside of each other on one stack. In a debug build 2 MiB are enough for 150 of them, and not for 200.
pub const NESTED_LAYERS: usize = 16;

/// The longest node name, as QEMU's (`NodeName` is 32 bytes with its NUL): clients rely on it being refused.
pub const MAX_NODE_NAME: usize = 31;

/// How many nodes a graph may have: a client that adds nodes in a loop must not exhaust file handles.
pub const MAX_NODES: usize = 10_000;

/// Events of nodes that wait for the owner of the graph, who is never busy for long. More at once is a storm, of which
/// clients need not see everything.
pub const MAX_WAITING_EVENTS: usize = 1024;

/// Failed requests of a drive that wait for the owner of the graph. Clients are told of one in a second anyway.
pub const MAX_UNTOLD_ERRORS: usize = 16;

/// What a device holds where an image is made over it is kept in memory, and by transactions in their journal, up to this many bytes: all
/// metadata of the largest image that is made without preallocation, which has an L1 table of 32 MiB.
pub const MAX_OVERWRITTEN: u64 = 64 << 20;

/// Files beside a file whose content is being replaced that killed processes may have left, before replacing it is refused.
pub const MAX_LEFT_BESIDE: u32 = 1000;

/// Links that lead to the place of a new file, one after the other. As many as Linux follows.
pub const MAX_LINKS: usize = 40;

/// The longest read that a node takes, in bytes. A read answers with memory of its own size, so this bounds
/// what a single request can make the process allocate. Callers split what is longer.
pub const MAX_REQUEST: u64 = 64 << 20;

/// How much of its time a limited transfer may use ahead. QEMU's slice: short enough to look even, long enough for large
/// requests.
pub const RATE_SLICE: Duration = Duration::from_millis(100);

/// The largest disk, in bytes: file offsets are signed, and rounding up to any cluster size must not overflow.
pub const MAX_DISK_SIZE: u64 = i64::MAX as u64 & !((64 << 20) - 1);

/// The longest delay of a null disk in nanoseconds: far slower than any disk. Control commands flush, so they wait for it.
pub const MAX_NULL_LATENCY_NS: u64 = 1_000_000_000;

/// How many pieces of memory one system call takes (`UIO_MAXIOV` of Linux).
pub const MAX_IOVECS: usize = 1024;

/// The largest request alignment that is believed: 64 KiB pages with direct I/O need no more.
pub const MAX_ALIGNMENT: u32 = 64 << 10;

/// qcow2: largest L1 table in bytes. QEMU's bound, so that every image opens on both sides.
pub const QCOW2_MAX_L1_BYTES: u64 = 32 << 20;

/// qcow2: largest refcount table in bytes. QEMU's bound.
pub const QCOW2_MAX_REFTABLE_BYTES: u64 = 8 << 20;

/// qcow2: most internal snapshots. QEMU's bound.
pub const QCOW2_MAX_SNAPSHOTS: u32 = 65536;

/// qcow2: largest snapshot table in bytes. QEMU's bound.
pub const QCOW2_MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;

/// qcow2: most bytes of extra data of a snapshot. QEMU's bound.
pub const QCOW2_MAX_SNAPSHOT_EXTRA_BYTES: u32 = 1024;

/// qcow2: most persistent bitmaps. QEMU's bound.
pub const QCOW2_MAX_BITMAPS: u32 = 65535;

/// qcow2: longest name of a persistent bitmap in bytes. QEMU's bound.
pub const QCOW2_MAX_BITMAP_NAME: usize = 1023;

/// qcow2: bytes of the disk behind one bit of a persistent bitmap, as powers of two. QEMU's bounds.
pub const QCOW2_BITMAP_GRANULARITY_BITS: RangeInclusive<u8> = 9..=31;

/// qcow2: most bytes of clusters of a persistent bitmap. QEMU's bound.
pub const QCOW2_MAX_BITMAP_BYTES: u64 = 512 << 20;

/// qcow2: bytes of bitmap tables that an image opened for writing may have: they are read at open. 4096 of the largest
/// bitmaps with clusters of 64 KiB.
pub const QCOW2_MAX_BITMAP_TABLES_BYTES: u64 = 256 << 20;

/// qcow2: largest directory of persistent bitmaps in bytes. QEMU's bound: 65535 entries of 1 KiB.
pub const QCOW2_MAX_BITMAP_DIRECTORY_BYTES: u64 = 65535 * 1024;

/// qcow2: most entries of a persistent bitmap's table. QEMU's bound.
pub const QCOW2_MAX_BITMAP_TABLE_ENTRIES: u32 = 0x800_0000;

/// qcow2: memory for the counters of a check or repair: 32 TiB of used clusters at 64 KiB. Untouched ranges cost nothing.
pub const QCOW2_MAX_CHECK_BYTES: u64 = 1 << 30;

/// qcow2: bytes of L1 tables, bitmap tables and refcount blocks that a check or repair reads: seconds of work. The blocks of
/// 32 TiB at 64 KiB and 16 bits take 1 GiB, read twice; the L1 tables of 65536 snapshots of 1 TiB another.
pub const QCOW2_MAX_CHECK_TABLE_BYTES: u64 = 8 << 30;

/// qcow2: most different L2 tables that a check keeps track of: 8 EiB at 64 KiB clusters, 32 GiB at 512 bytes
/// sixteen times over.
pub const QCOW2_MAX_CHECK_L2_TABLES: usize = 16 << 20;

/// qcow2: bytes of L2 tables that a view of a snapshot keeps in memory: 256 GiB of its disk at 64 KiB clusters. It is read once by
/// a backup, mostly from front to back.
pub const QCOW2_VIEW_CACHE_BYTES: u64 = 32 << 20;

/// qcow2: memory for the refcount blocks of one L2 table that is settled, in bytes. A table has 8192 clusters at 64 KiB, so only
/// one whose clusters lie in 8192 different blocks, of an image of 16 TiB and more, comes near; at 2 MiB none does.
pub const QCOW2_MAX_SETTLE_REFCOUNT_BYTES: u64 = 1 << 30;

/// qcow2: how long closing an image waits until refcounts are up to date behind snapshot operations. Past it the image
/// stays dirty, and the next open repairs it: whoever ends a process does not wait for minutes.
pub const QCOW2_SETTLE_ON_CLOSE: Duration = Duration::from_secs(30);

/// qcow2: the share of time, as one part of so many, that settling takes while a guest is busy.
pub const QCOW2_SETTLE_SHARE: u32 = 10;

/// qcow2: how long a guest counts as busy after its last request: one that waits for its turn on the processor is not idle.
pub const QCOW2_SETTLE_QUIET: Duration = Duration::from_millis(20);

/// qcow2: the longest pause of settling between two pieces of work while a guest is busy: it must come to an end.
pub const QCOW2_SETTLE_PAUSE: Duration = Duration::from_millis(200);

/// qcow2: bytes of L2 tables and refcounts that settling leaves to be written before it writes them itself, so that a guest's
/// flush finds no more than that beside its own.
pub const QCOW2_SETTLE_UNWRITTEN: u64 = 1 << 20;

/// qcow2: how long settling waits after an error before it tries again, at first and at most.
pub const QCOW2_SETTLE_RETRY: (Duration, Duration) =
    (Duration::from_secs(1), Duration::from_secs(60));

/// qcow2: how long a write to a full disk waits for what deleted snapshots give back: a guest's own patience with a disk is
/// 30 s and more.
pub const QCOW2_SETTLE_FOR_SPACE: Duration = Duration::from_secs(10);

/// qcow2: pieces of the file that are punched behind a deleted snapshot in one go, and their bytes: snapshot operations wait for one
/// go. A file system takes 20 us for a small piece, and some ms for 16 MiB, when it has nothing to wait for.
pub const QCOW2_SETTLE_PUNCH: (usize, u64) = (64, 16 << 20);

/// qcow2: how long one go of punching lasts, when the file system does have to wait for its journal, up to the end of a piece.
pub const QCOW2_SETTLE_PUNCH_TIME: Duration = Duration::from_millis(5);

/// qcow2: most metadata clusters that an image opened for writing may have: some 300 MB of map. The largest L1 table has
/// half as many L2 tables.
pub const QCOW2_MAX_METADATA_CLUSTERS: u64 = 8 << 20;

/// qcow2: bytes of snapshots' L1 tables that are read when an image is opened for writing, to keep data off the L2 tables that they
/// lead to: a tenth of a second. 256 snapshots of 16 TiB at 64 KiB; what is beyond is protected by its refcounts alone.
pub const QCOW2_MAX_OPENED_L1_BYTES: u64 = 64 << 20;

/// qcow2: clusters behind the end of the file that data may have been meant for, without ever getting there. A repair counts them as
/// used: 64 GiB at 64 KiB, more than a host keeps in its page cache, for 2 MiB of refcounts of 16 bits.
pub const QCOW2_MAX_LOST_CLUSTERS: u64 = 1 << 20;

/// qcow2: longest backing file name in bytes. The specification's bound.
pub const QCOW2_MAX_BACKING_NAME: u32 = 1023;

/// qcow2: smallest cluster, as a power of two. The specification's bound: 512 bytes.
pub const QCOW2_MIN_CLUSTER_BITS: u32 = 9;

/// qcow2: largest cluster, as a power of two. QEMU's bound: 2 MiB.
pub const QCOW2_MAX_CLUSTER_BITS: u32 = 21;

/// qcow2: largest window of a zstd stream that is decoded, as a power of two: 8 MiB, which RFC 8878 recommends to support.
/// A decoder takes that much memory, and no window of use is larger than a cluster.
pub const QCOW2_ZSTD_WINDOW_BITS: u32 = 23;

/// qcow2: smallest cluster with extended L2 entries, as a power of two. The specification's bound: a subcluster is a sector
/// or more.
pub const QCOW2_MIN_EXTENDED_CLUSTER_BITS: u32 = 14;

/// qcow2: bytes of L2 tables kept in memory unless configured: 1 TiB of guest disk at 64 KiB clusters. Taken as
/// tables are used, so small disks pay little.
pub const QCOW2_L2_CACHE_BYTES: u64 = 128 << 20;

/// qcow2: bytes of refcount blocks kept in memory unless configured: 1 TiB of image at 64 KiB clusters and 16 bits.
pub const QCOW2_REFCOUNT_CACHE_BYTES: u64 = 32 << 20;

/// qcow2: end of what table entries can address (bits 9 to 55).
pub const QCOW2_MAX_HOST_OFFSET: u64 = 1 << 56;

/// Threads of the pool for blocking calls, as many as QEMU's: more only queue up in the kernel.
pub const MAX_POOL_THREADS: usize = 64;

/// How many of them make something durable at once, so that requests of guests find a thread while a transaction flushes all disks.
/// More flushes of one file system wait for each other in the kernel.
pub const MAX_POOL_FLUSHES: usize = MAX_POOL_THREADS / 2;

/// Files that were removed and whose space is still to be given back, each with a handle: those of some transactions over a thousand disks.
/// Who removes more waits.
pub const MAX_REMAINS: u32 = 4096;

/// Sizes in bytes of the buffers that are kept for later reads: smaller ones the allocator keeps by itself, larger ones are rare.
pub const MIN_SPARE_BUFFER: usize = 128 << 10;

/// See [`MIN_SPARE_BUFFER`].
pub const MAX_SPARE_BUFFER: usize = COPY_CHUNK as usize;

/// How much memory is kept for later reads, in bytes: what the workers of a copy have at once where nothing is slow, twice.
pub const MAX_SPARE_BYTES: usize = 8 << 20;

/// The longest write that is run on the thread that asks for it: copying it takes about ten microseconds, as long as the
/// hand-off to another thread would.
pub const MAX_INLINE_WRITE: u64 = 64 << 10;

/// A write on the thread that asked for it that takes longer has waited for the disk, or its thread for a processor:
/// the copy alone takes a fiftieth.
pub const SLOW_INLINE_WRITE: Duration = Duration::from_micros(500);

/// The longest write that is run on the thread that asks for it, where that copies disks: a request of a copy.
pub const MAX_INLINE_COPY: u64 = COPY_CHUNK;

/// The same for a thread that copies disks: ten times what copying [`MAX_INLINE_COPY`] takes, in turn with another thread that does it
/// to the same file. Nobody waits for a single request there.
pub const SLOW_INLINE_COPY: Duration = Duration::from_millis(5);

/// After a slow write the file's next ones go to the engine for so many times what it took: threads that serve guests
/// are held up for a thirtieth of the time at most, however long the disk is overloaded.
pub const INLINE_PAUSE_FACTOR: u32 = 32;

/// The longest such pause: a disk that hung for minutes once need not be slow for the rest of the day.
pub const MAX_INLINE_PAUSE: Duration = Duration::from_secs(60);

/// For how long after a pause it is found out why a write is slow. It costs a system call per write, so not for ever.
pub const INLINE_WATCH: Duration = Duration::from_secs(1);

/// Operations that a ring has in the kernel at once; what is beyond waits in its queue. Bounds the memory of
/// completions, and is far above what a disk needs to be busy.
pub const MAX_RING_IN_FLIGHT: usize = 1024;

/// Copies: bytes of old content that guests' requests may leave in memory for the target before they wait. A cluster of 64 KiB per
/// request makes this a thousand requests that find the target slow.
pub const COPY_GUEST_BYTES: u64 = 64 << 20;

/// Copies: bytes in memory of the copying that goes on by itself. With the guests' share it makes 128 MiB, QEMU's bound.
pub const COPY_BACKGROUND_BYTES: u64 = 64 << 20;

/// Copies: smallest cluster, and that of targets that have none. QEMU's.
pub const COPY_CLUSTER: u64 = 64 << 10;

/// Copies: largest cluster that can be asked for: one must fit into the guests' share of the memory.
pub const COPY_MAX_CLUSTER: u64 = 32 << 20;

/// Copies: bytes per request.
pub const COPY_CHUNK: u64 = 1 << 20;

/// Copies: bytes per request while requests take no longer than copying their bytes in memory does. What is read is still in the cache
/// of one processor when it is written: 2 GiB in 0.41 s of processor time, 0.5 with [`COPY_CHUNK`].
pub const COPY_QUICK_CHUNK: u64 = 256 << 10;

/// Copies: pieces of a scattered disk that a worker takes on at once while nothing is slow: workers that ask for each piece wait for
/// each other. Fewer where they have [`COPY_QUICK_CHUNK`] bytes of data.
pub const COPY_QUICK_PIECES: usize = 16;

/// Copies: bytes of a scattered disk, holes included, that are read at once as long as there is no more than [`COPY_CHUNK`] of data in
/// them: what a request costs besides its bytes is as much as 64 KiB cost. If there is more after all, a guest's write may wait for
/// so many bytes to be read, once for each worker.
pub const COPY_SCATTERED: u64 = 8 << 20;

/// Copies: data that a target without clusters takes space for at once. Larger pieces are hardly quicker (2 GiB in 0.18 s instead of
/// 0.23; with 16 MiB 0.18 as well), and more would be taken in vain.
pub const COPY_ROOM: u64 = 1 << 20;

/// Copies: bytes of data without zeroes among them after which a target takes space: at most an eighth of it is in vain.
pub const COPY_ROOM_AFTER: u64 = 8 * COPY_ROOM;

/// Space that is taken at once for a file that a copy makes grow, beyond what is written: see [`COPY_ROOM`].
pub const GROWTH_ROOM: u64 = 4 << 20;

/// Copies: requests at once. QEMU's default.
pub const COPY_WORKERS: u32 = 64;

/// Copies: bytes of the source that are asked for at once whether they are allocated or zero.
pub const COPY_STATUS_BYTES: u64 = 1 << 30;

/// Copies: how long a request that failed waits before it is tried again, if errors are ignored.
pub const COPY_RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Copies: how long a guest waits for memory while the target fails, before it is told. Who owns the copy mostly ends it by then.
pub const COPY_TARGET_PATIENCE: Duration = Duration::from_millis(200);

/// Copies: bytes that the target is given before it is told to make them durable, beside the copying.
pub const COPY_FLUSH_BYTES: u64 = 128 << 20;
