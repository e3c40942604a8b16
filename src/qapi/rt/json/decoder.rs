//! Messages out of a stream of bytes.

use std::fmt;

use super::builder::Builder;
use super::lexer::{Kind, Lexer, Token};
use super::limits::{Limits, TOKEN_COST};
use super::text;
use crate::rt::{QmpError, Value};

/// Why a message is not JSON: the sentence that goes to the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JsonError {
    desc: String,
}

impl JsonError {
    fn parse(what: &str) -> JsonError {
        JsonError {
            desc: format!("JSON parse error, {what}"),
        }
    }

    fn limit(what: &str) -> JsonError {
        JsonError {
            desc: format!("JSON {what} limit exceeded"),
        }
    }
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for JsonError {}

impl From<JsonError> for QmpError {
    fn from(error: JsonError) -> QmpError {
        QmpError::generic(error.desc)
    }
}

/// Reads messages from bytes that arrive in any pieces: how they are cut changes nothing.
#[derive(Debug)]
pub struct Decoder {
    limits: Limits,
    lexer: Lexer,
    builder: Builder,
    // Where a message ends is decided by these two, as in QEMU: also for a broken one.
    braces: isize,
    brackets: isize,
    tokens: usize,
    token_bytes: usize,
}

impl Decoder {
    /// A reader at the beginning of a stream.
    pub fn new(limits: Limits) -> Decoder {
        Decoder {
            limits,
            lexer: Lexer::new(limits),
            builder: Builder::new(),
            braces: 0,
            brackets: 0,
            tokens: 0,
            token_bytes: 0,
        }
    }

    /// Reads up to the end of the next message and takes its bytes from `input`.
    ///
    /// `None` says that the input is used up and more is needed. An error is the answer to one
    /// broken message; reading goes on after it.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value, JsonError>> {
        while let Some(token) = self.lexer.next(input) {
            if let Some(message) = self.accept(&token) {
                return Some(message);
            }
        }
        None
    }

    /// Other limits from now on, also for a message that has begun.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
        self.lexer.set_limits(limits);
    }

    /// About how much memory the message that has begun takes, in bytes.
    pub fn held_bytes(&self) -> usize {
        self.lexer.held_bytes() + self.token_bytes + self.tokens * TOKEN_COST
    }

    /// Ends the stream: what was begun is a message, or an error.
    ///
    /// Called until it gives `None`, and then no more input.
    pub fn finish(&mut self) -> Option<Result<Value, JsonError>> {
        let last = self.lexer.finish();
        if let Some(message) = last.and_then(|token| self.accept(&token)) {
            return Some(message);
        }
        (self.tokens > 0).then(|| self.end())
    }

    fn accept(&mut self, token: &Token<'_>) -> Option<Result<Value, JsonError>> {
        match token.kind {
            Kind::OpenBrace => self.braces += 1,
            Kind::CloseBrace => self.braces -= 1,
            Kind::OpenBracket => self.brackets += 1,
            Kind::CloseBracket => self.brackets -= 1,
            Kind::Stray => {
                let stray = text::repeat(&token.text);
                return Some(self.fail(JsonError::parse(&format!("stray '{stray}'"))));
            }
            _ => {}
        }
        // QEMU counts the NUL behind each token's text.
        let bytes = self.token_bytes + token.text.len() + 1;
        if token.kind == Kind::TooLong || bytes > self.limits.token_bytes {
            return Some(self.fail(JsonError::limit("token size")));
        }
        if self.tokens + 1 > self.limits.tokens {
            return Some(self.fail(JsonError::limit("token count")));
        }
        if self.braces + self.brackets > self.limits.nesting as isize {
            return Some(self.fail(JsonError::limit("nesting depth")));
        }
        self.tokens += 1;
        self.token_bytes += token.text.len();
        self.builder.push(token);
        let open = self.braces > 0 || self.brackets > 0;
        if open && self.braces >= 0 && self.brackets >= 0 {
            return None;
        }
        Some(self.end())
    }

    /// Ends a message with what was built.
    fn end(&mut self) -> Result<Value, JsonError> {
        let built = self.builder.take();
        self.reset();
        built.map_err(|error| JsonError::parse(&error))
    }

    /// Ends a message with an error; what was built is dropped.
    fn fail(&mut self, error: JsonError) -> Result<Value, JsonError> {
        self.builder = Builder::new();
        self.reset();
        Err(error)
    }

    fn reset(&mut self) {
        self.braces = 0;
        self.brackets = 0;
        self.tokens = 0;
        self.token_bytes = 0;
    }
}

impl Default for Decoder {
    fn default() -> Self {
        Decoder::new(Limits::default())
    }
}
