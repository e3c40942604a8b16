//! Bytes from outside the engine: what a graph ends in.
//!
//! * `file`: files and block devices of the host
//! * `null`: zeroes out, nothing kept
//! * `memory`: a disk in memory with faults, holds and a write log, for tests

pub mod file;
pub mod memory;
pub mod null;
