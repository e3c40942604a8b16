//! Images that have got an overlay by a transaction which a start behind a crash has finished: whoever writes to one of them makes the
//! overlay worthless, and a command line of before the crash does just that.

use std::path::PathBuf;
use std::sync::Arc;

use block::graph::Node;

use crate::journal::{Identity, Report};

/// The images, each with what is on it. Known until a client has seen the report, and in this process.
#[derive(Debug, Default)]
pub struct Covered(Vec<Layer>);

#[derive(Debug)]
struct Layer {
    file: Identity,
    image: PathBuf,
    overlay: Option<PathBuf>,
    transaction: String,
}

impl Covered {
    /// What reports say.
    pub(super) fn of<'r>(reports: impl Iterator<Item = &'r Report>) -> Self {
        let layers = reports.flat_map(|report| {
            report.overlays().filter_map(|action| {
                Some(Layer {
                    file: action.image_file?,
                    image: action.image.clone()?,
                    overlay: action.filename.clone(),
                    transaction: report.uuid.clone(),
                })
            })
        });
        Covered(layers.collect())
    }

    /// Says so in the log when a node that was opened, or has become writable, writes to one of them. `user` is what the client calls it.
    pub fn warn_of(&self, user: &str, node: &Arc<Node>) {
        for warning in self.warnings_of(user, node) {
            log::warn!("{warning}");
        }
    }

    fn warnings_of(&self, user: &str, node: &Arc<Node>) -> Vec<String> {
        if self.0.is_empty() || node.behaviour().read_only {
            return Vec::new();
        }
        let mut file = node.below_filters();
        while let Some(below) = file.link("file") {
            file = below;
        }
        let found = file.driver().host_file().map(Identity::from);
        let layers = self.0.iter().filter(|layer| Some(layer.file) == found);
        let warning = |layer: &Layer| {
            let overlay = match &layer.overlay {
                Some(overlay) => format!("'{}'", overlay.display()),
                None => "another image".to_owned(),
            };
            format!(
                "{user} writes to '{}', on which transaction {} has put {overlay}: that is the disk, and what is written below it \
                 makes it worthless. Open {overlay} instead",
                layer.image.display(),
                layer.transaction
            )
        };
        layers.map(warning).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{ActionKind, ActionResult, JournaledAction, Outcome, RecoveredAction};
    use block::graph::Graph;
    use block::io::IoContext;
    use block::open::{Aio, DriverOptions, FileOptions, Locking, NodeOptions, Opener, open};

    async fn node(path: &std::path::Path, read_only: bool) -> Arc<Node> {
        let file = FileOptions {
            filename: path.to_str().unwrap().to_owned(),
            aio: Aio::Threads,
            locking: Locking::Off,
        };
        let options = NodeOptions {
            read_only,
            ..NodeOptions::new(DriverOptions::File(file))
        };
        let opener = Opener::new(&IoContext::new(), &Graph::default());
        let opened = open(&opener, &options).await.unwrap();
        opened.root().unwrap().clone()
    }

    #[tokio::test]
    async fn who_writes_below_an_overlay_of_a_finished_transaction_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let [base, other] = ["base", "other"].map(|name| folder.path().join(name));
        for path in [&base, &other] {
            std::fs::write(path, [0; 512]).unwrap();
        }
        let action = JournaledAction {
            image: Some(base.clone()),
            image_file: Some(Identity::of(&std::fs::metadata(&base).unwrap())),
            filename: Some("/images/overlay".into()),
            ..JournaledAction::new(ActionKind::OverlayFile, "d".to_owned())
        };
        let mut report = Report {
            uuid: "u".to_owned(),
            outcome: Outcome::RolledForward,
            images: Vec::new(),
            files: Vec::new(),
            actions: vec![RecoveredAction {
                action,
                result: ActionResult::Done,
            }],
        };
        let covered = Covered::of([&report].into_iter());
        let warnings = covered.warnings_of("drive 'd'", &node(&base, false).await);
        assert_eq!(warnings.len(), 1);
        assert!(
            warnings[0].starts_with("drive 'd' writes to"),
            "{warnings:?}"
        );
        assert!(warnings[0].ends_with("Open '/images/overlay' instead"));
        assert!(
            covered
                .warnings_of("r", &node(&base, true).await)
                .is_empty()
        );
        let elsewhere = node(&other, false).await;
        assert!(covered.warnings_of("o", &elsewhere).is_empty());
        report.actions[0].result = ActionResult::Undone;
        let covered = Covered::of([&report].into_iter());
        let base = node(&base, false).await;
        assert!(covered.warnings_of("drive 'd'", &base).is_empty());
    }
}
