//! Many clusters at once: neighbours are read and written in one piece, pieces in parallel.
//!
//! Snapshots, checks and repairs touch every L2 table of an image. One request per table would cost a round trip each;
//! sorted and coalesced they run at the speed of the device.

use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt, stream};

use crate::driver::{Child, WriteFlags};
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Data, Segment};
use crate::limits::MAX_IOVECS;
use crate::units::HostOffset;

/// The longest piece in bytes: long enough for a disk to reach its sequential speed.
const PIECE: u64 = 2 << 20;

/// Pieces under way at once. With `PIECE` it bounds the memory in flight.
const DEPTH: usize = 8;

/// Pieces that are worked on at once, each by a thread: enough to keep up with the page cache, and few enough to leave
/// processors to others.
const WORKERS: usize = 4;

/// The unit in which changes inside of a cluster are found, in bytes: that of memory, and of most file systems' holes.
const CHANGED: usize = 4096;

/// Clusters that follow each other in the file: where they begin, and which of the list they are.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Run {
    start: HostOffset,
    first: usize,
    count: usize,
}

/// Groups ascending offsets of clusters into runs of at most `PIECE` bytes.
fn group(offsets: impl Iterator<Item = HostOffset>, cluster_size: u64) -> Vec<Run> {
    let longest = (PIECE / cluster_size).max(1) as usize;
    let mut runs: Vec<Run> = Vec::new();
    for (index, offset) in offsets.enumerate() {
        if let Some(run) = runs.last_mut()
            && run.count < longest
            && run.start.0 + run.count as u64 * cluster_size == offset.0
        {
            run.count += 1;
            continue;
        }
        runs.push(Run {
            start: offset,
            first: index,
            count: 1,
        });
    }
    runs
}

/// Reads the clusters at `offsets`, which ascend, and hands each to `each` with its index, in order.
///
/// Stops at the first error, of a read or of `each`. Cancellation: safe, nothing is written.
pub(crate) async fn read_clusters(
    file: &Child,
    offsets: &[HostOffset],
    cluster_size: u64,
    mut each: impl FnMut(usize, &[u8]) -> Result<()>,
) -> Result<()> {
    debug_assert!(offsets.is_sorted());
    let reads = group(offsets.iter().copied(), cluster_size)
        .into_iter()
        .map(|run| read_run(file, run, cluster_size));
    let mut reads = stream::iter(reads).buffered(DEPTH);
    while let Some(piece) = reads.next().await {
        let (run, bytes) = piece?;
        for (nth, cluster) in bytes.chunks_exact(cluster_size as usize).enumerate() {
            each(run.first + nth, cluster)?;
        }
    }
    Ok(())
}

/// The same for clusters that need work: other threads make something of each with `work`, which knows its index,
/// and `each` gets that.
///
/// Cancellation: safe; the threads end with the pieces that they are at.
pub(crate) async fn map_clusters<T: Send + 'static>(
    file: &Child,
    offsets: &[HostOffset],
    cluster_size: u64,
    work: impl Fn(usize, &[u8]) -> T + Send + Sync + 'static,
    mut each: impl FnMut(usize, T) -> Result<()>,
) -> Result<()> {
    debug_assert!(offsets.is_sorted());
    let work = Arc::new(work);
    let pieces = group(offsets.iter().copied(), cluster_size)
        .into_iter()
        .map(|run| read_run(file, run, cluster_size));
    let made = stream::iter(pieces).buffered(DEPTH).map(|piece| {
        let work = work.clone();
        async move {
            let (run, bytes) = piece?;
            let first = run.first;
            let clusters = move || -> Vec<T> {
                let clusters = bytes.chunks_exact(cluster_size as usize).enumerate();
                clusters
                    .map(|(nth, cluster)| work(first + nth, cluster))
                    .collect()
            };
            let made = tokio::task::spawn_blocking(clusters).await;
            let made = made.map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?;
            Ok((first, made))
        }
    });
    let mut made = pin!(made.buffered(WORKERS));
    while let Some(piece) = made.next().await {
        let (first, made): (usize, Vec<T>) = piece?;
        for (nth, made) in made.into_iter().enumerate() {
            each(first + nth, made)?;
        }
    }
    Ok(())
}

async fn read_run(file: &Child, run: Run, cluster_size: u64) -> Result<(Run, Bytes)> {
    let len = run.count as u64 * cluster_size;
    let data = file.read(run.start.0, len).await?;
    Ok((run, data.to_bytes()))
}

/// Writes pieces of any length, given with their ascending offsets; neighbours together. Not durable before a flush.
///
/// After an error any of them may have been written. Cancellation: as an error.
pub(crate) async fn write_pieces(file: &Child, pieces: &[(HostOffset, Bytes)]) -> Result<()> {
    debug_assert!(pieces.is_sorted_by_key(|(offset, _)| *offset));
    let mut writes: Vec<(HostOffset, Data)> = Vec::new();
    for (offset, bytes) in pieces {
        let len = bytes.len() as u64;
        if let Some((start, data)) = writes.last_mut()
            && start.0 + data.len() == offset.0
            && data.len() + len <= PIECE
            && data.segments().len() < MAX_IOVECS
        {
            data.push(Segment::Bytes(bytes.clone()));
        } else {
            writes.push((*offset, Data::from(bytes.clone())));
        }
    }
    let writes = writes
        .into_iter()
        .map(|(start, data)| file.write(start.0, data, WriteFlags::default()));
    let mut writes = stream::iter(writes).buffer_unordered(DEPTH);
    let mut result = Ok(());
    // All of them end before this answers, so that no write of ours lands after what the caller does next.
    while let Some(written) = writes.next().await {
        result = result.and(written);
    }
    result
}

/// The parts of a cluster that differ from what it was, as pieces for `write_pieces`: what is a hole in the file and stays zero
/// takes no space.
pub(crate) fn changed_pieces(
    offset: HostOffset,
    old: &[u8],
    new: &Bytes,
) -> Vec<(HostOffset, Bytes)> {
    debug_assert_eq!(old.len(), new.len());
    let mut pieces: Vec<(HostOffset, Bytes)> = Vec::new();
    let parts = old.chunks(CHANGED).zip(new.chunks(CHANGED)).enumerate();
    let differing = parts.filter(|(_, (old, new))| old != new);
    for (nth, (_, part)) in differing {
        let at = nth * CHANGED;
        let end = at + part.len();
        if let Some((start, piece)) = pieces.last_mut()
            && (start.0 - offset.0) as usize + piece.len() == at
        {
            *piece = new.slice((start.0 - offset.0) as usize..end);
        } else {
            pieces.push((offset + at as u64, new.slice(at..end)));
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::super::testing::block_on;
    use super::*;
    use crate::protocols::memory::{Memory, OpKind};

    #[test]
    fn neighbours_travel_together_and_arrive_in_order() {
        let disk = Memory::new(64 << 10);
        let file = disk.child();
        let clusters: Vec<_> = [0, 1, 2, 5, 7, 8]
            .map(|index: u64| {
                let bytes = Bytes::from(vec![index as u8 + 1; 512]);
                (HostOffset(index * 512), bytes)
            })
            .into();
        block_on(write_pieces(&file, &clusters)).unwrap();
        assert_eq!(disk.count(OpKind::Write), 3);
        let offsets: Vec<_> = clusters.iter().map(|(offset, _)| *offset).collect();
        let mut seen = Vec::new();
        block_on(read_clusters(&file, &offsets, 512, |index, bytes| {
            assert_eq!(bytes, &clusters[index].1[..]);
            seen.push(index);
            Ok(())
        }))
        .unwrap();
        assert_eq!(disk.count(OpKind::Read), 3);
        assert_eq!(seen, [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn only_changed_parts_are_written() {
        let old = vec![0; 5 * CHANGED];
        let mut new = old.clone();
        for at in [CHANGED, 2 * CHANGED + 7, 5 * CHANGED - 1] {
            new[at] = 1;
        }
        let new = Bytes::from(new);
        let pieces = changed_pieces(HostOffset(1 << 20), &old, &new);
        let expected = [CHANGED..3 * CHANGED, 4 * CHANGED..5 * CHANGED]
            .map(|range| (HostOffset(1 << 20) + range.start as u64, new.slice(range)));
        assert_eq!(pieces, expected);
        assert!(changed_pieces(HostOffset(0), &new, &new).is_empty());
    }

    #[test]
    fn a_run_ends_at_the_longest_piece() {
        let offsets = (0..5000).map(|index| HostOffset(index * 512));
        let runs = group(offsets, 512);
        assert_eq!(runs.len(), 2);
        assert_eq!(runs[0].count as u64 * 512, PIECE);
    }
}
