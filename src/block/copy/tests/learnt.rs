//! What a copy asks of its two ends, and how often: less where it has learnt what they are like.
//!
//! The clock stands still, so nothing is slow.

use std::ops::Range;

use super::*;
use crate::limits::{COPY_CHUNK, COPY_CLUSTER, COPY_ROOM, COPY_ROOM_AFTER};

/// A disk that notes what it is asked.
struct Asked {
    inner: Arc<dyn Driver>,
    /// It reads holes as bytes.
    fills: bool,
    asked: Mutex<Questions>,
}

#[derive(Debug, Default)]
struct Questions {
    reads: Vec<Range<u64>>,
    writes: Vec<Range<u64>>,
    /// What writes said of what is written next, with themselves.
    room: Vec<Range<u64>>,
    zeroes: Vec<Range<u64>>,
    statuses: usize,
}

impl Asked {
    fn new(inner: Arc<dyn Driver>) -> Arc<Self> {
        let fills = inner.info().driver == "raw";
        Arc::new(Asked {
            inner,
            fills,
            asked: Mutex::default(),
        })
    }

    fn take(&self) -> Questions {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

impl Requests for Asked {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> RequestLimits {
        self.inner.limits()
    }

    fn read(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        self.asked.lock().unwrap().reads.push(offset..offset + len);
        Box::pin(async move {
            let data = self.inner.read(offset, len).await?;
            Ok(match self.fills {
                true => Data::from(data.to_bytes().to_vec()),
                false => data,
            })
        })
    }

    fn write(&self, offset: u64, data: Data, flags: WriteFlags) -> BoxFuture<'_, Result<()>> {
        let end = offset + data.len();
        let mut asked = self.asked.lock().unwrap();
        asked.writes.push(offset..end);
        if flags.ahead > 0 {
            asked.room.push(offset..end + flags.ahead);
        }
        drop(asked);
        self.inner.write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        self.asked.lock().unwrap().zeroes.push(offset..offset + len);
        self.inner.write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<()>> {
        self.inner.discard(offset, len)
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        self.inner.flush()
    }

    fn block_status(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        self.asked.lock().unwrap().statuses += 1;
        self.inner.block_status(offset, len)
    }

    fn resize(&self, size: u64, preallocation: Preallocation) -> BoxFuture<'_, Result<()>> {
        self.inner.resize(size, preallocation)
    }
}

impl SnapshotSource for Asked {
    fn snapshots(&self) -> Option<&dyn Snapshots> {
        self.inner.snapshots()
    }
}

/// Copies a disk to a new one; answers what the source and the target were asked.
async fn copy(source: Arc<dyn Driver>, to: Format, options: CopyOptions) -> (Questions, Questions) {
    let before = content(&*source).await;
    let (_, target) = disk(to, source.size(), None).await;
    let (source, target) = (Asked::new(source), Asked::new(target));
    let from = Source {
        disk: source.clone(),
        snapshots: source.clone(),
    };
    let options = CopyOptions {
        target_cluster: target.inner.info().cluster_size,
        share: false,
        ..options
    };
    let copier = Copier::new(from, target.clone(), options).unwrap();
    copier.activate().unwrap();
    copier.run(Owner::strict()).await.unwrap();
    copier.close().await.unwrap();
    let asked = (source.take(), target.take());
    assert!(content(&*target).await == before, "the target differs");
    asked
}

/// A disk of `size` bytes with a cluster of data at the beginning of each chunk.
async fn scattered(format: Format, size: u64) -> Arc<dyn Driver> {
    let (_, source) = disk(format, size, None).await;
    for at in (0..size).step_by(COPY_CHUNK as usize) {
        put(&*source, at, vec![7; COPY_CLUSTER as usize])
            .await
            .unwrap();
    }
    source
}

#[tokio::test(start_paused = true)]
async fn scattered_data_are_read_with_the_holes_between_them_where_holes_stay_holes() {
    let chunks = 64;
    let source = scattered(Format::Qcow2(COPY_CLUSTER), chunks * COPY_CHUNK).await;
    let (source, target) = copy(source, Format::Raw, CopyOptions::default()).await;
    // More of them at once when it is known how far apart they are.
    let reads = source.reads.len() as u64;
    assert!(reads < chunks, "{reads}");
    // Two for each chunk that is planned before anything is known, and one for many behind them.
    let statuses = source.statuses as u64;
    assert!(statuses < chunks * 3 / 2, "{statuses}");
    assert_eq!(target.writes.len() as u64, chunks);
    assert_eq!(target.statuses, 1);
    assert!(target.zeroes.is_empty());
}

#[tokio::test(start_paused = true)]
async fn holes_that_are_read_as_bytes_are_not_read_again() {
    let chunks = 64;
    let source = scattered(Format::Raw, chunks * COPY_CHUNK).await;
    let (source, _) = copy(source, Format::Raw, CopyOptions::default()).await;
    let read: u64 = source
        .reads
        .iter()
        .map(|range| range.end - range.start)
        .sum();
    // A chunk to find out.
    let most = chunks * COPY_CLUSTER + COPY_CHUNK;
    assert!(read <= most, "{read} bytes");
}

#[tokio::test(start_paused = true)]
async fn space_is_taken_for_data_in_a_row_and_given_back_where_they_are_zeroes() {
    let size = 2 * COPY_ROOM_AFTER + 4 * COPY_ROOM;
    let (_, source) = disk(Format::Raw, size, None).await;
    put(&*source, 0, vec![7; size as usize]).await.unwrap();
    let zeroes = COPY_ROOM_AFTER + 3 * COPY_ROOM + 9 * COPY_CLUSTER;
    put(&*source, zeroes, vec![0; COPY_CLUSTER as usize])
        .await
        .unwrap();
    let (_, target) = copy(source, Format::Raw, CopyOptions::default()).await;
    let is_in = |ranges: &[Range<u64>], at| ranges.iter().any(|range| range.contains(&at));
    assert!(is_in(&target.room, zeroes), "{:?}", target.room);
    for room in &target.room {
        assert!(
            room.end - room.start <= COPY_ROOM && room.end <= size,
            "{room:?}"
        );
        for at in room.clone().step_by(COPY_CLUSTER as usize) {
            let is_used = is_in(&target.writes, at) || is_in(&target.zeroes, at);
            assert!(is_used, "space at {at:#x} was taken in vain");
        }
    }
    assert!(!is_in(&target.room, COPY_ROOM), "before anything is known");
    assert!(
        !is_in(&target.room, zeroes + 4 * COPY_ROOM),
        "soon after zeroes"
    );
}

#[tokio::test(start_paused = true)]
async fn what_has_clusters_is_told_of_no_space() {
    let size = COPY_ROOM_AFTER + 4 * COPY_ROOM;
    let (_, source) = disk(Format::Raw, size, None).await;
    put(&*source, 0, vec![7; size as usize]).await.unwrap();
    let to = Format::Qcow2(COPY_CLUSTER);
    let (_, target) = copy(source, to, CopyOptions::default()).await;
    assert!(target.room.is_empty());
}
