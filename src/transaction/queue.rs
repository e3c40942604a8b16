//! Actions that are prepared at the same time.
//!
//! ```text
//!   resolve 1 -> prepare 1 .............. enter 1
//!     resolve 3 -> prepare 3 ....                 enter 3
//!       2 is about what 1 is about: ......................... resolve 2 -> prepare 2 -> enter 2
//! ```
//!
//! An action is resolved when all before it that have something in common with it have entered: it finds what it would find if they had
//! been prepared one after the other, and the others are no concern of it. So that it does not keep those behind it waiting, its turn
//! comes in a later round; in a round they enter in their order. Which round that is follows from the actions alone. Jobs are made in the
//! order of their actions, and what comes behind the preparation is done in the order of all.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;

use block::driver::BoxFuture;
use futures_util::stream::{FuturesOrdered, StreamExt as _};
use qapi::rt::QmpError;

use super::concerns::{Key, Keys};
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
    /// Whether one before that of this place has failed.
    fn is_behind_a_failure(&self, place: usize) -> bool {
        let mut errors = self.entered.errors.iter();
        errors.any(|(failed, _)| *failed < place)
    }

    /// Whether the action of this place is not begun: those before one that has failed are, since the first that fails is answered.
    fn skips(&self, place: usize) -> bool {
        self.on_failure == OnFailure::Stop && self.is_behind_a_failure(place)
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
        let entered = match tried {
            Ok(()) if !self.skips(place) => {
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

/// What is known of an action before it is resolved.
#[derive(Debug, Clone)]
struct About {
    keys: Keys,
    /// There is nothing to do for it when it has been resolved.
    is_over: bool,
    begins_job: bool,
}

impl About {
    /// What is known of actions that concern these things, and that begin jobs or do not, as the names are now.
    async fn find(with: &Preparing, known: Vec<(Concerns, bool)>) -> Vec<About> {
        let count = known.len();
        let io = with.io.clone();
        let about = with.io.call(move || {
            let about = known.into_iter().map(|(concerns, begins_job)| About {
                keys: Keys::new(&io, &concerns),
                is_over: matches!(concerns, Concerns::Resolved { .. }),
                begins_job,
            });
            Ok(about.collect::<Vec<About>>())
        });
        let about = about.await.unwrap_or_default();
        let with_nodes = with.cx.commit(move |control| {
            let nothing = Plan::default();
            let about = about.into_iter().map(|about| About {
                keys: about.keys.with_nodes(&control.graph, &nothing),
                ..about
            });
            Ok(about.collect())
        });
        let mut about: Vec<About> = with_nodes.await.unwrap_or_default();
        // Should that fail, they are prepared one after the other.
        about.resize(
            count,
            About {
                keys: Keys::All,
                is_over: false,
                begins_job: false,
            },
        );
        about
    }
}

/// An action that is to be resolved.
struct Turn {
    round: usize,
    /// Its place among all.
    place: usize,
    action: Box<dyn Action>,
    about: About,
}

impl Turn {
    /// The turns of all actions, as they come.
    async fn all(with: &Preparing, actions: Vec<Box<dyn Action>>) -> Vec<Turn> {
        let known = actions.iter();
        let known = known.map(|action| (action.concerns(), action.begins_job()));
        let about = About::find(with, known.collect()).await;
        let turns = rounds(&about).into_iter().zip(about).zip(actions);
        let turns = turns.enumerate();
        let turns = turns.map(|(place, ((round, about), action))| Turn {
            round,
            place,
            action,
            about,
        });
        let mut turns: Vec<Turn> = turns.collect();
        turns.sort_by_key(|turn| turn.round);
        turns
    }
}

/// In which round each of the actions has its turn.
fn rounds(about: &[About]) -> Vec<usize> {
    // The first round for what comes next: for anything, for what is about a thing, for a job.
    let (mut anything, mut last, mut jobs) = (0, 0, 0);
    let mut next: HashMap<&Key, usize> = HashMap::new();
    let mut rounds = Vec::with_capacity(about.len());
    for About {
        keys,
        is_over,
        begins_job,
    } in about
    {
        let mut round = match keys {
            Keys::All => last + 1,
            Keys::These(keys) => {
                let behind = keys.iter().filter_map(|key| next.get(key).copied());
                behind.max().unwrap_or(0).max(anything)
            }
        };
        if *begins_job {
            round = round.max(jobs);
            jobs = round;
        }
        match keys {
            Keys::All => anything = round + 1,
            Keys::These(keys) => {
                let behind = round + usize::from(!is_over);
                next.extend(keys.iter().map(|key| (key, behind)));
            }
        }
        last = last.max(round);
        rounds.push(round);
    }
    rounds
}

impl Running {
    /// Resolves, prepares and enters all actions.
    pub(super) async fn prepare_all(
        &mut self,
        actions: Vec<Box<dyn Action>>,
        on_failure: OnFailure,
    ) -> Entered {
        let turns = Turn::all(&self.with, actions).await;
        let mut entering = Entering {
            with: &self.with,
            plan: &mut self.plan,
            actions: &mut self.actions,
            on_failure,
            entered: Entered::default(),
        };
        let mut queue = Queue::default();
        for turn in turns {
            let Turn {
                place,
                mut action,
                about,
                ..
            } = turn;
            let resolved = loop {
                while queue.is_full() {
                    entering.next(&mut queue).await;
                }
                if entering.skips(place) {
                    break None;
                }
                let keys = about.keys.clone();
                match entering.resolve(&mut queue, action, keys).await {
                    Resolved::Waits(waiting) => action = waiting,
                    resolved => break Some(resolved),
                }
                entering.next(&mut queue).await;
            };
            match resolved {
                Some(Resolved::Done(action, keys)) => {
                    let about = match about.is_over {
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
        }
        while entering.next(&mut queue).await {}
        let Entering {
            actions,
            mut entered,
            ..
        } = entering;
        actions.sort_by_key(|prepared| prepared.place);
        entered.errors.sort_by_key(|(place, _)| *place);
        entered
    }
}

#[cfg(test)]
mod tests;
