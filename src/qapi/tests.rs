//! The generated code of our own schema.

mod complaints;
mod dispatch;
mod examples;
mod peer;

use serde_json::json;

use crate::rt::event::Timestamp;
use crate::rt::{ErrorClass, Path, Value};
use crate::types::{
    BlockdevOptions, BlockdevOptionsBranch, BlockdevRef, BlockdevRefOrNull, QapiErrorClass,
    SchemaInfo, ShutdownCause,
};
use crate::{Event, commands, events, introspection};

#[test]
fn the_schema_decodes_through_its_own_types() {
    let schema: Value = serde_json::from_str(introspection::SCHEMA).unwrap();
    let again: Vec<Value> = crate::schema()
        .into_iter()
        .map(SchemaInfo::into_value)
        .collect();
    assert_eq!(Value::Array(again), schema);
}

/// What clients see of the interface: a change of it shows in review.
#[test]
fn the_schema_on_the_wire_is_this() {
    insta::with_settings!({
        snapshot_path => "../../snapshots",
        prepend_module_to_snapshot => false,
        omit_expression => true,
    }, { insta::assert_snapshot!("introspection", introspection::SCHEMA) });
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
    assert!(matches!(qcow2.backing, Some(BlockdevRefOrNull::Null)));
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
            json!({"driver": "raw", "file": {"driver": "file", "filename": "x", "aio": "often"}}),
            "Parameter 'file.aio' does not accept value 'often'",
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

#[test]
fn null_is_a_branch_and_absence_is_none() {
    let backing = |backing: Option<Value>| {
        let mut arguments = json!({"driver": "qcow2", "file": "f"});
        if let Some(backing) = backing {
            arguments["backing"] = backing;
        }
        match add(arguments)?.driver {
            BlockdevOptionsBranch::Qcow2(qcow2) => Ok(qcow2.backing),
            _ => Err("another branch".to_owned()),
        }
    };
    assert_eq!(backing(None), Ok(None));
    assert_eq!(
        backing(Some(Value::Null)),
        Ok(Some(BlockdevRefOrNull::Null))
    );
    let name = BlockdevRefOrNull::Reference(String::new());
    assert_eq!(backing(Some(json!(""))), Ok(Some(name)));
    for wrong in [json!(1), json!(true), json!([])] {
        let text = "Invalid parameter type for 'backing', expected: BlockdevRefOrNull";
        assert_eq!(backing(Some(wrong)), Err(text.to_owned()));
    }
}

#[test]
fn what_is_decoded_is_encoded_the_same() {
    for arguments in [
        json!({"driver": "null-co", "size": 1, "latency-ns": u64::MAX}),
        json!({"driver": "qcow2", "node-name": "n", "detect-zeroes": "unmap", "backing": null,
               "file": {"driver": "file", "filename": "f", "aio": "io_uring"}}),
        json!({"driver": "raw", "cache": {}, "file": "f", "offset": 512}),
    ] {
        let encoded = add(arguments.clone()).unwrap().into_value();
        assert_eq!(encoded, arguments);
    }
}

#[test]
fn the_command_line_decodes_from_strings() {
    let add = |options: Value| {
        BlockdevOptions::decode(options, &Path::keyval())
            .map(BlockdevOptions::into_value)
            .map_err(|err| err.desc)
    };
    let options = json!({
        "driver": "qcow2", "node-name": "n", "read-only": "on", "cache": {"direct": "off"},
        "file": {"driver": "null-co", "size": "0x10000", "read-zeroes": "yes"},
    });
    let decoded = json!({
        "driver": "qcow2", "node-name": "n", "cache": {"direct": false}, "read-only": true,
        "file": {"driver": "null-co", "size": 65536, "read-zeroes": true},
    });
    assert_eq!(add(options), Ok(decoded));
    // The sentences of qemu-storage-daemon 10.0 for the same options.
    for (options, text) in [
        (
            json!({"driver": "null-co", "size": "1M"}),
            "Parameter 'size' expects integer",
        ),
        (
            json!({"driver": "null-co", "read-zeroes": "maybe"}),
            "Parameter 'read-zeroes' expects 'on' or 'off'",
        ),
        (
            json!({"driver": "file", "filename": {"x": "1"}}),
            "Parameters 'filename.*' are unexpected",
        ),
        (
            json!({"driver": "null-co", "cache": "7"}),
            "Invalid parameter type for 'cache', expected: object",
        ),
        (
            json!({"driver": "qcow2", "file": ["8"]}),
            "Invalid parameter type for 'file', expected: BlockdevRef",
        ),
        (
            json!({"driver": "qcow2", "file": {"driver": "file"}}),
            "Parameter 'file.filename' is missing",
        ),
        (json!({"node-name": "x"}), "Parameter 'driver' is missing"),
    ] {
        assert_eq!(add(options), Err(text.to_owned()));
    }
}

/// The deepest arguments that the reader of JSON lets through, on the stack of a worker thread.
#[test]
fn deep_arguments_do_not_exhaust_the_stack() {
    const JSON_NESTING: usize = 1023;
    let deep = (0..JSON_NESTING).fold(json!("f"), |file, _| {
        let mut level = json!({"driver": "qcow2"});
        level["file"] = file;
        level
    });
    let worker = std::thread::Builder::new().stack_size(2 << 20);
    let result = worker.spawn(move || add(deep)).unwrap().join().unwrap();
    assert_eq!(
        result,
        Err("Parameters are nested more than 200 levels deep".to_owned())
    );
}

#[test]
fn error_classes_are_those_of_the_schema() {
    let classes = [
        ErrorClass::GenericError,
        ErrorClass::CommandNotFound,
        ErrorClass::DeviceNotActive,
        ErrorClass::DeviceNotFound,
        ErrorClass::KvmMissingCap,
    ];
    assert_eq!(
        classes.map(ErrorClass::as_str),
        QapiErrorClass::ALL.map(QapiErrorClass::as_str)
    );
}

#[test]
fn events_have_a_name_data_and_time() {
    let at = Timestamp {
        seconds: 7,
        microseconds: 8,
    };
    let event = Event::from(events::Shutdown {
        guest: false,
        reason: ShutdownCause::HostSignal,
    });
    assert_eq!(event.name(), "SHUTDOWN");
    let expected = json!({
        "event": "SHUTDOWN",
        "data": {"guest": false, "reason": "host-signal"},
        "timestamp": {"seconds": 7, "microseconds": 8},
    });
    assert_eq!(event.into_value(at), expected);
}
