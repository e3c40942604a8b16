//! `qblockd amend` beside `qemu-img amend`: what the image says afterwards, messages and exit codes, on copies of one image.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use super::harness::{Daemon, Program, need, tool};

const OURS: &str = env!("CARGO_BIN_EXE_qblockd");

fn amend(program: &str, folder: &Path, arguments: &[&str]) -> Output {
    Command::new(program)
        .arg("amend")
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap()
}

/// Exit code and message, without the name of who says it.
fn said(output: &Output) -> (i32, String) {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let text = text.trim_start_matches("qblockd: ").replace("amend: ", "");
    let text = text
        .trim_start_matches("qemu-img: ")
        .replace("\nTry 'qemu-img amend --help' for more info", "");
    (output.status.code().unwrap(), text)
}

/// What qemu-img says of an image, but for what is not about its content.
fn info(folder: &Path, image: &str) -> Value {
    let output = Command::new("qemu-img")
        .args(["info", "--output=json", image])
        .current_dir(folder)
        .output()
        .unwrap();
    let mut info: Value = serde_json::from_slice(&output.stdout).unwrap();
    let members = info.as_object_mut().unwrap();
    for name in [
        "filename",
        "actual-size",
        "children",
        "full-backing-filename",
    ] {
        members.remove(name);
    }
    info
}

fn content(folder: &Path, image: &str) -> Vec<u8> {
    tool(
        folder,
        &format!("qemu-img convert -O raw {image} content.raw"),
    );
    fs::read(folder.join("content.raw")).unwrap()
}

/// Amends copies of `a.qcow2` with both; they must end alike, as images without errors.
fn compare(folder: &Path, arguments: &[&str]) -> i32 {
    let copies = ["ours.qcow2", "theirs.qcow2"].map(|name| {
        fs::copy(folder.join("a.qcow2"), folder.join(name)).unwrap();
        name
    });
    let [ours, theirs] = [(OURS, copies[0]), ("qemu-img", copies[1])].map(|(program, image)| {
        let arguments: Vec<&str> = arguments.iter().copied().chain([image]).collect();
        said(&amend(program, folder, &arguments))
    });
    assert_eq!(ours, theirs, "{arguments:?}");
    let [ours_now, theirs_now] = copies.map(|image| info(folder, image));
    assert_eq!(ours_now, theirs_now, "{arguments:?}");
    assert_eq!(
        content(folder, copies[0]),
        content(folder, copies[1]),
        "{arguments:?}"
    );
    tool(folder, "qemu-img check -q ours.qcow2");
    ours.0
}

fn create(folder: &Path, options: &str) {
    tool(
        folder,
        &format!(
            "qemu-img create -q -f raw base.raw 3M && qemu-io -f raw -c 'write -P 9 0 3M' base.raw && \
             qemu-img create -q -f qcow2 {options} a.qcow2 2M && \
             qemu-io -c 'write -P 1 100k 300k' -c 'write -c -P 2 1M 64k' a.qcow2 && qemu-img snapshot -c s a.qcow2 && \
             qemu-io -c 'write -P 3 64k 64k' a.qcow2"
        ),
    );
}

#[test]
fn images_are_amended_as_by_qemu_img() {
    let Some(()) = need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for options in [
        "-o compat=0.10",
        "-o lazy_refcounts=on",
        "-b base.raw -F raw",
    ] {
        create(folder, options);
        for list in [
            "compat=1.1",
            "compat=v3,lazy_refcounts=on",
            "compat=1.1,lazy_refcounts",
            "refcount_bits=16",
            "size=3M",
            "compat=1.1,size=4M",
        ] {
            // Version 2 does not say for each snapshot how large its disk was.
            let refused = options.contains("0.10") && list == "size=3M";
            let code = compare(folder, &["-o", list]);
            assert_eq!(code, i32::from(refused), "{options} {list}");
        }
        let twice = [
            "-q",
            "-f",
            "qcow2",
            "-o",
            "compat=v3",
            "-o",
            "lazy_refcounts=off",
        ];
        assert_eq!(compare(folder, &twice), 0, "{options}");
    }
}

#[test]
fn wrong_options_are_refused_with_qemus_words() {
    let Some(()) = need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    create(folder, "-o compat=0.10");
    for list in [
        "compat=0.11",
        "compat",
        "bogus=1",
        "lazy_refcounts=maybe",
        "lazy_refcounts=on",
        "cluster_size=4k",
        "preallocation=full",
        "compression_type=zstd",
        "extended_l2=on",
        "refcount_bits=3",
        "refcount_bits=128",
        "data_file_raw=on",
        "size=many",
        "",
    ] {
        assert_eq!(compare(folder, &["-o", list]), 1, "{list}");
    }
    assert_eq!(compare(folder, &[]), 1);
    assert_eq!(compare(folder, &["-f", "raw", "-o", "size=1M"]), 1);
    assert_eq!(compare(folder, &["-o", "compat=1.1", "another"]), 1);
}

#[test]
fn what_a_switch_of_the_header_cannot_do_is_said_and_changes_nothing() {
    let Some(()) = need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    create(folder, "-o compat=1.1");
    let before = fs::read(folder.join("a.qcow2")).unwrap();
    for (list, text) in [
        (
            "compat=0.10",
            "made one of version 2 while it is open (qemu-img amend may be able to)",
        ),
        (
            "lazy_refcounts=on,refcount_bits=32",
            "cannot be changed while it is open (qemu-img amend may be able to)",
        ),
        ("backing_file=base.raw", "backing_file needs backing_fmt"),
        ("backing_fmt=raw", "backing_fmt goes with backing_file"),
        (
            "backing_file=base.raw,backing_fmt=raw,size=3M",
            "cannot be changed together",
        ),
    ] {
        let (code, said) = said(&amend(OURS, folder, &["-o", list, "a.qcow2"]));
        assert!(code == 1 && said.contains(text), "{list}: {said}");
        assert_eq!(fs::read(folder.join("a.qcow2")).unwrap(), before, "{list}");
    }
    // One that is in use is left alone.
    let mut daemon = Daemon::start_in(Program::Qblockd, folder, &["--drive", "file=a.qcow2,id=d"]);
    daemon.qmp();
    let (code, said) = said(&amend(
        OURS,
        folder,
        &["-o", "lazy_refcounts=on", "a.qcow2"],
    ));
    assert!(code == 1 && said.contains("lock"), "{said}");
    drop(daemon);
}

#[test]
fn the_backing_file_is_what_is_said_it_is() {
    let Some(()) = need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    create(folder, "-o compat=1.1");
    let list = "backing_file=base.raw,backing_fmt=raw,lazy_refcounts=on";
    assert_eq!(
        said(&amend(OURS, folder, &["-o", list, "a.qcow2"])),
        (0, String::new())
    );
    let now = info(folder, "a.qcow2");
    assert_eq!(now["backing-filename"], "base.raw");
    assert_eq!(now["backing-filename-format"], "raw");
    assert_eq!(now["format-specific"]["data"]["lazy-refcounts"], true);
    assert_eq!(content(folder, "a.qcow2")[0], 9);
    assert_eq!(
        said(&amend(OURS, folder, &["-o", "backing_file=", "a.qcow2"])).0,
        0
    );
    assert_eq!(info(folder, "a.qcow2")["backing-filename"], Value::Null);
    assert_eq!(content(folder, "a.qcow2")[0], 0);
    tool(folder, "qemu-img check -q a.qcow2");
    // Guest data in another file, which is named here as everywhere.
    tool(
        folder,
        "qemu-img create -q -f qcow2 -o data_file=d.raw,data_file_raw=on b.qcow2 1M",
    );
    let list = ["-o", "data_file_raw=off", "b.qcow2"];
    let (code, text) = said(&amend(OURS, folder, &list));
    assert!(
        code == 1 && text.contains("the image names 'd.raw'"),
        "{text}"
    );
    let list = [
        "--data-file",
        "d.raw",
        "-o",
        "data_file_raw=off,size=2M",
        "b.qcow2",
    ];
    assert_eq!(said(&amend(OURS, folder, &list)), (0, String::new()));
    let now = info(folder, "b.qcow2");
    assert_eq!(now["format-specific"]["data"]["data-file-raw"], false);
    assert_eq!(now["virtual-size"], 2 << 20);
}
