//! The qcow2 format, versions 2 and 3 (specification: docs/interop/qcow2.rst of QEMU).
//!
//! Split by structure and by operation:
//! * `header`: the header, its extensions and feature bits
//! * `geometry`: arithmetic of clusters and tables
//! * `entry`: entries of the tables and what they mean; `subclusters`: the parts of a cluster
//! * `counters`: refcounts in their blocks, one by one and in runs
//! * `runs`: many clusters read or written at once
//! * `create`: new images
//! * `check`: the checker, and the repair of refcounts
//! * `snapshot`: internal snapshots
//! * `header_cell`: the open image's header, switched by one write
//! * `alloc`: refcount blocks, free clusters, growth, reservations that give themselves back
//! * `bitmaps`: persistent bitmaps that others have stored
//! * `owners`: which host clusters hold metadata; `metadata`: written there and nowhere else
//! * `damage`: what is done about damage that is found
//! * `image`: the open image, its lock order; `l1` and `l2` tables in memory; `map`: a guest range as extents
//! * `open`, `reopen`, `read`, `write`, `scattered`, `cow`, `zero`, `resize`, `compress`, `amend`: the operations; `requests`: the
//!   driver made of them
//! * `data_file`: guest data in another file
//! * `codec`: the bytes of a compressed cluster
//! * `write_back`, `quarantine`: what becomes durable when, and when freed clusters are handed out again
//! * `reopen`, `tuning`: what changes while the image is open
//! * `space`: what a full disk still gives
//! * `gate`, `parallel`: what runs at the same time
//!
//! What keeps users' data, and where it is enforced:
//! * A cluster handed out and not published is given back by itself (`alloc::Reserved`).
//! * Nothing on disk points to what is not durable (`write_back`), and a table in use changes its meaning by one
//!   header write only (`header_cell`).
//! * A freed cluster is handed out again only when nothing old can lead to it (`quarantine`).
//! * Who allocates, discards or zeroes a guest cluster has it alone; an entry is replaced only if it is still what
//!   was read (`image`, `write`).
//! * Guest data never land on metadata, nor metadata on other metadata, whatever the tables say (`owners`, `metadata`).
//! * A change that its caller drops runs to its end: its writes cannot be called back (`requests`).

mod alloc;
mod amend;
mod bitmaps;
pub mod check;
mod codec;
mod compress;
mod counters;
mod cow;
pub mod create;
mod damage;
mod data_file;
mod entry;
mod gate;
mod geometry;
mod header;
mod header_cell;
mod image;
mod l1;
mod l2;
mod map;
mod metadata;
mod open;
mod owners;
mod parallel;
mod quarantine;
mod read;
mod reopen;
mod requests;
mod resize;
mod runs;
mod scattered;
mod share;
mod snapshot;
mod space;
mod subclusters;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod tuning;
mod write;
mod write_back;
mod zero;

use std::sync::Arc;

pub use codec::CompressionType;
pub use header::{MAGIC, NOT_QCOW2, is_marked_dirty, is_same_marked_dirty, names_no_other};
pub use open::{BackingReference, OpenOptions, Opening};

/// An open image: the driver of a node.
#[derive(Debug)]
pub struct Qcow2 {
    image: Arc<image::Image>,
}
