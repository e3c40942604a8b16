//! Messages of the protocol: requests taken apart, replies put together.

use bytes::Bytes;

use qapi::rt::json::{self, Style};
use qapi::rt::{Object, QmpError, Value};

use super::service::Request;
use super::session::Capability;

/// A message that parsed as JSON, checked against the protocol.
#[derive(Debug)]
pub(super) struct Incoming {
    /// Goes back in the answer, whatever it is.
    pub(super) id: Option<Value>,
    /// What is asked, or what is wrong with the message.
    pub(super) call: Result<Call, QmpError>,
}

/// A command to run.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) request: Request,
    /// Sent with `exec-oob`.
    pub(super) oob: bool,
}

/// Whether a message overtakes the queue: decided before anything else is checked, as in QEMU.
pub(super) fn overtakes(message: &Value) -> bool {
    let has = |key: &str| message.get(key).is_some();
    message.is_object() && has("exec-oob") && !has("execute")
}

/// Takes a message apart. Members are checked in the client's order, missing ones last.
pub(super) fn take_apart(message: Value, oob_enabled: bool) -> Incoming {
    let Value::Object(mut members) = message else {
        return Incoming {
            id: None,
            call: Err(QmpError::generic("QMP input must be a JSON object")),
        };
    };
    let id = members.shift_remove("id");
    Incoming {
        id,
        call: take_call(members, oob_enabled),
    }
}

fn take_call(members: Object, oob_enabled: bool) -> Result<Call, QmpError> {
    let refuse = |key: &str, why: &str| {
        let desc = format!("QMP input member '{key}' {why}");
        Err(QmpError::generic(desc))
    };
    let mut command: Option<(String, bool)> = None;
    let mut arguments = Object::new();
    for (key, value) in members {
        let oob = match key.as_str() {
            "execute" => false,
            "exec-oob" if oob_enabled => true,
            "arguments" => {
                let Value::Object(given) = value else {
                    return refuse(&key, "must be an object");
                };
                arguments = given;
                continue;
            }
            _ => return refuse(&key, "is unexpected"),
        };
        let Value::String(name) = value else {
            return refuse(&key, "must be a string");
        };
        if command.replace((name, oob)).is_some() {
            return refuse("execute", "clashes with 'exec-oob'");
        }
    }
    let Some((name, oob)) = command else {
        return Err(QmpError::generic("QMP input lacks member 'execute'"));
    };
    let request = Request { name, arguments };
    Ok(Call { request, oob })
}

/// The first message of a session.
pub(super) fn greeting(version: Value, capabilities: &[Capability], style: Style) -> Bytes {
    let names = capabilities.iter().map(|capability| capability.as_str());
    let qmp = Object::from_iter([
        ("version".to_owned(), version),
        ("capabilities".to_owned(), names.collect()),
    ]);
    let message = Object::from_iter([("QMP".to_owned(), Value::Object(qmp))]);
    line(&message, style)
}

/// The answer to a request. The place of `id` is QEMU's: last after a value, first with an error.
pub(super) fn answer(id: Option<Value>, result: Result<Value, QmpError>, style: Style) -> Bytes {
    let mut message = Object::new();
    let id = id.map(|id| ("id".to_owned(), id));
    match result {
        Ok(value) => {
            message.insert("return".to_owned(), value);
            message.extend(id);
        }
        Err(error) => {
            message.extend(id);
            let error = Object::from_iter([
                ("class".to_owned(), Value::from(error.class.as_str())),
                ("desc".to_owned(), Value::from(error.desc)),
            ]);
            message.insert("error".to_owned(), Value::Object(error));
        }
    }
    line(&message, style)
}

/// A message as it goes out, with its line end.
pub(super) fn line(message: &Object, style: Style) -> Bytes {
    let mut out = Vec::with_capacity(128);
    json::write(&mut out, message, style);
    out.extend_from_slice(b"\r\n");
    Bytes::from(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Value {
        let mut bytes = text.as_bytes();
        json::Decoder::default().next(&mut bytes).unwrap().unwrap()
    }

    fn error(text: &str, oob_enabled: bool) -> String {
        take_apart(parse(text), oob_enabled).call.unwrap_err().desc
    }

    #[test]
    fn what_is_wrong_with_a_message_is_named() {
        let cases = [
            ("[1]", "QMP input must be a JSON object"),
            ("{}", "QMP input lacks member 'execute'"),
            (
                "{'execute':1}",
                "QMP input member 'execute' must be a string",
            ),
            (
                "{'execute':'x','arguments':null}",
                "QMP input member 'arguments' must be an object",
            ),
            (
                "{'execute':'x','b':1,'a':2}",
                "QMP input member 'b' is unexpected",
            ),
            (
                "{'exec-oob':'x'}",
                "QMP input member 'exec-oob' is unexpected",
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(error(text, false), expected, "{text}");
        }
        let clash = "QMP input member 'execute' clashes with 'exec-oob'";
        assert_eq!(error("{'execute':'x','exec-oob':'y'}", true), clash);
        assert_eq!(error("{'exec-oob':'x','execute':'y'}", true), clash);
        let kind = "QMP input member 'exec-oob' must be a string";
        assert_eq!(error("{'exec-oob':{}}", true), kind);
    }

    #[test]
    fn a_request_keeps_its_id_and_the_order_of_its_arguments() {
        let text = "{'id':[1],'execute':'x','arguments':{'b':1,'a':2}}";
        let incoming = take_apart(parse(text), false);
        assert_eq!(incoming.id, Some(parse("[1]")));
        let call = incoming.call.unwrap();
        assert!(!call.oob);
        let keys: Vec<&String> = call.request.arguments.keys().collect();
        assert_eq!(keys, ["b", "a"]);
    }

    #[test]
    fn id_is_last_after_a_value_and_first_with_an_error() {
        let value = answer(Some(Value::from(1)), Ok(Value::Null), Style::Compact);
        assert_eq!(value, "{\"return\": null, \"id\": 1}\r\n");
        let failure = Err(QmpError::generic("no"));
        let error = answer(Some(Value::from(1)), failure, Style::Compact);
        let expected =
            "{\"id\": 1, \"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\r\n";
        assert_eq!(error, expected);
    }
}
