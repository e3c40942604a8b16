//! `blockdev-create` here and on qemu-storage-daemon: the same errors, and images that `qemu-img` finds the same.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::harness::{self, Daemon, Program, Qmp};

/// What is made, in a folder with an empty file `f` that is the node `f`, and an empty file `d` that is the node `d`.
const CASES: &[&str] = &[
    r#"{"driver": "raw"}"#,
    r#"{"driver": "null-co"}"#,
    r#"{"driver": "file", "size": 1}"#,
    r#"{"driver": "file", "filename": "new", "size": 1048577}"#,
    r#"{"driver": "file", "filename": "new", "size": 65536, "preallocation": "full"}"#,
    r#"{"driver": "file", "filename": "new", "size": 65536, "preallocation": "falloc"}"#,
    r#"{"driver": "file", "filename": "new", "size": 65536, "preallocation": "metadata"}"#,
    r#"{"driver": "file", "filename": "missing/new", "size": 1}"#,
    r#"{"driver": "qcow2", "file": "f"}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 0}"#,
    r#"{"driver": "qcow2", "file": "nope", "size": 1048576}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048577}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "version": "v2"}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "version": "v2", "lazy-refcounts": true}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "version": "v2", "compression-type": "zstd"}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "version": "v2", "refcount-bits": 8}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "lazy-refcounts": true, "refcount-bits": 1}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "refcount-bits": 3}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "cluster-size": 512, "compression-type": "zstd"}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "cluster-size": 1000}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "cluster-size": 4194304}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "extended-l2": true, "cluster-size": 131072}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "extended-l2": true, "cluster-size": 4096}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "backing-file": "base"}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "backing-file": "base", "backing-fmt": "raw"}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "backing-fmt": "raw"}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "backing-file": "base", "preallocation": "metadata"}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "preallocation": "metadata"}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "preallocation": "falloc"}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "preallocation": "full"}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "data-file": "d"}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "data-file": "d", "data-file-raw": true}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "data-file-raw": true}"#,
    r#"{"driver": "qcow2", "file": "f", "size": 1048576, "data-file": "d", "version": "v2"}"#,
    r#"{"driver": "qcow2", "file": {"driver": "file", "filename": "base"}, "size": 1048576}"#,
    r#"{"driver": "qcow2", "file": {"driver": "file", "filename": "missing"}, "size": 1048576}"#,
    r#"{"driver": "qcow2", "file": {"driver": "file", "filename": "base", "read-only": true}, "size": 1048576}"#,
];

/// Where the sentence is another, for the reasons in `docs/differences.md` (full-path, wording).
const DIFFERENT: &[(&str, &str)] = &[
    (
        r#"{"driver": "nosuch"}"#,
        "Parameter 'options.driver' does not accept value 'nosuch'",
    ),
    (
        r#"{"driver": "qcow2", "file": "f", "size": 1048576, "backing-file": "base", "backing-fmt": "nosuch"}"#,
        "Parameter 'options.backing-fmt' does not accept value 'nosuch'",
    ),
    (
        r#"{"driver": "file", "filename": "new", "size": -1}"#,
        "Could not resize 'new': File too large",
    ),
    (
        r#"{"driver": "qcow2", "file": "f", "size": 72057594037927936}"#,
        "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
    ),
];

/// What came of a case: the command's error, or the job's, or images.
#[derive(Debug, PartialEq)]
enum Outcome {
    Refused(Value),
    Failed(Value),
    Made(Vec<Image>),
}

/// A file as it was made.
#[derive(Debug, PartialEq)]
struct Image {
    name: String,
    /// Of raw files, which have no layout of their own.
    length: Option<u64>,
    info: Value,
    check: Value,
}

/// Waits for the job's end.
fn concluded(qmp: &mut Qmp) -> Value {
    let deadline = Instant::now() + harness::PATIENCE;
    loop {
        let jobs = qmp.ok("query-jobs", json!({}));
        if jobs[0]["status"] == "concluded" {
            return jobs[0].clone();
        }
        assert!(Instant::now() < deadline, "{jobs}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn run(program: Program, options: &str) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    for name in ["f", "d"] {
        fs::File::create(folder.path().join(name)).unwrap();
    }
    let base = fs::File::create(folder.path().join("base")).unwrap();
    base.set_len(1 << 20).unwrap();
    let mut daemon = Daemon::start_in(program, folder.path(), &[]);
    let mut qmp = daemon.qmp();
    for name in ["f", "d"] {
        let node = json!({"driver": "file", "node-name": name, "filename": name});
        qmp.ok("blockdev-add", node);
    }
    let options: Value = serde_json::from_str(options).unwrap();
    let arguments = json!({"job-id": "job0", "options": options});
    let mut reply = qmp.execute("blockdev-create", arguments);
    let outcome = match reply.get_mut("error") {
        Some(error) => Outcome::Refused(error.take()),
        None => {
            let job = concluded(&mut qmp);
            assert_eq!(job["current-progress"], job["total-progress"]);
            assert_eq!(job["type"], "create");
            qmp.ok("job-dismiss", json!({"id": "job0"}));
            match job.get("error") {
                Some(error) => Outcome::Failed(error.clone()),
                None => Outcome::Made(Vec::new()),
            }
        }
    };
    assert_eq!(qmp.ok("query-jobs", json!({})), json!([]));
    for name in ["f", "d"] {
        // No job uses them any more.
        qmp.ok("blockdev-del", json!({"node-name": name}));
    }
    drop(qmp);
    assert!(daemon.terminated().success());
    match outcome {
        Outcome::Made(_) => Outcome::Made(images(folder.path())),
        other => other,
    }
}

/// What `qemu-img` says of the files that were made.
fn images(folder: &Path) -> Vec<Image> {
    let mut images = Vec::new();
    for name in ["base", "d", "f", "new"] {
        let path = folder.join(name);
        let Ok(metadata) = fs::metadata(&path) else {
            continue;
        };
        let is_qcow2 = fs::read(&path).unwrap().starts_with(b"QFI\xfb");
        let report = |line: &str| -> Value {
            let mut report: Value =
                serde_json::from_str(&harness::tool(folder, line)).unwrap_or_default();
            strip(&mut report);
            report
        };
        let (mut info, mut check) = (Value::Null, Value::Null);
        if is_qcow2 {
            info = report(&format!("qemu-img info --output=json -f qcow2 {name}"));
            check = report(&format!("qemu-img check --output=json -f qcow2 {name}"));
        }
        images.push(Image {
            name: name.to_owned(),
            length: (!is_qcow2).then_some(metadata.len()),
            info,
            check,
        });
    }
    images
}

/// Takes out what is each program's own affair: where things lie, and how much space that takes.
fn strip(report: &mut Value) {
    let Some(members) = report.as_object_mut() else {
        return;
    };
    for key in ["actual-size", "image-end-offset", "children"] {
        members.remove(key);
    }
}

#[test]
fn images_are_made_as_by_qemu_storage_daemon() {
    let Some(()) = harness::need(&["qemu-storage-daemon", "qemu-img"]) else {
        return;
    };
    let mut different = String::new();
    let mut made = 0;
    for case in CASES {
        let (ours, theirs) = (
            run(Program::Qblockd, case),
            run(Program::QemuStorageDaemon, case),
        );
        made += usize::from(matches!(ours, Outcome::Made(_)));
        if ours != theirs {
            different.push_str(&format!("{case}\n  {ours:?}\n  {theirs:?}\n"));
        }
    }
    for (case, expected) in DIFFERENT {
        let (ours, theirs) = (
            run(Program::Qblockd, case),
            run(Program::QemuStorageDaemon, case),
        );
        let said = match &ours {
            Outcome::Refused(error) => &error["desc"],
            Outcome::Failed(error) => error,
            Outcome::Made(_) => &Value::Null,
        };
        assert_eq!(said, expected, "{case}");
        assert_ne!(ours, theirs, "no longer different: {case}");
    }
    assert!(different.is_empty(), "{different}");
    assert!(made > CASES.len() / 3);
}

#[test]
fn a_file_that_cannot_be_made_is_not_there_and_one_that_is_replaced_stays_until_then() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("old"), "old content").unwrap();
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &[]);
    let mut qmp = daemon.qmp();
    let mut make = |name: &str, size: u64| {
        let options = json!({"driver": "file", "filename": name, "size": size});
        qmp.ok(
            "blockdev-create",
            json!({"job-id": "job0", "options": options}),
        );
        let job = concluded(&mut qmp);
        qmp.ok("job-dismiss", json!({"id": "job0"}));
        job.get("error").is_none()
    };
    let too_large = 1 << 63;
    assert!(!make("new", too_large));
    assert!(!make("old", too_large));
    let names = || {
        let entries = fs::read_dir(folder.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["old", "qmp.sock"]);
    assert_eq!(
        fs::read_to_string(folder.path().join("old")).unwrap(),
        "old content"
    );
    assert!(make("old", 4096));
    assert_eq!(names(), ["old", "qmp.sock"]);
    assert_eq!(fs::read(folder.path().join("old")).unwrap(), [0; 4096]);
    drop(qmp);
    assert!(daemon.terminated().success());
}
