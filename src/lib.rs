//! qblockd: a storage daemon that speaks QMP.
//!
//! In reading order:
//! * [`config`]: the command line as plain data
//! * [`limits`]: every limit of the process, with its reason
//! * [`monitor`]: QMP on sockets
//! * [`exports`]: ways out of the graph

pub mod config;
pub mod exports;
pub mod limits;
pub mod monitor;
