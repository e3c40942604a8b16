//! Several actions as one: all of them happen, or none.
//!
//! ```text
//!   resolve, prepare 1 -> resolve, prepare 2 -> ...     guests run; may take its time
//!     -> hold all disks, once
//!          -> stage 1, 2, ... -> make durable           all that can fail has been done
//!          -> switch the headers of images              one write for each
//!          -> commit 1, 2, ...                          on the control loop; edges are led elsewhere
//!     -> let go
//!   finish 1, 2, ...                                    guests run
//!
//!   an error anywhere before the commit: let go -> abort ..., 2, 1 -> the error
//! ```
//!
//! Each action is about what those before it leave: `device` is looked up in the [`Plan`]. Commands that are actions, too,
//! are transactions of one action: there is one way to do it.
//!
//! * `plan`: what the actions so far will leave
//! * `held`: the disks that are held still, with the changes of their internal snapshots
//! * `snapshot`: the actions on internal snapshots

mod held;
mod plan;
mod snapshot;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use block::driver::{BoxFuture, SnapshotInfo};
use block::graph::Node;
use block::io::RunToEnd;
use futures_util::FutureExt;
use qapi::rt::QmpError;

use crate::daemon::{Control, Cx, internal_error};
use crate::limits;

pub(crate) use held::Held;
pub(crate) use plan::Plan;
pub(crate) use snapshot::{Operation, SnapshotAction};

/// A part of a transaction.
///
/// All but `resolve` and `commit` run outside of the control loop. What an action does before its `commit` nobody but later
/// actions may see: no other command runs meanwhile, but guests, jobs and exports do.
pub(crate) trait Action: Send {
    /// Looks up what the action is about, as the actions before it leave it, and checks all that can be known now. It says which
    /// disks are to be held, and what its commit will do to the graph as far as that is known. On the control loop: it cannot
    /// wait. After an error nothing else of the action is called.
    fn resolve(&mut self, control: &mut Control, plan: &mut Plan) -> Result<(), QmpError>;

    /// Does what takes time, while guests run: makes and opens files, takes space. Called right behind `resolve`, before the next
    /// action is resolved. Nodes that it makes go into the graph here, unused; what is to lead to them, into the plan.
    fn prepare<'a>(&'a mut self, with: &'a mut Preparing) -> BoxFuture<'a, Result<(), QmpError>> {
        let _ = with;
        Box::pin(async { Ok(()) })
    }

    /// Does what needs guests to stand still and can fail. They wait for it: no files are made here.
    fn stage<'a>(&'a mut self, held: &'a mut Held) -> BoxFuture<'a, Result<(), QmpError>> {
        let _ = held;
        Box::pin(async { Ok(()) })
    }

    /// Makes it so. On the control loop, with all disks held: it cannot wait, does no I/O, and cannot fail.
    fn commit(&mut self, control: &mut Control, held: &Held) {
        let _ = (control, held);
    }

    /// Does what is left when guests run again. What goes wrong here is logged: the transaction has happened.
    fn finish<'a>(&'a mut self, cx: &'a Cx) -> BoxFuture<'a, ()> {
        let _ = cx;
        Box::pin(async {})
    }

    /// Takes back whatever `prepare` and `stage` did, also where they failed half-way. Guests run. What cannot be taken back is
    /// logged with what the user must do.
    fn abort<'a>(&'a mut self, cx: &'a Cx) -> BoxFuture<'a, ()> {
        let _ = cx;
        Box::pin(async {})
    }

    /// What it does, or has done, as far as that is known.
    fn effect(&self) -> Effect {
        Effect::default()
    }
}

/// What an action does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Effect {
    /// The internal snapshot that it takes, deletes or reverts to.
    pub(crate) snapshot: Option<SnapshotInfo>,
}

/// What actions prepare with.
pub(crate) struct Preparing {
    /// The way to the control loop.
    pub(crate) cx: Cx,
    /// What the actions before this one, and itself, will leave.
    pub(crate) plan: Plan,
}

/// A disk of a transaction.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    /// What the client called it.
    pub(crate) device: String,
    /// Its root.
    pub(crate) node: Arc<Node>,
    /// Its internal snapshots are changed.
    changes: bool,
}

/// The `abort` action: makes every transaction that has it fail. For tests of clients.
pub(crate) struct Abort;

impl Action for Abort {
    fn resolve(&mut self, _: &mut Control, _: &mut Plan) -> Result<(), QmpError> {
        Err(QmpError::generic("Transaction aborted using Abort action"))
    }
}

/// Carries out all actions, and answers what each did; or none, and answers the first error.
///
/// # Cancellation
/// When the future is dropped the transaction goes on to its end: some disks done and others not is what nobody wants.
pub(crate) async fn run(cx: &Cx, actions: Vec<Box<dyn Action>>) -> Result<Vec<Effect>, QmpError> {
    RunToEnd::new(carry_out(cx.clone(), actions)).await
}

async fn carry_out(cx: Cx, actions: Vec<Box<dyn Action>>) -> Result<Vec<Effect>, QmpError> {
    let mut running = Running {
        actions: Vec::with_capacity(actions.len()),
        with: Preparing {
            cx,
            plan: Plan::default(),
        },
    };
    let done = running.attempt(actions).await;
    match done {
        Ok(()) => Ok(running.finish().await),
        Err(error) => {
            running.abort().await;
            Err(error)
        }
    }
}

/// A transaction under way.
struct Running {
    /// Those that are prepared, or were to be.
    actions: Vec<Box<dyn Action>>,
    with: Preparing,
}

impl Running {
    async fn attempt(&mut self, actions: Vec<Box<dyn Action>>) -> Result<(), QmpError> {
        for action in actions {
            self.prepare(action).await?;
        }
        let disks = std::mem::take(&mut self.with.plan.disks);
        let mut held = Held::begin(disks).await?;
        for action in &mut self.actions {
            guarded(action.stage(&mut held)).await?;
        }
        held.prepare().await?;
        held.commit().await?;
        self.commit(held).await;
        Ok(())
    }

    /// Resolves and prepares the next action.
    async fn prepare(&mut self, mut action: Box<dyn Action>) -> Result<(), QmpError> {
        let mut plan = std::mem::take(&mut self.with.plan);
        let resolved = move |control: &mut Control| {
            let resolved = catch_unwind(AssertUnwindSafe(|| action.resolve(control, &mut plan)));
            let resolved = resolved.unwrap_or_else(|_| Err(internal_error()));
            Ok((plan, resolved.map(|()| action)))
        };
        let (plan, resolved) = self.with.cx.commit(resolved).await?;
        self.with.plan = plan;
        self.actions.push(resolved?);
        match self.actions.last_mut() {
            Some(action) => guarded(action.prepare(&mut self.with)).await,
            None => Ok(()),
        }
    }

    /// All headers are switched: it has happened, and the graph is to follow.
    async fn commit(&mut self, held: Held) {
        let mut actions = std::mem::take(&mut self.actions);
        let count = actions.len();
        let committed = self.with.cx.commit(move |control| {
            for action in &mut actions {
                let committed = AssertUnwindSafe(|| action.commit(control, &held));
                if catch_unwind(committed).is_err() {
                    log::error!("an action of a transaction has failed where it cannot");
                }
            }
            Ok((actions, held))
        });
        // Without an answer the daemon ends, and its graph with it.
        if let Ok((actions, held)) = committed.await {
            self.actions = actions;
            let waited = held.release();
            let level = match waited > limits::TRANSACTION_LONG_HOLD {
                true => log::Level::Warn,
                false => log::Level::Info,
            };
            log::log!(
                level,
                "transaction of {count} actions: guests waited {waited:.1?}"
            );
        }
    }

    async fn finish(mut self) -> Vec<Effect> {
        for action in &mut self.actions {
            action.finish(&self.with.cx).await;
        }
        self.actions.iter().map(|action| action.effect()).collect()
    }

    async fn abort(mut self) {
        for action in self.actions.iter_mut().rev() {
            action.abort(&self.with.cx).await;
        }
    }
}

/// A panic is a failure like any other: what the others did must be taken back.
async fn guarded<T>(part: impl Future<Output = Result<T, QmpError>>) -> Result<T, QmpError> {
    let caught = AssertUnwindSafe(part).catch_unwind().await;
    caught.unwrap_or_else(|_| Err(internal_error()))
}

#[cfg(test)]
mod tests;
