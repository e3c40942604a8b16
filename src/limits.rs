//! Every limit of the daemon, with the reason for its value. Those of the engine are in `block::limits`.

use std::time::Duration;

// The control loop.

/// Commits that wait for the loop. A handler has one at a time, and one handler runs; those of commands that run beside it wait apart,
/// and their senders for room.
pub const COMMITS: usize = 4;

/// Long answers that are put together at once, each on a thread of its own: guests need the processors, too. One that hangs, as when
/// the kernel is asked about a file of a server that is gone, leaves places for others.
pub const LONG_ANSWERS: usize = 4;

/// Jobs that stand in line with commands; others wait to.
pub const ERRANDS: usize = 16;

/// Exports at once, those that shut down included. As many as nodes: a client that adds them in a loop must not take all
/// memory.
pub const EXPORTS: usize = block::limits::MAX_NODES;

// Jobs.

/// Jobs at once, those included that wait to be dismissed. As many as nodes: each copies some.
pub const JOBS: usize = block::limits::MAX_NODES;

/// The pause before a request is tried again whose error is ignored: a disk that is gone for good must neither take a
/// processor nor flood clients with events.
pub const JOB_RETRY_PAUSE: Duration = Duration::from_millis(100);

/// How long jobs may take to end when the daemon does, before it ends without them.
pub const JOB_STOP_GRACE: Duration = Duration::from_secs(10);

// The NBD server.

/// Payload of one request. The protocol's default, which clients rely on without asking, and what QEMU offers.
pub const NBD_MAX_PAYLOAD: u32 = 32 << 20;

/// Requests under way per connection. Clients keep 16 to 64 in flight; more would only wait in another queue.
pub const NBD_MAX_IN_FLIGHT: usize = 128;

/// Payload under way per connection, replies that wait for the socket included: one of the largest requests, or many
/// usual ones.
pub const NBD_MAX_IN_FLIGHT_BYTES: u64 = NBD_MAX_PAYLOAD as u64;

/// Replies that are collected before they are sent. Larger batches save no calls worth having and delay the first reply.
pub const NBD_OUTPUT_BATCH_BYTES: u64 = 256 << 10;

/// As before, in pieces (headers, payload segments): bounds the queue of a client that does not read its replies.
pub const NBD_OUTPUT_BATCH_PIECES: usize = 64;

/// What a connection reads at once: some 15 writes of 4 KiB. A payload of more than half of it gets its own memory.
pub const NBD_READ_BUFFER: usize = 64 << 10;

/// Rounds of parsing, sending and reading before a busy connection lets others run on its thread.
pub const NBD_STEPS_PER_POLL: usize = 16;

/// Descriptors in a reply to NBD_CMD_BLOCK_STATUS, and looks at the node for one: 32 KiB of reply, and milliseconds of
/// work where each look needs metadata from disk. Clients ask again for the rest.
pub const NBD_MAX_EXTENTS: usize = 4096;

/// The shortest zero run that is sent as a hole instead of as bytes.
pub const NBD_MIN_HOLE: u64 = 4096;

/// Data of an option that is decoded: the longest sensible one, with room for some metadata queries.
pub const NBD_MAX_OPTION: usize = 64 << 10;

/// Data of an option that is read and thrown away, to answer with an error. Behind it the connection is closed.
pub const NBD_MAX_DRAINED_OPTION: usize = 1 << 20;

/// What a handshake reads at once: a few options.
pub const NBD_HANDSHAKE_READ: usize = 4096;

/// How long a client may take to choose an export; QEMU's default of `handshake-max-seconds`.
pub const NBD_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections in their handshake. Further ones push out the oldest, so that idle strangers lock nobody out.
pub const NBD_MAX_HALF_OPEN: usize = 64;

/// Connections of one server; QEMU's default of `max-connections`.
pub const NBD_MAX_CONNECTIONS: usize = 100;

/// How long the client of an export that is removed may take to receive the replies that it is owed.
pub const NBD_CLOSE_GRACE: Duration = Duration::from_secs(1);

/// The pause after a connection could not be accepted.
pub const NBD_ACCEPT_PAUSE: Duration = Duration::from_millis(100);

// The QMP server.

/// QMP clients at once, over all sockets. A management stack has a handful.
pub const QMP_CLIENTS: usize = 128;

/// Bytes of one message before the negotiation of capabilities: `qmp_capabilities`, many times over.
pub const QMP_STRANGER_BYTES: usize = 16 << 10;

/// Memory that a message may take without asking: any common command, and as many of them as wait in a session's queue.
pub const QMP_MESSAGE_BYTES: usize = 64 << 10;

/// Memory that the larger messages of all clients take together: one of the largest that QEMU takes (64 MiB of text, or
/// 2 Mi tokens), which no real command comes near. Where it is used up, larger messages are refused.
pub const QMP_LARGE_MESSAGES_BYTES: usize = 320 << 20;

/// Bytes of one read of a QMP socket: several commands, and small beside what else a session has.
pub const QMP_READ_BYTES: usize = 16 << 10;

/// Descriptors that may come with one piece of a QMP stream. A command takes one; QEMU's number.
pub const QMP_FDS: usize = 16;

/// In-band commands that wait in one session's queue while out-of-band ones may overtake. QEMU's
/// number: clients keep at most this many in flight so that an out-of-band command is seen.
pub const QMP_QUEUE: usize = 8;

/// Unread output above which a session takes no further commands. Above any common reply, so
/// that a client which reads its replies never waits for it.
pub const QMP_OUTBOX_REPLY_BYTES: usize = 1 << 20;

/// Unread output above which events are dropped: some thousand events, so that a client which is
/// stopped for a while misses none.
pub const QMP_OUTBOX_EVENT_BYTES: usize = 1 << 20;

/// Small messages are put together up to this size for one write.
pub const QMP_WRITE_BYTES: usize = 64 << 10;

/// A client that takes no byte for so long, with output waiting, is taken for dead.
pub const QMP_WRITE_STALL: Duration = Duration::from_secs(60);

/// What running commands get to end in when the daemon stops.
pub const QMP_STOP_GRACE: Duration = Duration::from_secs(10);

/// What a client gets to take its last replies in when its session ends.
pub const QMP_FLUSH_GRACE: Duration = Duration::from_secs(2);

/// The time between two events of a rate-limited kind (as QEMU).
pub const QMP_EVENT_WINDOW: Duration = Duration::from_secs(1);

/// Rate windows open at once: their keys come from event data. Above it events pass unlimited,
/// and the outboxes bound them.
pub const QMP_EVENT_WINDOWS: usize = 1024;

/// The pause after a client could not be accepted, for instance for want of file descriptors.
pub const QMP_ACCEPT_PAUSE: Duration = Duration::from_millis(100);

// Snapshots and transactions.

/// How long drivers may take to get ready to go on otherwise: an image settles for half of it before it is read-only, and a device
/// that hangs must not hold a command forever.
pub const REOPEN_PREPARE: Duration = Duration::from_secs(60);

/// Flushes before a snapshot, or a new size, holds guests back. Each makes durable what was written during the one before, so the third
/// finds little even where guests write as fast as the disk.
pub const FLUSHES_AHEAD: usize = 3;

/// A flush that ends sooner than this leaves nothing worth another one: guests may wait for what is left.
pub const SHORT_FLUSH: Duration = Duration::from_millis(20);

/// Actions of a transaction that are prepared at the same time. Each makes and opens files, and waits for its disk most of the time; half
/// of the threads for that are left to guests.
pub const TRANSACTION_PREPARING: usize = 32;

/// How long a transaction waits for the requests under way on its disks, all others being held back meanwhile. A disk under load
/// answers within a second or two; guests begin to reset disks that do not answer at 30 s.
pub const TRANSACTION_DRAIN: Duration = Duration::from_secs(10);

/// Guests that waited longer for a transaction are worth a warning.
pub const TRANSACTION_LONG_HOLD: Duration = Duration::from_millis(50);

/// How long a disk, or the journal, may take for one step of a transaction while guests are held. Steps write little; a disk that
/// needs longer hangs, and those of others go on without it.
pub const TRANSACTION_STEP: Duration = Duration::from_secs(10);

// Statistics.

/// Entries in an answer of query-blockstats for what is below the drives and nodes that are asked for: twice as many as there can be
/// nodes. Chains that several drives stand on are shown for each.
pub const STATS_ENTRIES: usize = 2 * block::limits::MAX_NODES;

/// How long it may take to write to a disk what its guests have written to an overlay that is taken back, while they wait. They had some
/// milliseconds for that, and as long as a step takes where a disk hangs.
pub const TRANSACTION_WRITE_DOWN: Duration = Duration::from_secs(60);

/// How long behind its commit a transaction may still be switching headers, as far as a start behind a crash believes. An image that
/// was written to later is taken for changed by somebody else. Switches take milliseconds; the rest is for disks that are slow to
/// take the commit.
pub const JOURNAL_SWITCH: Duration = Duration::from_secs(3);
