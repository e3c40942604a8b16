//! Transactions: wire to actions.

use block::driver::SnapshotSelector;
use qapi::commands::Transaction as Arguments;
use qapi::handlers::Transaction;
use qapi::rt::QmpError;
use qapi::types::{
    Abort, AbortWrapper, BlockdevSnapshotInternal, BlockdevSnapshotInternalRef,
    BlockdevSnapshotInternalRefWrapper, BlockdevSnapshotInternalWrapper, TransactionAction,
    TransactionActionBranch, TransactionProperties,
};

use super::Handlers;
use crate::daemon::Cx;
use crate::transaction::{self, Action, Effect, Operation, SnapshotAction};

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
        let actions = actions.into_iter().map(action).collect();
        transaction::run(cx, actions).await.map(|_| ())
    }
}

/// Runs a command that is an action too: a transaction of it alone.
pub(super) async fn run_one(cx: &Cx, wire: TransactionActionBranch) -> Result<Effect, QmpError> {
    let action = action(TransactionAction { r#type: wire });
    let effects = transaction::run(cx, vec![action]).await?;
    Ok(effects.into_iter().next().unwrap_or_default())
}

/// Wire to action.
fn action(wire: TransactionAction) -> Box<dyn Action> {
    let TransactionAction { r#type } = wire;
    let (device, operation) = match r#type {
        TransactionActionBranch::Abort(AbortWrapper { data: Abort {} }) => {
            return Box::new(transaction::Abort);
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
