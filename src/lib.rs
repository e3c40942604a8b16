//! x

pub mod exports;
pub mod limits;
pub mod monitor;
