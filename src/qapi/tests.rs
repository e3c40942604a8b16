//! The generated code of our own schema.

use serde_json::json;

use crate::rt::Value;
use crate::rt::path::Path;
use crate::types::{BlockdevOptions, BlockdevOptionsBranch, BlockdevRef, SchemaInfo};
use crate::{commands, introspection};

#[test]
fn the_schema_decodes_through_its_own_types() {
    let schema: Value = serde_json::from_str(introspection::SCHEMA).unwrap();
    let again: Vec<Value> = crate::schema()
        .into_iter()
        .map(SchemaInfo::into_value)
        .collect();
    assert_eq!(Value::Array(again), schema);
}

fn add(arguments: Value) -> Result<BlockdevOptions, String> {
    BlockdevOptions::decode(arguments, &Path::json()).map_err(|err| err.desc)
}

#[test]
fn unions_take_common_members_then_those_of_the_branch() {
    let options = add(json!({
        "node-name": "n", "file": {"driver": "file", "filename": "f"}, "driver": "qcow2",
        "backing": null, "cache": {"direct": true},
    }))
    .unwrap();
    assert_eq!(options.node_name.as_deref(), Some("n"));
    let BlockdevOptionsBranch::Qcow2(qcow2) = options.driver else {
        panic!("another branch")
    };
    assert!(matches!(
        qcow2.backing,
        Some(crate::types::BlockdevRefOrNull::Null)
    ));
    let BlockdevRef::Definition(file) = qcow2.file else {
        panic!("another branch")
    };
    assert!(matches!(file.driver, BlockdevOptionsBranch::File(_)));
}

#[test]
fn complaints_come_in_schema_order_and_name_the_place() {
    for (arguments, text) in [
        (json!({}), "Parameter 'driver' is missing"),
        (
            json!({"driver": "nvme"}),
            "Parameter 'driver' does not accept value 'nvme'",
        ),
        (
            json!({"driver": 1}),
            "Invalid parameter type for 'driver', expected: string",
        ),
        (json!({"driver": "raw"}), "Parameter 'file' is missing"),
        (
            json!({"driver": "raw", "read-only": "on"}),
            "Invalid parameter type for 'read-only', expected: boolean",
        ),
        (
            json!({"driver": "raw", "file": null}),
            "Invalid parameter type for 'file', expected: BlockdevRef",
        ),
        (
            json!({"driver": "raw", "file": {"driver": "file", "filename": "x", "z": 1}, "y": 1}),
            "Parameter 'file.z' is unexpected",
        ),
        (
            json!({"z": 1, "driver": "raw", "file": "x", "a": 1}),
            "Parameter 'z' is unexpected",
        ),
        (
            json!({"driver": "null-co", "filename": "x"}),
            "Parameter 'filename' is unexpected",
        ),
        (
            json!({"driver": "null-co", "node-name": null}),
            "Invalid parameter type for 'node-name', expected: string",
        ),
        (
            json!({"driver": "raw", "file": {"driver": "file", "filename": "x", "aio": "native"}}),
            "Parameter 'file.aio' does not accept value 'native'",
        ),
    ] {
        assert_eq!(add(arguments), Err(text.to_owned()));
    }
}

#[test]
fn elements_are_named_by_their_index() {
    let decode = |actions: Value| {
        commands::Transaction::decode(json!({ "actions": actions }), &Path::json())
            .map(|_| ())
            .map_err(|err| err.desc)
    };
    let good = json!({"type": "abort", "data": {}});
    let bad = json!({"type": "blockdev-snapshot-internal-sync", "data": {"device": 1}});
    assert_eq!(decode(json!([good])), Ok(()));
    let text = "Invalid parameter type for 'actions[1].data.device', expected: string";
    assert_eq!(decode(json!([good, bad])), Err(text.to_owned()));
    let text = "Parameter 'actions[0].type' is missing";
    assert_eq!(decode(json!([{}])), Err(text.to_owned()));
}
