//! Counting what a change of snapshots takes: behind the header's switch where no counter can become too narrow, and before it elsewhere.

use super::settling::{self, sum};
use super::staged::Staged;
use crate::error::{ErrorKind, Result};
use crate::formats::qcow2::alloc::Run;
use crate::formats::qcow2::geometry::Geometry;
use crate::formats::qcow2::header::Version;
use crate::formats::qcow2::image::Image;
use crate::units::ClusterIndex;

/// When what a change takes is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Counting {
    /// Before the header's switch.
    Before,
    /// Behind it, under the dirty bit.
    Behind,
}

/// What counters have to hold beside what is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Margin {
    /// Nothing: requests are held back.
    None,
    /// What requests that go on refer to once more, until the change has happened.
    Guests,
}

/// References that one L2 table takes over from another, so that no counter changes.
#[derive(Debug)]
pub(super) struct PassedOn {
    pub(super) from: ClusterIndex,
    pub(super) to: ClusterIndex,
    pub(super) references: Vec<Run>,
}

impl Staged {
    /// Counts what is taken, unless that can be done behind the switch.
    pub(super) async fn count(&mut self) -> Result<()> {
        self.changes = sum(std::mem::take(&mut self.changes));
        if self.image.settling.has_passed_on() {
            // Nothing else may be owed of those tables.
            let image = &self.image;
            image.settle_all(None, &image.stop_punching().await).await?;
        }
        match self.may_count_behind().await {
            true => self.counting = Counting::Behind,
            false => self.count_takes().await?,
        }
        Ok(())
    }

    /// Whether no counter can become too narrow when what the change takes is counted behind it.
    pub(super) async fn may_count_behind(&self) -> bool {
        if self.old.version == Version::V2 {
            return false;
        }
        let more = self.changes.iter().map(|change| change.more).max();
        let more = u64::try_from(more.unwrap_or(0)).unwrap_or(0);
        let tables = self.table.entries().len() as u64;
        let image = &self.image;
        image.counters_are_wide(tables, more, Margin::None).await
    }

    /// Counts what the change takes, in memory and in the file, and takes the flags off what will be shared. On error the
    /// counts are undone; flags may go at any time.
    async fn count_takes(&mut self) -> Result<()> {
        let takes = self.takes();
        let image = self.image.clone();
        // Also those that as many L1 tables have as before: nobody has kept up the flags of tables that only snapshots had.
        for table in self.activated() {
            image.clear_flags(table).await?;
            image.relieve().await;
        }
        if takes.is_empty() {
            return Ok(());
        }
        // What counters have to hold is known only when nothing is owed.
        image.settle_all(None, &image.stop_punching().await).await?;
        image
            .settling
            .apply(image.g, &takes, &self.before, &self.before);
        self.counted = takes.clone();
        let counted = async {
            for change in &takes {
                self.count_take(*change).await?;
                image.clear_flags(change.table).await?;
                image.relieve().await;
            }
            Ok(())
        };
        let counted = counted.await;
        if counted.is_err() {
            self.uncount_takes();
            if let Err(error) = image.settle_all(None, &image.stop_punching().await).await {
                log::warn!("qcow2: references of a failed snapshot are still counted: {error}");
            }
            if let Err(error) = image.write_back().await {
                log::warn!("qcow2: write-back failed, a flush will try again: {error}");
            }
        }
        counted
    }

    /// Counts what the change takes of one L2 table. Where a counter is too narrow for the time until the table that leaves this
    /// place is settled, that table passes on what both have.
    async fn count_take(&mut self, take: settling::Change) -> Result<()> {
        let image = self.image.clone();
        let error = match image.settle_table(take.table).await {
            Err(error) if error.kind() == ErrorKind::OutOfRange => error,
            result => return result,
        };
        let mut drops = self.changes.iter();
        let drop = drops.find(|change| change.slot == take.slot && change.more == -1);
        let (Some(drop), 1) = (drop, take.more) else {
            return Err(error);
        };
        let (from, to) = (drop.table, take.table);
        if self.passed_on.iter().any(|passed| passed.from == from) {
            return Err(error);
        }
        let references = image.common(from, to).await?;
        image.settle_table_but(to, &references).await?;
        self.passed_on.push(PassedOn {
            from,
            to,
            references,
        });
        Ok(())
    }

    pub(super) fn uncount_takes(&mut self) {
        for passed in self.passed_on.drain(..) {
            self.image.settling.pass_on(passed.to, passed.references);
        }
        let mut changes = std::mem::take(&mut self.counted);
        changes.iter_mut().for_each(|change| change.more *= -1);
        let image = &self.image;
        let settling = &image.settling;
        settling.apply(image.g, &changes, &self.before, &self.before);
    }
}

impl Image {
    /// Whether no counter can become too narrow with so many snapshots when tables that are counted behind a change get so many
    /// references more.
    pub(super) async fn counters_are_wide(
        &self,
        snapshots: u64,
        more: u64,
        margin: Margin,
    ) -> bool {
        let (g, burden) = (self.g, self.settling.burden());
        let lacking = burden.lacking + more;
        let mut alloc = self.alloc.lock().await;
        // Each L1 table counts a cluster once, or once for each compressed stream in it. One more for the quarantine.
        let tables = 1 + snapshots + burden.drops;
        let by_tables = (tables + 1) * most_streams(g) <= g.refcount_max();
        // Each table that reaches a cluster has at least one reference in its count, and lacks so many at most.
        let most = alloc.greatest_of_all().map(|most| match margin {
            Margin::None => most,
            // Where a table is copied that is active, all below it count once more; and it is not copied again.
            Margin::Guests => most.saturating_mul(2),
        });
        let by_counts =
            most.is_some_and(|most| most.saturating_mul(lacking + 1) <= g.refcount_max());
        if by_tables || by_counts {
            alloc.limit_streams(g.refcount_max() / (lacking + 1));
        }
        by_tables || by_counts
    }
}

/// Looks for the greatest refcount where the number of snapshots alone does not say that all counters are wide enough.
pub(super) async fn look_for_greatest(image: &Image) -> Result<()> {
    let g = image.g;
    let header = image.header.get();
    let tables = u64::from(header.nb_snapshots) + 2 + image.settling.burden().drops;
    if header.version == Version::V2 || (tables + 1) * most_streams(g) <= g.refcount_max() {
        return Ok(());
    }
    // A piece at a time: guests allocate in between.
    while !image.alloc.lock().await.look_for_greatest().await? {}
    Ok(())
}

/// How many compressed streams may lie in one host cluster: each is as long at least as that of a cluster of equal bytes,
/// by deflate (1032 bytes for one) or zstd (4 bytes for 128 KiB, and a header).
fn most_streams(g: Geometry) -> u64 {
    let size = g.cluster_size();
    let deflate = 5 + size / 1032;
    let zstd = 8 + 4 * size.div_ceil(128 << 10);
    size / deflate.min(zstd)
}
