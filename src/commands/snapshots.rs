//! Internal snapshots, and transactions of them.

use std::sync::Arc;

use block::driver::SnapshotSelector;
use block::graph::{Graph, Link, Node};
use qapi::commands::{
    BlockdevSnapshotDeleteInternalSync, BlockdevSnapshotInternalSync, Transaction as Arguments,
    XBlockdevSnapshotRevert,
};
use qapi::handlers::Transaction;
use qapi::rt::QmpError;
use qapi::types::{
    Abort, AbortWrapper, BlockdevSnapshotInternal, BlockdevSnapshotInternalRef,
    BlockdevSnapshotInternalRefWrapper, BlockdevSnapshotInternalWrapper, SnapshotInfo,
    TransactionAction, TransactionActionBranch, TransactionProperties,
};

use super::{Handlers, convert};
use crate::daemon::{Control, Cx};
use crate::transaction::{self, Action, Disk, Operation, SnapshotAction};

/// Answers `blockdev-snapshot-internal-sync`: a transaction of one action, as are the next two.
pub(super) async fn create(cx: &Cx, args: BlockdevSnapshotInternalSync) -> Result<(), QmpError> {
    let BlockdevSnapshotInternalSync { device, name } = args;
    let data = BlockdevSnapshotInternal { device, name };
    let action =
        TransactionActionBranch::BlockdevSnapshotInternalSync(BlockdevSnapshotInternalWrapper {
            data,
        });
    run_one(cx, action).await.map(|_| ())
}

/// Answers `blockdev-snapshot-delete-internal-sync`.
pub(super) async fn delete(
    cx: &Cx,
    args: BlockdevSnapshotDeleteInternalSync,
) -> Result<SnapshotInfo, QmpError> {
    let BlockdevSnapshotDeleteInternalSync { device, id, name } = args;
    let data = BlockdevSnapshotInternalRef { device, id, name };
    let action = TransactionActionBranch::XBlockdevSnapshotDeleteInternalSync(
        BlockdevSnapshotInternalRefWrapper { data },
    );
    run_one(cx, action).await
}

/// Answers `x-blockdev-snapshot-revert`.
pub(super) async fn revert(
    cx: &Cx,
    args: XBlockdevSnapshotRevert,
) -> Result<SnapshotInfo, QmpError> {
    let XBlockdevSnapshotRevert { device, id, name } = args;
    let data = BlockdevSnapshotInternalRef { device, id, name };
    let action =
        TransactionActionBranch::XBlockdevSnapshotRevert(BlockdevSnapshotInternalRefWrapper {
            data,
        });
    run_one(cx, action).await
}

impl Transaction<Cx> for Handlers {
    async fn transaction(cx: &Cx, args: Arguments) -> Result<(), QmpError> {
        let Arguments {
            actions,
            properties,
        } = args;
        // The one mode there is needs nothing.
        let TransactionProperties { completion_mode: _ } =
            properties.unwrap_or(TransactionProperties {
                completion_mode: None,
            });
        run(cx, actions).await.map(|_| ())
    }
}

/// Runs an action on one snapshot, and answers which it was.
async fn run_one(cx: &Cx, action: TransactionActionBranch) -> Result<SnapshotInfo, QmpError> {
    let about = run(cx, vec![TransactionAction { r#type: action }]).await?;
    let about = about.into_iter().next().flatten();
    about
        .map(convert::snapshot)
        .ok_or_else(crate::daemon::internal_error)
}

/// Looks everything up at once, so that nothing has happened when something is missing, and runs the actions.
async fn run(
    cx: &Cx,
    actions: Vec<TransactionAction>,
) -> Result<Vec<Option<block::driver::SnapshotInfo>>, QmpError> {
    let actions = cx
        .commit(move |control| {
            let actions = actions.into_iter();
            actions
                .map(|action| resolve(control, action))
                .collect::<Result<Vec<_>, _>>()
        })
        .await?;
    transaction::run(actions).await
}

/// Wire to action.
fn resolve(control: &Control, action: TransactionAction) -> Result<Box<dyn Action>, QmpError> {
    let TransactionAction { r#type } = action;
    let (device, operation) = match r#type {
        TransactionActionBranch::Abort(AbortWrapper { data: Abort {} }) => {
            return Ok(Box::new(transaction::Abort));
        }
        TransactionActionBranch::BlockdevSnapshotInternalSync(
            BlockdevSnapshotInternalWrapper {
                data: BlockdevSnapshotInternal { device, name },
            },
        ) => (device, Operation::Create { name }),
        TransactionActionBranch::XBlockdevSnapshotDeleteInternalSync(
            BlockdevSnapshotInternalRefWrapper {
                data: BlockdevSnapshotInternalRef { device, id, name },
            },
        ) => (device, Operation::Delete(SnapshotSelector { id, name })),
        TransactionActionBranch::XBlockdevSnapshotRevert(BlockdevSnapshotInternalRefWrapper {
            data: BlockdevSnapshotInternalRef { device, id, name },
        }) => (device, Operation::Revert(SnapshotSelector { id, name })),
    };
    let disk = disk(&control.graph, device)?;
    Ok(Box::new(SnapshotAction::new(disk, operation)?))
}

/// What `device` means for a snapshot: a drive's root or a node. Nothing stands on it in both cases but what shows its
/// snapshots, which do not change.
fn disk(graph: &Graph, device: String) -> Result<Disk, QmpError> {
    let node = convert::device(graph, &device)?;
    let mut views: Vec<Arc<Node>> = Vec::new();
    for (parent, link) in graph.parents(&node) {
        if link.role != Link::IMAGE {
            return Err(QmpError::generic("Need a root block node"));
        }
        views.push(parent.clone());
    }
    Ok(Disk {
        device,
        node,
        views,
    })
}
