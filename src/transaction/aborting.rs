//! Actions that are taken back at the same time.
//!
//! ```text
//!   abort 3 .......
//!   abort 2 .. 1 is about what 2 is about: abort 1 .......
//! ```
//!
//! An action is taken back when all behind it that have something in common with it have been: it finds what it has left. Those that have
//! nothing in common do not find each other.

use std::collections::{HashMap, VecDeque};

use futures_util::stream::{FuturesUnordered, StreamExt as _};

use super::concerns::{Key, Keys};
use super::{Prepared, Stays};
use crate::daemon::Cx;
use crate::limits;

/// Takes all actions back. Answers what could not be, the last one first.
pub(super) async fn abort_all(cx: &Cx, actions: &mut [Prepared]) -> Vec<Stays> {
    let about = actions.iter().map(|prepared| &prepared.about);
    let mut order = Order::new(&about.collect::<Vec<&Keys>>());
    let mut actions: Vec<Option<&mut Prepared>> = actions.iter_mut().map(Some).collect();
    let mut aborting = FuturesUnordered::new();
    let mut stay = Vec::new();
    loop {
        while aborting.len() < limits::TRANSACTION_PREPARING
            && let Some(at) = order.ready.pop_front()
        {
            let prepared = actions[at].take();
            aborting.push(async move {
                let stays = match prepared {
                    Some(prepared) => prepared.action.abort(cx).await,
                    None => unreachable!("it is ready once"),
                };
                (at, stays)
            });
        }
        let Some((at, stays)) = aborting.next().await else {
            break;
        };
        order.is_over(at);
        stay.extend(stays.map(|stays| (at, stays)));
    }
    debug_assert!(actions.iter().all(Option::is_none), "all are taken back");
    stay.sort_by(|(one, _), (other, _)| other.cmp(one));
    stay.into_iter().map(|(_, stays)| stays).collect()
}

/// Which of them wait for which.
struct Order {
    /// Those that wait for nothing any more, the last one first.
    ready: VecDeque<usize>,
    /// For each, how many it waits for.
    waits: Vec<usize>,
    /// For each, which ones wait for it.
    frees: Vec<Vec<usize>>,
}

impl Order {
    /// The order of actions that are about these things. Each waits for the next ones behind it that have something in common with it,
    /// and these for those behind them.
    fn new(about: &[&Keys]) -> Order {
        let mut order = Order {
            ready: VecDeque::new(),
            waits: vec![0; about.len()],
            frees: vec![Vec::new(); about.len()],
        };
        // The first so far that is about a thing; that is about everything; and those before that.
        let mut next: HashMap<&Key, usize> = HashMap::new();
        let mut everything = None;
        let mut before: Vec<usize> = Vec::new();
        for (at, keys) in about.iter().enumerate().rev() {
            let mut waits_for: Vec<usize> = everything.into_iter().collect();
            match keys {
                Keys::All => {
                    waits_for.append(&mut before);
                    next.clear();
                    everything = Some(at);
                }
                Keys::These(keys) => {
                    waits_for.extend(keys.iter().filter_map(|key| next.insert(key, at)));
                    before.push(at);
                }
            }
            waits_for.sort_unstable();
            waits_for.dedup();
            for behind in &waits_for {
                order.frees[*behind].push(at);
            }
            order.waits[at] = waits_for.len();
            if waits_for.is_empty() {
                order.ready.push_back(at);
            }
        }
        order
    }

    /// This one has been taken back: others may follow.
    fn is_over(&mut self, at: usize) {
        for before in std::mem::take(&mut self.frees[at]) {
            self.waits[before] -= 1;
            if self.waits[before] == 0 {
                self.ready.push_back(before);
            }
        }
    }
}

#[cfg(test)]
mod tests;
