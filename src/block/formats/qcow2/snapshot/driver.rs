//! Snapshots of an open image: the contract of [`Snapshots`].

use std::sync::Arc;

use super::change::Change;
use super::view::view;
use crate::driver::{BoxFuture, Driver, SnapshotChange, SnapshotInfo, SnapshotSelector, Snapshots};
use crate::error::Result;
use crate::formats::qcow2::Qcow2;
use crate::formats::qcow2::header::Version;

impl Snapshots for Qcow2 {
    fn check(&self) -> Result<()> {
        self.image.data.check_snapshots()
    }

    fn holds_requests(&self) -> bool {
        self.image.header.get().version == Version::V2
    }

    fn list(&self) -> Vec<SnapshotInfo> {
        if self.check().is_err() {
            return Vec::new();
        }
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
            image.data.check_snapshots()?;
            let change: Box<dyn SnapshotChange> = Box::new(Change::begin(image).await?);
            Ok(change)
        }))
    }

    fn view(&self, which: SnapshotSelector) -> BoxFuture<'_, Result<Arc<dyn Driver>>> {
        let image = self.image.clone();
        Box::pin(async move {
            image.data.check_snapshots()?;
            view(image, which).await
        })
    }
}
