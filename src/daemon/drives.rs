//! `--drive`: an image with a name that clients call `device`, created if it is not there yet.

use std::sync::Arc;

use block::copy::clear_away_left;
use block::driver::{Claim, Need, Preallocation};
use block::error::Error;
use block::formats::qcow2::NOT_QCOW2;
use block::formats::qcow2::create::CreateOptions;
use block::graph::NewDrive;
use block::open::{
    CacheMode, DriverOptions, Existing, FileOptions, Locking, NewContent, NewImage, NodeOptions,
    NodeRef, Opener, Qcow2Options, RawOptions, create_image, open, plain_path,
};
use qapi::rt::QmpError;
use qapi::types::{BlockExportOptions, BlockExportOptionsBranch, BlockExportOptionsNbd};

use super::cx::Cx;
use super::lookup::claim;
use crate::commands::from_engine;
use crate::config::{DriveFormat, DriveOptions};

/// A drive of the command line.
#[derive(Debug)]
pub(super) struct Added {
    pub(super) id: String,
    has_medium: bool,
    writable: bool,
}

impl Added {
    /// The export that makes it reachable; there is none of a drive without medium.
    pub(super) fn export(&self) -> Option<BlockExportOptions> {
        self.has_medium.then(|| BlockExportOptions {
            r#type: BlockExportOptionsBranch::Nbd(BlockExportOptionsNbd {
                name: Some(self.id.clone()),
                description: None,
            }),
            id: self.id.clone(),
            // By the drive's name, so that requests are those of its guest.
            node_name: self.id.clone(),
            writable: Some(self.writable),
            writethrough: None,
        })
    }
}

/// Adds a drive. `number` counts those before it, for a name if it has none.
pub(super) async fn add(cx: &Cx, options: DriveOptions, number: usize) -> Result<Added, QmpError> {
    let id = options
        .id
        .clone()
        .unwrap_or_else(|| format!("drive{number}"));
    let mut opened = None;
    if let Some(file) = &options.file {
        let file = plain_path(file).map_err(from_engine)?;
        let opener = cx
            .commit(|control| Ok((control.io.clone(), Opener::new(&control.io, &control.graph))))
            .await?;
        let (io, opener) = opener;
        if let Some(size) = options.size
            && !options.read_only
        {
            let image = new_image(file, options.format, size);
            let created = create_image(&io, &image, Existing::Keep).await;
            created.map_err(from_engine)?.keep();
        }
        let node = node_options(&options, file);
        let made = open(&opener, &node).await;
        opened = Some(made.map_err(|error| from_engine(with_formats(error, options.format)))?);
    } else if options.size.is_some() {
        return Err(QmpError::generic("size= needs file="));
    }
    let mut claimed = Claim::none();
    if let Some(root) = opened.as_ref().and_then(|opened| opened.root()) {
        let need = match root.behaviour().read_only {
            true => Need::Reads,
            false => Need::Writes,
        };
        claimed = claim(cx, root, need).await.map_err(from_engine)?;
        if need == Need::Writes {
            // The image is locked, and no job of this process has it: whoever took them is gone.
            clear_away_left(root.driver()).await;
        }
    }
    cx.commit(move |control| {
        let _claimed = claimed;
        let root = opened
            .map(|opened| control.graph.insert(opened))
            .transpose();
        let root = root.map_err(from_engine)?;
        if let Some(root) = &root {
            control.covered.warn_of(&format!("drive '{id}'"), root);
        }
        let added = Added {
            has_medium: root.is_some(),
            writable: root
                .as_ref()
                .is_some_and(|root| !root.behaviour().read_only),
            id: id.clone(),
        };
        let drive = NewDrive {
            id,
            root,
            policy: options.policy,
        };
        // If the name is refused the start has failed, and the end closes the node.
        control.graph.add_drive(drive).map_err(from_engine)?;
        Ok(added)
    })
    .await
}

/// Adds what to type to the refusal of an image whose format the user did not say.
fn with_formats(error: Error, format: DriveFormat) -> Error {
    if format != DriveFormat::Unsaid || !error.message().ends_with(NOT_QCOW2) {
        return error;
    }
    let ways = "type format=raw if it is a raw disk, or format=auto to find out";
    Error::new(error.kind(), format!("{}; {ways}", error.message()))
}

/// The nodes of a drive: a format on a file.
fn node_options(options: &DriveOptions, filename: &str) -> NodeOptions {
    let file = NodeOptions {
        read_only: options.read_only,
        // The format flushes after each write; the file below it must not do so for every piece of metadata.
        cache: CacheMode {
            writethrough: false,
            ..options.cache
        },
        ..NodeOptions::new(DriverOptions::File(FileOptions {
            filename: filename.to_owned(),
            aio: options.aio,
            locking: Locking::Auto,
        }))
    };
    let file = NodeRef::Inline(Arc::new(file));
    let format = match options.format {
        DriveFormat::Unsaid | DriveFormat::Qcow2 => DriverOptions::Qcow2(Qcow2Options::new(file)),
        DriveFormat::Auto => DriverOptions::Probed(file),
        DriveFormat::Raw => DriverOptions::Raw(RawOptions {
            file,
            offset: None,
            size: None,
        }),
    };
    NodeOptions {
        read_only: options.read_only,
        discard: options.discard,
        detect_zeroes: options.detect_zeroes,
        cache: options.cache,
        ..NodeOptions::new(format)
    }
}

fn new_image(filename: &str, format: DriveFormat, size: u64) -> NewImage {
    let content = match format {
        DriveFormat::Raw => NewContent::Raw {
            size,
            preallocation: Preallocation::Off,
        },
        DriveFormat::Unsaid | DriveFormat::Qcow2 | DriveFormat::Auto => {
            NewContent::Qcow2(Box::new(CreateOptions::new(size)))
        }
    };
    NewImage {
        filename: filename.to_owned(),
        content,
    }
}
