//! Snapshots of an open image: the contract of [`Snapshots`].

use super::change::Change;
use crate::driver::{BoxFuture, SnapshotChange, SnapshotInfo, Snapshots};
use crate::error::Result;
use crate::formats::qcow2::Qcow2;

impl Snapshots for Qcow2 {
    fn list(&self) -> Vec<SnapshotInfo> {
        let size = self.image.size();
        let table = self.image.snapshots.get();
        table
            .entries()
            .iter()
            .map(|entry| entry.info(size))
            .collect()
    }

    fn change(&self) -> BoxFuture<'_, Result<Box<dyn SnapshotChange>>> {
        Box::pin(self.run(|image| async move {
            let change: Box<dyn SnapshotChange> = Box::new(Change::begin(image).await?);
            Ok(change)
        }))
    }
}
