//! Bytes from outside the engine: what a graph ends in.
//!
//! * `memory`: a disk in memory with faults, holds and a write log, for tests

pub mod memory;
