//! The tree to definitions: which keys an expression has, and of what kind their values are.
//!
//! Each rule reports at the key or value that breaks it; the definition is then marked broken and
//! the rest of it is still looked at.

mod cond;
mod directive;
mod keys;

pub(crate) use directive::{Directive, directive};

use crate::ast::{
    Base, Branch, Command, Cond, Data, Definition, EnumValue, Event, Feature, Kind, Member, Name,
    TypeRef, Union,
};
use crate::diagnostic::{Diagnostic, Sink};
use crate::ir::Span;
use crate::parse::{Node, Value};
use keys::Keys;

/// The keywords that introduce a definition.
const META_TYPES: [&str; 6] = ["enum", "struct", "union", "alternate", "command", "event"];

/// Turns an expression into a definition. `None` if not even its name can be told.
pub(crate) fn definition(node: Node, sink: &mut Sink) -> Option<Definition> {
    let span = node.span;
    let Value::Object(members) = node.value else {
        return None;
    };
    let metas: Vec<(&'static str, &Name)> = members
        .iter()
        .filter_map(|(key, _)| {
            let meta = META_TYPES.iter().find(|meta| **meta == key.text)?;
            Some((*meta, key))
        })
        .collect();
    let list = "'enum', 'struct', 'union', 'alternate', 'command', 'event'";
    let message = format!("expression must have exactly one key {list}");
    let meta = match metas.as_slice() {
        [(meta, _)] => *meta,
        [] => {
            let place = members.first().map_or(span, |(key, _)| key.span);
            let mut error = Diagnostic::error(place, message);
            for (key, _) in &members {
                error = error.suggest(&key.text, META_TYPES);
            }
            sink.push(error);
            return None;
        }
        [(_, first), (_, second), ..] => {
            sink.push(
                Diagnostic::error(second.span, message)
                    .note_at(first.span, "the other one is here"),
            );
            return None;
        }
    };
    let errors_before = sink.error_count();
    let mut keys = Keys::new(meta, span, members);
    let name = match keys.take(meta) {
        Some(Node {
            value: Value::String(text),
            span,
        }) => Name { text, span },
        Some(other) => {
            sink.error(other.span, format!("'{meta}' requires a string name"));
            return None;
        }
        None => return None,
    };
    let mut shaper = Shaper { sink };
    let cond = shaper.cond(&mut keys);
    let features = shaper.features(&mut keys);
    let kind = match meta {
        "enum" => shaper.enumeration(&mut keys),
        "struct" => shaper.structure(&mut keys),
        "union" => shaper.union(&mut keys),
        "alternate" => shaper.alternate(&mut keys),
        "command" => shaper.command(&mut keys),
        _ => shaper.event(&mut keys),
    };
    keys.finish(shaper.sink);
    let broken = shaper.sink.error_count() > errors_before;
    Some(Definition {
        name,
        kind,
        cond,
        features,
        doc: None,
        module: 0,
        broken,
    })
}

/// The readers of values, all of which report to one sink.
struct Shaper<'a> {
    sink: &'a mut Sink,
}

impl Shaper<'_> {
    fn enumeration(&mut self, keys: &mut Keys) -> Kind {
        if let Some(prefix) = keys.take("prefix")
            && !matches!(prefix.value, Value::String(_))
        {
            self.sink.error(prefix.span, "'prefix' must be a string");
        }
        let mut values = Vec::new();
        match keys.require("data", self.sink) {
            Some(Node {
                value: Value::Array(items),
                ..
            }) => {
                values.extend(items.into_iter().filter_map(|item| self.enum_value(item)));
            }
            Some(other) => self.sink.error(other.span, "'data' must be an array"),
            None => {}
        }
        Kind::Enum(values)
    }

    fn enum_value(&mut self, node: Node) -> Option<EnumValue> {
        let span = node.span;
        match node.value {
            Value::String(text) => Some(EnumValue {
                name: Name { text, span },
                cond: None,
                features: Vec::new(),
            }),
            Value::Object(members) => {
                let mut keys = Keys::new("enum value", span, members);
                let name = self.name_key(&mut keys);
                let cond = self.cond(&mut keys);
                let features = self.features(&mut keys);
                keys.finish(self.sink);
                Some(EnumValue {
                    name: name?,
                    cond,
                    features,
                })
            }
            _ => {
                self.sink
                    .error(span, "enum value must be a string or an object");
                None
            }
        }
    }

    /// The key `name` of a value or feature in its long form.
    fn name_key(&mut self, keys: &mut Keys) -> Option<Name> {
        match keys.require("name", self.sink)? {
            Node {
                value: Value::String(text),
                span,
            } => Some(Name { text, span }),
            other => {
                let message = format!("{} requires a string name", keys.what());
                self.sink.error(other.span, message);
                None
            }
        }
    }

    fn structure(&mut self, keys: &mut Keys) -> Kind {
        let base = keys.take("base").and_then(|node| match node.value {
            Value::String(text) => Some(Name {
                text,
                span: node.span,
            }),
            _ => {
                self.sink.error(node.span, "'base' should be a type name");
                None
            }
        });
        let members = match keys.require("data", self.sink) {
            Some(node) => self.members_of(node, "'data' should be an object"),
            None => Vec::new(),
        };
        Kind::Struct { base, members }
    }

    fn union(&mut self, keys: &mut Keys) -> Kind {
        let base = match keys.require("base", self.sink) {
            Some(Node {
                value: Value::String(text),
                span,
            }) => Base::Named(Name { text, span }),
            Some(node) => {
                Base::Inline(self.members_of(node, "'base' should be an object or type name"))
            }
            None => Base::Inline(Vec::new()),
        };
        let discriminator = match keys.require("discriminator", self.sink) {
            Some(Node {
                value: Value::String(text),
                span,
            }) => Some(Name { text, span }),
            Some(other) => {
                self.sink
                    .error(other.span, "'discriminator' must be a string");
                None
            }
            None => None,
        };
        let branches = self.branches(keys);
        // A missing discriminator has been reported: the definition is broken and this name is
        // never looked up.
        let discriminator = discriminator.unwrap_or_else(|| Name {
            text: String::new(),
            span: keys.span(),
        });
        Kind::Union(Union {
            base,
            discriminator,
            branches,
        })
    }

    fn alternate(&mut self, keys: &mut Keys) -> Kind {
        let branches = self.branches(keys);
        Kind::Alternate(branches)
    }

    fn branches(&mut self, keys: &mut Keys) -> Vec<Branch> {
        let is_alternate = keys.what() == "alternate";
        let (span, members) = match keys.require("data", self.sink) {
            Some(Node {
                value: Value::Object(members),
                span,
            }) => (span, members),
            Some(other) => {
                self.sink.error(other.span, "'data' must be an object");
                return Vec::new();
            }
            None => return Vec::new(),
        };
        if is_alternate && members.is_empty() {
            self.sink.error(span, "'data' must not be empty");
        }
        let mut branches = Vec::new();
        for (name, node) in members {
            let (ty, mut rest) = self.type_or_long_form(&name, node, "branch");
            let cond = rest.as_mut().and_then(|keys| self.cond(keys));
            if let Some(keys) = rest {
                keys.finish(self.sink);
            }
            match ty {
                Some(ty) if ty.array && !is_alternate => {
                    let message = format!("branch '{}' cannot be an array", name.text);
                    self.sink.error(ty.name.span, message);
                }
                Some(ty) => branches.push(Branch { name, ty, cond }),
                None => {}
            }
        }
        branches
    }

    fn command(&mut self, keys: &mut Keys) -> Kind {
        let returns = keys.take("returns").and_then(|node| match node.value {
            Value::Object(_) => {
                self.sink
                    .error(node.span, "'returns' should be a type name");
                None
            }
            _ => self.type_ref(node, "'returns'"),
        });
        let boxed = self.flag(keys, "boxed", true);
        let data = self.data(keys, boxed);
        let command = Command {
            data,
            returns,
            boxed,
            generate: self.flag(keys, "gen", false).is_none(),
            success_response: self.flag(keys, "success-response", false).is_none(),
            allow_oob: false,
            allow_preconfig: self.flag(keys, "allow-preconfig", true).is_some(),
            coroutine: false,
        };
        let oob = self.flag(keys, "allow-oob", true);
        let coroutine = self.flag(keys, "coroutine", true);
        if let (Some(oob), Some(coroutine)) = (oob, coroutine) {
            let message = "flags 'allow-oob' and 'coroutine' are incompatible";
            let error = Diagnostic::error(coroutine, message);
            self.sink
                .push(error.note_at(oob, "'allow-oob' is set here"));
        }
        Kind::Command(Command {
            allow_oob: oob.is_some(),
            coroutine: coroutine.is_some(),
            ..command
        })
    }

    fn event(&mut self, keys: &mut Keys) -> Kind {
        let boxed = self.flag(keys, "boxed", true);
        let data = self.data(keys, boxed);
        Kind::Event(Event { data, boxed })
    }

    /// A flag, which may only be written with the value that is not its default: where it is set.
    fn flag(&mut self, keys: &mut Keys, key: &str, only: bool) -> Option<Span> {
        let node = keys.take(key)?;
        match node.value {
            Value::Bool(value) if value == only => Some(node.span),
            _ => {
                let message = format!("flag '{key}' may only use {only} value");
                self.sink.error(node.span, message);
                None
            }
        }
    }

    fn data(&mut self, keys: &mut Keys, boxed: Option<Span>) -> Data {
        let Some(node) = keys.take("data") else {
            if let Some(span) = boxed {
                self.sink.error(span, "'boxed': true requires 'data'");
            }
            return Data::None;
        };
        match (node.value, boxed) {
            (Value::String(text), _) => Data::Named(Name {
                text,
                span: node.span,
            }),
            (Value::Array(_), _) => {
                self.sink.error(node.span, "'data' cannot be an array");
                Data::None
            }
            (_, Some(boxed)) => {
                let error = Diagnostic::error(node.span, "'data' should be a type name");
                self.sink
                    .push(error.note_at(boxed, "because of 'boxed': true"));
                Data::None
            }
            (value, None) => {
                let node = Node {
                    value,
                    span: node.span,
                };
                Data::Inline(self.members_of(node, "'data' should be an object or type name"))
            }
        }
    }

    fn members_of(&mut self, node: Node, otherwise: &str) -> Vec<Member> {
        let Value::Object(pairs) = node.value else {
            self.sink.error(node.span, otherwise);
            return Vec::new();
        };
        let mut members = Vec::new();
        for (key, node) in pairs {
            let (name, optional) = match key.text.strip_prefix('*') {
                Some(rest) => (
                    Name {
                        text: rest.to_owned(),
                        span: key.span,
                    },
                    true,
                ),
                None => (key, false),
            };
            let (ty, mut rest) = self.type_or_long_form(&name, node, "member");
            let cond = rest.as_mut().and_then(|keys| self.cond(keys));
            let features = match &mut rest {
                Some(keys) => self.features(keys),
                None => Vec::new(),
            };
            if let Some(keys) = rest {
                keys.finish(self.sink);
            }
            if let Some(ty) = ty {
                members.push(Member {
                    name,
                    optional,
                    ty,
                    cond,
                    features,
                });
            }
        }
        members
    }

    /// `TYPE` or `{ 'type': TYPE, ... }`; for the latter also the other keys.
    fn type_or_long_form(
        &mut self,
        name: &Name,
        node: Node,
        role: &'static str,
    ) -> (Option<TypeRef>, Option<Keys>) {
        match node.value {
            Value::Object(members) => {
                let mut keys = Keys::new(role, node.span, members);
                let ty = keys.require("type", self.sink);
                let ty = ty.and_then(|ty| match ty.value {
                    Value::Object(_) => {
                        let message = format!("type of {role} '{}' must be a type name", name.text);
                        self.sink.error(ty.span, message);
                        None
                    }
                    _ => self.type_ref(ty, &format!("{role} '{}'", name.text)),
                });
                (ty, Some(keys))
            }
            _ => (
                self.type_ref(node, &format!("{role} '{}'", name.text)),
                None,
            ),
        }
    }

    fn type_ref(&mut self, node: Node, what: &str) -> Option<TypeRef> {
        match node.value {
            Value::String(text) => {
                let name = Name {
                    text,
                    span: node.span,
                };
                Some(TypeRef { name, array: false })
            }
            Value::Array(mut items) => match (items.pop(), items.is_empty()) {
                (
                    Some(Node {
                        value: Value::String(text),
                        span,
                    }),
                    true,
                ) => {
                    let name = Name { text, span };
                    Some(TypeRef { name, array: true })
                }
                _ => {
                    let message = format!("{what}: array type must contain single type name");
                    self.sink.error(node.span, message);
                    None
                }
            },
            _ => {
                self.sink
                    .error(node.span, format!("{what} should be a type name"));
                None
            }
        }
    }

    fn features(&mut self, keys: &mut Keys) -> Vec<Feature> {
        let items = match keys.take("features") {
            Some(Node {
                value: Value::Array(items),
                ..
            }) => items,
            Some(other) => {
                self.sink.error(other.span, "'features' must be an array");
                return Vec::new();
            }
            None => return Vec::new(),
        };
        let mut features = Vec::new();
        for item in items {
            let span = item.span;
            match item.value {
                Value::String(text) => {
                    let name = Name { text, span };
                    features.push(Feature { name, cond: None });
                }
                Value::Object(members) => {
                    let mut keys = Keys::new("feature", span, members);
                    let name = self.name_key(&mut keys);
                    let cond = self.cond(&mut keys);
                    keys.finish(self.sink);
                    features.extend(name.map(|name| Feature { name, cond }));
                }
                _ => self
                    .sink
                    .error(span, "feature must be a string or an object"),
            }
        }
        features
    }

    fn cond(&mut self, keys: &mut Keys) -> Option<Cond> {
        let node = keys.take("if")?;
        cond::parse(node, self.sink)
    }
}
