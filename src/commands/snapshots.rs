//! Internal snapshots, and transactions of them.

use std::sync::Arc;
use std::time::Instant;

use block::driver::{Requests as _, SnapshotSelector};
use block::graph::{Graph, Node};
use futures_util::future::join_all;
use qapi::commands::{
    BlockdevSnapshotDeleteInternalSync, BlockdevSnapshotInternalSync, Transaction as Arguments,
};
use qapi::handlers::Transaction;
use qapi::rt::QmpError;
use qapi::types::{
    Abort, AbortWrapper, BlockdevSnapshotInternal, BlockdevSnapshotInternalWrapper, SnapshotInfo,
    TransactionAction, TransactionActionBranch, TransactionProperties,
};

use super::{Handlers, convert};
use crate::daemon::{Control, Cx};
use crate::limits;
use crate::transaction::{self, Action, SnapshotInternal};

/// Answers `blockdev-snapshot-internal-sync`: a transaction of one action.
pub(super) async fn create(cx: &Cx, args: BlockdevSnapshotInternalSync) -> Result<(), QmpError> {
    let BlockdevSnapshotInternalSync { device, name } = args;
    let action = BlockdevSnapshotInternal { device, name };
    run(cx, vec![snapshot_action(action)]).await
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
        run(cx, actions).await
    }
}

fn snapshot_action(data: BlockdevSnapshotInternal) -> TransactionAction {
    TransactionAction {
        r#type: TransactionActionBranch::BlockdevSnapshotInternalSync(
            BlockdevSnapshotInternalWrapper { data },
        ),
    }
}

/// Looks everything up at once, holds back the guests of all nodes that are involved, and runs the actions.
async fn run(cx: &Cx, actions: Vec<TransactionAction>) -> Result<(), QmpError> {
    let (actions, nodes) = cx
        .commit(move |control| {
            let mut nodes: Vec<Arc<Node>> = Vec::new();
            let actions: Result<Vec<_>, QmpError> = actions
                .into_iter()
                .map(|action| resolve(control, action, &mut nodes))
                .collect();
            Ok((actions?, nodes))
        })
        .await?;
    flush_ahead(&nodes).await;
    // All snapshots show the same moment: nothing is written between the first and the last.
    let mut quiesced = Vec::new();
    for node in &nodes {
        quiesced.push(node.quiesce().await);
    }
    let result = transaction::run(actions).await;
    drop(quiesced);
    result
}

/// Makes durable what has been written, while guests go on, until a flush ends soon: the flushes of a snapshot, for which
/// guests wait, have little left to do then.
async fn flush_ahead(nodes: &[Arc<Node>]) {
    for _ in 0..limits::SNAPSHOT_FLUSHES_AHEAD {
        let start = Instant::now();
        let flushes = nodes.iter().map(|node| node.flush());
        // An error is the snapshot's to report: it flushes again.
        let failed = join_all(flushes).await.iter().any(Result::is_err);
        if failed || start.elapsed() < limits::SNAPSHOT_SHORT_FLUSH {
            return;
        }
    }
}

/// Wire to action. Notes the node that must be held back, once however often it occurs.
fn resolve(
    control: &mut Control,
    action: TransactionAction,
    nodes: &mut Vec<Arc<Node>>,
) -> Result<Box<dyn Action>, QmpError> {
    let TransactionAction { r#type } = action;
    match r#type {
        TransactionActionBranch::Abort(AbortWrapper { data: Abort {} }) => {
            Ok(Box::new(transaction::Abort))
        }
        TransactionActionBranch::BlockdevSnapshotInternalSync(
            BlockdevSnapshotInternalWrapper {
                data: BlockdevSnapshotInternal { device, name },
            },
        ) => {
            let node = root(&control.graph, &device)?;
            if !nodes.iter().any(|known| Arc::ptr_eq(known, &node)) {
                nodes.push(node.clone());
            }
            Ok(Box::new(SnapshotInternal::new(device, name, node)))
        }
    }
}

/// What `device` means for a snapshot: a drive's root or a node, and in both cases nothing stands on it.
fn root(graph: &Graph, device: &str) -> Result<Arc<Node>, QmpError> {
    let node = convert::device(graph, device)?;
    if graph.parents(&node).next().is_some() {
        return Err(QmpError::generic("Need a root block node"));
    }
    Ok(node)
}

/// Answers `blockdev-snapshot-delete-internal-sync`.
pub(super) async fn delete(
    cx: &Cx,
    args: BlockdevSnapshotDeleteInternalSync,
) -> Result<SnapshotInfo, QmpError> {
    let BlockdevSnapshotDeleteInternalSync { device, id, name } = args;
    let device_name = device.clone();
    let node = cx
        .commit(move |control| root(&control.graph, &device_name))
        .await?;
    if id.is_none() && name.is_none() {
        return Err(QmpError::generic("Name or id must be provided"));
    }
    let Some(snapshots) = node.driver().snapshots() else {
        return Err(QmpError::generic(
            "Failed to get a snapshot list: Operation not supported",
        ));
    };
    let matches = |info: &block::driver::SnapshotInfo| {
        id.as_ref().is_none_or(|id| *id == info.id)
            && name.as_ref().is_none_or(|name| *name == info.name)
    };
    if !snapshots.list().iter().any(matches) {
        let text = |part: &Option<String>| part.clone().unwrap_or_else(|| "null".to_owned());
        return Err(QmpError::generic(format!(
            "Snapshot with id '{}' and name '{}' does not exist on device '{device}'",
            text(&id),
            text(&name)
        )));
    }
    if node.behaviour().read_only {
        return Err(QmpError::generic(
            "Failed to remove snapshot from snapshot list: Operation not permitted",
        ));
    }
    flush_ahead(std::slice::from_ref(&node)).await;
    let deleted = snapshots.delete(SnapshotSelector { id, name }).await;
    deleted.map(convert::snapshot).map_err(convert::from_engine)
}
