//! The generator: a QAPI schema and a `qmp-commands.hx` in, Rust and documents out.
//!
//! A pure function of the texts: files are read in [`load`], through a trait, and written in
//! [`output`], by those who ask for it.
//!
//! ```text
//! load       files and includes             -> texts
//! parse      text (pest)                    -> tree      legacy    the dialect of 2014 -> tree
//! docparse   comments                       -> text blocks, with the sessions in them (example)
//! shape      tree                           -> ast: keys and kinds of values
//! resolve    names                          -> definitions
//! check      the rules of the language, the documentation, the examples
//! configure  `if` conditions                             lower     ast -> ir::Schema
//! emit       ir::Schema                     -> Rust modules, Markdown pages
//! hx         the command table, and where it and the schema disagree
//! ```
//!
//! The entry is [`load_schema`]. It gives either a schema for which every rule holds, or all that is
//! wrong. [`load_hx`] then reads the command table and compares it with the schema.
//! `Loaded::sources` lists every file that was read, for `cargo::rerun-if-changed`.

mod ast;
mod check;
mod configure;
pub mod diagnostic;
mod docparse;
pub mod emit;
mod example;
pub mod hx;
pub mod ir;
mod legacy;
pub mod limits;
pub mod load;
mod lower;
pub mod output;
mod parse;
mod resolve;
mod shape;

use std::collections::BTreeSet;
use std::path::Path;

use diagnostic::{Diagnostic, Sink, SourceMap};
use hx::HxFile;
use load::Reader;

/// The form of the schema language.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dialect {
    /// That of QEMU 6.2 and later.
    #[default]
    Modern,
    /// That of 2012 to 2014: `type`, simple and anonymous unions, nested objects, `gen: 'no'`,
    /// comments without rules. Only what QEMU 2.0 checks is checked, and that all names resolve.
    Legacy,
}

/// What the caller decides.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The form of the schema language.
    pub dialect: Dialect,
    /// The identifiers that hold in `if` conditions.
    pub defines: BTreeSet<String>,
    /// Warn about types that no command and no event leads to. Schemas also describe configuration
    /// and errors, so this is for those who ask.
    pub warn_unused: bool,
}

/// A schema without errors.
#[derive(Debug)]
pub struct Loaded {
    /// The schema.
    pub schema: ir::Schema,
    /// All files that were read, the top file first.
    pub sources: SourceMap,
    /// Findings that stop nothing, in order of place.
    pub warnings: Vec<Diagnostic>,
}

/// Why there is no schema.
#[derive(Debug)]
pub struct Failure {
    /// The files that were read.
    pub sources: SourceMap,
    /// Errors and warnings, in order of place; at least one error.
    pub diagnostics: Vec<Diagnostic>,
}

impl Failure {
    /// The findings as text, ready to print.
    pub fn render(&self) -> String {
        diagnostic::render(&self.diagnostics, &self.sources)
    }
}

/// Loads the schema whose top file is `top`, checks it and decides its conditions.
///
/// # Errors
/// All diagnostics, not only the first.
pub fn load_schema(
    top: &Path,
    reader: &dyn Reader,
    options: &Options,
) -> Result<Loaded, Box<Failure>> {
    let mut sources = SourceMap::default();
    let mut sink = Sink::default();
    let text = match load::read_top(top, "schema file", reader) {
        Ok(text) => text,
        Err(message) => {
            let file = sources.add(top.display().to_string(), "");
            sink.error(
                ir::Span {
                    file,
                    start: 0,
                    end: 0,
                },
                message,
            );
            return Err(Box::new(Failure {
                sources,
                diagnostics: sink.finish(),
            }));
        }
    };
    let ast = load::load(top, text, reader, options.dialect, &mut sources, &mut sink);
    let symbols = resolve::Symbols::declare(&ast, &mut sink);
    symbols.check_uses(&mut sink);
    check::check(&ast, &symbols, options, &mut sink);
    if sink.error_count() > 0 {
        return Err(Box::new(Failure {
            sources,
            diagnostics: sink.finish(),
        }));
    }
    let schema = lower::lower(&ast, &symbols, options);
    if options.dialect == Dialect::Modern {
        check::examples::check(&schema, &sources, &mut sink);
    }
    Ok(Loaded {
        schema,
        sources,
        warnings: sink.finish(),
    })
}

/// Loads the command table at `path` and checks it against the schema. Its text is added to
/// `loaded.sources` and its warnings to `loaded.warnings`.
///
/// # Errors
/// All that is wrong with the table, and every disagreement between it and the schema.
pub fn load_hx(
    path: &Path,
    reader: &dyn Reader,
    loaded: &mut Loaded,
) -> Result<HxFile, Box<Failure>> {
    let mut sink = Sink::default();
    let (file, text) = match load::read_top(path, "command table", reader) {
        Ok(text) => (loaded.sources.add(path.display().to_string(), text), None),
        Err(message) => (
            loaded.sources.add(path.display().to_string(), ""),
            Some(message),
        ),
    };
    if let Some(message) = text {
        sink.error(
            ir::Span {
                file,
                start: 0,
                end: 0,
            },
            message,
        );
        return Err(fail(loaded, sink));
    }
    let hx = hx::parse(file, &loaded.sources, &mut sink);
    if sink.error_count() == 0 {
        hx::check(&hx, &loaded.schema, &mut sink);
        hx::check_documents(&hx, &loaded.schema, &loaded.sources, &mut sink);
    }
    if sink.error_count() > 0 {
        return Err(fail(loaded, sink));
    }
    loaded.warnings.extend(sink.finish());
    Ok(hx)
}

fn fail(loaded: &Loaded, sink: Sink) -> Box<Failure> {
    Box::new(Failure {
        sources: loaded.sources.clone(),
        diagnostics: sink.finish(),
    })
}
