//! x

pub mod monitor;
