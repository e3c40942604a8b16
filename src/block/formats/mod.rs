//! Image formats: a guest offset in, a host offset in the layer below out.

pub mod qcow2;
pub mod raw;
