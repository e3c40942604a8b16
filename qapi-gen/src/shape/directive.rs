//! `include` and `pragma`.

use std::collections::BTreeSet;

use crate::ast::{Name, Pragma};
use crate::diagnostic::{Diagnostic, Sink};
use crate::ir::Span;
use crate::parse::{Node, Value};

/// What an expression that is no definition asks for.
pub(crate) enum Directive {
    /// Read this file here.
    Include(Name),
    /// The pragma was taken in, or was wrong.
    Pragma,
}

/// The names of all pragmas.
const PRAGMAS: [&str; 5] = [
    "doc-required",
    "command-name-exceptions",
    "command-returns-exceptions",
    "documentation-exceptions",
    "member-name-exceptions",
];

/// Whether `node` is a directive; pragmas are applied at once. `Err` gives a definition back.
/// `Ok(None)` is a directive that is wrong and was reported.
pub(crate) fn directive(
    node: Node,
    pragma: &mut Pragma,
    sink: &mut Sink,
) -> Result<Option<Directive>, Node> {
    let Value::Object(members) = &node.value else {
        return Err(node);
    };
    let Some(at) = members
        .iter()
        .position(|(key, _)| key.text == "include" || key.text == "pragma")
    else {
        return Err(node);
    };
    let (key, value) = &members[at];
    if members.len() > 1 {
        let extra = members.iter().find(|(other, _)| other.span != key.span);
        let place = extra.map_or(node.span, |(other, _)| other.span);
        let message = format!("invalid '{}' directive: it must be the only key", key.text);
        sink.error(place, message);
        return Ok(None);
    }
    if key.text == "include" {
        let Value::String(text) = &value.value else {
            sink.error(value.span, "value of 'include' must be a string");
            return Ok(None);
        };
        let name = Name {
            text: text.clone(),
            span: value.span,
        };
        return Ok(Some(Directive::Include(name)));
    }
    apply(value, pragma, sink);
    Ok(Some(Directive::Pragma))
}

fn apply(node: &Node, pragma: &mut Pragma, sink: &mut Sink) {
    let Value::Object(settings) = &node.value else {
        sink.error(node.span, "value of 'pragma' must be an object");
        return;
    };
    for (key, value) in settings {
        let list = match key.text.as_str() {
            "doc-required" => {
                match value.value {
                    Value::Bool(required) => pragma.doc_required = required,
                    _ => sink.error(value.span, "pragma 'doc-required' must be boolean"),
                }
                continue;
            }
            "command-name-exceptions" => &mut pragma.command_name_exceptions,
            "command-returns-exceptions" => &mut pragma.command_returns_exceptions,
            "documentation-exceptions" => &mut pragma.documentation_exceptions,
            "member-name-exceptions" => &mut pragma.member_name_exceptions,
            other => {
                let error = Diagnostic::error(key.span, format!("unknown pragma '{other}'"));
                sink.push(error.suggest(other, PRAGMAS));
                continue;
            }
        };
        match strings(value) {
            Ok(names) => *list = names,
            Err(place) => {
                let message = format!("pragma '{}' must be a list of strings", key.text);
                sink.error(place, message);
            }
        }
    }
}

/// A list of strings, or the place of what is not one.
fn strings(node: &Node) -> Result<BTreeSet<String>, Span> {
    let Value::Array(items) = &node.value else {
        return Err(node.span);
    };
    items
        .iter()
        .map(|item| match &item.value {
            Value::String(text) => Ok(text.clone()),
            _ => Err(item.span),
        })
        .collect()
}
