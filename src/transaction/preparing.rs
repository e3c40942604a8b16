//! What actions prepare with, several at the same time: new image files, and the journal of the transaction.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::driver::Requests as _;
use block::error::Result as EngineResult;
use block::graph::{Graph, Node};
use block::io::{FileIdentity, IoContext, Remains};
use block::open::{
    Created, Existing, NewImage, Opener, OverDevice, TakenBack, beside, create_image, final_path,
};
use block::units::SECTOR;
use qapi::rt::QmpError;
use tokio::sync::OnceCell;

use super::{Completion, Disk};
use crate::daemon::lookup::{self, from_engine};
use crate::daemon::{Control, Cx};
use crate::jobs::{Audience, GroupKey};
use crate::journal::{ActionKind, Entry, Identity, Journal, JournaledAction, StagedImage};

/// What actions prepare with.
pub(crate) struct Preparing {
    /// The way to the control loop.
    pub(crate) cx: Cx,
    /// What files are opened with.
    pub(crate) io: IoContext,
    /// The group that the transaction's jobs are of, when they end together.
    pub(crate) group: Option<GroupKey>,
    /// Who is told of the transaction's jobs.
    pub(crate) audience: Audience,
    /// What the client wants, in order.
    pub(super) actions: Vec<JournaledAction>,
    /// Where transactions are written down, if anywhere.
    journal: Option<Arc<Journal>>,
    /// The journal of this one, once there is something to write.
    pub(super) entry: OnceCell<Entry>,
    created: Mutex<Vec<Created>>,
    /// Devices that images were made on. What they held in front is kept, and nothing of what is behind that.
    devices: Mutex<Vec<FileIdentity>>,
}

/// An image file that a transaction has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Made {
    /// Where it is, without links.
    pub(crate) path: PathBuf,
    /// Whether the transaction has made it.
    pub(crate) is_new: bool,
}

impl Preparing {
    pub(super) async fn new(
        cx: Cx,
        completion: Completion,
        audience: Audience,
    ) -> Result<Self, QmpError> {
        let parts = cx.commit(move |control| {
            let group = match completion {
                Completion::Individual => None,
                Completion::Grouped => Some(control.jobs.new_group()),
            };
            Ok((control.io.clone(), control.journal.clone(), group))
        });
        let (io, journal, group) = parts.await?;
        Ok(Preparing {
            cx,
            io,
            group,
            audience,
            actions: Vec::new(),
            journal,
            entry: OnceCell::new(),
            created: Mutex::default(),
            devices: Mutex::default(),
        })
    }

    /// Makes an image file, durably. When the transaction fails, and after a crash before its commit, there is what was there
    /// before; close what has it open in `abort`.
    pub(crate) async fn create_image(
        &self,
        image: &NewImage,
        existing: Existing,
    ) -> Result<Made, QmpError> {
        if existing == Existing::Replace {
            let checked = self.opener().await?.check_unopened(&image.filename).await;
            checked.map_err(from_engine)?;
        }
        let over = match existing {
            Existing::Keep => None,
            Existing::Replace => {
                let over = OverDevice::find(&self.io, image).await;
                self.with_owner(over, image).await?
            }
        };
        let path = final_path(&image.filename);
        if let Some(entry) = self.entry().await? {
            // Where there can be no file, its creation says why.
            if let Ok(path) = &path {
                let overwritten = over.as_ref().map(OverDevice::overwritten);
                let written = entry.creates(path.clone(), beside(path), overwritten.cloned());
                let written = written.await;
                written.map_err(|error| journal_error(&error))?;
            }
        }
        let created = match over {
            Some(over) => {
                lock(&self.devices).push(over.device());
                over.make(&self.io, image).await
            }
            None => create_image(&self.io, image, existing).await,
        };
        let created = self.with_owner(created, image).await?;
        let made = Made {
            path: created.path().to_owned(),
            is_new: created.is_new(),
        };
        lock(&self.created).push(created);
        if let Some(entry) = self.entry.get()
            && made.is_new
        {
            let written = entry.created(made.path.clone()).await;
            written.map_err(|error| journal_error(&error))?;
        }
        Ok(made)
    }

    /// The error of making an image, with the name of the node that is in its way.
    async fn with_owner<T>(&self, made: EngineResult<T>, image: &NewImage) -> Result<T, QmpError> {
        match made {
            Ok(made) => Ok(made),
            Err(error) => {
                let opener = self.opener().await?;
                let error = opener.with_owner(error, &image.filename).await;
                Err(from_engine(error))
            }
        }
    }

    /// What opens nodes, with the graph as it is now.
    pub(super) async fn opener(&self) -> Result<Opener, QmpError> {
        let opener = |control: &mut Control| Ok(Opener::new(&control.io, &control.graph));
        self.cx.commit(opener).await
    }

    /// The journal of the transaction, if there is a state directory.
    async fn entry(&self) -> Result<Option<&Entry>, QmpError> {
        let Some(journal) = &self.journal else {
            return Ok(None);
        };
        let begin = async {
            let actions = self.actions.clone();
            let images = |control: &mut Control| Ok(with_images(&control.graph, actions));
            let begun = journal.begin(self.cx.commit(images).await?).await;
            begun.map_err(|error| journal_error(&error))
        };
        self.entry.get_or_try_init(|| begin).await.map(Some)
    }

    /// Writes down which images will be changed, if more than one write will decide the transaction.
    pub(super) async fn stage(&mut self, disks: &mut [Disk]) -> Result<(), QmpError> {
        let changed = disks.iter_mut().filter(|disk| disk.changes);
        let changed: Vec<&mut Disk> = changed.collect();
        if let Some(disk) = changed
            .iter()
            .find(|disk| self.is_on_new_device(&disk.node))
        {
            return Err(QmpError::generic(format!(
                "The image of '{}' is made on a device by the same transaction, so that no snapshot of it can be taken there",
                disk.device
            )));
        }
        let makes_none = lock(&self.created).is_empty();
        if self.journal.is_none() || (changed.len() < 2 && makes_none) {
            return Ok(());
        }
        let mut images = Vec::new();
        for disk in changed {
            match image_file(&disk.node).await {
                Some(image) => {
                    disk.journaled = Some(images.len());
                    images.push(image);
                }
                None => log::warn!(
                    "device '{}' is no file of this host: a crash may leave a transaction half done on it",
                    disk.device
                ),
            }
        }
        self.entry().await?;
        if let Some(entry) = self.entry.get_mut() {
            let written = entry.stages(images).await;
            written.map_err(|error| journal_error(&error))?;
        }
        Ok(())
    }

    /// Whether this image, or one that it lies in, was made on a device: more than its creation writes could not be taken back.
    pub(super) fn is_on_new_device(&self, node: &Arc<Node>) -> bool {
        let mut layer = Some(node.below_filters());
        while let Some(node) = layer {
            let file = node.driver().host_file();
            if file.is_some_and(|file| lock(&self.devices).contains(&file)) {
                return true;
            }
            layer = node.link("file");
        }
        false
    }

    /// The transaction has happened: files that were made stay. Answers what is left of those that they have replaced.
    pub(super) async fn keep_files(&mut self) -> Vec<Remains> {
        let created = std::mem::take(&mut *lock(&self.created));
        let kept = self.blocking(move || Created::keep_all(created)).await;
        kept.unwrap_or_default()
    }

    /// The transaction has failed: files that were made go, the last one first. Nobody has them open but those of `but`, which stay.
    /// Where there is not what was there before, the log says what is wrong.
    pub(super) async fn remove_files(&mut self, but: &[PathBuf]) -> TakenBack {
        let created = std::mem::take(&mut *lock(&self.created)).into_iter().rev();
        let (keep, remove): (Vec<Created>, Vec<Created>) =
            created.partition(|created| but.iter().any(|path| path == created.path()));
        let taken_back = self.blocking(move || {
            let kept = Created::keep_all(keep);
            let mut taken_back = Created::take_back(remove);
            taken_back.remains.extend(kept);
            taken_back
        });
        taken_back.await.unwrap_or(TakenBack {
            are_back: false,
            remains: Vec::new(),
        })
    }

    /// Does what waits for a disk where waiting does no harm.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let done = self.io.call(move || Ok(work()));
        let done = done.await;
        done.inspect_err(|error| log::error!("files of a transaction: {error}"))
            .ok()
    }
}

fn lock<T>(place: &Mutex<T>) -> MutexGuard<'_, T> {
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says which image each of the disks is when it is an action's turn.
fn with_images(graph: &Graph, mut actions: Vec<JournaledAction>) -> Vec<JournaledAction> {
    // What is on a disk so far.
    let mut overlays: HashMap<String, Option<PathBuf>> = HashMap::new();
    for action in &mut actions {
        if let Some(overlay) = overlays.get(&action.device) {
            action.image.clone_from(overlay);
        } else if let Ok(node) = lookup::device(graph, &action.device) {
            let mut file = node.below_filters();
            while let Some(below) = file.link("file") {
                file = below;
            }
            action.image = final_path(file.filename()).ok();
            action.image_file = file.driver().host_file().map(Identity::from);
        }
        // Only a drive becomes its overlay. A node stays what it is.
        if graph.drive(&action.device).is_some()
            && let ActionKind::OverlayFile | ActionKind::OverlayNode = action.kind
        {
            overlays.insert(action.device.clone(), action.filename.clone());
        }
        // The journal is text.
        for path in [&mut action.image, &mut action.filename] {
            path.take_if(|path| path.to_str().is_none());
        }
    }
    actions
}

/// The journal could not be written: without it nothing is done that a crash could cut off.
pub(super) fn journal_error(error: &io::Error) -> QmpError {
    QmpError::generic(format!(
        "Could not write the journal of the transaction: {error}"
    ))
}

/// The file of the host that an image lies in. `None` where it lies elsewhere.
async fn image_file(node: &Arc<Node>) -> Option<StagedImage> {
    let mut offset = 0;
    // A filter shows the image below it.
    let mut below = node.below_filters().link("file")?;
    loop {
        let info = below.driver().info();
        if matches!(info.driver, "file" | "host_device") {
            let path = std::fs::canonicalize(info.filename).ok()?;
            let file = Identity::of(&std::fs::metadata(&path).ok()?);
            // The journal is text.
            path.to_str()?;
            return Some(StagedImage { path, file, offset });
        }
        offset = below.block_status(offset, SECTOR).await.ok()?.host_offset?;
        let next = below.link("file")?;
        below = next;
    }
}
