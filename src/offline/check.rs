//! `qblockd check`: looks at an image that is not in use, and puts right what is asked for.
//!
//! Output and exit code are those of `qemu-img check`, so that scripts can use either: 0 for an image in order, 1 where
//! that cannot be found out, 2 for errors, 3 for leaks alone.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::ExitCode;
use std::sync::Arc;

use block::driver::{Child, Driver};
use block::error::{Error, ErrorKind};
use block::formats::qcow2::check::{
    CheckOptions, CheckReport, MAX_FINDINGS, Repair, RepairReport, check, repair,
};
use block::io::IoContext;
use block::open::{Aio, CacheMode, FileOptions, Locking};
use block::protocols::file::{File, FileAccess};
use serde_json::{Map, Value, json};

use super::complain;
use crate::config::{CheckCommand, Output};

/// The check could not be made.
const NOT_CHECKED: u8 = 1;
/// Errors were found, and are there still.
const ERRORS: u8 = 2;
/// Nothing but leaks was found.
const LEAKS: u8 = 3;

pub(super) async fn check_file(command: &CheckCommand) -> Result<ExitCode, Error> {
    let file = Arc::new(open(command).await?);
    let child = Child::new(file.clone());
    let result = check_image(command, &child).await;
    let closed = file.close().await;
    let code = result?;
    closed?;
    Ok(ExitCode::from(code))
}

async fn open(command: &CheckCommand) -> Result<File, Error> {
    let options = FileOptions {
        filename: command.file.clone(),
        aio: Aio::Threads,
        locking: Locking::Auto,
    };
    let access = FileAccess {
        read_only: command.repair.is_none(),
        auto_read_only: false,
        cache: CacheMode::default(),
    };
    File::open(&IoContext::new(), &options, access).await
}

async fn check_image(command: &CheckCommand, file: &Child) -> Result<u8, Error> {
    let mut fixed = RepairReport::default();
    if let Some(what) = command.repair {
        match repair_image(what, file).await {
            Ok(report) => fixed = report,
            // The check says what there is beside it.
            Err(error) if error.kind() == ErrorKind::Corrupt => complain(&error.to_string()),
            Err(error) => return Err(error),
        }
        print_findings(&fixed.findings);
    }
    if fixed.leaks_fixed + fixed.corruptions_fixed > 0 && command.output == Output::Human {
        print(command, &repaired_in_words(&fixed));
    }
    let report = check(file).await?;
    print_findings(&report.findings);
    let text = match command.output {
        Output::Human => in_words(&report),
        Output::Json => format!("{:#}\n", as_json(&command.file, &report, &fixed)),
    };
    print(command, &text);
    Ok(match &report {
        _ if report.check_errors > 0 => {
            complain("Check failed");
            NOT_CHECKED
        }
        _ if report.is_broken() => ERRORS,
        _ if report.leaks > 0 => LEAKS,
        _ => 0,
    })
}

async fn repair_image(what: Repair, file: &Child) -> Result<RepairReport, Error> {
    let options = CheckOptions {
        discard_leaks: true,
        ..CheckOptions::default()
    };
    repair(file, what, &options).await
}

fn repaired_in_words(fixed: &RepairReport) -> String {
    format!(
        "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
         Double checking the fixed image now...\n",
        fixed.leaks_fixed, fixed.corruptions_fixed
    )
}

/// The sentences of qemu-img, and one more for what it does not look at.
fn in_words(report: &CheckReport) -> String {
    let mut text = String::new();
    let mut add = |count: u64, sentence: &str| {
        if count > 0 {
            let _ = write!(text, "\n{count} {sentence}\n");
        }
    };
    add(
        report.corruptions,
        "errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.",
    );
    add(
        report.overlaps,
        "clusters are used by two structures that cannot share them.",
    );
    add(
        report.leaks,
        "leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.",
    );
    add(
        report.check_errors,
        "internal errors have occurred during the check.",
    );
    if text.is_empty() {
        text.push_str("No errors were found on the image.\n");
    }
    let (allocated, total) = (report.allocated_clusters, report.total_clusters);
    if allocated > 0 && total > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        let _ = writeln!(
            text,
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated)
        );
    }
    if report.image_end_offset > 0 {
        let _ = writeln!(text, "Image end offset: {}", report.image_end_offset);
    }
    text
}

/// The members of qemu-img's `ImageCheck`, of which those that are 0 are left out as there, and `overlaps`.
fn as_json(file: &str, report: &CheckReport, fixed: &RepairReport) -> Value {
    let mut members = Map::new();
    members.insert("filename".to_owned(), json!(file));
    members.insert("format".to_owned(), json!("qcow2"));
    members.insert("check-errors".to_owned(), json!(report.check_errors));
    for (name, count) in [
        ("image-end-offset", report.image_end_offset),
        ("corruptions", report.corruptions),
        ("overlaps", report.overlaps),
        ("leaks", report.leaks),
        ("corruptions-fixed", fixed.corruptions_fixed),
        ("leaks-fixed", fixed.leaks_fixed),
        ("total-clusters", report.total_clusters),
        ("allocated-clusters", report.allocated_clusters),
        ("fragmented-clusters", report.fragmented_clusters),
        ("compressed-clusters", report.compressed_clusters),
    ] {
        if count > 0 {
            members.insert(name.to_owned(), json!(count));
        }
    }
    Value::Object(members)
}

fn print_findings(findings: &[String]) {
    let mut lines = findings.join("\n");
    if !lines.is_empty() {
        lines.push('\n');
    }
    if findings.len() >= MAX_FINDINGS {
        lines.push_str("Further findings are not shown\n");
    }
    // Whoever does not listen has the exit code.
    let _ = io::stderr().write_all(lines.as_bytes());
}

fn print(command: &CheckCommand, text: &str) {
    if !command.quiet {
        let _ = io::stdout().write_all(text.as_bytes());
    }
}
