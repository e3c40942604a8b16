//! What a file is held ready for: nothing, being read, or being written. Locks follow, and so does the handle of a file that is open for
//! writing only while somebody writes (`auto-read-only`).
//!
//! ```text
//!   claims of commands ──┐
//!                        ├─ the most ──> level ──> locks, handle for writing
//!   the graph's need ────┘
//! ```
//!
//! Locks can be refused, so a command claims what its users will need before it lets them in; it gives the claim back when the graph knows
//! of them. Nothing can fail on the way down: the handle for reading has the locks, and stays open all the time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;

use super::extents::Change;
use super::{File, Open, locks, open_error};
use crate::driver::{BoxFuture, Claim, Claims, Need};
use crate::error::{Error, ErrorKind, Result};
use crate::io::OpenMode;
use crate::open::{Aio, FileOptions};

/// What is shared by a file and those who hold it ready.
#[derive(Debug)]
pub(super) struct Holding {
    pub(super) open: ArcSwap<Open>,
    pub(super) options: FileOptions,
    state: Mutex<State>,
    /// One at a time holds the file ready for more, or has it opened otherwise.
    pub(super) changing: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Debug, Default)]
struct State {
    /// What the users in the graph need.
    graph: Need,
    /// How many claims there are to reading and to writing.
    readers: usize,
    writers: usize,
    /// What it is held ready for.
    level: Need,
    is_closed: bool,
}

impl State {
    fn wanted(&self) -> Need {
        let claimed = match (self.readers, self.writers) {
            _ if self.is_closed => return Need::Nothing,
            (0, 0) => Need::Nothing,
            (_, 0) => Need::Reads,
            (_, _) => Need::Writes,
        };
        claimed.max(self.graph)
    }

    fn claims(&mut self, need: Need) -> Option<&mut usize> {
        match need {
            Need::Nothing => None,
            Need::Reads => Some(&mut self.readers),
            Need::Writes => Some(&mut self.writers),
        }
    }
}

/// A claim on a file.
struct Held {
    holding: Arc<Holding>,
    need: Need,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.holding.state();
        if let Some(claims) = state.claims(self.need) {
            *claims -= 1;
        }
        self.holding.lower(&mut state);
    }
}

impl Holding {
    pub(super) fn new(open: Open, options: FileOptions) -> Arc<Holding> {
        Arc::new(Holding {
            open: ArcSwap::from_pointee(open),
            options,
            state: Mutex::default(),
            changing: Arc::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn level(&self) -> Need {
        self.state().level
    }

    fn claim(self: &Arc<Self>, need: Need) -> Held {
        if let Some(claims) = self.state().claims(need) {
            *claims += 1;
        }
        Held {
            holding: self.clone(),
            need,
        }
    }

    /// Gives up what nobody needs any more.
    fn lower(&self, state: &mut State) {
        let wanted = state.wanted();
        if wanted >= state.level {
            return;
        }
        let open = self.open.load_full();
        locks::lower(&open.locked().host, state.level, wanted);
        if wanted < Need::Writes
            && let Some(reading) = &open.reading
        {
            // Requests under way have the other one until they end.
            self.open.store(reading.clone());
        }
        state.level = wanted;
    }

    /// Another handle takes the place of the present one, with locks for this level.
    pub(super) fn replace(&self, open: Open, level: Need) {
        let mut state = self.state();
        let open = Arc::new(open);
        let old = self.open.swap(open.clone());
        if level < state.level
            && let Err(error) = locks::raise(&open.locked().host, level, state.level, &self.options)
        {
            log::error!("{error}");
        }
        state.level = state.level.max(level);
        self.lower(&mut state);
        // Now, and not when the last request that uses it has ended.
        locks::release(&old.locked().host);
    }

    /// Gives all up for good.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.is_closed = true;
        state.level = Need::Nothing;
        locks::release(&self.open.load().locked().host);
    }
}

impl File {
    /// Holds the file ready for this, and for as long as the answer lives.
    async fn do_claim(&self, need: Need) -> Result<Claim> {
        let _alone = self.holding.changing.clone().lock_owned().await;
        let held = self.holding.claim(need);
        let before = self.holding.level();
        let open = self.present();
        let opens = need == Need::Writes && open.opens_for_writing();
        if before >= need && !opens {
            return Ok(Claim::of(held));
        }
        if before == Need::Nothing && !open.host.is_at(self.filename()).await {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "'{}' is another file by now than the one that was opened",
                    self.filename()
                ),
            ));
        }
        let writing = match opens {
            true => Some(self.open_for_writing(&open).await?),
            false => None,
        };
        {
            let mut state = self.holding.state();
            // Others may have gone meanwhile.
            if state.level < need {
                let host = &open.locked().host;
                locks::raise(host, state.level, need, &self.holding.options)?;
                state.level = need;
            }
            if let Some(writing) = writing {
                self.holding.open.store(Arc::new(writing));
            }
        }
        if before == Need::Nothing {
            self.look_again()?;
        }
        Ok(Claim::of(held))
    }

    /// The same file as it is used, and a handle for writing beside it.
    pub(super) async fn open_for_writing(&self, reading: &Arc<Open>) -> Result<Open> {
        let mode = OpenMode {
            writable: true,
            direct: reading.direct,
            ring: self.holding.options.aio == Aio::IoUring,
        };
        let opened = reading.host.reopen(mode).await;
        let host = opened.map_err(|error| open_error(self.filename(), reading.direct, &error))?;
        Ok(Open {
            host,
            reading: Some(reading.clone()),
            ..**reading
        })
    }

    /// Others may have changed the file while nobody here used it.
    fn look_again(&self) -> Result<()> {
        let size = self.present().host.size();
        let size = size.map_err(self.failed("get the size of"))?;
        self.size.store(size, std::sync::atomic::Ordering::Relaxed);
        drop(self.extents.change(Change::Freed, 0..u64::MAX));
        drop(self.extents.change(Change::Filled, 0..u64::MAX));
        Ok(())
    }
}

impl Claims for File {
    fn claim(&self, need: Need) -> BoxFuture<'_, Result<Claim>> {
        Box::pin(self.do_claim(need))
    }

    fn held(&self) -> Need {
        self.holding.level()
    }

    fn keep(&self) -> Claim {
        let level = self.holding.level();
        Claim::of(self.holding.claim(level))
    }

    fn set_need(&self, need: Need) {
        let mut state = self.holding.state();
        state.graph = need;
        if state.wanted() > state.level {
            // Whoever let the user in should have claimed it.
            let (open, wanted) = (self.present(), state.wanted());
            match locks::raise(
                &open.locked().host,
                state.level,
                wanted,
                &self.holding.options,
            ) {
                Ok(()) => state.level = wanted,
                Err(error) => log::error!("{error}"),
            }
        }
        self.holding.lower(&mut state);
    }
}
