//! Wire types to engine types and back.
//!
//! Wire types are taken apart without `..`: a member that the schema gains does not compile until somebody has
//! decided here what it means.
//!
//! * `node_options`: `BlockdevOptions` in
//! * `device_info`: what queries show, out
//! * `stats`: what drives and nodes have done, out
//! * `backup`: backups in
//! * `job`: jobs and what they tell, out
//! * `address`: socket addresses in

mod address;
mod backup;
mod device_info;
mod job;
mod node_options;
mod stats;

use block::driver::SnapshotInfo;
use block::graph::IoStatus;
use qapi::types;

use crate::exports::RemoveMode;

pub use crate::daemon::lookup::from_engine;
pub(super) use crate::daemon::lookup::{claim, device, device_or_node, node};

pub(super) use address::{address, legacy_address};
pub(super) use backup::{blockdev_backup, drive_backup};
pub(super) use device_info::{Depth, Devices};
pub use job::job_event;
pub(super) use job::{block_job_info, job_info, no_block_job, on_error};
pub(super) use node_options::{node_options, node_ref};
pub(super) use stats::{Answer as StatsAnswer, Counted};

/// How an export is removed.
pub(super) fn remove_mode(mode: Option<types::BlockExportRemoveMode>) -> RemoveMode {
    match mode {
        None | Some(types::BlockExportRemoveMode::Safe) => RemoveMode::Safe,
        Some(types::BlockExportRemoveMode::Hard) => RemoveMode::Hard,
    }
}

/// An internal snapshot, out.
pub(super) fn snapshot(info: SnapshotInfo) -> types::SnapshotInfo {
    const NANOSECONDS: u64 = 1_000_000_000;
    let SnapshotInfo {
        id,
        name,
        vm_state_size,
        date_sec,
        date_nsec,
        vm_clock_nsec,
        icount,
        disk_size: _,
    } = info;
    types::SnapshotInfo {
        id,
        name,
        vm_state_size: signed(vm_state_size),
        date_sec: i64::from(date_sec),
        date_nsec: i64::from(date_nsec),
        vm_clock_sec: signed(vm_clock_nsec / NANOSECONDS),
        vm_clock_nsec: signed(vm_clock_nsec % NANOSECONDS),
        icount: icount.map(signed),
    }
}

/// How the I/O of a drive or job is, out.
pub(super) fn io_status(status: IoStatus) -> types::BlockDeviceIoStatus {
    match status {
        IoStatus::Ok => types::BlockDeviceIoStatus::Ok,
        IoStatus::Failed => types::BlockDeviceIoStatus::Failed,
        IoStatus::NoSpace => types::BlockDeviceIoStatus::Nospace,
    }
}

/// The wire's integers are signed. What does not fit has no better value than the largest.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
