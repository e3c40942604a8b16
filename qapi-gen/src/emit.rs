//! Emitters: a checked schema in, files out. Each output has a small pure emitter of its own.
//!
//! ```text
//! plan      which definition is called what, and where recursion needs a box
//! types     structs, enums, unions, alternates, with decoders and encoders
//! commands  argument structs, handler traits, marshallers
//! events    event structs and the enum of all events
//! table     mod.rs: the modules, what they export, the dispatch table
//! introspect  the reply of query-qmp-schema
//! rustdoc   documentation as rustdoc text
//! docs      documentation as Markdown pages
//! ```
//!
//! The same schema gives the same bytes on every machine: order is source order, paths are those
//! of the schema, and nothing is hashed or dated.

mod commands;
mod docs;
mod events;
mod introspect;
mod members;
mod names;
mod plan;
mod rustdoc;
mod table;
#[cfg(test)]
mod tests;
mod types;

pub use introspect::schema_info;

use proc_macro2::TokenStream;
use quote::quote;

use crate::diagnostic::{Diagnostic, SourceMap};
use crate::ir::{Kind, ModuleItem, Schema};
use plan::Plan;

/// A file to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputFile {
    /// Its path relative to the output folder.
    pub path: String,
    /// Its whole text.
    pub text: String,
}

/// What the caller of [`rust`] decides.
#[derive(Debug, Clone)]
pub struct RustOptions {
    /// The Rust path of the runtime (`rt`) from the generated modules.
    pub runtime: String,
    /// How the schema's folder is called in headers and locations.
    pub schema_folder: String,
}

impl Default for RustOptions {
    fn default() -> Self {
        RustOptions {
            runtime: "crate::rt".to_owned(),
            schema_folder: "schema".to_owned(),
        }
    }
}

/// The Rust modules of a schema: `mod.rs`, one file for each schema file that defines something,
/// and `introspection.rs`.
///
/// # Errors
/// Names that are different on the wire and the same in Rust.
///
/// # Panics
/// If `options.runtime` is no Rust path.
pub fn rust(
    schema: &Schema,
    sources: &SourceMap,
    options: &RustOptions,
) -> Result<Vec<OutputFile>, Vec<Diagnostic>> {
    let plan = Plan::new(schema, sources, options)?;
    let mut files = vec![table::mod_file(&plan)];
    for module in 0..schema.modules.len() {
        if plan.has_definitions(module) {
            files.push(module_file(&plan, module));
        }
    }
    files.push(introspect::file(&plan));
    Ok(files)
}

/// The Markdown reference of a schema: one page for each schema file, and `README.md` with links
/// to all of them.
pub fn docs(schema: &Schema, schema_folder: &str) -> Vec<OutputFile> {
    docs::pages(schema, schema_folder)
}

/// Everything that one schema file defines.
fn module_file(plan: &Plan<'_>, module: usize) -> OutputFile {
    let mut items = TokenStream::new();
    let mut commands = commands::Commands::default();
    let mut events = TokenStream::new();
    for item in &plan.schema.modules[module].items {
        let ModuleItem::Definition(id) = item else {
            continue;
        };
        match &plan.schema.def(*id).kind {
            Kind::Enum(values) => items.extend(types::enumeration(plan, *id, values)),
            Kind::Struct(_) => items.extend(types::structure(plan, *id)),
            Kind::Union(def) => items.extend(types::union(plan, *id, def)),
            Kind::Alternate(alternatives) => {
                items.extend(types::alternate(plan, *id, alternatives));
            }
            Kind::Command(def) => commands.add(plan, *id, def),
            Kind::Event(def) => events.extend(events::event(plan, *id, def)),
        }
    }
    let runtime = &plan.runtime;
    let commands = commands.into_modules(plan, module);
    let events = events::module(plan, events);
    let imports = plan.foreign_types(module);
    let body = quote! {
        #![allow(unused_imports)]

        use #runtime::decode::{self, Decoded, Members};
        use #runtime::{encode, Object, Path, QType, Value};
        #imports
        #items
        #commands
        #events
    };
    OutputFile {
        path: format!("{}.rs", plan.modules[module].rust),
        text: format_file(&plan.modules[module].source, body),
    }
}

/// The header and the formatted code.
fn format_file(source: &str, body: TokenStream) -> String {
    let file = match syn::parse2::<syn::File>(body.clone()) {
        Ok(file) => file,
        // A defect of an emitter. What it made is the best message there is.
        Err(err) => panic!("the generated code of {source} is no Rust: {err}\n{body}"),
    };
    let text = spaced(&prettyplease::unparse(&file));
    format!("// @generated from {source}\n\n{text}")
}

/// Puts an empty line between items, which prettyplease leaves out.
fn spaced(text: &str) -> String {
    let starts_item = |line: &str| {
        ["///", "pub ", "impl", "#[", "const "]
            .iter()
            .any(|start| line.trim_start().starts_with(start))
    };
    let mut spaced = String::with_capacity(text.len());
    let mut previous = "";
    for line in text.lines() {
        let indent = |line: &str| line.len() - line.trim_start().len();
        let ended = previous.trim() == "}" && indent(previous) == indent(line)
            || previous.ends_with(';') && line.trim_start().starts_with("///");
        if ended && starts_item(line) {
            spaced.push('\n');
        }
        spaced.push_str(line);
        spaced.push('\n');
        previous = line;
    }
    spaced
}
