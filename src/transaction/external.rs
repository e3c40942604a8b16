//! External snapshots: a new layer takes the place of a disk's root, which stays below it as it was.
//!
//! ```text
//!   resolve  who may be put below what        prepare  make and open the overlay, without a backing
//!   enter    the overlay is in the graph      stage    the overlay's size is right
//!   commit   overlay -> root, users to it     finish   the old root is durable, and read-only
//! ```
//!
//! Guests do not wait for what was written before: an overlay passes flushes on to what is below it until that is read-only.
//! They go on before the transaction is decided; should it fail, what they have written meanwhile is written to what is below, and
//! they go back there.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use block::driver::{BackingFile, BoxFuture, Claim, Need, Preallocation, Requests as _};
use block::graph::{Busy, Graph, Node, NodeChange, Opened, User, write_down};
use block::open::{
    Aio, BackingOption, CacheMode, DriverOptions, Existing, FileOptions, Locking, NewContent,
    NewImage, NodeOptions, NodeRef, Qcow2Options, RawOptions, final_path, open, plain_path,
    whole_sectors,
};
use qapi::rt::QmpError;
use tokio::time::timeout;

use super::{Action, Concerns, Effect, Held, Plan, Preparing, Stays, WayBack};
use crate::daemon::lookup::{claim, from_engine};
use crate::daemon::{Control, Cx, internal_error};
use crate::journal::{ActionKind, JournaledAction};
use crate::limits;

/// Puts an overlay on a disk.
pub(crate) struct ExternalSnapshot {
    device: Option<String>,
    node_name: Option<String>,
    overlay: Overlay,
    /// What the overlay is put on, once it is resolved.
    below: Option<Arc<Node>>,
    /// The overlay, until it is in the graph.
    opened: Option<Opened>,
    /// The overlay, once it is there.
    above: Option<Arc<Node>>,
    /// Whose users will use the overlay, and how many overlays of this transaction are below it, once it is prepared.
    origin: Option<(Arc<Node>, usize)>,
    /// It was made over what a device held.
    is_on_new_device: bool,
    /// What is below is going to be read, until the graph knows of it.
    claim: Claim,
    /// Where the file is, without links, if it was made.
    made: Option<PathBuf>,
    /// The graph has led users to the overlay.
    has_led: bool,
    effect: Effect,
}

/// What is put on the disk.
#[derive(Debug, Clone)]
pub(crate) enum Overlay {
    /// A node that is there.
    Node(String),
    /// A file, to be opened.
    File(OverlayFile),
}

/// An overlay that is opened by the action.
#[derive(Debug, Clone)]
pub(crate) struct OverlayFile {
    /// The path.
    pub(crate) filename: String,
    /// The name of the new node.
    pub(crate) node_name: Option<String>,
    /// The format of the file.
    pub(crate) format: String,
    /// Whether the image is there already; else it is made.
    pub(crate) is_there: bool,
}

impl ExternalSnapshot {
    /// An overlay for the disk that the client calls `device` or `node_name`.
    pub(crate) fn new(device: Option<String>, node_name: Option<String>, overlay: Overlay) -> Self {
        ExternalSnapshot {
            device,
            node_name,
            overlay,
            below: None,
            opened: None,
            above: None,
            origin: None,
            is_on_new_device: false,
            claim: Claim::none(),
            made: None,
            has_led: false,
            effect: Effect::default(),
        }
    }

    async fn make(&mut self, with: &Preparing) -> Result<(), QmpError> {
        let below = self.below.clone().ok_or_else(internal_error)?;
        // While guests go on: little is left to be written when they stand still.
        if !below.behaviour().read_only {
            flushed(&below, below.flush().await)?;
        }
        if let Overlay::File(file) = self.overlay.clone() {
            self.opened = Some(self.open(file, &below, with).await?);
        }
        let claimed = claim(&with.cx, &below, Need::Reads).await;
        self.claim = claimed.map_err(from_engine)?;
        Ok(())
    }

    /// Has the overlay in the graph, and in the plan.
    async fn put_on(&mut self, with: &Preparing, plan: &mut Plan) -> Result<(), QmpError> {
        let below = self.below.clone().ok_or_else(internal_error)?;
        if let Some(opened) = self.opened.take() {
            let inserted = with.cx.commit(move |control| {
                let inserted = control.graph.insert(opened);
                inserted.map_err(from_engine)
            });
            let above = inserted.await?;
            self.effect.node_name = Some(above.name().to_owned());
            self.is_on_new_device = with.is_on_new_device(&above);
            self.above = Some(above);
        }
        let above = self.above.clone().ok_or_else(internal_error)?;
        let origin = plan.origin(&below);
        let ends = (below.clone(), above.clone());
        self.origin = Some(origin.clone());
        let checked = with.cx.commit(move |control| {
            let graph = &control.graph;
            check_overlay(graph, &ends.1)?;
            check_lead(graph, (&ends.0, &ends.1), &origin)?;
            let (origin, steps) = origin;
            graph.check_chain(&origin, steps + 1).map_err(from_engine)
        });
        checked.await?;
        let way_back = match &self.overlay {
            // What guests write to a device would be more than its creation overwrites, which is all that can be put back.
            Overlay::File(file) if !file.is_there && !self.is_on_new_device => WayBack::WrittenDown,
            // What guests write could not be told from what is there.
            Overlay::File(_) | Overlay::Node(_) => WayBack::Closed,
        };
        plan.lead(&below, &above, way_back);
        Ok(())
    }

    /// Makes the file, if it is to be made, and opens it as a node that shows nothing of another.
    async fn open(
        &mut self,
        file: OverlayFile,
        below: &Arc<Node>,
        with: &Preparing,
    ) -> Result<Opened, QmpError> {
        let OverlayFile {
            filename,
            node_name,
            format,
            is_there,
        } = file;
        if !is_there {
            let backing = backing_of(below).await?;
            if backing
                .name
                .as_deref()
                .is_some_and(|name| is_same_file(name, &filename))
            {
                return Err(QmpError::generic(
                    "Error: Trying to create an image with the same filename as the backing file",
                ));
            }
            let content = NewContent::for_disk(&format, below.size(), backing);
            let image = NewImage {
                filename: filename.clone(),
                content: content.map_err(from_engine)?,
            };
            let made = with.create_image(&image, Existing::Replace).await?;
            self.made = Some(made.path);
        }
        let options = options(&filename, node_name, &format, below)?;
        let opener = with.opener().await?;
        open(&opener, &options).await.map_err(from_engine)
    }

    async fn hold_ready(&self, held: &Held) -> Result<(), QmpError> {
        let (Some(below), Some(above)) = (&self.below, &self.above) else {
            return Err(internal_error());
        };
        let is_made = matches!(&self.overlay, Overlay::File(file) if !file.is_there);
        let size = whole_sectors(held.size(below));
        if !is_made || above.size() == size {
            return Ok(());
        }
        if self.is_on_new_device {
            return Err(QmpError::generic(format!(
                "Node '{}' changes its size, so that its overlay cannot be made on a device in the same transaction",
                below.name()
            )));
        }
        if held.changes(above) {
            return Err(QmpError::generic(format!(
                "Node '{}' changes its size, so that no snapshot of its overlay can be taken in the same transaction",
                below.name()
            )));
        }
        // Not through the node, which is held.
        let resized = above.driver().resize(size, Preallocation::Off).await;
        resized.map_err(from_engine)
    }

    /// Nobody here writes to what is below from now on: other programs may read it.
    async fn settle_below(&self, cx: &Cx) {
        let Some(below) = self.below.clone() else {
            return;
        };
        if below.behaviour().read_only {
            return;
        }
        let name = below.name().to_owned();
        let reopened = async {
            let change = NodeChange::read_only(&below, true);
            let checked = cx.commit(|control| {
                let checked = control.graph.reopen(vec![change]);
                checked.map_err(from_engine)
            });
            let ready = checked.await?.prepare().await.map_err(from_engine)?;
            let reopened = cx.commit(move |control| {
                let reopened = control.graph.reopened(ready);
                reopened.map_err(from_engine)
            });
            let removed = reopened.await?;
            removed.close().await.map_err(from_engine)
        };
        if let Err(error) = reopened.await {
            log::info!(
                "node '{name}' stays writable below its overlay: {}",
                error.desc
            );
            // What a snapshot shows is durable when the client is told of it.
            if let Err(error) = below.flush().await {
                log::error!("node '{name}', which has an overlay now: {error}");
            }
        }
    }

    /// What guests have written to the overlay goes to what is below it, and they go back there.
    async fn lead_back(&mut self, cx: &Cx) -> Result<(), QmpError> {
        let (Some(below), Some(above)) = (&self.below, self.above.clone()) else {
            return Err(internal_error());
        };
        let held = above.quiesce().await;
        if !below.behaviour().read_only {
            let written = write_down(&above, &held, below).await;
            written.map_err(from_engine)?;
        }
        let taken = cx.commit(move |control| {
            let taken = control.graph.take_out_filter(&above, "backing", &held);
            taken.map_err(from_engine)
        });
        // Closed with nobody waiting for it: the file goes.
        if let Err(error) = taken.await?.close().await {
            log::warn!("an overlay that was taken back: {error}");
        }
        self.above = None;
        Ok(())
    }

    /// As `lead_back`. Where that fails guests go on with the overlay.
    async fn try_lead_back(&mut self, cx: &Cx) -> Option<Stays> {
        let led = timeout(limits::TRANSACTION_WRITE_DOWN, self.lead_back(cx)).await;
        let error = match led {
            Ok(Ok(())) => return None,
            Ok(Err(error)) => error.desc,
            Err(_) => "it takes too long".to_owned(),
        };
        let file = self.made.clone()?;
        let device = self.device.clone().or_else(|| self.node_name.clone());
        let device = device.unwrap_or_default();
        log::error!(
            "device '{device}': what guests have written to '{}' could not be written to what is below it: {error}. \
             The transaction has failed, but the disk goes on with this overlay; it stays, and has to be opened from now on",
            file.display()
        );
        Some(Stays { device, file })
    }

    async fn take_back(&mut self, cx: &Cx) {
        self.claim = Claim::none();
        self.opened = None;
        let Overlay::File(_) = &self.overlay else {
            return;
        };
        let Some(above) = self.above.take() else {
            return;
        };
        let removed = cx.commit(move |control| Ok(control.graph.remove_unused(&above)));
        if let Ok(removed) = removed.await
            && let Err(error) = removed.close().await
        {
            log::warn!("an overlay that was to be taken back: {error}");
        }
    }
}

impl Action for ExternalSnapshot {
    fn resolve(&mut self, control: &mut Control, plan: &mut Plan) -> Result<(), QmpError> {
        let graph = &control.graph;
        let (device, node_name) = (self.device.as_deref(), self.node_name.as_deref());
        let below = plan.device_or_node(graph, device, node_name)?;
        check_below(graph, plan, &below)?;
        match &mut self.overlay {
            Overlay::Node(name) => {
                let missing = || match graph.drive(name) {
                    Some(_) => in_use(),
                    None => QmpError::generic(format!(
                        "Cannot find device='{name}' nor node-name='{name}'"
                    )),
                };
                let above = graph.node(name).cloned().ok_or_else(missing)?;
                if plan.mentions(&above) || Arc::ptr_eq(&above, &below) {
                    return Err(in_use());
                }
                check_overlay(graph, &above)?;
                self.effect.node_name = Some(name.clone());
                self.above = Some(above);
            }
            Overlay::File(file) => {
                if self.node_name.is_some() && file.node_name.is_none() {
                    return Err(QmpError::generic("New overlay node-name missing"));
                }
                let taken =
                    |name: &String| graph.node(name).is_some() || graph.drive(name).is_some();
                if file.node_name.as_ref().is_some_and(taken) {
                    return Err(QmpError::generic("New overlay node-name already in use"));
                }
                file.filename = plain_path(&file.filename).map_err(from_engine)?.to_owned();
                self.effect.filename = Some(file.filename.clone());
                self.effect.node_name.clone_from(&file.node_name);
            }
        }
        self.below = Some(below);
        Ok(())
    }

    fn concerns(&self) -> Concerns {
        let (overlay, file) = match &self.overlay {
            Overlay::Node(name) => (Some(name), None),
            Overlay::File(file) => (file.node_name.as_ref(), Some(&file.filename)),
        };
        let names = self.device.iter().chain(&self.node_name).chain(overlay);
        Concerns::These {
            names: names.cloned().collect(),
            files: file.cloned().into_iter().collect(),
            images: Vec::new(),
        }
    }

    fn prepare<'a>(&'a mut self, with: &'a Preparing) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(self.make(with))
    }

    fn enter<'a>(
        &'a mut self,
        with: &'a Preparing,
        plan: &'a mut Plan,
    ) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(self.put_on(with, plan))
    }

    fn stage<'a>(&'a mut self, held: &'a mut Held) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(self.hold_ready(held))
    }

    fn check(&self, control: &Control) -> Result<(), QmpError> {
        let (Some(below), Some(above), Some(origin)) = (&self.below, &self.above, &self.origin)
        else {
            return Err(internal_error());
        };
        check_lead(&control.graph, (below, above), origin)
    }

    fn commit(&mut self, control: &mut Control, held: &Held) {
        let (Some(below), Some(above)) = (&self.below, &self.above) else {
            return;
        };
        let quiesced = held.quiesced(below).zip(held.quiesced(above));
        let Some((one, other)) = quiesced else {
            log::error!("node '{}' is not held for its overlay", below.name());
            return;
        };
        // Checked before it was decided; since then users may have gone, and none has come.
        match control.graph.append(below, above, [one, other]) {
            Ok(()) => self.has_led = true,
            Err(error) => log::error!("the overlay of node '{}': {error}", below.name()),
        }
        self.claim = Claim::none();
    }

    fn finish<'a>(&'a mut self, cx: &'a Cx) -> BoxFuture<'a, ()> {
        Box::pin(self.settle_below(cx))
    }

    fn abort<'a>(&'a mut self, cx: &'a Cx) -> BoxFuture<'a, Option<Stays>> {
        Box::pin(async {
            if self.has_led {
                return self.try_lead_back(cx).await;
            }
            self.take_back(cx).await;
            None
        })
    }

    fn journaled(&self) -> Option<JournaledAction> {
        let device = self.device.clone().or_else(|| self.node_name.clone());
        let device = device.unwrap_or_default();
        Some(match &self.overlay {
            Overlay::Node(name) => JournaledAction {
                node_name: Some(name.clone()),
                ..JournaledAction::new(ActionKind::OverlayNode, device)
            },
            Overlay::File(file) => JournaledAction {
                node_name: file.node_name.clone(),
                filename: final_path(&file.filename).ok(),
                ..JournaledAction::new(ActionKind::OverlayFile, device)
            },
        })
    }

    fn effect(&self) -> Effect {
        self.effect.clone()
    }
}

/// Whether the graph will take an overlay on what is below it, and lead users there. Later actions may have put something on the overlay
/// by then. Guests may be waiting: chains, which get no longer by themselves, are not looked at.
fn check_lead(
    graph: &Graph,
    (below, above): (&Arc<Node>, &Arc<Node>),
    (origin, _): &(Arc<Node>, usize),
) -> Result<(), QmpError> {
    graph.check_append(below, above).map_err(from_engine)?;
    // What earlier actions will have done.
    graph.check_replace(origin, above).map_err(from_engine)
}

/// Whether a disk may get an overlay.
fn check_below(graph: &Graph, plan: &Plan, below: &Arc<Node>) -> Result<(), QmpError> {
    let taken = |reason| Err(from_engine(graph.busy(below, reason)));
    if let Some(overlay) = plan.covered_by(below) {
        return taken(Busy::Backing(overlay));
    }
    let mut parents = graph.parents(below);
    if let Some((parent, _)) = parents.find(|(_, link)| link.role == "backing") {
        return taken(Busy::Backing(parent));
    }
    let mut users = graph.users(below);
    let mut parents = graph.parents(below);
    let is_copied =
        below.driver().is_filter() || parents.any(|(parent, _)| parent.driver().is_filter());
    match is_copied || users.any(|user| matches!(user, User::Job(_))) {
        true => taken(Busy::BlockJob),
        false => Ok(()),
    }
}

/// Whether a node may be an overlay, as far as it alone decides that. Jobs write to their targets, and do not care what is read there.
fn check_overlay(graph: &Graph, above: &Arc<Node>) -> Result<(), QmpError> {
    let mut users = graph.users(above);
    let mut parents = graph.parents(above);
    if users.any(|user| !matches!(user, User::Job(_)))
        || parents.any(|(_, link)| link.role != "target")
    {
        return Err(in_use());
    }
    match above.driver().is_filter() {
        true => Err(QmpError::generic("Filters cannot be used as overlays")),
        false => Ok(()),
    }
}

fn in_use() -> QmpError {
    QmpError::generic("The overlay is already in use")
}

/// How the new image names what is below it: so that it is found from everywhere.
async fn backing_of(below: &Arc<Node>) -> Result<BackingFile, QmpError> {
    let info = below.driver().info();
    let unnamable = |what: &str| {
        QmpError::generic(format!(
            "Node '{}' {what}, which a new image cannot say of its backing file; use blockdev-snapshot",
            below.name()
        ))
    };
    if info.snapshot.is_some() {
        return Err(unnamable("shows an internal snapshot"));
    }
    let mut filename = info.filename;
    if let Some(file) = below.link("file") {
        let at = below.block_status(0, below.size().min(1)).await;
        let is_window = at.is_ok_and(|status| status.host_offset.is_some_and(|at| at > 0));
        if info.driver == "raw" && (is_window || file.size() != below.size()) {
            return Err(unnamable("shows a part of its file"));
        }
        if filename.is_empty() {
            filename = file.driver().info().filename;
        }
    }
    if let Ok(path) = std::path::absolute(Path::new(&filename))
        && let Some(path) = path.to_str()
        && info.driver != "null-co"
    {
        filename = path.to_owned();
    }
    let format = match info.driver {
        // The bytes as they are, whatever brings them.
        "file" | "host_device" => "raw",
        driver => driver,
    };
    Ok(BackingFile {
        name: Some(filename),
        format: Some(format.to_owned()),
    })
}

fn is_same_file(one: &str, other: &str) -> bool {
    let canonical = |path| std::fs::canonicalize(path).ok();
    one == other || canonical(one).is_some_and(|one| canonical(other) == Some(one))
}

/// The overlay goes on as what is below it: for reading or writing, past the page cache or not, by threads or a ring.
fn options(
    filename: &str,
    node_name: Option<String>,
    format: &str,
    below: &Node,
) -> Result<NodeOptions, QmpError> {
    let behaviour = below.behaviour();
    let file = NodeOptions {
        // The format flushes after each write; the file below it must not do so for every piece of metadata.
        cache: CacheMode {
            writethrough: false,
            ..behaviour.cache
        },
        ..NodeOptions::new(DriverOptions::File(FileOptions {
            filename: filename.to_owned(),
            aio: aio_of(below),
            locking: Locking::Auto,
        }))
    };
    let file = NodeRef::Inline(Arc::new(file));
    let driver = match format {
        "qcow2" => DriverOptions::Qcow2(Qcow2Options {
            backing: BackingOption::Detached,
            ..Qcow2Options::new(file)
        }),
        "raw" => DriverOptions::Raw(RawOptions {
            file,
            offset: None,
            size: None,
        }),
        _ => return Err(QmpError::generic(format!("Unknown driver '{format}'"))),
    };
    Ok(NodeOptions {
        node_name,
        read_only: behaviour.read_only,
        discard: behaviour.discard,
        cache: behaviour.cache,
        ..NodeOptions::new(driver)
    })
}

/// How the file below a disk is read and written.
fn aio_of(below: &Node) -> Aio {
    let mut file = below.link("file");
    while let Some(node) = file {
        let options = node.options();
        if let Some(DriverOptions::File(file) | DriverOptions::HostDevice(file)) =
            options.as_deref().map(|options| &options.driver)
        {
            return file.aio;
        }
        file = node.link("file");
    }
    Aio::default()
}

fn flushed(node: &Node, flushed: block::error::Result<()>) -> Result<(), QmpError> {
    flushed.map_err(|error| {
        let name = node.name();
        QmpError::generic(format!("Write to node '{name}' failed: {error}"))
    })
}

#[cfg(test)]
mod tests;
