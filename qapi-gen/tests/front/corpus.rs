//! Whole schemas and tables: our own, and QEMU's where they lie beside the checkout.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use qapi_gen::diagnostic::{Sink, SourceMap};
use qapi_gen::hx;
use qapi_gen::ir::{DocBlock, ExampleLine, Kind, ModuleItem, Schema};
use qapi_gen::load::Disk;
use qapi_gen::{Dialect, Options, load_hx, load_schema};

/// A file of QEMU's, which are not part of the project. Says so when it is not there.
fn upstream(path: &str) -> Option<PathBuf> {
    let full = Path::new("../../shared/corpus/qapi").join(path);
    let found = full.exists();
    if !found {
        eprintln!("skipped: {} is not there", full.display());
    }
    found.then_some(full)
}

fn count(schema: &Schema) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for definition in &schema.definitions {
        let word = match definition.kind {
            Kind::Enum(_) => "enum",
            Kind::Struct(_) => "struct",
            Kind::Union(_) => "union",
            Kind::Alternate(_) => "alternate",
            Kind::Command(_) => "command",
            Kind::Event(_) => "event",
        };
        *counts.entry(word).or_insert(0) += 1;
    }
    counts
}

#[test]
fn our_schema_and_table_agree() {
    let top = Path::new("../schema/qapi-schema.json");
    let mut loaded = load_schema(top, &Disk, &Options::default()).unwrap_or_else(|failure| {
        panic!("{}", failure.render());
    });
    assert_eq!(loaded.warnings, []);
    let table = load_hx(Path::new("../schema/qmp-commands.hx"), &Disk, &mut loaded)
        .unwrap_or_else(|failure| panic!("{}", failure.render()));
    assert_eq!(loaded.warnings, []);
    assert_eq!(table.entries.len(), count(&loaded.schema)["command"]);
}

/// Every identifier that looks like one of a condition, in the texts themselves.
fn all_conditions(sources: &SourceMap) -> BTreeSet<String> {
    let word = |c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_');
    sources
        .files()
        .iter()
        .flat_map(|file| file.text.split(word))
        .filter(|name| {
            ["CONFIG_", "TARGET_", "HAVE_"]
                .iter()
                .any(|start| name.starts_with(start))
        })
        .map(str::to_owned)
        .collect()
}

#[test]
fn qemu_9_2_is_accepted() {
    let Some(top) = upstream("qemu-9.2/qapi/qapi-schema.json") else {
        return;
    };
    let bare = load_schema(&top, &Disk, &Options::default())
        .unwrap_or_else(|failure| panic!("{}", failure.render()));
    assert_eq!(bare.sources.files().len(), 42);
    assert_eq!(bare.schema.modules.len(), 42);

    let defines = all_conditions(&bare.sources);
    let full = load_schema(
        &top,
        &Disk,
        &Options {
            defines,
            ..Options::default()
        },
    )
    .unwrap();
    let expected = [
        ("alternate", 6),
        ("command", 239),
        ("enum", 179),
        ("event", 54),
        ("struct", 461),
        ("union", 43),
    ];
    assert_eq!(count(&full.schema), BTreeMap::from(expected));
}

/// All example messages of a schema: how many there are, and how many are valid JSON.
fn examples(schema: &Schema) -> (usize, usize) {
    let mut blocks: Vec<&DocBlock> = Vec::new();
    for definition in &schema.definitions {
        blocks.extend(&definition.doc.body);
        blocks.extend(&definition.doc.returns);
        blocks.extend(&definition.doc.errors);
    }
    for item in schema.modules.iter().flat_map(|module| &module.items) {
        if let ModuleItem::Text(text) = item {
            blocks.extend(text);
        }
    }
    let (mut all, mut valid) = (0, 0);
    for block in blocks {
        if let DocBlock::Example(example) = block {
            count_messages(&example.lines, &mut all, &mut valid);
        }
    }
    (all, valid)
}

fn count_messages(lines: &[ExampleLine], all: &mut usize, valid: &mut usize) {
    for line in lines {
        if let ExampleLine::Sent(text, _) | ExampleLine::Received(text, _) = line {
            *all += 1;
            *valid += usize::from(serde_json::from_str::<serde_json::Value>(text).is_ok());
        }
    }
}

#[test]
fn the_examples_of_qemu_9_2_are_found_whole() {
    let Some(top) = upstream("qemu-9.2/qapi/qapi-schema.json") else {
        return;
    };
    let bare = load_schema(&top, &Disk, &Options::default()).unwrap();
    let defines = all_conditions(&bare.sources);
    let loaded = load_schema(
        &top,
        &Disk,
        &Options {
            defines,
            ..Options::default()
        },
    )
    .unwrap();
    let (all, valid) = examples(&loaded.schema);
    // All but eight, which are broken in the file.
    assert_eq!(all - valid, 8, "of {all}");
    assert!(all > 480, "only {all} messages");
}

#[test]
fn the_table_of_qemu_2_0_is_read_whole() {
    let (Some(path), Some(top)) = (
        upstream("qemu-2.0/qmp-commands.hx"),
        upstream("qemu-9.2/qapi/qapi-schema.json"),
    ) else {
        return;
    };
    let text = std::fs::read_to_string(&path).unwrap();
    let mut sources = SourceMap::default();
    let file = sources.add("qmp-commands.hx", text);
    let mut sink = Sink::default();
    let table = hx::parse(file, &sources, &mut sink);
    assert_eq!(sink.finish(), []);
    assert_eq!(table.entries.len(), 105);
    assert_eq!(table.documents.len(), 87);
    let documented = |entry: &&hx::Entry| table.document(&entry.name.text).is_some();
    assert_eq!(table.entries.iter().filter(documented).count(), 85);
    assert_eq!(
        table.entries.iter().filter(|entry| entry.is_open()).count(),
        4
    );
    let spice = table.entry("query-spice").unwrap();
    assert_eq!(spice.guard.as_deref(), Some("defined(CONFIG_SPICE)"));
    let mirror = table.entry("drive-mirror").unwrap();
    assert_eq!(mirror.args.len(), 10);
    let (mut all, mut valid) = (0, 0);
    // The first document is the preamble, which explains the arrows.
    for document in &table.documents[1..] {
        count_messages(&document.lines, &mut all, &mut valid);
    }
    assert_eq!((all, valid), (189, 182));

    // Against the schema of ten years later there is much to say, and nothing to panic about.
    let mut loaded = load_schema(&top, &Disk, &Options::default()).unwrap();
    let failure = load_hx(&path, &Disk, &mut loaded).unwrap_err();
    assert!(
        failure
            .render()
            .contains("command 'blockdev-del' has no entry in the table")
    );
}

#[test]
fn the_drift_of_qemu_2_0_is_found() {
    let (Some(top), Some(path)) = (
        upstream("qemu-2.0/qapi-schema.json"),
        upstream("qemu-2.0/qmp-commands.hx"),
    ) else {
        return;
    };
    let options = Options {
        dialect: Dialect::Legacy,
        ..Options::default()
    };
    let mut loaded =
        load_schema(&top, &Disk, &options).unwrap_or_else(|failure| panic!("{}", failure.render()));
    assert_eq!(loaded.warnings, []);
    // Eight simple unions, one flat one, and an anonymous one, which is an alternate now.
    assert_eq!(count(&loaded.schema)["command"], 102);
    assert_eq!(count(&loaded.schema)["union"], 9);
    assert_eq!(count(&loaded.schema)["alternate"], 1);

    let failure = load_hx(&path, &Disk, &mut loaded).unwrap_err();
    let (documents, found): (Vec<&str>, Vec<&str>) = failure
        .diagnostics
        .iter()
        .map(|one| one.message.as_str())
        .partition(|message| message.starts_with("example") || message.ends_with("no document"));
    let start = |text: &str| documents.iter().filter(|one| one.starts_with(text)).count();
    assert_eq!(start("command"), 20);
    assert_eq!(start("example is not valid JSON"), 7);
    // One request that lacks an argument, four answers to query-migrate, and more of that kind.
    assert!(start("example does not fit") >= 5, "{documents:#?}");
    let expected = [
        "arguments of 'eject' are in another order than in the schema",
        "command 'device_add' is not in the schema",
        "argument 'keys' is mandatory, but 'O' does not demand it",
        "argument 'cpu-index' of 'memsave' is not in 'args_type'",
        "argument 'cpu' of 'memsave' is not in the schema",
        "arguments of 'migrate' are in another order than in the schema",
        "command 'client_migrate_info' is not in the schema",
        "argument 'length' of 'dump-guest-memory' is not in 'args_type'",
        "argument 'end' of 'dump-guest-memory' is not in the schema",
        "argument 'netdev' of 'netdev_add' is not in the schema",
        "arguments of 'drive-backup' are in another order than in the schema",
        "arguments of 'drive-mirror' are in another order than in the schema",
        "command 'qmp_capabilities' is not in the schema",
        "argument 'capabilities' is mandatory, but 'O' does not demand it",
    ];
    assert_eq!(found, expected);
}
