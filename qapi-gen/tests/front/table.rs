//! What a correct command table becomes.

use std::path::Path;

use qapi_gen::hx::{Code, HxFile};
use qapi_gen::ir::ExampleLine;
use qapi_gen::load::Disk;
use qapi_gen::{Loaded, Options, load_hx, load_schema};

fn table() -> (HxFile, Loaded) {
    let schema = Path::new("tests/hx/schema.json");
    let mut loaded = load_schema(schema, &Disk, &Options::default()).unwrap();
    let table = load_hx(Path::new("tests/hx/warnings.hx"), &Disk, &mut loaded).unwrap();
    (table, loaded)
}

#[test]
fn entries_have_their_fields() {
    let (table, loaded) = table();
    let names: Vec<&str> = table
        .entries
        .iter()
        .map(|entry| entry.name.text.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "quit",
            "add_fd",
            "set-mode",
            "unknown-here",
            "open-it",
            "raw-it"
        ]
    );
    let entry = table.entry("add_fd").unwrap();
    assert_eq!(
        entry.handler.as_ref().unwrap().text,
        "qmp_marshal_input_add_fd"
    );
    assert_eq!(entry.params.as_deref(), Some("name [size]"));
    assert_eq!(entry.help.as_deref(), Some("add \"it\""));
    assert_eq!(entry.fields[0].0, "user_print");
    assert_eq!(entry.fields[0].1.text, "monitor_user_noop");
    assert_eq!(entry.guard, None);
    let args: Vec<(&str, Code, bool)> = entry
        .args
        .iter()
        .map(|arg| (arg.name.as_str(), arg.code, arg.optional))
        .collect();
    assert_eq!(
        args,
        [
            ("name", Code::String('F'), false),
            ("size", Code::Integer('o'), true)
        ]
    );
    // The second argument stands in the second of two strings.
    let span = entry.args[1].span;
    let text = &loaded.sources.file(span.file).text;
    assert_eq!(&text[span.start..span.end], "size:o?");
    assert_eq!(loaded.sources.line_column(span.file, span.start).0, 40);
    assert!(table.entry("open-it").unwrap().is_open());
}

#[test]
fn conditions_guard_entries() {
    let (table, _) = table();
    let guard = |name: &str| table.entry(name).unwrap().guard.clone();
    assert_eq!(guard("set-mode").as_deref(), Some("defined(CONFIG_MODE)"));
    assert_eq!(
        guard("unknown-here").as_deref(),
        Some("!(defined(CONFIG_MODE))")
    );
    assert_eq!(guard("open-it"), None);
    let flag = &table.entry("set-mode").unwrap().args[1];
    assert_eq!((flag.code, flag.optional), (Code::Flag('f'), true));
}

#[test]
fn documents_are_found_by_title() {
    let (table, _) = table();
    assert_eq!(table.documents[0].title.text, "A Preamble");
    let document = table.document("quit").unwrap();
    assert!(
        document.text.starts_with("Leave.\n\n-> {"),
        "{}",
        document.text
    );
    assert_eq!(document.lines[0], ExampleLine::Prose("Leave.".to_owned()));
    assert_eq!(
        document.lines[1],
        ExampleLine::Sent("{ \"execute\": \"quit\" }".to_owned(), 27)
    );
    assert_eq!(
        document.lines[2],
        ExampleLine::Received("{ \"return\": {} }".to_owned(), 28)
    );
    assert!(table.document("add_fd").is_none());
}
