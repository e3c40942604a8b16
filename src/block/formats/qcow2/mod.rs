//! The qcow2 format, versions 2 and 3 (specification: docs/interop/qcow2.rst of QEMU).
//!
//! Split by structure and by operation:
//! * `header`: the header, its extensions and feature bits
//! * `geometry`: arithmetic of clusters and tables
//! * `entry`: entries of the tables and what they mean
//! * `counters`: refcounts in their blocks, one by one and in runs
//! * `runs`: many clusters read or written at once
//! * `create`: new images
//! * `check`: the checker, and the repair of refcounts
//! * `snapshot`: internal snapshots
//! * `header_cell`: the open image's header, switched by one write
//! * `alloc`: refcount blocks, free clusters, growth, reservations that give themselves back
//! * `owners`: which host clusters hold metadata
//! * `gate`, `range_lock`, `run_to_end`: who may do what at the same time, and what a dropped request does

// The parts land ahead of the operations that use them.
#![allow(dead_code)]

mod alloc;
pub mod check;
mod counters;
pub mod create;
mod entry;
mod gate;
mod geometry;
mod header;
mod header_cell;
mod owners;
mod range_lock;
mod run_to_end;
mod runs;
mod snapshot;
#[cfg(test)]
mod testing;
