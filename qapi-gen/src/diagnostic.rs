//! Source files and diagnostics: what is wrong, where, and what to look at besides.

use std::fmt::Write as _;

use crate::ir::{FileId, Span};
use crate::limits::MAX_DIAGNOSTICS;

/// The files of a run: the schema, its includes, the .hx file.
#[derive(Debug, Clone, Default)]
pub struct SourceMap {
    files: Vec<SourceFile>,
}

/// A file as it was read.
#[derive(Debug, Clone)]
pub struct SourceFile {
    /// The path to print, as the user would type it; it is also the path that was opened.
    pub path: String,
    /// Its text.
    pub text: String,
    /// The `include` directive that brought it in; `None` for files named on the command line.
    pub included_at: Option<Span>,
    /// The offset at which each line starts.
    line_starts: Vec<usize>,
}

impl SourceMap {
    /// Adds a file that the user named.
    pub fn add(&mut self, path: impl Into<String>, text: impl Into<String>) -> FileId {
        self.add_included(path, text, None)
    }

    /// Adds a file that another one includes.
    pub fn add_included(
        &mut self,
        path: impl Into<String>,
        text: impl Into<String>,
        included_at: Option<Span>,
    ) -> FileId {
        let text = text.into();
        let line_starts = std::iter::once(0)
            .chain(text.match_indices('\n').map(|(at, _)| at + 1))
            .collect();
        self.files.push(SourceFile {
            path: path.into(),
            text,
            included_at,
            line_starts,
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

    /// A 1-based line without the blanks around it.
    pub fn line_span(&self, file: FileId, line: usize) -> Span {
        let source = self.file(file);
        let text = source.line_text(line);
        let start = source.line_starts.get(line - 1).copied().unwrap_or(0);
        let start = start + text.len() - text.trim_start().len();
        Span {
            file,
            start,
            end: start + text.trim().len(),
        }
    }

    /// Line and column of a byte offset, both 1-based; columns count characters.
    pub fn line_column(&self, file: FileId, offset: usize) -> (usize, usize) {
        let file = self.file(file);
        let line = file.line_of(offset);
        let start = file.line_starts[line - 1];
        let before = file.text.get(start..offset.min(file.text.len()));
        (line, before.map_or(0, |text| text.chars().count()) + 1)
    }
}

impl SourceFile {
    /// The 1-based line of a byte offset.
    pub fn line_of(&self, offset: usize) -> usize {
        self.line_starts.partition_point(|start| *start <= offset)
    }

    /// The text of a 1-based line without its end.
    fn line_text(&self, line: usize) -> &str {
        let start = self.line_starts.get(line - 1).copied().unwrap_or(0);
        let text = self.text.get(start..).unwrap_or("");
        text.lines().next().unwrap_or("")
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

impl Diagnostic {
    /// An error at `span`.
    pub fn error(span: Span, message: impl Into<String>) -> Diagnostic {
        Diagnostic {
            severity: Severity::Error,
            span,
            message: message.into(),
            notes: Vec::new(),
        }
    }

    /// A warning at `span`.
    pub fn warning(span: Span, message: impl Into<String>) -> Diagnostic {
        Diagnostic {
            severity: Severity::Warning,
            ..Diagnostic::error(span, message)
        }
    }

    /// Adds a note without a place.
    pub fn note(mut self, message: impl Into<String>) -> Diagnostic {
        self.notes.push(Note {
            span: None,
            message: message.into(),
        });
        self
    }

    /// Adds a note about another place.
    pub fn note_at(mut self, span: Span, message: impl Into<String>) -> Diagnostic {
        self.notes.push(Note {
            span: Some(span),
            message: message.into(),
        });
        self
    }

    /// Adds `did you mean 'x'?` if one of `known` is close to `name`.
    pub fn suggest<'a>(self, name: &str, known: impl IntoIterator<Item = &'a str>) -> Diagnostic {
        match closest(name, known) {
            Some(best) => self.note(format!("did you mean '{best}'?")),
            None => self,
        }
    }
}

/// Collects the diagnostics of all passes.
#[derive(Debug, Default)]
pub struct Sink {
    found: Vec<Diagnostic>,
    dropped: usize,
    errors: usize,
}

impl Sink {
    /// Adds a finding. Behind `MAX_DIAGNOSTICS` it is only counted.
    pub fn push(&mut self, diagnostic: Diagnostic) {
        if diagnostic.severity == Severity::Error {
            self.errors += 1;
        }
        if self.found.len() < MAX_DIAGNOSTICS {
            self.found.push(diagnostic);
        } else {
            self.dropped += 1;
        }
    }

    /// Adds an error.
    pub fn error(&mut self, span: Span, message: impl Into<String>) {
        self.push(Diagnostic::error(span, message));
    }

    /// How many errors there were, including those not kept.
    pub fn error_count(&self) -> usize {
        self.errors
    }

    /// The findings in order of file and place; equal ones once.
    pub fn finish(mut self) -> Vec<Diagnostic> {
        self.found
            .sort_by_key(|one| (one.span.file, one.span.start, one.span.end));
        self.found.dedup();
        if self.dropped > 0
            && let Some(last) = self.found.last_mut()
        {
            last.notes.push(Note {
                span: None,
                message: format!("{} further findings are not shown", self.dropped),
            });
        }
        self.found
    }
}

/// Renders findings as plain text: place and message, the source line with carets, and the notes.
///
/// ```text
/// schema/block.json:12:15: error: struct has unknown key 'bse'
///    12 | { 'struct': 'A', 'bse': 'B', 'data': {} }
///       |                  ^^^^^
///    = did you mean 'base'?
/// ```
pub fn render(diagnostics: &[Diagnostic], sources: &SourceMap) -> String {
    let mut out = String::new();
    for diagnostic in diagnostics {
        let word = match diagnostic.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        let message = format!("{word}: {}", diagnostic.message);
        render_place(&mut out, diagnostic.span, &message, sources);
        for note in &diagnostic.notes {
            match note.span {
                Some(span) => {
                    render_place(&mut out, span, &format!("note: {}", note.message), sources)
                }
                None => push_line(&mut out, &format!("   = {}", note.message)),
            }
        }
        let mut included = sources.file(diagnostic.span.file).included_at;
        while let Some(span) = included {
            let file = sources.file(span.file);
            let line = file.line_of(span.start);
            push_line(
                &mut out,
                &format!("   = included from {}:{line}", file.path),
            );
            included = file.included_at;
        }
        out.push('\n');
    }
    out
}

/// How many characters of a source line are shown; hostile lines may be megabytes long.
const MAX_SHOWN: usize = 160;

fn render_place(out: &mut String, span: Span, message: &str, sources: &SourceMap) {
    let file = sources.file(span.file);
    let (line, column) = sources.line_column(span.file, span.start);
    push_line(out, &format!("{}:{line}:{column}: {message}", file.path));
    let text = file.line_text(line);
    let skipped = if column > MAX_SHOWN {
        column - MAX_SHOWN / 2
    } else {
        0
    };
    let shown: String = text.chars().skip(skipped).take(MAX_SHOWN).collect();
    push_line(out, &format!("{line:5} | {}", shown.trim_end()));
    let blank: String = shown
        .chars()
        .take(column - 1 - skipped)
        .map(|c| if c == '\t' { '\t' } else { ' ' })
        .collect();
    let covered = file.text.get(span.start..span.end).unwrap_or("");
    let width = covered.lines().next().unwrap_or("").chars().count();
    let room = MAX_SHOWN.saturating_sub(column - 1 - skipped).max(1);
    push_line(
        out,
        &format!("      | {blank}{}", "^".repeat(width.clamp(1, room))),
    );
}

fn push_line(out: &mut String, line: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{line}");
}

/// The name in `known` that is closest to `name`, if it is close enough to be a slip of the pen.
pub fn closest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let length = name.chars().count();
    if length > 80 {
        return None;
    }
    let allowed = (length / 3).clamp(1, 3);
    known
        .into_iter()
        .filter(|other| *other != name && other.len() <= 80)
        .map(|other| (edit_distance(name, other), other))
        .filter(|(distance, _)| *distance <= allowed)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, other)| other)
}

/// How many letters must be inserted, dropped, changed or swapped with their neighbour; case and
/// `_` for `-` cost nothing. A name that continues the other (`string`, `str`) counts as close.
fn edit_distance(a: &str, b: &str) -> usize {
    let fold = |text: &str| -> Vec<char> {
        text.chars()
            .map(|c| {
                if c == '_' {
                    '-'
                } else {
                    c.to_ascii_lowercase()
                }
            })
            .collect()
    };
    let (a, b) = (fold(a), fold(b));
    if a != b && a.len().min(b.len()) >= 3 && (a.starts_with(&b) || b.starts_with(&a)) {
        return 1;
    }
    let mut before: Vec<usize> = Vec::new();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut next = vec![i];
        for j in 1..=b.len() {
            let replace = row[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replace.min(row[j] + 1).min(next[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(before[j - 2] + 1);
            }
            next.push(best);
        }
        before = std::mem::replace(&mut row, next);
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggestions_are_close() {
        let known = ["str", "bool", "node-name", "Known", "success-response"];
        let cases = [
            ("string", Some("str")),
            ("boolean", Some("bool")),
            ("nod_name", Some("node-name")),
            ("Knwon", Some("Known")),
            ("success", Some("success-response")),
            ("int", None),
            ("Unrelated", None),
        ];
        for (name, expected) in cases {
            assert_eq!(closest(name, known), expected, "for {name}");
        }
    }

    #[test]
    fn places_are_counted_in_characters() {
        let mut sources = SourceMap::default();
        let file = sources.add("t", "aä\nöx\n");
        assert_eq!(sources.line_column(file, 3), (1, 3));
        assert_eq!(sources.line_column(file, 6), (2, 2));
        assert_eq!(sources.line_column(file, 8), (3, 1));
        assert_eq!(sources.line_column(file, 999), (3, 1));
    }

    #[test]
    fn long_lines_are_cut_around_the_place() {
        let mut sources = SourceMap::default();
        let text = "x".repeat(5000);
        let file = sources.add("t", text);
        let span = Span {
            file,
            start: 4000,
            end: 4900,
        };
        let shown = render(&[Diagnostic::error(span, "m")], &sources);
        assert!(shown.lines().all(|line| line.len() < 200), "{shown}");
        assert!(shown.starts_with("t:1:4001: error: m\n"));
    }
}
