//! Goldens of everything that is generated from one small schema, and what holds for any schema.

mod compile;

use std::io;
use std::path::Path;

use super::*;
use crate::load::{Disk, Reader};
use crate::{Loaded, Options, load_schema};

/// A schema with one of each: read it beside the goldens.
const SMALL: &str = include_str!("tests/small.json");

/// A schema that is one text.
struct Text<'a>(&'a str);

impl Reader for Text<'_> {
    fn read(&self, _path: &Path) -> io::Result<String> {
        Ok(self.0.to_owned())
    }
}

fn load(text: &str) -> Loaded {
    match load_schema(Path::new("small.json"), &Text(text), &Options::default()) {
        Ok(loaded) => loaded,
        Err(failure) => panic!("{}", failure.render()),
    }
}

fn rust_of(text: &str) -> Vec<OutputFile> {
    let loaded = load(text);
    match rust(&loaded.schema, &loaded.sources, &RustOptions::default()) {
        Ok(files) => files,
        Err(clashes) => panic!("{}", crate::diagnostic::render(&clashes, &loaded.sources)),
    }
}

/// The diagnostics of a schema whose names clash in Rust.
fn clashes(text: &str) -> String {
    let loaded = load(text);
    match rust(&loaded.schema, &loaded.sources, &RustOptions::default()) {
        Ok(_) => panic!("no clash"),
        Err(clashes) => crate::diagnostic::render(&clashes, &loaded.sources),
    }
}

/// Compares with `snapshots/emit__<name>.snap`.
fn golden(name: &str, text: &str) {
    insta::with_settings!({
        snapshot_path => "../../../snapshots",
        prepend_module_to_snapshot => false,
        omit_expression => true,
    }, { insta::assert_snapshot!(format!("emit__{name}"), text) });
}

#[test]
fn the_small_schema_becomes_this() {
    for file in rust_of(SMALL) {
        golden(&file.path.replace('.', "_"), &file.text);
    }
}

#[test]
fn the_small_schema_is_documented_like_this() {
    for file in docs(&load(SMALL).schema, "schema") {
        golden(&file.path.replace('.', "_"), &file.text);
    }
}

#[test]
fn the_same_schema_gives_the_same_bytes() {
    assert_eq!(rust_of(SMALL), rust_of(SMALL));
    assert_eq!(
        docs(&load(SMALL).schema, "schema"),
        docs(&load(SMALL).schema, "schema")
    );
}

#[test]
fn an_empty_schema_is_an_empty_module() {
    let files = rust_of("");
    let names: Vec<&str> = files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(names, ["mod.rs", "introspection.rs"]);
    assert!(
        files[0]
            .text
            .contains("pub const COMMAND_NAMES: [&str; 0usize] = [];")
    );
}

#[test]
fn names_that_meet_in_rust_are_reported_with_both_places() {
    // `a1` and `a-1` differ on the wire and in C.
    golden(
        "clash_enum",
        &clashes("{ 'enum': 'Letter', 'data': [ 'a-1', 'a1' ] }\n"),
    );
    let union = "{ 'enum': 'Tag', 'data': [ 'a' ] }
{ 'struct': 'OneBranch', 'data': {} }
{ 'union': 'One', 'base': { 't': 'Tag' }, 'discriminator': 't', 'data': { 'a': 'OneBranch' } }
";
    golden("clash_branch", &clashes(union));
}

#[test]
fn recursion_is_boxed_at_alternates_first() {
    let text = rust_of(
        "{ 'alternate': 'Ref', 'data': { 'definition': 'Node', 'reference': 'str' } }
{ 'struct': 'Node', 'data': { '*file': 'Ref', 'many': [ 'Node' ] } }
{ 'struct': 'Chain', 'data': { '*next': 'Link' } }
{ 'struct': 'Link', 'data': { 'chain': 'Chain' } }
",
    );
    let text = &text[1].text;
    assert!(text.contains("Definition(Box<Node>)"), "{text}");
    assert!(text.contains("pub file: Option<Ref>"), "{text}");
    assert!(text.contains("pub many: Vec<Node>"), "{text}");
    // The walk begins at Chain, and Link closes the circle.
    assert!(text.contains("pub next: Option<Link>"), "{text}");
    assert!(text.contains("pub chain: Box<Chain>"), "{text}");
}

#[test]
fn the_reference_is_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let schema = root.join("schema/qapi-schema.json");
    let loaded = match load_schema(&schema, &Disk, &Options::default()) {
        Ok(loaded) => loaded,
        Err(failure) => panic!("{}", failure.render()),
    };
    let folder = root.join("docs/reference");
    let mut expected: Vec<String> = Vec::new();
    for file in docs(&loaded.schema, "schema") {
        let there = std::fs::read_to_string(folder.join(&file.path)).unwrap_or_default();
        assert!(
            there == file.text,
            "docs/reference/{} is stale: run\n  \
             cargo run -p qapi-gen -- docs schema/qapi-schema.json -o docs/reference",
            file.path
        );
        expected.push(file.path);
    }
    for entry in std::fs::read_dir(folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(
            expected.contains(&name),
            "docs/reference/{name} belongs to no schema file"
        );
    }
}
