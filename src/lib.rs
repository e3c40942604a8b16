//! qblockd: a storage daemon that speaks QMP.
//!
//! In reading order, each using only what comes below it:
//! * [`config`]: the command line as plain data
//! * [`offline`]: `qblockd check`, `qblockd amend`
//! * [`daemon`]: the owner of the control state, from start to stop
//! * [`monitor`]: QMP on sockets
//! * [`commands`]: one file per family of commands
//! * `transaction`: several actions as one
//! * [`journal`]: what a crash in a transaction is recovered by
//! * [`exports`]: ways out of the graph
//! * [`jobs`]: work that goes on behind the command which began it
//! * [`listen`]: listening sockets
//! * [`limits`]: every limit of the process, with its reason

pub mod commands;
pub mod config;
pub mod daemon;
pub mod exports;
pub mod jobs;
pub mod journal;
pub mod limits;
pub mod listen;
pub mod monitor;
pub mod offline;
mod transaction;
