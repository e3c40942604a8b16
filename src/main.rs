//! The program: reads the command line and becomes a daemon.

use std::process::ExitCode;

use qblockd::config::{self, Invocation};

fn main() -> ExitCode {
    match config::parse(std::env::args_os().skip(1)) {
        Ok(Invocation::Help) => print!("{}", config::USAGE),
        Ok(Invocation::Version) => println!("{}", config::version()),
        Ok(Invocation::Run(_)) => {}
        Err(error) => {
            eprintln!("qblockd: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
