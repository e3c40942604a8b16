//! The grammar of `if`: an identifier, or `all`, `any`, `not` of conditions.

use crate::ast::Cond;
use crate::diagnostic::{Diagnostic, Sink};
use crate::parse::{Name, Node, Value};

/// Reads a condition. The tree's depth is limited by the parser.
pub(super) fn parse(node: Node, sink: &mut Sink) -> Option<Cond> {
    match node.value {
        Value::String(text) => {
            let mut chars = text.chars();
            let sound = chars.next().is_some_and(|c| c.is_ascii_uppercase())
                && chars.all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_');
            if !sound {
                let message = format!("'if' condition '{text}' is not a valid identifier");
                sink.push(
                    Diagnostic::error(node.span, message)
                        .note("identifiers are upper case letters, digits and '_'"),
                );
                return None;
            }
            Some(Cond::Is(text))
        }
        Value::Object(members) => {
            let mut members = members.into_iter();
            let Some((key, value)) = members.next() else {
                sink.error(node.span, "'if' condition {} is useless");
                return None;
            };
            if let Some((second, _)) = members.next() {
                let message = format!(
                    "'if' condition has conflicting keys '{}' and '{}'",
                    key.text, second.text
                );
                sink.push(Diagnostic::error(second.span, message).note("nest them instead"));
                return None;
            }
            operator(&key, value, sink)
        }
        _ => {
            sink.error(node.span, "'if' condition must be a string or an object");
            None
        }
    }
}

fn operator(key: &Name, value: Node, sink: &mut Sink) -> Option<Cond> {
    match key.text.as_str() {
        "not" => Some(Cond::Not(Box::new(parse(value, sink)?))),
        "all" | "any" => {
            let Value::Array(items) = value.value else {
                let message = format!("'{}' condition must be an array", key.text);
                sink.error(value.span, message);
                return None;
            };
            if items.is_empty() {
                sink.error(
                    value.span,
                    format!("'{}' condition [] is useless", key.text),
                );
                return None;
            }
            let parts: Vec<Option<Cond>> =
                items.into_iter().map(|item| parse(item, sink)).collect();
            let parts = parts.into_iter().collect::<Option<Vec<Cond>>>()?;
            Some(match key.text.as_str() {
                "all" => Cond::All(parts),
                _ => Cond::Any(parts),
            })
        }
        other => {
            sink.push(
                Diagnostic::error(
                    key.span,
                    format!("'if' condition has unknown key '{other}'"),
                )
                .note("valid keys are 'all', 'any', 'not'"),
            );
            None
        }
    }
}
