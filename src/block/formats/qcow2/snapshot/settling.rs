//! What is still to be done behind snapshot operations: the state, without I/O.
//!
//! An L1 table that is taken (by a new snapshot, or as the active one) refers to every L2 table in it, and one that is dropped
//! no longer does. Neither changes a refcount: how many references of L1 tables the stored counts of an L2 table, and
//! of all below it, lack or have too many is noted here, and `settle` makes it good.
//!
//! ```text
//! stored(T) = references to T - owed(T)          owed > 0: to be added, before anything is changed through T
//! stored(c) = sum of stored(T) over all T -> c   owed < 0: to be taken away, some time
//! ```
//!
//! Both hold beside what is in the quarantine. What is owed rises only together with the references, so every L2 table in use, and
//! every cluster below it, keeps a stored count of at least 1: the allocator never hands it out.
//!
//! An entry of the active L1 table has COPIED only where nothing is owed and the stored count is 1: whoever may change a table in
//! place has nobody to ask.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::formats::qcow2::alloc::Run;
use crate::formats::qcow2::entry::L1Entry;
use crate::formats::qcow2::geometry::Geometry;
use crate::formats::qcow2::l1::L1Table;
use crate::units::ClusterIndex;

/// How the references of L1 tables to an L2 table change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Change {
    /// The cluster of the L2 table.
    pub(super) table: ClusterIndex,
    /// Its index in the L1 tables.
    pub(super) slot: usize,
    /// References more; below zero, less.
    pub(super) more: i64,
}

/// What an L1 table does when it is taken (`more` is 1) or dropped (-1). Its entries have been checked.
pub(super) fn changes(g: Geometry, l1: &[u64], more: i64) -> impl Iterator<Item = Change> + '_ {
    tables(g, l1).map(move |(slot, table)| Change { table, slot, more })
}

/// Adds up the changes of each table, ascending; none where they make up for each other.
pub(super) fn sum(mut changes: Vec<Change>) -> Vec<Change> {
    changes.sort_by_key(|change| change.table);
    changes.dedup_by(|next, kept| {
        let same = next.table == kept.table;
        if same {
            kept.more += next.more;
        }
        same
    });
    changes.retain(|change| change.more != 0);
    changes
}

/// What the stored counts of an L2 table owe.
#[derive(Debug, Clone, Copy)]
struct Owed {
    /// References to be added; below zero, to be taken away.
    references: i64,
    /// Index of the table in the L1 tables.
    slot: usize,
    /// The active L1 entry had COPIED when the first reference came, and all below has been as it was since.
    was_copied: bool,
    /// It could not be settled: later ones go first.
    failed: bool,
}

/// A piece of work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// Clusters of replaced tables.
    Areas,
    /// Clusters that have been punched, or need not be.
    Punched,
    /// Clusters whose last reference is gone, to be punched.
    Freed,
    /// The COPIED flags of an L1 index.
    Flags(usize),
    /// An L2 table that owes, in this cluster.
    Table(ClusterIndex),
    /// References that are gone, of tables that may not have been written as they are.
    Drops,
}

/// The state.
#[derive(Debug, Default)]
pub(in crate::formats::qcow2) struct Settling(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// By the cluster of the L2 table.
    owed: BTreeMap<u64, Owed>,
    /// L1 indices whose COPIED flags may differ from what the stored counts say.
    flags: BTreeSet<usize>,
    /// Those of them that could not be looked at.
    failed_flags: BTreeSet<usize>,
    /// Tables that nothing points to any more, still counted.
    areas: Vec<Run>,
    /// Clusters that nothing points to any more, still counted once.
    freed: Vec<Run>,
    /// Those of them that are being punched.
    punching: Vec<Run>,
    /// Those that have been.
    punched: Vec<Run>,
    /// Areas or freed clusters could not be freed.
    frees_failed: bool,
    /// L1 tables that have been dropped since references were last owed that are to be taken away.
    drops: u64,
    /// References that are gone, of tables that may not have been written as they are; not owed yet.
    later: Vec<Change>,
    /// How many L1 tables have been dropped with them.
    later_drops: u64,
    /// Those tables could not be written.
    later_failed: bool,
    /// By the cluster of an L2 table of which references are to be taken away: those below it that another table has taken over.
    passed_on: BTreeMap<u64, Vec<Run>>,
    /// Changes of snapshots that will make tables owe.
    expected: i64,
}

/// What stored counts may have to take yet, or hold too much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Burden {
    /// The most references that a table lacks.
    pub(super) lacking: u64,
    /// L1 tables that have been dropped, and are still counted in part.
    pub(super) drops: u64,
}

impl Settling {
    /// Notes what has happened. `before` was the active L1 table and `active` is it now; its COPIED flags follow.
    ///
    /// Under the closed gate.
    pub(super) fn apply(
        &self,
        g: Geometry,
        changes: &[Change],
        before: &L1Table,
        active: &L1Table,
    ) {
        let mut state = self.state();
        for change in changes {
            let Change { table, slot, more } = *change;
            let owed = state.owed.entry(table.0).or_insert_with(|| Owed {
                references: 0,
                slot,
                was_copied: is_at(g, before.get(slot), table.0) && before.get(slot).is_copied(),
                failed: false,
            });
            owed.references += more;
        }
        state.drops += dropped(changes);
        let State { owed, flags, .. } = &mut *state;
        owed.retain(|table, owed| {
            if owed.references != 0 {
                return true;
            }
            let present = active.get(owed.slot);
            if owed.was_copied && is_at(g, present, *table) {
                if !present.is_copied() {
                    active.set(owed.slot, present.with_copied(true));
                }
            } else {
                flags.insert(owed.slot);
            }
            false
        });
        active.change(|entry| {
            let host = entry.l2_offset().filter(|_| entry.is_copied())?;
            let owes = owed.contains_key(&g.host_cluster(host).0);
            owes.then(|| entry.with_copied(false))
        });
        if active.offset() != before.offset() {
            let new = active.entries();
            for (slot, table) in tables(g, &new).filter(|(_, table)| !owed.contains_key(&table.0)) {
                let was = before.get(slot);
                if !is_at(g, was, table.0) {
                    // Nobody has kept up the flags of tables that only snapshots had. Those that owe are looked at when they are settled.
                    flags.insert(slot);
                } else if was.is_copied() {
                    // The disk has come back to it: the copy of the L1 table that it came by has no flags.
                    active.set(slot, active.get(slot).with_copied(true));
                }
            }
        }
    }

    /// How many references of L1 tables the stored counts of the table lack; below zero, how many they have too many.
    pub(super) fn owed(&self, table: ClusterIndex) -> i64 {
        let state = self.state();
        state.owed.get(&table.0).map_or(0, |owed| owed.references)
    }

    /// The L1 index of a table that owes.
    pub(super) fn slot(&self, table: ClusterIndex) -> Option<usize> {
        let state = self.state();
        state.owed.get(&table.0).map(|owed| owed.slot)
    }

    /// So many references have been counted for the table, at this L1 index; the flags above it are to be looked at.
    pub(super) fn settled(&self, table: ClusterIndex, slot: usize, references: i64) {
        let mut state = self.state();
        state.passed_on.remove(&table.0);
        state.add(table, slot, -references);
        state.flags.insert(slot);
    }

    /// Notes references that are gone, while requests go on and tables are settled.
    pub(super) fn drop_references(&self, changes: &[Change]) {
        let mut state = self.state();
        state.drop_references(changes, dropped(changes));
    }

    /// Notes references that are gone of tables that may not have been written as they are: they go behind the next write-back. One
    /// that writes such a table must not find that its cluster is somebody else's.
    pub(super) fn drop_later(&self, changes: Vec<Change>) {
        let mut state = self.state();
        state.later_drops += dropped(&changes);
        state.later.extend(changes);
    }

    /// All that was changed when `drop_later` was called has been written.
    pub(super) fn drop_now(&self) {
        let mut state = self.state();
        let later = std::mem::take(&mut state.later);
        let drops = std::mem::take(&mut state.later_drops);
        state.drop_references(&later, drops);
    }

    /// They could not be written: others go first.
    pub(super) fn drops_failed(&self) {
        self.state().later_failed = true;
    }

    /// One more change of snapshots is (or, by -1, is no longer) about to make tables owe.
    pub(super) fn expect(&self, more: i64) {
        self.state().expected += more;
    }

    /// Whether tables may owe soon.
    pub(super) fn is_expecting(&self) -> bool {
        self.state().expected > 0
    }

    /// Of what is owed to be taken away of a table, these references stay. Nothing may be added to them before it is settled.
    pub(super) fn pass_on(&self, table: ClusterIndex, references: Vec<Run>) {
        self.state().passed_on.insert(table.0, references);
    }

    /// The references below a table that stay when it is settled.
    pub(super) fn passed_on(&self, table: ClusterIndex) -> Vec<Run> {
        let state = self.state();
        state.passed_on.get(&table.0).cloned().unwrap_or_default()
    }

    /// Whether references stay behind tables that are not settled.
    pub(super) fn has_passed_on(&self) -> bool {
        !self.state().passed_on.is_empty()
    }

    /// What counters have to hold beside the references that there are.
    pub(super) fn burden(&self) -> Burden {
        let mut state = self.state();
        let owed = state.owed.values().map(|owed| owed.references);
        let (least, most) = owed.fold((0, 0), |(least, most), owed| {
            (owed.min(least), owed.max(most))
        });
        if least == 0 {
            state.drops = 0;
        }
        Burden {
            lacking: u64::try_from(most).unwrap_or(0),
            drops: state.drops + state.later_drops,
        }
    }

    /// Whether an active table lacks references. If so it remembers that the flags below it are to be looked at when the
    /// references go again.
    pub(super) fn postpone_flags(&self, table: ClusterIndex) -> bool {
        let mut state = self.state();
        match state.owed.get_mut(&table.0) {
            Some(owed) if owed.references > 0 => {
                owed.was_copied = false;
                true
            }
            _ => false,
        }
    }

    /// Tables that nothing points to any more, durably, and that nobody reads.
    pub(super) fn add_areas(&self, runs: impl IntoIterator<Item = Run>) {
        self.state().areas.extend(runs);
    }

    /// Clusters whose last reference is gone, durably, and that nobody reads.
    pub(super) fn add_freed(&self, runs: impl IntoIterator<Item = Run>) {
        self.state().freed.extend(runs);
    }

    /// What was taken could not be freed: nothing is freed for a while.
    pub(super) fn frees_failed(&self) {
        self.state().frees_failed = true;
    }

    /// Takes the areas, to free them. What could not be freed comes back with `add_areas`.
    pub(super) fn take_areas(&self) -> Vec<Run> {
        std::mem::take(&mut self.state().areas)
    }

    /// Some of the freed clusters, to be punched: up to so many runs, and clusters in them. One caller at a time.
    pub(super) fn start_punching(&self, runs: usize, clusters: u64) -> Vec<Run> {
        let mut state = self.state();
        // What a caller has left that was dropped.
        let left_over = std::mem::take(&mut state.punching);
        state.freed.extend(left_over);
        let (mut taken, mut left) = (Vec::new(), clusters);
        while taken.len() < runs
            && left > 0
            && let Some(last) = state.freed.last_mut()
        {
            let count = last.count.min(left);
            last.count -= count;
            left -= count;
            let start = last.start + last.count;
            taken.push(Run { start, count });
            if last.count == 0 {
                state.freed.pop();
            }
        }
        state.punching.clone_from(&taken);
        taken
    }

    /// The first `done` runs have been punched.
    pub(super) fn end_punching(&self, done: usize) {
        let mut state = self.state();
        let mut punched = std::mem::take(&mut state.punching);
        let rest = punched.split_off(done);
        state.freed.extend(rest);
        state.punched.extend(punched);
    }

    /// Takes what has been punched. What could not be freed comes back with `add_punched`.
    pub(super) fn take_punched(&self) -> Vec<Run> {
        std::mem::take(&mut self.state().punched)
    }

    /// Clusters that could not be freed yet.
    pub(super) fn add_punched(&self, runs: impl IntoIterator<Item = Run>) {
        self.state().punched.extend(runs);
    }

    /// Takes an L1 index whose flags are looked at now. After an error it comes back with `flags_failed`.
    pub(super) fn take_flags(&self, slot: usize) {
        self.state().flags.remove(&slot);
    }

    /// The flags of the index are still to be looked at, but not next.
    pub(super) fn flags_failed(&self, slot: usize) {
        self.state().failed_flags.insert(slot);
    }

    /// The table could not be settled: others go first.
    pub(super) fn table_failed(&self, table: ClusterIndex) {
        if let Some(owed) = self.state().owed.get_mut(&table.0) {
            owed.failed = true;
        }
    }

    /// What has failed is tried again.
    pub(super) fn try_again(&self) {
        let mut state = self.state();
        let State {
            owed,
            flags,
            failed_flags,
            frees_failed,
            later_failed,
            ..
        } = &mut *state;
        flags.append(failed_flags);
        *frees_failed = false;
        *later_failed = false;
        owed.values_mut().for_each(|owed| owed.failed = false);
    }

    /// What to do next; nothing where all is settled or has failed.
    pub(super) fn next(&self) -> Option<Work> {
        let state = self.state();
        if !state.areas.is_empty() && !state.frees_failed {
            return Some(Work::Areas);
        }
        if !state.punched.is_empty() && !state.frees_failed {
            return Some(Work::Punched);
        }
        if !(state.freed.is_empty() && state.punching.is_empty()) {
            return Some(Work::Freed);
        }
        if let Some(slot) = state.flags.first() {
            return Some(Work::Flags(*slot));
        }
        if let Some(table) = state.waiting().next() {
            return Some(Work::Table(table));
        }
        let drops = !state.later.is_empty() && !state.later_failed;
        drops.then_some(Work::Drops)
    }

    /// The tables that are to be settled next, ascending.
    pub(super) fn next_tables(&self, most: usize) -> Vec<ClusterIndex> {
        self.state().waiting().take(most).collect()
    }

    /// Whether the stored counts and the flags in memory say what the tables say.
    pub(in crate::formats::qcow2) fn is_empty(&self) -> bool {
        let state = self.state();
        state.owed.is_empty()
            && state.flags.is_empty()
            && state.failed_flags.is_empty()
            && state.areas.is_empty()
            && state.later.is_empty()
            && !state.has_freed()
    }

    /// Whether settling frees clusters.
    pub(in crate::formats::qcow2) fn frees(&self) -> bool {
        let state = self.state();
        let is_drop = |owed: &Owed| owed.references < 0;
        let waits = !(state.areas.is_empty() && state.later.is_empty());
        waits || state.has_freed() || state.owed.values().any(is_drop)
    }

    /// L2 tables that owe, and L1 indices with flags to look at.
    pub(in crate::formats::qcow2) fn unsettled_tables(&self) -> u64 {
        let state = self.state();
        let State {
            owed,
            flags,
            failed_flags,
            later,
            ..
        } = &*state;
        (owed.len() + flags.len() + failed_flags.len() + later.len()) as u64
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn drop_references(&mut self, changes: &[Change], l1_tables: u64) {
        for change in changes {
            let Change { table, slot, more } = *change;
            assert!(more < 0, "references come under the closed gate only");
            self.add(table, slot, more);
        }
        self.drops += l1_tables;
    }

    /// The table owes so many references more. The flags above it are looked at when it owes nothing.
    fn add(&mut self, table: ClusterIndex, slot: usize, more: i64) {
        let owed = self.owed.entry(table.0).or_insert(Owed {
            references: 0,
            slot,
            was_copied: false,
            failed: false,
        });
        owed.references += more;
        // Nobody knows what has become of the flags meanwhile.
        owed.was_copied = false;
        if owed.references == 0 {
            self.owed.remove(&table.0);
            self.flags.insert(slot);
        }
    }

    fn has_freed(&self) -> bool {
        !(self.freed.is_empty() && self.punching.is_empty() && self.punched.is_empty())
    }

    /// The tables that can be settled now, ascending. While clusters that were freed wait, no more are.
    fn waiting(&self) -> impl Iterator<Item = ClusterIndex> + '_ {
        let frees = !self.has_freed();
        let owed = self.owed.iter();
        owed.filter(move |(_, owed)| !owed.failed && (frees || owed.references > 0))
            .map(|(table, _)| ClusterIndex(*table))
    }
}

/// How many L1 tables have been dropped, at most, by changes of L2 tables.
fn dropped(changes: &[Change]) -> u64 {
    let dropped = changes.iter().map(|change| -change.more).max();
    u64::try_from(dropped.unwrap_or(0)).unwrap_or(0)
}

/// The L2 tables of an L1 table that has been checked, with their indices.
pub(super) fn tables(g: Geometry, l1: &[u64]) -> impl Iterator<Item = (usize, ClusterIndex)> + '_ {
    let entries = l1.iter().enumerate();
    entries.filter_map(move |(slot, entry)| {
        let host = L1Entry(*entry).l2_offset()?;
        Some((slot, g.host_cluster(host)))
    })
}

/// The L2 tables that are in an L1 table and were not at that place in the one before it.
pub(super) fn activated<'a>(
    g: Geometry,
    before: &'a [u64],
    active: &'a [u64],
) -> impl Iterator<Item = (usize, ClusterIndex)> + 'a {
    let place = |entry: &u64| L1Entry(*entry).l2_offset();
    tables(g, active).filter(move |(slot, _)| {
        let [old, new] = [before, active].map(|l1| l1.get(*slot).and_then(place));
        old != new
    })
}

fn is_at(g: Geometry, entry: L1Entry, cluster: u64) -> bool {
    entry
        .l2_offset()
        .is_some_and(|host| g.host_cluster(host).0 == cluster)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_clusters_are_taken_in_bounded_pieces() {
        let settling = Settling::default();
        let run = |start, count| Run {
            start: ClusterIndex(start),
            count,
        };
        settling.add_freed([run(10, 1), run(20, 100), run(200, 1), run(300, 1)]);
        assert_eq!(settling.next(), Some(Work::Freed));
        let pieces = [
            vec![run(300, 1), run(200, 1)],
            vec![run(56, 64)],
            vec![run(20, 36), run(10, 1)],
            vec![],
        ];
        for piece in pieces {
            assert_eq!(settling.start_punching(2, 64), piece);
            settling.end_punching(piece.len());
        }
        assert_eq!(settling.take_punched().len(), 5);
        assert!(settling.is_empty());
        settling.add_freed([run(10, 1), run(20, 1), run(30, 1)]);
        settling.start_punching(1, 64);
        assert_eq!(settling.start_punching(2, 64), [run(30, 1), run(20, 1)]);
        settling.end_punching(1);
        assert_eq!(settling.take_punched(), [run(30, 1)]);
        assert_eq!(settling.start_punching(9, 64), [run(20, 1), run(10, 1)]);
        assert!(!settling.is_empty());
    }
}
