//! The machine whose disks the drives are: whether it runs.

use block::driver::Requests;
use block::graph::RunState as State;
use futures_util::future::join_all;
use qapi::handlers::RunState;
use qapi::rt::QmpError;
use qapi::types::{self, StatusInfo};

use super::Handlers;
use crate::daemon::Cx;

impl RunState<Cx> for Handlers {
    async fn query_status(cx: &Cx) -> Result<StatusInfo, QmpError> {
        let state = cx.look(|control| control.graph.machine().state());
        let status = match state.await? {
            State::Running => types::RunState::Running,
            State::Paused => types::RunState::Paused,
            State::IoError => types::RunState::IoError,
        };
        Ok(StatusInfo {
            running: status == types::RunState::Running,
            status,
        })
    }

    async fn stop(cx: &Cx) -> Result<(), QmpError> {
        let roots = cx
            .commit(|control| {
                if !control.stop_machine() {
                    return Ok(Vec::new());
                }
                let drives = control.graph.drives().iter();
                Ok(drives.filter_map(|drive| drive.node()).collect())
            })
            .await?;
        let settle = roots.iter().map(|root| async {
            // What has entered before the machine stopped has ended behind this.
            drop(root.quiesce().await);
            if let Err(error) = root.flush().await {
                // The guest has not asked for it, and asks again when it goes on.
                log::warn!("stop: {error}");
            }
        });
        join_all(settle).await;
        Ok(())
    }

    async fn cont(cx: &Cx) -> Result<(), QmpError> {
        cx.commit(|control| {
            control.continue_machine();
            Ok(())
        })
        .await
    }
}
