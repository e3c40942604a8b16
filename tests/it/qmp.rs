//! Golden transcripts: every command in a good case and in each of its errors.

use super::harness::{self, Program};
use super::session;

fn golden(name: &str) {
    let Some(()) = harness::need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let exchanges = session::run(Program::Qblockd, &session::read(name));
    let mut settings = insta::Settings::new();
    settings.set_snapshot_path("../../snapshots");
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings
        .bind(|| insta::assert_snapshot!(format!("qmp__{name}"), session::transcript(&exchanges)));
}

#[test]
fn session() {
    golden("session");
}

#[test]
fn nodes() {
    golden("nodes");
}

#[test]
fn graph() {
    golden("graph");
}

#[test]
fn reopen() {
    golden("reopen");
}

#[test]
fn drives() {
    golden("drives");
}

#[test]
fn errors() {
    golden("errors");
}

#[test]
fn blockstats() {
    golden("blockstats");
}

#[test]
fn stats() {
    golden("stats");
}

#[test]
fn resize() {
    golden("resize");
}

#[test]
fn snapshots() {
    golden("snapshots");
}

#[test]
fn transactions() {
    golden("transactions");
}

#[test]
fn external() {
    golden("external");
}

#[test]
fn dry_run() {
    golden("dry-run");
}

#[test]
fn revert() {
    let Some(()) = harness::need(&["nbdinfo"]) else {
        return;
    };
    golden("revert");
}

#[test]
fn views() {
    let Some(()) = harness::need(&["nbdinfo"]) else {
        return;
    };
    golden("views");
}

#[test]
fn exports() {
    golden("exports");
}

#[test]
fn corrupt() {
    golden("corrupt");
}

#[test]
fn options() {
    golden("options");
}

#[test]
fn data_file() {
    golden("data-file");
}

#[test]
fn backup() {
    golden("backup");
}

#[test]
fn backup_refusals() {
    golden("backup-refusals");
}

#[test]
fn job_verbs() {
    golden("job-verbs");
}

#[test]
fn job_groups() {
    golden("job-groups");
}

#[test]
fn create_jobs() {
    golden("create-jobs");
}
