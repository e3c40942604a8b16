//! Bitmaps of a disk that changes its size.
//!
//! A bitmap has as many bits as its disk needs, and its table as many entries, unless it is `in_use`. So before the size is
//! switched those are marked that it makes stale or whose table does not fit; afterwards those are fitted and vouched for again
//! for which that takes no more than a longer table in its old place:
//!
//! | bitmap | the disk grows | the disk shrinks |
//! |---|---|---|
//! | enabled | stays `in_use` | stays `in_use` |
//! | disabled, table has the right size | untouched | stays `in_use` |
//! | disabled, table has room in its clusters | marked, fitted | stays `in_use` |
//! | disabled, table would have to move | stays `in_use` | stays `in_use` |
//!
//! When the resize fails, the marks are taken back. A revert to a snapshot marks in the same way, and fits nothing.

use std::sync::Arc;

use super::directory::{Entry, Flags};
use super::{Bitmaps, Directory};
use crate::error::Result;
use crate::formats::qcow2::geometry::Geometry;
use crate::formats::qcow2::metadata::Metadata;
use crate::formats::qcow2::owners::Owner;
use crate::io::Data;
use crate::limits::QCOW2_MAX_BITMAP_BYTES;

/// A change of the disk's size, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Resize {
    pub(crate) old: u64,
    pub(crate) new: u64,
}

/// What the directory was before the resize.
#[derive(Debug)]
pub(crate) struct Marked(Arc<Directory>);

impl Bitmaps {
    /// Before the size changes: marks the bitmaps that it makes stale, durably. The image is quiet until `fit` or `unmark`.
    pub(crate) async fn mark_resized(
        &self,
        metadata: &Metadata,
        g: Geometry,
        resize: Resize,
    ) -> Result<Marked> {
        let _changing = self.changing.lock().await;
        let stale = |entry: &Entry| {
            entry.flags.is_auto()
                || resize.new < resize.old
                || u64::from(entry.table_entries) < entry.entries_for(g, resize.new)
        };
        self.mark(metadata, stale).await.map(Marked)
    }

    /// The size has not changed: the bitmaps are what they were.
    pub(crate) async fn unmark(&self, metadata: &Metadata, marked: Marked) {
        let _changing = self.changing.lock().await;
        let now = self.get();
        if let Err(error) = self
            .switch(metadata, &now, Directory::clone(&marked.0))
            .await
        {
            log::warn!("qcow2: persistent bitmaps stay in use: {error}");
        }
    }

    /// The new size is durable: fits the disabled bitmaps for which that is easy. An error leaves them in use.
    pub(crate) async fn fit(
        &self,
        metadata: &Metadata,
        g: Geometry,
        resize: Resize,
        marked: Marked,
    ) {
        let _changing = self.changing.lock().await;
        let now = self.get();
        let mut fitted = Directory::clone(&now);
        for (entry, before) in fitted.entries.iter_mut().zip(&marked.0.entries) {
            if entry.flags == before.flags {
                continue;
            }
            if !fits(entry, g, resize) {
                log::warn!("qcow2: bitmap '{}' is of no use after a resize", entry.name);
                continue;
            }
            match lengthen(metadata, entry, entry.entries_for(g, resize.new)).await {
                Ok(()) => entry.flags.0 &= !Flags::IN_USE,
                Err(error) => log::warn!("qcow2: bitmap '{}' stays in use: {error}", entry.name),
            }
        }
        if fitted == *now {
            return;
        }
        let switched = async {
            // The new entries are there before the size says so.
            metadata.file.flush().await?;
            self.switch(metadata, &now, fitted).await
        };
        if let Err(error) = switched.await {
            log::warn!("qcow2: persistent bitmaps stay in use: {error}");
        }
    }
}

/// Whether a longer table in the same clusters is all that a marked bitmap needs.
fn fits(entry: &Entry, g: Geometry, resize: Resize) -> bool {
    let needed = entry.entries_for(g, resize.new);
    !entry.flags.is_auto()
        && resize.new > resize.old
        && needed <= QCOW2_MAX_BITMAP_BYTES >> g.cluster_bits()
        && g.clusters_for(needed * 8) == g.clusters_for(entry.table_bytes())
}

/// Writes entries that say "all zeroes" behind those of the table. Nobody reads them before its size has changed.
async fn lengthen(metadata: &Metadata, entry: &mut Entry, needed: u64) -> Result<()> {
    let more = Data::zeroes(needed * 8 - entry.table_bytes());
    let at = entry.table + entry.table_bytes();
    metadata.write(Owner::BitmapTable, at, more).await?;
    entry.table_entries = needed as u32;
    Ok(())
}
