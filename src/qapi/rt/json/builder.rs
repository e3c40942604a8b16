//! Tokens to a value, with a stack of its own instead of recursion.

use serde_json::Number;
use serde_json::map::Entry;

use super::lexer::{Kind, Token};
use super::limits::ERROR_BYTES;
use super::text;
use crate::rt::{Object, Value};

/// What the grammar allows next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    /// A whole message, an element after a comma, or the value of a member.
    Value,
    /// An element, or the end of the list.
    FirstElement,
    /// A comma, or the end of the list.
    ElementEnd,
    /// A key, or the end of the object.
    FirstKey,
    /// A key, after a comma.
    Key,
    /// The colon after a key.
    Colon,
    /// A comma, or the end of the object.
    MemberEnd,
}

/// A container that has not ended.
#[derive(Debug)]
enum Frame {
    List(Vec<Value>),
    Object {
        members: Object,
        /// The key whose value is awaited; `None` while a key is.
        key: Option<String>,
    },
}

/// Builds one value. The first error is kept, and the tokens after it are not looked at.
#[derive(Debug)]
pub(super) struct Builder {
    stack: Vec<Frame>,
    expect: Expect,
    /// The whole value, once the stack is empty again.
    done: Option<Value>,
    error: Option<String>,
}

impl Builder {
    pub(super) fn new() -> Builder {
        Builder {
            stack: Vec::new(),
            expect: Expect::Value,
            done: None,
            error: None,
        }
    }

    /// Takes the next token. Errors wait for [`Builder::take`]: where a broken message ends is
    /// decided by counting brackets.
    pub(super) fn push(&mut self, token: &Token<'_>) {
        if self.error.is_none() {
            self.error = self.accept(token).err();
            if self.error.is_some() {
                self.stack.clear();
            }
        }
    }

    /// The value or the first error, without QEMU's prefix. The builder is then as new.
    pub(super) fn take(&mut self) -> Result<Value, String> {
        let builder = std::mem::replace(self, Builder::new());
        match (builder.error, builder.done) {
            (Some(error), _) => Err(error),
            (None, Some(value)) => Ok(value),
            (None, None) => Err("premature EOI".to_owned()),
        }
    }

    fn accept(&mut self, token: &Token<'_>) -> Result<(), String> {
        let expect = self.expect;
        match (expect, token.kind) {
            (Expect::Colon, Kind::Colon) => self.expect = Expect::Value,
            (Expect::Colon, _) => return Err("missing : in object pair".to_owned()),
            (Expect::ElementEnd, Kind::Comma) => self.expect = Expect::Value,
            (Expect::MemberEnd, Kind::Comma) => self.expect = Expect::Key,
            (Expect::FirstElement | Expect::ElementEnd, Kind::CloseBracket)
            | (Expect::FirstKey | Expect::MemberEnd, Kind::CloseBrace) => return self.close(),
            (Expect::ElementEnd, _) => return Err("expected separator in list".to_owned()),
            (Expect::MemberEnd, _) => return Err("expected separator in dict".to_owned()),
            (_, Kind::OpenBrace) => {
                self.expect = Expect::FirstKey;
                self.stack.push(Frame::Object {
                    members: Object::new(),
                    key: None,
                });
            }
            (_, Kind::OpenBracket) => {
                self.expect = Expect::FirstElement;
                self.stack.push(Frame::List(Vec::new()));
            }
            // Keys are read as values too: a broken one gets the error of a broken value.
            _ => return self.complete(scalar(token)?),
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), String> {
        match self.stack.pop() {
            Some(Frame::List(elements)) => self.complete(Value::Array(elements)),
            Some(Frame::Object { members, .. }) => self.complete(Value::Object(members)),
            None => Err("expecting value".to_owned()),
        }
    }

    /// Puts a whole value where it belongs.
    fn complete(&mut self, value: Value) -> Result<(), String> {
        match self.stack.last_mut() {
            None => self.done = Some(value),
            Some(Frame::List(elements)) => {
                elements.push(value);
                self.expect = Expect::ElementEnd;
            }
            Some(Frame::Object { members, key }) => match key.take() {
                Some(name) => {
                    match members.entry(name) {
                        Entry::Occupied(_) => return Err("duplicate key".to_owned()),
                        Entry::Vacant(place) => place.insert(value),
                    };
                    self.expect = Expect::MemberEnd;
                }
                None => match value {
                    Value::String(name) => {
                        *key = Some(name);
                        self.expect = Expect::Colon;
                    }
                    _ => return Err("key is not a string in object".to_owned()),
                },
            },
        }
        Ok(())
    }
}

fn scalar(token: &Token<'_>) -> Result<Value, String> {
    match token.kind {
        Kind::String => text::decode(&token.text).map(Value::String),
        Kind::Integer | Kind::Float => number(token),
        Kind::Keyword => match &*token.text {
            b"true" => Ok(Value::Bool(true)),
            b"false" => Ok(Value::Bool(false)),
            b"null" => Ok(Value::Null),
            other => {
                let mut error = format!("invalid keyword '{}'", text::repeat(other));
                // QEMU bounds the message, not the word. It is ASCII: the lexer takes no more.
                error.truncate(ERROR_BYTES);
                Err(error)
            }
        },
        _ => Err("expecting value".to_owned()),
    }
}

/// Signed if it fits, else unsigned, else a double: only tokens without a point or an exponent
/// are integers.
fn number(token: &Token<'_>) -> Result<Value, String> {
    let digits = std::str::from_utf8(&token.text).unwrap_or_default();
    if token.kind == Kind::Integer {
        if let Ok(signed) = digits.parse::<i64>() {
            return Ok(Value::from(signed));
        }
        if let Ok(unsigned) = digits.parse::<u64>() {
            return Ok(Value::from(unsigned));
        }
    }
    // QEMU lets 1e999 through and prints it as `inf`, which no client can read.
    digits
        .parse::<f64>()
        .ok()
        .and_then(Number::from_f64)
        .map(Value::Number)
        .ok_or_else(|| format!("number '{}' is out of range", text::repeat(&token.text)))
}
