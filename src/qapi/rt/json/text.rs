//! Strings: QEMU's "modified UTF-8", escapes, and what an error may repeat of bad bytes.
//!
//! Modified UTF-8 is UTF-8 without the 66 noncharacters, and with U+0000 also written as C0 80.

use super::limits::ERROR_BYTES;

/// The character with this code point, unless QEMU's strings may not hold it.
fn character(code: u32) -> Option<char> {
    let noncharacter = (0xFDD0..=0xFDEF).contains(&code) || code & 0xFFFE == 0xFFFE;
    char::from_u32(code).filter(|_| !noncharacter)
}

/// The code point that `bytes` begin with, and how many bytes it or the broken sequence takes.
/// `bytes` is not empty.
fn code_point(bytes: &[u8]) -> (Option<char>, usize) {
    const SMALLEST: [u32; 5] = [0x80, 0x800, 0x1_0000, 0x20_0000, 0x400_0000];
    let Some(&first) = bytes.first() else {
        return (None, 0);
    };
    if first < 0x80 {
        return (Some(char::from(first)), 1);
    }
    let length = first.leading_ones() as usize;
    if length == 1 || length > 6 {
        return (None, 1);
    }
    let mut code = u32::from(first) & (0x7F >> length);
    for at in 1..length {
        match bytes.get(at) {
            Some(&byte) if byte & 0xC0 == 0x80 => code = code << 6 | u32::from(byte & 0x3F),
            _ => return (None, at),
        }
    }
    let overlong = code < SMALLEST[length - 2] && !(code == 0 && length == 2);
    (character(code).filter(|_| !overlong), length)
}

/// Decodes a string token (with its quotes, which match). The error is QEMU's, without its prefix.
pub(super) fn decode(token: &[u8]) -> Result<String, String> {
    let inner = token.get(1..token.len().saturating_sub(1)).unwrap_or(&[]);
    let mut text = String::with_capacity(inner.len());
    let mut rest = inner;
    while let Some(&byte) = rest.first() {
        if byte == b'\\' {
            // The closing quote is part of what a cut-off escape is reported with.
            let offset = token.len() - 1 - rest.len();
            let (decoded, length) = escape(&token[offset..])?;
            text.push(decoded);
            rest = &rest[length..];
        } else if byte < 0x80 {
            let plain = rest.iter().position(|&byte| byte >= 0x80 || byte == b'\\');
            let (run, after) = rest.split_at(plain.unwrap_or(rest.len()));
            text.push_str(std::str::from_utf8(run).unwrap_or_default());
            rest = after;
        } else {
            let (character, length) = code_point(rest);
            text.push(character.ok_or("invalid UTF-8 sequence in string")?);
            rest = &rest[length..];
        }
    }
    Ok(text)
}

/// Decodes the escape at the beginning of `bytes`, which go on to the closing quote.
fn escape(bytes: &[u8]) -> Result<(char, usize), String> {
    let simple = match bytes.get(1) {
        Some(b'b') => '\u{8}',
        Some(b'f') => '\u{c}',
        Some(b'n') => '\n',
        Some(b'r') => '\r',
        Some(b't') => '\t',
        Some(&byte @ (b'"' | b'\'' | b'\\' | b'/')) => char::from(byte),
        Some(b'u') => return unicode_escape(bytes),
        _ => return Err("invalid escape sequence in string".to_owned()),
    };
    Ok((simple, 2))
}

fn unicode_escape(bytes: &[u8]) -> Result<(char, usize), String> {
    let invalid = || {
        let shown = repeat(&bytes[..bytes.len().min(6)]);
        format!("{shown} is not a valid Unicode character")
    };
    let high = hex4(bytes.get(2..6)).ok_or_else(invalid)?;
    if !(0xD800..0xDC00).contains(&high) {
        return Ok((character(high).ok_or_else(invalid)?, 6));
    }
    let low = bytes
        .get(6..8)
        .filter(|mark| mark == b"\\u")
        .and_then(|_| hex4(bytes.get(8..12)))
        .filter(|low| (0xDC00..0xE000).contains(low))
        .ok_or_else(invalid)?;
    let code = 0x1_0000 + ((high & 0x3FF) << 10) + (low & 0x3FF);
    // A pair is reported whole.
    let shown = || {
        let shown = repeat(&bytes[..12]);
        format!("{shown} is not a valid Unicode character")
    };
    Ok((character(code).ok_or_else(shown)?, 12))
}

fn hex4(digits: Option<&[u8]>) -> Option<u32> {
    digits?.iter().try_fold(0, |code, &digit| {
        Some(code << 4 | char::from(digit).to_digit(16)?)
    })
}

/// What an error repeats of the client's bytes: at most [`ERROR_BYTES`], up to the first NUL,
/// broken sequences replaced.
pub(super) fn repeat(bytes: &[u8]) -> String {
    let mut rest = &bytes[..bytes.len().min(ERROR_BYTES)];
    let mut text = String::with_capacity(rest.len());
    while rest.first().is_some_and(|&byte| byte != 0) {
        let (character, length) = code_point(rest);
        text.push(character.unwrap_or(char::REPLACEMENT_CHARACTER));
        rest = &rest[length..];
    }
    text
}
