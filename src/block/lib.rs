//! The block engine: disk images as a graph of nodes. Usable alone; knows no QMP.
//!
//! In reading order:
//! * [`error`]: the one error type
//! * [`driver`]: the contracts of a node's driver, and `Child`, its handle on the layer below
//! * [`events`]: what happens by itself, on its way up
//! * [`open`]: options to nodes
//! * [`graph`]: nodes, drives, and who uses whom
//! * [`copy`]: a disk copied at a point in time while it is written; [`filters`]: between users and a disk
//! * [`formats`]: image formats between the guest's disk and the bytes below
//! * [`protocols`]: bytes from outside: files, and a disk in memory for tests
//! * [`io`]: payloads and the engines that move bytes; the only place with `unsafe`
//! * [`rate`]: how fast something may be
//! * [`units`], [`limits`]: offsets as types, and every bound with its reason

pub mod copy;
#[cfg(any(test, feature = "crashlab"))]
pub mod crashlab;
pub mod driver;
pub mod error;
pub mod events;
pub mod filters;
pub mod formats;
pub mod graph;
pub mod io;
pub mod limits;
pub mod open;
pub mod protocols;
pub mod rate;
pub mod units;
