//! The reader and the writer against tables of what qemu-storage-daemon answers, and against noise.

use super::*;
use crate::rt::Value;

/// Every message in `bytes`, as its compact text or its error, however the bytes are cut.
fn read(bytes: &[u8]) -> Vec<String> {
    let whole = read_pieces(&[bytes], Limits::default());
    let single: Vec<&[u8]> = bytes.chunks(1).collect();
    assert_eq!(whole, read_pieces(&single, Limits::default()), "{bytes:?}");
    whole
}

fn read_pieces(pieces: &[&[u8]], limits: Limits) -> Vec<String> {
    let mut decoder = Decoder::new(limits);
    let mut messages = Vec::new();
    for piece in pieces {
        let mut rest = *piece;
        while let Some(message) = decoder.next(&mut rest) {
            messages.push(show(message));
        }
        assert!(rest.is_empty());
    }
    while let Some(message) = decoder.finish() {
        messages.push(show(message));
    }
    messages
}

fn show(message: Result<Value, JsonError>) -> String {
    match message {
        Ok(value) => text(&value, Style::Compact),
        Err(error) => error.to_string(),
    }
}

/// A value as the writer prints it; it only takes objects, so scalars are unwrapped again.
fn text(value: &Value, style: Style) -> String {
    let mut object = crate::rt::Object::new();
    object.insert("v".to_owned(), value.clone());
    let mut out = Vec::new();
    write(&mut out, &object, style);
    let out = String::from_utf8(out).unwrap();
    match style {
        Style::Compact => out["{\"v\": ".len()..out.len() - 1].to_owned(),
        Style::Pretty => out,
    }
}

/// Inputs and what they read as; observed with qemu-storage-daemon 10.0.2 unless noted.
fn table(cases: &[(&[u8], &[&str])]) {
    for (input, expected) in cases {
        let expected: Vec<String> = expected
            .iter()
            .map(|line| match line.strip_prefix('!') {
                Some(error) => format!("JSON parse error, {error}"),
                None => (*line).to_owned(),
            })
            .collect();
        assert_eq!(read(input), expected, "{}", String::from_utf8_lossy(input));
    }
}

#[test]
fn values_of_the_dialect() {
    table(&[
        (b"", &[]),
        (b" \t\r\n", &[]),
        (b"{}[]", &["{}", "[]"]),
        (b"{'a': \"b\"}", &[r#"{"a": "b"}"#]),
        (
            br#"{"a":[1,{"b":[]}],"c":{}}"#,
            &[r#"{"a": [1, {"b": []}], "c": {}}"#],
        ),
        (b"true false\nnull", &["true", "false", "null"]),
        (b"1{}2", &["1", "{}", "2"]),
        (
            br#"'it''s'"a"'b'"#,
            &[r#""it""#, r#""s""#, r#""a""#, r#""b""#],
        ),
        (br#"'\'"' "\'\"""#, &[r#""'\"""#, r#""'\"""#]),
        (br#""\b\f\n\r\t\/\\""#, &[r#""\b\f\n\r\t/\\""#]),
        (b"\"\\u0000\xC3\xA9\x7F\"", &[r#""\u0000\u00E9\u007F""#]),
        (b"\"\xC0\x80\"", &[r#""\u0000""#]),
        (
            b"\"\xF0\x9F\x98\x80\\ud83D\\uDE00\"",
            &[r#""\uD83D\uDE00\uD83D\uDE00""#],
        ),
    ]);
}

#[test]
fn numbers() {
    table(&[
        (b"0 -0 -1 42\n", &["0", "0", "-1", "42"]),
        (
            b"9223372036854775807 -9223372036854775808 ",
            &["9223372036854775807", "-9223372036854775808"],
        ),
        (
            b"18446744073709551615 18446744073709551616 ",
            &["18446744073709551615", "1.8446744073709552e+19"],
        ),
        (b"-9223372036854775809 ", &["-9.2233720368547758e+18"]),
        (
            b"[1.0,1e3,0.1,-0.0,1.5e-7]",
            &["[1, 1000, 0.10000000000000001, -0, 1.4999999999999999e-07]"],
        ),
        (
            b"[1e16,1e17,5e-324,0.0001,0.00001]",
            &[
                "[10000000000000000, 1e+17, 4.9406564584124654e-324, 0.0001, 1.0000000000000001e-05]",
            ],
        ),
        (b"[12E+2,1.25e-1]", &["[1200, 0.125]"]),
        (b"01\n", &["!stray '01'"]),
        (b"-a\n", &["!stray '-a'"]),
        (b"1.\n", &["!stray '1.\n'"]),
        (b"1.5e\n", &["!stray '1.5e\n'"]),
        (b"1e+-\n", &["!stray '1e+-'"]),
        (b".5\n+1\n", &["!stray '.'", "!stray '+'"]),
        (b"NaN\n", &["!stray 'N'"]),
        (b"0e1\n", &["0", "!invalid keyword 'e'", "1"]),
        // QEMU answers `inf`, which is not JSON.
        (b"[1e999]", &["!number '1e999' is out of range"]),
    ]);
    let integer = |text: &[u8]| {
        let mut rest = text;
        Decoder::default().next(&mut rest).unwrap().unwrap()
    };
    assert!(integer(b"1 ").is_i64());
    assert!(integer(b"1.0 ").is_f64() && integer(b"1e3 ").is_f64());
}

#[test]
fn strings_that_are_refused() {
    table(&[
        (br#""\q""#, &["!invalid escape sequence in string"]),
        (
            br#""\u12""#,
            &[r#"!\u12" is not a valid Unicode character"#],
        ),
        (
            br#""\uD800\u0041""#,
            &[r"!\uD800 is not a valid Unicode character"],
        ),
        (
            br#""\ud800""#,
            &[r"!\ud800 is not a valid Unicode character"],
        ),
        (
            br#""\udc00\ud800""#,
            &[r"!\udc00 is not a valid Unicode character"],
        ),
        (
            br#""\ufffe""#,
            &[r"!\ufffe is not a valid Unicode character"],
        ),
        (
            br#""\ufdd0""#,
            &[r"!\ufdd0 is not a valid Unicode character"],
        ),
        (
            br#""\ud83f\udfff""#,
            &[r"!\ud83f\udfff is not a valid Unicode character"],
        ),
        (b"\"\xEF\xBF\xBF\"", &["!invalid UTF-8 sequence in string"]),
        (b"\"\xC1\x81\"", &["!invalid UTF-8 sequence in string"]),
        (b"\"\xED\xA0\x80\"", &["!invalid UTF-8 sequence in string"]),
        (b"\"\xC3\"", &["!invalid UTF-8 sequence in string"]),
        (b"\"\x80\"", &["!invalid UTF-8 sequence in string"]),
        (b"\"a\x01\n", &["!stray '\"a\x01'"]),
        (b"\"a\tb\"\n", &["!stray '\"a\t'"]),
        (b"'a\n", &["!stray ''a\n'"]),
    ]);
}

#[test]
fn grammar_errors() {
    table(&[
        (b"{\"a\":1,\"a\":2}", &["!duplicate key"]),
        (b"{'a':1,'\\u0061':2}", &["!duplicate key"]),
        (b"[1 2]", &["!expected separator in list"]),
        (b"{\"a\":1 \"b\":2}", &["!expected separator in dict"]),
        (b"{\"a\" 1}", &["!missing : in object pair"]),
        (b"{1:2}", &["!key is not a string in object"]),
        (b"{[1]:2}", &["!key is not a string in object"]),
        (b"{foo:2}", &["!invalid keyword 'foo'"]),
        (b"{\"a\":}", &["!expecting value"]),
        (b"{\"a\":1,}", &["!expecting value"]),
        (b"[,]", &["!expecting value"]),
        (b"[1,]", &["!expecting value"]),
        (b"}", &["!expecting value"]),
        (b",:", &["!expecting value", "!expecting value"]),
        (b"[{]}", &["!expecting value"]),
        (b"{\"a\":1", &["!premature EOI"]),
        (b"\"abc", &["!stray '\"abc'"]),
        (
            b"foo bar\n",
            &["!invalid keyword 'foo'", "!invalid keyword 'bar'"],
        ),
        (
            b"tru e\nnull\n",
            &["!invalid keyword 'tru'", "!invalid keyword 'e'", "null"],
        ),
    ]);
}

#[test]
fn one_error_and_then_the_next_message_is_read() {
    // QEMU's own list (test_malformed of its qmp-test).
    let broken: &[(&[u8], &str)] = &[
        (b"{]\n", "!expecting value"),
        (b"{\xFF", "!stray '\u{FFFD}'"),
        (b"{\x01", "!stray '\u{1}'"),
        (b"{'bad \xFF", "!stray ''bad \u{FFFD}'"),
        (b"{'execute': 'nonexistent', 'id':'\n", "!stray ''\n'"),
        (b"%p\n", "!stray '%'"),
        (b"\x00", "!stray ''"),
        (
            b"\"\xF0\x9F\x98\x80\xE2\x82\x01\n",
            "!stray '\"\u{1F600}\u{FFFD}\u{1}'",
        ),
    ];
    for (bytes, error) in broken {
        let input = [bytes, &b"{'execute': 'query-version'}"[..]].concat();
        table(&[(&input, &[error, r#"{"execute": "query-version"}"#])]);
    }
}

#[test]
fn errors_repeat_a_bounded_part_of_the_input() {
    let word = vec![b'a'; 5000];
    let expected = format!("JSON parse error, invalid keyword '{}", "a".repeat(1006));
    assert_eq!(read(&word), [expected]);
    let string = [b"\"".as_slice(), &[b'b'; 5000], b"\x01\n"].concat();
    assert_eq!(
        read(&string)[0].len(),
        "JSON parse error, stray ''".len() + 1023
    );
}

#[test]
fn limits_end_the_message() {
    let limits = Limits {
        token_bytes: 100,
        tokens: 10,
        nesting: 3,
    };
    let both = |bytes: &[u8]| {
        let whole = read_pieces(&[bytes], limits);
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(whole, read_pieces(&single, limits));
        whole
    };
    assert_eq!(both(b"[[[]]]"), ["[[[]]]"]);
    assert_eq!(both(b"[[[[ "), ["JSON nesting depth limit exceeded"]);
    assert_eq!(both(b"[1,2,3,4]"), ["[1, 2, 3, 4]"]);
    assert_eq!(both(b"[1,2,3,4,5,"), ["JSON token count limit exceeded"]);
    let fits = format!("\"{}\"", "x".repeat(97));
    assert_eq!(both(fits.as_bytes()), std::slice::from_ref(&fits));
    let long = format!("\"{}\"", "x".repeat(98));
    assert_eq!(both(long.as_bytes()), ["JSON token size limit exceeded"]);
    let split = format!("[\"{}\", \"{}\" ", "x".repeat(50), "x".repeat(50));
    assert_eq!(both(split.as_bytes()), ["JSON token size limit exceeded"]);
    // The rest of a token that is too long is read as new input, as in QEMU: bytes do not hang
    // around until the quote comes.
    let endless = format!("\"{}{{}}", "x".repeat(100));
    assert_eq!(
        both(endless.as_bytes()),
        ["JSON token size limit exceeded", "{}"]
    );
}

#[test]
fn the_limits_of_the_wire_hold() {
    let deep = |depth: usize| [vec![b'['; depth], vec![b']'; depth]].concat();
    let mut input = &deep(1024)[..];
    let value = Decoder::default().next(&mut input).unwrap().unwrap();
    assert_eq!(text(&value, Style::Compact).len(), 2048);
    let mut input = &deep(1025)[..];
    let error = Decoder::default().next(&mut input).unwrap().unwrap_err();
    assert_eq!(error.to_string(), "JSON nesting depth limit exceeded");
}

#[test]
fn pretty_output_is_indented_with_crlf() {
    let mut input = &br#"{"a":[1,{}],"b":{"c":[]}}"#[..];
    let Value::Object(object) = Decoder::default().next(&mut input).unwrap().unwrap() else {
        panic!("not an object");
    };
    let mut out = Vec::new();
    write(&mut out, &object, Style::Pretty);
    let lines = [
        "{",
        "    \"a\": [",
        "        1,",
        "        {",
        "        }",
        "    ],",
        "    \"b\": {",
        "        \"c\": [",
        "        ]",
        "    }",
        "}",
    ];
    assert_eq!(String::from_utf8(out).unwrap(), lines.join("\r\n"));
}

/// A small generator of test bytes; seeded, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % bound as u64).unwrap()
    }
}

#[test]
fn noise_never_panics_and_the_next_message_is_always_read() {
    let seeds: [&[u8]; 5] = [
        br#"{"execute":"blockdev-add","arguments":{"driver":"raw","x":[1,2.5e3,-0]},"id":7}"#,
        b"{'a':'\\u00e9\\ud83d\\ude00','b':[true,false,null]}",
        b"[[[[]]],{},'',0]",
        b"{\"\xC3\xA9\":\"\xF0\x9F\x98\x80\"}",
        b"\x00\x01\xFE\xFF\t\r\n '\"\\%",
    ];
    let mut random = Random(0x5EED_0001);
    for round in 0..20_000 {
        let mut bytes = seeds[random.below(seeds.len())].to_vec();
        for _ in 0..random.below(6) {
            let at = random.below(bytes.len());
            match random.below(4) {
                0 => bytes[at] = u8::try_from(random.below(256)).unwrap(),
                1 => bytes.insert(at, seeds[4][random.below(seeds[4].len())]),
                2 if bytes.len() > 1 => drop(bytes.remove(at)),
                _ => bytes.truncate(at + 1),
            }
        }
        // What a client does to resynchronise: a byte that no token may hold.
        bytes.push(if round % 2 == 0 { 0xFF } else { 0x01 });
        bytes.extend_from_slice(b"\n{'execute':'ok'}");
        let cut = random.below(bytes.len());
        let whole = read_pieces(&[&bytes], Limits::default());
        let pieces = read_pieces(&[&bytes[..cut], &bytes[cut..]], Limits::default());
        assert_eq!(whole, pieces, "round {round}: {bytes:?}");
        assert_eq!(
            whole.last().unwrap(),
            r#"{"execute": "ok"}"#,
            "round {round}: {bytes:?}"
        );
    }
}

#[test]
fn what_is_written_is_read_back() {
    let input = br#"{"s":"\u0001\u00e9\ud83d\ude00'","n":[0.1,-1.5e-9,1e300,18446744073709551615,-5],"o":{"":[null,true]}}"#;
    let first = read(input);
    assert_eq!(read(first[0].as_bytes()), first);
}
