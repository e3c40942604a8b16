//! The actions on internal snapshots: take, delete, revert.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use block::driver::{BoxFuture, NewSnapshot, SnapshotInfo, SnapshotSelector, Snapshots};
use block::error::{Error, ErrorKind};
use block::graph::{Link, Node};
use qapi::rt::QmpError;

use super::{Action, Concerns, Effect, Held, Plan};
use crate::daemon::{Control, internal_error};
use crate::journal::{ActionKind, JournaledAction};

/// An operation on the internal snapshots of a disk.
pub(crate) struct SnapshotAction {
    /// What the client calls the disk.
    device: String,
    operation: Operation,
    /// What that is.
    disk: Option<SnapshotDisk>,
    /// The snapshot that it was about, once it is prepared.
    about: Option<SnapshotInfo>,
}

struct SnapshotDisk {
    node: Arc<Node>,
    /// The nodes that show snapshots of it.
    views: Vec<Arc<Node>>,
}

/// What is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Take a snapshot of this name.
    Create {
        /// New in the image.
        name: String,
    },
    /// Delete a snapshot.
    Delete(SnapshotSelector),
    /// Make the disk what a snapshot has.
    Revert(SnapshotSelector),
}

impl SnapshotAction {
    /// An operation on the disk that the client calls `device`.
    pub(crate) fn new(device: String, operation: Operation) -> Self {
        SnapshotAction {
            device,
            operation,
            disk: None,
            about: None,
        }
    }

    /// Checks all that does not depend on what earlier actions do, with QEMU's sentences in QEMU's order: no guest is held back
    /// for what cannot succeed.
    fn check(&self, node: &Node) -> Result<(), QmpError> {
        match &self.operation {
            Operation::Create { name } => self.check_create(node, name),
            Operation::Delete(which) | Operation::Revert(which) => self.check_selector(node, which),
        }
    }

    fn check_create(&self, node: &Node, name: &str) -> Result<(), QmpError> {
        if node.behaviour().read_only {
            return Err(self.read_only());
        }
        let Some(snapshots) = node.driver().snapshots() else {
            return Err(QmpError::generic(format!(
                "Block format '{}' used by device '{}' does not support internal snapshots",
                node.driver().info().driver,
                self.device
            )));
        };
        match name {
            "" => Err(QmpError::generic("Name is empty")),
            _ => check_image(snapshots),
        }
    }

    fn check_selector(&self, node: &Node, which: &SnapshotSelector) -> Result<(), QmpError> {
        if which.id.is_none() && which.name.is_none() {
            return Err(QmpError::generic("Name or id must be provided"));
        }
        let Some(snapshots) = node.driver().snapshots() else {
            return Err(QmpError::generic(
                "Failed to get a snapshot list: Operation not supported",
            ));
        };
        check_image(snapshots)?;
        if !node.behaviour().read_only {
            return Ok(());
        }
        // No action changes this list, so that it can be looked at now.
        match snapshots.list().iter().any(|info| which.matches(info)) {
            true => Err(self.read_only()),
            false => Err(self.not_found(which)),
        }
    }

    fn read_only(&self) -> QmpError {
        match &self.operation {
            Operation::Delete(_) => QmpError::generic(
                "Failed to remove snapshot from snapshot list: Operation not permitted",
            ),
            Operation::Create { .. } | Operation::Revert(_) => {
                QmpError::generic(format!("Device '{}' is read only", self.device))
            }
        }
    }

    fn not_found(&self, which: &SnapshotSelector) -> QmpError {
        let text = |part: &Option<String>| part.clone().unwrap_or_else(|| "null".to_owned());
        QmpError::generic(format!(
            "Snapshot with id '{}' and name '{}' does not exist on device '{}'",
            text(&which.id),
            text(&which.name),
            self.device
        ))
    }

    /// How a message begins that it has failed.
    fn failure(&self) -> String {
        let named = |which: &SnapshotSelector| match (&which.name, &which.id) {
            (Some(name), _) => format!("snapshot '{name}'"),
            (None, id) => format!("snapshot with id '{}'", id.as_deref().unwrap_or_default()),
        };
        let (what, which) = match &self.operation {
            Operation::Create { name } => ("create", format!("snapshot '{name}'")),
            Operation::Delete(which) => ("delete", named(which)),
            Operation::Revert(which) => ("revert to", named(which)),
        };
        format!("Failed to {what} {which} on device '{}'", self.device)
    }

    /// The engine's error as the client sees it.
    fn error(&self, error: &Error) -> QmpError {
        let device = &self.device;
        match (&self.operation, error.kind()) {
            (Operation::Create { name }, ErrorKind::AlreadyExists) => QmpError::generic(format!(
                "Snapshot with name '{name}' already exists on device '{device}'"
            )),
            (Operation::Delete(which) | Operation::Revert(which), ErrorKind::NotFound) => {
                self.not_found(which)
            }
            (Operation::Delete(which), ErrorKind::InUse) => {
                let reason = match self.view_of(which) {
                    Some(view) => format!("node '{view}' shows it"),
                    None => error.to_string(),
                };
                QmpError::generic(format!("{}: {reason}", self.failure()))
            }
            _ => QmpError::generic(format!("{}: {error}", self.failure())),
        }
    }

    /// A node that shows the snapshot.
    fn view_of(&self, which: &SnapshotSelector) -> Option<&str> {
        let shows = |info: Option<SnapshotInfo>| info.is_some_and(|info| which.matches(&info));
        let mut views = self.disk.as_ref()?.views.iter();
        let view = views.find(|view| shows(view.driver().info().snapshot))?;
        Some(view.name())
    }

    async fn step(&mut self, held: &mut Held) -> Result<(), QmpError> {
        let Some(disk) = &self.disk else {
            return Err(internal_error());
        };
        let done = match held.change(&disk.node, &self.failure()) {
            Err(error) => Err(error),
            Ok(change) => match &self.operation {
                Operation::Create { name } => change.create(new_snapshot(name)).await,
                Operation::Delete(which) => change.delete(which.clone()).await,
                Operation::Revert(which) => change.revert(which.clone()).await,
            },
        };
        self.about = Some(done.map_err(|error| self.error(&error))?);
        Ok(())
    }
}

/// Whether an image of a driver with snapshots is one that can have them.
fn check_image(snapshots: &dyn Snapshots) -> Result<(), QmpError> {
    let checked = snapshots.check();
    checked.map_err(|error| QmpError::generic(error.to_string()))
}

fn new_snapshot(name: &str) -> NewSnapshot {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    NewSnapshot {
        name: name.to_owned(),
        // The image's field is as narrow, and wraps in 2106.
        date_sec: now.as_secs() as u32,
        date_nsec: now.subsec_nanos(),
        vm_clock_nsec: 0,
    }
}

impl Action for SnapshotAction {
    fn resolve(&mut self, control: &mut Control, plan: &mut Plan) -> Result<(), QmpError> {
        let node = plan.device(&control.graph, &self.device)?;
        if !plan.is_root(&control.graph, &node) {
            return Err(QmpError::generic("Need a root block node"));
        }
        // Snapshots are the image's. All that change them, by way of a filter or not, share one change.
        let disk = node.below_filters();
        let is_copied = !Arc::ptr_eq(&disk, &node);
        if is_copied && matches!(self.operation, Operation::Revert(_)) {
            return Err(QmpError::generic(format!(
                "Device '{}' is being copied by a job and cannot go back meanwhile",
                self.device
            )));
        }
        let node = disk;
        self.check(&node)?;
        let views = control.graph.parents(&node);
        let views = views.filter(|(_, link)| link.role == Link::IMAGE);
        let views = views.map(|(view, _)| view.clone()).collect();
        plan.change_snapshots(&self.device, &node);
        if matches!(self.operation, Operation::Revert(_)) {
            // What the guest sees must not be taken back once it has seen it.
            plan.hold_until_decided(&node);
        }
        self.disk = Some(SnapshotDisk { node, views });
        Ok(())
    }

    fn concerns(&self) -> Concerns {
        Concerns::Resolved {
            names: vec![self.device.clone()],
        }
    }

    fn stage<'a>(&'a mut self, held: &'a mut Held) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(self.step(held))
    }

    fn stages_ahead(&self) -> bool {
        !matches!(self.operation, Operation::Create { .. })
    }

    fn journaled(&self) -> Option<JournaledAction> {
        let by = |which: &SnapshotSelector| which.name.clone().or_else(|| which.id.clone());
        let (kind, snapshot) = match &self.operation {
            Operation::Create { name } => (ActionKind::Create, Some(name.clone())),
            Operation::Delete(which) => (ActionKind::Delete, by(which)),
            Operation::Revert(which) => (ActionKind::Revert, by(which)),
        };
        Some(JournaledAction {
            snapshot,
            ..JournaledAction::new(kind, self.device.clone())
        })
    }

    fn effect(&self) -> Effect {
        Effect {
            snapshot: self.about.clone(),
            ..Effect::default()
        }
    }
}

#[cfg(test)]
mod tests;
