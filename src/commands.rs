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
