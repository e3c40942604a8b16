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

// The parts land ahead of the operations that use them.
#![allow(dead_code)]

pub mod check;
mod counters;
pub mod create;
mod entry;
mod geometry;
mod header;
mod runs;
mod snapshot;
#[cfg(test)]
mod testing;
