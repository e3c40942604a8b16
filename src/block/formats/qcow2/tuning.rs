//! What the user can change about an image while it is open, and what the image says nothing about.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwap;

use super::open::OpenOptions;
use crate::driver::{DriverSettings, NewFile};

/// Each by itself: nothing is wrong in between.
#[derive(Debug)]
pub(super) struct Tuning {
    filename: ArcSwap<String>,
    pass_discard: AtomicBool,
    pass_discard_snapshot: AtomicBool,
    refcount_cache_bytes: AtomicU64,
}

impl Tuning {
    pub(super) fn new(options: &OpenOptions) -> Self {
        Tuning {
            filename: ArcSwap::from_pointee(options.filename.clone()),
            pass_discard: options.pass_discard.into(),
            pass_discard_snapshot: options.pass_discard_snapshot.into(),
            refcount_cache_bytes: options.refcount_cache_bytes.into(),
        }
    }

    /// What queries show.
    pub(super) fn filename(&self) -> String {
        self.filename.load().as_str().to_owned()
    }

    /// Whether holes are punched where clusters are freed.
    pub(super) fn pass_discard(&self) -> bool {
        self.pass_discard.load(Ordering::Relaxed)
    }

    /// Whether the clusters that a deleted snapshot frees become holes of the file.
    pub(super) fn pass_discard_snapshot(&self) -> bool {
        self.pass_discard_snapshot.load(Ordering::Relaxed)
    }

    /// Greatest size of the cache for refcount blocks.
    pub(super) fn refcount_cache_bytes(&self) -> u64 {
        self.refcount_cache_bytes.load(Ordering::Relaxed)
    }

    /// Takes what is given. Answers the greatest size of the cache for L2 tables, which is that cache's matter.
    pub(super) fn set(
        &self,
        settings: Option<DriverSettings>,
        file: Option<NewFile>,
    ) -> Option<u64> {
        if let Some(NewFile { filename, .. }) = file {
            self.filename.store(filename.into());
        }
        let Some(DriverSettings::Qcow2 {
            pass_discard,
            pass_discard_snapshot,
            l2_cache_bytes,
            refcount_cache_bytes,
        }) = settings
        else {
            return None;
        };
        self.pass_discard.store(pass_discard, Ordering::Relaxed);
        self.pass_discard_snapshot
            .store(pass_discard_snapshot, Ordering::Relaxed);
        self.refcount_cache_bytes
            .store(refcount_cache_bytes, Ordering::Relaxed);
        Some(l2_cache_bytes)
    }
}
