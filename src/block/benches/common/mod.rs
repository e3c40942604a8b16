//! What the benches of copies share.

use std::sync::Arc;

use block::copy::{CopyHooks, OnCopyError, Progress, Side};
use block::driver::{BoxFuture, Driver, SnapshotSource, Snapshots};
use block::error::Error;
use block::formats::qcow2::Qcow2;

/// Neither pauses nor slows a copy, and takes no error.
pub(crate) struct Owner;

impl CopyHooks for Owner {
    fn admit(&self, _bytes: u64) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn progress(&self, _progress: Progress) {}

    fn on_error(&self, _side: Side, _error: &Error) -> BoxFuture<'_, OnCopyError> {
        Box::pin(async { OnCopyError::Fail })
    }
}

/// The snapshots of an image that is no node.
pub(crate) struct Disk(pub(crate) Arc<Qcow2>);

impl SnapshotSource for Disk {
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        self.0.snapshots()
    }
}
