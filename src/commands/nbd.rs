//! The NBD server, and exports in the ways of today (`block-export-*`) and of 2013 (`nbd-server-*`).

use std::time::Duration;

use block::driver::Need;
use block::graph::{Drive, Graph, is_well_formed};
use qapi::commands::{BlockExportDel, NbdServerRemove, NbdServerStart};
use qapi::handlers::BlockExport;
use qapi::rt::QmpError;
use qapi::types::{
    BlockExportInfo, BlockExportOptions, BlockExportOptionsBranch, BlockExportOptionsNbd,
    BlockExportType, NbdServerAddOptions, NbdServerOptions,
};

use super::{Handlers, convert};
use crate::daemon::exports::Exported;
use crate::daemon::{Control, Cx};
use crate::exports::ExportInfo;
use crate::exports::nbd::{NbdExportOptions, NbdServer};
use crate::listen::Address;

impl BlockExport<Cx> for Handlers {
    async fn nbd_server_start(cx: &Cx, args: NbdServerStart) -> Result<(), QmpError> {
        let NbdServerStart {
            addr,
            handshake_max_seconds,
            max_connections,
        } = args;
        let limits = ServerLimits {
            handshake_max_seconds,
            max_connections,
        };
        start(cx, convert::legacy_address(addr), limits)
            .await
            .map(|_| ())
    }

    async fn nbd_server_stop(cx: &Cx) -> Result<(), QmpError> {
        let server = cx
            .commit(|control| control.exports.take_server().map_err(convert::from_engine))
            .await?;
        server.stop().await;
        Ok(())
    }

    async fn nbd_server_add(cx: &Cx, args: NbdServerAddOptions) -> Result<(), QmpError> {
        let NbdServerAddOptions {
            name,
            description,
            device,
            writable,
        } = args;
        let id = name.unwrap_or_else(|| device.clone());
        let find = |control: &mut Control| {
            let node = super::convert::device(&control.graph, &device)?;
            Ok((node.behaviour().read_only, device))
        };
        let (read_only, device) = cx.commit(find).await?;
        let export = Export {
            name: id.clone(),
            id,
            disk: device,
            description,
            // As it always was: a read-only node is exported read-only, whatever is asked for.
            writable: writable.unwrap_or(false) && !read_only,
            writethrough: false,
        };
        add(cx, export).await
    }

    async fn nbd_server_remove(cx: &Cx, args: NbdServerRemove) -> Result<(), QmpError> {
        let NbdServerRemove { name, mode } = args;
        remove(cx, name, mode).await
    }

    async fn block_export_add(cx: &Cx, args: BlockExportOptions) -> Result<(), QmpError> {
        let BlockExportOptions {
            r#type,
            id,
            node_name,
            writable,
            writethrough,
        } = args;
        let BlockExportOptionsBranch::Nbd(BlockExportOptionsNbd { name, description }) = r#type;
        let export = Export {
            name: name.unwrap_or_else(|| node_name.clone()),
            id,
            disk: node_name,
            description,
            writable: writable.unwrap_or(false),
            writethrough: writethrough.unwrap_or(false),
        };
        add(cx, export).await
    }

    async fn block_export_del(cx: &Cx, args: BlockExportDel) -> Result<(), QmpError> {
        let BlockExportDel { id, mode } = args;
        remove(cx, id, mode).await
    }

    async fn query_block_exports(cx: &Cx) -> Result<Vec<BlockExportInfo>, QmpError> {
        let exports = cx.look(|control| control.exports.list()).await?;
        Ok(exports.into_iter().map(info).collect())
    }
}

/// `--nbd-server`: the same server with the address in today's form.
pub(crate) async fn start_server(cx: &Cx, options: NbdServerOptions) -> Result<Address, QmpError> {
    let NbdServerOptions {
        addr,
        handshake_max_seconds,
        max_connections,
    } = options;
    let limits = ServerLimits {
        handshake_max_seconds,
        max_connections,
    };
    start(cx, convert::address(addr), limits).await
}

/// What the user says of the server besides its address.
struct ServerLimits {
    handshake_max_seconds: Option<u32>,
    max_connections: Option<u32>,
}

/// Starts the server and answers where it really listens.
async fn start(
    cx: &Cx,
    address: Result<Address, QmpError>,
    limits: ServerLimits,
) -> Result<Address, QmpError> {
    let events = cx
        .commit(|control| {
            control
                .exports
                .check_no_server()
                .map_err(convert::from_engine)?;
            Ok(control.exports.events())
        })
        .await?;
    let mut options = crate::exports::nbd::NbdServerOptions::new(vec![address?]);
    // As in QEMU, 0 is no limit.
    if let Some(most) = limits.max_connections {
        options.max_connections = (most > 0).then_some(most as usize);
    }
    if let Some(seconds) = limits.handshake_max_seconds {
        let limit = Duration::from_secs(seconds.into());
        options.handshake_timeout = (seconds > 0).then_some(limit);
    }
    let asked = options.addresses.clone();
    let server = NbdServer::start(options, events)
        .await
        .map_err(convert::from_engine)?;
    let address = server.addresses().first().or(asked.first()).cloned();
    cx.commit(move |control| {
        // Handlers run one at a time: there is still no other.
        control.exports.set_server(server);
        Ok(())
    })
    .await?;
    address.ok_or_else(|| QmpError::generic("The NBD server listens nowhere"))
}

/// An export to add, from whichever command.
struct Export {
    id: String,
    name: String,
    /// A node's name or a drive's id.
    disk: String,
    description: Option<String>,
    writable: bool,
    writethrough: bool,
}

/// Adds an export, with QEMU's checks in QEMU's order.
async fn add(cx: &Cx, export: Export) -> Result<(), QmpError> {
    let look = move |control: &mut Control| {
        let disk = check(control, &export)?;
        Ok((disk.node, export))
    };
    let (node, export) = cx.commit(look).await?;
    let need = match export.writable {
        true => Need::Writes,
        false => Need::Reads,
    };
    let claimed = convert::claim(cx, &node, need)
        .await
        .map_err(convert::from_engine)?;
    cx.commit(move |control| {
        let added = enter(control, export);
        drop(claimed);
        added
    })
    .await
}

/// What is to be exported, if it can be.
fn check(control: &Control, export: &Export) -> Result<Exported, QmpError> {
    let Export {
        id, disk, writable, ..
    } = export;
    if !is_well_formed(id) {
        return Err(QmpError::generic("Invalid block export id"));
    }
    if control.exports.contains(id) {
        return Err(QmpError::generic(format!(
            "Block export id '{id}' is already in use"
        )));
    }
    let disk = Exported::find(&control.graph, disk)?;
    if disk.node.behaviour().read_only && *writable {
        return Err(QmpError::generic(
            "Cannot export read-only node as writable",
        ));
    }
    Ok(disk)
}

fn enter(control: &mut Control, export: Export) -> Result<(), QmpError> {
    let disk = check(control, &export)?;
    let Export {
        id,
        name,
        disk: _,
        description,
        writable,
        writethrough,
    } = export;
    let behaviour = disk.node.behaviour();
    let options = NbdExportOptions {
        id,
        name,
        description,
        node_name: disk.node.name().to_owned(),
        writable,
        writethrough: writethrough || behaviour.cache.writethrough,
    };
    control
        .exports
        .add(&mut control.graph, options, &disk)
        .map_err(convert::from_engine)
}

impl Exported {
    /// The drive of this id, or the node of this name. What goes by a drive's id is treated as what its guest does.
    fn find(graph: &Graph, name: &str) -> Result<Self, QmpError> {
        let drive = graph.drive(name);
        let node = match drive {
            Some(_) => convert::device(graph, name),
            None => convert::node(graph, name),
        };
        Ok(Exported {
            node: node?,
            guest: drive.map(Drive::client),
        })
    }
}

async fn remove(
    cx: &Cx,
    id: String,
    mode: Option<qapi::types::BlockExportRemoveMode>,
) -> Result<(), QmpError> {
    let mode = convert::remove_mode(mode);
    cx.commit(move |control| {
        control
            .exports
            .remove(&id, mode)
            .map_err(convert::from_engine)
    })
    .await
}

fn info(export: ExportInfo) -> BlockExportInfo {
    let ExportInfo {
        id,
        name: _,
        node_name,
        writable: _,
        shutting_down,
        connections: _,
    } = export;
    BlockExportInfo {
        id,
        r#type: BlockExportType::Nbd,
        node_name,
        shutting_down,
    }
}
