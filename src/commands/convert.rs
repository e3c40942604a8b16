//! Wire types to engine types and back.
//!
//! Wire types are taken apart without `..`: a member that the schema gains does not compile until somebody has
//! decided here what it means.
//!
//! * `node_options`: `BlockdevOptions` in
//! * `device_info`: what queries show, out
//! * `address`: socket addresses in

mod address;
mod device_info;
mod node_options;

use std::sync::Arc;

use block::driver::SnapshotInfo;
use block::error::{Error, ErrorKind};
use block::graph::{Graph, Node};
use qapi::rt::{ErrorClass, QmpError};
use qapi::types;

use crate::exports::RemoveMode;

pub(super) use address::{address, legacy_address};
pub(super) use device_info::{Depth, device_info};
pub(super) use node_options::node_options;

/// An error of the engine as a client sees it.
#[allow(clippy::needless_pass_by_value)]
pub fn from_engine(error: Error) -> QmpError {
    QmpError::generic(error.message())
}

/// What `device` means in the commands of 2013: a drive or a node. If it is neither, the class says so.
pub(super) fn device(graph: &Graph, device: &str) -> Result<Arc<Node>, QmpError> {
    lookup(graph, Some(device), Some(device))
}

/// As [`device`], where the node may be named apart. A name in `device` may be a node's too.
pub(super) fn device_or_node(
    graph: &Graph,
    device: Option<&str>,
    node_name: Option<&str>,
) -> Result<Arc<Node>, QmpError> {
    match lookup(graph, device, node_name) {
        Err(missing) => match device.and_then(|name| graph.node(name)) {
            Some(node) if node_name.is_none() => Ok(node.clone()),
            _ => Err(missing),
        },
        found => found,
    }
}

fn lookup(
    graph: &Graph,
    device: Option<&str>,
    node_name: Option<&str>,
) -> Result<Arc<Node>, QmpError> {
    graph
        .lookup(device, node_name)
        .cloned()
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => QmpError::new(ErrorClass::DeviceNotFound, error.message()),
            _ => from_engine(error),
        })
}

/// What `node-name` means in the commands of today.
pub(super) fn node(graph: &Graph, name: &str) -> Result<Arc<Node>, QmpError> {
    graph.lookup(None, Some(name)).cloned().map_err(from_engine)
}

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

/// The wire's integers are signed. What does not fit has no better value than the largest.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
