//! How the jobs of a group end together: all are prepared, then all committed; or each is aborted.

use std::collections::VecDeque;

use super::super::state::Status;
use super::{CANCELLED, Effect, GroupKey, JobKey, Machine, Notice};

#[derive(Debug, Default)]
pub(super) struct Group {
    /// In the order of creation.
    pub(super) members: Vec<JobKey>,
    /// One has failed or was cancelled.
    pub(super) aborting: bool,
    pub(super) phase: Phase,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) enum Phase {
    /// Some work is not over.
    #[default]
    Working,
    /// All of it is, and the user's word is missing.
    Pending,
    /// The first of these is being prepared.
    Preparing(VecDeque<JobKey>),
    /// The first of these is being committed or aborted.
    Finishing(VecDeque<JobKey>),
}

impl Machine {
    /// What can fail of the end has been done.
    pub fn prepared(&mut self, key: JobKey, result: std::result::Result<(), String>) {
        let Some(group) = self.group_of(key) else {
            return;
        };
        if let Err(text) = result {
            self.fail(key, text);
            self.abort_group(group);
        }
        let Some(state) = self.groups.get_mut(&group) else {
            return;
        };
        if let Phase::Preparing(rest) = &mut state.phase {
            rest.pop_front();
            match rest.front() {
                Some(next) if !state.aborting => self.effects.push(Effect::Prepare(*next)),
                _ => self.finish_group(group),
            }
        }
    }

    /// One has failed or was cancelled: so are the others.
    pub(super) fn abort_group(&mut self, group: GroupKey) {
        let Some(state) = self.groups.get_mut(&group) else {
            return;
        };
        if std::mem::replace(&mut state.aborting, true) {
            return;
        }
        for key in state.members.clone() {
            let Some(job) = self.jobs.get_mut(&key) else {
                continue;
            };
            match job.status.is_over() {
                // Its own failure is why it ends, if it has one.
                true => job.cancelled |= job.failure.is_none(),
                false => self.force_cancel(key),
            }
        }
    }

    /// Goes on with a group, if all work in it is over.
    pub(super) fn advance(&mut self, group: GroupKey) {
        let Some(state) = self.groups.get(&group) else {
            return;
        };
        let is_over = |key| self.jobs.get(key).is_none_or(|job| job.status.is_over());
        let is_busy = !matches!(state.phase, Phase::Working | Phase::Pending);
        if is_busy || !state.members.iter().all(is_over) {
            return;
        }
        if state.aborting {
            self.finish_group(group);
            return;
        }
        let members: Vec<JobKey> = state.members.iter().rev().copied().collect();
        let mut needs_word = false;
        for key in members {
            self.transition(key, Status::Pending);
            if self
                .jobs
                .get(&key)
                .is_some_and(|job| !job.spec.auto_finalize)
            {
                needs_word = true;
                self.tell(key, Notice::Pending);
            }
        }
        if let Some(state) = self.groups.get_mut(&group) {
            state.phase = Phase::Pending;
        }
        if !needs_word {
            self.prepare_group(group);
        }
    }

    pub(super) fn prepare_group(&mut self, group: GroupKey) {
        let Some(state) = self.groups.get_mut(&group) else {
            return;
        };
        let queue: VecDeque<JobKey> = state.members.iter().rev().copied().collect();
        if let Some(first) = queue.front() {
            self.effects.push(Effect::Prepare(*first));
        }
        state.phase = Phase::Preparing(queue);
    }

    /// Commits or aborts all members. From here on nothing changes how they end.
    fn finish_group(&mut self, group: GroupKey) {
        let Some(state) = self.groups.get_mut(&group) else {
            return;
        };
        let queue: VecDeque<JobKey> = state.members.iter().rev().copied().collect();
        for key in &queue {
            if let Some(job) = self.jobs.get_mut(key) {
                job.is_finishing = true;
            }
        }
        state.phase = Phase::Finishing(queue);
        self.finish_next(group);
    }

    pub(super) fn finish_next(&mut self, group: GroupKey) {
        loop {
            let Some(state) = self.groups.get(&group) else {
                return;
            };
            let Phase::Finishing(queue) = &state.phase else {
                return;
            };
            let Some(key) = queue.front().copied() else {
                self.groups.remove(&group);
                return;
            };
            if state.aborting {
                self.fail(key, CANCELLED.to_owned());
            }
            let job = self.jobs.get(&key);
            match job.map(|job| (job.failure.is_some(), job.has_task)) {
                Some((true, true)) => self.effects.push(Effect::Abort(key)),
                Some((false, _)) => self.effects.push(Effect::Commit(key)),
                // It never had work: nothing is to be taken back.
                Some((true, false)) | None => {
                    self.conclude(key);
                    continue;
                }
            }
            return;
        }
    }

    /// The first in the queue of its group has ended.
    pub(super) fn conclude(&mut self, key: JobKey) {
        let Some(job) = self.jobs.get(&key) else {
            return;
        };
        let (group, stays) = (job.group, job.started && !job.spec.auto_dismiss);
        if let Some(state) = self.groups.get_mut(&group) {
            state.members.retain(|member| *member != key);
            if let Phase::Finishing(queue) = &mut state.phase {
                queue.pop_front();
            }
        }
        self.transition(key, Status::Concluded);
        match stays {
            // For dismissing, which is all that is left to do with it.
            true => self.set_finishing(key, false),
            false => self.forget(key),
        }
    }
}
