//! The handle on a change of snapshots: see [`SnapshotChange`].
//!
//! Until requests are held back there is nothing but what takes time and can be done ahead; from then on there is a [`Staged`], which
//! does the steps. A step runs to its end even when nobody waits for it any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Mutex;

use super::counting::look_for_greatest;
use super::room::Room;
use super::staged::{Ready, Staged};
use crate::driver::{
    BoxFuture, GoOn, HeaderHeld, HeaderSwitch, NewSnapshot, SnapshotChange, SnapshotInfo,
    SnapshotSelector,
};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::qcow2::image::Image;
use crate::io::{Closed, RunToEnd};

/// The handle on a change. The change itself lives on while a step runs to its end that nobody waits for.
#[derive(Debug)]
pub(super) struct Change {
    image: Arc<Image>,
    state: Arc<Mutex<State>>,
    size: Arc<AtomicU64>,
}

#[derive(Debug)]
enum State {
    /// Requests go on. `None` when they could not be held back.
    Ahead(Option<Ahead>),
    /// They have been held back, or may go on until the header has been switched.
    Held(Box<Staged>),
}

/// What is there before requests are held back.
#[derive(Debug)]
struct Ahead {
    image: Arc<Image>,
    size: Arc<AtomicU64>,
    room: Room,
    /// Nobody begins to make something durable.
    flushes: Option<Closed>,
}

impl Change {
    /// Does what takes time, while requests go on.
    pub(super) async fn begin(image: Arc<Image>) -> Result<Change> {
        let _inside = image.gate.enter().await;
        image.check_range(0, 0)?;
        image.prepare_metadata_change().await?;
        look_for_greatest(&image).await?;
        if let Err(error) = image.free_areas().await {
            log::warn!("qcow2: replaced tables keep their space for now: {error}");
        }
        let room = Room::new(&image).await;
        let size = Arc::new(AtomicU64::new(image.size()));
        let ahead = Ahead {
            image: image.clone(),
            size: size.clone(),
            room,
            flushes: None,
        };
        Ok(Change {
            image: image.clone(),
            state: Arc::new(Mutex::new(State::Ahead(Some(ahead)))),
            size,
        })
    }

    /// Runs a step, to its end even when nobody waits for it any more.
    fn step<T: Send + 'static>(
        &self,
        step: impl for<'a> FnOnce(&'a mut Staged) -> BoxFuture<'a, Result<T>> + Send + 'static,
    ) -> BoxFuture<'_, Result<T>> {
        let state = self.state.clone();
        Box::pin(RunToEnd::new(async move {
            let mut state = state.lock_owned().await;
            step(state.held().await?).await
        }))
    }
}

impl State {
    /// Lets the steps be done while requests go on, where that is possible.
    async fn go_ahead(&mut self) -> Result<bool> {
        let State::Ahead(Some(ahead)) = self else {
            return Ok(false);
        };
        let image = ahead.image.clone();
        let alone = image.gate.reserve().await;
        image.check_range(0, 0)?;
        image.header.check()?;
        if !image.may_go_ahead().await {
            return Ok(false);
        }
        let ready = Ready {
            room: std::mem::take(&mut ahead.room),
            size: ahead.size.clone(),
            alone,
        };
        *self = State::Held(Box::new(Staged::ahead(image, ready)?));
        Ok(true)
    }

    /// The change with requests held back.
    async fn held(&mut self) -> Result<&mut Staged> {
        if let State::Ahead(ahead) = self {
            let Some(ahead) = ahead.take() else {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "A change of snapshots could not be begun",
                ));
            };
            *self = State::Held(Box::new(ahead.hold().await?));
        }
        match self {
            State::Held(staged) => Ok(staged),
            State::Ahead(_) => unreachable!("it was held right now"),
        }
    }
}

impl Ahead {
    /// Closes the gate.
    async fn hold(self) -> Result<Staged> {
        let Ahead {
            image,
            size,
            room,
            flushes,
        } = self;
        let alone = image.gate.close().await;
        drop(flushes);
        image.check_range(0, 0)?;
        image.header.check()?;
        let ready = Ready { room, size, alone };
        Staged::new(image, ready)
    }
}

impl SnapshotChange for Change {
    fn hold_flushes(&mut self) -> BoxFuture<'_, Result<()>> {
        let state = self.state.clone();
        Box::pin(RunToEnd::new(async move {
            match &mut *state.lock_owned().await {
                State::Ahead(Some(ahead)) => {
                    ahead.flushes = Some(ahead.image.gate.close_to_flushes().await);
                }
                State::Ahead(None) => {}
                State::Held(staged) => staged.hold_flushes().await,
            }
            Ok(())
        }))
    }

    fn go_ahead(&mut self) -> BoxFuture<'_, Result<bool>> {
        let state = self.state.clone();
        Box::pin(RunToEnd::new(async move {
            state.lock_owned().await.go_ahead().await
        }))
    }

    fn hold(&mut self) -> BoxFuture<'_, Result<()>> {
        self.step(|staged| Box::pin(staged.hold()))
    }

    fn create(&mut self, new: NewSnapshot) -> BoxFuture<'_, Result<SnapshotInfo>> {
        self.step(|staged| Box::pin(staged.create(new)))
    }

    fn delete(&mut self, which: SnapshotSelector) -> BoxFuture<'_, Result<SnapshotInfo>> {
        self.step(|staged| Box::pin(staged.delete(which)))
    }

    fn revert(&mut self, which: SnapshotSelector) -> BoxFuture<'_, Result<SnapshotInfo>> {
        self.step(|staged| Box::pin(staged.revert(which)))
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn may_let_go(&mut self) -> BoxFuture<'_, Result<bool>> {
        self.step(|staged| Box::pin(staged.may_let_go()))
    }

    fn let_go(&mut self, then: GoOn) -> BoxFuture<'_, Result<bool>> {
        self.step(|staged| Box::pin(staged.let_go(then)))
    }

    fn prepare(&mut self) -> BoxFuture<'_, Result<()>> {
        self.step(|staged| Box::pin(staged.prepare()))
    }

    fn try_out(&mut self) -> BoxFuture<'_, Result<()>> {
        self.step(|staged| Box::pin(staged.try_out()))
    }

    fn commit(&mut self) -> BoxFuture<'_, Result<()>> {
        self.step(|staged| Box::pin(staged.commit()))
    }

    fn roll_back(&mut self) -> BoxFuture<'_, Result<()>> {
        let state = self.state.clone();
        Box::pin(RunToEnd::new(async move {
            match &mut *state.lock_owned().await {
                State::Held(staged) => staged.roll_back().await,
                State::Ahead(_) => Ok(()),
            }
        }))
    }

    fn switch(&mut self) -> BoxFuture<'_, Result<Option<HeaderSwitch>>> {
        self.step(|staged| Box::pin(staged.preview()))
    }

    fn finish(self: Box<Self>) -> HeaderHeld {
        let mut state = self.state.try_lock().ok();
        let held = match state.as_deref_mut() {
            Some(State::Held(staged)) => staged.take_header(),
            _ => None,
        };
        // While the gate is closed nobody changes it. Dropping the change does the rest.
        held.or_else(|| self.image.header.hold().map(HeaderHeld::by))
            .unwrap_or_else(HeaderHeld::not)
    }
}
