//! The generator: a QAPI schema and a `qmp-commands.hx` in, Rust and documents out.
//!
//! A pure function: nothing here reads or writes files but `load`, and that through a trait.

pub mod diagnostic;
pub mod ir;
