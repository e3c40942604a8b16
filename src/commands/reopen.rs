//! Nodes and images that change while they are in use: `blockdev-reopen`, `change-backing-file`.

use std::sync::Arc;

use block::driver::{AmendOptions, BackingFile};
use block::graph::{Graph, Node, NodeChange};
use block::io::FileIdentity;
use block::open::{backing_path, changes};
use qapi::commands::{BlockdevReopen, ChangeBackingFile};
use qapi::rt::{ErrorClass, QmpError};
use tokio::time::timeout;

use super::convert;
use crate::daemon::{Control, Cx};
use crate::limits;

/// Answers `blockdev-reopen`.
pub(super) async fn reopen(cx: &Cx, args: BlockdevReopen) -> Result<(), QmpError> {
    let BlockdevReopen { options } = args;
    let options = options.into_iter().map(convert::node_options);
    let options = options.collect::<Result<Vec<_>, _>>()?;
    let plan = move |control: &mut Control| {
        changes(&control.graph, &options).map_err(convert::from_engine)
    };
    change(cx, plan).await
}

/// Changes nodes as `plan` says. Guests go on, but for the moment in which nodes change places.
async fn change(
    cx: &Cx,
    plan: impl FnOnce(&mut Control) -> Result<Vec<NodeChange>, QmpError> + Send + 'static,
) -> Result<(), QmpError> {
    let (reopen, nodes) = cx
        .commit(|control| {
            let changes = plan(control)?;
            let nodes: Vec<Arc<Node>> = changes.iter().map(|change| change.node.clone()).collect();
            let reopen = control
                .graph
                .reopen(changes)
                .map_err(convert::from_engine)?;
            Ok((reopen, nodes))
        })
        .await?;
    let ready = timeout(limits::REOPEN_PREPARE, reopen.prepare()).await;
    let Ok(ready) = ready else {
        return Err(QmpError::generic(
            "Requests under way did not end in time; nothing has changed",
        ));
    };
    let ready = ready.map_err(convert::from_engine)?;
    let removed = cx
        .commit(move |control| {
            let removed = control.graph.reopened(ready);
            for node in nodes.iter().filter(|_| removed.is_ok()) {
                let user = format!("node '{}'", node.name());
                control.covered.warn_of(&user, node);
            }
            removed.map_err(convert::from_engine)
        })
        .await?;
    if let Err(error) = removed.close().await {
        // They are out of use: what they were asked to write was flushed before.
        log::warn!("a layer that was replaced did not close in order: {error}");
    }
    Ok(())
}

/// Answers `change-backing-file`.
pub(super) async fn change_backing_file(cx: &Cx, args: ChangeBackingFile) -> Result<(), QmpError> {
    let ChangeBackingFile {
        device,
        image_node_name,
        backing_file,
    } = args;
    let find = move |control: &mut Control| {
        let chain = image_of_chain(&control.graph, &device, &image_node_name)?;
        Ok((chain, control.io.clone()))
    };
    let ((image, above), io) = cx.commit(find).await?;
    if let Some(path) = backing_path(&image.filename(), &backing_file).to_str()
        && let Ok(file) = FileIdentity::at(&io, path).await
    {
        check_no_loop(&image, &above, &backing_file, file)?;
    }
    let backing = image.link("backing");
    let backing = BackingFile {
        format: backing
            .filter(|_| !backing_file.is_empty())
            .map(|node| format_of(&node).to_owned()),
        name: Some(backing_file.clone()).filter(|name| !name.is_empty()),
    };
    let was_read_only = image.behaviour().read_only;
    if was_read_only {
        set_read_only(cx, &image, false).await?;
    }
    let options = AmendOptions {
        backing: Some(backing),
        ..AmendOptions::default()
    };
    let amended = image.driver().amend(options).await.map_err(|error| {
        QmpError::generic(format!(
            "Could not change backing file to '{backing_file}': {error}"
        ))
    });
    if was_read_only {
        let back = set_read_only(cx, &image, true).await;
        return amended.and(back);
    }
    amended
}

async fn set_read_only(cx: &Cx, node: &Arc<Node>, read_only: bool) -> Result<(), QmpError> {
    let change_node = NodeChange::read_only(node, read_only);
    change(cx, move |_| Ok(vec![change_node])).await
}

/// Refuses the file of the image itself, and of what stands on it: none of these could be opened again.
fn check_no_loop(
    image: &Arc<Node>,
    above: &[Arc<Node>],
    name: &str,
    file: FileIdentity,
) -> Result<(), QmpError> {
    let is_in = |node: &&Arc<Node>| {
        let below = std::iter::successors(node.link("file"), |node| node.link("file"));
        below.last().and_then(|file| file.driver().host_file()) == Some(file)
    };
    match above.iter().chain([image]).find(is_in) {
        None => Ok(()),
        Some(own) => Err(QmpError::generic(format!(
            "Could not change backing file to '{name}': node '{}' would be its own backing file",
            own.name()
        ))),
    }
}

/// The image of this name in the chain of a device, and what stands on it there.
fn image_of_chain(
    graph: &Graph,
    device: &str,
    name: &str,
) -> Result<(Arc<Node>, Vec<Arc<Node>>), QmpError> {
    let root = convert::device(graph, device)?;
    if graph.parents(&root).next().is_some() {
        return Err(QmpError::generic("Need a root block node"));
    }
    let Some(image) = graph.node(name).cloned() else {
        return Err(QmpError::new(
            ErrorClass::DeviceNotFound,
            format!("Cannot find device='' nor node-name='{name}'"),
        ));
    };
    if image.link("backing").is_none() {
        return Err(QmpError::generic(
            "not allowing backing file change on an image without a backing file",
        ));
    }
    let chain = std::iter::successors(Some(root), |node| match node.driver().is_filter() {
        true => node.link("file"),
        false => node.link("backing"),
    });
    let chain: Vec<Arc<Node>> = chain.collect();
    match chain.iter().position(|node| Arc::ptr_eq(node, &image)) {
        Some(place) => Ok((image, chain.into_iter().take(place).collect())),
        None => Err(QmpError::generic(format!(
            "'{device}' and image file are not in the same chain"
        ))),
    }
}

/// The format that an image's header names for this backing.
fn format_of(backing: &Node) -> &'static str {
    match backing.driver().info().driver {
        "qcow2" => "qcow2",
        // Whatever has no structure of its own.
        _ => "raw",
    }
}
