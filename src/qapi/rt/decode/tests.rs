//! Every builtin at its edges, in both syntaxes, and the texts of all complaints.

use serde_json::json;

use super::*;
use crate::rt::path::MAX_NESTING;

/// Decodes the member `x` of JSON arguments.
fn from_json<T>(decode: Decode<T>, value: Value) -> Result<T, String> {
    decode(value, &Path::json().member("x")).map_err(|err| err.desc)
}

/// Decodes `x=text` of the command line.
fn from_keyval<T>(decode: Decode<T>, text: &str) -> Result<T, String> {
    decode(Value::from(text), &Path::keyval().member("x")).map_err(|err| err.desc)
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn wrong_type<T>(expected: &str) -> Result<T, String> {
    Err(format!(
        "Invalid parameter type for 'x', expected: {expected}"
    ))
}

fn wrong_value<T>(expected: &str) -> Result<T, String> {
    Err(format!("Parameter 'x' expects {expected}"))
}

#[test]
fn int64_takes_the_whole_range_and_nothing_else() {
    for good in [i64::MIN, i64::MIN + 1, -1, 0, 1, i64::MAX - 1, i64::MAX] {
        assert_eq!(from_json(int64, json!(good)), Ok(good));
        assert_eq!(from_keyval(int64, &good.to_string()), Ok(good));
    }
    let too_great = [
        "9223372036854775808",
        "-9223372036854775809",
        "18446744073709551616",
    ];
    for bad in too_great {
        assert_eq!(from_json(int64, parse(bad)), wrong_type("integer"), "{bad}");
        assert_eq!(from_keyval(int64, bad), wrong_value("integer"), "{bad}");
    }
    for bad in [
        "1.0", "1e0", "1e3", "\"1\"", "\"1k\"", "null", "true", "[]", "{}",
    ] {
        assert_eq!(from_json(int64, parse(bad)), wrong_type("integer"), "{bad}");
    }
}

#[test]
fn uint64_wraps_negative_values() {
    for good in [0, 1, u64::MAX - 1, u64::MAX, 1 << 63] {
        assert_eq!(from_json(uint64, json!(good)), Ok(good));
        assert_eq!(from_keyval(uint64, &good.to_string()), Ok(good));
    }
    assert_eq!(from_json(uint64, json!(-1)), Ok(u64::MAX));
    assert_eq!(from_json(uint64, json!(i64::MIN)), Ok(1 << 63));
    assert_eq!(from_keyval(uint64, "-1"), Ok(u64::MAX));
    for bad in [
        "18446744073709551616",
        "-9223372036854775809",
        "1.0",
        "1e2",
        "\"1\"",
        "null",
    ] {
        assert_eq!(
            from_json(uint64, parse(bad)),
            wrong_value("uint64"),
            "{bad}"
        );
    }
    assert_eq!(
        from_keyval(uint64, "18446744073709551616"),
        wrong_value("integer")
    );
}

#[test]
fn narrow_integers_end_at_their_limits() {
    fn check<T: PartialEq + std::fmt::Debug + Copy + Into<i64>>(
        decode: Decode<T>,
        limits: [T; 2],
        text: &str,
    ) {
        let [least, greatest] = limits;
        for good in [least, greatest] {
            assert_eq!(from_json(decode, json!(good.into())), Ok(good));
            assert_eq!(from_keyval(decode, &good.into().to_string()), Ok(good));
        }
        for bad in [least.into() - 1, greatest.into() + 1] {
            assert_eq!(from_json(decode, json!(bad)), wrong_value(text), "{bad}");
            assert_eq!(
                from_keyval(decode, &bad.to_string()),
                wrong_value(text),
                "{bad}"
            );
        }
    }
    check(int8, [i8::MIN, i8::MAX], "int8_t");
    check(int16, [i16::MIN, i16::MAX], "int16_t");
    check(int32, [i32::MIN, i32::MAX], "int32_t");
    // Below zero these wrap to far above their limits, and are refused for that.
    check(uint8, [u8::MIN, u8::MAX], "uint8_t");
    check(uint16, [u16::MIN, u16::MAX], "uint16_t");
    check(uint32, [u32::MIN, u32::MAX], "uint32_t");
    assert_eq!(from_json(int8, json!(1.5)), wrong_type("integer"));
    assert_eq!(from_json(uint8, json!(1.5)), wrong_value("uint64"));
}

#[test]
fn keyval_integers_are_written_as_in_c() {
    for (text, value) in [
        ("0x10", 16),
        ("0XfF", 255),
        ("-0x10", -16),
        ("010", 8),
        ("0", 0),
        ("-0", 0),
        ("+10", 10),
        (" 10", 10),
    ] {
        assert_eq!(from_keyval(int64, text), Ok(value), "{text}");
    }
    for bad in [
        "", " ", "10 ", "x", "1M", "1e3", "1.0", "09", "0x", "--1", "+-1", "0x-1", "1_0",
    ] {
        assert_eq!(from_keyval(int64, bad), wrong_value("integer"), "{bad:?}");
    }
}

#[test]
fn sizes_have_suffixes_on_the_command_line_only() {
    assert_eq!(from_json(size, json!("1k")), wrong_value("uint64"));
    assert_eq!(from_json(size, json!(1024)), Ok(1024));
    for (text, value) in [
        ("0", 0),
        ("512", 512),
        ("512b", 512),
        ("1k", 1024),
        ("1K", 1024),
        ("1.5M", 3 << 19),
        (".5G", 1 << 29),
        ("2.G", 2 << 30),
        ("3T", 3 << 40),
        ("1p", 1 << 50),
        ("15.999E", 18_445_591_152_204_944_769),
        ("0x1000", 4096),
        ("010", 10),
        ("18446744073709551615", u64::MAX),
        ("1.00000000000000000000000000001k", 1024),
    ] {
        // A lone fraction needs a digit before the dot.
        let expected = if text.starts_with('.') {
            wrong_value("size")
        } else {
            Ok(value)
        };
        assert_eq!(from_keyval(size, text), expected, "{text}");
    }
    let bad = [
        "", "k", "-1", "1.5", "1.5b", "16E", "1kb", "1 k", "1.5.5k", "0x1k", "1.xk", "k1",
    ];
    for bad in bad {
        assert_eq!(from_keyval(size, bad), wrong_value("size"), "{bad:?}");
    }
}

#[test]
fn booleans_are_words_on_the_command_line() {
    assert_eq!(from_json(boolean, json!(true)), Ok(true));
    for bad in [json!("on"), json!(1), json!(null)] {
        assert_eq!(from_json(boolean, bad), wrong_type("boolean"));
    }
    for (on, off) in [("on", "off"), ("yes", "no"), ("true", "false"), ("y", "n")] {
        assert_eq!(from_keyval(boolean, on), Ok(true));
        assert_eq!(from_keyval(boolean, off), Ok(false));
    }
    for bad in ["", "1", "ON", "maybe"] {
        assert_eq!(from_keyval(boolean, bad), wrong_value("'on' or 'off'"));
    }
}

#[test]
fn numbers_take_integers_and_fractions() {
    for (text, value) in [("1", 1.0), ("-2.5", -2.5), ("1e3", 1000.0), ("-0", -0.0)] {
        assert_eq!(from_json(number, parse(text)), Ok(value));
        assert_eq!(from_keyval(number, text), Ok(value));
    }
    assert_eq!(from_json(number, json!("1")), wrong_type("number"));
    for bad in ["", "inf", "nan", "1e999", "1x"] {
        assert_eq!(from_keyval(number, bad), wrong_type("number"), "{bad:?}");
    }
}

#[test]
fn strings_null_and_any() {
    assert_eq!(from_json(string, json!("a")), Ok("a".to_owned()));
    for bad in [json!(null), json!(1), json!({}), json!([])] {
        assert_eq!(from_json(string, bad), wrong_type("string"));
    }
    assert_eq!(from_json(null, json!(null)), Ok(()));
    for bad in [json!(""), json!(0), json!(false), json!({})] {
        assert_eq!(from_json(null, bad), wrong_type("null"));
    }
    for value in [json!(null), json!(1.5), json!({"a": []})] {
        assert_eq!(from_json(any, value.clone()), Ok(value));
    }
}

#[test]
fn qtype_names_are_closed() {
    for kind in QType::ALL {
        assert_eq!(from_json(qtype, kind.into_value()), Ok(*kind));
    }
    let text = "Parameter 'x' does not accept value 'Qnum'".to_owned();
    assert_eq!(from_json(qtype, json!("Qnum")), Err(text));
    assert_eq!(from_json(qtype, json!(7)), wrong_type("string"));
}

#[test]
fn members_complain_in_schema_order_then_in_client_order() {
    fn point(value: Value, at: &Path<'_>) -> Decoded<(i64, Option<bool>)> {
        let mut members = Members::open(value, at)?;
        let decoded = (
            members.required("a", int64)?,
            members.optional("b", boolean)?,
        );
        members.finish()?;
        Ok(decoded)
    }
    let text = |value| point(value, &Path::json()).map_err(|err| err.desc);
    assert_eq!(text(json!({"a": 1})), Ok((1, None)));
    assert_eq!(text(json!({"b": true, "a": 1})), Ok((1, Some(true))));
    let missing = Err("Parameter 'a' is missing".to_owned());
    assert_eq!(text(json!({"z": 1, "b": 0})), missing);
    let null = Err("Invalid parameter type for 'b', expected: boolean".to_owned());
    assert_eq!(text(json!({"z": 1, "a": 1, "b": null})), null);
    let first = Err("Parameter 'z' is unexpected".to_owned());
    assert_eq!(text(json!({"z": 1, "a": 1, "b": true, "y": 1})), first);
    assert_eq!(text(json!({"a": 1, "z": null})), first);
    let root = Err("Invalid parameter type for '<anonymous>', expected: object".to_owned());
    assert_eq!(text(json!([])), root);
}

#[test]
fn paths_name_every_step() {
    fn device(value: Value, at: &Path<'_>) -> Decoded<String> {
        let mut members = Members::open(value, at)?;
        let device = members.required("device", string)?;
        members.finish()?;
        Ok(device)
    }
    fn devices(value: Value, at: &Path<'_>) -> Decoded<Vec<String>> {
        Members::open(value, at)?.required("actions", |value, at| list(value, at, device))
    }
    let value = || json!({"actions": [{"device": "a"}, {"device": {}}]});
    let text = |path: Path<'_>| devices(value(), &path).map_err(|err| err.desc);
    let json = "Invalid parameter type for 'actions[1].device', expected: string";
    assert_eq!(text(Path::json()), Err(json.to_owned()));
    let keyval = "Parameters 'actions.1.device.*' are unexpected";
    assert_eq!(text(Path::keyval()), Err(keyval.to_owned()));
}

#[test]
fn nesting_is_bounded() {
    fn nested(value: Value, at: &Path<'_>) -> Decoded<usize> {
        let below = Members::open(value, at)?.optional("f", nested)?;
        Ok(below.map_or(0, |depth| depth + 1))
    }
    let deep = |levels: usize| (0..levels).fold(json!({}), |inner, _| json!({ "f": inner }));
    assert_eq!(nested(deep(MAX_NESTING), &Path::json()), Ok(MAX_NESTING));
    let text = nested(deep(MAX_NESTING + 1), &Path::json()).map_err(|err| err.desc);
    assert_eq!(
        text,
        Err("Parameters are nested more than 200 levels deep".to_owned())
    );
}
