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

use std::collections::{HashSet, VecDeque};
use std::future::poll_fn;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::pin::pin;
use std::task::Poll;

use block::driver::BoxFuture;
use block::graph::{Graph, place};
use block::io::{FileIdentity, IoContext};
use futures_util::stream::{FuturesOrdered, StreamExt as _};
use qapi::rt::QmpError;

use super::preparing::final_path;
use super::{Action, Effect, Plan, Preparing, Running, guarded};
use crate::daemon::{Control, internal_error, lookup};
use crate::limits;

/// What an action is about: it is not prepared beside another that is about the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Concerns {
    /// Anything.
    Everything,
    /// Disks, nodes and jobs of these names, and files that are made or opened.
    These {
        /// As the client names them; or is going to.
        names: Vec<String>,
        /// Paths.
        files: Vec<String>,
    },
    /// Disks of these names, and that only when it is resolved: there is nothing to prepare.
    Resolved {
        /// As the client names them.
        names: Vec<String>,
    },
}

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
    /// The place among all of each that is prepared, or was to be and is to be aborted.
    pub(super) places: Vec<usize>,
    /// (place, why), in order.
    pub(super) errors: Vec<(usize, QmpError)>,
    /// (place, what it would have done) of those that were aborted.
    pub(super) aborted: Vec<(usize, Effect)>,
}

/// Something that two actions may have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    Name(String),
    Node(usize),
    Path(PathBuf),
    File(FileIdentity),
}

/// The keys of an action.
#[derive(Debug, Clone)]
enum Keys {
    All,
    These(HashSet<Key>),
}

impl Keys {
    fn meet(&self, other: &Keys) -> bool {
        match (self, other) {
            (Keys::These(own), Keys::These(other)) => !own.is_disjoint(other),
            _ => true,
        }
    }

    /// With the nodes that the names refer to at present. Layers that are put on each other are about what is below them all.
    fn with_nodes(self, graph: &Graph, plan: &Plan) -> Keys {
        let Keys::These(mut keys) = self else {
            return Keys::All;
        };
        let named = keys.iter().filter_map(|key| match key {
            Key::Name(name) => lookup::device(graph, name).ok(),
            _ => None,
        });
        let nodes = named.flat_map(|node| {
            let (origin, _) = plan.origin(&node);
            [place(&node), place(&node.below_filters()), place(&origin)]
        });
        let nodes: Vec<usize> = nodes.collect();
        keys.extend(nodes.into_iter().map(Key::Node));
        Keys::These(keys)
    }

    /// All names that a file has, or will have.
    fn of_file(io: &IoContext, filename: &str) -> io::Result<Option<[Key; 2]>> {
        // Some file systems take so long names; a file that is made beside this one is named by the beginning of its name.
        const BEGINNING: usize = 200;
        let path = final_path(filename)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let begin: String = name.chars().take(BEGINNING).collect();
        let key = Key::Path(path.with_file_name(begin));
        Ok(match std::fs::metadata(&path) {
            Err(_) => Some([key.clone(), key]),
            Ok(metadata) => {
                let file = FileIdentity::of(&metadata);
                // Who knows what else a device is.
                let is_file = metadata.is_file() && !io.is_device(&metadata);
                is_file.then_some([key, Key::File(file)])
            }
        })
    }

    fn new(io: &IoContext, concerns: &Concerns) -> Keys {
        let (names, files) = match concerns {
            Concerns::Everything => return Keys::All,
            Concerns::These { names, files } => (names, &files[..]),
            Concerns::Resolved { names } => (names, &[][..]),
        };
        let mut keys: HashSet<Key> = names.iter().cloned().map(Key::Name).collect();
        for file in files {
            match Keys::of_file(io, file) {
                Ok(Some(found)) => keys.extend(found),
                Ok(None) => return Keys::All,
                // What cannot be there fails when it is prepared.
                Err(_) => keys.extend([Key::Path(file.into())]),
            }
        }
        Keys::These(keys)
    }
}

/// An action that was prepared, or was to be, with its place among all.
type Prepared = (usize, Box<dyn Action>, Result<(), QmpError>);

/// Actions under way.
#[derive(Default)]
struct Queue<'w> {
    preparing: FuturesOrdered<BoxFuture<'w, Prepared>>,
    /// The first of those under way, as far as they are done.
    prepared: VecDeque<Prepared>,
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
                self.prepared.push_back(done);
            }
            what.as_mut().poll(cx)
        })
        .await
    }

    /// Waits for the first of those under way. `None` if there are none.
    async fn first(&mut self) -> Option<Prepared> {
        let first = match self.prepared.pop_front() {
            Some(first) => Some(first),
            None => self.preparing.next().await,
        };
        self.about.pop_front();
        first
    }

    /// Prepares an action that was resolved.
    fn prepare(
        &mut self,
        place: usize,
        mut action: Box<dyn Action>,
        keys: Keys,
        with: &'w Preparing,
    ) {
        self.about.push_back(keys);
        self.preparing.push_back(Box::pin(async move {
            let prepared = guarded(action.prepare(with)).await;
            (place, action, prepared)
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
    actions: &'w mut Vec<Box<dyn Action>>,
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
        let Some((place, mut action, prepared)) = queue.first().await else {
            return false;
        };
        // Behind one that has failed nothing enters; those before it are not concerned.
        let mut errors = self.entered.errors.iter();
        let is_behind = errors.any(|(failed, _)| *failed < place);
        let entered = match prepared {
            Ok(()) if self.on_failure == OnFailure::GoOn || !is_behind => {
                let enter = guarded(action.enter(self.with, self.plan));
                queue.beside(enter).await
            }
            prepared => prepared,
        };
        match (entered.err(), self.on_failure) {
            (None, _) => self.add(place, action),
            (Some(error), OnFailure::Stop) => {
                self.entered.errors.push((place, error));
                self.add(place, action);
            }
            (Some(error), OnFailure::GoOn) => {
                self.entered.errors.push((place, error));
                // What it began to do is not in the way of those behind it.
                self.entered.aborted.push((place, action.effect()));
                queue.beside(action.abort(&self.with.cx)).await;
            }
        }
        true
    }

    fn add(&mut self, place: usize, action: Box<dyn Action>) {
        self.entered.places.push(place);
        self.actions.push(action);
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
                    let keys = match is_over {
                        true => Keys::These(HashSet::new()),
                        false => keys,
                    };
                    queue.prepare(place, action, keys, entering.with);
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
