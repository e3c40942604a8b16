//! Typed values into values of the wire. Absent members are left out, never sent as null.

use super::{Object, Value};

/// Adds a member that is always there.
pub fn member(object: &mut Object, name: &str, value: Value) {
    object.insert(name.to_owned(), value);
}

/// Adds a member if it is there.
pub fn optional(object: &mut Object, name: &str, value: Option<Value>) {
    if let Some(value) = value {
        object.insert(name.to_owned(), value);
    }
}

/// A list.
pub fn list<T>(values: Vec<T>, encode: fn(T) -> Value) -> Value {
    Value::Array(values.into_iter().map(encode).collect())
}

/// A builtin: string, integer, number or boolean. A number that JSON cannot write becomes null.
pub fn plain<T: Into<Value>>(value: T) -> Value {
    value.into()
}

/// `null`.
pub fn null((): ()) -> Value {
    Value::Null
}

/// `any`.
pub fn any(value: Value) -> Value {
    value
}
