//! Commands on an image that is not in use, without a daemon. The image is locked as QEMU's programs lock it, so one that a daemon
//! serves is refused.

mod amend;
mod check;

use std::io::{self, Write as _};
use std::process::ExitCode;

use block::error::Error;

use crate::config::{AmendCommand, CheckCommand};

/// `qblockd check`: checks the image, prints what is found, and says it in the exit code.
pub fn check(command: &CheckCommand) -> ExitCode {
    run(check::check_file(command))
}

/// `qblockd amend`: amends the image, and says in the exit code whether that was done.
pub fn amend(command: &AmendCommand) -> ExitCode {
    run(amend::amend_file(command))
}

fn run(work: impl Future<Output = Result<ExitCode, Error>>) -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let done = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("cannot start", &error))
        .and_then(|runtime| runtime.block_on(work));
    done.unwrap_or_else(|error| {
        complain(&error.to_string());
        ExitCode::FAILURE
    })
}

/// Who does not listen has the exit code.
fn complain(message: &str) {
    let _ = writeln!(io::stderr(), "qblockd: {message}");
}
