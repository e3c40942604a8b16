//! Backup: the work of `drive-backup` and `blockdev-backup`.
//!
//! The copying is `block::copy`'s; here it meets pause, speed, progress and the policies about errors. Whoever starts the job has
//! put the filter above the source and activated the copy: that moment is what the target will show.
//!
//! ```text
//!   guests ──> filter ──> source          when it ends, whatever its end:
//!                │  copier                  close the copier, take the filter out, close it, and the
//!                └──────────> target        target too if it came with the job
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use block::copy::{Copier, CopyHooks, OnCopyError, Progress, Side, SyncMode};
use block::driver::BoxFuture;
use block::error::{Error, Result};
use block::graph::{Edge, Graph, Node, OnError, Quiesced, Removed};
use block::io::{IoThreads, Seat};
use tokio::sync::Mutex;

use super::context::{JobContext, Operation};
use super::driver::JobDriver;
use super::graph::GraphAccess;

/// A backup that is ready to run.
pub struct Backup {
    /// The copy, activated.
    pub copier: Copier,
    /// What is copied.
    pub sync: SyncMode,
    /// How the graph is put back.
    pub end: BackupEnd,
    /// What to do about errors of the source.
    pub on_source_error: OnError,
    /// What to do about errors of the target.
    pub on_target_error: OnError,
    /// Where it copies.
    pub threads: IoThreads,
}

/// What a backup gives back to the graph.
pub struct BackupEnd {
    /// The filter above the source.
    pub filter: Arc<Node>,
    /// The job's use of the filter, which keeps it.
    pub user: Option<Edge>,
    /// The way to the graph.
    pub graph: Arc<dyn GraphAccess>,
}

impl BackupEnd {
    /// Takes the filter out, with a target that came along, and closes what nobody uses any more.
    pub async fn give_back(&mut self) {
        let end = BackupEnd {
            filter: self.filter.clone(),
            user: self.user.take(),
            graph: self.graph.clone(),
        };
        let nodes = vec![self.filter.clone()];
        let change = move |graph: &mut Graph, held: &[Quiesced]| end.take_out(graph, held);
        for removed in self.graph.change(nodes, Box::new(change)).await {
            // What could not be closed is in the log. The copy was flushed before it was said to be whole.
            let _ = removed.close().await;
        }
    }

    /// Takes the filter out of the graph. `held` holds it alone.
    pub fn take_out(&self, graph: &mut Graph, held: &[Quiesced]) -> Vec<Removed> {
        if let Some(edge) = &self.user {
            graph.remove_user(edge);
        }
        let Some(held) = held.first() else {
            return Vec::new();
        };
        match graph.take_out_filter(&self.filter, "file", held) {
            Ok(removed) => vec![removed],
            Err(error) => {
                log::error!("filter '{}' stays: {error}", self.filter.name());
                Vec::new()
            }
        }
    }
}

impl JobDriver for Backup {
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            let hooks = Hooks {
                cx: cx.clone(),
                on_source_error: self.on_source_error,
                on_target_error: self.on_target_error,
                threads: self.threads.clone(),
                turn: Mutex::default(),
                has_failed: AtomicBool::new(false),
                answered: AtomicU64::new(0),
            };
            cx.set_progress(self.copier.progress().done, self.copier.progress().total);
            let copying = self.copier.run(Arc::new(hooks));
            if self.sync != SyncMode::None {
                return copying.await;
            }
            // Guests do the work.
            tokio::select! {
                result = copying => result,
                () = cx.stand_by() => Ok(()),
            }
        })
    }

    fn clean(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            if let Err(error) = self.copier.close().await {
                log::error!("the temporary snapshot of a backup stays: {error}");
            }
            self.end.give_back().await;
        })
    }
}

/// What the copier asks of the job.
struct Hooks {
    cx: JobContext,
    on_source_error: OnError,
    on_target_error: OnError,
    threads: IoThreads,
    /// Workers that fail at the same time ask one after another.
    turn: Mutex<()>,
    /// An error was answered with the end of the job.
    has_failed: AtomicBool,
    /// How many errors have been answered with another try.
    answered: AtomicU64,
}

impl Hooks {
    /// An error that occurred before the last one was answered is answered with it: 64 workers that find the disk full make one
    /// event, and one pause.
    async fn decide(&self, side: Side, error: &Error) -> OnCopyError {
        let before = self.answered.load(Ordering::Acquire);
        let _turn = self.turn.lock().await;
        if self.has_failed.load(Ordering::Acquire) {
            return OnCopyError::Fail;
        }
        if self.answered.load(Ordering::Acquire) != before {
            return OnCopyError::Retry;
        }
        let (operation, policy) = match side {
            Side::Source => (Operation::Read, self.on_source_error),
            Side::Target => (Operation::Write, self.on_target_error),
        };
        match self.cx.on_error(operation, policy, error.clone()).await {
            Err(_) => {
                self.has_failed.store(true, Ordering::Release);
                OnCopyError::Fail
            }
            Ok(()) => {
                self.answered.fetch_add(1, Ordering::AcqRel);
                OnCopyError::Retry
            }
        }
    }
}

impl CopyHooks for Hooks {
    fn admit(&self, bytes: u64) -> BoxFuture<'_, ()> {
        Box::pin(self.cx.begin(bytes))
    }

    fn finished(&self) {
        self.cx.end();
    }

    fn seat(&self) -> Option<Seat> {
        let failed = |error| log::warn!("a backup has no thread of its own: {error}");
        self.threads.seat().map_err(failed).ok()
    }

    fn progress(&self, progress: Progress) {
        let Progress { done, total } = progress;
        self.cx.set_progress(done, total);
    }

    fn on_error(&self, side: Side, error: &Error) -> BoxFuture<'_, OnCopyError> {
        let error = error.clone();
        Box::pin(async move { self.decide(side, &error).await })
    }
}
