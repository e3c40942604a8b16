//! Who settles, and when: a task behind the image that gives way to the guest.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::settle::Punching;
use super::settling::Work;
use crate::error::Result;
use crate::formats::qcow2::image::Image;
use crate::limits::{
    QCOW2_SETTLE_ON_CLOSE, QCOW2_SETTLE_PAUSE, QCOW2_SETTLE_QUIET, QCOW2_SETTLE_RETRY,
    QCOW2_SETTLE_SHARE, QCOW2_SETTLE_UNWRITTEN,
};

/// The task of an image. It ends with the image, or when that is closed.
#[derive(Debug, Default)]
pub(in crate::formats::qcow2) struct Settler {
    /// Told when there is something to do.
    wake: Arc<Notify>,
    task: Mutex<Option<JoinHandle<()>>>,
    /// Held while clusters are punched.
    punching: tokio::sync::Mutex<()>,
    /// A test keeps it from working.
    #[cfg(test)]
    held: std::sync::atomic::AtomicBool,
}

/// What a slice of work has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slice {
    /// There is more to do.
    More,
    /// All is settled.
    Done,
    /// What is left has failed.
    Stuck,
}

impl Drop for Settler {
    fn drop(&mut self) {
        let task = self.task.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = task {
            task.abort();
        }
    }
}

impl Image {
    /// There is something to settle. Where no runtime is, closing the image does it.
    pub(super) fn wake_settler(self: &Arc<Self>) {
        self.settler.wake.notify_one();
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let task = &self.settler.task;
        let mut task = task.lock().unwrap_or_else(PoisonError::into_inner);
        if task.as_ref().is_none_or(JoinHandle::is_finished) {
            let work = run(Arc::downgrade(self), self.settler.wake.clone());
            *task = Some(runtime.spawn(work));
        }
    }

    /// Waits until nobody punches freed clusters, and keeps others from it. Taken behind the gate, or without it: who
    /// punches waits for no lock.
    pub(in crate::formats::qcow2) async fn stop_punching(&self) -> Punching<'_> {
        self.settler.punching.lock().await
    }

    /// Settles what there is, within a bound. The gate is closed.
    pub(in crate::formats::qcow2) async fn settle_to_close(&self, alone: &Punching<'_>) {
        if self.may_settle().is_err() {
            return;
        }
        let deadline = Instant::now() + QCOW2_SETTLE_ON_CLOSE;
        match self.settle_all(Some(deadline), alone).await {
            Ok(true) => {}
            Ok(false) => log::warn!("qcow2: {}", self.unsettled()),
            Err(error) => log::error!("qcow2: {}: {error}", self.unsettled()),
        }
    }

    fn unsettled(&self) -> String {
        let what = match self.is_marked_dirty() {
            true => "the next open repairs the image",
            false => "clusters stay counted for nobody until a check frees them",
        };
        let tables = self.settling.unsettled_tables();
        format!(
            "refcounts of {tables} tables are not up to date behind snapshot operations: {what}"
        )
    }

    /// Keeps the task from working, or lets it go on.
    #[cfg(test)]
    pub(in crate::formats::qcow2) fn hold_settler(self: &Arc<Self>, held: bool) {
        let flag = &self.settler.held;
        flag.store(held, std::sync::atomic::Ordering::SeqCst);
        self.wake_settler();
    }

    /// Settles everything, now.
    #[cfg(test)]
    pub(in crate::formats::qcow2) async fn settle_now(&self) -> Result<()> {
        let _alone = self.gate.close().await;
        self.settle_all(None, &self.stop_punching().await).await?;
        self.write_back_all().await?;
        self.mark_clean().await
    }

    /// Settles at full speed what there is, while requests go on, until the deadline. What fails is left to the task.
    pub(in crate::formats::qcow2) async fn settle_until(&self, deadline: Instant) {
        while Instant::now() < deadline {
            match self.settle_slice().await {
                Ok(Slice::More) => tokio::task::yield_now().await,
                Ok(Slice::Done | Slice::Stuck) => return,
                Err(error) => {
                    log::debug!("qcow2: settling on a full disk: {error}");
                    if self.settling.is_empty() {
                        // Only the mark in the header is left, which would fail at once for as long as this goes on.
                        return;
                    }
                }
            }
        }
    }

    /// Nothing is counted or freed in an image that is known to be damaged, or whose header is unknown.
    fn may_settle(&self) -> Result<()> {
        self.damage.check()?;
        self.header.check()
    }

    /// A slice of settling: up to what a guest's flush may find beside its own.
    async fn settle_slice(&self) -> Result<Slice> {
        #[cfg(test)]
        if self.settler.held.load(std::sync::atomic::Ordering::SeqCst) {
            return Ok(Slice::Done);
        }
        if self.settling.next() == Some(Work::Freed) && self.may_settle().is_ok() {
            let alone = self.stop_punching().await;
            // Another program may have the file then.
            if !self.is_closed() {
                self.punch_freed(&alone).await;
            }
        }
        // A slice may have to write back.
        let _flushing = self.gate.enter_flush().await;
        let _inside = self.gate.enter_unnoticed().await;
        if self.is_closed() {
            return Ok(Slice::Done);
        }
        if self.may_settle().is_err() {
            return Ok(Slice::Stuck);
        }
        if !self.settle_step().await? {
            if !self.settling.is_empty() {
                return Ok(Slice::Stuck);
            }
            return self.mark_clean().await.map(|()| Slice::Done);
        }
        let unwritten = (self.l2.dirty_count() as u64) << self.g.cluster_bits();
        if unwritten >= QCOW2_SETTLE_UNWRITTEN {
            self.write_back().await?;
        }
        Ok(Slice::More)
    }
}

/// Settles whatever there is, until the image is gone.
async fn run(image: Weak<Image>, wake: Arc<Notify>) {
    let mut retry = QCOW2_SETTLE_RETRY.0;
    let mut told = false;
    let mut last_busy: Option<Instant> = None;
    loop {
        let pause = {
            let Some(image) = image.upgrade() else { return };
            if image.is_closed() {
                return;
            }
            let started = Instant::now();
            let slice = image.settle_slice().await;
            if image.damage.is_unmarked() {
                image.damage.mark(&image.header).await;
            }
            if image.gate.take_busy() {
                last_busy = Some(Instant::now());
            }
            let is_busy = last_busy.is_some_and(|at| at.elapsed() < QCOW2_SETTLE_QUIET);
            match slice {
                Ok(Slice::More) if is_busy => {
                    let pause = started.elapsed() * (QCOW2_SETTLE_SHARE - 1);
                    Some(pause.min(QCOW2_SETTLE_PAUSE))
                }
                Ok(Slice::More) => Some(Duration::ZERO),
                Ok(Slice::Done) => {
                    (retry, told) = (QCOW2_SETTLE_RETRY.0, false);
                    None
                }
                Ok(Slice::Stuck) => {
                    image.settling.try_again();
                    retry = (retry * 2).min(QCOW2_SETTLE_RETRY.1);
                    Some(retry)
                }
                Err(error) => {
                    if !std::mem::replace(&mut told, true) {
                        log::warn!("qcow2: settling behind a snapshot is tried again: {error}");
                    }
                    match image.settling.is_empty() {
                        // Only the mark in the header is left, which fails at once on storage that is lost.
                        true => {
                            retry = (retry * 2).min(QCOW2_SETTLE_RETRY.1);
                            Some(retry)
                        }
                        // What has failed waits until all else is done.
                        false => Some(Duration::ZERO),
                    }
                }
            }
        };
        match pause {
            Some(Duration::ZERO) => tokio::task::yield_now().await,
            Some(pause) => tokio::time::sleep(pause).await,
            None => wake.notified().await,
        }
    }
}
