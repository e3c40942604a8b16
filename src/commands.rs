//! The commands: each converts its arguments, calls one thing below, and converts the result back.
//!
//! * [`control`]: sessions, versions, the end
//! * `jobs`: jobs, backup
//! * `graph`: the block graph as a drawing
//! * `nodes`: adding, deleting and resizing nodes
//! * `reopen`: nodes that change while they are in use
//! * `queries`: what there is
//! * `creation`: new images
//! * `machine`: stopping and continuing guests
//! * `snapshots`: internal and external snapshots
//! * `transactions`: several commands as one
//! * [`nbd`]: the NBD server and its exports
//! * `convert`: wire types to engine types and back

pub mod control;
mod convert;
mod creation;
mod graph;
mod jobs;
mod machine;
pub mod nbd;
mod nodes;
mod queries;
mod reopen;
mod snapshots;
mod transactions;

use qapi::handlers::BlockCore;
use qapi::rt::QmpError;
use qapi::rt::dispatch::Entry;
use qapi::types::{BlockDeviceInfo, BlockInfo, BlockdevOptions, SnapshotInfo};

use crate::daemon::Cx;

pub use convert::{from_engine, job_event};

/// All commands, sorted by name.
pub const TABLE: &[Entry<Cx>] = qapi::commands::<Cx, Handlers>();

/// When a command runs, beside those of other clients. A client's own commands wait for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// When it is its turn: one command runs at a time.
    Waits,
    /// At once: it looks, and changes nothing but its own session.
    Looks,
    /// At once, though it changes something: it is what helps where another one hangs.
    Overtakes,
}

/// The commands that do not wait for those of other clients, sorted by name.
///
/// Cancelling is here because what is under way may be waiting for guests' requests that wait for a job, whose target hangs. To handlers
/// it is nothing new: jobs fail between any two of their commits. It does not help clients that a job is paused or given another speed at
/// such a moment, and everything else changes what a handler may have looked up.
const BESIDE: &[(&str, Turn)] = &[
    ("block-job-cancel", Turn::Overtakes),
    ("job-cancel", Turn::Overtakes),
    ("qmp_capabilities", Turn::Looks),
    ("query-block", Turn::Looks),
    ("query-block-exports", Turn::Looks),
    ("query-block-jobs", Turn::Looks),
    ("query-blockstats", Turn::Looks),
    ("query-commands", Turn::Looks),
    ("query-jobs", Turn::Looks),
    ("query-named-block-nodes", Turn::Looks),
    ("query-qmp-schema", Turn::Looks),
    ("query-status", Turn::Looks),
    ("query-version", Turn::Looks),
    ("x-debug-query-block-graph", Turn::Looks),
];

/// When a command runs.
pub fn turn(name: &str) -> Turn {
    let found = BESIDE.binary_search_by_key(&name, |(name, _)| name);
    found.map_or(Turn::Waits, |at| BESIDE[at].1)
}

/// What runs them: a type to hang the handler traits on.
#[derive(Debug)]
pub struct Handlers;

// The schema has these in one file; here they are of three families.
impl BlockCore<Cx> for Handlers {
    async fn query_block(cx: &Cx) -> Result<Vec<BlockInfo>, QmpError> {
        queries::drives(cx).await
    }

    async fn query_named_block_nodes(
        cx: &Cx,
        args: qapi::commands::QueryNamedBlockNodes,
    ) -> Result<Vec<BlockDeviceInfo>, QmpError> {
        queries::nodes(cx, args).await
    }

    async fn blockdev_add(cx: &Cx, args: BlockdevOptions) -> Result<(), QmpError> {
        nodes::add(cx, args).await
    }

    async fn blockdev_del(cx: &Cx, args: qapi::commands::BlockdevDel) -> Result<(), QmpError> {
        nodes::delete(cx, args).await
    }

    async fn block_resize(cx: &Cx, args: qapi::commands::BlockResize) -> Result<(), QmpError> {
        nodes::resize(cx, args).await
    }

    async fn blockdev_snapshot_internal_sync(
        cx: &Cx,
        args: qapi::commands::BlockdevSnapshotInternalSync,
    ) -> Result<(), QmpError> {
        snapshots::create(cx, args).await
    }

    async fn blockdev_snapshot_delete_internal_sync(
        cx: &Cx,
        args: qapi::commands::BlockdevSnapshotDeleteInternalSync,
    ) -> Result<SnapshotInfo, QmpError> {
        snapshots::delete(cx, args).await
    }

    async fn x_blockdev_snapshot_revert(
        cx: &Cx,
        args: qapi::commands::XBlockdevSnapshotRevert,
    ) -> Result<SnapshotInfo, QmpError> {
        snapshots::revert(cx, args).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_beside_other_commands_is_what_looks_and_little_else() {
        assert!(BESIDE.is_sorted_by_key(|(name, _)| name));
        for (name, _) in BESIDE {
            assert!(qapi::COMMAND_NAMES.contains(name), "{name}");
        }
        for name in qapi::COMMAND_NAMES {
            let looks = name.contains("query-") || name == "qmp_capabilities";
            assert_eq!(turn(name) == Turn::Looks, looks, "{name}");
        }
    }
}
