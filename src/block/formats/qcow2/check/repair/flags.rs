//! COPIED flags of the active layer.

use std::sync::Arc;

use bytes::Bytes;

use super::Mender;
use crate::driver::WriteFlags;
use crate::error::Result;
use crate::formats::qcow2::check::counts::Bitmap;
use crate::formats::qcow2::check::report::Repair;
use crate::formats::qcow2::entry::{L1Entry, l2_entries};
use crate::formats::qcow2::geometry::{ENTRY_SIZE, Geometry};
use crate::formats::qcow2::runs::{changed_pieces, map_clusters};
use crate::units::HostOffset;

/// What tells right flags from wrong ones, on any thread.
#[derive(Clone)]
struct Judge {
    g: Geometry,
    /// Clusters that are used once.
    ones: Arc<Bitmap>,
    low: Arc<Bitmap>,
    what: Repair,
    /// Guest data lie in an external data file, where each cluster has one user.
    data_outside: bool,
}

impl Judge {
    /// As `judge`, for a data cluster.
    fn judge_data(&self, host: HostOffset, copied: bool) -> (bool, bool) {
        match self.data_outside {
            false => self.judge(host, copied),
            true => (copied || self.what == Repair::All, true),
        }
    }

    /// The flag that an entry is to have, and whether that is the right one.
    fn judge(&self, host: HostOffset, copied: bool) -> (bool, bool) {
        let cluster = self.g.host_cluster(host).0;
        let right = self.ones.get(cluster);
        match self.what {
            Repair::All => (right, true),
            // A leak that is given back leaves a count of 1 to entries without the flag; other flags are not its matter.
            Repair::Leaks if copied => (true, right),
            Repair::Leaks => (right && !self.low.get(cluster), true),
        }
    }
}

/// What becomes of one L2 table.
#[derive(Default)]
struct Changed {
    /// What is written.
    pieces: Vec<(HostOffset, Bytes)>,
    /// Flags that change.
    flags: u64,
    /// Flags that are wrong and stay.
    left: u64,
}

impl Judge {
    fn table(&self, offset: HostOffset, table: &[u8]) -> Changed {
        let mut changed = Changed::default();
        let mut bytes = None;
        for (index, entry) in l2_entries(self.g, table).enumerate() {
            let Some(host) = entry.host_cluster() else {
                continue;
            };
            let (copied, right) = self.judge_data(host, entry.is_copied());
            changed.left += u64::from(!right);
            if copied != entry.is_copied() {
                changed.flags += 1;
                let bytes = bytes.get_or_insert_with(|| table.to_vec());
                entry.with_copied(copied).put(self.g, bytes, index);
            }
        }
        if let Some(bytes) = bytes {
            changed.pieces = changed_pieces(offset, table, &bytes.into());
        }
        changed
    }
}

impl Mender<'_> {
    /// Makes COPIED say "counted once" in the active L1 table and its L2 tables. Only what changes is written.
    pub(super) async fn correct_flags(&mut self) -> Result<()> {
        let judge = Judge {
            g: self.g,
            ones: Arc::new(self.counts.ones()?),
            low: self.low.clone(),
            what: self.what,
            data_outside: self.header.has_data_file(),
        };
        let tables = self.correct_l1(&judge).await?;
        if let Some(progress) = &self.progress {
            progress.expect(tables.len());
        }
        for offsets in tables.chunks(self.batch()) {
            let mut writes = Vec::new();
            let work = {
                let (judge, offsets) = (judge.clone(), offsets.to_vec());
                move |nth: usize, table: &[u8]| judge.table(offsets[nth], table)
            };
            let (file, cluster_size) = (self.file, self.g.cluster_size());
            map_clusters(file, offsets, cluster_size, work, |nth, changed| {
                self.left += changed.left;
                if changed.flags > 0 {
                    let (at, flags) = (offsets[nth], changed.flags);
                    self.fixed(flags, || {
                        format!("ERROR L2 table at {at}: OFLAG_COPIED of {flags} entries")
                    });
                    writes.extend(changed.pieces);
                }
                if let Some(progress) = &self.progress {
                    progress.advance();
                }
                Ok(())
            })
            .await?;
            self.write(&writes).await?;
        }
        Ok(())
    }

    /// Corrects the active L1 table; answers where its L2 tables lie, in order.
    async fn correct_l1(&mut self, judge: &Judge) -> Result<Vec<HostOffset>> {
        let at = self.header.l1_table_offset.0;
        let len = u64::from(self.header.l1_size) * ENTRY_SIZE;
        let mut l1 = self.file.read(at, len).await?.to_bytes().to_vec();
        let mut tables = Vec::new();
        let mut changed: Option<std::ops::Range<usize>> = None;
        for (index, bytes) in l1.as_chunks_mut().0.iter_mut().enumerate() {
            let entry = L1Entry(u64::from_be_bytes(*bytes));
            let Some(l2) = entry.l2_offset() else {
                continue;
            };
            tables.push(l2);
            let (copied, right) = judge.judge(l2, entry.is_copied());
            self.left += u64::from(!right);
            if copied != entry.is_copied() {
                *bytes = entry.with_copied(copied).0.to_be_bytes();
                let first = changed.map_or(index, |range| range.start);
                changed = Some(first..index + 1);
                self.fixed(1, || {
                    format!("ERROR active L1 table, entry {index}: OFLAG_COPIED")
                });
            }
        }
        if let Some(entries) = changed {
            self.mark().await?;
            let bytes = entries.start * ENTRY_SIZE as usize..entries.end * ENTRY_SIZE as usize;
            let part = Bytes::copy_from_slice(&l1[bytes.clone()]);
            self.file
                .write(at + bytes.start as u64, part.into(), WriteFlags::default())
                .await?;
        }
        tables.sort_unstable();
        tables.dedup();
        Ok(tables)
    }
}
