//! `qblockd amend`: changes what an image that is not in use says about itself.
//!
//! The engine's amendments are one switch of the header each: after an error, or a crash, the image is what it was. A new size comes
//! behind them, so that a version that the image has only just got makes it cheaper.

use std::process::ExitCode;
use std::sync::Arc;

use block::driver::{AmendOptions, Preallocation, Requests};
use block::error::{Error, ErrorKind};
use block::graph::Graph;
use block::io::IoContext;
use block::open::{
    Aio, BackingOption, DriverOptions, FileOptions, Locking, NodeOptions, NodeRef, Opener,
    Qcow2Options, UnnamedFormat, open,
};

use crate::config::AmendCommand;

/// The node of the image, in a graph of its own.
const NODE: &str = "image";

/// What cannot be done by a switch of the header needs a program that rewrites the image.
fn with_way_out(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Unsupported => Error::new(
            ErrorKind::Unsupported,
            format!("{error} (qemu-img amend may be able to)"),
        ),
        _ => error,
    }
}

pub(super) async fn amend_file(command: &AmendCommand) -> Result<ExitCode, Error> {
    let mut graph = Graph::new();
    let opener = Opener::new(&IoContext::new(), &graph);
    let opened = open(&opener, &node(command)).await?;
    let image = graph.insert(opened)?;
    let result = async {
        if command.options != AmendOptions::default() {
            let amended = image.driver().amend(command.options.clone()).await;
            amended.map_err(with_way_out)?;
        }
        match command.size {
            Some(size) => image.resize(size, Preallocation::Off).await,
            None => Ok(()),
        }
    };
    let result = result.await;
    drop(image);
    let closed = graph.remove(NODE)?.close().await;
    result?;
    closed?;
    Ok(ExitCode::SUCCESS)
}

fn node(command: &AmendCommand) -> NodeOptions {
    // What a disk shows where it grows depends on its backing; nothing else here does.
    let backing = match command.size {
        Some(_) => BackingOption::FromImage(UnnamedFormat::Refused),
        None => BackingOption::Detached,
    };
    let qcow2 = Qcow2Options {
        backing,
        data_file: command.data_file.as_deref().map(file),
        ..Qcow2Options::new(file(&command.file))
    };
    NodeOptions {
        node_name: Some(NODE.to_owned()),
        ..NodeOptions::new(DriverOptions::Qcow2(qcow2))
    }
}

fn file(name: &str) -> NodeRef {
    NodeRef::Inline(Arc::new(NodeOptions::new(DriverOptions::File(
        FileOptions {
            filename: name.to_owned(),
            aio: Aio::Threads,
            locking: Locking::Auto,
        },
    ))))
}
