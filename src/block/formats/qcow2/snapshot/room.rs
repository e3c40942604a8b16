//! Clusters for the tables of a change of snapshots, taken while requests go on.
//!
//! They have been written to, so that a change that has let requests go does not meet a full disk. Most changes take one snapshot, or
//! delete one. Where there is no room, or a change needs more, it looks for space itself, while requests wait.

use crate::error::Result;
use crate::formats::qcow2::alloc::Reserved;
use crate::formats::qcow2::geometry::ENTRY_SIZE;
use crate::formats::qcow2::image::Image;
use crate::formats::qcow2::owners::Owner;
use crate::units::ClusterIndex;

/// Bytes by which one more snapshot makes the table longer, unless its name is long.
const ENTRY: usize = 256;

/// The clusters that nobody has taken yet. They give themselves back.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// For the snapshot table, with space for so many bytes.
    table: Option<(Reserved, usize)>,
    /// For a copy of the active L1 table.
    l1: Option<Reserved>,
    /// The first cluster of the copy that was taken.
    taken: Option<ClusterIndex>,
}

impl Room {
    /// Takes what can be had.
    pub(super) async fn new(image: &Image) -> Self {
        let mut room = Room::default();
        if let Err(error) = room.fill(image).await {
            log::debug!("qcow2: no room for tables of snapshots yet: {error}");
        }
        room
    }

    async fn fill(&mut self, image: &Image) -> Result<()> {
        if image.g.refcount_max() < 2 {
            // An image that has no snapshots.
            return Ok(());
        }
        let len = image.snapshots.get().encoded_len()? + ENTRY;
        // First: on a full disk that of a deleted snapshot may be the only place.
        let table = image.write_snapshot_table(vec![0; len]).await?;
        self.table = Some((table, len));
        let bytes = image.l1().len() * ENTRY_SIZE as usize;
        let clusters = image.g.clusters_for(bytes as u64);
        if clusters == 0 {
            return Ok(());
        }
        let l1 = {
            let mut alloc = image.alloc.lock().await;
            alloc.allocate_metadata(clusters, Owner::L1Table).await?
        };
        let zeroes = vec![0; bytes];
        image.write_area(Owner::L1Table, &l1, zeroes).await?;
        self.l1 = Some(l1);
        Ok(())
    }

    /// The clusters for an L1 table, if it is so long.
    pub(super) fn take_l1(&mut self, clusters: u64) -> Option<Reserved> {
        let area = self.l1.take_if(|area| area.run().count == clusters)?;
        self.taken = Some(area.run().start);
        Some(area)
    }

    /// Whether an area was taken here.
    pub(super) fn has_space(&self, area: &Reserved) -> bool {
        self.taken == Some(area.run().start)
    }

    /// The clusters for a snapshot table of so many bytes, if they fit.
    pub(super) fn take_table(&mut self, clusters: u64, bytes: usize) -> Option<Reserved> {
        let fits = |(area, space): &mut (Reserved, usize)| {
            bytes > 0 && bytes <= *space && area.run().count == clusters
        };
        self.table.take_if(fits).map(|(area, _)| area)
    }
}
