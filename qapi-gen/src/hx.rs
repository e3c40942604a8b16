//! `qmp-commands.hx`: the command table of 2010 to 2016, with argument types, handler names and
//! documents.
//!
//! ```text
//! {
//!     .name       = "block_resize",
//!     .args_type  = "device:B,size:o",
//!     .mhandler.cmd_new = qmp_marshal_input_block_resize,
//! },
//!
//! SQMP
//! block_resize
//! ------------
//! ...
//! -> { "execute": "block_resize", ... }
//! <- { "return": {} }
//! EQMP
//! ```
//!
//! [`parse()`] reads a file, [`check()`] compares it with a schema.

mod args;
mod check;
mod parse;

pub use check::{check, check_documents};

use crate::diagnostic::{Sink, SourceMap};
use crate::ir::{ExampleLine, FileId, Span};

/// A parsed file.
#[derive(Debug)]
pub struct HxFile {
    /// The file.
    pub file: FileId,
    /// The commands in order.
    pub entries: Vec<Entry>,
    /// The documents in order. They stand before or behind the entry they describe, or elsewhere.
    pub documents: Vec<Document>,
}

/// A command.
#[derive(Debug)]
pub struct Entry {
    /// `.name`.
    pub name: Text,
    /// `.args_type`.
    pub args: Vec<Arg>,
    /// Where `.args_type` stands.
    pub args_span: Span,
    /// `.mhandler.cmd_new` or one of its kin.
    pub handler: Option<Text>,
    /// `.params`: the arguments for people.
    pub params: Option<String>,
    /// `.help`.
    pub help: Option<String>,
    /// The other fields with their values.
    pub fields: Vec<(String, Text)>,
    /// The preprocessor condition around the entry.
    pub guard: Option<String>,
}

/// A piece of text and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text {
    /// The text.
    pub text: String,
    /// The place.
    pub span: Span,
}

/// An argument in `.args_type`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arg {
    /// The name on the wire.
    pub name: String,
    /// Its type.
    pub code: Code,
    /// `?`, or a flag.
    pub optional: bool,
    /// The whole of it.
    pub span: Span,
}

/// A type letter of `.args_type` as QMP understands it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// `B`, `F`, `s`: a string (a block device, a file name, or just that).
    String(char),
    /// `i`, `l`, `M`, `o`: an integer.
    Integer(char),
    /// `T`: a number.
    Number,
    /// `b`: a boolean.
    Bool,
    /// `-x`: a boolean that is always optional; the letter is for people.
    Flag(char),
    /// `q`: anything.
    Any,
    /// `O`: the command takes arguments that are not listed. The argument itself is neither
    /// required nor checked.
    Open,
}

/// A document between SQMP and EQMP.
#[derive(Debug)]
pub struct Document {
    /// The first line that is not blank: the command it describes, or the title of a part.
    pub title: Text,
    /// The text as it is, without the title and its underline.
    pub text: String,
    /// The text split into messages and prose; line numbers are those of the file.
    pub lines: Vec<ExampleLine>,
    /// From SQMP to EQMP.
    pub span: Span,
}

impl HxFile {
    /// The entry of a command.
    pub fn entry(&self, command: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name.text == command)
    }

    /// The document of a command. Position tells nothing; the title does.
    pub fn document(&self, command: &str) -> Option<&Document> {
        self.documents
            .iter()
            .find(|document| document.title.text == command)
    }
}

impl Entry {
    /// Whether arguments that are not listed are accepted.
    pub fn is_open(&self) -> bool {
        self.args.iter().any(|arg| arg.code == Code::Open)
    }
}

/// The name of the marshaller of a command, as the generator of 2014 called it.
pub fn marshaller(command: &str) -> String {
    format!("qmp_marshal_input_{}", command.replace(['-', '.'], "_"))
}

/// Parses a file that is in `sources`.
pub fn parse(file: FileId, sources: &SourceMap, sink: &mut Sink) -> HxFile {
    parse::parse(file, &sources.file(file).text, sources, sink)
}
