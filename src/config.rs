//! The command line as plain data: qemu-storage-daemon's options, and the short ways `--drive` and `--qmp`.
//!
//! Nothing is opened here. The steps keep their order, and each its text, which begins the message if it fails.

mod amend;
mod chardev;
mod check;
mod drive;
mod flat;
mod keyval;
mod usage;

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use qapi::rt::json::{Decoder, Limits};
use qapi::rt::path::Syntax;
use qapi::rt::{Object, Value};

use crate::listen::Address;

pub use amend::AmendCommand;
pub use chardev::{Chardev, Monitor};
pub use check::{CheckCommand, Output};
pub use drive::{DriveFormat, DriveOptions};
pub use usage::{AMEND_OPTIONS, USAGE, version};

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Invocation {
    /// Print the usage.
    Help,
    /// Print the version.
    Version,
    /// Be a daemon.
    Run(Config),
    /// Check an image, and end.
    Check(CheckCommand),
    /// Print what can be amended.
    AmendHelp,
    /// Amend an image, and end.
    Amend(AmendCommand),
}

/// A daemon to be.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Config {
    /// What to set up, in the order of the command line.
    pub steps: Vec<Step>,
    /// Where the process id is written.
    pub pidfile: Option<PathBuf>,
    /// Where transactions are written down.
    pub state_dir: Option<PathBuf>,
    /// Whether the daemon leaves the terminal.
    pub daemonize: bool,
}

/// One option.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// The option as it was typed, for messages.
    pub text: String,
    /// What to do.
    pub action: Action,
}

/// What an option asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Add a node.
    Blockdev(Arguments),
    /// Add a drive, its image, and, unless the command line has exports of its own, an export.
    Drive(DriveOptions),
    /// Listen, for a later `--monitor`.
    Chardev(Chardev),
    /// Serve QMP on a character device.
    Monitor(Monitor),
    /// Serve QMP on a socket.
    Qmp(Address),
    /// Serve NBD.
    NbdServer(Arguments),
    /// Export a node.
    Export(Arguments),
}

/// The value of an option whose type the schema has, before it is decoded.
#[derive(Debug, Clone, PartialEq)]
pub struct Arguments {
    /// How leaves are written.
    pub syntax: Syntax,
    /// The members.
    pub object: Object,
}

/// A command line that cannot be followed: the line after `qblockd: `.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(pub String);

impl ConfigError {
    /// The error as that of a subcommand.
    fn of(self, command: &str) -> Self {
        ConfigError(format!("{command}: {}", self.0))
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

/// Reads the arguments after the program's name.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Invocation, ConfigError> {
    let mut parser = lexopt::Parser::from_args(arguments);
    let mut config = Config::default();
    let mut is_first = true;
    while let Some(argument) = parser.next().map_err(describe)? {
        let is_first = std::mem::take(&mut is_first);
        let option = match argument {
            lexopt::Arg::Short('h') | lexopt::Arg::Long("help") => return Ok(Invocation::Help),
            lexopt::Arg::Short('V') | lexopt::Arg::Long("version") => {
                return Ok(Invocation::Version);
            }
            lexopt::Arg::Long("daemonize") => {
                config.daemonize = true;
                continue;
            }
            lexopt::Arg::Long(name) if is_known(name) => name.to_owned(),
            lexopt::Arg::Long(name) => {
                return Err(ConfigError(format!("unrecognized option '--{name}'")));
            }
            lexopt::Arg::Short(letter) => {
                return Err(ConfigError(format!("invalid option -- '{letter}'")));
            }
            lexopt::Arg::Value(word) if is_first && word == "check" => {
                let command = check::parse(parser).map_err(|error| error.of("check"))?;
                return Ok(command.map_or(Invocation::Help, Invocation::Check));
            }
            lexopt::Arg::Value(word) if is_first && word == "amend" => {
                return amend::parse(parser).map_err(|error| error.of("amend"));
            }
            lexopt::Arg::Value(word) => {
                let word = word.to_string_lossy();
                return Err(ConfigError(format!("{word}: Unexpected argument")));
            }
        };
        let value = parser.value().map_err(describe)?;
        let Ok(value) = value.into_string() else {
            return Err(ConfigError(format!("--{option}: the value is not UTF-8")));
        };
        match option.as_str() {
            "pidfile" => {
                config.pidfile = Some(value.into());
                continue;
            }
            "state-dir" => {
                config.state_dir = Some(value.into());
                continue;
            }
            _ => {}
        }
        let text = format!("--{option} {value}");
        match action(&option, &value) {
            Ok(action) => config.steps.push(Step { text, action }),
            Err(message) => return Err(ConfigError(format!("{text}: {message}"))),
        }
    }
    Ok(Invocation::Run(config))
}

/// Options with a value.
fn is_known(name: &str) -> bool {
    matches!(
        name,
        "blockdev"
            | "chardev"
            | "drive"
            | "export"
            | "monitor"
            | "nbd-server"
            | "pidfile"
            | "qmp"
            | "state-dir"
    )
}

fn action(option: &str, value: &str) -> Result<Action, String> {
    Ok(match option {
        "blockdev" => Action::Blockdev(arguments(value, Some("driver"))?),
        "drive" => Action::Drive(DriveOptions::parse(value)?),
        "chardev" => Action::Chardev(Chardev::parse(value)?),
        "monitor" => Action::Monitor(Monitor::parse(value)?),
        "qmp" => Action::Qmp(match Address::parse(value) {
            Some(address) => address?,
            None => return Err("expected unix:PATH or tcp:HOST:PORT".to_owned()),
        }),
        "nbd-server" => Action::NbdServer(match Address::parse(value) {
            Some(address) => server_arguments(address?),
            None => arguments(value, None)?,
        }),
        "export" => Action::Export(arguments(value, Some("type"))?),
        // `is_known` and this list are kept in step by a test.
        _ => return Err(format!("unrecognized option '--{option}'")),
    })
}

/// A value in JSON, if it begins as an object does, or in keyval form.
fn arguments(value: &str, implied_key: Option<&str>) -> Result<Arguments, String> {
    if !value.starts_with('{') {
        return Ok(Arguments {
            syntax: Syntax::Keyval,
            object: keyval::parse(value, implied_key)?,
        });
    }
    let mut decoder = Decoder::new(Limits::default());
    let mut input = value.as_bytes();
    let first = decoder.next(&mut input).or_else(|| decoder.finish());
    let second = decoder.next(&mut input).or_else(|| decoder.finish());
    match (first, second) {
        (Some(Ok(Value::Object(object))), None) => Ok(Arguments {
            syntax: Syntax::Json,
            object,
        }),
        (Some(Ok(Value::Object(_))), Some(_)) => Err("Expecting at most one JSON value".to_owned()),
        (Some(Err(error)), _) => Err(error.to_string()),
        (_, _) => Err("Expecting a JSON object".to_owned()),
    }
}

/// What the long form of `--nbd-server` would say.
pub(crate) fn server_arguments(address: Address) -> Arguments {
    let leaf = |text: String| Value::String(text);
    let members: Vec<(&str, Value)> = match address {
        Address::Unix(path) => vec![
            ("type", leaf("unix".to_owned())),
            ("path", leaf(path.to_string_lossy().into_owned())),
        ],
        // The short form has no word for one family.
        Address::Tcp { host, port, .. } => vec![
            ("type", leaf("inet".to_owned())),
            ("host", leaf(host)),
            ("port", leaf(port.to_string())),
        ],
    };
    let addr: Object = members
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
    Arguments {
        syntax: Syntax::Keyval,
        object: Object::from_iter([("addr".to_owned(), Value::Object(addr))]),
    }
}

fn describe(error: lexopt::Error) -> ConfigError {
    ConfigError(match error {
        lexopt::Error::MissingValue {
            option: Some(option),
        } => {
            format!("option '{option}' requires an argument")
        }
        lexopt::Error::UnexpectedValue { option, .. } => {
            format!("option '{option}' doesn't allow an argument")
        }
        other => other.to_string(),
    })
}

/// An argument of a subcommand.
fn text(value: OsString) -> Result<String, ConfigError> {
    value
        .into_string()
        .map_err(|_| wrong("the arguments are not UTF-8"))
}

fn wrong(message: impl Into<String>) -> ConfigError {
    ConfigError(message.into())
}

#[cfg(test)]
mod tests;
