//! The little language of `.args_type`: `device:B,size:o,node-name:s?,force:-f`.

use std::collections::BTreeMap;

use crate::diagnostic::{Diagnostic, Sink};
use crate::hx::{Arg, Code};
use crate::ir::Span;

/// The characters of a value, which may be written as several adjacent strings, and where each
/// stands.
pub(super) type Chars = Vec<(char, usize)>;

/// Parses the value of `.args_type`; `whole` is its place.
pub(super) fn parse(chars: &[(char, usize)], whole: Span, sink: &mut Sink) -> Vec<Arg> {
    let mut args: Vec<Arg> = Vec::new();
    if chars.is_empty() {
        return args;
    }
    let mut seen: BTreeMap<String, Span> = BTreeMap::new();
    let mut open: Option<Span> = None;
    let mut previous_end = whole.start;
    for piece in chars.split(|(c, _)| *c == ',') {
        let span = match (piece.first(), piece.last()) {
            (Some((_, start)), Some((last, end))) => Span {
                start: *start,
                end: end + last.len_utf8(),
                ..whole
            },
            _ => Span {
                start: previous_end,
                end: previous_end,
                ..whole
            },
        };
        previous_end = span.end;
        let Some(arg) = argument(piece, span, sink) else {
            continue;
        };
        if let Some(first) = seen.insert(arg.name.clone(), span) {
            let error = Diagnostic::error(span, format!("duplicate argument '{}'", arg.name));
            sink.push(error.note_at(first, "the first one is here"));
            continue;
        }
        if arg.code == Code::Open
            && let Some(first) = open.replace(span)
        {
            let error = Diagnostic::error(span, "only one 'O' argument is allowed");
            sink.push(error.note_at(first, "the first one is here"));
        }
        args.push(arg);
    }
    args
}

fn argument(piece: &[(char, usize)], span: Span, sink: &mut Sink) -> Option<Arg> {
    if piece.is_empty() {
        sink.error(span, "argument expected");
        return None;
    }
    let Some(colon) = piece.iter().position(|(c, _)| *c == ':') else {
        let text: String = piece.iter().map(|(c, _)| c).collect();
        let error = Diagnostic::error(
            span,
            format!("argument '{text}' lacks ':' and a type letter"),
        );
        sink.push(error.note(LETTERS));
        return None;
    };
    let name: String = piece[..colon].iter().map(|(c, _)| c).collect();
    let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || !name.chars().all(legal) {
        sink.error(span, format!("argument '{name}' has an invalid name"));
        return None;
    }
    let letters = &piece[colon + 1..];
    if letters.is_empty() {
        let message = format!("argument '{name}' lacks a type letter");
        sink.push(Diagnostic::error(span, message).note(LETTERS));
        return None;
    }
    match type_of(letters) {
        Ok((code, optional)) => Some(Arg {
            name,
            code,
            optional,
            span,
        }),
        Err((at, complaint)) => {
            let (c, start) = letters[at];
            let span = Span {
                start,
                end: start + c.len_utf8(),
                ..span
            };
            let message = format!("argument '{name}': {complaint}");
            sink.push(Diagnostic::error(span, message).note(LETTERS));
            None
        }
    }
}

/// The type, and whether the argument is optional, from the letters behind the colon (at least
/// one). Or else the letter that is wrong, and why.
fn type_of(letters: &[(char, usize)]) -> Result<(Code, bool), (usize, String)> {
    let letter = letters[0].0;
    let mut used = 1;
    let code = match letter {
        'B' | 'F' | 's' => Code::String(letter),
        'i' | 'l' | 'M' | 'o' => Code::Integer(letter),
        'T' => Code::Number,
        'b' => Code::Bool,
        'q' => Code::Any,
        'O' => Code::Open,
        '-' => match letters.get(1) {
            Some((flag, _)) if flag.is_ascii_alphabetic() => {
                used = 2;
                Code::Flag(*flag)
            }
            _ => return Err((0, "a letter is missing behind '-'".to_owned())),
        },
        'S' | '/' | '.' => {
            return Err((0, format!("type letter '{letter}' has no meaning in QMP")));
        }
        other => return Err((0, format!("unknown type letter '{other}'"))),
    };
    let marked = matches!(letters.get(used), Some(('?', _)));
    used += usize::from(marked);
    match letters.get(used) {
        Some((extra, _)) => Err((used, format!("unexpected '{extra}' behind the type"))),
        None => Ok((code, marked || matches!(code, Code::Flag(_)))),
    }
}

const LETTERS: &str = "letters are B F s (string), i l M o (integer), T (number), b (boolean), \
                       -x (flag), q (anything), O (open)";
