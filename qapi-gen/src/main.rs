//! The command: checks schemas and command tables, and writes what is generated from them.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use lexopt::prelude::{Long, Short, Value, ValueExt as _};
use qapi_gen::diagnostic;
use qapi_gen::emit::{self, OutputFile, RustOptions};
use qapi_gen::load::Disk;
use qapi_gen::{Dialect, Failure, Loaded, Options, load_hx, load_schema, output};

const USAGE: &str = "\
usage: qapi-gen check SCHEMA [--hx FILE]   check a schema, and a command table against it
       qapi-gen hx-lint SCHEMA FILE        list where a command table and a schema disagree
       qapi-gen rust SCHEMA -o DIR         write the Rust modules of a schema
       qapi-gen docs SCHEMA -o DIR         write the reference of a schema as Markdown

options:
  --define COND   let COND hold in 'if' conditions (may be repeated)
  --legacy        the schema is in the dialect of 2012 to 2014
  --unused        warn about types that no command and no event leads to
  --help          show this text

Findings go to standard error; the exit status is 1 if there is an error among them.
";

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("qapi-gen: {error}");
            eprint!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

/// The command line.
#[derive(Default)]
struct Arguments {
    words: Vec<PathBuf>,
    table: Option<PathBuf>,
    output: Option<PathBuf>,
    options: Options,
}

fn parse_arguments() -> Result<Option<Arguments>, lexopt::Error> {
    let mut arguments = Arguments::default();
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("help") | Short('h') => return Ok(None),
            Long("hx") => arguments.table = Some(parser.value()?.into()),
            Long("output") | Short('o') => arguments.output = Some(parser.value()?.into()),
            Long("define") => drop(arguments.options.defines.insert(parser.value()?.string()?)),
            Long("legacy") => arguments.options.dialect = Dialect::Legacy,
            Long("unused") => arguments.options.warn_unused = true,
            Value(word) => arguments.words.push(word.into()),
            other => return Err(other.unexpected()),
        }
    }
    Ok(Some(arguments))
}

fn run() -> Result<ExitCode, lexopt::Error> {
    let Some(arguments) = parse_arguments()? else {
        print!("{USAGE}");
        return Ok(ExitCode::SUCCESS);
    };
    let words: Vec<&Path> = arguments.words.iter().map(PathBuf::as_path).collect();
    let outcome = match words.as_slice() {
        [verb, schema] if verb.as_os_str() == "check" => check(schema, &arguments),
        [verb, schema, table] if verb.as_os_str() == "hx-lint" => lint(schema, table, &arguments),
        [verb, schema] if verb.as_os_str() == "rust" => rust(schema, &arguments),
        [verb, schema] if verb.as_os_str() == "docs" => docs(schema, &arguments),
        [] => return Err("which command?".into()),
        [verb, ..] => {
            let known = ["check", "hx-lint", "rust", "docs"]
                .map(Path::new)
                .contains(verb);
            let what = if known {
                "wrong number of arguments for"
            } else {
                "unknown command"
            };
            return Err(format!("{what} '{}'", verb.display()).into());
        }
    };
    Ok(match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Stop::Findings(failure)) => {
            eprint!("{}", failure.render());
            ExitCode::FAILURE
        }
        Err(Stop::Message(message)) => {
            eprintln!("qapi-gen: {message}");
            ExitCode::FAILURE
        }
    })
}

/// Why a verb did not do its work.
enum Stop {
    /// Errors in the sources.
    Findings(Box<Failure>),
    /// Anything else.
    Message(String),
}

impl From<Box<Failure>> for Stop {
    fn from(failure: Box<Failure>) -> Stop {
        Stop::Findings(failure)
    }
}

fn check(schema: &Path, arguments: &Arguments) -> Result<(), Stop> {
    let mut loaded = load_schema(schema, &Disk, &arguments.options)?;
    if let Some(table) = &arguments.table {
        load_hx(table, &Disk, &mut loaded)?;
    }
    print_warnings(&loaded);
    Ok(())
}

fn lint(schema: &Path, table: &Path, arguments: &Arguments) -> Result<(), Stop> {
    let mut loaded = load_schema(schema, &Disk, &arguments.options)?;
    // The schema is not what is asked about.
    loaded.warnings.clear();
    load_hx(table, &Disk, &mut loaded)?;
    print_warnings(&loaded);
    Ok(())
}

fn rust(schema: &Path, arguments: &Arguments) -> Result<(), Stop> {
    let loaded = load_schema(schema, &Disk, &arguments.options)?;
    print_warnings(&loaded);
    let options = RustOptions {
        schema_folder: folder_of(schema),
        ..RustOptions::default()
    };
    let files = emit::rust(&loaded.schema, &loaded.sources, &options).map_err(|diagnostics| {
        Box::new(Failure {
            sources: loaded.sources,
            diagnostics,
        })
    })?;
    write(arguments, &files)
}

fn docs(schema: &Path, arguments: &Arguments) -> Result<(), Stop> {
    let loaded = load_schema(schema, &Disk, &arguments.options)?;
    print_warnings(&loaded);
    write(arguments, &emit::docs(&loaded.schema, &folder_of(schema)))
}

/// The folder of the top file as the output names it: its own name, so that it is the same on every
/// machine.
fn folder_of(schema: &Path) -> String {
    let folder = schema.parent().and_then(Path::file_name);
    folder.map_or_else(
        || ".".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

fn write(arguments: &Arguments, files: &[OutputFile]) -> Result<(), Stop> {
    let Some(folder) = &arguments.output else {
        return Err(Stop::Message("where to? Give a folder with -o".to_owned()));
    };
    output::write(folder, files).map_err(|error| Stop::Message(error.to_string()))
}

fn print_warnings(loaded: &Loaded) {
    eprint!("{}", diagnostic::render(&loaded.warnings, &loaded.sources));
}
