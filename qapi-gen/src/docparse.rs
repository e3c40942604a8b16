//! Documentation comments: their frame, the sections of a definition's documentation, and the text
//! in them.
//!
//! Indentation carries meaning here, so this is a line machine and not a grammar. A comment whose
//! first line is `@NAME:` documents the definition that follows; any other is free text.

mod blocks;

use crate::diagnostic::{Diagnostic, Sink, SourceFile};
use crate::ir::{DocBlock, FileId, Span};
use crate::parse::Name;

/// A parsed comment.
#[derive(Debug)]
pub(crate) enum Comment {
    Definition(Box<DefinitionDoc>),
    Free(FreeDoc),
}

/// The documentation of a definition.
#[derive(Debug)]
pub(crate) struct DefinitionDoc {
    /// The name it claims to document.
    pub(crate) symbol: Name,
    /// Text that belongs to no section.
    pub(crate) body: Vec<DocBlock>,
    /// `@name:` before the sections: members, arguments, values.
    pub(crate) members: Vec<Described>,
    /// `@name:` under `Features:`.
    pub(crate) features: Vec<Described>,
    pub(crate) returns: Option<Section>,
    pub(crate) errors: Option<Section>,
    pub(crate) since: Option<String>,
}

/// A described name.
#[derive(Debug)]
pub(crate) struct Described {
    pub(crate) name: Name,
    pub(crate) text: Vec<DocBlock>,
}

/// A section with a tag.
#[derive(Debug)]
pub(crate) struct Section {
    /// The tag.
    pub(crate) span: Span,
    pub(crate) text: Vec<DocBlock>,
}

/// Documentation that belongs to no definition.
#[derive(Debug)]
pub(crate) struct FreeDoc {
    pub(crate) text: Vec<DocBlock>,
}

/// A line of documentation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Line<'a> {
    /// Without the comment sign and trailing blanks.
    pub(crate) text: &'a str,
    /// Where `text` starts in its file.
    pub(crate) at: usize,
    /// Its number in the file, 1-based.
    pub(crate) number: usize,
}

impl<'a> Line<'a> {
    fn is_blank(&self) -> bool {
        self.text.trim().is_empty()
    }

    fn indent(&self) -> usize {
        self.text.len() - self.text.trim_start_matches(' ').len()
    }

    /// The line without up to `count` leading blanks.
    fn dedent(&self, count: usize) -> Line<'a> {
        let drop = self.indent().min(count);
        Line {
            text: &self.text[drop..],
            at: self.at + drop,
            number: self.number,
        }
    }
}

/// Parses the comment at `span`, which the grammar found.
pub(crate) fn parse(
    file: FileId,
    source: &SourceFile,
    span: Span,
    sink: &mut Sink,
) -> Option<Comment> {
    let mut context = Context { file, sink };
    let lines = context.frame(source, span)?;
    let first = lines.iter().position(|line| !line.is_blank());
    match first.and_then(|at| lines.get(at..)) {
        Some([first, rest @ ..]) if first.text.starts_with('@') => {
            let symbol = context.symbol(*first)?;
            Some(Comment::Definition(Box::new(
                context.definition(symbol, rest),
            )))
        }
        _ => Some(Comment::Free(context.free(&lines))),
    }
}

/// Takes what it can from a comment of the legacy dialect, which follows customs and not rules: a
/// title (`@name:`, `@name`, `name:`), descriptions, sections. Nothing in it is an error.
pub(crate) fn parse_legacy(source: &SourceFile, span: Span) -> DefinitionDoc {
    let mut sink = Sink::default();
    let mut context = Context {
        file: span.file,
        sink: &mut sink,
    };
    let mut lines = context.legacy_lines(source, span);
    let title = lines.iter().position(|line| !line.is_blank()).unwrap_or(0);
    let symbol = lines
        .get(title)
        .map_or("", |line| line.text)
        .trim_matches(['@', ':']);
    let symbol = Name {
        text: symbol.to_owned(),
        span,
    };
    lines.drain(..lines.len().min(title + 1));
    context.definition(symbol, &lines)
}

struct Context<'a> {
    file: FileId,
    sink: &'a mut Sink,
}

impl Context<'_> {
    fn span(&self, start: usize, length: usize) -> Span {
        Span {
            file: self.file,
            start,
            end: start + length,
        }
    }

    fn error(&mut self, line: Line<'_>, message: impl Into<String>) {
        let span = self.span(line.at, line.text.len());
        self.sink.error(span, message);
    }

    /// Strips the comment signs.
    fn frame<'s>(&mut self, source: &'s SourceFile, span: Span) -> Option<Vec<Line<'s>>> {
        let text = source.text.get(span.start..span.end)?;
        let mut lines = Vec::new();
        let mut ended = false;
        let mut at = span.start;
        let number = source.line_of(span.start);
        for (index, raw) in text.split('\n').enumerate() {
            let indent = raw.len() - raw.trim_start_matches([' ', '\t']).len();
            let line = Line {
                text: raw[indent..].trim_end(),
                at: at + indent,
                number: number + index,
            };
            at += raw.len() + 1;
            let is_frame = line.text.starts_with("##");
            if is_frame && line.text != "##" {
                let edge = if index == 0 { "start" } else { "end" };
                self.error(
                    line,
                    format!("junk after '##' at {edge} of documentation comment"),
                );
                return None;
            }
            if is_frame {
                ended = index > 0;
                continue;
            }
            let body = line.text.strip_prefix('#').unwrap_or("");
            if !body.is_empty() && !body.starts_with(' ') {
                self.error(line, "missing space after '#'");
                return None;
            }
            let blank = body.len().min(1);
            lines.push(Line {
                text: &body[blank..],
                at: line.at + 1 + blank,
                ..line
            });
        }
        if !ended {
            let span = self.span(span.start, 2);
            self.sink
                .error(span, "documentation comment must end with '##'");
            return None;
        }
        Some(lines)
    }

    /// As `frame`, without rules.
    fn legacy_lines<'s>(&self, source: &'s SourceFile, span: Span) -> Vec<Line<'s>> {
        let text = source.text.get(span.start..span.end).unwrap_or("");
        let number = source.line_of(span.start);
        let mut at = span.start;
        let mut lines = Vec::new();
        for (index, raw) in text.split('\n').enumerate() {
            let body = raw.trim_end().trim_start_matches('#');
            let start = at + raw.trim_end().len() - body.len();
            at += raw.len() + 1;
            let dropped = usize::from(body.starts_with(' '));
            let line = Line {
                text: &body[dropped..],
                at: start + dropped,
                number: number + index,
            };
            lines.push(line);
        }
        lines
    }

    fn free(&mut self, lines: &[Line<'_>]) -> FreeDoc {
        for line in lines {
            if let Some((name, _)) = name_colon(*line) {
                let shown = name.text;
                let message = format!("'@{shown}:' is not allowed in free-form documentation");
                self.error(*line, message);
            }
        }
        FreeDoc {
            text: blocks::parse(lines),
        }
    }

    /// `@NAME:` and nothing else.
    fn symbol(&mut self, line: Line<'_>) -> Option<Name> {
        let Some(name) = line.text[1..].strip_suffix(':') else {
            self.error(line, "line should end with ':'");
            return None;
        };
        if name.is_empty() {
            self.error(line, "name required after '@'");
            return None;
        }
        Some(Name {
            text: name.to_owned(),
            span: self.span(line.at + 1, name.len()),
        })
    }

    fn definition(&mut self, symbol: Name, lines: &[Line<'_>]) -> DefinitionDoc {
        let mut reader = Reader { lines, next: 0 };
        let mut parts = Parts::default();
        let mut no_more_members = false;
        while let Some(line) = reader.peek_text() {
            if line.text == "Features:" {
                self.features(&mut reader, &mut parts);
                no_more_members = true;
            } else if let Some((name, _)) = name_colon(line) {
                if no_more_members {
                    let message = format!("description of '@{}:' follows a section", name.text);
                    self.error(name, message);
                }
                while let Some((name, text)) = reader.peek().and_then(name_colon) {
                    reader.next += 1;
                    let section = self.section(&mut reader, text);
                    self.describe(&mut parts.members, name, &section);
                }
                no_more_members = true;
            } else if let Some((tag, text)) = tag_of(line) {
                reader.next += 1;
                let section = self.section(&mut reader, text);
                self.tagged(&mut parts, tag, &section);
                no_more_members = true;
            } else {
                parts.paragraph(&mut reader);
            }
        }
        DefinitionDoc {
            symbol,
            body: blocks::parse(&parts.body),
            members: parts.members,
            features: parts.features,
            returns: parts.returns,
            errors: parts.errors,
            since: parts.since,
        }
    }

    fn features(&mut self, reader: &mut Reader<'_, '_>, parts: &mut Parts<'_>) {
        let Some(heading) = reader.peek_text() else {
            return;
        };
        if !parts.features.is_empty() {
            self.error(heading, "duplicated 'Features:' line");
        }
        reader.next += 1;
        let mut any = false;
        while let Some((name, text)) = reader.peek_text().and_then(name_colon) {
            reader.next += 1;
            any = true;
            let section = self.section(reader, text);
            self.describe(&mut parts.features, name, &section);
        }
        if !any {
            self.error(heading, "feature descriptions expected");
        }
    }

    fn describe(&mut self, list: &mut Vec<Described>, name: Line<'_>, text: &[Line<'_>]) {
        let span = self.span(name.at, name.text.len());
        if name.text.is_empty() {
            self.sink
                .error(self.span(name.at - 1, 1), "name required after '@'");
            return;
        }
        if let Some(first) = list.iter().find(|one| one.name.text == name.text) {
            let message = format!("duplicated description of '@{}'", name.text);
            let error = Diagnostic::error(span, message);
            self.sink
                .push(error.note_at(first.name.span, "the first one is here"));
            return;
        }
        let text = blocks::parse(text);
        if text.is_empty() {
            self.sink
                .error(span, format!("text required after '@{}:'", name.text));
        }
        let name = Name {
            text: name.text.to_owned(),
            span,
        };
        list.push(Described { name, text });
    }

    fn tagged(&mut self, parts: &mut Parts<'_>, tag: Line<'_>, lines: &[Line<'_>]) {
        let span = self.span(tag.at, tag.text.len());
        let text = blocks::parse(lines);
        match tag.text {
            "Note" | "Notes" => {
                let message = format!("'{}:' sections are not supported", tag.text);
                let error = Diagnostic::error(span, message);
                self.sink
                    .push(error.note("write '.. note::' and indent the text"));
                return;
            }
            "Example" | "Examples" => {
                let message = format!("'{}:' sections are not supported", tag.text);
                let error = Diagnostic::error(span, message);
                self.sink
                    .push(error.note("write '.. qmp-example::' and indent the messages"));
                return;
            }
            _ => {}
        }
        if text.is_empty() {
            self.sink
                .error(span, format!("text required after '{}:'", tag.text));
            return;
        }
        let duplicate = match tag.text {
            "Returns" => parts.returns.replace(Section { span, text }).is_some(),
            "Errors" => parts.errors.replace(Section { span, text }).is_some(),
            "Since" => {
                let words: Vec<&str> = lines
                    .iter()
                    .flat_map(|l| l.text.split_whitespace())
                    .collect();
                parts.since.replace(words.join(" ")).is_some()
            }
            // TODO: for those who work on the schema, not for its readers.
            _ => false,
        };
        if duplicate {
            self.sink
                .error(span, format!("duplicated '{}' section", tag.text));
        }
    }

    /// The text of a description: the rest of its first line and the indented lines that follow.
    fn section<'t>(&mut self, reader: &mut Reader<'t, '_>, first: Line<'t>) -> Vec<Line<'t>> {
        let mut lines = vec![first];
        let Some(start) = reader.peek_text() else {
            return lines;
        };
        let indent = start.indent();
        if indent == 0 {
            return lines;
        }
        let mut previous_blank = false;
        while let Some(line) = reader.peek() {
            if line.is_blank() {
                previous_blank = true;
            } else {
                if line.indent() < indent {
                    let is_next = name_colon(line).is_some();
                    if !previous_blank && !is_next {
                        let message =
                            format!("unexpected de-indent (expected at least {indent} spaces)");
                        self.error(line, message);
                        reader.next += 1;
                        continue;
                    }
                    break;
                }
                previous_blank = false;
            }
            lines.push(line.dedent(indent));
            reader.next += 1;
        }
        lines
    }
}

/// What a definition's documentation is put together from.
#[derive(Default)]
struct Parts<'a> {
    body: Vec<Line<'a>>,
    members: Vec<Described>,
    features: Vec<Described>,
    returns: Option<Section>,
    errors: Option<Section>,
    since: Option<String>,
}

impl<'a> Parts<'a> {
    /// Takes lines up to a blank one into the body.
    fn paragraph(&mut self, reader: &mut Reader<'a, '_>) {
        // A blank line of its own separates it from what stood before.
        if let Some(line) = reader.peek() {
            self.body.push(Line { text: "", ..line });
        }
        while let Some(line) = reader.peek().filter(|line| !line.is_blank()) {
            self.body.push(line);
            reader.next += 1;
        }
    }
}

struct Reader<'a, 'l> {
    lines: &'l [Line<'a>],
    next: usize,
}

impl<'a> Reader<'a, '_> {
    fn peek(&self) -> Option<Line<'a>> {
        self.lines.get(self.next).copied()
    }

    /// The next line that is not blank, after skipping those that are.
    fn peek_text(&mut self) -> Option<Line<'a>> {
        while self.peek()?.is_blank() {
            self.next += 1;
        }
        self.peek()
    }
}

/// `@name: text`: the name and the text.
fn name_colon(line: Line<'_>) -> Option<(Line<'_>, Line<'_>)> {
    let rest = line.text.strip_prefix('@')?;
    let (name, _) = rest.split_once(':')?;
    let name = Line {
        text: name,
        at: line.at + 1,
        ..line
    };
    Some((name, behind(line, name.text.len() + 2)))
}

/// `Tag: text` of the known tags.
fn tag_of(line: Line<'_>) -> Option<(Line<'_>, Line<'_>)> {
    const TAGS: [&str; 8] = [
        "Returns", "Errors", "Since", "Notes", "Note", "Examples", "Example", "TODO",
    ];
    let (tag, rest) = line.text.split_once(':')?;
    if !TAGS.contains(&tag) || rest.starts_with(':') {
        return None;
    }
    Some((Line { text: tag, ..line }, behind(line, tag.len() + 1)))
}

/// What stands behind the first `count` bytes of a line, without leading blanks.
fn behind(line: Line<'_>, count: usize) -> Line<'_> {
    let rest = &line.text[count..];
    let trimmed = rest.trim_start();
    Line {
        text: trimmed,
        at: line.at + line.text.len() - trimmed.len(),
        ..line
    }
}
