//! What clients mean by `device` and `node-name`, with the errors that they know.

use std::sync::Arc;

use block::driver::{Claim, Need};
use block::error::{Error, ErrorKind, Result as EngineResult};
use block::graph::{self, Graph, Node};
use block::open::Opener;
use qapi::rt::{ErrorClass, QmpError};

use super::Cx;

/// An error of the engine as a client sees it.
#[allow(clippy::needless_pass_by_value)]
pub fn from_engine(error: Error) -> QmpError {
    QmpError::generic(error.message())
}

/// Has the files below a node held ready. Where a node here is in the way, the error says which.
pub(crate) async fn claim(cx: &Cx, node: &Arc<Node>, need: Need) -> EngineResult<Claim> {
    let claimed = graph::claim(node, need).await;
    let Err(error) = claimed else {
        return claimed;
    };
    let opener = cx.commit(|control| Ok(Opener::new(&control.io, &control.graph)));
    match opener.await {
        Ok(opener) => Err(opener.with_owner_of(error, node)),
        Err(_) => Err(error),
    }
}

/// What `device` means in the commands of 2013: a drive or a node. If it is neither, the class says so.
pub(crate) fn device(graph: &Graph, device: &str) -> Result<Arc<Node>, QmpError> {
    lookup(graph, Some(device), Some(device))
}

/// As [`device`], where the node may be named apart. A name in `device` may be a node's too.
pub(crate) fn device_or_node(
    graph: &Graph,
    device: Option<&str>,
    node_name: Option<&str>,
) -> Result<Arc<Node>, QmpError> {
    match lookup(graph, device, node_name) {
        Err(missing) => match device.and_then(|name| graph.node(name)) {
            Some(node) if node_name.is_none() => Ok(node.clone()),
            _ => Err(missing),
        },
        found => found,
    }
}

fn lookup(
    graph: &Graph,
    device: Option<&str>,
    node_name: Option<&str>,
) -> Result<Arc<Node>, QmpError> {
    graph
        .lookup(device, node_name)
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => QmpError::new(ErrorClass::DeviceNotFound, error.message()),
            _ => from_engine(error),
        })
}

/// What `node-name` means in the commands of today.
pub(crate) fn node(graph: &Graph, name: &str) -> Result<Arc<Node>, QmpError> {
    graph.lookup(None, Some(name)).map_err(from_engine)
}
