//! Text to a tree: the lexical layer and the nesting of the schema language, nothing of its
//! meaning.
//!
//! Reads on behind an error: at the next object or documentation comment in column 0.

use pest::Parser as _;
use pest::error::{ErrorVariant, InputLocation};
use pest::iterators::Pair;

use crate::diagnostic::{Diagnostic, Sink};
use crate::ir::{FileId, Span};
use crate::limits::{MAX_NESTING, MAX_STRING_BYTES};

/// The parser that pest generates from the grammar.
mod grammar {
    #![allow(missing_docs, unreachable_pub)]
    /// Recognises `schema.pest`.
    #[derive(pest_derive::Parser)]
    #[grammar = "schema.pest"]
    pub(super) struct SchemaParser;
}
use grammar::{Rule, SchemaParser};

/// A piece of text and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Name {
    pub(crate) text: String,
    /// With its quotes.
    pub(crate) span: Span,
}

/// A value of the tree.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) value: Value,
    pub(crate) span: Span,
}

/// What a value is.
#[derive(Debug, Clone)]
pub(crate) enum Value {
    /// Keys in order; no two are equal.
    Object(Vec<(Name, Node)>),
    Array(Vec<Node>),
    String(String),
    Bool(bool),
}

/// A part of a file.
#[derive(Debug, Clone)]
pub(crate) enum Item {
    /// A documentation comment, with both `##`.
    Doc(Span),
    /// An expression or directive; always an object.
    Object(Node),
    /// Something that was reported.
    Broken,
}

/// Parses a file. Errors go to `sink`; the items that are sound are returned.
pub(crate) fn parse(file: FileId, text: &str, sink: &mut Sink) -> Vec<Item> {
    let context = Context { file, text };
    if text.starts_with('\u{feff}') {
        sink.error(
            context.span(0, 3),
            "byte order mark at the start of the file",
        );
        return Vec::new();
    }
    if let Some(at) = too_deep(text) {
        let message = format!("nested deeper than {MAX_NESTING} levels");
        sink.error(context.span(at, at + 1), message);
        return Vec::new();
    }
    let mut items = Vec::new();
    match SchemaParser::parse(Rule::file, text) {
        Ok(mut pairs) => {
            let content = pairs.next().into_iter().flat_map(Pair::into_inner);
            for pair in content {
                match pair.as_rule() {
                    Rule::doc => items.push(Item::Doc(context.span_of(&pair))),
                    Rule::object => items.push(Item::Object(context.node(pair, sink))),
                    Rule::junk => {
                        sink.push(context.explain(&pair));
                        items.push(Item::Broken);
                    }
                    _ => {}
                }
            }
        }
        // Junk matches whatever the rest does not, so this is not reached; it costs nothing to be
        // safe.
        Err(error) => sink.error(context.span(0, 0), error.variant.message().into_owned()),
    }
    items
}

/// The first bracket that lies deeper than the limit. Looks past strings and comments as the
/// grammar does, and never sees less nesting than the grammar would.
fn too_deep(text: &str) -> Option<usize> {
    let (mut depth, mut in_string, mut in_comment) = (0_usize, false, false);
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'\n' => (in_string, in_comment, escaped) = (false, false, false),
            _ if in_comment => {}
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'\'' => in_string = !in_string,
            _ if in_string => {}
            b'#' => in_comment = true,
            b'{' | b'[' => {
                depth += 1;
                if depth > MAX_NESTING {
                    return Some(at);
                }
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

struct Context<'a> {
    file: FileId,
    text: &'a str,
}

impl Context<'_> {
    fn span(&self, start: usize, end: usize) -> Span {
        Span {
            file: self.file,
            start,
            end,
        }
    }

    fn span_of(&self, pair: &Pair<'_, Rule>) -> Span {
        self.span(pair.as_span().start(), pair.as_span().end())
    }

    fn node(&self, pair: Pair<'_, Rule>, sink: &mut Sink) -> Node {
        let span = self.span_of(&pair);
        let value = match pair.as_rule() {
            Rule::object => Value::Object(self.members(pair, sink)),
            Rule::array => Value::Array(
                pair.into_inner()
                    .filter(|inner| is_value(inner.as_rule()))
                    .map(|inner| self.node(inner, sink))
                    .collect(),
            ),
            Rule::boolean => Value::Bool(pair.as_str() == "true"),
            _ => Value::String(self.string(&pair, sink)),
        };
        Node { value, span }
    }

    fn members(&self, object: Pair<'_, Rule>, sink: &mut Sink) -> Vec<(Name, Node)> {
        let mut members: Vec<(Name, Node)> = Vec::new();
        let mut seen = std::collections::BTreeMap::new();
        for member in object.into_inner() {
            let mut parts = member.into_inner().filter(|part| is_value(part.as_rule()));
            let (Some(key), Some(value)) = (parts.next(), parts.next()) else {
                continue;
            };
            let name = Name {
                text: self.string(&key, sink),
                span: self.span_of(&key),
            };
            let node = self.node(value, sink);
            if let Some(first) = seen.get(&name.text) {
                let message = format!("duplicate key '{}'", name.text);
                sink.push(Diagnostic::error(name.span, message).note_at(*first, "first used here"));
                continue;
            }
            seen.insert(name.text.clone(), name.span);
            members.push((name, node));
        }
        members
    }

    /// The text of a string token without quotes and escapes.
    fn string(&self, pair: &Pair<'_, Rule>, sink: &mut Sink) -> String {
        let token = pair.as_str();
        if token.len() > MAX_STRING_BYTES {
            let message = format!("string longer than {MAX_STRING_BYTES} bytes");
            sink.error(self.span_of(pair), message);
            return String::new();
        }
        let inner = token
            .strip_prefix('\'')
            .and_then(|rest| rest.strip_suffix('\''));
        inner.unwrap_or(token).replace("\\\\", "\\")
    }

    /// Says what is wrong with a piece that is not an object.
    fn explain(&self, junk: &Pair<'_, Rule>) -> Diagnostic {
        let (start, text) = (junk.as_span().start(), junk.as_str());
        if !text.starts_with('{') {
            return self.explain_token(start, "top-level expression must be an object");
        }
        let Err(error) = SchemaParser::parse(Rule::object, text) else {
            return Diagnostic::error(self.span(start, start + 1), "invalid expression");
        };
        let at = match error.location {
            InputLocation::Pos(at) | InputLocation::Span((at, _)) => at,
        };
        let expected = match &error.variant {
            ErrorVariant::ParsingError { positives, .. } => expected(positives),
            ErrorVariant::CustomError { message } => message.clone(),
        };
        let at_end = text.get(at..).is_none_or(|rest| rest.trim().is_empty());
        if at_end {
            // Point behind the last token, not at the blank lines that follow it.
            let end = start + text.trim_end().len();
            let found =
                Diagnostic::error(self.span(end, end), format!("{expected} before the end"));
            return match unclosed(text) {
                Some(open) => {
                    let open = self.span(start + open, start + open + 1);
                    found.note_at(open, "opened here")
                }
                None => found,
            };
        }
        self.explain_token(start + at, &expected)
    }

    /// An error at the token at `at`: what is wrong with the token itself, or else that another was
    /// expected.
    fn explain_token(&self, at: usize, expected: &str) -> Diagnostic {
        let rest = self.text.get(at..).unwrap_or("");
        let mut chars = rest.chars();
        match chars.next() {
            Some('\'') => match bad_string(rest) {
                Some((offset, length, message)) => {
                    let at = at + offset;
                    Diagnostic::error(self.span(at, at + length), message)
                }
                None => Diagnostic::error(self.span(at, at + string_length(rest)), expected),
            },
            Some('#') => Diagnostic::error(
                self.span(at, at + rest.lines().next().unwrap_or("").trim_end().len()),
                "documentation comment inside an expression",
            ),
            Some('{' | '}' | '[' | ']' | ':' | ',') => {
                Diagnostic::error(self.span(at, at + 1), expected)
            }
            Some(_) => {
                let stop = |c: char| c.is_whitespace() || "{}[]:,'#".contains(c);
                let word = rest.split(stop).next().unwrap_or("");
                let span = self.span(at, at + word.len());
                if word == "true" || word == "false" {
                    return Diagnostic::error(span, expected);
                }
                let shown: String = word.chars().take(40).collect();
                Diagnostic::error(span, format!("stray '{shown}'"))
            }
            None => Diagnostic::error(self.span(at, at), expected),
        }
    }
}

fn is_value(rule: Rule) -> bool {
    matches!(
        rule,
        Rule::object | Rule::array | Rule::string | Rule::boolean
    )
}

/// The length of the string token that `rest` begins with.
fn string_length(rest: &str) -> usize {
    rest.get(1..)
        .and_then(|inner| inner.find('\''))
        .map_or(rest.len().min(1), |at| at + 2)
}

/// What is wrong with the string that `rest` begins with: offset, length and message.
fn bad_string(rest: &str) -> Option<(usize, usize, String)> {
    let mut chars = rest.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '\'' => return None,
            '\n' => break,
            '\\' => match chars.next() {
                Some((_, '\\')) => {}
                Some((_, other)) if other != '\n' => {
                    let message = format!("unknown escape \\{}", other.escape_default());
                    return Some((at, 1 + other.len_utf8(), message));
                }
                _ => break,
            },
            ' '..='~' => {}
            '\r' if rest[at..].starts_with("\r\n") => break,
            _ => {
                let message = "funny character in string: only printable ASCII is allowed";
                return Some((at, c.len_utf8(), message.to_owned()));
            }
        }
    }
    let length = rest.lines().next().unwrap_or("").trim_end().len();
    Some((0, length, "missing terminating \"'\"".to_owned()))
}

/// The innermost bracket of `text` that is not closed.
fn unclosed(text: &str) -> Option<usize> {
    let mut open = Vec::new();
    let (mut in_string, mut in_comment) = (false, false);
    for (at, c) in text.char_indices() {
        match c {
            '\n' => (in_string, in_comment) = (false, false),
            _ if in_comment => {}
            '\'' => in_string = !in_string,
            _ if in_string => {}
            '#' => in_comment = true,
            '{' | '[' => open.push(at),
            '}' | ']' => drop(open.pop()),
            _ => {}
        }
    }
    open.pop()
}

/// QEMU's wording for what the grammar would have accepted.
fn expected(rules: &[Rule]) -> String {
    let has = |rule| rules.contains(&rule);
    let close = match (has(Rule::close_brace), has(Rule::close_bracket)) {
        (true, _) => "'}'",
        (_, true) => "']'",
        _ => "",
    };
    let any_value = has(Rule::open_brace) || has(Rule::object) || has(Rule::array);
    if has(Rule::comma) {
        format!("expected ',' or {close}")
    } else if has(Rule::colon) {
        "expected ':'".to_owned()
    } else if any_value && has(Rule::close_bracket) {
        "expected '{', '[', ']', string, or boolean".to_owned()
    } else if any_value {
        "expected '{', '[', string, or boolean".to_owned()
    } else if close.is_empty() {
        "expected string".to_owned()
    } else {
        format!("expected string or {close}")
    }
}

#[cfg(test)]
mod tests;
