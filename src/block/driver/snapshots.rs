//! The contract of internal snapshots: reading them, and changing them in steps that become visible all at once.
//!
//! A node whose format has snapshots implements `Snapshots`; whoever changes some gets a `SnapshotChange` and drives it.

use std::sync::Arc;

use super::{BoxFuture, Driver, unsupported};
use crate::error::Result;

/// One internal snapshot, as the image records it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Unique in the image; decimal numbers that count up.
    pub id: String,
    /// The user's name; may be empty in images made elsewhere.
    pub name: String,
    /// Bytes of saved VM state.
    pub vm_state_size: u64,
    /// Wall clock at creation: seconds since 1970.
    pub date_sec: u32,
    /// Wall clock at creation: nanoseconds in the second.
    pub date_nsec: u32,
    /// Guest clock at creation, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instruction count of a replay, if it was recorded.
    pub icount: Option<u64>,
    /// Size of the disk at creation in bytes.
    pub disk_size: u64,
}

/// Which snapshot: at least one of the two is given, and a snapshot must match all that is given.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SnapshotSelector {
    /// The id.
    pub id: Option<String>,
    /// The name.
    pub name: Option<String>,
}

impl SnapshotSelector {
    /// Whether it is this one.
    pub fn matches(&self, info: &SnapshotInfo) -> bool {
        self.id.as_ref().is_none_or(|id| *id == info.id)
            && self.name.as_ref().is_none_or(|name| *name == info.name)
    }
}

/// What a new snapshot is called and when it was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Not empty, and not the name of another.
    pub name: String,
    /// Seconds since 1970.
    pub date_sec: u32,
    /// Nanoseconds in the second.
    pub date_nsec: u32,
    /// Guest clock in nanoseconds; 0 where no guest runs.
    pub vm_clock_nsec: u64,
}

impl NewSnapshot {
    /// One of which nothing but the name matters.
    pub fn named(name: impl Into<String>) -> Self {
        NewSnapshot {
            name: name.into(),
            date_sec: 0,
            date_nsec: 0,
            vm_clock_nsec: 0,
        }
    }
}

/// Internal snapshots of a node.
pub trait Snapshots: Send + Sync {
    /// Whether this image can have snapshots: `Unsupported`, with the reason, for one of a kind that cannot.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// Whether requests are held until a change is durable, because [`SnapshotChange::let_go`] is of no use here: those who can wait
    /// flush ahead.
    fn holds_requests(&self) -> bool {
        true
    }

    /// All of them, in the order of the image's table. From memory, no I/O.
    fn list(&self) -> Vec<SnapshotInfo>;

    /// Takes a snapshot of the present content: every write answered before the call is in it, none that is sent
    /// after the answer. Durable when it answers. On error nothing has changed and nothing is leaked.
    fn create(&self, new: NewSnapshot) -> BoxFuture<'_, Result<SnapshotInfo>> {
        Box::pin(async move {
            let mut change = self.change().await?;
            let created = change.create(new).await?;
            change.let_go(Box::new(drop)).await?;
            complete(change).await.map(|()| created)
        })
    }

    /// Deletes the one that matches and answers what it was. `NotFound` when none does, `InUse` while it is viewed.
    fn delete(&self, which: SnapshotSelector) -> BoxFuture<'_, Result<SnapshotInfo>> {
        Box::pin(async move {
            let mut change = self.change().await?;
            let deleted = change.delete(which).await?;
            change.let_go(Box::new(drop)).await?;
            complete(change).await.map(|()| deleted)
        })
    }

    /// Makes the disk what it was when the snapshot was taken, and answers which it is. Its size may change. Requests
    /// that were answered before are gone, durably; the snapshot stays. `NotFound` when none matches.
    fn revert(&self, which: SnapshotSelector) -> BoxFuture<'_, Result<SnapshotInfo>> {
        Box::pin(async move {
            let mut change = self.change().await?;
            let reverted = change.revert(which).await?;
            complete(change).await.map(|()| reverted)
        })
    }

    /// Begins a change of several steps that happen all at once: does what takes time ahead. Cancellation: nothing has happened.
    fn change(&self) -> BoxFuture<'_, Result<Box<dyn SnapshotChange>>> {
        Box::pin(async { Err(unsupported("Snapshots in several steps")) })
    }

    /// The disk as the snapshot has it, read-only, while the image goes on being written. The snapshot cannot be deleted
    /// (`InUse`) until the view is closed. `NotFound` when none matches.
    fn view(&self, which: SnapshotSelector) -> BoxFuture<'_, Result<Arc<dyn Driver>>> {
        let _ = which;
        Box::pin(async { Err(unsupported("Reading a snapshot")) })
    }
}

/// A disk whose snapshots can be reached: a node, or a bare driver.
pub trait SnapshotSource: Send + Sync {
    /// Its internal snapshots, for formats that have them.
    fn snapshots(&self) -> Option<&dyn Snapshots>;
}

/// Does what has been staged.
pub(crate) async fn complete(mut change: Box<dyn SnapshotChange>) -> Result<()> {
    change.prepare().await?;
    change.commit().await?;
    drop(change.finish());
    Ok(())
}

/// A change of an image's snapshots, under way.
///
/// ```text
/// hold -> steps in any number and order -> [let_go] -> prepare -> commit -> finish
///                                                                 commit -> roll_back
/// go_ahead -> deletes and reverts -> prepare -> commit -> hold -> finish
///                                                         hold -> roll_back
/// ```
///
/// Steps see what earlier ones have done. Nothing of it is visible, in the file or to others, before `commit`. Dropped before
/// that, nothing has happened; dropped behind it, it is finished.
pub trait SnapshotChange: Send + Sync {
    /// Holds back what makes the image durable, of itself and of requests, and waits until what has begun of it has ended; other
    /// requests go on. For those who hold requests back above the image before they call `hold`, and held back flushes there before.
    fn hold_flushes(&mut self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Holds requests back, until they are let go or the change is finished or dropped. The first step does it, too.
    fn hold(&mut self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    /// Lets the steps be done, prepared and committed while requests go on, if that is possible; they see nothing of it before
    /// `finish`, and `hold` comes in between. No step of it may take a snapshot. What they write up to then, durably or not, a
    /// crash behind the commit takes away where the steps revert. Before anything else.
    fn go_ahead(&mut self) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async { Ok(false) })
    }

    /// Takes a snapshot of the disk as it is at this step. Errors as [`Snapshots::create`]; the change goes on without the step.
    fn create(&mut self, new: NewSnapshot) -> BoxFuture<'_, Result<SnapshotInfo>>;

    /// Deletes a snapshot; answers what it was.
    fn delete(&mut self, which: SnapshotSelector) -> BoxFuture<'_, Result<SnapshotInfo>>;

    /// Makes the disk what it was when the snapshot was taken, its size included; answers which it is. The snapshot stays.
    fn revert(&mut self, which: SnapshotSelector) -> BoxFuture<'_, Result<SnapshotInfo>>;

    /// The size of the disk after the steps so far, in bytes.
    fn size(&self) -> u64;

    /// Whether `let_go` will let requests go on; takes the space that the steps need then. No step may follow.
    fn may_let_go(&mut self) -> BoxFuture<'_, Result<bool>> {
        Box::pin(async { Ok(false) })
    }

    /// Lets requests go on where the change allows it, and answers whether it does. `then` is called with what holds them, as soon as
    /// they can go on: they do when that is dropped. What they write from then on no snapshot of this change has, whether it happens or
    /// not. As a rule nothing was read or written since `hold`, and it has never waited. Behind that it waits for the disk. No step may
    /// follow.
    fn let_go(&mut self, then: GoOn) -> BoxFuture<'_, Result<bool>> {
        let _ = then;
        Box::pin(async { Ok(false) })
    }

    /// Makes durable all that the steps need. Space is taken and everything that can fail has been done, except for `commit`'s one
    /// write. No step may follow.
    fn prepare(&mut self) -> BoxFuture<'_, Result<()>>;

    /// Finds out whether `prepare` would do it, and makes nothing durable for that. Where requests could be let go, they go on while
    /// space is taken. Nothing may follow but that the change is dropped.
    fn try_out(&mut self) -> BoxFuture<'_, Result<()>>;

    /// What `commit` will write, once all is prepared, for whoever has to do it after a crash; everything else that comes before
    /// that write is done now. `None` when it will write nothing. To be followed by `commit` or `roll_back`.
    fn switch(&mut self) -> BoxFuture<'_, Result<Option<HeaderSwitch>>>;

    /// Makes the change with one durable write of the image's header. After an error nothing has changed.
    fn commit(&mut self) -> BoxFuture<'_, Result<()>>;

    /// Takes back a commit, because another image's has failed, or what `switch` has done; does nothing before that. On error the
    /// image takes no more changes until it is opened again, and everything is kept that either state needs: whoever has been told by
    /// `switch` may put back the header of before. Where nobody has, and it is known that the change is in the file, it stands.
    fn roll_back(&mut self) -> BoxFuture<'_, Result<()>>;

    /// The change stays; requests go on. Those that have to change the header again wait until the answer is dropped: until
    /// then the file holds what [`SnapshotChange::switch`] says.
    fn finish(self: Box<Self>) -> HeaderHeld;
}

/// The one write that changes an image: how the beginning of its file differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderSwitch {
    /// The first sector of the file as it is.
    pub before: Vec<u8>,
    /// As it will be; as long.
    pub after: Vec<u8>,
}

impl HeaderSwitch {
    /// The bytes that differ: where they begin, and what they will be.
    pub fn difference(&self) -> (usize, &[u8]) {
        let differs = |at: &usize| self.before.get(*at) != self.after.get(*at);
        let first = (0..self.after.len()).find(differs).unwrap_or(0);
        let end = (0..self.after.len())
            .rfind(differs)
            .map_or(first, |last| last + 1);
        (first, self.after.get(first..end).unwrap_or_default())
    }
}

/// What is called when requests can go on.
pub type GoOn = Box<dyn FnOnce(RequestsHeld) + Send>;

/// Requests are held back for as long as this exists.
pub struct RequestsHeld(#[allow(dead_code, reason = "dropped")] Option<Box<dyn Send + Sync>>);

impl RequestsHeld {
    /// Held back by `guard`.
    pub fn by(guard: impl Send + Sync + 'static) -> Self {
        RequestsHeld(Some(Box::new(guard)))
    }

    /// Nothing holds them back.
    pub fn not() -> Self {
        RequestsHeld(None)
    }
}

/// The header of an image does not change while this exists.
pub struct HeaderHeld(#[allow(dead_code, reason = "dropped")] Option<Box<dyn Send + Sync>>);

impl HeaderHeld {
    /// Held by `guard`.
    pub fn by(guard: impl Send + Sync + 'static) -> Self {
        HeaderHeld(Some(Box::new(guard)))
    }

    /// Of an image whose header nobody needs to hold.
    pub fn not() -> Self {
        HeaderHeld(None)
    }
}
