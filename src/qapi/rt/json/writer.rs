//! Values to text, in the exact form of QEMU's output.
//!
//! One line with `", "` and `": "`, or indented by 4 spaces with CRLF line ends; ASCII only; upper
//! case hex in escapes; doubles with 17 significant digits.

use std::io::Write as _;

use serde_json::map;

use crate::rt::{Object, Value};

/// How a message is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Style {
    /// On one line.
    #[default]
    Compact,
    /// One member or element per line (`pretty=on`).
    Pretty,
}

/// A container being written.
enum Level<'a> {
    List(std::slice::Iter<'a, Value>),
    Object(map::Iter<'a>),
}

/// Appends an object to `out`, without a line end behind it.
pub fn write(out: &mut Vec<u8>, object: &Object, style: Style) {
    out.push(b'{');
    // Not recursive: a client's `id` is echoed, however deep it is.
    let mut stack = vec![Level::Object(object.iter())];
    let mut first = true;
    while let Some(level) = stack.last_mut() {
        let (name, value) = match level {
            Level::List(elements) => (None, elements.next()),
            Level::Object(members) => match members.next() {
                Some((name, value)) => (Some(name), Some(value)),
                None => (None, None),
            },
        };
        let Some(value) = value else {
            let close = match level {
                Level::List(_) => b']',
                Level::Object(_) => b'}',
            };
            stack.pop();
            if style == Style::Pretty {
                line(out, stack.len());
            }
            out.push(close);
            first = false;
            continue;
        };
        if !first {
            out.push(b',');
        }
        match style {
            Style::Pretty => line(out, stack.len()),
            Style::Compact if !first => out.push(b' '),
            Style::Compact => {}
        }
        if let Some(name) = name {
            string(out, name);
            out.extend_from_slice(b": ");
        }
        first = open(out, value, &mut stack);
    }
}

/// Writes a scalar, or the beginning of a container, which goes on the stack. Returns whether the
/// next value is the first of its container.
fn open<'a>(out: &mut Vec<u8>, value: &'a Value, stack: &mut Vec<Level<'a>>) -> bool {
    match value {
        Value::Null => out.extend_from_slice(b"null"),
        Value::Bool(true) => out.extend_from_slice(b"true"),
        Value::Bool(false) => out.extend_from_slice(b"false"),
        Value::Number(value) => number(out, value),
        Value::String(value) => string(out, value),
        Value::Array(elements) => {
            out.push(b'[');
            stack.push(Level::List(elements.iter()));
            return true;
        }
        Value::Object(members) => {
            out.push(b'{');
            stack.push(Level::Object(members.iter()));
            return true;
        }
    }
    false
}

fn line(out: &mut Vec<u8>, depth: usize) {
    out.extend_from_slice(b"\r\n");
    out.resize(out.len() + depth * 4, b' ');
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| !matches!(c, ' '..='~') || c == '"' || c == '\\') {
        let (plain, special) = rest.split_at(at);
        out.extend_from_slice(plain.as_bytes());
        let mut characters = special.chars();
        if let Some(character) = characters.next() {
            escape(out, character);
        }
        rest = characters.as_str();
    }
    out.extend_from_slice(rest.as_bytes());
    out.push(b'"');
}

fn escape(out: &mut Vec<u8>, character: char) {
    let short = match character {
        '"' => b'"',
        '\\' => b'\\',
        '\u{8}' => b'b',
        '\u{c}' => b'f',
        '\n' => b'n',
        '\r' => b'r',
        '\t' => b't',
        _ => {
            for unit in character.encode_utf16(&mut [0; 2]) {
                append(out, format_args!("\\u{unit:04X}"));
            }
            return;
        }
    };
    out.extend_from_slice(&[b'\\', short]);
}

fn number(out: &mut Vec<u8>, value: &serde_json::Number) {
    match value.as_f64() {
        Some(double) if value.is_f64() => out.extend_from_slice(general(double).as_bytes()),
        _ => append(out, format_args!("{value}")),
    }
}

/// C's `%.17g`: the fewest characters of 17 significant digits, in the shorter of two notations.
fn general(value: f64) -> String {
    const DIGITS: i32 = 17;
    let scientific = format!("{value:.16e}");
    let Some((mantissa, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let (text, suffix) = if (-4..DIGITS).contains(&exponent) {
        let decimals = usize::try_from(DIGITS - 1 - exponent).unwrap_or(0);
        (format!("{value:.decimals$}"), String::new())
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        let suffix = format!("e{sign}{:02}", exponent.abs());
        (mantissa.to_owned(), suffix)
    };
    let trimmed = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => &text,
    };
    format!("{trimmed}{suffix}")
}

fn append(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    // Writing to a Vec cannot fail.
    let written = out.write_fmt(text);
    debug_assert!(written.is_ok());
}
