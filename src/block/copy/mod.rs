//! Copying a disk at a point in time while guests go on writing: the engine under backup.
//!
//! ```text
//!        guest                                    Copier::run
//!          |                                          |
//!   filters::copy_before_write ── BeforeChange ──> Shared: map of clusters, memory bounds <── workers
//!          |                                       |          |
//!        source  <────────── reads ────────────────┘          └──── writes ──> target
//! ```
//!
//! **Point in time.** The moment of [`Copier::activate`], which is called while the source's guests stand still and the filter is put
//! above it. What the target holds at the end is what the source held then.
//!
//! **A guest's write** (zeroes, discard) waits until the old content of each cluster that it touches has been *read*, by whoever does
//! it: at most one read per cluster. The old content then waits in memory for the target, up to [`COPY_GUEST_BYTES`], so a slow target
//! does not slow the guest down. With [`SyncMode::None`] somebody may read the target during the copy and find in the source
//! what the target does not have yet; there a guest waits until the target has it.
//!
//! **When half of that memory is full** the engine takes a temporary internal snapshot of the source, if that can take one
//! ([`PointInTime`]), reads from there what is still missing, and lets guests pass. What is pending then has not changed since the point in
//! time, so the snapshot shows it as it was. Otherwise guests wait for the target.
//!
//! Measured with `benches/slow_target.rs` (4 KiB random writes, 16 at once, two busy processors): beside a target that takes 100 ms
//! for a request, the slowest hundredth of guests' writes takes 104 ms where they wait for the target, 4.8 ms with their old content in
//! memory, and 0.4 ms with a snapshot; beside one that takes 20 MB/s, 57 ms, 54 ms and 0.7 ms. A snapshot costs the source space for
//! what guests write meanwhile, and scatters it for good, so it is taken only when memory is not enough. That is what
//! [`PointInTime::Auto`] does.
//!
//! **As fast as the page cache takes it.** Writes to one file come one after another in the kernel, so the best that can be done is that
//! a thread always writes: each worker reads a piece that fits into its processor's cache into memory that was used before, and writes it
//! at once, on the same thread, while another reads ([`CopyHooks::seat`], [`COPY_QUICK_CHUNK`]). On ext4 most of a write to a new file is
//! not its copying but the books that are kept for each block; where space was taken before they are shorter
//! ([`WriteFlags::ahead`], [`COPY_ROOM`]). The shortest of several runs of a bare loop, 2 GiB of a file in the page cache to a new one:
//!
//! | | without | with space taken |
//! |---|---|---|
//! | writing alone, 256 KiB at once | 0.20 s | 0.16 s (1 MiB of space at once: 0.17 s) |
//! | reading and writing, two threads | 0.22 s | 0.15 to 0.18 s |
//! | writing what is mapped, populated by another thread | 0.28 s | 0.22 to 0.34 s |
//! | `copy_file_range` | 0.32 s | |
//! | past the page cache | 0.35 s | 0.41 s |
//!
//! **Scattered data** are read with the holes between them where those stay holes, so many at once as make a request of data, and given to
//! the target together ([`Requests::write_pieces`]), which a format may write side by side: what a piece costs besides its bytes is as
//! much as 64 KiB cost. See `learnt` for what a copy finds out on its way.
//!
//! **In a moment where files can share.** In a file system with reflinks (XFS, btrfs) the target shares the source's blocks, raw or
//! qcow2, as long as it takes them; see `in_place`. What is shared is not searched for zeroes, and takes no space in any case.
//! `copy_file_range`, which would copy elsewhere, is not used.
//!
//! **Errors.** Those of the copying itself go to [`CopyHooks::on_error`]. A guest's request meets an error only where the old
//! content can be neither read nor kept, and only with [`OnCbwError::BreakGuestWrite`]. The source is never changed by a copy.
//!
//! * `map`: which clusters are pending, being read, or taken
//! * `shared`: the state between guests and workers; `before`: the guests' side of it
//! * `copier`: the workers; `crew`: how many; `plan`: what they do next; `put`: content on its way into the target
//! * `learnt`: what the two ends turn out to be like
//! * `in_place`: blocks that the target shares; `relief`: the temporary snapshot
//!
//! [`COPY_GUEST_BYTES`]: crate::limits::COPY_GUEST_BYTES
//! [`COPY_QUICK_CHUNK`]: crate::limits::COPY_QUICK_CHUNK
//! [`COPY_ROOM`]: crate::limits::COPY_ROOM
//! [`Requests::write_pieces`]: crate::driver::Requests::write_pieces
//! [`WriteFlags::ahead`]: crate::driver::WriteFlags::ahead

mod before;
mod copier;
mod crew;
mod in_place;
mod learnt;
mod map;
mod plan;
mod put;
mod relief;
mod shared;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::driver::{BoxFuture, Requests, SnapshotSource};
use crate::error::Error;
use crate::io::Seat;
use crate::limits::{COPY_GUEST_BYTES, COPY_WORKERS};

pub use before::BeforeChange;
pub use copier::Copier;
pub use relief::{TEMPORARY_SNAPSHOT, clear_away_left};

/// What is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SyncMode {
    /// Everything that the disk shows.
    #[default]
    Full,
    /// What the top layer has allocated. The target has the layers below by itself.
    Top,
    /// Nothing but what guests are about to change. It ends only by being cancelled. What the target has and, where it has nothing, what
    /// the source holds is the disk at the point in time, whenever no guest's request is under way.
    None,
}

/// How the content at the point in time is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PointInTime {
    /// Copy before write, until guests would have to wait for the target; then an internal snapshot if the source can take one.
    #[default]
    Auto,
    /// Copy before write alone.
    CopyBeforeWrite,
    /// An internal snapshot from the start. An error where the source cannot take one.
    InternalSnapshot,
}

/// What happens when old content can be neither copied nor kept before a guest changes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnCbwError {
    /// The guest's request fails; the copy stays whole. QEMU's default.
    #[default]
    BreakGuestWrite,
    /// The copy fails; the guest goes on.
    BreakSnapshot,
}

/// What the target holds where nothing has been copied yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TargetContent {
    /// Zeroes, all over: it is new and has no backing. Zeroes are not written.
    Zero,
    /// Anything.
    #[default]
    Unknown,
}

/// How a copy is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyOptions {
    /// What is copied.
    pub sync: SyncMode,
    /// The cluster size of the target, if it has clusters.
    pub target_cluster: Option<u64>,
    /// A lower bound of the copy's cluster size: a power of two, or 0.
    pub min_cluster_size: u64,
    /// What the target holds now.
    pub target_content: TargetContent,
    /// Write compressed clusters. The target must have clusters and be able to (`Requests::write_compressed`).
    pub compress: bool,
    /// Requests at once, at least 1.
    pub max_workers: u32,
    /// Most bytes per request; 0 for the default.
    pub max_chunk: u64,
    /// Bytes of old content that guests may leave in memory for the target; a cluster at least.
    pub guest_memory: u64,
    /// How the point in time is kept.
    pub point_in_time: PointInTime,
    /// Whether guests or the copy suffer.
    pub on_cbw_error: OnCbwError,
    /// Have the target share the source's bytes where their file system can do that.
    pub share: bool,
    /// Goes into the temporary snapshot's name: the job's id.
    pub label: String,
}

impl Default for CopyOptions {
    fn default() -> Self {
        CopyOptions {
            sync: SyncMode::default(),
            target_cluster: None,
            min_cluster_size: 0,
            target_content: TargetContent::default(),
            compress: false,
            max_workers: COPY_WORKERS,
            max_chunk: 0,
            guest_memory: COPY_GUEST_BYTES,
            point_in_time: PointInTime::default(),
            on_cbw_error: OnCbwError::default(),
            share: true,
            label: String::new(),
        }
    }
}

/// What is copied from. Requests go to it past the filter.
#[derive(Clone)]
pub struct Source {
    /// The disk below the filter.
    pub disk: Arc<dyn Requests>,
    /// The same disk's snapshots.
    pub snapshots: Arc<dyn SnapshotSource>,
}

/// Which end of a copy an error is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// It could not be read.
    Source,
    /// It could not be written.
    Target,
}

/// What to do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnCopyError {
    /// Try again now.
    Retry,
    /// Go on with the rest and try again later.
    Ignore,
    /// The copy fails with this error.
    Fail,
}

/// How far a copy is, in bytes of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Dealt with so far; never goes down.
    pub done: u64,
    /// All there is to do. Goes down when parts turn out to need no copy.
    pub total: u64,
}

/// What a running copy asks its owner. Called from several tasks at once.
pub trait CopyHooks: Send + Sync {
    /// Answers when the copy may go on with another `bytes` bytes: a pause point, and the speed limit. No guest waits for it
    /// meanwhile. From the answer on the caller is at work. Cancellation: safe.
    fn admit(&self, bytes: u64) -> BoxFuture<'_, ()>;

    /// The caller of an `admit` that has answered is at work no longer: what it did is written, given up for later, or waits for
    /// a decision or for guests. With all callers at rest the copy stands still, but for what guests leave it. Must not block.
    fn finished(&self) {}

    /// Where one more worker is to run, until the seat is dropped; in the caller's own runtime without one. Must not block.
    fn seat(&self) -> Option<Seat> {
        None
    }

    /// Says how far the copy is. Must not block.
    fn progress(&self, progress: Progress);

    /// What to do about an error; it may wait for as long as the copy is to stand still. Nobody who waits for it is at work.
    /// Cancellation: safe.
    fn on_error(&self, side: Side, error: &Error) -> BoxFuture<'_, OnCopyError>;
}
