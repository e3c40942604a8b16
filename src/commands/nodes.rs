//! Nodes: `blockdev-add`, `blockdev-del`, `block_resize`.

use std::sync::Arc;

use block::copy::clear_away_left;
use block::driver::{Need, Preallocation, Requests};
use block::graph::{Node, Resizer};
use block::open::{DriverOptions, Locking, Opener, open};
use qapi::commands::{BlockResize, BlockdevDel};
use qapi::rt::QmpError;
use qapi::types::BlockdevOptions;

use super::convert;
use crate::daemon::Cx;
use crate::transaction::flush_ahead;

/// Answers `blockdev-add`.
pub(super) async fn add(cx: &Cx, args: BlockdevOptions) -> Result<(), QmpError> {
    let options = convert::node_options(args)?;
    if options.node_name.is_none() {
        return Err(QmpError::generic(
            "'node-name' must be specified for the root node",
        ));
    }
    let opener = cx
        .commit(|control| Ok(Opener::new(&control.io, &control.graph)))
        .await?;
    let opened = open(&opener, &options)
        .await
        .map_err(convert::from_engine)?;
    // Names were free and layers below there when we looked; only the commit may decide that they still are.
    let inserted = cx.commit(|control| {
        let node = control.graph.insert(opened).map_err(convert::from_engine)?;
        let user = format!("node '{}'", node.name());
        control.covered.warn_of(&user, &node);
        Ok(node)
    });
    let root = inserted.await?;
    if !root.behaviour().read_only && is_locked(&root) {
        // No job of this process has the image yet: whoever took them is gone.
        clear_away_left(root.driver()).await;
    }
    Ok(())
}

/// Whether the files below a node are locked, so that no other process has them.
fn is_locked(node: &Arc<Node>) -> bool {
    let mut layer = Some(node.clone());
    while let Some(node) = layer {
        if let Some(DriverOptions::File(file) | DriverOptions::HostDevice(file)) =
            node.options().as_deref().map(|options| &options.driver)
            && file.locking == Locking::Off
        {
            return false;
        }
        layer = node.link("file");
    }
    true
}

/// Answers `blockdev-del`. The node is gone when its image is flushed and closed.
pub(super) async fn delete(cx: &Cx, args: BlockdevDel) -> Result<(), QmpError> {
    let BlockdevDel { node_name } = args;
    let removed = cx
        .commit(move |control| {
            control
                .graph
                .remove(&node_name)
                .map_err(convert::from_engine)
        })
        .await?;
    removed.close().await.map_err(convert::from_engine)
}

/// Answers `block_resize`.
pub(super) async fn resize(cx: &Cx, args: BlockResize) -> Result<(), QmpError> {
    let BlockResize {
        device,
        node_name,
        size,
    } = args;
    let node = cx
        .commit(move |control| {
            // Clients that know drives only send an empty node name, and the other way round.
            let given = |name: Option<String>| name.filter(|name| !name.is_empty());
            let (device, node_name) = (given(device), given(node_name));
            let graph = &control.graph;
            let node = convert::device_or_node(graph, device.as_deref(), node_name.as_deref())?;
            if size < 0 {
                return Err(QmpError::generic("Parameter 'size' expects a >0 size"));
            }
            let checked = graph.check_resize(&node, Resizer::Command);
            checked.map_err(convert::from_engine)?;
            Ok(node)
        })
        .await?;
    if node.behaviour().read_only {
        return Err(QmpError::generic("Image is read-only"));
    }
    let _claim = convert::claim(cx, &node, Need::Writes)
        .await
        .map_err(convert::from_engine)?;
    // What has metadata flushes them in their order while requests wait.
    if node.driver().snapshots().is_some() {
        flush_ahead(&[&*node]).await;
    }
    node.resize(size.unsigned_abs(), Preallocation::Off)
        .await
        .map_err(convert::from_engine)
}
