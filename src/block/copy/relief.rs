//! The temporary internal snapshot that lets guests go when the target cannot follow.
//!
//! It may be taken at any time after the point in time: until then no guest has changed what is still pending, so the
//! snapshot shows all of that as it was. From the moment that it exists the copy reads there, guests copy nothing more, and the image
//! keeps old content by itself.
//!
//! ```text
//! Copying ──snapshot taken──> Taken ──durable, reader switched──> Switching ──last looks at the disk itself have ended──> Passing
//! ```
//!
//! Guests go on when it is taken, which needs no I/O; the copy, when it can be read. Should it not become durable, the copy has failed:
//! guests have changed what it needs. It is taken when half of the guests' memory is full, so that they need not wait for that either.
//!
//! The snapshot cannot be deleted while it is read, and is deleted when the copy is over, whatever its end. What a killed process
//! leaves has a name that begins with [`TEMPORARY_SNAPSHOT`]: nothing needs it any more. The next one that is taken of this disk
//! clears it away.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::Notify;

use super::shared::{Mode, Shared};
use super::{PointInTime, SyncMode};
use crate::driver::{Driver, NewSnapshot, SnapshotSelector, Snapshots, complete};
use crate::error::{Error, ErrorKind, Result};

/// How the names of temporary snapshots begin. The copy's label and a number follow.
pub const TEMPORARY_SNAPSHOT: &str = "x-qblockd-temporary:";

/// Who wants the snapshot, and what has become of it.
#[derive(Default)]
pub(super) struct Relief {
    wanted: Notify,
    /// It is certain that there will be none.
    impossible: AtomicBool,
    taken: Mutex<Option<Taken>>,
    /// Held while the snapshot is taken and looked at, which may be on another thread. True when it is too late for that.
    switching: tokio::sync::Mutex<bool>,
}

#[derive(Clone)]
struct Taken {
    which: SnapshotSelector,
    /// `None` once it is closed.
    view: Option<Arc<dyn Driver>>,
}

impl Relief {
    /// Guests will have to wait for memory soon.
    pub(super) fn wanted(&self) {
        self.wanted.notify_one();
    }

    /// Whether a snapshot may still let guests go.
    pub(super) fn may_come(&self) -> bool {
        !self.impossible.load(Ordering::Acquire)
    }

    fn taken(&self) -> MutexGuard<'_, Option<Taken>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Whether the source can take a temporary snapshot.
    pub(super) fn check_snapshots(&self) -> Result<&dyn Snapshots> {
        let Some(snapshots) = self.source.snapshots.snapshots() else {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "The source has no internal snapshots",
            ));
        };
        snapshots.check().map(|()| snapshots)
    }

    /// Takes the snapshot when it is time. Answers with an error only where the copy must have it.
    pub(super) async fn relieve(self: &Arc<Self>) -> Result<()> {
        let must = self.options.point_in_time == PointInTime::InternalSnapshot;
        let never = self.options.point_in_time == PointInTime::CopyBeforeWrite
            || self.options.sync == SyncMode::None;
        if never {
            self.no_relief();
            return Ok(());
        }
        if !must {
            if self.check_snapshots().is_err() {
                self.no_relief();
                return Ok(());
            }
            self.relief.wanted.notified().await;
        }
        match self.switch().await {
            Err(error) if must || self.mode() == Mode::Taken => Err(error),
            Err(error) => {
                log::info!(
                    "copy: guests wait for the target, because no snapshot could be taken: {error}"
                );
                self.no_relief();
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn no_relief(&self) {
        self.relief.impossible.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }

    async fn switch(self: &Arc<Self>) -> Result<()> {
        let is_over = self.relief.switching.lock().await;
        if *is_over {
            return Ok(());
        }
        let snapshots = self.check_snapshots()?;
        clear_away(snapshots).await;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default();
        let new = NewSnapshot {
            name: format!(
                "{TEMPORARY_SNAPSHOT}{}.{}",
                self.options.label,
                now.as_nanos()
            ),
            date_sec: now.as_secs() as u32,
            date_nsec: now.subsec_nanos(),
            vm_clock_nsec: 0,
        };
        let which = SnapshotSelector {
            id: None,
            name: Some(new.name.clone()),
        };
        // Noted first: if this is dropped in its middle, `remove_snapshot` finds out what has happened.
        *self.relief.taken() = Some(Taken {
            which: which.clone(),
            view: None,
        });
        if snapshots.holds_requests() {
            // They wait while the snapshot makes durable what came before it: that should not be much.
            self.source.disk.flush().await?;
        }
        let mut change = snapshots.change().await?;
        change.create(new).await?;
        let shared = self.clone();
        let taken = move |held| {
            drop(held);
            shared.advance(Mode::Copying, Mode::Taken);
        };
        change.let_go(Box::new(taken)).await?;
        complete(change).await?;
        let view = snapshots.view(which.clone()).await?;
        if let Some(taken) = &mut *self.relief.taken() {
            taken.view = Some(view.clone());
        }
        self.set_reader(view);
        let earlier = self.map.next_look();
        self.advance(Mode::Copying, Mode::Switching);
        self.advance(Mode::Taken, Mode::Switching);
        loop {
            let mut ended = pin!(self.map.ended());
            ended.as_mut().enable();
            if !self.map.is_looked_at_before(earlier) {
                break;
            }
            ended.await;
        }
        self.set_mode(Mode::Passing);
        Ok(())
    }

    /// Deletes the snapshot, if one was taken. Nobody reads it any more, but who takes it may be in its middle: a task that was ended
    /// goes on to where it waits next.
    pub(super) async fn remove_snapshot(&self) -> Result<()> {
        *self.relief.switching.lock().await = true;
        let Some(taken) = self.relief.taken().take() else {
            return Ok(());
        };
        self.set_reader(self.source.disk.clone());
        if let Some(view) = taken.view {
            view.close().await?;
        }
        let Ok(snapshots) = self.check_snapshots() else {
            return Ok(());
        };
        match snapshots.delete(taken.which).await {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            deleted => deleted.map(drop),
        }
    }
}

/// Deletes the temporary snapshots that killed processes have left in an image which is open for writing, and locked, so that no other
/// process copies it; those of copies that run here are being viewed, and stay. Each takes one write of the header. Where all requests
/// would wait meanwhile, the next copy does it.
pub async fn clear_away_left(driver: &dyn Driver) {
    if let Some(snapshots) = driver.snapshots()
        && snapshots.check().is_ok()
        && !snapshots.holds_requests()
    {
        clear_away(snapshots).await;
    }
}

/// Deletes what killed processes have left; those of other copies that run are being viewed.
async fn clear_away(snapshots: &dyn Snapshots) {
    let left = snapshots.list().into_iter();
    for info in left.filter(|info| info.name.starts_with(TEMPORARY_SNAPSHOT)) {
        let which = SnapshotSelector {
            id: Some(info.id),
            name: Some(info.name.clone()),
        };
        match snapshots.delete(which).await {
            Ok(_) => log::warn!(
                "deleted snapshot '{}', which a backup that was cut off had left",
                info.name
            ),
            Err(error) => log::debug!("copy: snapshot '{}' stays: {error}", info.name),
        }
    }
}
