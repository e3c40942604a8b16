//! What happens before a guest changes something.

use std::ops::Range;
use std::pin::{Pin, pin};
use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Sleep;

use super::map::{Claim, Found};
use super::shared::{Kept, Mode, Shared};
use super::{OnCbwError, SyncMode};
use crate::driver::SnapshotSource;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::COPY_TARGET_PATIENCE;

/// The guests' side of a copy: what the filter above the source asks before it passes a change on.
#[derive(Clone)]
pub struct BeforeChange {
    pub(super) shared: Arc<Shared>,
}

impl BeforeChange {
    /// Answers when these bytes of the source may be changed.
    ///
    /// Errors: only with [`OnCbwError::BreakGuestWrite`], when the old content cannot be read, or the target does not take it and there
    /// is no memory left to keep it. Cancellation: what has not been taken stays pending.
    pub async fn ready(&self, bytes: Range<u64>) -> Result<()> {
        let shared = &*self.shared;
        let mut room: Option<(u64, OwnedSemaphorePermit)> = None;
        loop {
            let mut ended = pin!(shared.map.ended());
            ended.as_mut().enable();
            match shared.mode() {
                Mode::Passing => return Ok(()),
                Mode::Taken | Mode::Switching => match shared.map.is_looked_at(bytes.clone()) {
                    true => ended.await,
                    false => return Ok(()),
                },
                Mode::Copying => {
                    let most = room.as_ref().map_or(shared.guest_chunk, |(len, _)| *len);
                    let claim = match shared.map.find(bytes.clone(), most) {
                        Found::Free => return Ok(()),
                        Found::Busy => {
                            ended.await;
                            continue;
                        }
                        Found::Claimed(claim) => claim,
                    };
                    if shared.mode() != Mode::Copying {
                        // Another guest may have changed it before it was claimed.
                        continue;
                    }
                    let len = claim.len();
                    let taken = room.take().map(|(_, room)| room);
                    let copied = match taken.or_else(|| shared.try_room(len)) {
                        Some(room) => copy(shared, claim, room).await,
                        None => {
                            // Neighbours must not wait for who waits for memory.
                            drop(claim);
                            let found = wait_room(shared, len).await;
                            found.map(|found| room = found.map(|room| (len, room)))
                        }
                    };
                    if let Err(error) = copied {
                        return broken(shared, error);
                    }
                }
            }
        }
    }

    /// Refuses to cut the source off where old content is still to be copied.
    pub fn check_shrink(&self, size: u64) -> Result<()> {
        let shared = &*self.shared;
        if shared.mode() == Mode::Passing || !shared.map.is_needed_from(size) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::InUse,
            format!("Cannot shrink to {size} bytes: what is behind is still to be copied"),
        ))
    }

    /// Refuses what replaces the source's content as a whole, unless nothing is read from the disk itself any more.
    pub fn check_revert(&self) -> Result<()> {
        match self.shared.mode() {
            Mode::Passing => Ok(()),
            Mode::Copying | Mode::Taken | Mode::Switching => Err(Error::new(
                ErrorKind::InUse,
                "Cannot revert to a snapshot while the disk is being copied",
            )),
        }
    }

    /// The source's snapshots.
    pub fn source(&self) -> &dyn SnapshotSource {
        &*self.shared.source.snapshots
    }
}

/// Reads what is claimed and leaves it for the target; gives it to the target first where somebody reads that.
async fn copy(shared: &Shared, claim: Claim, room: OwnedSemaphorePermit) -> Result<()> {
    let (offset, len) = (claim.offset(), claim.len());
    if shared.options.sync == SyncMode::Top && !shared.is_allocated(offset, len).await? {
        shared.add_dropped(len);
        claim.taken();
        return Ok(());
    }
    let data = shared.reader().read(offset, len).await?;
    if shared.options.sync == SyncMode::None {
        let written = shared.put(offset, data, 0).await;
        shared.note_target(&written);
        written?;
        shared.add_done(len);
        shared.changed.notify_waiters();
    } else {
        shared.keep(Kept {
            offset,
            data,
            _room: room,
        });
    }
    claim.taken();
    Ok(())
}

/// Waits for memory. `None` when guests are treated otherwise by now. An error when the target takes nothing.
async fn wait_room(shared: &Shared, len: u64) -> Result<Option<OwnedSemaphorePermit>> {
    shared.relief.wanted();
    let mut room = pin!(shared.wait_room(len));
    let mut patience = pin!(tokio::time::sleep(COPY_TARGET_PATIENCE));
    loop {
        let mut changed = pin!(shared.changed.notified());
        changed.as_mut().enable();
        if shared.mode() != Mode::Copying {
            return Ok(None);
        }
        let trouble = shared.target_trouble();
        let hopeless = trouble.filter(|_| !shared.relief.may_come());
        tokio::select! {
            room = &mut room => return Ok(room),
            () = &mut changed => {}
            // Who owns the copy may end it because of the error: then no guest need fail.
            error = after(patience.as_mut(), hopeless) => return Err(error),
        }
    }
}

/// Answers with the error, if there is one, when the time has come.
async fn after(time: Pin<&mut Sleep>, error: Option<Error>) -> Error {
    match error {
        Some(error) => {
            time.await;
            error
        }
        None => std::future::pending().await,
    }
}

/// The old content could not be saved: the guest fails, or the copy.
fn broken(shared: &Shared, error: Error) -> Result<()> {
    match shared.options.on_cbw_error {
        OnCbwError::BreakGuestWrite => Err(error),
        OnCbwError::BreakSnapshot => {
            shared.fail(error);
            Ok(())
        }
    }
}
