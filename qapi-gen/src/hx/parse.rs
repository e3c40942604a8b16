//! Text to entries and documents. Reads on behind an error at the next line that can start an item.

use std::collections::BTreeMap;

use pest::Parser as _;
use pest::error::{ErrorVariant, InputLocation};
use pest::iterators::Pair;

use crate::diagnostic::{Diagnostic, Sink, SourceMap};
use crate::example;
use crate::hx::{Document, Entry, HxFile, Text, args};
use crate::ir::{FileId, Span};

/// The parser that pest generates from the grammar.
mod grammar {
    #![allow(missing_docs, unreachable_pub)]
    /// Recognises `hx.pest`.
    #[derive(pest_derive::Parser)]
    #[grammar = "hx.pest"]
    pub(super) struct HxParser;
}
use grammar::{HxParser, Rule};

/// Fields that QEMU's tables have had.
const FIELDS: [&str; 13] = [
    "name",
    "args_type",
    "params",
    "help",
    "flags",
    "user_print",
    "mhandler.cmd",
    "mhandler.cmd_new",
    "mhandler.cmd_async",
    "mhandler.info",
    "mhandler.info_new",
    "sub_table",
    "command_completion",
];

/// Parses a file. Errors go to `sink`; what is sound is returned.
pub(super) fn parse(file: FileId, text: &str, sources: &SourceMap, sink: &mut Sink) -> HxFile {
    let mut reader = Reader {
        sources,
        sink,
        hx: HxFile {
            file,
            entries: Vec::new(),
            documents: Vec::new(),
        },
        conditions: Vec::new(),
        names: BTreeMap::new(),
    };
    match HxParser::parse(Rule::file, text) {
        Ok(mut pairs) => {
            for pair in pairs.next().into_iter().flat_map(Pair::into_inner) {
                reader.item(pair);
            }
        }
        // Junk matches whatever the rest does not, so this is not reached; it costs nothing to be
        // safe.
        Err(error) => {
            let span = reader.span(0, 0);
            reader
                .sink
                .error(span, error.variant.message().into_owned());
        }
    }
    for (open, _) in std::mem::take(&mut reader.conditions) {
        reader.sink.error(open, "'#if' without '#endif'");
    }
    reader.hx
}

struct Reader<'a> {
    sources: &'a SourceMap,
    sink: &'a mut Sink,
    hx: HxFile,
    /// The preprocessor conditions that are open: where, and what.
    conditions: Vec<(Span, String)>,
    names: BTreeMap<String, Span>,
}

impl Reader<'_> {
    fn span(&self, start: usize, end: usize) -> Span {
        Span {
            file: self.hx.file,
            start,
            end,
        }
    }

    fn span_of(&self, pair: &Pair<'_, Rule>) -> Span {
        self.span(pair.as_span().start(), pair.as_span().end())
    }

    fn item(&mut self, pair: Pair<'_, Rule>) {
        let span = self.span_of(&pair);
        match pair.as_rule() {
            Rule::document => self.document(pair),
            Rule::directive => self.directive(pair.as_str().trim_end(), span),
            Rule::entry => self.entry(pair),
            Rule::junk => {
                let found = self.explain(span.start, pair.as_str());
                self.sink.push(found);
            }
            _ => {}
        }
    }

    fn document(&mut self, pair: Pair<'_, Rule>) {
        let span = self.span_of(&pair);
        let Some(body) = pair
            .into_inner()
            .find(|part| part.as_rule() == Rule::document_text)
        else {
            return;
        };
        let first = self
            .sources
            .file(self.hx.file)
            .line_of(body.as_span().start());
        let mut at = body.as_span().start();
        let mut lines: Vec<(&str, usize, usize)> = Vec::new();
        for (index, line) in body.as_str().split('\n').enumerate() {
            // The table's own comments are no part of the document.
            if !line.trim_start().starts_with("HXCOMM") {
                lines.push((line.trim_end_matches('\r'), first + index, at));
            }
            at += line.len() + 1;
        }
        let mut rest = lines.as_slice();
        while let [(line, _, _), more @ ..] = rest
            && line.trim().is_empty()
        {
            rest = more;
        }
        let Some(((heading, _, at), mut rest)) = rest.split_first() else {
            self.sink.error(span, "empty document");
            return;
        };
        let title = heading.trim();
        let start = at + heading.len() - heading.trim_start().len();
        // One title in QEMU's file is written with an '@'.
        let name = title.strip_prefix('@').unwrap_or(title);
        if let [(line, _, _), more @ ..] = rest
            && line.trim().len() > 1
            && line.trim().chars().all(|c| c == '-' || c == '=')
        {
            rest = more;
        }
        let text: Vec<&str> = rest.iter().map(|(line, _, _)| *line).collect();
        self.hx.documents.push(Document {
            title: Text {
                text: name.to_owned(),
                span: self.span(start, start + title.len()),
            },
            text: text.join("\n").trim_matches('\n').to_owned(),
            lines: example::extract(rest.iter().map(|(line, number, _)| (*line, *number))),
            span,
        });
    }

    /// A line for the C preprocessor.
    fn directive(&mut self, line: &str, span: Span) {
        let body = line[1..].trim_start();
        let word_end = body
            .find(|c: char| !c.is_ascii_alphabetic())
            .unwrap_or(body.len());
        let (word, rest) = (&body[..word_end], body[word_end..].trim());
        let span = Span {
            end: span.start + line.len(),
            ..span
        };
        match word {
            "if" => self.conditions.push((span, rest.to_owned())),
            "ifdef" => self.conditions.push((span, format!("defined({rest})"))),
            "ifndef" => self.conditions.push((span, format!("!defined({rest})"))),
            "elif" | "else" | "endif" => {
                let Some((open, cond)) = self.conditions.pop() else {
                    self.sink.error(span, format!("'#{word}' without '#if'"));
                    return;
                };
                match word {
                    "elif" => self
                        .conditions
                        .push((open, format!("!({cond}) && ({rest})"))),
                    "else" => self.conditions.push((open, format!("!({cond})"))),
                    _ => {}
                }
            }
            _ => {
                let message = "unknown preprocessor directive";
                let known = ["if", "ifdef", "ifndef", "elif", "else", "endif"];
                self.sink
                    .push(Diagnostic::error(span, message).suggest(word, known));
            }
        }
    }

    fn entry(&mut self, pair: Pair<'_, Rule>) {
        let start = pair.as_span().start();
        let place = self.span(start, start + 1);
        let mut fields: Vec<(Text, Pair<'_, Rule>)> = Vec::new();
        for field in pair
            .into_inner()
            .filter(|part| part.as_rule() == Rule::field)
        {
            let mut parts = field.into_inner();
            let name = parts.next();
            let value = parts.find(|part| part.as_rule() == Rule::value);
            let (Some(name), Some(value)) = (name, value) else {
                continue;
            };
            let name = Text {
                text: name.as_str().trim_start_matches('.').to_owned(),
                span: self.span_of(&name),
            };
            if let Some((first, _)) = fields.iter().find(|(one, _)| one.text == name.text) {
                let error =
                    Diagnostic::error(name.span, format!("duplicate field '.{}'", name.text));
                self.sink
                    .push(error.note_at(first.span, "the first one is here"));
                continue;
            }
            if !FIELDS.contains(&name.text.as_str()) {
                let message = format!("unknown field '.{}'", name.text);
                let warning = Diagnostic::warning(name.span, message);
                self.sink.push(warning.suggest(&name.text, FIELDS));
            }
            fields.push((name, value));
        }
        self.assemble(place, fields);
    }

    fn assemble(&mut self, place: Span, fields: Vec<(Text, Pair<'_, Rule>)>) {
        let mut entry = Entry {
            name: Text {
                text: String::new(),
                span: place,
            },
            args: Vec::new(),
            args_span: place,
            handler: None,
            params: None,
            help: None,
            fields: Vec::new(),
            guard: self.guard(),
        };
        let (mut named, mut typed) = (false, false);
        for (name, value) in fields {
            match name.text.as_str() {
                "name" => {
                    if let Some(text) = self.string(&name, &value) {
                        entry.name = text;
                        named = true;
                    }
                }
                "args_type" => {
                    typed = true;
                    if let Some(chars) = self.chars(&name, &value) {
                        entry.args_span = self.span_of(&value);
                        entry.args = args::parse(&chars, entry.args_span, self.sink);
                    }
                }
                "params" => entry.params = self.string(&name, &value).map(|text| text.text),
                "help" => entry.help = self.string(&name, &value).map(|text| text.text),
                "mhandler.cmd_new" | "mhandler.cmd_async" | "mhandler.cmd" => {
                    entry.handler = Some(self.plain(&value));
                }
                _ => entry.fields.push((name.text, self.plain(&value))),
            }
        }
        if !named {
            self.sink.error(place, "entry lacks '.name'");
            return;
        }
        let shown = entry.name.text.clone();
        if !typed {
            self.sink.error(
                entry.name.span,
                format!("entry '{shown}' lacks '.args_type'"),
            );
        }
        if entry.handler.is_none() {
            let message = format!("entry '{shown}' lacks '.mhandler.cmd_new'");
            self.sink.error(entry.name.span, message);
        }
        if let Some(first) = self.names.get(&shown) {
            let error = Diagnostic::error(entry.name.span, format!("duplicate entry '{shown}'"));
            self.sink
                .push(error.note_at(*first, "the first one is here"));
            return;
        }
        self.names.insert(shown, entry.name.span);
        self.hx.entries.push(entry);
    }

    /// The conditions that hold here, as one.
    fn guard(&self) -> Option<String> {
        let parts: Vec<&str> = self
            .conditions
            .iter()
            .map(|(_, cond)| cond.as_str())
            .collect();
        (!parts.is_empty()).then(|| parts.join(" && "))
    }

    /// A value that is no string, as it is written.
    fn plain(&self, value: &Pair<'_, Rule>) -> Text {
        let text = value.as_str().trim_end();
        let start = value.as_span().start();
        Text {
            text: text.to_owned(),
            span: self.span(start, start + text.len()),
        }
    }

    fn string(&mut self, name: &Text, value: &Pair<'_, Rule>) -> Option<Text> {
        let chars = self.chars(name, value)?;
        Some(Text {
            text: chars.into_iter().map(|(c, _)| c).collect(),
            span: self.span_of(value),
        })
    }

    /// The characters of adjacent strings.
    fn chars(&mut self, name: &Text, value: &Pair<'_, Rule>) -> Option<args::Chars> {
        let mut out = Vec::new();
        let mut any = false;
        for string in value
            .clone()
            .into_inner()
            .filter(|part| part.as_rule() == Rule::string)
        {
            any = true;
            let start = string.as_span().start();
            let inner = string.as_str();
            let inner = inner.strip_prefix('"').unwrap_or(inner);
            let inner = inner.strip_suffix('"').unwrap_or(inner);
            let mut chars = inner.char_indices();
            while let Some((at, c)) = chars.next() {
                let c = match c {
                    '\\' => match chars.next() {
                        Some((_, 'n')) => '\n',
                        Some((_, 't')) => '\t',
                        Some((_, other)) => other,
                        None => break,
                    },
                    c => c,
                };
                out.push((c, start + 1 + at));
            }
        }
        if !any {
            let span = self.span_of(value);
            self.sink
                .error(span, format!("value of '.{}' must be a string", name.text));
            return None;
        }
        Some(out)
    }

    /// Says what is wrong with a piece that is no item.
    fn explain(&self, start: usize, text: &str) -> Diagnostic {
        let first_line = text.lines().next().unwrap_or("").trim_end();
        let line = self.span(start, start + first_line.len());
        if first_line.starts_with("SQMP") {
            return Diagnostic::error(line, "document is not ended by 'EQMP'");
        }
        if first_line.starts_with("EQMP") {
            return Diagnostic::error(line, "'EQMP' without 'SQMP'");
        }
        if !text.starts_with('{') {
            return Diagnostic::error(line, "expected an entry, a document or a directive");
        }
        let Err(error) = HxParser::parse(Rule::entry, text) else {
            return Diagnostic::error(line, "invalid entry");
        };
        let at = match error.location {
            InputLocation::Pos(at) | InputLocation::Span((at, _)) => at,
        };
        let rest = text.get(at..).unwrap_or("");
        let message = match &error.variant {
            ErrorVariant::ParsingError { positives, .. } => expected(positives),
            ErrorVariant::CustomError { message } => message.clone(),
        };
        if rest.trim().is_empty() {
            let end = start + text.trim_end().len();
            let error = Diagnostic::error(self.span(end, end), format!("{message} before the end"));
            return error.note_at(self.span(start, start + 1), "the entry starts here");
        }
        let token = rest.lines().next().unwrap_or("").trim_end();
        let span = self.span(start + at, start + at + token.len());
        if token.starts_with('"') && !closed(token) {
            return Diagnostic::error(span, "missing terminating '\"'");
        }
        let width = token
            .find(|c: char| c.is_whitespace() || ",{}=\"".contains(c))
            .unwrap_or(token.len());
        let span = Span {
            end: span.start + width.max(1).min(token.len()),
            ..span
        };
        Diagnostic::error(span, message)
    }
}

/// Whether the string that a line begins with ends on it.
fn closed(line: &str) -> bool {
    let mut escaped = false;
    line.chars().skip(1).any(|c| {
        let ends = c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    })
}

fn expected(rules: &[Rule]) -> String {
    let has = |rule| rules.contains(&rule);
    let text = if has(Rule::equals) {
        "expected '='"
    } else if has(Rule::value) || has(Rule::expression) || has(Rule::braces) {
        "expected a value"
    } else if has(Rule::comma) {
        "expected ',' or '}'"
    } else if has(Rule::field) || has(Rule::field_name) {
        "expected '.field' or '}'"
    } else if has(Rule::identifier) {
        "expected a field name"
    } else {
        "expected '}'"
    };
    text.to_owned()
}
