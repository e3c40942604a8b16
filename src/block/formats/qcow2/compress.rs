//! Compressed clusters: streams that share host clusters (specification: "Compressed Clusters Descriptor").

use std::sync::LazyLock;
use std::thread::available_parallelism;

use bytes::Bytes;
use tokio::sync::Semaphore;

use super::entry::{Compressed, L2Entry};
use super::image::Image;
use crate::driver::WriteFlags;
use crate::error::{Error, ErrorKind, Result};
use crate::events::HostBytes;
use crate::io::Data;
use crate::units::HostOffset;

/// Clusters from this size on are encoded and decoded on a thread for blocking work. At 64 KiB decoding takes 50 (zstd) to
/// 130 us (zlib) and encoding 200 to 700 us, during which a reactor would serve nobody else; a hand-over takes some 10 us.
const OFF_REACTOR: u64 = 64 << 10;

/// Lets as many of them be at work as there are processors. More would only take memory.
static WORKERS: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new(available_parallelism().map_or(1, usize::from)));

impl Image {
    /// The content of a compressed cluster. The caller is inside the gate, which keeps the stream in place.
    pub(super) async fn decompress(&self, stream: Compressed) -> Result<Bytes> {
        let size = self.g.cluster_size();
        // The descriptor may name sectors behind the end of the file; a file reads zeroes there.
        let data = self.file.read(stream.host.0, stream.len).await?;
        let compression = self.compression;
        let work = move || compression.decode(&data.to_bytes(), size as usize);
        let cluster = self.off_reactor(work).await?;
        cluster.map(Bytes::from).ok_or_else(|| {
            let place = HostBytes {
                offset: stream.host.0,
                len: stream.len,
            };
            let message = format!("Compressed cluster at {} cannot be read", stream.host);
            self.damage.met(message, Some(place))
        })
    }

    /// Writes one whole cluster compressed; at the end of the disk, what there is of it. What does not become smaller is
    /// written as it is. `offset` is the start of a cluster. The caller is inside the gate and has prepared for
    /// changes. Cancellation: run to the end by the caller.
    pub(super) async fn write_compressed_cluster(&self, offset: u64, data: Data) -> Result<()> {
        if self.data.is_external() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "Compressed clusters are not possible with an external data file",
            ));
        }
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
        let compression = self.compression;
        let encoded = self.off_reactor(move || compression.encode(&cluster));
        match encoded.await? {
            Some(stream) => self.link_stream(offset, stream).await,
            None => self.write_range(offset, data).await,
        }
    }

    /// Runs work on a cluster's bytes: on another thread when it takes long.
    async fn off_reactor<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        if self.g.cluster_size() < OFF_REACTOR {
            return Ok(work());
        }
        let failed = |error: &dyn std::fmt::Display| {
            Error::new(
                ErrorKind::Io,
                format!("Compressing a cluster failed: {error}"),
            )
        };
        let permit = WORKERS.acquire().await.map_err(|error| failed(&error))?;
        // Who stops waiting does not stop the work, so the work has the permit.
        let running = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        running.await.map_err(|error| failed(&error))
    }

    async fn link_stream(&self, offset: u64, bytes: Vec<u8>) -> Result<()> {
        let cluster = self.cluster_at(offset);
        let _lock = self.lock_clusters(cluster, cluster).await;
        let table = self.own_table(self.g.l1_index(cluster)).await?;
        let index = self.g.l2_index(cluster);
        // A damaged entry is found before anything is written.
        let gone = self.references(self.decode_to_replace(table.get(index), cluster)?);
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
            let new = L2Entry::compressed(stream, self.g);
            if self.l2.replace(&table, index, old, new) {
                reserved.publish(reserved.run().count);
                self.quarantine.unlinked(gone);
                self.commits.touch();
                return Ok(());
            }
        }
    }
}
