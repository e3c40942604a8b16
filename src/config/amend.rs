//! `qblockd amend`: its options, which are those of `qemu-img amend` as far as the engine can do what they say.

use block::driver::{AmendOptions, BackingFile, Compat};
use qapi::rt::decode::{Members, boolean, size, string, uint32};
use qapi::rt::{Object, Path, Value};

use super::{ConfigError, Invocation, describe, flat, text, wrong};

/// An image to be changed in what it says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AmendCommand {
    /// The image's file.
    pub file: String,
    /// The file with the guest's data, for images that keep them apart.
    pub data_file: Option<String>,
    /// What is changed but for the size.
    pub options: AmendOptions,
    /// The disk's new size in bytes.
    pub size: Option<u64>,
}

/// What can be changed.
const KEYS: &[&str] = &[
    "backing_file",
    "backing_fmt",
    "compat",
    "data_file_raw",
    "lazy_refcounts",
    "refcount_bits",
    "size",
];

/// What can be said when an image is created, and never again.
const CREATION_ONLY: &[&str] = &[
    "cluster_size",
    "compression_type",
    "encryption",
    "encrypt.format",
    "extended_l2",
    "preallocation",
];

/// Reads the arguments behind `amend`.
pub(super) fn parse(mut parser: lexopt::Parser) -> Result<Invocation, ConfigError> {
    use lexopt::Arg::{Long, Short, Value};

    let (mut file, mut data_file) = (None, None);
    let mut given: Option<Object> = None;
    while let Some(argument) = parser.next().map_err(describe)? {
        match argument {
            Short('h') | Long("help") => return Ok(Invocation::Help),
            // Nothing is printed anyway.
            Short('q' | 'p') | Long("quiet") => {}
            Short('f') => match text(parser.value().map_err(describe)?)?.as_str() {
                "qcow2" => {}
                other => {
                    let what = "does not support option amendment";
                    return Err(wrong(format!("Format driver '{other}' {what}")));
                }
            },
            Short('o') => {
                let list = text(parser.value().map_err(describe)?)?;
                if list == "help" || list == "?" {
                    return Ok(Invocation::AmendHelp);
                }
                if list.is_empty() {
                    return Err(wrong("Invalid option list: "));
                }
                given.get_or_insert_default().extend(options(&list)?);
            }
            Long("data-file") => data_file = Some(text(parser.value().map_err(describe)?)?),
            Long(name) => return Err(wrong(format!("unrecognized option '--{name}'"))),
            Short(letter) => return Err(wrong(format!("invalid option -- '{letter}'"))),
            Value(word) if file.is_none() => file = Some(text(word)?),
            Value(_) => return Err(wrong("Expecting one image file name")),
        }
    }
    let given = given.ok_or_else(|| wrong("Must specify options (-o)"))?;
    let file = file.ok_or_else(|| wrong("Expecting one image file name"))?;
    let (options, size) = decode(given)?;
    Ok(Invocation::Amend(AmendCommand {
        file,
        data_file,
        options,
        size,
    }))
}

fn options(list: &str) -> Result<Object, ConfigError> {
    let known: Vec<&str> = KEYS.iter().chain(CREATION_ONLY).copied().collect();
    let options = flat::parse(list, None, &known).map_err(wrong)?;
    match CREATION_ONLY.iter().find(|key| options.contains_key(**key)) {
        None => Ok(options),
        Some(key) => Err(wrong(format!(
            "Invalid parameter '{key}'\nThis option is only supported for image creation"
        ))),
    }
}

fn decode(given: Object) -> Result<(AmendOptions, Option<u64>), ConfigError> {
    let at = Path::keyval();
    let mut members = Members::open(Value::Object(given), &at).map_err(|e| wrong(e.desc))?;
    let mut text = |key| members.optional(key, string).map_err(|e| wrong(e.desc));
    let compat = text("compat")?.map(|word| compat(&word)).transpose()?;
    let backing = backing(text("backing_file")?, text("backing_fmt")?)?;
    let mut flag = |key| members.optional(key, boolean).map_err(|e| wrong(e.desc));
    let lazy_refcounts = flag("lazy_refcounts")?;
    let data_file_raw = flag("data_file_raw")?;
    let bits = members.optional("refcount_bits", uint32);
    let refcount_bits = bits.map_err(|e| wrong(e.desc))?;
    if refcount_bits.is_some_and(|bits| !bits.is_power_of_two() || bits > 64) {
        return Err(wrong(
            "Refcount width must be a power of two and may not exceed 64 bits",
        ));
    }
    let size = members.optional("size", size).map_err(|_| {
        wrong(
            "Parameter 'size' expects a non-negative number below 2^64\n\
             Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.",
        )
    })?;
    if size.is_some() && backing.is_some() {
        return Err(wrong(
            "The size and the backing file cannot be changed together: what a larger disk shows depends on both",
        ));
    }
    let options = AmendOptions {
        compat,
        lazy_refcounts,
        refcount_bits,
        data_file_raw,
        backing,
    };
    Ok((options, size))
}

fn compat(word: &str) -> Result<Compat, ConfigError> {
    match word {
        "0.10" | "v2" => Ok(Compat::V0_10),
        "1.1" | "v3" => Ok(Compat::V1_1),
        other => Err(wrong(format!("Unknown compatibility level {other}"))),
    }
}

/// An empty name takes the backing file away.
fn backing(
    name: Option<String>,
    format: Option<String>,
) -> Result<Option<BackingFile>, ConfigError> {
    match (name, format) {
        (None, None) => Ok(None),
        (None, Some(_)) => Err(wrong("backing_fmt goes with backing_file")),
        (Some(name), None) if name.is_empty() => Ok(Some(BackingFile::default())),
        (Some(_), None) => Err(wrong(
            "backing_file needs backing_fmt: the format of a backing file is never guessed",
        )),
        (Some(name), format) => Ok(Some(BackingFile {
            name: Some(name),
            format,
        })),
    }
}
