//! Queries of drives and nodes.

use std::sync::Arc;

use block::graph::{Graph, Node};
use qapi::commands::QueryNamedBlockNodes;
use qapi::rt::QmpError;
use qapi::types::{BlockDeviceInfo, BlockInfo};

use super::convert::{self, Depth};
use crate::daemon::Cx;

/// Answers `query-block`: drives only; nodes that nobody calls a device are in query-named-block-nodes.
pub(super) async fn drives(cx: &Cx) -> Result<Vec<BlockInfo>, QmpError> {
    cx.commit(|control| Ok(drive_list(&control.graph))).await
}

fn drive_list(graph: &Graph) -> Vec<BlockInfo> {
    let info = |drive: &block::graph::Drive| BlockInfo {
        device: drive.id.clone(),
        // What QEMU says of a drive whose bus it does not know.
        r#type: "unknown".to_owned(),
        removable: false,
        locked: false,
        inserted: drive
            .node()
            .map(|root| convert::device_info(&root, Depth::WholeChain)),
    };
    graph.drives().iter().map(info).collect()
}

/// Answers `query-named-block-nodes`: the newest first, what stands on others before what it stands on.
pub(super) async fn nodes(
    cx: &Cx,
    args: QueryNamedBlockNodes,
) -> Result<Vec<BlockDeviceInfo>, QmpError> {
    let QueryNamedBlockNodes { flat } = args;
    let depth = match flat {
        Some(true) => Depth::Flat,
        _ => Depth::WholeChain,
    };
    cx.commit(move |control| {
        let info = |node: &Arc<Node>| convert::device_info(node, depth);
        Ok(control.graph.nodes().rev().map(info).collect())
    })
    .await
}
