//! Internal snapshots: a snapshot is a copy of the L1 table, and one reference more on all that it reaches
//! (specification: "Snapshots").
//!
//! An operation writes L1 tables and a snapshot table to fresh clusters and switches the header with one write. What it means for
//! refcounts is made good behind it, so the disk's size does not matter:
//!
//! ```text
//! gate closed | memory | gate open | header marked, flush | L1 copies, new table | write-back | header, flush | settling
//!                      ^ the moment that it shows          before this nothing has happened ^
//! ```
//!
//! * `table`: the snapshot table; `list`: the one in use, and who reads which snapshot
//! * `change`: the handle on operations in steps; `staged`: how they become durable; `ahead`: how, while requests go on; `steps`: what
//!   each of them does; `room`: space for their tables; `areas`: writing those; `counting`: when what they take is counted
//! * `settling`: what is still to be done; `settle`: doing it; `settler`: when
//! * `complete`: the table of an image that becomes one of version 3
//! * `view`: a snapshot as a disk of its own
//! * `driver`: the contract around them

mod ahead;
mod areas;
mod change;
mod complete;
mod counting;
mod driver;
mod list;
mod room;
mod settle;
mod settler;
mod settling;
mod staged;
mod steps;
pub(super) mod table;
mod view;

pub(super) use complete::CompleteTable;
pub(super) use list::SnapshotList;
pub(super) use settler::Settler;
pub(super) use settling::Settling;

#[cfg(test)]
mod tests;
