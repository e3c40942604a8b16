//! Every example of the documents, in the schema and in qmp-commands.hx: requests must pass the
//! generated checks, and answers and events must be values of the types that the schema gives.

use std::path::Path;
use std::sync::LazyLock;

use qapi_gen::ir::{DocBlock, ExampleLine, Kind};
use qapi_gen::load::Disk;
use qapi_gen::{Options, load_hx, load_schema};

use super::dispatch;
use crate::rt::Value;

/// Examples by the command or event whose document they are in.
fn documents() -> Vec<(String, Vec<ExampleLine>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../schema");
    let mut loaded =
        load_schema(&folder.join("qapi-schema.json"), &Disk, &Options::default()).unwrap();
    let hx = load_hx(&folder.join("qmp-commands.hx"), &Disk, &mut loaded).unwrap();
    let mut documents = Vec::new();
    for def in &loaded.schema.definitions {
        if !matches!(def.kind, Kind::Command(_) | Kind::Event(_)) {
            continue;
        }
        let mut lines = Vec::new();
        for block in &def.doc.body {
            if let DocBlock::Example(example) = block {
                lines.extend(example.lines.clone());
            }
        }
        documents.push((def.name.clone(), lines));
    }
    for entry in &hx.entries {
        let document = hx.document(&entry.name.text).unwrap();
        documents.push((entry.name.text.clone(), document.lines.clone()));
    }
    documents
}

/// The entity of that name in our introspection.
fn entity(name: &str) -> &'static Value {
    static ALL: LazyLock<Vec<Value>> =
        LazyLock::new(|| serde_json::from_str(crate::introspection::SCHEMA).unwrap());
    ALL.iter().find(|info| info["name"] == name).unwrap()
}

/// Why a value is none of a type.
fn mismatch(ty: &str, value: &Value) -> Option<String> {
    let info = entity(ty);
    let fits = match info["meta-type"].as_str().unwrap() {
        "builtin" => match info["json-type"].as_str().unwrap() {
            "string" => value.is_string(),
            "int" => value.is_i64() || value.is_u64(),
            "boolean" => value.is_boolean(),
            "number" => value.is_number(),
            "null" => value.is_null(),
            _ => true,
        },
        "enum" => info["values"].as_array().unwrap().contains(value),
        "array" => {
            let element = info["element-type"].as_str().unwrap();
            let Some(values) = value.as_array() else {
                return Some(format!("{value}: no list"));
            };
            return values.iter().find_map(|value| mismatch(element, value));
        }
        "alternate" => {
            let branches = info["members"].as_array().unwrap();
            branches
                .iter()
                .any(|branch| mismatch(branch["type"].as_str().unwrap(), value).is_none())
        }
        "object" => return object_mismatch(info, value),
        other => panic!("{other} is no type"),
    };
    (!fits).then(|| format!("{value} is no {info}"))
}

fn object_mismatch(info: &Value, value: &Value) -> Option<String> {
    let Some(object) = value.as_object() else {
        return Some(format!("{value}: no object"));
    };
    let mut members = info["members"].as_array().unwrap().clone();
    if let Some(tag) = info["tag"].as_str() {
        let variants = info["variants"].as_array().unwrap();
        let Some(variant) = variants
            .iter()
            .find(|variant| variant["case"] == value[tag])
        else {
            return Some(format!("no case for {}", value[tag]));
        };
        let branch = entity(variant["type"].as_str().unwrap());
        members.extend(branch["members"].as_array().unwrap().clone());
    }
    for member in &members {
        let name = member["name"].as_str().unwrap();
        match object.get(name) {
            Some(value) => {
                let found = mismatch(member["type"].as_str().unwrap(), value);
                if found.is_some() {
                    return found;
                }
            }
            None if member.get("default").is_none() => return Some(format!("no '{name}'")),
            None => {}
        }
    }
    let known = |key: &&String| members.iter().any(|member| member["name"] == key.as_str());
    object
        .keys()
        .find(|key| !known(key))
        .map(|key| format!("'{key}' is unknown"))
}

#[test]
fn requests_pass_and_answers_have_their_types() {
    let mut messages = 0;
    for (name, lines) in documents() {
        let sent = lines
            .iter()
            .filter(|line| matches!(line, ExampleLine::Sent(..)))
            .count();
        let received = lines
            .iter()
            .filter(|line| matches!(line, ExampleLine::Received(..)))
            .count();
        let is_event = entity(&name)["meta-type"] == "event";
        assert!(
            received > 0 && (is_event || sent == received),
            "{name}: no complete example"
        );
        for line in lines {
            match line {
                ExampleLine::Sent(text, _) => check_request(&name, &text),
                ExampleLine::Received(text, _) => check_received(&name, &text),
                ExampleLine::Prose(_) => continue,
            }
            messages += 1;
        }
    }
    assert!(
        messages >= 2 * 2 * crate::COMMAND_NAMES.len(),
        "only {messages}"
    );
}

fn check_request(name: &str, text: &str) {
    let mut request: Value = serde_json::from_str(text).unwrap();
    assert_eq!(request["execute"], name, "{text}");
    let arguments = match request.get_mut("arguments") {
        Some(arguments) => arguments.take(),
        None => Value::Object(crate::rt::Object::new()),
    };
    let (answer, calls) = dispatch::run(name, arguments);
    assert_eq!(calls, 1, "{text}: {answer:?}");
}

fn check_received(name: &str, text: &str) {
    let message: Value = serde_json::from_str(text).unwrap();
    let info = entity(name);
    if info["meta-type"] == "event" {
        assert_eq!(message["event"], name);
        // Left out if there is none.
        let none = Value::Object(crate::rt::Object::new());
        let data = message.get("data").unwrap_or(&none);
        let found = mismatch(info["arg-type"].as_str().unwrap(), data);
        assert_eq!(found, None, "{text}");
        assert!(message["timestamp"]["seconds"].is_i64(), "{text}");
    } else if let Some(error) = message.get("error") {
        assert!(
            error["class"].is_string() && error["desc"].is_string(),
            "{text}"
        );
    } else {
        let found = mismatch(info["ret-type"].as_str().unwrap(), &message["return"]);
        assert_eq!(found, None, "{text}");
    }
}
