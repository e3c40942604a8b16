//! The session in the README, run line by line.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use super::harness;

/// A command and what it prints.
struct Step {
    command: String,
    output: String,
}

fn session() -> Vec<Step> {
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let (_, after) = page.split_once("<!-- session -->").unwrap();
    let (session, _) = after.split_once("<!-- end -->").unwrap();
    let mut steps: Vec<Step> = Vec::new();
    let pieces = session.split("```console\n").skip(1);
    let pieces = pieces.map(|piece| piece.split_once("```").unwrap().0);
    for line in pieces.flat_map(str::lines) {
        if let Some(command) = line.strip_prefix("$ ") {
            steps.push(Step {
                command: command.to_owned(),
                output: String::new(),
            });
            continue;
        }
        let step = steps.last_mut().unwrap();
        match line.strip_prefix("> ") {
            Some(more) => step.command.push_str(&format!("\n{more}")),
            None => step.output.push_str(&format!("{line}\n")),
        }
    }
    steps
}

#[test]
fn readme() {
    let Some(()) = harness::need(&["nc", "qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let programs = tempfile::tempdir().unwrap();
    symlink(
        env!("CARGO_BIN_EXE_qblockd"),
        programs.path().join("qblockd"),
    )
    .unwrap();
    let path = format!(
        "{}:{}",
        programs.path().display(),
        std::env::var("PATH").unwrap()
    );
    let steps = session();
    assert!(steps.len() > 5);
    // If a line fails the daemon must not outlive the test.
    let _ended = EndByPidFile(folder.path());
    for Step { command, output } in steps {
        let ran = Command::new("timeout")
            .args(["20", "sh", "-c", &command])
            .current_dir(folder.path())
            .env("PATH", &path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ran.stdout);
        assert_eq!(said.replace('\r', ""), output, "{command}: {ran:?}");
    }
}

/// Ends the daemon that a pid file names, if it is still there.
struct EndByPidFile<'a>(&'a Path);

impl Drop for EndByPidFile<'_> {
    fn drop(&mut self) {
        if let Ok(pid) = fs::read_to_string(self.0.join("qblockd.pid")) {
            let _ = Command::new("kill").arg(pid.trim()).status();
        }
    }
}
