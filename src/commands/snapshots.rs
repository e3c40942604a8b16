//! Internal snapshots.

use qapi::commands::{
    BlockdevSnapshotDeleteInternalSync, BlockdevSnapshotInternalSync, XBlockdevSnapshotRevert,
};
use qapi::rt::QmpError;
use qapi::types::{
    BlockdevSnapshotInternal, BlockdevSnapshotInternalRef, BlockdevSnapshotInternalRefWrapper,
    BlockdevSnapshotInternalWrapper, SnapshotInfo, TransactionActionBranch,
};

use super::{convert, transactions};
use crate::daemon::Cx;

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

/// Runs an action on one snapshot, and answers which it was.
async fn run_one(cx: &Cx, action: TransactionActionBranch) -> Result<SnapshotInfo, QmpError> {
    let effect = transactions::run_one(cx, action).await?;
    let about = effect.snapshot.map(convert::snapshot);
    about.ok_or_else(crate::daemon::internal_error)
}
