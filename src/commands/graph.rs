//! The block graph as a drawing, and the changes of it that have commands.

use block::graph::{Arrow, Diagram, Permissions, Vertex, VertexKind};
use qapi::handlers::BlockGraph;
use qapi::rt::QmpError;
use qapi::types::{
    BlockPermission, XDbgBlockGraph, XDbgBlockGraphEdge, XDbgBlockGraphNode, XDbgBlockGraphNodeType,
};

use super::{Handlers, reopen};
use crate::daemon::Cx;

impl BlockGraph<Cx> for Handlers {
    async fn x_debug_query_block_graph(cx: &Cx) -> Result<XDbgBlockGraph, QmpError> {
        let diagram = cx.look(|control| control.graph.diagram()).await?;
        let Diagram { vertices, arrows } = diagram;
        Ok(XDbgBlockGraph {
            nodes: vertices.into_iter().map(point).collect(),
            edges: arrows.into_iter().map(line).collect(),
        })
    }

    async fn blockdev_reopen(
        cx: &Cx,
        args: qapi::commands::BlockdevReopen,
    ) -> Result<(), QmpError> {
        reopen::reopen(cx, args).await
    }

    async fn change_backing_file(
        cx: &Cx,
        args: qapi::commands::ChangeBackingFile,
    ) -> Result<(), QmpError> {
        reopen::change_backing_file(cx, args).await
    }
}

fn point(vertex: Vertex) -> XDbgBlockGraphNode {
    let Vertex { kind, name, number } = vertex;
    XDbgBlockGraphNode {
        id: number,
        r#type: match kind {
            VertexKind::Backend => XDbgBlockGraphNodeType::BlockBackend,
            VertexKind::Job => XDbgBlockGraphNodeType::BlockJob,
            VertexKind::Driver => XDbgBlockGraphNodeType::BlockDriver,
        },
        name,
    }
}

fn line(arrow: Arrow) -> XDbgBlockGraphEdge {
    let Arrow {
        parent,
        child,
        name,
        permissions,
        shared,
    } = arrow;
    XDbgBlockGraphEdge {
        parent,
        child,
        name: name.to_owned(),
        perm: names(permissions),
        shared_perm: names(shared),
    }
}

/// In QEMU's order, in case that somebody compares texts.
fn names(permissions: Permissions) -> Vec<BlockPermission> {
    let all = [
        (Permissions::RESIZE, BlockPermission::Resize),
        (
            Permissions::WRITE_UNCHANGED,
            BlockPermission::WriteUnchanged,
        ),
        (Permissions::WRITE, BlockPermission::Write),
        (
            Permissions::CONSISTENT_READ,
            BlockPermission::ConsistentRead,
        ),
    ];
    let held = all.into_iter().filter(|(one, _)| permissions.has(*one));
    held.map(|(_, name)| name).collect()
}
