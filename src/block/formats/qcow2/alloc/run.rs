//! Runs of clusters: owned by a request until something points to them, and given back.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Result;
use crate::units::ClusterIndex;

/// Clusters in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// The first.
    pub(crate) start: ClusterIndex,
    /// How many.
    pub(crate) count: u64,
}

impl Run {
    /// A cluster alone.
    pub(crate) fn one(start: ClusterIndex) -> Self {
        Run { start, count: 1 }
    }

    /// Each of them.
    pub(crate) fn clusters(self) -> impl Iterator<Item = ClusterIndex> {
        (self.start.0..self.end()).map(ClusterIndex)
    }

    /// The number behind the last cluster.
    pub(crate) fn end(self) -> u64 {
        self.start.0 + self.count
    }
}

/// Appends a run, joined to the last one where it continues it.
pub(crate) fn push_run(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.end() == run.start.0 => last.count += run.count,
        _ => runs.push(run),
    }
}

/// Runs given back by dropped reservations, until the allocator takes them.
pub(crate) type Returned = Arc<Mutex<Vec<Run>>>;

/// A run that a request owns and nothing points to yet. Dropped, it is free again.
#[derive(Debug)]
pub(crate) struct Reserved {
    run: Run,
    fresh: bool,
    /// Where it goes when it is dropped; nowhere from an external data file, whose clusters nobody counts.
    returned: Option<Returned>,
}

impl Reserved {
    /// Clusters that count one reference. Dropped, they go into `returned`. `fresh` as for [`Reserved::is_fresh`].
    pub(super) fn counted(run: Run, fresh: bool, returned: Returned) -> Self {
        Reserved {
            run,
            fresh,
            returned: Some(returned),
        }
    }

    /// Clusters of an external data file. `fresh` as for [`Reserved::is_fresh`].
    pub(crate) fn outside(run: Run, fresh: bool) -> Self {
        Reserved {
            run,
            fresh,
            returned: None,
        }
    }

    /// The clusters.
    pub(crate) fn run(&self) -> Run {
        self.run
    }

    /// The clusters lie behind everything that was ever written to the file: they read as zeroes as they are.
    pub(crate) fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// The first `count` clusters are pointed to now: they are no longer given back.
    pub(crate) fn publish(&mut self, count: u64) {
        assert!(count <= self.run.count);
        self.run.start.0 += count;
        self.run.count -= count;
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Some(returned) = &self.returned
            && self.run.count > 0
        {
            let mut returned = returned.lock().unwrap_or_else(PoisonError::into_inner);
            returned.push(self.run);
        }
    }
}

/// What has become of references that were to be dropped.
#[derive(Debug)]
pub(crate) struct Dropped {
    /// Clusters that have none left.
    pub(crate) freed: Vec<Run>,
    /// Clusters that still have all of theirs, after an error.
    pub(crate) rest: Vec<Run>,
    /// The error that ended it early.
    pub(crate) result: Result<()>,
}
