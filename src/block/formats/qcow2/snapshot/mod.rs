//! Internal snapshots.
//!
//! * `table`: the snapshot table

pub(super) mod table;
