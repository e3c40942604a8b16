//! Wire types of the protocol. `rt` is written by hand; everything else is generated from `schema/` by build.rs.
//!
//! Knows nothing of disks, sockets or handlers.
//!
//! | module | what |
//! |---|---|
//! | [`types`] | the types of the schema, each with `decode` and `into_value` |
//! | [`commands`] | the arguments of each command |
//! | [`handlers`] | a trait for each schema file: what the daemon must implement |
//! | [`events`] | the data of each event; [`Event`] is any of them |
//! | [`commands()`] | the dispatch table for an implementation of the traits |
//! | [`introspection`] | the schema in its wire form |
//!
//! `qapi-gen rust schema/qapi-schema.json FOLDER` writes the generated modules where they can be
//! read.

pub mod rt;

// `mod` items in an included file are looked up beside it, so the generated folder is a normal
// module tree.
#[allow(clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/generated/mod.rs"));
}

pub use generated::*;

#[cfg(test)]
mod tests;
