//! Each case is a text and the messages it gives, with line and column.

use super::*;
use crate::diagnostic::SourceMap;

fn messages(text: &str) -> Vec<String> {
    let mut sources = SourceMap::default();
    let file = sources.add("t.json", text);
    let mut sink = Sink::default();
    parse(file, text, &mut sink);
    sink.finish()
        .iter()
        .map(|one| {
            let (line, column) = sources.line_column(file, one.span.start);
            format!("{line}:{column} {}", one.message)
        })
        .collect()
}

#[test]
fn wording_of_syntax_errors() {
    let cases = [
        ("{ 'a': 'b' }\n# end", ""),
        ("", ""),
        ("{", "1:2 expected string or '}' before the end"),
        ("{ 'a' 'b' }", "1:7 expected ':'"),
        ("{ 'a': 'b' 'c' }", "1:12 expected ',' or '}'"),
        ("{ 'a': ['b' 'c'] }", "1:13 expected ',' or ']'"),
        (
            "{ 'a': ['b', ] }",
            "1:14 expected '{', '[', string, or boolean",
        ),
        (
            "{ 'a': [, 'b'] }",
            "1:9 expected '{', '[', ']', string, or boolean",
        ),
        (
            "{ 'a': , 'b': 'c' }",
            "1:8 expected '{', '[', string, or boolean",
        ),
        ("{ 'a': 'b', }", "1:13 expected string"),
        ("{ , 'a': 'b' }", "1:3 expected string or '}'"),
        ("{ 'a': 'b' ", "1:11 expected ',' or '}' before the end"),
        ("[ 'a' ]", "1:1 top-level expression must be an object"),
        ("{}\n'a'", "2:1 top-level expression must be an object"),
        ("{ 'a': ; }", "1:8 stray ';'"),
        ("{ 'a': trueish }", "1:8 stray 'trueish'"),
        ("{ 'a': 'b\n' }", "1:8 missing terminating \"'\""),
        ("{ 'a\\u': 'b' }", "1:5 unknown escape \\u"),
        (
            "{ 'a': 'b\u{7f}' }",
            "1:10 funny character in string: only printable ASCII is allowed",
        ),
        ("{ 'a': 'b', 'a': 'c' }", "1:13 duplicate key 'a'"),
        (
            "{ 'a':\n  ## b\n}",
            "2:3 documentation comment inside an expression",
        ),
        ("\u{feff}{}", "1:1 byte order mark at the start of the file"),
    ];
    for (text, expected) in cases {
        assert_eq!(messages(text).join("; "), expected, "for {text:?}");
    }
}

#[test]
fn reading_goes_on_behind_an_error() {
    let found = messages("{ 'a': [ 'b' }\n\n{ 'c': 'd' }\n{ 'e' }\n");
    assert_eq!(found, ["1:14 expected ',' or ']'", "4:7 expected ':'"]);
}

#[test]
fn nesting_is_limited() {
    let deep = |levels: usize| format!("{{ 'a': {}{} }}", "[".repeat(levels), "]".repeat(levels));
    assert_eq!(messages(&deep(MAX_NESTING - 1)), Vec::<String>::new());
    let found = messages(&deep(100_000));
    assert_eq!(found, ["1:71 nested deeper than 64 levels"]);
    assert_eq!(messages(&"{'a':\n[".repeat(50_000)).len(), 1);
}
