//! Jobs and the graph: what a job does to it stands in line with commands.

use std::sync::Arc;

use block::driver::BoxFuture;
use block::graph::{Node, Removed, quiesce_all};
use qapi::rt::QmpError;
use tokio::sync::{mpsc, oneshot};

use super::cx::Cx;
use crate::jobs::{GraphAccess, GraphChange};

/// Something that is done as if it were a command.
pub(super) struct Errand(
    pub(super) Box<dyn FnOnce(Cx) -> BoxFuture<'static, Result<(), QmpError>> + Send>,
);

impl std::fmt::Debug for Errand {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Errand")
    }
}

/// Sends errands to the control loop.
#[derive(Debug, Clone)]
pub(super) struct Errands(pub(super) mpsc::Sender<Errand>);

impl GraphAccess for Errands {
    fn change(&self, nodes: Vec<Arc<Node>>, change: GraphChange) -> BoxFuture<'_, Vec<Removed>> {
        Box::pin(async move {
            let (answer, answered) = oneshot::channel();
            let errand = Errand(Box::new(move |cx| {
                Box::pin(async move {
                    let held = quiesce_all(&nodes).await;
                    // The nodes are held until this has been done, or will never be.
                    let changed = cx.commit(move |control| Ok(change(&mut control.graph, &held)));
                    let _ = answer.send(changed.await?);
                    Ok(())
                })
            }));
            if self.0.send(errand).await.is_err() {
                return Vec::new();
            }
            answered.await.unwrap_or_default()
        })
    }
}
