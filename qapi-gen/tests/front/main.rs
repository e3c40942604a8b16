//! The front end seen from outside: files in, schema or diagnostics out.
//!
//! A case is a file below `tests/schemas` or `tests/hx`; what it gives is a golden in the
//! repository's `snapshots/`. After a wanted change run the tests with `INSTA_UPDATE=always` and
//! read the difference.

#![allow(
    clippy::unwrap_used,
    reason = "a panic is how a test fails, also in its helpers"
)]

mod command;
mod corpus;
mod goldens;
mod hostile;
mod rules;
mod schema;
mod table;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use qapi_gen::diagnostic::render;
use qapi_gen::load::Reader;
use qapi_gen::{Failure, Loaded, Options, load_schema};

/// Files in memory.
#[derive(Default)]
struct Memory(BTreeMap<PathBuf, String>);

impl Memory {
    fn with(mut self, path: &str, text: &str) -> Memory {
        self.0.insert(PathBuf::from(path), text.to_owned());
        self
    }
}

impl Reader for Memory {
    fn read(&self, path: &Path) -> io::Result<String> {
        let text = self.0.get(path).cloned();
        text.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no such file"))
    }
}

/// Loads a schema of one file.
fn load(text: &str) -> Result<Loaded, Box<Failure>> {
    load_with(text, &Options::default())
}

fn load_with(text: &str, options: &Options) -> Result<Loaded, Box<Failure>> {
    let reader = Memory::default().with("t.json", text);
    load_schema(Path::new("t.json"), &reader, options)
}

/// Everything that was found, as text.
fn rendered(result: &Result<Loaded, Box<Failure>>) -> String {
    match result {
        Ok(loaded) => render(&loaded.warnings, &loaded.sources),
        Err(failure) => failure.render(),
    }
}
