//! Internal snapshots.
//!
//! * `table`: the snapshot table

mod table;
