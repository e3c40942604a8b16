//! The same bad requests to qemu-storage-daemon and to our generated checks: the same sentences.
//!
//! One difference is meant: QEMU names only the last step of the path when a value is out of
//! range, no name of its enum, or of no kind that its alternate has. We name the whole path.

use serde_json::{Value, json};

use super::{dispatch, peer};

/// Bad requests, each with what QSD says where it differs from us.
fn bad_requests() -> Vec<(&'static str, Value, Option<&'static str>)> {
    let file = |file: Value| json!({"driver": "raw", "file": file});
    let action = |kind: &str, data: Value| json!({"actions": [{"type": kind, "data": data}]});
    vec![
        ("blockdev-add", json!({}), None),
        ("blockdev-add", json!({"driver": null}), None),
        ("blockdev-add", json!({"driver": 1}), None),
        ("blockdev-add", json!({"driver": "nonsense"}), None),
        ("blockdev-add", json!({"driver": "file"}), None),
        (
            "blockdev-add",
            json!({"driver": "file", "filename": 1}),
            None,
        ),
        (
            "blockdev-add",
            json!({"driver": "file", "filename": null}),
            None,
        ),
        (
            "blockdev-add",
            json!({"driver": "file", "filename": "x", "z": 1}),
            None,
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "filename": "x"}),
            None,
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "size": 1.5}),
            None,
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "size": 9_223_372_036_854_775_808u64}),
            None,
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "size": "1"}),
            None,
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "latency-ns": "1"}),
            None,
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "latency-ns": 1e3}),
            None,
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "read-zeroes": "on"}),
            None,
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "cache": {"direct": 0}}),
            None,
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "cache": {"z": 0}}),
            None,
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "cache": []}),
            None,
        ),
        ("blockdev-add", file(json!(null)), None),
        ("blockdev-add", file(json!([])), None),
        ("blockdev-add", file(json!({})), None),
        (
            "blockdev-add",
            file(json!({"driver": "file", "filename": "x", "z": {}})),
            None,
        ),
        (
            "blockdev-add",
            file(json!({"driver": "nonsense"})),
            Some("Parameter 'driver' does not accept value 'nonsense'"),
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "file": "x", "backing": 1}),
            None,
        ),
        ("blockdev-del", json!({}), None),
        ("blockdev-del", json!({"node-name": 1, "z": 1}), None),
        ("blockdev-del", json!({"node-name": "n", "z": null}), None),
        ("block_resize", json!({"device": "d"}), None),
        ("block_resize", json!({"size": "1k"}), None),
        ("block_resize", json!({"size": 1, "device": null}), None),
        ("transaction", json!({}), None),
        ("transaction", json!({"actions": {}}), None),
        ("transaction", json!({"actions": [1]}), None),
        ("transaction", json!({"actions": [{}]}), None),
        ("transaction", json!({"actions": [{"type": "abort"}]}), None),
        (
            "transaction",
            action("nonsense", json!({})),
            Some("Parameter 'type' does not accept value 'nonsense'"),
        ),
        ("transaction", action("abort", json!({"z": 1})), None),
        (
            "transaction",
            action("blockdev-snapshot-internal-sync", json!({"device": 1})),
            None,
        ),
        (
            "transaction",
            action("blockdev-snapshot-internal-sync", json!({"device": "d"})),
            None,
        ),
        ("nbd-server-start", json!({"addr": "x"}), None),
        ("nbd-server-start", json!({"addr": {"type": "unix"}}), None),
        (
            "nbd-server-start",
            json!({"addr": {"type": "unix", "data": {}}}),
            None,
        ),
        (
            "nbd-server-start",
            json!({"addr": {"type": "unix", "data": {"path": "p"}}, "max-connections": -1}),
            None,
        ),
        (
            "nbd-server-start",
            json!({"addr": {"type": "unix", "data": {"path": "p"}}, "max-connections": true}),
            None,
        ),
        ("block-export-add", json!({"type": "nbd"}), None),
        (
            "block-export-add",
            json!({"type": "nbd", "id": "e", "node-name": 1}),
            None,
        ),
        ("block-export-del", json!({"id": "e", "mode": "soft"}), None),
        ("nbd-server-remove", json!({"mode": 1}), None),
        ("query-block", json!({"z": 1}), None),
        ("query-named-block-nodes", json!({"flat": 1}), None),
        ("quit", json!({"now": true}), None),
    ]
}

#[test]
fn the_sentences_are_qsds() {
    let bad = bad_requests();
    let requests: Vec<Value> = bad
        .iter()
        .map(|(name, args, _)| json!({"execute": name, "arguments": args}))
        .collect();
    let Some(answers) = peer::session_with_qsd(&requests) else {
        eprintln!("skipped: qemu-storage-daemon is not installed");
        return;
    };
    assert_eq!(answers.len(), requests.len());
    for ((name, arguments, different), answer) in bad.into_iter().zip(answers) {
        let request = format!("{name} {arguments}");
        let theirs = answer["error"]["desc"]
            .as_str()
            .unwrap_or_else(|| panic!("{request}"));
        let (ours, calls) = dispatch::run(name, arguments);
        let ours = ours.unwrap_err();
        assert_eq!(calls, 0, "{request}");
        match different {
            None => assert_eq!(ours, theirs, "{request}"),
            Some(expected) => {
                assert_eq!(theirs, expected, "{request}");
                // Ours is the same with the path in front of the name.
                let (before, name) = expected.split_once('\'').unwrap();
                let behind = ours
                    .strip_prefix(before)
                    .and_then(|rest| rest.strip_prefix('\''));
                let (path, rest) = behind
                    .unwrap()
                    .split_at(behind.unwrap().find('\'').unwrap());
                let (leaf, theirs_rest) = name.split_at(name.find('\'').unwrap());
                assert!(path.ends_with(&format!(".{leaf}")), "{ours}");
                assert_eq!(rest, theirs_rest);
            }
        }
    }
}
