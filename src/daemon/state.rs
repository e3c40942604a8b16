//! The state directory at the start: transactions that a crash has cut off are recovered before anything is opened.

use std::path::Path;
use std::sync::Arc;

use qapi::events::XTransactionRecovered;
use qapi::rt::QmpError;
use qapi::types;

use super::cx::Cx;
use crate::journal::{self, FileResult, ImageResult, Journal, Outcome, Recovered, Report};

/// Takes the directory, finishes or takes back what was cut off, and tells clients about it.
pub(super) async fn open(cx: &Cx, folder: &Path) -> Result<(), QmpError> {
    let failed = |error: std::io::Error| {
        QmpError::generic(format!("--state-dir {}: {error}", folder.display()))
    };
    let io = cx.commit(|control| Ok(control.io.clone())).await?;
    let journal = Journal::open(folder, &io).map_err(failed)?;
    let recovered = journal::recover(&journal, &io).await.map_err(failed)?;
    cx.commit(move |control| {
        control.journal = Some(Arc::new(journal));
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
    }
}
