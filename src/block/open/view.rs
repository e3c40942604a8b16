//! Internal snapshots as nodes: what `x-snapshot` makes of an image, which goes on being used as before.

use std::sync::Arc;

use super::options::{DriverOptions, NodeOptions, NodeRef, Qcow2Options};
use super::{Opening, Parts, behaviour, invalid};
use crate::driver::{Need, SnapshotInfo, SnapshotSelector};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Access, Link, Node};

/// A view depends on nothing that happens to the image but the deletion of its snapshot, which the driver refuses.
const ACCESS: Access = Access {
    writes: false,
    shares_writes: true,
};

impl Opening {
    /// A node that shows a snapshot of an image that is open, or of one that is opened for this, read-only.
    pub(super) async fn open_view(
        &mut self,
        qcow2: &Qcow2Options,
        options: &NodeOptions,
        depth: usize,
    ) -> Result<Parts> {
        let options = NodeOptions {
            read_only: true,
            ..options.clone()
        };
        let below = self.child(&qcow2.file, &options, depth).await?;
        if let Err(error) = self.claim([Some(&below)], Need::Reads).await {
            return Err(match error.kind() {
                ErrorKind::InUse => self.open_here(&qcow2.file).unwrap_or(error),
                _ => error,
            });
        }
        let image = match below.driver().snapshots() {
            Some(_) => {
                check_nothing_else(qcow2, &below)?;
                below
            }
            None => self.open_image(qcow2, &options, below, depth).await?,
        };
        let Some(snapshots) = image.driver().snapshots() else {
            return Err(invalid(
                "Images of this driver have no snapshots".to_owned(),
            ));
        };
        let wanted = qcow2.snapshot.as_deref().unwrap_or_default();
        let Some(which) = select(&snapshots.list(), wanted) else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "There is no snapshot with id or name '{wanted}' in '{}'",
                    image.driver().info().filename
                ),
            ));
        };
        let view = snapshots.view(which).await?;
        let links = vec![Link::new(Link::IMAGE, &image, ACCESS)];
        Ok((view, links, true))
    }

    /// The image that is in `file`, as a node between the file and the view.
    async fn open_image(
        &mut self,
        qcow2: &Qcow2Options,
        options: &NodeOptions,
        file: Arc<Node>,
        depth: usize,
    ) -> Result<Arc<Node>> {
        if let Some(shown) = file.driver().info().snapshot {
            return Err(invalid(format!(
                "Node '{}' shows snapshot '{}', which has no snapshots of its own",
                file.name(),
                shown.name
            )));
        }
        let is_below = |below: Arc<Node>| Arc::ptr_eq(&below, &file);
        if let Some(image) = self.image(|node| node.link("file").is_some_and(is_below)) {
            return Err(make_it_the_file(file.name(), &image));
        }
        let qcow2 = Qcow2Options {
            snapshot: None,
            ..qcow2.clone()
        };
        let name = self.opener.names.next();
        let opened = self.open_qcow2(&qcow2, (&name, options), file, depth);
        let (driver, links, read_only) = opened.await?;
        let node = Node::new(name, driver, behaviour(options, read_only)?, links);
        self.nodes.push(node.clone());
        Ok(node)
    }

    /// Why a file cannot be opened, if an image in it is open here.
    fn open_here(&self, file: &NodeRef) -> Option<Error> {
        let NodeRef::Inline(options) = file else {
            return None;
        };
        let (DriverOptions::File(file) | DriverOptions::HostDevice(file)) = &options.driver else {
            return None;
        };
        let image = self.image(|node| node.driver().info().filename == file.filename)?;
        Some(make_it_the_file(&file.filename, &image))
    }

    /// The name of an image that is open, as a user knows it if there is such a name: drives' roots have two.
    fn image(&self, is_wanted: impl Fn(&Node) -> bool) -> Option<String> {
        let images = self.opener.directory.all().into_iter();
        let images =
            images.filter(|(_, node)| node.driver().snapshots().is_some() && is_wanted(node));
        let names = images.map(|(name, _)| (name.starts_with('#'), name));
        names.min().map(|(_, name)| name)
    }
}

fn make_it_the_file(place: &str, image: &str) -> Error {
    Error::new(
        ErrorKind::InUse,
        format!(
            "The image in '{place}' is open as '{image}': make that the 'file' to show a snapshot of it"
        ),
    )
}

/// How an open image is used has been decided where it was opened.
fn check_nothing_else(asked: &Qcow2Options, image: &Node) -> Result<()> {
    let plain = Qcow2Options {
        snapshot: asked.snapshot.clone(),
        ..Qcow2Options::new(asked.file.clone())
    };
    if *asked == plain {
        return Ok(());
    }
    Err(invalid(format!(
        "Node '{}' is open, so that only 'x-snapshot' and 'file' can be given with driver 'qcow2' on it",
        image.name()
    )))
}

/// An id wins over a name, as for `qemu-img -l`: ids are unique, and a name can be any text.
fn select(list: &[SnapshotInfo], wanted: &str) -> Option<SnapshotSelector> {
    let by_id = list.iter().find(|info| info.id == wanted);
    let found = by_id.or_else(|| list.iter().find(|info| info.name == wanted))?;
    Some(SnapshotSelector {
        id: Some(found.id.clone()),
        name: Some(found.name.clone()),
    })
}
