//! `qblockd check`: its options, which are those of `qemu-img check`.

use block::formats::qcow2::check::Repair;

use super::{ConfigError, describe, text, wrong};

/// An image to be checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckCommand {
    /// The image's file.
    pub file: String,
    /// What is put right.
    pub repair: Option<Repair>,
    /// How the result is printed.
    pub output: Output,
    /// Whether nothing is printed but errors.
    pub quiet: bool,
}

/// How a result is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Output {
    /// Sentences.
    #[default]
    Human,
    /// One JSON object.
    Json,
}

/// Reads the arguments behind `check`; none where help is asked for.
pub(super) fn parse(mut parser: lexopt::Parser) -> Result<Option<CheckCommand>, ConfigError> {
    use lexopt::Arg::{Long, Short, Value};

    let mut file: Option<String> = None;
    let (mut repair, mut output, mut quiet) = (None, Output::default(), false);
    // `--repair leaks` is what qemu-img takes, and `--repair` alone is all.
    let mut may_say_what = false;
    while let Some(argument) = parser.next().map_err(describe)? {
        let was_repair = std::mem::take(&mut may_say_what);
        match argument {
            Short('h') | Long("help") => return Ok(None),
            Short('q') | Long("quiet") => quiet = true,
            Short('r') => repair = Some(what(&text(parser.value().map_err(describe)?)?)?),
            Long("repair") => match parser.optional_value() {
                Some(value) => repair = Some(what(&text(value)?)?),
                None => (repair, may_say_what) = (Some(Repair::All), true),
            },
            Short('f') => match text(parser.value().map_err(describe)?)?.as_str() {
                "qcow2" => {}
                other => return Err(wrong(format!("Image format '{other}' has no checks"))),
            },
            Long("output" | "format") => {
                output = match text(parser.value().map_err(describe)?)?.as_str() {
                    "human" => Output::Human,
                    "json" => Output::Json,
                    _ => return Err(wrong("--output expects 'human' or 'json'")),
                };
            }
            Long(name) => return Err(wrong(format!("unrecognized option '--{name}'"))),
            Short(letter) => return Err(wrong(format!("invalid option -- '{letter}'"))),
            Value(word) => {
                let word = text(word)?;
                match what(&word) {
                    Ok(said) if was_repair => repair = Some(said),
                    _ if file.is_none() => file = Some(word),
                    _ => return Err(wrong("Expecting one image file name")),
                }
            }
        }
    }
    Ok(Some(CheckCommand {
        file: file.ok_or_else(|| wrong("Expecting one image file name"))?,
        repair,
        output,
        quiet,
    }))
}

fn what(word: &str) -> Result<Repair, ConfigError> {
    match word {
        "leaks" => Ok(Repair::Leaks),
        "all" => Ok(Repair::All),
        _ => Err(wrong("--repair (-r) expects 'leaks' or 'all'")),
    }
}
