//! Generates the wire types from `schema/`. The rim of the generator: all files are read and written here.

use std::env;
use std::path::{Path, PathBuf};
use std::process::exit;

use qapi_gen::diagnostic::{Diagnostic, SourceMap, render};
use qapi_gen::emit::{self, RustOptions};
use qapi_gen::load::Disk;
use qapi_gen::{Options, load_hx, load_schema, output};

/// Relative to this package, which is where build scripts run: so messages are the same everywhere.
const SCHEMA_FOLDER: &str = "../../schema";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // New files count too: one may be the include that was missing.
    println!("cargo::rerun-if-changed={SCHEMA_FOLDER}");
    let folder = Path::new(SCHEMA_FOLDER);
    let loaded = load_schema(&folder.join("qapi-schema.json"), &Disk, &Options::default());
    let mut loaded = match loaded {
        Ok(loaded) => loaded,
        Err(failure) => fail(&failure.diagnostics, &failure.sources),
    };
    if let Err(failure) = load_hx(&folder.join("qmp-commands.hx"), &Disk, &mut loaded) {
        fail(&failure.diagnostics, &failure.sources);
    }
    watch(&loaded.sources);
    for warning in render(&loaded.warnings, &loaded.sources).lines() {
        println!("cargo::warning={warning}");
    }
    let files = match emit::rust(&loaded.schema, &loaded.sources, &RustOptions::default()) {
        Ok(files) => files,
        Err(clashes) => fail(&clashes, &loaded.sources),
    };
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("generated");
    if let Err(err) = output::write(&out_dir, &files) {
        eprintln!("{err}");
        exit(1);
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
