//! What a transaction would do: it is prepared and staged as far as that goes, and abandoned.
//!
//! Every action is tried, on what those before it leave that can be done. Space is taken and files are made, so that what is missing
//! is found; all of it goes again, and nobody is told of it. Guests of all disks together are not held: those of a disk whose
//! snapshots are changed wait while its steps are done in memory, and go on while space is taken. Nothing is made durable for it, but
//! where references have to be counted before a change is made (version 2, narrow refcounts).

use qapi::rt::QmpError;

use super::held::{Guests, Held};
use super::queue::{Entered, OnFailure};
use super::{Action, Completion, Effect, Prepared, Running, guarded};
use crate::daemon::Cx;
use crate::jobs::Audience;

/// What an action would do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Preview {
    /// As far as it is known.
    pub(crate) effect: Effect,
    /// Why it cannot be done.
    pub(crate) error: Option<QmpError>,
}

/// Tries all actions, and leaves everything as it was.
///
/// # Cancellation
/// When the future is dropped, everything is taken back all the same.
pub(crate) async fn dry_run(
    cx: &Cx,
    actions: Vec<Box<dyn Action>>,
    completion: Completion,
) -> Result<Vec<Preview>, QmpError> {
    let cx = cx.clone();
    block::io::RunToEnd::new(async move {
        let mut running = Running::new(cx, completion, Audience::Nobody).await?;
        let previews = running.try_all(actions).await;
        running.abort().await;
        Ok(previews)
    })
    .await
}

impl Running {
    async fn try_all(&mut self, actions: Vec<Box<dyn Action>>) -> Vec<Preview> {
        let mut errors: Vec<Option<QmpError>> = vec![None; actions.len()];
        let mut effects = vec![Effect::default(); actions.len()];
        let Entered {
            errors: failed,
            aborted,
        } = self.prepare_all(actions, OnFailure::GoOn).await;
        for (place, error) in failed {
            errors[place] = Some(error);
        }
        for (place, effect) in aborted {
            effects[place] = effect;
        }
        let disks = self.plan.take_disks();
        if let Ok(mut held) = Held::begin(disks, Guests::GoOn).await {
            for Prepared { place, action, .. } in &mut self.actions {
                held.action = *place;
                if errors[*place].is_none() {
                    errors[*place] = guarded(action.stage(&mut held)).await.err();
                }
            }
            for (place, error) in held.try_out().await {
                errors[place].get_or_insert(error);
            }
            held.roll_back().await;
        }
        for Prepared { place, action, .. } in &self.actions {
            effects[*place] = action.effect();
        }
        let previews = effects.into_iter().zip(errors);
        previews
            .map(|(effect, error)| Preview { effect, error })
            .collect()
    }
}
