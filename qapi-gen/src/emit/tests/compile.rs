//! Generated code through the compiler: that it is sound, and that a gap between schema and
//! handlers is an error that names it.
//!
//! Each case is a crate of its own below the target folder, checked by the cargo that runs the
//! tests. It shares the target folder, where everything that it depends on is checked already, and
//! keeps its place, so that a second run finds the first one's work.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{SMALL, Text};
use crate::emit::{OutputFile, RustOptions, rust};
use crate::load::{Disk, Reader};
use crate::{Options, load_schema};

/// Handlers of everything in the small schema. Arguments are taken apart without `..`, as handlers
/// should.
const HANDLERS: &str = r#"
pub struct Handlers;

impl handlers::Small<()> for Handlers {
    async fn paint_it(_: &(), args: types::Paint) -> Result<(), QmpError> {
        let types::Paint { members: _, colour: _ } = args;
        Ok(())
    }
    async fn query_shapes(
        _: &(),
        args: commands::QueryShapes,
    ) -> Result<Vec<types::Shape>, QmpError> {
        let commands::QueryShapes { near: _, r#in: _ } = args;
        Ok(Vec::new())
    }
    fn stop_now(_: &()) -> Result<(), QmpError> {
        Ok(())
    }
    async fn raw_it(_: &(), _: qapi::rt::Object) -> Result<(), QmpError> {
        Ok(())
    }
}

pub static COMMANDS: &[qapi::rt::dispatch::Entry<()>] = generated::commands::<(), Handlers>();
"#;

const HEAD: &str = "#![deny(warnings, missing_docs)]
//! A test.
#[allow(clippy::all)]
mod generated;
pub use generated::*;
";

/// What the compiler says of a schema and handlers for it; nothing if it is content.
fn compile(
    case: &str,
    top: &Path,
    reader: &dyn Reader,
    options: &Options,
    handlers: &str,
) -> String {
    let loaded = match load_schema(top, reader, options) {
        Ok(loaded) => loaded,
        Err(failure) => panic!("{}", failure.render()),
    };
    let runtime = RustOptions {
        runtime: "qapi::rt".to_owned(),
        ..RustOptions::default()
    };
    match rust(&loaded.schema, &loaded.sources, &runtime) {
        Ok(files) => check_crate(case, &files, handlers),
        Err(clashes) => panic!("{}", crate::diagnostic::render(&clashes, &loaded.sources)),
    }
}

fn check_crate(case: &str, files: &[OutputFile], handlers: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = target_folder(&root);
    let folder = target.join("fixtures").join(case);
    let source = folder.join("src/generated");
    std::fs::create_dir_all(&source).unwrap();
    for file in files {
        std::fs::write(source.join(&file.path), &file.text).unwrap();
    }
    let code = if handlers.is_empty() {
        HEAD.to_owned()
    } else {
        format!(
            "{HEAD}#[allow(missing_docs)]\nmod fixture {{ use super::*; use qapi::rt::QmpError; {handlers} }}\npub use fixture::COMMANDS;\n"
        )
    };
    std::fs::write(folder.join("src/lib.rs"), code).unwrap();
    // The name is the case's own: cargo tells packages apart by it, not by their absolute paths.
    let manifest = format!(
        "[package]\nname = \"fixture-{case}\"\nversion = \"0.0.0\"\nedition = \"2024\"\n[workspace]\n\
         [dependencies]\nqapi = {{ path = '{}' }}\n\
         [profile.dev]\ndebug = \"line-tables-only\"\n",
        root.join("src/qapi").display()
    );
    std::fs::write(folder.join("Cargo.toml"), manifest).unwrap();
    // The same versions as here, so that nothing is looked up or built twice.
    std::fs::copy(root.join("Cargo.lock"), folder.join("Cargo.lock")).unwrap();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["check", "--quiet", "--offline"])
        .current_dir(&folder)
        .env("CARGO_TARGET_DIR", &target)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.success(), text.is_empty(), "{text}");
    text
}

/// The target folder of the running test: `<target>/debug/deps/<test>`.
fn target_folder(root: &Path) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.ancestors()
        .nth(3)
        .map_or_else(|| root.join("target"), Path::to_owned)
}

fn compile_small(case: &str, schema: &str, handlers: &str) -> String {
    compile(
        case,
        Path::new("small.json"),
        &Text(schema),
        &Options::default(),
        handlers,
    )
}

#[test]
fn a_gap_between_schema_and_handlers_does_not_compile() {
    assert_eq!(compile_small("complete", SMALL, HANDLERS), "");

    let start = HANDLERS.find("    async fn raw_it").unwrap();
    let end = HANDLERS.find("}\n\npub static").unwrap();
    let without = format!("{}{}", &HANDLERS[..start], &HANDLERS[end..]);
    let text = compile_small("no-handler", SMALL, &without);
    assert!(text.contains("error[E0046]"), "{text}");
    assert!(
        text.contains("missing `raw_it` in implementation"),
        "{text}"
    );

    let wider = SMALL
        .replace(
            "'near': 'ShapeOrNull', '*in'",
            "'near': 'ShapeOrNull', 'far': 'int', '*in'",
        )
        .replace("# @in: a keyword", "# @far: new\n#\n# @in: a keyword");
    let text = compile_small("new-argument", &wider, HANDLERS);
    assert!(text.contains("error[E0027]"), "{text}");
    assert!(text.contains("does not mention field `far`"), "{text}");
}

/// The schema of QEMU 9.2 is no part of this project; where it is at hand, all of it must pass.
#[test]
fn the_whole_schema_of_qemu_compiles() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = root.join("../shared/corpus/qapi/qemu-9.2/qapi");
    if !folder.exists() {
        eprintln!("skipped: the schema of QEMU is not here");
        return;
    }
    // Everything that is conditional is there.
    let options = Options {
        defines: conditions(&folder),
        ..Options::default()
    };
    assert_eq!(
        compile(
            "qemu",
            &folder.join("qapi-schema.json"),
            &Disk,
            &options,
            ""
        ),
        ""
    );
}

/// All names that look like conditions.
fn conditions(folder: &Path) -> std::collections::BTreeSet<String> {
    let mut found = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let prefixes = ["CONFIG_", "HAVE_", "TARGET_"];
        let wanted = words.filter(|word| prefixes.iter().any(|prefix| word.starts_with(prefix)));
        found.extend(wanted.map(str::to_owned));
    }
    found
}
