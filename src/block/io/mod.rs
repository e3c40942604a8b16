//! Buffers and engines for bytes: the only module with `unsafe`.
//!
//! * `data`: request payloads as segments of shared bytes and known zeroes

mod data;

pub use data::{Data, Segment};
