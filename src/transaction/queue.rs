//! Actions that are prepared at the same time, and take effect in their order.
//!
//! ```text
//!   resolve 1 -> prepare 1 .............. enter 1
//!     resolve 2 -> prepare 2 ....                 enter 2
//!       3 is about what 1 is about: ......................... resolve 3 -> prepare 3 -> enter 3
//! ```
//!
//! An action is resolved when all before it that have something in common with it have entered: it finds what it would find if they had
//! been prepared one after the other, and the others are no concern of it.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;

use block::driver::BoxFuture;
use futures_util::stream::{FuturesOrdered, StreamExt as _};
use qapi::rt::QmpError;

use super::concerns::Keys;
use super::{Action, Concerns, Effect, Plan, Prepared, Preparing, Running, guarded};
use crate::daemon::{Control, internal_error};
use crate::limits;

/// What is done when an action fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnFailure {
    /// Those behind it are not begun.
    Stop,
    /// It is aborted, and those behind it are tried.
    GoOn,
}

/// What has become of the actions of a transaction.
#[derive(Default)]
pub(super) struct Entered {
    /// (place, why), in order.
    pub(super) errors: Vec<(usize, QmpError)>,
    /// (place, what it would have done) of those that were aborted.
    pub(super) aborted: Vec<(usize, Effect)>,
}

/// An action, and whether it could be prepared.
type Tried = (Prepared, Result<(), QmpError>);

/// Actions under way.
#[derive(Default)]
struct Queue<'w> {
    preparing: FuturesOrdered<BoxFuture<'w, Tried>>,
    /// The first of those under way, as far as they are done.
    tried: VecDeque<Tried>,
    /// What each of those under way is about, in order.
    about: VecDeque<Keys>,
}

impl<'w> Queue<'w> {
    fn is_full(&self) -> bool {
        self.about.len() >= limits::TRANSACTION_PREPARING
    }

    /// Waits for something while all under way go on: it may have to wait for what one of them has, a lock or a place in a channel.
    async fn beside<T>(&mut self, what: impl Future<Output = T>) -> T {
        let mut what = pin!(what);
        poll_fn(|cx| {
            while let Poll::Ready(Some(done)) = self.preparing.poll_next_unpin(cx) {
                self.tried.push_back(done);
            }
            what.as_mut().poll(cx)
        })
        .await
    }

    /// Waits for the first of those under way. `None` if there are none.
    async fn first(&mut self) -> Option<Tried> {
        let first = match self.tried.pop_front() {
            Some(first) => Some(first),
            None => self.preparing.next().await,
        };
        self.about.pop_front();
        first
    }

    /// Prepares an action that was resolved. One that is not to be in the way of those behind it is aborted at once if it fails.
    fn prepare(&mut self, mut prepared: Prepared, with: &'w Preparing, on_failure: OnFailure) {
        self.about.push_back(prepared.about.clone());
        self.preparing.push_back(Box::pin(async move {
            let tried = guarded(prepared.action.prepare(with)).await;
            if tried.is_err() && on_failure == OnFailure::GoOn {
                prepared.action.abort(&with.cx).await;
            }
            (prepared, tried)
        }));
    }
}

/// What has become of an action that was to be resolved.
enum Resolved {
    /// It has something in common with one under way.
    Waits(Box<dyn Action>),
    Done(Box<dyn Action>, Keys),
    Failed(QmpError),
}

/// The transaction to which actions are added.
struct Entering<'w> {
    with: &'w Preparing,
    plan: &'w mut Plan,
    actions: &'w mut Vec<Prepared>,
    on_failure: OnFailure,
    entered: Entered,
}

impl Entering<'_> {
    /// Whether no more actions are begun.
    fn stops(&self) -> bool {
        self.on_failure == OnFailure::Stop && !self.entered.errors.is_empty()
    }

    /// Resolves an action, if nothing under way keeps it from that. On the control loop.
    async fn resolve(
        &mut self,
        queue: &mut Queue<'_>,
        mut action: Box<dyn Action>,
        keys: Keys,
    ) -> Resolved {
        let (mut plan, about) = (std::mem::take(self.plan), std::mem::take(&mut queue.about));
        let resolve = move |control: &mut Control| {
            let keys = keys.with_nodes(&control.graph, &plan);
            if about.iter().any(|other| other.meet(&keys)) {
                return Ok((plan, about, Resolved::Waits(action)));
            }
            let done = AssertUnwindSafe(|| action.resolve(control, &mut plan));
            let done = catch_unwind(done).unwrap_or_else(|_| Err(internal_error()));
            let resolved = match done {
                Ok(()) => Resolved::Done(action, keys),
                Err(error) => Resolved::Failed(error),
            };
            Ok((plan, about, resolved))
        };
        match queue.beside(self.with.cx.commit(resolve)).await {
            Ok((plan, about, resolved)) => {
                (*self.plan, queue.about) = (plan, about);
                resolved
            }
            Err(error) => Resolved::Failed(error),
        }
    }

    /// Waits for the first of those under way, and lets it enter. Answers whether there was one.
    async fn next(&mut self, queue: &mut Queue<'_>) -> bool {
        let Some((mut prepared, tried)) = queue.first().await else {
            return false;
        };
        let place = prepared.place;
        // Behind one that has failed nothing enters; those before it are not concerned.
        let mut errors = self.entered.errors.iter();
        let is_behind = errors.any(|(failed, _)| *failed < place);
        let entered = match tried {
            Ok(()) if self.on_failure == OnFailure::GoOn || !is_behind => {
                let enter = guarded(prepared.action.enter(self.with, self.plan));
                let entered = queue.beside(enter).await;
                if entered.is_err() && self.on_failure == OnFailure::GoOn {
                    queue.beside(prepared.action.abort(&self.with.cx)).await;
                }
                entered
            }
            tried => tried,
        };
        let is_aborted = entered.is_err() && self.on_failure == OnFailure::GoOn;
        if let Err(error) = entered {
            self.entered.errors.push((place, error));
        }
        match is_aborted {
            // What it began to do is not in the way of those behind it.
            true => self.entered.aborted.push((place, prepared.action.effect())),
            false => self.actions.push(prepared),
        }
        true
    }
}

impl Running {
    /// Resolves, prepares and enters all actions.
    pub(super) async fn prepare_all(
        &mut self,
        actions: Vec<Box<dyn Action>>,
        on_failure: OnFailure,
    ) -> Entered {
        let concerns: Vec<Concerns> = actions.iter().map(|action| action.concerns()).collect();
        let io = self.with.io.clone();
        let about = self.with.io.call(move || {
            let about = concerns.into_iter().map(|concerns| {
                let is_over = matches!(concerns, Concerns::Resolved { .. });
                (Keys::new(&io, &concerns), is_over)
            });
            Ok(about.collect::<Vec<(Keys, bool)>>())
        });
        // Should that fail, they are prepared one after the other.
        let about = about.await.unwrap_or_default().into_iter();
        let about = about.chain(std::iter::repeat((Keys::All, false)));
        let mut entering = Entering {
            with: &self.with,
            plan: &mut self.plan,
            actions: &mut self.actions,
            on_failure,
            entered: Entered::default(),
        };
        let mut queue = Queue::default();
        for (place, (mut action, (keys, is_over))) in actions.into_iter().zip(about).enumerate() {
            let resolved = loop {
                while queue.is_full() {
                    entering.next(&mut queue).await;
                }
                if entering.stops() {
                    break None;
                }
                match entering.resolve(&mut queue, action, keys.clone()).await {
                    Resolved::Waits(waiting) => action = waiting,
                    resolved => break Some(resolved),
                }
                entering.next(&mut queue).await;
            };
            match resolved {
                Some(Resolved::Done(action, keys)) => {
                    let about = match is_over {
                        true => Keys::none(),
                        false => keys,
                    };
                    let prepared = Prepared {
                        place,
                        action,
                        about,
                    };
                    queue.prepare(prepared, entering.with, on_failure);
                }
                Some(Resolved::Failed(error)) => entering.entered.errors.push((place, error)),
                Some(Resolved::Waits(_)) | None => {}
            }
            if entering.stops() {
                break;
            }
        }
        while entering.next(&mut queue).await {}
        let mut entered = entering.entered;
        entered.errors.sort_by_key(|(place, _)| *place);
        entered
    }
}

#[cfg(test)]
mod tests;
