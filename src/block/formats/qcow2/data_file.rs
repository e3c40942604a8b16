//! Where the guest's data lie: in the image's own file, or in an external data file (specification: incompatible bit 2).
//!
//! ```text
//!                own file                          external data file
//! place          where the allocator says          guest offset == host offset
//! refcounts      one per reference                 none: nobody else can refer to a cluster
//! allocated      the entry has a host offset       ... or is COPIED: offset 0 is a place as any other
//! given back     by way of the quarantine          at once, under the range lock: nobody else gets the cluster
//! ```
//!
//! A cluster of an external file is given back by writing zeroes to it, or by a discard, before the entry that says so is
//! durable. After a crash in between the guest sees either what was there or zeroes, as after any zero write that
//! no flush has followed.
//!
//! A *raw* data file can be read as an image by itself (autoclear bit 1). What the guest zeroes or discards in it is zeroed
//! or discarded in the file, and the entries stay as they are.

use std::sync::atomic::{AtomicBool, Ordering};

use super::alloc::{Reserved, Run};
use super::entry::{AtStart, BadEntry, L2Entry, Mapping, PlainCluster};
use super::geometry::{Geometry, GuestCluster};
use super::header::{Autoclear, Header};
use super::image::Image;
use super::subclusters::{State, Subclusters, mask};
use crate::driver::{BlockStatus, Child, Preallocation, ZeroFlags};
use crate::error::{Error, ErrorKind, Result};
use crate::events::HostBytes;
use crate::units::{ClusterIndex, HostOffset};

/// The file that holds the guest's data.
#[derive(Debug)]
pub(super) struct DataFile {
    child: Child,
    is_external: bool,
    is_raw: AtomicBool,
}

impl DataFile {
    /// For the image with this header: `external`, which it needs if its header says so and may not have otherwise, or its
    /// own file.
    pub(super) fn new(header: &Header, own: &Child, external: Option<Child>) -> Result<Self> {
        match (header.has_data_file(), external) {
            (false, None) => Ok(DataFile {
                child: own.clone(),
                is_external: false,
                is_raw: AtomicBool::new(false),
            }),
            (true, Some(child)) => Self::external(header, child),
            (true, None) => Err(required(header)),
            (false, Some(_)) => Err(invalid(
                "'data-file' can only be set for images with an external data file",
            )),
        }
    }

    fn external(header: &Header, child: Child) -> Result<Self> {
        // A file that is too short reads as zeroes behind its end and grows; a device does not.
        if !child.limits().growable && child.size() < header.size {
            return Err(invalid(format!(
                "The data file has {} bytes, fewer than the {} of the disk",
                child.size(),
                header.size
            )));
        }
        Ok(DataFile {
            child,
            is_external: true,
            is_raw: header.autoclear.has(Autoclear::DATA_FILE_RAW).into(),
        })
    }

    /// A raw image shows nothing of another.
    pub(super) fn check_backing(&self, has_backing: bool) -> Result<()> {
        match self.is_raw() && has_backing {
            true => Err(invalid(
                "An image with a raw data file cannot have a backing file",
            )),
            false => Ok(()),
        }
    }

    /// The file.
    pub(super) fn child(&self) -> &Child {
        &self.child
    }

    /// It is another file than that of the metadata.
    pub(super) fn is_external(&self) -> bool {
        self.is_external
    }

    /// It can be read as a raw image.
    pub(super) fn is_raw(&self) -> bool {
        self.is_raw.load(Ordering::Acquire)
    }

    /// It need not be readable as a raw image any more. Nobody is inside the gate.
    pub(super) fn is_raw_no_more(&self) {
        self.is_raw.store(false, Ordering::Release);
    }

    /// Nothing counts the clusters of an external data file, so an image with one cannot have snapshots. With QEMU's text.
    pub(super) fn check_snapshots(&self) -> Result<()> {
        match self.is_external() {
            true => Err(Error::new(
                ErrorKind::Unsupported,
                "Failed to get a snapshot list: Operation not supported",
            )),
            false => Ok(()),
        }
    }

    /// What an entry of a guest cluster says.
    pub(super) fn decode(
        &self,
        entry: L2Entry,
        cluster: GuestCluster,
        (g, has_zero_flag): (Geometry, bool),
    ) -> std::result::Result<Mapping, BadEntry> {
        if !self.is_external() {
            return entry.decode(g, has_zero_flag);
        }
        let place = HostOffset(g.guest_offset(cluster).0);
        match entry.decode_from(g, has_zero_flag, AtStart::Cluster)? {
            Mapping::Compressed(_) => Err(BadEntry::CompressedOutside),
            Mapping::Plain(PlainCluster {
                host: Some(host), ..
            }) if host != place => Err(BadEntry::Misplaced { host, place }),
            // Without refcounts it is ours, whatever the flag says.
            Mapping::Plain(cluster) => Ok(Mapping::Plain(PlainCluster {
                copied: cluster.host.is_some(),
                ..cluster
            })),
        }
    }

    /// Makes the file as large as the disk will be; what it holds behind the disk's old end becomes zero where that will show.
    /// Answers the size that it had if it was changed.
    pub(super) async fn grow(&self, old: u64, new: u64) -> Result<Option<u64>> {
        if !self.is_external() {
            return Ok(None);
        }
        let had = self.child.size();
        if self.is_raw() && had > old {
            let flags = ZeroFlags {
                may_unmap: true,
                ..ZeroFlags::default()
            };
            let len = had.min(new) - old;
            self.child.write_zeroes(old, len, flags).await?;
        }
        if had >= new {
            return Ok(None);
        }
        let resized = self.child.resize(new, Preallocation::Off).await;
        resized.map_err(|error| error.context("The data file cannot grow"))?;
        Ok(Some(had))
    }

    /// The disk stays as it was after all: gives the file the size that it had.
    pub(super) async fn take_back_growth(&self, had: Option<u64>) {
        if let Some(had) = had
            && let Err(error) = self.child.resize(had, Preallocation::Off).await
        {
            log::warn!("qcow2: the data file stays larger than the disk: {error}");
        }
    }

    /// Gives back what is behind the new end of the disk. A device keeps its size.
    pub(super) async fn shrink(&self, size: u64) -> Result<()> {
        if !self.is_external() || !self.child.limits().growable || self.child.size() <= size {
            return Ok(());
        }
        self.child.resize(size, Preallocation::Off).await
    }
}

impl Image {
    /// A run of clusters for new data of the `want` guest clusters from `first` on: as many, or fewer. The caller has
    /// their range lock.
    pub(super) async fn reserve_data(&self, first: GuestCluster, want: u64) -> Result<Reserved> {
        if !self.data.is_external() {
            return self.alloc.lock().await.allocate(want).await;
        }
        let run = Run {
            start: ClusterIndex(first.0),
            count: want,
        };
        let fresh = self.is_hole(run).await?;
        Ok(Reserved::outside(run, fresh))
    }

    /// Whether clusters of the external data file read as zeroes, as far as that is known.
    async fn is_hole(&self, run: Run) -> Result<bool> {
        let child = self.data.child();
        let HostBytes { offset: at, len } = self.bytes_of(run);
        if at >= child.size() && child.limits().growable {
            return Ok(true);
        }
        let inside = len.min(child.size().saturating_sub(at));
        if inside == 0 {
            return Ok(false);
        }
        let status = child.block_status(at, inside).await?;
        Ok(status.zero && status.len >= inside)
    }

    /// Gives back clusters of the external data file whose entries read as zeroes now. The caller has their range lock.
    pub(super) async fn give_back(&self, runs: &[Run]) {
        if !self.tuning.pass_discard() {
            return;
        }
        let flags = ZeroFlags {
            may_unmap: true,
            no_fallback: true,
            ..ZeroFlags::default()
        };
        for run in runs {
            let HostBytes { offset: at, len } = self.bytes_of(*run);
            let len = len.min(self.data.child().size().saturating_sub(at));
            if len == 0 {
                continue;
            }
            match self.data.child().write_zeroes(at, len, flags).await {
                Err(error) if error.kind() != ErrorKind::Unsupported => {
                    log::warn!("qcow2: freed clusters of the data file keep their space: {error}");
                }
                _ => {}
            }
        }
    }

    /// What the data file knows of data that an entry points to: holes of an external one read as zeroes.
    pub(super) async fn with_holes(&self, status: BlockStatus) -> Result<BlockStatus> {
        let (true, Some(host)) = (self.data.is_external(), status.host_offset) else {
            return Ok(status);
        };
        let child = self.data.child();
        let inside = status.len.min(child.size().saturating_sub(host));
        if inside == 0 {
            return Ok(status);
        }
        let below = child.block_status(host, inside).await?;
        Ok(BlockStatus {
            len: below.len.min(inside),
            zero: below.zero,
            ..status
        })
    }

    /// Points the entries of the guest clusters in `[start, end)` to a raw data file, which shows what it holds there.
    pub(super) async fn allocate_in_place(&self, start: u64, end: u64) -> Result<()> {
        let all = mask(0..self.g.subclusters());
        let mut at = start;
        while at < end {
            let len = self.within_table(at, end - at);
            let (first, last) = (self.cluster_at(at), self.cluster_at(at + len - 1));
            {
                let _lock = self.lock_clusters(first, last).await;
                let table = self.own_table(self.g.l1_index(first)).await?;
                for cluster in (first.0..=last.0).map(GuestCluster) {
                    let index = self.g.l2_index(cluster);
                    let data = PlainCluster {
                        host: Some(HostOffset(self.g.guest_offset(cluster).0)),
                        copied: true,
                        subclusters: Subclusters::default().with(all, State::Data),
                    };
                    let new = L2Entry::plain(data, self.g);
                    while !self.l2.replace(&table, index, table.get(index), new) {}
                }
            }
            self.commits.touch();
            self.relieve().await;
            at += len;
        }
        Ok(())
    }
}

fn required(header: &Header) -> Error {
    let named = match header.data_file_name() {
        Some(name) => format!("the image names '{name}', which is not opened for that"),
        None => "the image does not name it".to_owned(),
    };
    invalid(format!(
        "'data-file' is required for this image ({named}): give a node, or data-file.driver=file,data-file.filename=..."
    ))
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}
