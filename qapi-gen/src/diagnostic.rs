//! Source files and diagnostics: what is wrong, where, and what to look at besides.

use crate::ir::{FileId, Span};

/// The files of a run: the schema, its includes, the .hx file.
#[derive(Debug, Clone, Default)]
pub struct SourceMap {
    files: Vec<SourceFile>,
}

/// A file as it was read.
#[derive(Debug, Clone)]
pub struct SourceFile {
    /// The path to print, as the user would type it.
    pub path: String,
    /// Its text.
    pub text: String,
}

impl SourceMap {
    /// Adds a file.
    pub fn add(&mut self, path: impl Into<String>, text: impl Into<String>) -> FileId {
        self.files.push(SourceFile {
            path: path.into(),
            text: text.into(),
        });
        FileId(self.files.len() - 1)
    }

    /// The file behind an id.
    pub fn file(&self, id: FileId) -> &SourceFile {
        &self.files[id.0]
    }

    /// All files in the order they were added.
    pub fn files(&self) -> &[SourceFile] {
        &self.files
    }

    /// Line and column of a byte offset, both 1-based; columns count characters.
    pub fn line_column(&self, file: FileId, offset: usize) -> (usize, usize) {
        let text = &self.file(file).text;
        let before = &text[..offset.min(text.len())];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        (
            before.matches('\n').count() + 1,
            before[line_start..].chars().count() + 1,
        )
    }
}

/// A finding about a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// Whether it stops the generator.
    pub severity: Severity,
    /// The offending token.
    pub span: Span,
    /// What is wrong; no trailing dot.
    pub message: String,
    /// Further places and hints: `previous definition is here`, `did you mean 'x'?`.
    pub notes: Vec<Note>,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Nothing is generated.
    Error,
    /// Reported, and generation goes on.
    Warning,
}

/// An addition to a diagnostic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// The place, if it has one.
    pub span: Option<Span>,
    /// The text.
    pub message: String,
}
