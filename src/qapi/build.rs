//! Generates the wire types from `schema/`. The rim of the generator: all files are read and written here.

use std::path::{Path, PathBuf};
use std::process::exit;
use std::{env, fs, io};

use qapi_gen::diagnostic::{Diagnostic, SourceMap, render};
use qapi_gen::emit::{self, RustOptions};
use qapi_gen::load::Disk;
use qapi_gen::{Options, load_schema};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let schema_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../schema");
    let top = schema_dir.join("qapi-schema.json");
    let loaded = match load_schema(&top, &Disk, &Options::default()) {
        Ok(loaded) => loaded,
        Err(failure) => fail(&failure.diagnostics, &failure.sources),
    };
    watch(&loaded.sources);
    for warning in render(&loaded.warnings, &loaded.sources).lines() {
        println!("cargo::warning={warning}");
    }
    let files = match emit::rust(&loaded.schema, &loaded.sources, &RustOptions::default()) {
        Ok(files) => files,
        Err(clashes) => fail(&clashes, &loaded.sources),
    };
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("generated");
    for file in files {
        if let Err(err) = write_if_changed(&out_dir.join(&file.path), &file.text) {
            eprintln!("cannot write {}: {err}", file.path);
            exit(1);
        }
    }
}

/// Runs again when a file of the schema changes, also after a failure.
fn watch(sources: &SourceMap) {
    for file in sources.files() {
        println!("cargo::rerun-if-changed={}", file.path);
    }
}

/// Reports as a compiler does, without a backtrace of this program.
fn fail(diagnostics: &[Diagnostic], sources: &SourceMap) -> ! {
    watch(sources);
    eprint!("{}", render(diagnostics, sources));
    exit(1);
}

/// Leaves a file with the same text alone, so that nothing is built again for it.
fn write_if_changed(path: &Path, text: &str) -> io::Result<()> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, text)
}
