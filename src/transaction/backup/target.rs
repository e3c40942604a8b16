//! The target of `drive-backup`: a file that is made, or used as it is.

use std::path::{Path, absolute};
use std::sync::Arc;

use block::copy::{SyncMode, TargetContent};
use block::driver::{BackingFile, Requests};
use block::error::Error;
use block::graph::{Node, Opened};
use block::io::FileIdentity;
use block::open::{
    Aio, BackingOption, DiscardMode, DriverOptions, Existing, FileOptions, Locking, NewContent,
    NewImage, NodeOptions, NodeRef, Qcow2Options, RawOptions, open, plain_path,
};
use qapi::rt::QmpError;

use super::{Preparing, same};
use crate::daemon::lookup::from_engine;

/// The format of a target that is a device, without a node for a format on it.
const HOST_DEVICE: &str = "host_device";

/// What becomes of what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TargetMode {
    /// A new image takes its place.
    AbsolutePaths,
    /// It is used.
    Existing,
}

/// A target that was opened.
pub(super) struct OpenedTarget {
    pub(super) nodes: Opened,
    /// What it holds before it is written.
    pub(super) content: TargetContent,
    /// Its image was made for this.
    pub(super) is_new: bool,
}

/// A file to copy to.
#[derive(Debug, Clone)]
pub(crate) struct FileTarget {
    filename: String,
    format: Option<String>,
    mode: TargetMode,
}

impl FileTarget {
    pub(crate) fn new(filename: String, format: Option<String>, mode: TargetMode) -> Self {
        FileTarget {
            filename,
            format,
            mode,
        }
    }

    /// Finds the path in the client's name for it.
    pub(super) fn resolve(&mut self) -> Result<(), QmpError> {
        self.filename = plain_path(&self.filename).map_err(from_engine)?.to_owned();
        Ok(())
    }

    /// Its path, as the client named it.
    pub(super) fn filename(&self) -> &str {
        &self.filename
    }

    /// Whether what is opened may bring others along: what its header names.
    pub(super) fn may_refer_to_others(&self) -> bool {
        self.mode == TargetMode::Existing
    }

    /// Makes the image if it has to, and opens it. Answers what it holds, too.
    pub(super) async fn open(
        &self,
        with: &Preparing,
        source: &Arc<Node>,
        sync: SyncMode,
    ) -> Result<OpenedTarget, QmpError> {
        let disk = source.below_filters();
        let backing = match sync {
            SyncMode::Full => None,
            SyncMode::Top => disk.link("backing"),
            SyncMode::None => Some(disk.clone()),
        };
        self.check_other_file(with, &disk).await?;
        let format = self.format_like(&disk);
        let (mut content, mut is_new) = (TargetContent::Unknown, false);
        if self.makes_image() {
            let format = format.as_deref().unwrap_or("raw");
            let image = self.image((format, source.size()), backing.as_ref())?;
            let made = with.create_image(&image, Existing::Replace).await?;
            is_new = made.is_new;
            // Raw bytes on a device are those that were there.
            if is_new && backing.is_none() {
                content = TargetContent::Zero;
            }
        }
        let opener = with.opener().await?;
        let options = self.options(format.as_deref(), backing.as_ref(), sync)?;
        Ok(OpenedTarget {
            nodes: open(&opener, &options)
                .await
                .map_err(|error| self.not_opened(error))?,
            content,
            is_new,
        })
    }

    /// Whether there will be a new image. A device is there or is not.
    fn makes_image(&self) -> bool {
        self.mode == TargetMode::AbsolutePaths && self.format.as_deref() != Some(HOST_DEVICE)
    }

    fn not_opened(&self, error: Error) -> QmpError {
        let error = match self.mode {
            TargetMode::AbsolutePaths if !self.makes_image() => error.context(format!(
                "Protocol driver '{HOST_DEVICE}' does not support creating new images, so an existing image must be selected \
                 as the target; however, opening the given target as an existing image failed"
            )),
            _ => error,
        };
        from_engine(error)
    }

    /// Refuses the file that the disk itself lies in, by whatever name.
    async fn check_other_file(&self, with: &Preparing, disk: &Arc<Node>) -> Result<(), QmpError> {
        // Where nothing is, it will be made.
        let Ok(target) = FileIdentity::at(&with.io, &self.filename).await else {
            return Ok(());
        };
        let mut layer = Some(disk.clone());
        while let Some(node) = layer {
            if node.driver().host_file() == Some(target) {
                return Err(same());
            }
            layer = node.link("file");
        }
        Ok(())
    }

    /// What is made.
    fn image(
        &self,
        (format, size): (&str, u64),
        backing: Option<&Arc<Node>>,
    ) -> Result<NewImage, QmpError> {
        let backing = match backing {
            None => BackingFile::default(),
            Some(node) => {
                let name = node.driver().info().filename;
                // It is read where the target is, which may be elsewhere.
                let path = absolute(Path::new(&name));
                BackingFile {
                    name: Some(path.map_or(name, |path| path.display().to_string())),
                    format: Some(format_of(node).to_owned()),
                }
            }
        };
        Ok(NewImage {
            filename: self.filename.clone(),
            content: NewContent::for_disk(format, size, backing).map_err(from_engine)?,
        })
    }

    /// The target's format, if it is to be one: that of the source for what is made.
    fn format_like(&self, disk: &Node) -> Option<String> {
        match (&self.format, self.mode) {
            (Some(format), _) => Some(format.clone()),
            (None, TargetMode::Existing) => None,
            (None, TargetMode::AbsolutePaths) => Some(format_of(disk).to_owned()),
        }
    }

    fn options(
        &self,
        format: Option<&str>,
        backing: Option<&Arc<Node>>,
        sync: SyncMode,
    ) -> Result<NodeOptions, QmpError> {
        let place = FileOptions {
            filename: self.filename.clone(),
            aio: Aio::default(),
            locking: Locking::Auto,
        };
        let file = NodeOptions::new(DriverOptions::File(place.clone()));
        let file = NodeRef::Inline(Arc::new(file));
        let driver = match format {
            None => DriverOptions::Probed(file),
            Some("file") => DriverOptions::File(place),
            Some(HOST_DEVICE) => DriverOptions::HostDevice(place),
            Some("raw") => DriverOptions::Raw(RawOptions {
                file,
                offset: None,
                size: None,
            }),
            Some("qcow2") => {
                let node = backing.map(|node| NodeRef::Name(node.name().to_owned()));
                let backing = match (node, sync, self.mode) {
                    // What guests write to the disk does not reach what the job has written.
                    (Some(node), SyncMode::None, _) => Some(BackingOption::Written(node)),
                    (Some(node), _, TargetMode::AbsolutePaths) => Some(BackingOption::Node(node)),
                    _ => None,
                };
                let qcow2 = Qcow2Options::new(file);
                DriverOptions::Qcow2(Qcow2Options {
                    backing: backing.unwrap_or(qcow2.backing.clone()),
                    ..qcow2
                })
            }
            Some(other) => {
                return Err(QmpError::generic(format!("Unknown driver '{other}'")));
            }
        };
        Ok(NodeOptions {
            // Zeroes need no space.
            discard: DiscardMode::Unmap,
            ..NodeOptions::new(driver)
        })
    }
}

/// What an image like this one is called when it is made.
fn format_of(disk: &Node) -> &'static str {
    match disk.driver().info().driver {
        "file" | "host_device" => "raw",
        format => format,
    }
}
