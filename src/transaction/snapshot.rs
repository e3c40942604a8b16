//! The action `blockdev-snapshot-internal-sync`.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use block::driver::{BoxFuture, NewSnapshot, SnapshotInfo, SnapshotSelector};
use block::graph::Node;
use qapi::rt::QmpError;

use super::Action;

/// Takes an internal snapshot of a node that is held back.
pub(crate) struct SnapshotInternal {
    device: String,
    name: String,
    node: Arc<Node>,
    created: Option<SnapshotInfo>,
}

impl SnapshotInternal {
    /// `device` is what the client called the node.
    pub(crate) fn new(device: String, name: String, node: Arc<Node>) -> Self {
        SnapshotInternal {
            device,
            name,
            node,
            created: None,
        }
    }

    async fn create(&mut self) -> Result<(), QmpError> {
        let SnapshotInternal {
            device, name, node, ..
        } = self;
        if node.behaviour().read_only {
            return Err(QmpError::generic(format!("Device '{device}' is read only")));
        }
        let Some(snapshots) = node.driver().snapshots() else {
            return Err(QmpError::generic(format!(
                "Block format '{}' used by device '{device}' does not support internal snapshots",
                node.driver().info().driver
            )));
        };
        if name.is_empty() {
            return Err(QmpError::generic("Name is empty"));
        }
        if snapshots.list().iter().any(|info| info.name == *name) {
            return Err(QmpError::generic(format!(
                "Snapshot with name '{name}' already exists on device '{device}'"
            )));
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let new = NewSnapshot {
            name: name.clone(),
            // The image's field is as narrow, and wraps in 2106.
            date_sec: now.as_secs() as u32,
            date_nsec: now.subsec_nanos(),
            vm_clock_nsec: 0,
        };
        let created = snapshots.create(new).await.map_err(|error| {
            QmpError::generic(format!(
                "Failed to create snapshot '{name}' on device '{device}': {error}"
            ))
        })?;
        self.created = Some(created);
        Ok(())
    }

    async fn delete(&mut self) {
        let Some(created) = self.created.take() else {
            return;
        };
        let which = SnapshotSelector {
            id: Some(created.id.clone()),
            name: Some(created.name.clone()),
        };
        let deleted = match self.node.driver().snapshots() {
            Some(snapshots) => snapshots.delete(which).await.map(|_| ()),
            None => Ok(()),
        };
        if let Err(error) = deleted {
            log::error!(
                "device '{}': snapshot '{}' (id {}) of a transaction that failed could not be deleted again: {error}. \
                 Delete it with blockdev-snapshot-delete-internal-sync, or when the daemon has ended with \
                 `qemu-img snapshot -d {} {}`",
                self.device,
                created.name,
                created.id,
                created.name,
                self.node.driver().info().filename,
            );
        }
    }
}

impl Action for SnapshotInternal {
    fn prepare(&mut self) -> BoxFuture<'_, Result<(), QmpError>> {
        Box::pin(self.create())
    }

    fn abort(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(self.delete())
    }

    fn commit(self: Box<Self>) {
        // It is durable since it was created.
    }
}

#[cfg(test)]
mod tests;
