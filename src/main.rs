//! The program: reads the command line and becomes a daemon, or checks or amends an image.

use std::io::{self, Write};
use std::process::ExitCode;

use qblockd::config::{self, Invocation};

fn main() -> ExitCode {
    match config::parse(std::env::args_os().skip(1)) {
        Ok(Invocation::Help) => print(config::USAGE),
        Ok(Invocation::Version) => print(&format!("{}\n", config::version())),
        Ok(Invocation::Run(config)) => qblockd::daemon::run(config),
        Ok(Invocation::Check(command)) => qblockd::offline::check(&command),
        Ok(Invocation::AmendHelp) => print(config::AMEND_OPTIONS),
        Ok(Invocation::Amend(command)) => qblockd::offline::amend(&command),
        Err(error) => {
            // Standard error may be closed; the exit code says it too.
            let _ = writeln!(io::stderr(), "qblockd: {error}");
            ExitCode::FAILURE
        }
    }
}

/// `println!` would panic when the reader is gone, as in `qblockd --help | head -1`.
fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
