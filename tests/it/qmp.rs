//! Golden transcripts: every command in a good case and in each of its errors.

use super::harness::{self, Program};
use super::session::{self, Exchange};

fn transcript(name: &str) {
    let Some(()) = harness::need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let exchanges = session::run(Program::Qblockd, &session::read(name));
    golden(&format!("qmp__{name}"), &exchanges);
}

/// Compares with the file of this name in `snapshots`.
pub(crate) fn golden(file: &str, exchanges: &[Exchange]) {
    let mut settings = insta::Settings::new();
    settings.set_snapshot_path("../../snapshots");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(file, session::transcript(exchanges)));
}

#[test]
fn session() {
    transcript("session");
}

#[test]
fn nodes() {
    transcript("nodes");
}

#[test]
fn graph() {
    transcript("graph");
}

#[test]
fn reopen() {
    transcript("reopen");
}

#[test]
fn drives() {
    transcript("drives");
}

#[test]
fn errors() {
    transcript("errors");
}

#[test]
fn blockstats() {
    transcript("blockstats");
}

#[test]
fn stats() {
    transcript("stats");
}

#[test]
fn resize() {
    transcript("resize");
}

#[test]
fn snapshots() {
    transcript("snapshots");
}

#[test]
fn transactions() {
    transcript("transactions");
}

#[test]
fn external() {
    transcript("external");
}

#[test]
fn dry_run() {
    transcript("dry-run");
}

#[test]
fn revert() {
    let Some(()) = harness::need(&["nbdinfo"]) else {
        return;
    };
    transcript("revert");
}

#[test]
fn views() {
    let Some(()) = harness::need(&["nbdinfo"]) else {
        return;
    };
    transcript("views");
}

#[test]
fn exports() {
    transcript("exports");
}

#[test]
fn corrupt() {
    transcript("corrupt");
}

#[test]
fn options() {
    transcript("options");
}

#[test]
fn data_file() {
    transcript("data-file");
}

#[test]
fn backup() {
    transcript("backup");
}

#[test]
fn backup_refusals() {
    transcript("backup-refusals");
}

#[test]
fn job_verbs() {
    transcript("job-verbs");
}

#[test]
fn job_groups() {
    transcript("job-groups");
}

#[test]
fn create_jobs() {
    transcript("create-jobs");
}

#[test]
fn drive_backup() {
    transcript("drive-backup");
}

#[test]
fn drive_commands() {
    transcript("drive-commands");
}

#[test]
fn job_errors() {
    transcript("job-errors");
}

#[test]
fn jobs_here() {
    transcript("jobs-here");
}
