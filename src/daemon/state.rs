//! The state directory at the start: transactions that a crash has cut off are recovered before anything is opened.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::error::system_text;
use qapi::events::XTransactionRecovered;
use qapi::rt::QmpError;
use qapi::types;

use super::covered::Covered;
use super::cx::Cx;
use crate::journal::{
    self, ActionKind, ActionResult, FileResult, ImageResult, Journal, JournaledAction, Outcome,
    Recovered, RecoveredAction, Report,
};

/// Takes the directory, finishes or takes back what was cut off, and tells clients about it.
pub(super) async fn open(cx: &Cx, folder: &Path) -> Result<(), QmpError> {
    let failed = |error: std::io::Error| {
        let reason = system_text(&error);
        QmpError::generic(format!("--state-dir {}: {reason}", folder.display()))
    };
    let io = cx.commit(|control| Ok(control.io.clone())).await?;
    let journal = Journal::open(folder, &io).map_err(failed)?;
    let recovered = journal::recover(&journal, &io).await.map_err(failed)?;
    cx.commit(move |control| {
        control.journal = Some(Arc::new(journal));
        control.covered = Covered::of(recovered.iter().map(|recovered| &recovered.report));
        if !recovered.is_empty() {
            let events = recovered
                .iter()
                .map(|recovered| event(&recovered.report).into());
            control.keep(events.collect(), move || {
                recovered.into_iter().for_each(Recovered::seen);
            });
        }
        Ok(())
    })
    .await
}

/// A report as clients see it.
fn event(report: &Report) -> XTransactionRecovered {
    let Report {
        uuid,
        outcome,
        images,
        files,
        actions,
    } = report;
    let images = images.iter().map(|image| types::RecoveredImage {
        filename: image.path.to_string_lossy().into_owned(),
        result: match image.result {
            ImageResult::Switched => types::RecoveredImageResult::Switched,
            ImageResult::Unchanged => types::RecoveredImageResult::Unchanged,
            ImageResult::SwitchedBack => types::RecoveredImageResult::SwitchedBack,
            ImageResult::Missing => types::RecoveredImageResult::Missing,
            ImageResult::Replaced => types::RecoveredImageResult::Replaced,
            ImageResult::Changed => types::RecoveredImageResult::Changed,
            ImageResult::Failed => types::RecoveredImageResult::Failed,
        },
        desc: image.detail.clone(),
    });
    let files = files.iter().map(|file| types::RecoveredFile {
        filename: file.path.to_string_lossy().into_owned(),
        result: match file.result {
            FileResult::Kept => types::RecoveredFileResult::Kept,
            FileResult::Removed => types::RecoveredFileResult::Removed,
            FileResult::Restored => types::RecoveredFileResult::Restored,
            FileResult::Unchanged => types::RecoveredFileResult::Unchanged,
            FileResult::Replaced => types::RecoveredFileResult::Replaced,
            FileResult::Changed => types::RecoveredFileResult::Changed,
            FileResult::Failed => types::RecoveredFileResult::Failed,
        },
        desc: file.detail.clone(),
    });
    XTransactionRecovered {
        uuid: uuid.clone(),
        outcome: match outcome {
            Outcome::RolledForward => types::TransactionOutcome::RolledForward,
            Outcome::Removed => types::TransactionOutcome::Removed,
            Outcome::Degraded => types::TransactionOutcome::Degraded,
        },
        images: images.collect(),
        files: files.collect(),
        actions: actions.iter().map(action).collect(),
    }
}

/// An action as clients see it.
fn action(recovered: &RecoveredAction) -> types::RecoveredAction {
    let RecoveredAction { action, result } = recovered;
    let JournaledAction {
        kind,
        device,
        image,
        image_file: _,
        filename,
        node_name,
        snapshot,
        job_id,
    } = action;
    let text = |path: &PathBuf| path.to_string_lossy().into_owned();
    types::RecoveredAction {
        action: match kind {
            ActionKind::OverlayNode => types::TransactionActionKind::BlockdevSnapshot,
            ActionKind::OverlayFile => types::TransactionActionKind::BlockdevSnapshotSync,
            ActionKind::Create => types::TransactionActionKind::BlockdevSnapshotInternalSync,
            ActionKind::Delete => types::TransactionActionKind::XBlockdevSnapshotDeleteInternalSync,
            ActionKind::Revert => types::TransactionActionKind::XBlockdevSnapshotRevert,
            ActionKind::BackupToFile => types::TransactionActionKind::DriveBackup,
            ActionKind::BackupToNode => types::TransactionActionKind::BlockdevBackup,
        },
        result: match result {
            ActionResult::Done => types::RecoveredActionResult::Done,
            ActionResult::Undone => types::RecoveredActionResult::Undone,
            ActionResult::CutOff => types::RecoveredActionResult::CutOff,
            ActionResult::Unclear => types::RecoveredActionResult::Unclear,
        },
        device: device.clone(),
        image: image.as_ref().map(text),
        filename: filename.as_ref().map(text),
        node_name: node_name.clone(),
        snapshot: snapshot.clone(),
        job_id: job_id.clone(),
    }
}
