//! `--daemonize`: the parent starts the program again, waits until that one is ready, and ends with its success.
//!
//! A process with threads cannot fork safely, so the child is a fresh one. It talks to its parent over its standard
//! output, which is a pipe: lines for the user, and at last the word that it is ready. Its errors go to the standard
//! error that it inherits. When it is ready, both become /dev/null.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

/// Tells the child what it is.
const CHILD: &str = "QBLOCKD_BACKGROUND_CHILD";

/// The last line of a child that is ready.
const READY: &str = "\u{6}ready";

/// Whether this process is the one that stays.
pub(super) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// What the parent does: all of its life.
pub(super) fn start_child() -> ExitCode {
    match wait_for_child() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("qblockd: --daemonize: {error}");
            ExitCode::FAILURE
        }
    }
}

fn wait_for_child() -> io::Result<ExitCode> {
    let mut arguments = std::env::args_os();
    let name = arguments
        .next()
        .unwrap_or_else(|| OsString::from("qblockd"));
    let mut child = Command::new(std::env::current_exe()?)
        .arg0(name)
        .args(arguments)
        .env(CHILD, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines() {
            let line = line?;
            if line == READY {
                return Ok(ExitCode::SUCCESS);
            }
            println!("{line}");
        }
    }
    // It has said why on standard error.
    child.wait()?;
    Ok(ExitCode::FAILURE)
}

/// What the child does first: nothing that happens to the terminal reaches it any more.
pub(super) fn leave_terminal() {
    if let Err(error) = rustix::process::setsid() {
        log::warn!("--daemonize: setsid: {error}");
    }
}

/// What the child does when all is set up: lets the parent go.
pub(super) fn report_ready() -> io::Result<()> {
    // Where the daemon was started must not stay busy for as long as it runs.
    std::env::set_current_dir("/")?;
    let null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    let mut output = io::stdout();
    writeln!(output, "{READY}")?;
    output.flush()?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}
