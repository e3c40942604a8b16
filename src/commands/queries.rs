//! Queries of drives and nodes.

use std::sync::Arc;

use block::graph::{Drive, Graph, Node};
use qapi::commands::{QueryBlockstats, QueryNamedBlockNodes};
use qapi::handlers;
use qapi::rt::QmpError;
use qapi::types::{BlockDeviceInfo, BlockInfo, BlockStats};

use super::Handlers;
use super::convert::{self, Depth};
use crate::daemon::Cx;

/// Answers `query-block`: drives only; nodes that nobody calls a device are in query-named-block-nodes.
pub(super) async fn drives(cx: &Cx) -> Result<Vec<BlockInfo>, QmpError> {
    cx.commit(|control| Ok(drive_list(&control.graph))).await
}

fn drive_list(graph: &Graph) -> Vec<BlockInfo> {
    let info = |drive: &Drive| BlockInfo {
        device: drive.id.clone(),
        // What QEMU says of a drive whose bus it does not know.
        r#type: "unknown".to_owned(),
        removable: false,
        locked: false,
        io_status: drive.io_status().map(convert::io_status),
        qdev: Some(drive.id.clone()),
        inserted: drive
            .node()
            .map(|root| convert::device_info(&image_of(root), Depth::WholeChain)),
    };
    graph.drives().iter().map(info).collect()
}

/// The image that a drive shows. Filters that jobs have put above it for a time, and that no client has named, are hidden here,
/// as QEMU hides them.
fn image_of(mut root: Arc<Node>) -> Arc<Node> {
    while !root.is_named()
        && root.driver().is_filter()
        && let Some(below) = root.link("file")
    {
        root = below;
    }
    root
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

impl handlers::BlockStats<Cx> for Handlers {
    async fn query_blockstats(cx: &Cx, args: QueryBlockstats) -> Result<Vec<BlockStats>, QmpError> {
        let QueryBlockstats { query_nodes } = args;
        cx.commit(move |control| {
            let (graph, mut answer) = (&control.graph, convert::StatsAnswer::new());
            Ok(match query_nodes {
                Some(true) => {
                    let nodes = graph.nodes().rev();
                    nodes.map(|node| answer.node(node)).collect()
                }
                _ => {
                    let drives = graph.drives().iter();
                    drives.map(|drive| answer.drive(drive)).collect()
                }
            })
        })
        .await
    }
}
