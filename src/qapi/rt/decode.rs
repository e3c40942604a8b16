//! Values of the wire into typed values: what every generated decoder is made of.
//!
//! The texts are those of QEMU's input visitors, in both syntaxes. Members are looked up in schema
//! order, so the first complaint is about the first member in that order; members that nobody asked
//! for come last, in the order the client wrote them. `null` is a value, never "absent".

mod keyval;
#[cfg(test)]
mod tests;

use super::error::QmpError;
use super::path::{Path, Syntax};
use super::{Object, QType, Value};

/// The result of decoding.
pub type Decoded<T> = Result<T, QmpError>;

/// Decodes one value: what [`Members`] and [`list`] are given for their parts.
pub type Decode<T> = fn(Value, &Path<'_>) -> Decoded<T>;

/// An object whose members are taken out one by one.
#[derive(Debug)]
pub struct Members<'a> {
    object: Object,
    at: &'a Path<'a>,
    taken: Vec<&'static str>,
}

impl<'a> Members<'a> {
    /// Opens a value that must be an object.
    pub fn open(value: Value, at: &'a Path<'a>) -> Decoded<Self> {
        at.check_depth()?;
        match value {
            Value::Object(object) => Ok(Members {
                object,
                at,
                taken: Vec::new(),
            }),
            _ => Err(at.wrong_type("object")),
        }
    }

    /// Takes a member that must be there.
    pub fn required<T>(&mut self, name: &'static str, decode: Decode<T>) -> Decoded<T> {
        let at = self.at.member(name);
        match self.take(name) {
            Some(value) => decode(value, &at),
            None => Err(at.missing()),
        }
    }

    /// Takes a member that may be absent.
    pub fn optional<T>(&mut self, name: &'static str, decode: Decode<T>) -> Decoded<Option<T>> {
        let at = self.at.member(name);
        self.take(name).map(|value| decode(value, &at)).transpose()
    }

    /// Complains about the first member, in the client's order, that was not taken.
    pub fn finish(self) -> Decoded<()> {
        if self.taken.len() == self.object.len() {
            return Ok(());
        }
        match self
            .object
            .keys()
            .find(|key| !self.taken.contains(&key.as_str()))
        {
            Some(name) => Err(self.at.member(name).unexpected()),
            None => Ok(()),
        }
    }

    /// The value stays behind as null, so that the order of the others is kept cheaply.
    fn take(&mut self, name: &'static str) -> Option<Value> {
        let value = self.object.get_mut(name)?;
        self.taken.push(name);
        Some(value.take())
    }
}

/// The arguments of a command that takes none.
pub fn nothing(arguments: Object) -> Decoded<()> {
    Members::open(Value::Object(arguments), &Path::json())?.finish()
}

/// A list.
pub fn list<T>(value: Value, at: &Path<'_>, decode: Decode<T>) -> Decoded<Vec<T>> {
    at.check_depth()?;
    match value {
        Value::Array(values) => values
            .into_iter()
            .enumerate()
            .map(|(index, value)| decode(value, &at.element(index)))
            .collect(),
        _ => Err(at.wrong_type("array")),
    }
}

/// `str`.
pub fn string(value: Value, at: &Path<'_>) -> Decoded<String> {
    match (value, at.syntax()) {
        (Value::String(text), _) => Ok(text),
        (_, Syntax::Json) => Err(at.wrong_type("string")),
        (_, Syntax::Keyval) => Err(at.unexpected_members()),
    }
}

/// A value of an enum, by its name.
pub fn name<T>(value: Value, at: &Path<'_>, find: fn(&str) -> Option<T>) -> Decoded<T> {
    let text = string(value, at)?;
    find(&text).ok_or_else(|| at.unknown_name(&text))
}

/// `bool`.
pub fn boolean(value: Value, at: &Path<'_>) -> Decoded<bool> {
    match at.syntax() {
        Syntax::Json => value.as_bool().ok_or_else(|| at.wrong_type("boolean")),
        Syntax::Keyval => {
            let text = string(value, at)?;
            keyval::boolean(&text).ok_or_else(|| at.wrong_value("'on' or 'off'"))
        }
    }
}

/// `number`.
pub fn number(value: Value, at: &Path<'_>) -> Decoded<f64> {
    let found = match at.syntax() {
        Syntax::Json => value.as_f64(),
        Syntax::Keyval => keyval::number(&string(value, at)?),
    };
    found.ok_or_else(|| at.wrong_type("number"))
}

/// `null`.
pub fn null(value: Value, at: &Path<'_>) -> Decoded<()> {
    if value.is_null() {
        Ok(())
    } else {
        Err(at.wrong_type("null"))
    }
}

/// `any`.
pub fn any(value: Value, _at: &Path<'_>) -> Decoded<Value> {
    Ok(value)
}

/// `QType`.
pub fn qtype(value: Value, at: &Path<'_>) -> Decoded<QType> {
    name(value, at, QType::from_name)
}

/// `int` and `int64`.
pub fn int64(value: Value, at: &Path<'_>) -> Decoded<i64> {
    match at.syntax() {
        Syntax::Json => value.as_i64().ok_or_else(|| at.wrong_type("integer")),
        Syntax::Keyval => {
            let text = string(value, at)?;
            keyval::int64(&text).ok_or_else(|| at.wrong_value("integer"))
        }
    }
}

/// `uint64`. Negative values wrap, as they always have: there are clients that send -1 for "all".
pub fn uint64(value: Value, at: &Path<'_>) -> Decoded<u64> {
    match at.syntax() {
        Syntax::Json => value
            .as_u64()
            .or_else(|| value.as_i64().map(i64::cast_unsigned))
            .ok_or_else(|| at.wrong_value("uint64")),
        Syntax::Keyval => {
            let text = string(value, at)?;
            keyval::uint64(&text).ok_or_else(|| at.wrong_value("integer"))
        }
    }
}

/// `size`: as `uint64`, but on the command line with a suffix (`64M`, `1.5G`).
pub fn size(value: Value, at: &Path<'_>) -> Decoded<u64> {
    match at.syntax() {
        Syntax::Json => uint64(value, at),
        Syntax::Keyval => {
            let text = string(value, at)?;
            keyval::size(&text).ok_or_else(|| at.wrong_value("size"))
        }
    }
}

/// The narrower integers: decoded as the widest of their sign, then checked for range.
macro_rules! narrow {
    ($($(#[$doc:meta])* $name:ident: $wide:ident -> $narrow:ty, $text:literal;)*) => {$(
        $(#[$doc])*
        pub fn $name(value: Value, at: &Path<'_>) -> Decoded<$narrow> {
            <$narrow>::try_from($wide(value, at)?).map_err(|_| at.wrong_value($text))
        }
    )*};
}

narrow! {
    /// `int8`.
    int8: int64 -> i8, "int8_t";
    /// `int16`.
    int16: int64 -> i16, "int16_t";
    /// `int32`.
    int32: int64 -> i32, "int32_t";
    /// `uint8`.
    uint8: uint64 -> u8, "uint8_t";
    /// `uint16`.
    uint16: uint64 -> u16, "uint16_t";
    /// `uint32`.
    uint32: uint64 -> u32, "uint32_t";
}
