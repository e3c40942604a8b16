//! Buffers and engines for bytes: the only module with `unsafe`.
//!
//! * [`Data`]: request payloads as segments of shared bytes and known zeroes
//! * [`HostRange`]: bytes of a file that its file system may share with another
//! * [`IoContext`]: the threads and rings that run blocking system calls, and [`HostFile`], a file on them
//! * [`IoThreads`]: threads with a scheduler each, which may be held up by what they write
//! * [`Names`]: names in folders, made, changed, removed and made durable
//! * [`Remains`]: what is left of a file that was removed
//! * [`Witness`]: somebody who sees all of that, for tests of crashes and faults
//! * [`Gate`]: in-flight accounting that can be closed and drained
//! * [`RunToEnd`]: requests that go on when nobody waits for them any more
//! * [`RangeLock`]: mutual exclusion by byte range
//!
//! ```text
//!   HostFile ── what the page cache serves without waiting: RWF_NOWAIT on the calling task
//!      ├─ short write where the kernel cannot tell whether it waits: on the calling task too,
//!      │  while it is quick and the thread has been allowed to (`inline`)
//!      └─ what would block ── Operation ──> Ring thread (io_uring) or Pool (threads)
//! ```
//! An operation owns its file and its memory until the kernel is done with both, whoever still waits for it.
#![allow(unsafe_code)]

mod buffer;
mod context;
mod data;
mod gate;
mod host_file;
mod host_range;
mod identity;
mod inline;
mod moment;
mod names;
mod operation;
mod pool;
mod range_lock;
mod remains;
mod ring;
mod run_to_end;
mod spares;
mod sys;
mod threads;
mod witness;

pub use context::IoContext;
pub use data::{Data, Segment};
pub use gate::{Closed, Entered, Gate};
pub(crate) use host_file::{Extent, FileKind, cannot_share, is_unsupported};
pub use host_file::{HostFile, OpenMode};
pub use host_range::HostRange;
pub use identity::FileIdentity;
pub use inline::{InlineThread, allow_inline_writes};
pub(crate) use moment::BriefMutex;
pub use names::Names;
pub use range_lock::{Access, RangeGuard, RangeLock};
pub use remains::Remains;
pub use run_to_end::RunToEnd;
pub(crate) use sys::LockKind;
pub use threads::{IoThreads, Seat};
pub use witness::{Deed, Handle, Verdict, Witness};
