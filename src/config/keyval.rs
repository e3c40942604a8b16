//! `key=value,...` with nested keys: the syntax of `--blockdev`, `--nbd-server`, `--export` and `--monitor`.
//!
//! `a.b=1,a.c=2` is `{"a": {"b": "1", "c": "2"}}`, `x.0=p,x.1=q` is `{"x": ["p", "q"]}`, and `,,` is a comma in a
//! value. Leaves are always strings; the decoder of the option's type reads numbers and booleans out of them.
//! Texts and corner cases are those of qemu-storage-daemon.

use qapi::rt::{Object, Value};

/// How long one part of a key may be, as QEMU has it.
const FRAGMENT_BYTES: usize = 127;

/// Parses a whole option. With an implied key, the first `key=` may be left out.
pub(super) fn parse(text: &str, implied_key: Option<&str>) -> Result<Object, String> {
    let mut object = Object::new();
    let mut rest = text;
    let mut implied_key = implied_key;
    while !rest.is_empty() {
        rest = parse_one(&mut object, rest, implied_key)?;
        implied_key = None;
    }
    object
        .into_iter()
        .map(|(key, value)| Ok((key.clone(), listify(value, &key)?)))
        .collect()
}

/// Parses one `key=value` off the front and answers what is left.
fn parse_one<'a>(
    object: &mut Object,
    text: &'a str,
    implied_key: Option<&str>,
) -> Result<&'a str, String> {
    let key = &text[..text.find(['=', ',']).unwrap_or(text.len())];
    let after_key = &text[key.len()..];
    let is_bare = !after_key.starts_with('=');
    if is_bare && matches!(key, "help" | "?") {
        return Err("Help is not available for this option".to_owned());
    }
    if let (true, false, Some(implied)) = (is_bare, key.is_empty(), implied_key) {
        // Such a value holds no comma, not even a doubled one.
        put(object, &[implied], key.to_owned(), implied)?;
        return Ok(after_key.strip_prefix(',').unwrap_or(after_key));
    }
    let fragments = split_key(key)?;
    let Some(after_equals) = after_key.strip_prefix('=') else {
        return Err(format!("Expected '=' after parameter '{key}'"));
    };
    let (value, rest) = take_value(after_equals);
    put(object, &fragments, value, key)?;
    Ok(rest)
}

/// The parts of a key: names, or after the first also list indexes.
fn split_key(key: &str) -> Result<Vec<&str>, String> {
    let mut fragments = Vec::new();
    let mut rest = key;
    loop {
        let len = match leading_digits(rest) {
            digits if digits > 0 && !fragments.is_empty() => digits,
            _ => leading_name(rest),
        };
        let (fragment, after) = rest.split_at(len);
        if fragment.is_empty() || !(after.is_empty() || after.starts_with('.')) {
            return Err(format!("Invalid parameter '{key}'"));
        }
        if len > FRAGMENT_BYTES {
            let what = if fragments.is_empty() && after.is_empty() {
                "Parameter"
            } else {
                "Parameter fragment"
            };
            return Err(format!("{what} '{fragment}' is too long"));
        }
        fragments.push(fragment);
        match after.strip_prefix('.') {
            Some(next) => rest = next,
            None => return Ok(fragments),
        }
    }
}

fn leading_digits(text: &str) -> usize {
    text.bytes().take_while(u8::is_ascii_digit).count()
}

/// How much of the text is a QAPI name: a letter, then letters, digits, `-` and `_`, after an optional
/// `__domain_` prefix of a downstream extension.
fn leading_name(text: &str) -> usize {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let prefix = match text.strip_prefix("__") {
        Some(domain) => {
            let is_domain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
            let len = domain.bytes().take_while(is_domain).count();
            if !domain[len..].starts_with('_') {
                return 0;
            }
            2 + len + 1
        }
        None => 0,
    };
    let name = &text[prefix..];
    if !name.starts_with(|first: char| first.is_ascii_alphabetic()) {
        return 0;
    }
    prefix + name.bytes().take_while(|&byte| is_inner(byte)).count()
}

/// A value up to the next single comma, and what follows it.
pub(super) fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(',') {
        value.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        match rest.strip_prefix(',') {
            Some(doubled) => {
                value.push(',');
                rest = doubled;
            }
            None => return (value, rest),
        }
    }
    value.push_str(rest);
    (value, "")
}

/// Stores a leaf, making the objects on its way.
fn put(object: &mut Object, path: &[&str], value: String, key: &str) -> Result<(), String> {
    let (fragment, inner) = match path {
        [] => return Ok(()),
        [fragment, inner @ ..] => (*fragment, inner),
    };
    let is_leaf = inner.is_empty();
    let empty = || Value::Object(Object::new());
    let slot = object.entry(fragment).or_insert_with(|| {
        if is_leaf {
            Value::String(String::new())
        } else {
            empty()
        }
    });
    match slot {
        Value::Object(next) if !is_leaf => put(next, inner, value, key),
        Value::String(leaf) if is_leaf => {
            *leaf = value;
            Ok(())
        }
        _ => {
            let rest: usize = inner.iter().map(|fragment| fragment.len() + 1).sum();
            let place = &key[..key.len() - rest];
            Err(format!("Parameters '{place}.*' used inconsistently"))
        }
    }
}

/// Turns objects whose keys are all indexes into lists, from the inside out.
fn listify(value: Value, place: &str) -> Result<Value, String> {
    let Value::Object(object) = value else {
        return Ok(value);
    };
    let is_index = |key: &str| leading_digits(key) == key.len();
    let indexes = object.keys().filter(|key| is_index(key)).count();
    if indexes > 0 && indexes < object.len() {
        return Err(format!("Parameters '{place}.*' used inconsistently"));
    }
    let mut members = Object::new();
    for (key, value) in object {
        let value = listify(value, &format!("{place}.{key}"))?;
        members.insert(key, value);
    }
    if indexes == 0 {
        return Ok(Value::Object(members));
    }
    list(members, place)
}

/// The members in the order of their indexes, which must have no gaps. Of two ways to write one index (`1`, `01`)
/// the last wins.
fn list(members: Object, place: &str) -> Result<Value, String> {
    let mut elements: Vec<Option<Value>> = members.iter().map(|_| None).collect();
    let mut highest = 0;
    for (key, value) in members {
        let index = key.parse::<usize>().unwrap_or(usize::MAX);
        highest = highest.max(index);
        if let Some(element) = elements.get_mut(index) {
            *element = Some(value);
        }
    }
    let mut values = Vec::new();
    for (index, element) in elements
        .into_iter()
        .enumerate()
        .take_while(|(at, _)| *at <= highest)
    {
        match element {
            Some(value) => values.push(value),
            None => return Err(format!("Parameter '{place}.{index}' missing")),
        }
    }
    if values.len() <= highest {
        return Err(format!("Parameter '{place}.{}' missing", values.len()));
    }
    Ok(Value::Array(values))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> String {
        match parse(text, Some("driver")) {
            Ok(object) => Value::Object(object).to_string(),
            Err(message) => message,
        }
    }

    /// Left the option, right what qemu-storage-daemon 10.0.2 makes of it.
    #[test]
    fn options_read_as_in_qemu_storage_daemon() {
        let long = "x".repeat(128);
        let cases: &[(&str, &str)] = &[
            ("", "{}"),
            ("null-co", r#"{"driver":"null-co"}"#),
            ("null-co,", r#"{"driver":"null-co"}"#),
            ("a=1,a=2", r#"{"a":"2"}"#),
            ("a=", r#"{"a":""}"#),
            ("a=x,,y", r#"{"a":"x,y"}"#),
            ("a=,,", r#"{"a":","}"#),
            ("a=b=c", r#"{"a":"b=c"}"#),
            ("a.b=1,a.c.d=2", r#"{"a":{"b":"1","c":{"d":"2"}}}"#),
            ("x.1=q,x.0=p", r#"{"x":["p","q"]}"#),
            ("x.0.a=p,x.1.a=q", r#"{"x":[{"a":"p"},{"a":"q"}]}"#),
            ("x.0=p,x.00=q", r#"{"x":["q"]}"#),
            ("__org.x_y-z=1", r#"{"__org.x_y-z":"1"}"#),
            (
                "a=1,read-zeroes",
                "Expected '=' after parameter 'read-zeroes'",
            ),
            ("a,,b,x", "Invalid parameter ''"),
            ("a=1,=3", "Invalid parameter ''"),
            ("=3", "Invalid parameter ''"),
            (".x=3", "Invalid parameter '.x'"),
            ("x.=3", "Invalid parameter 'x.'"),
            ("x..y=3", "Invalid parameter 'x..y'"),
            ("x-$=3", "Invalid parameter 'x-$'"),
            ("0=3", "Invalid parameter '0'"),
            ("x.0a=3", "Invalid parameter 'x.0a'"),
            ("x.0=3,x.2=4", "Parameter 'x.1' missing"),
            ("x.1=3", "Parameter 'x.0' missing"),
            ("x.99999999999999999999999=3", "Parameter 'x.0' missing"),
            ("x.0=3,x.a=4", "Parameters 'x.*' used inconsistently"),
            (
                "file=1,file.driver=f",
                "Parameters 'file.*' used inconsistently",
            ),
            (
                "file.driver=f,file=1",
                "Parameters 'file.*' used inconsistently",
            ),
            ("a.b=1,a.b.c=2", "Parameters 'a.b.*' used inconsistently"),
            ("help", "Help is not available for this option"),
            ("a=1,help", "Help is not available for this option"),
            (
                &format!("{long}=1"),
                &format!("Parameter '{long}' is too long"),
            ),
            (
                &format!("a.{long}=1"),
                &format!("Parameter fragment '{long}' is too long"),
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(parsed(text), *expected, "{text}");
        }
    }

    #[test]
    fn without_an_implied_key_a_bare_word_is_an_error() {
        assert_eq!(
            parse("unix", None),
            Err("Expected '=' after parameter 'unix'".to_owned())
        );
        assert_eq!(
            parse("unix:x", None),
            Err("Invalid parameter 'unix:x'".to_owned())
        );
    }

    #[test]
    fn any_text_is_answered() {
        let mut random = fastrand::Rng::with_seed(7);
        let alphabet: Vec<char> = "ab0.,=_-é".chars().collect();
        for _ in 0..20_000 {
            let text: String = (0..random.usize(0..12))
                .filter_map(|_| random.choice(&alphabet).copied())
                .collect();
            let _ = parse(&text, random.bool().then_some("driver"));
        }
    }
}
