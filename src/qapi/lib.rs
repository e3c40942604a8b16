//! Wire types of the protocol. `rt` is written by hand; everything else is generated from `schema/` by build.rs.
//!
//! Knows nothing of disks, sockets or handlers.

pub mod rt;
