//! Persistent bitmaps: kept through our changes, and marked where these make them stale (specification: "Bitmaps").
//!
//! This driver does not track changes in bitmaps yet. What it owes to those that others have stored:
//!
//! * Before the first change of what the guest sees, each *enabled* bitmap (flag `auto`) is marked `in_use`, durably. From then on
//!   nobody concludes from its bits that something has not changed.
//! * *Disabled* bitmaps do not reflect changes and stay as they are, with the autoclear bit that vouches for them.
//! * Their directory, tables and clusters are counted, owned and not written to.
//! * The size of the disk is the size of its bitmaps: see `resize`.
//!
//! The mark is a write of 8 bytes inside a sector per bitmap, in place. A crash on the way leaves a sound directory in
//! which some of them are marked, and no data have changed yet. So the autoclear bit need not be taken back
//! meanwhile: that would lose all bitmaps to a crash.
//!
//! * `directory`: the structure in the image
//! * `table`: which clusters hold a bitmap's bits
//! * `resize`: bitmaps of a disk that changes its size

mod directory;
mod resize;
mod table;

pub(super) use directory::Directory;
pub(super) use resize::{Marked, Resize};
pub(super) use table::{cluster_of, read_table};

use std::sync::{Arc, Mutex, PoisonError};

use super::geometry::Geometry;
use super::header::Header;
use super::metadata::Metadata;
use super::owners::{Owner, Owners};
use crate::driver::{Child, PersistentBitmap};
use crate::error::{Error, ErrorKind, Result};
use crate::limits::QCOW2_MAX_BITMAP_TABLES_BYTES;
use directory::{Entry, Flags};

/// The bitmaps of an open image.
#[derive(Debug)]
pub(super) struct Bitmaps {
    /// What is on disk.
    directory: Mutex<Arc<Directory>>,
    /// Held while flags are changed, so that changes follow each other.
    changing: tokio::sync::Mutex<()>,
}

impl Bitmaps {
    /// Reads the directory. A damaged one refuses an image that is to be written; read-only the disk is more important than its
    /// bitmaps, and there are none.
    pub(super) async fn load(file: &Child, header: &Header, read_only: bool) -> Result<Self> {
        let directory = match Directory::read(file, header).await {
            Err(error) if read_only && error.kind() == ErrorKind::Corrupt => {
                log::warn!("{error}; the persistent bitmaps are ignored");
                Directory::default()
            }
            other => other?,
        };
        Ok(Bitmaps {
            directory: Mutex::new(Arc::new(directory)),
            changing: tokio::sync::Mutex::new(()),
        })
    }

    /// Puts the clusters of directory, tables and bits into the owner map.
    pub(super) async fn claim(&self, file: &Child, g: Geometry, owners: &Owners) -> Result<()> {
        let directory = self.get();
        let start = g.host_cluster(directory.offset);
        let clusters = g.clusters_for(directory.len);
        owners.claim_alone(start, clusters, Owner::BitmapDirectory)?;
        let bytes: u64 = directory.entries.iter().map(Entry::table_bytes).sum();
        if bytes > QCOW2_MAX_BITMAP_TABLES_BYTES {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "qcow2: The image has more persistent bitmaps than can be kept track of",
            ));
        }
        for entry in &directory.entries {
            let start = g.host_cluster(entry.table);
            let clusters = g.clusters_for(entry.table_bytes());
            owners.claim_alone(start, clusters, Owner::BitmapTable)?;
            read_table(file, entry, |bits| match cluster_of(g, bits) {
                Ok(None) => Ok(()),
                Ok(Some(host)) => owners.claim_alone(g.host_cluster(host), 1, Owner::Bitmap),
                Err(error) => Err(error.context(format!("'{}'", entry.name))),
            })
            .await?;
        }
        Ok(())
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.get().entries.is_empty()
    }

    /// The bitmaps for queries.
    pub(super) fn info(&self) -> Vec<PersistentBitmap> {
        let directory = self.get();
        let entries = directory.entries.iter();
        let info = entries.map(|entry| PersistentBitmap {
            name: entry.name.clone(),
            granularity: 1 << entry.granularity_bits,
            in_use: entry.flags.is_in_use(),
            auto: entry.flags.is_auto(),
        });
        info.collect()
    }

    /// Marks the enabled bitmaps `in_use`, durably. After an error they are as they were, as far as storage lets itself be
    /// written.
    pub(super) async fn mark_enabled(&self, metadata: &Metadata) -> Result<()> {
        let _changing = self.changing.lock().await;
        self.mark(metadata, |entry| entry.flags.is_auto()).await?;
        Ok(())
    }

    /// Marks those that are chosen, and answers what the directory was before.
    async fn mark(
        &self,
        metadata: &Metadata,
        chosen: impl Fn(&Entry) -> bool,
    ) -> Result<Arc<Directory>> {
        let old = self.get();
        let mut new = Directory::clone(&old);
        for entry in &mut new.entries {
            if chosen(entry) {
                entry.flags.0 |= Flags::IN_USE;
            }
        }
        if let Err(error) = self.switch(metadata, &old, new).await {
            return Err(error.context("Could not mark the persistent bitmaps as in use"));
        }
        Ok(old)
    }

    /// Writes what differs in table sizes and flags, durably; puts it back when that fails.
    async fn switch(&self, metadata: &Metadata, old: &Directory, new: Directory) -> Result<()> {
        let pairs = old.entries.iter().zip(&new.entries);
        let changed: Vec<_> = pairs.filter(|(old, new)| old != new).collect();
        if changed.is_empty() {
            return Ok(());
        }
        let done = async {
            for (_, new) in &changed {
                write_switch(metadata, new).await?;
            }
            metadata.file.flush().await
        };
        if let Err(error) = done.await {
            for (old, _) in &changed {
                if let Err(second) = write_switch(metadata, old).await {
                    // It stays marked, or half of them do: nothing is concluded from bits that may be wrong.
                    log::warn!("qcow2: bitmap '{}' may stay in use: {second}", old.name);
                }
            }
            return Err(error);
        }
        self.set(new);
        Ok(())
    }

    fn get(&self) -> Arc<Directory> {
        let directory = self.directory.lock();
        directory.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, new: Directory) {
        let mut directory = self
            .directory
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *directory = Arc::new(new);
    }
}

async fn write_switch(metadata: &Metadata, entry: &Entry) -> Result<()> {
    let (at, bytes) = entry.switch_bytes();
    let owner = Owner::BitmapDirectory;
    metadata.write(owner, at, bytes.into()).await
}

#[cfg(test)]
mod tests;
