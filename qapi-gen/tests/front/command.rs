//! The command as a user runs it.

use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qapi-gen"))
        .args(arguments)
        .output()
        .unwrap()
}

/// The exit status and what stands on standard error.
fn outcome(arguments: &[&str]) -> (i32, String) {
    let output = run(arguments);
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn check_reports_on_standard_error() {
    let (status, text) = outcome(&["check", "tests/hx/schema.json"]);
    assert_eq!((status, text.as_str()), (0, ""));
    let (status, text) = outcome(&["check", "tests/schemas/types-cycle.json"]);
    assert_eq!(status, 1);
    assert!(
        text.starts_with("tests/schemas/types-cycle.json:1:29: error: object 'Self'"),
        "{text}"
    );
    let (status, text) = outcome(&["check", "no-such-file.json"]);
    assert_eq!(status, 1);
    assert!(
        text.contains("can't read schema file 'no-such-file.json'"),
        "{text}"
    );
    let table = "tests/hx/drift-commands.hx";
    let (status, text) = outcome(&["check", "tests/hx/schema.json", "--hx", table]);
    assert_eq!(status, 1);
    assert!(
        text.contains("command 'quitt' is not in the schema"),
        "{text}"
    );
    assert_eq!(
        outcome(&["hx-lint", "tests/hx/schema.json", table]),
        (status, text)
    );
}

#[test]
fn warnings_do_not_fail() {
    let (status, text) = outcome(&["check", "--unused", "tests/schemas/warnings.json"]);
    assert_eq!(status, 0);
    assert!(
        text.contains("warning: enum 'Unused' is not used"),
        "{text}"
    );
    let (_, text) = outcome(&["check", "tests/schemas/warnings.json"]);
    assert!(!text.contains("is not used"), "{text}");
}

#[test]
fn conditions_and_dialect_are_options() {
    let folder = tempfile::tempdir().unwrap();
    let schema = folder.path().join("schema.json");
    let schema = schema.to_str().unwrap();
    std::fs::write(
        schema,
        "{ 'type': 'Old', 'data': {} } { 'command': 'a', 'if': 'A' }",
    )
    .unwrap();
    assert_eq!(outcome(&["check", schema]).0, 1);
    assert_eq!(outcome(&["check", "--legacy", schema]).0, 0);
    let out = folder.path().join("out");
    let out = out.to_str().unwrap();
    let page = || std::fs::read_to_string(format!("{out}/schema.md")).unwrap();
    assert_eq!(
        outcome(&["docs", "--legacy", schema, "-o", out]),
        (0, String::new())
    );
    assert!(!page().contains("Command"), "{}", page());
    assert_eq!(
        outcome(&["docs", "--legacy", "--define", "A", schema, "-o", out]).0,
        0
    );
    assert!(page().contains("Command"), "{}", page());
}

#[test]
fn rust_is_written_below_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    assert_eq!(
        outcome(&["rust", "tests/hx/schema.json", "-o", out]),
        (0, String::new())
    );
    let text = std::fs::read_to_string(folder.path().join("schema.rs")).unwrap();
    assert!(text.contains("pub struct Target"), "{text}");
    let (status, text) = outcome(&["rust", "tests/hx/schema.json"]);
    assert_eq!(status, 1);
    assert!(text.contains("Give a folder with -o"), "{text}");
}

#[test]
fn misuse_is_explained() {
    for (arguments, message) in [
        (&[][..], "which command?"),
        (&["chek", "a"], "unknown command 'chek'"),
        (&["check"], "wrong number of arguments for 'check'"),
        (&["check", "--frob"], "invalid option '--frob'"),
    ] {
        let (status, text) = outcome(arguments);
        assert_eq!(status, 2, "{text}");
        assert!(
            text.contains(message) && text.contains("usage: qapi-gen"),
            "{text}"
        );
    }
    let help = run(&["--help"]);
    assert!(help.status.success());
    assert!(
        String::from_utf8(help.stdout)
            .unwrap()
            .starts_with("usage: qapi-gen")
    );
}
