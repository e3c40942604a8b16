//! Compressed clusters: raw deflate streams that share host clusters (specification: "Compressed Clusters Descriptor").

use bytes::Bytes;
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::entry::{Compressed, L2Entry, Mapping};
use super::image::Image;
use crate::driver::WriteFlags;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Access, Data};
use crate::units::HostOffset;

/// Clusters from this size on are inflated and deflated on a thread for blocking work: they take a millisecond or so,
/// during which a reactor would serve nobody else.
const OFF_REACTOR: u64 = 256 << 10;

impl Image {
    /// The content of a compressed cluster. The caller is inside the gate, which keeps the stream in place.
    pub(super) async fn decompress(&self, stream: Compressed) -> Result<Bytes> {
        let size = self.g.cluster_size();
        // The descriptor may name sectors behind the end of the file; a file reads zeroes there.
        let data = self.file.read(stream.host.0, stream.len).await?;
        let work = move || inflate(&data.to_bytes(), size as usize);
        let cluster = if size >= OFF_REACTOR {
            tokio::task::spawn_blocking(work)
                .await
                .map_err(|error| Error::new(ErrorKind::Io, format!("inflate: {error}")))?
        } else {
            work()
        };
        cluster.map(Bytes::from).ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                format!("qcow2: compressed cluster at {} is corrupt", stream.host),
            )
        })
    }

    /// Writes one whole cluster compressed; at the end of the disk, what there is of it. What does not become smaller is
    /// written as it is. `offset` is the start of a cluster. The caller is inside the gate and has prepared for
    /// changes. Cancellation: run to the end by the caller.
    pub(super) async fn write_compressed_cluster(&self, offset: u64, data: Data) -> Result<()> {
        let size = self.g.cluster_size();
        let whole = data.len() == size || offset + data.len() == self.size() && data.len() < size;
        if !self.g.is_aligned(offset) || !whole || data.is_empty() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "A compressed write must cover exactly one cluster",
            ));
        }
        let mut cluster = data.to_bytes().to_vec();
        cluster.resize(size as usize, 0);
        let work = move || deflate(&cluster);
        let deflated = if size >= OFF_REACTOR {
            tokio::task::spawn_blocking(work)
                .await
                .map_err(|error| Error::new(ErrorKind::Io, format!("deflate: {error}")))?
        } else {
            work()
        };
        match deflated {
            Some(stream) => self.link_stream(offset, stream).await,
            None => self.write_range(offset, data).await,
        }
    }

    async fn link_stream(&self, offset: u64, bytes: Vec<u8>) -> Result<()> {
        let cluster = self.cluster_at(offset);
        let _lock = self
            .clusters
            .lock(cluster.0..cluster.0 + 1, Access::Exclusive)
            .await;
        let table = self.own_table(self.g.l1_index(cluster)).await?;
        let index = self.g.l2_index(cluster);
        // A damaged entry is found before anything is written.
        self.decode_to_replace(table.get(index), cluster)?;
        let len = bytes.len() as u64;
        let (host, mut reserved) = self.alloc.lock().await.allocate_stream(len).await?;
        let stream = Compressed {
            host: HostOffset(host.0),
            len,
        };
        self.file
            .write(host.0, Data::from(bytes), WriteFlags::default())
            .await?;
        loop {
            let old = table.get(index);
            let mapping = self.decode_to_replace(old, cluster)?;
            let new = L2Entry::compressed(stream, self.g);
            if self.l2.replace(&table, index, old, new) {
                reserved.publish(1);
                let freed: Option<_> = match mapping {
                    Mapping::Unallocated | Mapping::ZeroPlain => None,
                    other => self.references(other),
                };
                self.quarantine.unlinked(freed);
                self.commits.touch();
                return Ok(());
            }
        }
    }
}

/// Inflates one cluster: exactly `size` bytes, whatever follows the stream. `None` for a stream that is damaged or short.
fn inflate(stream: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut cluster = vec![0; size];
    let mut inflater = Decompress::new(false);
    let status = inflater.decompress(stream, &mut cluster, FlushDecompress::Finish);
    // A full cluster is enough: the stream's end may be cut off by the sector count of the descriptor.
    match status {
        Ok(_) if inflater.total_out() == size as u64 => Some(cluster),
        _ => None,
    }
}

/// Deflates one cluster; `None` when that does not make it smaller.
fn deflate(cluster: &[u8]) -> Option<Vec<u8>> {
    let mut stream = vec![0; cluster.len() - 1];
    // QEMU writes and promises to read a window of 4 KiB only.
    let mut deflater = Compress::new_with_window_bits(Compression::default(), false, 12);
    let status = deflater.compress(cluster, &mut stream, FlushCompress::Finish);
    match status {
        Ok(Status::StreamEnd) => {
            stream.truncate(deflater.total_out() as usize);
            Some(stream)
        }
        _ => None,
    }
}
