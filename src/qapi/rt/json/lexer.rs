//! Bytes to tokens: a table-free state machine that can stop between any two bytes.

use std::borrow::Cow;

use super::limits::Limits;

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    OpenBrace,
    CloseBrace,
    OpenBracket,
    CloseBracket,
    Colon,
    Comma,
    /// Digits with at most a sign: `-0`, `42`.
    Integer,
    /// With a fraction, an exponent or both.
    Float,
    /// `[a-z]+`, not yet known to be one of the three words.
    Keyword,
    /// With its quotes and its escapes as they were written.
    String,
    /// Bytes that begin no token; the last one is what broke it.
    Stray,
    /// More bytes than one token may have.
    TooLong,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Start,
    /// After a stray byte: skipping to where a message may begin.
    Recovery,
    /// In a string that ends at this quote.
    Text(u8),
    /// After a backslash in such a string.
    Escape(u8),
    Sign,
    Zero,
    Digits,
    Point,
    Fraction,
    ExponentMark,
    ExponentSign,
    Exponent,
    Keyword,
}

/// What a byte does to a state.
enum Step {
    /// The byte belongs to the token; go on.
    Take(State),
    /// The byte ends the token and belongs to it.
    End(Kind),
    /// The token ended before this byte.
    EndBefore(Kind),
    /// The byte is between tokens.
    Skip(State),
    /// The byte is looked at again, from the start.
    Again,
}

/// Cuts bytes into tokens. Keeps what a piece ended in the middle of.
#[derive(Debug)]
pub(super) struct Lexer {
    state: State,
    /// The beginning of a token whose end has not arrived.
    partial: Vec<u8>,
    max_token: usize,
}

/// A token and its text.
pub(super) struct Token<'a> {
    pub(super) kind: Kind,
    /// A piece of the input, or owned if the token came in pieces.
    pub(super) text: Cow<'a, [u8]>,
}

impl Lexer {
    pub(super) fn new(limits: Limits) -> Lexer {
        Lexer {
            state: State::Start,
            partial: Vec::new(),
            max_token: limits.token_bytes,
        }
    }

    /// Bytes kept of a token whose end has not arrived.
    pub(super) fn held_bytes(&self) -> usize {
        self.partial.len()
    }

    /// Other limits from now on.
    pub(super) fn set_limits(&mut self, limits: Limits) {
        self.max_token = limits.token_bytes;
    }

    /// Takes the next token and its bytes from `input`; `None` once all of it has been consumed.
    pub(super) fn next<'a>(&mut self, input: &mut &'a [u8]) -> Option<Token<'a>> {
        let bytes = *input;
        let mut begin = 0;
        let mut at = 0;
        let (kind, end) = loop {
            let length = self.partial.len() + (at - begin);
            if length > self.max_token {
                break (Kind::TooLong, at);
            }
            if let State::Text(quote) = self.state {
                // Most bytes are inside strings: pass over them without a state change each, but
                // not further than one byte would at a time.
                let room = bytes.len().min(at + (self.max_token - length));
                at += plain_run(&bytes[at..room], quote);
            }
            let Some(&byte) = bytes.get(at) else {
                self.partial.extend_from_slice(&bytes[begin..]);
                *input = &[];
                return None;
            };
            match step(self.state, byte) {
                Step::Take(state) => {
                    self.state = state;
                    at += 1;
                }
                Step::Skip(state) => {
                    self.state = state;
                    at += 1;
                    begin = at;
                }
                Step::Again => self.state = State::Start,
                Step::End(kind) => break (kind, at + 1),
                Step::EndBefore(kind) => break (kind, at),
            }
        };
        self.state = match kind {
            Kind::Stray => State::Recovery,
            _ => State::Start,
        };
        *input = &bytes[end..];
        let text = self.text(&bytes[begin..end]);
        Some(Token { kind, text })
    }

    /// Ends the token that the input ended in the middle of, if there is one.
    pub(super) fn finish(&mut self) -> Option<Token<'static>> {
        let state = std::mem::replace(&mut self.state, State::Start);
        let kind = match step(state, 0) {
            Step::EndBefore(kind) => kind,
            _ if self.partial.is_empty() => return None,
            _ => Kind::Stray,
        };
        let text = self.text(&[]);
        Some(Token { kind, text })
    }

    /// The text of a token that ends with `tail`.
    fn text<'a>(&mut self, tail: &'a [u8]) -> Cow<'a, [u8]> {
        if self.partial.is_empty() {
            return Cow::Borrowed(tail);
        }
        let mut whole = std::mem::take(&mut self.partial);
        whole.extend_from_slice(tail);
        Cow::Owned(whole)
    }
}

/// How many bytes at the beginning are plain text of a string with this quote.
fn plain_run(bytes: &[u8], quote: u8) -> usize {
    bytes
        .iter()
        .position(|&byte| !(0x20..0xFE).contains(&byte) || byte == quote || byte == b'\\')
        .unwrap_or(bytes.len())
}

fn step(state: State, byte: u8) -> Step {
    match state {
        State::Start => start(byte),
        State::Recovery => match byte {
            // Structural characters and line ends are where a message may begin again; the other
            // control characters are for clients that want to force it.
            b'[' | b']' | b'{' | b'}' | b':' | b',' | 0xFE..=0xFF => Step::Again,
            b'\t' => Step::Skip(State::Recovery),
            0..=0x1F => Step::Again,
            _ => Step::Skip(State::Recovery),
        },
        State::Text(quote) => match byte {
            _ if byte == quote => Step::End(Kind::String),
            b'\\' => Step::Take(State::Escape(quote)),
            0x20..=0xFD => Step::Take(State::Text(quote)),
            _ => Step::End(Kind::Stray),
        },
        // Which escapes exist is the string decoder's business.
        State::Escape(quote) => match byte {
            0x20..=0xFD => Step::Take(State::Text(quote)),
            _ => Step::End(Kind::Stray),
        },
        State::Keyword => match byte {
            b'a'..=b'z' => Step::Take(State::Keyword),
            _ => Step::EndBefore(Kind::Keyword),
        },
        _ => number(state, byte),
    }
}

fn start(byte: u8) -> Step {
    match byte {
        b' ' | b'\t' | b'\r' | b'\n' => Step::Skip(State::Start),
        b'{' => Step::End(Kind::OpenBrace),
        b'}' => Step::End(Kind::CloseBrace),
        b'[' => Step::End(Kind::OpenBracket),
        b']' => Step::End(Kind::CloseBracket),
        b':' => Step::End(Kind::Colon),
        b',' => Step::End(Kind::Comma),
        b'"' | b'\'' => Step::Take(State::Text(byte)),
        b'0' => Step::Take(State::Zero),
        b'1'..=b'9' => Step::Take(State::Digits),
        b'-' => Step::Take(State::Sign),
        b'a'..=b'z' => Step::Take(State::Keyword),
        _ => Step::End(Kind::Stray),
    }
}

fn number(state: State, byte: u8) -> Step {
    match (state, byte) {
        (State::Sign, b'0') => Step::Take(State::Zero),
        (State::Sign, b'1'..=b'9') => Step::Take(State::Digits),
        (State::Zero, b'0'..=b'9') => Step::End(Kind::Stray),
        (State::Zero | State::Digits, b'.') => Step::Take(State::Point),
        (State::Digits, b'0'..=b'9') => Step::Take(State::Digits),
        (State::Digits | State::Fraction, b'e' | b'E') => Step::Take(State::ExponentMark),
        // QEMU reads no exponent after a bare zero: `0e1` is `0` and then the word `e`.
        (State::Zero | State::Digits, _) => Step::EndBefore(Kind::Integer),
        (State::Point | State::Fraction, b'0'..=b'9') => Step::Take(State::Fraction),
        (State::ExponentMark, b'+' | b'-') => Step::Take(State::ExponentSign),
        (State::ExponentMark | State::ExponentSign | State::Exponent, b'0'..=b'9') => {
            Step::Take(State::Exponent)
        }
        (State::Fraction | State::Exponent, _) => Step::EndBefore(Kind::Float),
        _ => Step::End(Kind::Stray),
    }
}
