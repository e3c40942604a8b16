//! Reads. They take no lock: the gate keeps what they have resolved to in place until they leave.

use super::image::Image;
use super::map::{Extent, Source};
use super::parallel::collect;
use crate::driver::BoxFuture;
use crate::error::Result;
use crate::events::HostBytes;
use crate::io::{Data, Segment};
use crate::limits::MAX_SPARE_BUFFER;

/// Data in a row in the file are read at once, whatever lies between them on the disk, if they are no more than this.
const MOST_IN_ROW: u64 = MAX_SPARE_BUFFER as u64;

/// Where data of a request are: in which row, and where in it.
struct Place {
    row: usize,
    at: u64,
}

/// The rows of the file that the data of a request lie in, and where in them each of its parts is, if it is data.
fn rows(parts: &[(u64, Extent)]) -> (Vec<HostBytes>, Vec<Option<Place>>) {
    let mut rows: Vec<HostBytes> = Vec::new();
    let mut place = |part: &Extent| {
        let Source::Data { host, .. } = part.source else {
            return None;
        };
        let mut at = 0;
        match rows.last_mut() {
            Some(row) if row.offset + row.len == host.0 && row.len + part.len <= MOST_IN_ROW => {
                at = row.len;
                row.len += part.len;
            }
            _ => rows.push(HostBytes {
                offset: host.0,
                len: part.len,
            }),
        }
        let row = rows.len() - 1;
        Some(Place { row, at })
    };
    let places = parts.iter().map(|(_, part)| place(part)).collect();
    (rows, places)
}

impl Image {
    /// Reads a range of the disk that has been checked. The caller is inside the gate.
    pub(super) async fn read_range(&self, offset: u64, len: u64) -> Result<Data> {
        if len == 0 {
            return Ok(Data::new());
        }
        let first = self.extent(offset, len).await?;
        if first.len == len {
            return self.read_extent(offset, first).await;
        }
        let parts = self.extents(offset, len).await?;
        let (rows, places) = rows(&parts);
        let mut reads: Vec<BoxFuture<'_, Result<Data>>> = Vec::with_capacity(parts.len());
        for row in &rows {
            reads.push(self.data.child().read(row.offset, row.len));
        }
        for ((at, part), place) in parts.iter().zip(&places) {
            if place.is_none() {
                reads.push(Box::pin(self.read_extent(*at, *part)));
            }
        }
        let mut read = collect(reads).await?;
        let mut others = read.split_off(rows.len()).into_iter();
        let mut all = Data::new();
        for ((_, part), place) in parts.iter().zip(places) {
            let piece = match place {
                Some(place) => read.get(place.row).map(|row| row.slice(place.at, part.len)),
                None => others.next(),
            };
            all.append(piece.unwrap_or_default());
        }
        assert_eq!(all.len(), len);
        Ok(all)
    }

    /// Reads a run with one source.
    pub(super) async fn read_extent(&self, offset: u64, extent: Extent) -> Result<Data> {
        match extent.source {
            Source::Unallocated => self.read_backing(offset, extent.len).await,
            Source::Zero => Ok(Data::zeroes(extent.len)),
            Source::Lost(host) => Err(self.lost(self.cluster_at(offset), host)),
            Source::Data { host, .. } => self.data.child().read(host.0, extent.len).await,
            Source::Compressed(stream) => {
                let cluster = self.decompress(stream).await?;
                let from = self.g.in_cluster(offset) as usize;
                let part = cluster.slice(from..from + extent.len as usize);
                Ok(Data::from(part))
            }
        }
    }

    /// Reads what unallocated clusters show: the backing, and zeroes behind its end.
    pub(super) async fn read_backing(&self, offset: u64, len: u64) -> Result<Data> {
        let Some(backing) = self.backing() else {
            return Ok(Data::zeroes(len));
        };
        let inside = backing.size().saturating_sub(offset).min(len);
        if inside == 0 {
            return Ok(Data::zeroes(len));
        }
        let mut data = backing.read(offset, inside).await?;
        data.push(Segment::Zeroes(len - inside));
        Ok(data)
    }

    /// The same for copying up: asks first whether it is zero, so that nothing is read and no zeroes are copied.
    pub(super) async fn read_backing_to_copy(&self, offset: u64, len: u64) -> Result<Data> {
        if let Some(backing) = self.backing() {
            let inside = backing.size().saturating_sub(offset).min(len);
            if inside > 0 {
                let status = backing.block_status(offset, inside).await?;
                if status.zero && status.len >= inside {
                    return Ok(Data::zeroes(len));
                }
            }
        }
        self.read_backing(offset, len).await
    }
}
