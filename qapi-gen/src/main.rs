//! The command: checks schemas and .hx files.

use std::path::Path;
use std::process::ExitCode;

use qapi_gen::load::Disk;
use qapi_gen::{Options, load_schema};

fn main() -> ExitCode {
    let top = std::env::args().nth(2).unwrap_or_default();
    match load_schema(Path::new(&top), &Disk, &Options::default()) {
        Ok(loaded) => {
            eprint!(
                "{}",
                qapi_gen::diagnostic::render(&loaded.warnings, &loaded.sources)
            );
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprint!("{}", failure.render());
            ExitCode::FAILURE
        }
    }
}
