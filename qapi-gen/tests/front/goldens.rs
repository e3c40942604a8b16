//! Wrong inputs and what is said about them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use qapi_gen::diagnostic::render;
use qapi_gen::load::Disk;
use qapi_gen::{Options, load_hx, load_schema};

use crate::rendered;

const SNAPSHOTS: &str = "../../../snapshots";

/// The files with this extension in a folder, by name.
fn cases(folder: &str, extension: &str) -> Vec<(String, PathBuf)> {
    let mut cases: Vec<(String, PathBuf)> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .map(|path| (path.file_stem().unwrap().to_str().unwrap().to_owned(), path))
        .collect();
    cases.sort();
    cases
}

fn golden(prefix: &str, name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(SNAPSHOTS);
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(format!("{prefix}__{name}"), text));
}

/// No golden outlives its case.
fn assert_no_orphans(prefix: &str, cases: &[(String, PathBuf)]) {
    let known: BTreeSet<String> = cases
        .iter()
        .map(|(name, _)| format!("{prefix}__{name}"))
        .collect();
    for (name, _) in crate::goldens::cases("../snapshots", "snap") {
        let ours = name.starts_with(&format!("{prefix}__"));
        assert!(
            !ours || known.contains(&name),
            "no case gives snapshots/{name}.snap"
        );
    }
}

#[test]
fn wrong_schemas() {
    let cases = cases("tests/schemas", "json");
    assert!(cases.len() >= 30, "only {} cases", cases.len());
    let options = Options {
        warn_unused: true,
        ..Options::default()
    };
    for (name, path) in &cases {
        let result = load_schema(path, &Disk, &options);
        assert_eq!(
            result.is_ok(),
            name == "warnings",
            "{name}: {}",
            rendered(&result)
        );
        golden("schema", name, &rendered(&result));
    }
    assert_no_orphans("schema", &cases);
}

#[test]
fn wrong_tables() {
    let cases = cases("tests/hx", "hx");
    assert!(cases.len() >= 10, "only {} cases", cases.len());
    for (name, path) in &cases {
        let schema = Path::new("tests/hx/schema.json");
        let mut loaded = load_schema(schema, &Disk, &Options::default()).unwrap();
        let shown = match load_hx(path, &Disk, &mut loaded) {
            Ok(_) => {
                assert_eq!(name, "warnings");
                render(&loaded.warnings, &loaded.sources)
            }
            Err(mut failure) => {
                assert_ne!(name, "warnings", "{}", failure.render());
                // These tables are about other things.
                failure
                    .diagnostics
                    .retain(|one| !one.message.ends_with("has no document"));
                failure.render()
            }
        };
        golden("hx", name, &shown);
    }
    assert_no_orphans("hx", &cases);
}
