//! What the fuzz targets do with their bytes. Panics are the findings, so this crate panics where it finds something.
//!
//! * [`image`]: a damaged image and operations on it
//! * [`qmp`]: a QMP client
//! * [`nbd`]: an NBD client
//! * [`mutate`]: other inputs made of given ones, for runs without a fuzzer

#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod image;
mod input;
pub mod mutate;
pub mod nbd;
mod peer;
pub mod qmp;
