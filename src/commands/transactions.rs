//! Transactions: wire to actions.

use block::driver::SnapshotSelector;
use qapi::commands::Transaction as Arguments;
use qapi::handlers::Transaction;
use qapi::rt::QmpError;
use qapi::types::{
    Abort, AbortWrapper, ActionCompletionMode, BlockdevBackupWrapper, BlockdevSnapshot,
    BlockdevSnapshotInternal, BlockdevSnapshotInternalRef, BlockdevSnapshotInternalRefWrapper,
    BlockdevSnapshotInternalWrapper, BlockdevSnapshotSync, BlockdevSnapshotSyncWrapper,
    BlockdevSnapshotWrapper, DriveBackupWrapper, NewImageMode, TransactionAction,
    TransactionActionBranch, TransactionActionKind, TransactionActionPreview,
    TransactionProperties, TransactionResult,
};

use super::{Handlers, convert};
use crate::daemon::Cx;
use crate::transaction::{
    self, Action, BackupAction, Completion, Effect, ExternalSnapshot, Operation, Overlay,
    OverlayFile, Preview, SnapshotAction,
};

impl Transaction<Cx> for Handlers {
    async fn transaction(cx: &Cx, args: Arguments) -> Result<TransactionResult, QmpError> {
        let Arguments {
            actions,
            properties,
            x_dry_run,
        } = args;
        let completion = completion(&actions, properties)?;
        let kinds: Vec<_> = actions.iter().map(kind).collect();
        let actions = actions.into_iter().map(action).collect();
        if x_dry_run != Some(true) {
            transaction::run(cx, actions, completion).await?;
            return Ok(TransactionResult { x_actions: None });
        }
        let previews = transaction::dry_run(cx, actions, completion).await?;
        let previews = kinds.into_iter().zip(previews);
        Ok(TransactionResult {
            x_actions: Some(previews.map(|(kind, shown)| preview(kind, shown)).collect()),
        })
    }
}

/// How jobs are to end; refused for actions that begin none, with QEMU's sentence.
fn completion(
    actions: &[TransactionAction],
    properties: Option<TransactionProperties>,
) -> Result<Completion, QmpError> {
    let mode = properties.and_then(|properties| {
        let TransactionProperties { completion_mode } = properties;
        completion_mode
    });
    match mode {
        None | Some(ActionCompletionMode::Individual) => Ok(Completion::Individual),
        Some(ActionCompletionMode::Grouped) => {
            match actions.iter().map(kind).find(|kind| !begins_job(*kind)) {
                None => Ok(Completion::Grouped),
                Some(kind) => Err(QmpError::generic(format!(
                    "Action '{}' does not support transaction property completion-mode = grouped",
                    kind.as_str()
                ))),
            }
        }
    }
}

fn begins_job(kind: TransactionActionKind) -> bool {
    match kind {
        TransactionActionKind::BlockdevBackup | TransactionActionKind::DriveBackup => true,
        TransactionActionKind::Abort
        | TransactionActionKind::BlockdevSnapshot
        | TransactionActionKind::BlockdevSnapshotSync
        | TransactionActionKind::BlockdevSnapshotInternalSync
        | TransactionActionKind::XBlockdevSnapshotDeleteInternalSync
        | TransactionActionKind::XBlockdevSnapshotRevert => false,
    }
}

fn kind(action: &TransactionAction) -> TransactionActionKind {
    match &action.r#type {
        TransactionActionBranch::Abort(_) => TransactionActionKind::Abort,
        TransactionActionBranch::BlockdevBackup(_) => TransactionActionKind::BlockdevBackup,
        TransactionActionBranch::DriveBackup(_) => TransactionActionKind::DriveBackup,
        TransactionActionBranch::BlockdevSnapshot(_) => TransactionActionKind::BlockdevSnapshot,
        TransactionActionBranch::BlockdevSnapshotSync(_) => {
            TransactionActionKind::BlockdevSnapshotSync
        }
        TransactionActionBranch::BlockdevSnapshotInternalSync(_) => {
            TransactionActionKind::BlockdevSnapshotInternalSync
        }
        TransactionActionBranch::XBlockdevSnapshotDeleteInternalSync(_) => {
            TransactionActionKind::XBlockdevSnapshotDeleteInternalSync
        }
        TransactionActionBranch::XBlockdevSnapshotRevert(_) => {
            TransactionActionKind::XBlockdevSnapshotRevert
        }
    }
}

/// What an action would do, out.
fn preview(action: TransactionActionKind, preview: Preview) -> TransactionActionPreview {
    let Preview { effect, error } = preview;
    let Effect {
        snapshot,
        filename,
        node_name,
        job_id,
    } = effect;
    TransactionActionPreview {
        action,
        error: error.map(|error| error.desc),
        snapshot: snapshot.map(convert::snapshot),
        filename,
        node_name,
        job_id,
    }
}

/// Runs a command that is an action too: a transaction of it alone.
pub(super) async fn run_one(cx: &Cx, wire: TransactionActionBranch) -> Result<Effect, QmpError> {
    let action = action(TransactionAction { r#type: wire });
    let effects = transaction::run(cx, vec![action], Completion::Individual).await?;
    Ok(effects.into_iter().next().unwrap_or_default())
}

/// Wire to action.
fn action(wire: TransactionAction) -> Box<dyn Action> {
    let TransactionAction { r#type } = wire;
    let (device, operation) = match r#type {
        TransactionActionBranch::Abort(AbortWrapper { data: Abort {} }) => {
            return Box::new(transaction::Abort);
        }
        TransactionActionBranch::BlockdevBackup(BlockdevBackupWrapper { data }) => {
            return Box::new(BackupAction::new(convert::blockdev_backup(data)));
        }
        TransactionActionBranch::DriveBackup(DriveBackupWrapper { data }) => {
            return Box::new(BackupAction::new(convert::drive_backup(data)));
        }
        TransactionActionBranch::BlockdevSnapshot(BlockdevSnapshotWrapper { data }) => {
            return Box::new(overlay_node(data));
        }
        TransactionActionBranch::BlockdevSnapshotSync(BlockdevSnapshotSyncWrapper { data }) => {
            return Box::new(overlay_file(data));
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
    Box::new(SnapshotAction::new(device, operation))
}

fn overlay_node(data: BlockdevSnapshot) -> ExternalSnapshot {
    let BlockdevSnapshot { node, overlay } = data;
    ExternalSnapshot::new(Some(node.clone()), Some(node), Overlay::Node(overlay))
}

fn overlay_file(data: BlockdevSnapshotSync) -> ExternalSnapshot {
    let BlockdevSnapshotSync {
        device,
        node_name,
        snapshot_file,
        snapshot_node_name,
        format,
        mode,
    } = data;
    let overlay = Overlay::File(OverlayFile {
        filename: snapshot_file,
        node_name: snapshot_node_name,
        format: format.unwrap_or_else(|| "qcow2".to_owned()),
        is_there: mode == Some(NewImageMode::Existing),
    });
    ExternalSnapshot::new(device, node_name, overlay)
}
