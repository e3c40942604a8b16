//! What a start has done about a transaction that a crash has cut off.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::record::{ActionKind, JournaledAction};

/// All of it, about one transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The name of the transaction.
    pub uuid: String,
    /// What has become of it.
    pub outcome: Outcome,
    /// Its images.
    pub images: Vec<RecoveredImage>,
    /// The files that it made.
    pub files: Vec<RecoveredFile>,
    /// What it consists of, in the order in which the client has given it.
    pub actions: Vec<RecoveredAction>,
}

/// An action of the transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveredAction {
    /// As the client has given it.
    #[serde(flatten)]
    pub action: JournaledAction,
    /// What has become of it.
    pub result: ActionResult,
}

/// What has become of an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActionResult {
    /// It has happened.
    Done,
    /// It has not happened.
    Undone,
    /// A backup that has ended with the process.
    CutOff,
    /// Its image or file is not what it has to be, as these say.
    Unclear,
}

/// What has become of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It has happened, on all images.
    RolledForward,
    /// It has not happened, and nothing is left of it.
    Removed,
    /// Something could not be put right, and was left as it was.
    Degraded,
}

/// An image of the transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveredImage {
    /// Where it was.
    pub path: PathBuf,
    /// What was done.
    pub result: ImageResult,
    /// The error, where one is behind it.
    pub detail: Option<String>,
}

/// What has become of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImageResult {
    /// It has been switched.
    Switched,
    /// It was what it has to be.
    Unchanged,
    /// It has been switched back.
    SwitchedBack,
    /// It is not there.
    Missing,
    /// There is another file in its place.
    Replaced,
    /// Somebody has changed it since.
    Changed,
    /// Somebody is using it, or it cannot be read or written.
    Failed,
}

/// A file that the transaction made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveredFile {
    /// Where it is or was.
    pub path: PathBuf,
    /// What was done.
    pub result: FileResult,
    /// The error, where one is behind it.
    pub detail: Option<String>,
}

/// What has become of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileResult {
    /// It stays: the transaction has happened.
    Kept,
    /// It has been removed.
    Removed,
    /// What it had replaced is back.
    Restored,
    /// It was not there, or had not replaced anything yet.
    Unchanged,
    /// There is another file in its place, or something else on its device.
    Replaced,
    /// Somebody has written to it since.
    Changed,
    /// It cannot be removed.
    Failed,
}

impl ImageResult {
    /// Whether the image is as the outcome of the transaction says.
    pub fn is_right(self) -> bool {
        match self {
            ImageResult::Switched | ImageResult::Unchanged | ImageResult::SwitchedBack => true,
            ImageResult::Missing
            | ImageResult::Replaced
            | ImageResult::Changed
            | ImageResult::Failed => false,
        }
    }

    /// For a sentence about the image.
    pub(super) fn said(self) -> &'static str {
        match self {
            ImageResult::Switched => "has been switched",
            ImageResult::Unchanged => "was what it has to be",
            ImageResult::SwitchedBack => "has been switched back",
            ImageResult::Missing => "is not there",
            ImageResult::Replaced => "is another file by now",
            ImageResult::Changed => "was changed by somebody else",
            ImageResult::Failed => "cannot be used",
        }
    }

    /// Whether another start may find it otherwise.
    fn is_worth_another_try(self) -> bool {
        matches!(self, ImageResult::Missing | ImageResult::Failed)
    }
}

impl FileResult {
    /// For a sentence about the file.
    pub(super) fn said(self) -> &'static str {
        match self {
            FileResult::Kept => "stays",
            FileResult::Removed => "has been removed",
            FileResult::Restored => "is again what it was",
            FileResult::Unchanged => "was what it has to be",
            FileResult::Replaced => "is not what the transaction made",
            FileResult::Changed => "was written to by somebody else, and stays",
            FileResult::Failed => "cannot be removed",
        }
    }

    /// Whether the file is as the outcome of the transaction says.
    pub fn is_right(self) -> bool {
        match self {
            FileResult::Kept
            | FileResult::Removed
            | FileResult::Restored
            | FileResult::Unchanged => true,
            FileResult::Replaced | FileResult::Changed | FileResult::Failed => false,
        }
    }
}

impl ActionKind {
    /// Whether it puts an overlay on a disk.
    fn is_overlay(self) -> bool {
        matches!(self, ActionKind::OverlayNode | ActionKind::OverlayFile)
    }
}

impl Report {
    /// The actions that have left an overlay on a disk.
    pub fn overlays(&self) -> impl Iterator<Item = &JournaledAction> {
        let actions = self.actions.iter();
        let done = actions.filter(|each| each.result == ActionResult::Done);
        done.map(|each| &each.action)
            .filter(|action| action.kind.is_overlay())
    }

    /// Whether another start may do more.
    pub(super) fn is_worth_another_try(&self) -> bool {
        let images = self.images.iter();
        let mut images = images.map(|image| image.result.is_worth_another_try());
        let mut files = self.files.iter();
        images.any(|again| again) || files.any(|file| file.result == FileResult::Failed)
    }
}
