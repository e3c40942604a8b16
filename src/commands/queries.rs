//! Queries of drives and nodes.
//!
//! What is shown of a node is asked of the node: the control loop says only which there are. Answers may be long, for a deep chain
//! of which each layer shows all below it, and are put together on a thread where nothing else waits.

use std::sync::Arc;

use block::graph::{Drive, Node};
use qapi::commands::{QueryBlockstats, QueryNamedBlockNodes};
use qapi::handlers;
use qapi::rt::QmpError;
use qapi::types::{BlockDeviceInfo, BlockInfo, BlockStats};

use super::Handlers;
use super::convert::{self, Counted, Depth, Devices, StatsAnswer};
use crate::daemon::Cx;

/// Answers `query-block`: drives only; nodes that nobody calls a device are in query-named-block-nodes.
pub(super) async fn drives(cx: &Cx) -> Result<Vec<BlockInfo>, QmpError> {
    let seen = |drive: &Drive| (drive.id.clone(), drive.io_status(), drive.node());
    let drives: Vec<_> = cx
        .look(move |control| control.graph.drives().iter().map(seen).collect())
        .await?;
    cx.apart(move || {
        let mut devices = Devices::default();
        let info = |(id, io_status, root): (String, Option<_>, Option<Arc<Node>>)| BlockInfo {
            device: id.clone(),
            // What QEMU says of a drive whose bus it does not know.
            r#type: "unknown".to_owned(),
            removable: false,
            locked: false,
            io_status: io_status.map(convert::io_status),
            qdev: Some(id),
            inserted: root.map(|root| devices.device_info(&image_of(root), Depth::WholeChain)),
        };
        drives.into_iter().map(info).collect()
    })
    .await
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
    let nodes = all_nodes(cx).await?;
    cx.apart(move || {
        let mut devices = Devices::default();
        let info = |node: &Arc<Node>| devices.device_info(node, depth);
        nodes.iter().map(info).collect()
    })
    .await
}

/// The newest first.
async fn all_nodes(cx: &Cx) -> Result<Vec<Arc<Node>>, QmpError> {
    cx.look(|control| control.graph.nodes().rev().cloned().collect())
        .await
}

impl handlers::BlockStats<Cx> for Handlers {
    async fn query_blockstats(cx: &Cx, args: QueryBlockstats) -> Result<Vec<BlockStats>, QmpError> {
        let QueryBlockstats { query_nodes } = args;
        if query_nodes == Some(true) {
            let nodes = all_nodes(cx).await?;
            return cx
                .apart(move || {
                    let mut answer = StatsAnswer::new();
                    nodes.iter().map(|node| answer.node(node)).collect()
                })
                .await;
        }
        let drives: Vec<Counted> = cx
            .look(|control| control.graph.drives().iter().map(Counted::new).collect())
            .await?;
        cx.apart(move || {
            let mut answer = StatsAnswer::new();
            drives
                .into_iter()
                .map(|drive| answer.drive(drive))
                .collect()
        })
        .await
    }
}
