//! Wire types of the protocol. `rt` is written by hand; everything else is generated from `schema/` by build.rs.
//!
//! Knows nothing of disks, sockets or handlers.
//!
//! | module | what |
//! |---|---|
//! | [`types`] | the types of the schema, each with `decode` and `into_value` |
//! | [`mod@commands`] | the arguments of each command |
//! | [`handlers`] | a trait for each schema file: what the daemon must implement |
//! | [`events`] | the data of each event; [`Event`] is any of them |
//! | [`commands()`] | the dispatch table for an implementation of the traits |
//! | [`schema()`] | the answer of query-qmp-schema; [`introspection`] has its text |
//!
//! `qapi-gen rust schema/qapi-schema.json -o FOLDER` writes the generated modules where they can be
//! read.

pub mod rt;

// `mod` items in an included file are looked up beside it, so the generated folder is a normal
// module tree.
#[allow(clippy::all)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/generated/mod.rs"));
}

pub use generated::*;

/// The schema as the answer of query-qmp-schema.
pub fn schema() -> Vec<types::SchemaInfo> {
    // The generator wrote this text, and a test decodes it.
    #[allow(clippy::expect_used)]
    let value: rt::Value = serde_json::from_str(introspection::SCHEMA).expect("generated JSON");
    #[allow(clippy::expect_used)]
    rt::decode::list(value, &rt::Path::json(), types::SchemaInfo::decode).expect("SchemaInfo")
}

#[cfg(test)]
mod tests;
