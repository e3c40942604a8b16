//! Sharing instead of copying: where source and target are files in one file system that can share their bytes, the target gets the
//! source's blocks, in a moment, and they take no more space.
//!
//! What is shared is claimed until the file system has done it: a guest that is about to change it waits, as it waits for a read. The
//! file system first writes out what is dirty there, so the source is flushed once before much is shared, and the pieces are
//! as large as is quick.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::map::Claim;
use super::shared::Shared;
use crate::error::ErrorKind;

/// Sharing a piece that takes longer than this makes the next ones smaller: guests wait for one at most.
const SLOW: Duration = Duration::from_millis(5);

/// A source of which so many pieces, and no other, are in no file as they are (a device, memory, compressed clusters) is not asked again:
/// what is not shared is copied more quickly in other pieces than those that are good for sharing.
const MISSES: u64 = 16;

/// Whether the target may share with the source, and in which pieces.
#[derive(Debug)]
pub(super) struct InPlace {
    /// Bytes of a piece; 0 when nothing is shared any more.
    piece: AtomicU64,
    least: u64,
    most: u64,
    has_flushed: AtomicBool,
    /// How many pieces were in no file while none was shared.
    misses: AtomicU64,
    has_shared: AtomicBool,
}

impl InPlace {
    /// Pieces of `least` to `most` bytes, whole clusters; nothing without `wanted`.
    pub(super) fn new(wanted: bool, least: u64, most: u64) -> Self {
        InPlace {
            piece: AtomicU64::new(if wanted { least } else { 0 }),
            least,
            most,
            has_flushed: AtomicBool::new(false),
            misses: AtomicU64::new(0),
            has_shared: AtomicBool::new(false),
        }
    }

    /// Bytes to share at once, if any are.
    pub(super) fn piece(&self) -> Option<u64> {
        Some(self.piece.load(Ordering::Relaxed)).filter(|piece| *piece > 0)
    }

    fn stop(&self) {
        self.piece.store(0, Ordering::Relaxed);
    }

    /// A piece of the source was in no file.
    fn missed(&self) {
        let misses = self.misses.fetch_add(1, Ordering::Relaxed) + 1;
        if misses >= MISSES && !self.has_shared.load(Ordering::Relaxed) {
            self.stop();
        }
    }

    /// Sharing so many bytes has taken so long.
    fn note(&self, bytes: u64, time: Duration) {
        self.has_shared.store(true, Ordering::Relaxed);
        let change = |piece: u64| match time > SLOW {
            _ if piece == 0 => None,
            true => Some((piece / 2).max(self.least)),
            false if bytes >= piece => Some((piece * 2).min(self.most)),
            false => None,
        };
        let _ = self
            .piece
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
    }
}

impl Shared {
    /// Has the target share what is claimed. `false` when it is to be copied: nothing is known of the target's content then.
    pub(super) async fn share(&self, claim: &Claim) -> bool {
        let reader = self.reader();
        let (mut at, end) = (claim.offset(), claim.offset() + claim.len());
        let begun = Instant::now();
        while at < end {
            // Errors come up again when it is read and written.
            let Ok(Some(range)) = reader.host_range(at, end - at).await else {
                self.in_place.missed();
                return false;
            };
            let len = range.len();
            if let Err(error) = self.target.write_shared(at, range).await {
                match error.kind() {
                    ErrorKind::Unsupported => log::debug!("copy: {error}"),
                    _ => log::info!("copy: nothing more is shared: {error}"),
                }
                self.in_place.stop();
                return false;
            }
            at += len;
        }
        self.in_place.note(claim.len(), begun.elapsed());
        true
    }

    /// Before much is shared: guests would have to wait while what they have left to be written out is.
    pub(super) async fn flush_to_share(&self) {
        if !self.in_place.has_flushed.swap(true, Ordering::Relaxed)
            && let Err(error) = self.source.disk.flush().await
        {
            log::debug!("copy: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_grow_while_they_are_quick() {
        let in_place = InPlace::new(true, 4, 64);
        let note = |bytes, ms| {
            in_place.note(bytes, Duration::from_millis(ms));
            in_place.piece()
        };
        assert_eq!(note(4, 1), Some(8));
        assert_eq!(note(4, 1), Some(8), "a short one says nothing");
        assert_eq!(
            [8, 16, 32, 64].map(|bytes| note(bytes, 1)),
            [16, 32, 64, 64].map(Some)
        );
        assert_eq!(
            [6, 6, 6, 6, 6].map(|ms| note(64, ms)),
            [32, 16, 8, 4, 4].map(Some)
        );
        in_place.stop();
        assert_eq!(note(4, 1), None);
        assert_eq!(InPlace::new(false, 4, 64).piece(), None);
    }

    #[test]
    fn a_source_that_is_in_no_file_is_not_asked_for_ever() {
        let in_place = InPlace::new(true, 4, 64);
        for _ in 1..MISSES {
            in_place.missed();
        }
        assert_eq!(in_place.piece(), Some(4));
        in_place.missed();
        assert_eq!(in_place.piece(), None);
        let in_place = InPlace::new(true, 4, 64);
        in_place.note(2, Duration::ZERO);
        for _ in 0..2 * MISSES {
            in_place.missed();
        }
        assert_eq!(in_place.piece(), Some(4), "some of it is in a file");
    }
}
