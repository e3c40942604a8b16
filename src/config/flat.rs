//! QEMU's older option lists, without nesting: the syntax of `--chardev` and `--drive`.
//!
//! A bare word is a flag (`server` is `server=on`, `nowait` is `wait=off`), except the first, which is the value of
//! the option's main key. Leaves are strings for the decoders of `qapi::rt`.

use qapi::rt::{Object, Value};

use super::keyval::take_value;

/// Parses an option of which only the given keys may appear.
pub(super) fn parse(
    text: &str,
    implied_key: Option<&str>,
    allowed: &[&str],
) -> Result<Object, String> {
    let mut object = Object::new();
    let mut rest = text;
    let mut implied_key = implied_key;
    while !rest.is_empty() {
        let key = &rest[..rest.find(['=', ',']).unwrap_or(rest.len())];
        let (key, value) = if let Some(value) = rest[key.len()..].strip_prefix('=') {
            let (value, after) = take_value(value);
            rest = after;
            (key, value)
        } else {
            let (word, after) = take_value(rest);
            rest = after;
            match (implied_key, key.strip_prefix("no")) {
                (Some(implied), _) => (implied, word),
                (None, Some(off)) if allowed.contains(&off) => (off, "off".to_owned()),
                (None, _) => (key, "on".to_owned()),
            }
        };
        if !allowed.contains(&key) {
            return Err(format!("Invalid parameter '{key}'"));
        }
        object.insert(key.to_owned(), Value::String(value));
        implied_key = None;
    }
    Ok(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> String {
        match parse(
            text,
            Some("backend"),
            &["backend", "id", "server", "wait", "path"],
        ) {
            Ok(object) => Value::Object(object).to_string(),
            Err(message) => message,
        }
    }

    #[test]
    fn bare_words_are_flags_and_the_first_is_the_main_key() {
        let cases = [
            ("socket,id=a", r#"{"backend":"socket","id":"a"}"#),
            (
                "socket,path=a,,b,server,nowait",
                r#"{"backend":"socket","path":"a,b","server":"on","wait":"off"}"#,
            ),
            ("id=a,bogus=1", "Invalid parameter 'bogus'"),
            ("id=a,nobogus", "Invalid parameter 'nobogus'"),
            ("id=a,=1", "Invalid parameter ''"),
        ];
        for (text, expected) in cases {
            assert_eq!(parsed(text), expected, "{text}");
        }
    }
}
