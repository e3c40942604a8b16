//! Whole command lines: what they ask for, and the messages for those that ask for nothing that is there.

use block::formats::qcow2::check::Repair;

use super::*;

fn run(arguments: &[&str]) -> Result<Config, String> {
    match parse(arguments.iter().map(OsString::from)) {
        Ok(Invocation::Run(config)) => Ok(config),
        Ok(other) => Err(format!("{other:?}")),
        Err(error) => Err(error.to_string()),
    }
}

fn error(arguments: &[&str]) -> String {
    run(arguments).unwrap_err()
}

#[test]
fn steps_keep_their_order_and_text() {
    let config = run(&[
        "--blockdev",
        "null-co,node-name=n",
        "--pidfile=p",
        "--state-dir=s",
        "--qmp",
        "unix:q",
        "--daemonize",
    ])
    .unwrap();
    let texts: Vec<&str> = config.steps.iter().map(|step| step.text.as_str()).collect();
    assert_eq!(texts, ["--blockdev null-co,node-name=n", "--qmp unix:q"]);
    assert_eq!(config.pidfile, Some("p".into()));
    assert_eq!(config.state_dir, Some("s".into()));
    assert!(config.daemonize);
}

#[test]
fn json_and_keyval_are_told_apart() {
    for (value, syntax) in [
        ("{'driver':'null-co'}", Syntax::Json),
        ("driver=null-co", Syntax::Keyval),
    ] {
        let config = run(&["--blockdev", value]).unwrap();
        let Action::Blockdev(arguments) = &config.steps[0].action else {
            panic!("{:?}", config.steps);
        };
        assert_eq!(arguments.syntax, syntax);
        assert_eq!(arguments.object["driver"], "null-co");
    }
}

#[test]
fn both_forms_of_an_nbd_server_say_the_same() {
    let long = run(&[
        "--nbd-server",
        "addr.type=inet,addr.host=::1,addr.port=10809",
    ])
    .unwrap();
    let short = run(&["--nbd-server", "tcp:[::1]:10809"]).unwrap();
    assert_eq!(long.steps[0].action, short.steps[0].action);
}

#[test]
fn every_known_option_has_an_action() {
    for word in USAGE.split_whitespace() {
        if let Some(name) = word.strip_prefix("--")
            && is_known(name)
            && !["pidfile", "state-dir"].contains(&name)
        {
            let message = action(name, "\u{1}").err().unwrap_or_default();
            assert!(!message.contains("unrecognized"), "{name}");
        }
    }
}

/// Messages of qemu-storage-daemon 10.0.2, without the program's name.
#[test]
fn bad_command_lines_get_qemu_storage_daemons_messages() {
    let cases: &[(&[&str], &str)] = &[
        (&["--bogus"], "unrecognized option '--bogus'"),
        (&["-x"], "invalid option -- 'x'"),
        (&["extra"], "extra: Unexpected argument"),
        (&["--blockdev"], "option '--blockdev' requires an argument"),
        (
            &["--blockdev", "help"],
            "--blockdev help: Help is not available for this option",
        ),
        (
            &["--blockdev", "driver=null-co,read-zeroes"],
            "--blockdev driver=null-co,read-zeroes: Expected '=' after parameter 'read-zeroes'",
        ),
        (
            &["--blockdev", "{'driver':'null-co'"],
            "--blockdev {'driver':'null-co': JSON parse error, premature EOI",
        ),
        (
            &["--blockdev", "{'driver':'null-co'}x"],
            "--blockdev {'driver':'null-co'}x: Expecting at most one JSON value",
        ),
        (
            &["--nbd-server", "bogus:x"],
            "--nbd-server bogus:x: Invalid parameter 'bogus:x'",
        ),
        (
            &["--monitor", "mode=control"],
            "--monitor mode=control: Parameter 'chardev' is missing",
        ),
        (
            &["--chardev", "bogus,id=a"],
            "--chardev bogus,id=a: 'bogus' is not a valid char driver name",
        ),
    ];
    for (arguments, expected) in cases {
        assert_eq!(error(arguments), *expected);
    }
}

#[test]
fn help_and_version_win_over_what_follows() {
    let parse = |argument: &str| super::parse([argument.into(), "--bogus".into()]);
    assert_eq!(parse("--help"), Ok(Invocation::Help));
    assert_eq!(parse("-V"), Ok(Invocation::Version));
}

#[test]
fn check_takes_the_options_of_qemu_img() {
    let parsed = |arguments: &[&str]| {
        let arguments = ["check"].iter().chain(arguments).map(OsString::from);
        match parse(arguments) {
            Ok(Invocation::Check(command)) => Ok(command),
            Ok(other) => Err(format!("{other:?}")),
            Err(error) => Err(error.to_string()),
        }
    };
    let plain = CheckCommand {
        file: "a.qcow2".to_owned(),
        repair: None,
        output: Output::Human,
        quiet: false,
    };
    assert_eq!(parsed(&["a.qcow2"]), Ok(plain.clone()));
    let json = CheckCommand {
        output: Output::Json,
        quiet: true,
        ..plain.clone()
    };
    for arguments in [
        &["-q", "--output=json", "-f", "qcow2", "a.qcow2"][..],
        &["a.qcow2", "--format", "json", "--quiet"],
    ] {
        assert_eq!(parsed(arguments), Ok(json.clone()));
    }
    for (repair, forms) in [
        (
            Repair::All,
            &[
                "--repair",
                "--repair=all",
                "--repair all",
                "-r all",
                "-rall",
            ][..],
        ),
        (
            Repair::Leaks,
            &["--repair=leaks", "--repair leaks", "-r leaks"],
        ),
    ] {
        for form in forms {
            let command = CheckCommand {
                repair: Some(repair),
                ..plain.clone()
            };
            let words: Vec<&str> = form.split(' ').chain(["a.qcow2"]).collect();
            assert_eq!(parsed(&words), Ok(command), "{form}");
        }
    }
    assert_eq!(parsed(&["all"]).unwrap().file, "all");
    assert_eq!(
        parsed(&["--repair", "a", "-q"]).unwrap().repair,
        Some(Repair::All)
    );
    assert_eq!(parsed(&["--help"]), Err("Help".to_owned()));
    for (arguments, message) in [
        (&[][..], "check: Expecting one image file name"),
        (&["a", "b"], "check: Expecting one image file name"),
        (
            &["-r", "some", "a"],
            "check: --repair (-r) expects 'leaks' or 'all'",
        ),
        (
            &["--repair=some", "a"],
            "check: --repair (-r) expects 'leaks' or 'all'",
        ),
        (
            &["--output=xml", "a"],
            "check: --output expects 'human' or 'json'",
        ),
        (
            &["-f", "raw", "a"],
            "check: Image format 'raw' has no checks",
        ),
        (&["--bogus", "a"], "check: unrecognized option '--bogus'"),
        (
            &["--output"],
            "check: option '--output' requires an argument",
        ),
    ] {
        assert_eq!(parsed(arguments), Err(message.to_owned()));
    }
    assert_eq!(
        error(&["--qmp", "unix:q", "check"]),
        "check: Unexpected argument"
    );
}
