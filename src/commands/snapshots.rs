//! Snapshots, internal and external.

use qapi::commands::{
    self, BlockdevSnapshotDeleteInternalSync, BlockdevSnapshotInternalSync, XBlockdevSnapshotRevert,
};
use qapi::handlers::BlockSnapshot;
use qapi::rt::QmpError;
use qapi::types::{
    BlockdevSnapshot, BlockdevSnapshotInternal, BlockdevSnapshotInternalRef,
    BlockdevSnapshotInternalRefWrapper, BlockdevSnapshotInternalWrapper, BlockdevSnapshotSync,
    BlockdevSnapshotSyncWrapper, BlockdevSnapshotWrapper, SnapshotInfo, TransactionActionBranch,
};

use super::{Handlers, convert, transactions};
use crate::daemon::Cx;

impl BlockSnapshot<Cx> for Handlers {
    async fn blockdev_snapshot_sync(
        cx: &Cx,
        args: commands::BlockdevSnapshotSync,
    ) -> Result<(), QmpError> {
        let commands::BlockdevSnapshotSync {
            device,
            node_name,
            snapshot_file,
            snapshot_node_name,
            format,
            mode,
        } = args;
        let data = BlockdevSnapshotSync {
            device,
            node_name,
            snapshot_file,
            snapshot_node_name,
            format,
            mode,
        };
        let wrapper = BlockdevSnapshotSyncWrapper { data };
        let action = TransactionActionBranch::BlockdevSnapshotSync(wrapper);
        transactions::run_one(cx, action).await.map(|_| ())
    }

    async fn blockdev_snapshot(cx: &Cx, args: commands::BlockdevSnapshot) -> Result<(), QmpError> {
        let commands::BlockdevSnapshot { node, overlay } = args;
        let data = BlockdevSnapshot { node, overlay };
        let wrapper = BlockdevSnapshotWrapper { data };
        let action = TransactionActionBranch::BlockdevSnapshot(wrapper);
        transactions::run_one(cx, action).await.map(|_| ())
    }
}

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
