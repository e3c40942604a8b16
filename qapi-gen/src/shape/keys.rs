//! The closed set of keys that an expression may have.

use crate::diagnostic::{Diagnostic, Sink};
use crate::ir::Span;
use crate::parse::{Name, Node};

/// The keys of an expression that were not asked for yet.
pub(super) struct Keys {
    what: &'static str,
    span: Span,
    left: Vec<(Name, Node)>,
}

impl Keys {
    /// The keys of an expression of kind `what` (`struct`, `feature`).
    pub(super) fn new(what: &'static str, span: Span, members: Vec<(Name, Node)>) -> Keys {
        Keys {
            what,
            span,
            left: members,
        }
    }

    pub(super) fn what(&self) -> &'static str {
        self.what
    }

    pub(super) fn span(&self) -> Span {
        self.span
    }

    /// The value of a key, if it is there.
    pub(super) fn take(&mut self, key: &str) -> Option<Node> {
        let at = self.left.iter().position(|(name, _)| name.text == key)?;
        Some(self.left.remove(at).1)
    }

    /// The value of a key that must be there.
    pub(super) fn require(&mut self, key: &str, sink: &mut Sink) -> Option<Node> {
        let found = self.take(key);
        if found.is_none() {
            // The opening brace: the whole expression may be pages long.
            let place = Span {
                end: self.span.start + 1,
                ..self.span
            };
            sink.error(place, format!("{} misses key '{key}'", self.what));
        }
        found
    }

    /// Reports the keys that nobody asked for.
    pub(super) fn finish(self, sink: &mut Sink) {
        let valid = valid(self.what);
        let list: Vec<String> = valid.iter().map(|key| format!("'{key}'")).collect();
        for (name, _) in &self.left {
            let message = format!("{} has unknown key '{}'", self.what, name.text);
            sink.push(
                Diagnostic::error(name.span, message)
                    .suggest(&name.text, valid.iter().copied())
                    .note(format!("valid keys are {}", list.join(", "))),
            );
        }
    }
}

/// The keys of each kind of expression.
fn valid(what: &str) -> &'static [&'static str] {
    match what {
        "enum" => &["data", "enum", "features", "if", "prefix"],
        "enum value" => &["features", "if", "name"],
        "struct" => &["base", "data", "features", "if", "struct"],
        "union" => &["base", "data", "discriminator", "features", "if", "union"],
        "alternate" => &["alternate", "data", "features", "if"],
        "command" => &[
            "allow-oob",
            "allow-preconfig",
            "boxed",
            "command",
            "coroutine",
            "data",
            "features",
            "gen",
            "if",
            "returns",
            "success-response",
        ],
        "event" => &["boxed", "data", "event", "features", "if"],
        "member" => &["features", "if", "type"],
        "branch" => &["if", "type"],
        "feature" => &["if", "name"],
        _ => &[],
    }
}
