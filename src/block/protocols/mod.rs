//! Bytes from outside the engine: what a graph ends in.
//!
//! * `file`: files and block devices of the host
//! * `memory`: a disk in memory with faults, holds and a write log, for tests

pub mod file;
pub mod memory;
