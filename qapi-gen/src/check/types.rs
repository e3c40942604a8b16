//! Which types may stand where: bases, discriminators, branches, arguments, return values,
//! features.

use std::collections::{BTreeMap, BTreeSet};

use crate::Dialect;
use crate::ast::{
    Ast, Base, Branch, Command, Data, Definition, EnumValue, Feature, Kind, Member, Name, Union,
};
use crate::check::{
    by_name, data_of, discriminator_enum, inherited_member, names::c_name, own_members,
    type_in_words,
};
use crate::diagnostic::{Diagnostic, Sink};
use crate::ir::{Builtin, Span};
use crate::limits::MAX_FEATURES;
use crate::resolve::{Referent, Symbols};

/// Checks a definition whose shape is sound.
pub(super) fn check(
    definition: &Definition,
    ast: &Ast,
    symbols: &Symbols<'_>,
    dialect: Dialect,
    sink: &mut Sink,
) {
    let is_type = data_of(&definition.kind).is_none();
    unique_features(&definition.features, sink);
    for feature in &definition.features {
        if is_type && ["deprecated", "unstable"].contains(&feature.name.text.as_str()) {
            let message = format!("feature '{}' is not supported for types", feature.name.text);
            sink.error(feature.name.span, message);
        }
    }
    for member in own_members(&definition.kind) {
        unique_features(&member.features, sink);
    }
    match &definition.kind {
        Kind::Enum(values) => enumeration(values, sink),
        Kind::Struct { base, .. } => {
            if let Some(base) = base {
                struct_base(base, symbols, sink);
            }
        }
        Kind::Union(union) => check_union(definition, union, symbols, sink),
        Kind::Alternate(branches) => alternate(branches, symbols, sink),
        Kind::Command(command) => {
            arguments("command", &command.data, command.boxed, symbols, sink);
            if dialect == Dialect::Modern {
                returns(definition, command, ast, symbols, sink);
            }
        }
        Kind::Event(event) => arguments("event", &event.data, event.boxed, symbols, sink),
    }
}

/// QEMU keeps features in a 64-bit set.
pub(super) fn feature_count(ast: &Ast, sink: &mut Sink) {
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    let mut complained = false;
    for definition in &ast.definitions {
        let members = own_members(&definition.kind)
            .iter()
            .flat_map(|member| &member.features);
        let values: &[EnumValue] = match &definition.kind {
            Kind::Enum(values) => values,
            _ => &[],
        };
        let values = values.iter().flat_map(|value| &value.features);
        for feature in definition.features.iter().chain(members).chain(values) {
            seen.insert(&feature.name.text);
            if seen.len() > MAX_FEATURES && !complained {
                complained = true;
                let message = format!("Maximum of {MAX_FEATURES} schema features is permitted");
                sink.error(feature.name.span, message);
            }
        }
    }
}

fn unique_features(features: &[Feature], sink: &mut Sink) {
    let names = features.iter().map(|feature| &feature.name);
    unique(names, "feature", sink);
}

/// Reports names that are equal as identifiers.
fn unique<'a>(names: impl Iterator<Item = &'a Name>, role: &str, sink: &mut Sink) {
    let mut seen: BTreeMap<String, &Name> = BTreeMap::new();
    for name in names {
        let key = c_name(&name.text);
        match seen.get(&key) {
            Some(first) => {
                let message = format!(
                    "{role} '{}' collides with {role} '{}'",
                    name.text, first.text
                );
                let error = Diagnostic::error(name.span, message);
                sink.push(error.note_at(first.span, "the first one is here"));
            }
            None => {
                seen.insert(key, name);
            }
        }
    }
}

fn enumeration(values: &[EnumValue], sink: &mut Sink) {
    unique(values.iter().map(|value| &value.name), "value", sink);
    for value in values {
        unique_features(&value.features, sink);
    }
}

/// A base must be a struct: its members are fixed.
fn struct_base(base: &Name, symbols: &Symbols<'_>, sink: &mut Sink) {
    match symbols.find_type(&base.text) {
        Some(Referent::Definition(_, definition))
            if matches!(definition.kind, Kind::Struct { .. }) => {}
        Some(other) => {
            let words = type_in_words(&base.text, other);
            let error = Diagnostic::error(
                base.span,
                format!("'base' requires a struct type, {words} isn't"),
            );
            sink.push(at_definition(error, other));
        }
        None => {}
    }
}

fn at_definition(error: Diagnostic, referent: Referent<'_>) -> Diagnostic {
    match referent {
        Referent::Definition(_, definition) => {
            error.note_at(definition.name.span, "it is defined here")
        }
        Referent::Builtin(_) => error,
    }
}

fn check_union(definition: &Definition, union: &Union, symbols: &Symbols<'_>, sink: &mut Sink) {
    if let Base::Named(base) = &union.base {
        struct_base(base, symbols, sink);
    }
    for branch in &union.branches {
        match symbols.find_type(&branch.ty.name.text) {
            Some(Referent::Definition(_, target))
                if matches!(target.kind, Kind::Struct { .. } | Kind::Union(_)) => {}
            Some(other) => {
                let words = type_in_words(&branch.ty.name.text, other);
                let message = format!("branch '{}' cannot use {words}", branch.name.text);
                sink.push(at_definition(
                    Diagnostic::error(branch.ty.name.span, message),
                    other,
                ));
            }
            None => {}
        }
    }
    discriminator(union, symbols, sink);
    let Some((_, tag)) = discriminator_enum(union, symbols).filter(|(_, tag)| !tag.broken) else {
        return;
    };
    let Kind::Enum(values) = &tag.kind else {
        return;
    };
    if values.is_empty() {
        let error = Diagnostic::error(definition.name.span, "union has no branches");
        let note = format!("enum '{}' has no values", tag.name.text);
        sink.push(error.note_at(tag.name.span, note));
    }
    for branch in &union.branches {
        if values
            .iter()
            .any(|value| value.name.text == branch.name.text)
        {
            continue;
        }
        let message = format!(
            "branch '{}' is not a value of enum type '{}'",
            branch.name.text, tag.name.text
        );
        let known = values.iter().map(|value| value.name.text.as_str());
        sink.push(
            Diagnostic::error(branch.name.span, message)
                .note_at(tag.name.span, "the enum is defined here")
                .suggest(&branch.name.text, known),
        );
    }
}

fn discriminator(union: &Union, symbols: &Symbols<'_>, sink: &mut Sink) {
    let name = &union.discriminator;
    let (member, base) = match &union.base {
        Base::Inline(members) => (by_name(members, &name.text), "'base'".to_owned()),
        Base::Named(base) => {
            match symbols.find(&base.text) {
                Some((_, definition)) if !definition.broken => {}
                // Reported already.
                _ => return,
            }
            let found = inherited_member(&base.text, &name.text, symbols);
            (found, format!("'base' type '{}'", base.text))
        }
    };
    let Some(member) = member else {
        let message = format!("discriminator '{}' is not a member of {base}", name.text);
        let mut error = Diagnostic::error(name.span, message);
        if let Base::Inline(members) = &union.base {
            let known = members.iter().map(|member| member.name.text.as_str());
            error = error.suggest(&name.text, known);
        }
        sink.push(error);
        return;
    };
    let mut complain = |what: &str| {
        let message = format!("discriminator '{}' {what}", name.text);
        let error = Diagnostic::error(name.span, message);
        sink.push(error.note_at(member.name.span, "the member is defined here"));
    };
    let known = symbols.find_type(&member.ty.name.text).is_some();
    if known && discriminator_enum(union, symbols).is_none() {
        complain("must be of enum type");
    }
    if member.optional {
        complain("must not be optional");
    }
    if member.cond.is_some() {
        complain("must not be conditional");
    }
}

/// The kinds of JSON value by which an alternate tells its branches apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Json {
    Null,
    Bool,
    Number,
    String,
    Array,
    Object,
}

/// At most one branch per kind of JSON value. On the command line everything is a string, so a
/// string must not look like a boolean or number that another branch takes.
fn alternate(branches: &[Branch], symbols: &Symbols<'_>, sink: &mut Sink) {
    unique(branches.iter().map(|branch| &branch.name), "branch", sink);
    let mut seen: BTreeMap<Json, &Name> = BTreeMap::new();
    for branch in branches {
        let Some(referent) = symbols.find_type(&branch.ty.name.text) else {
            continue;
        };
        let Some(kinds) = json_kinds(branch, referent) else {
            let words = type_in_words(&branch.ty.name.text, referent);
            let message = format!("branch '{}' cannot use {words}", branch.name.text);
            sink.push(at_definition(
                Diagnostic::error(branch.ty.name.span, message),
                referent,
            ));
            continue;
        };
        if let Some(first) = kinds.iter().find_map(|kind| seen.get(kind)) {
            let message = format!(
                "branch '{}' can't be distinguished from '{}'",
                branch.name.text, first.text
            );
            let error = Diagnostic::error(branch.name.span, message);
            sink.push(error.note_at(first.span, "the other branch is here"));
        }
        for kind in kinds {
            seen.entry(kind).or_insert(&branch.name);
        }
    }
}

/// The kinds of JSON value that a branch occupies; `None` if its type may not be used.
fn json_kinds(branch: &Branch, referent: Referent<'_>) -> Option<Vec<Json>> {
    if branch.ty.array {
        return Some(vec![Json::Array]);
    }
    let kinds = match referent {
        Referent::Builtin(builtin) => match builtin {
            Builtin::Any => return None,
            Builtin::Null => vec![Json::Null],
            Builtin::Bool => vec![Json::Bool],
            Builtin::Str => vec![Json::String, Json::Number, Json::Bool],
            Builtin::QType => vec![Json::String],
            _ => vec![Json::Number],
        },
        Referent::Definition(_, definition) => match &definition.kind {
            Kind::Struct { .. } | Kind::Union(_) => vec![Json::Object],
            Kind::Enum(values) => {
                let mut kinds = vec![Json::String];
                let any = |test: fn(&str) -> bool| values.iter().any(|v| test(&v.name.text));
                if any(|name| name == "on" || name == "off") {
                    kinds.push(Json::Bool);
                }
                if any(|name| name.starts_with(|c: char| c.is_ascii_digit() || "-+.".contains(c))) {
                    kinds.push(Json::Number);
                }
                kinds
            }
            _ => return None,
        },
    };
    Some(kinds)
}

fn arguments(word: &str, data: &Data, boxed: Option<Span>, symbols: &Symbols<'_>, sink: &mut Sink) {
    let mut conditional: Option<&Member> = None;
    match data {
        Data::None => {}
        Data::Inline(members) => conditional = members.iter().find(|m| m.cond.is_some()),
        Data::Named(name) => match symbols.find_type(&name.text) {
            Some(Referent::Definition(_, definition)) => match &definition.kind {
                Kind::Struct { .. } => conditional = conditional_member(&name.text, symbols),
                Kind::Union(_) if boxed.is_some() => {}
                Kind::Union(_) => {
                    let message = format!(
                        "{word}'s 'data' can take union type '{}' only with 'boxed': true",
                        name.text
                    );
                    sink.error(name.span, message);
                }
                _ => cannot_take(word, "data", name, symbols, sink),
            },
            Some(Referent::Builtin(_)) => cannot_take(word, "data", name, symbols, sink),
            None => {}
        },
    }
    if let Some(member) = conditional
        && boxed.is_none()
    {
        let message = format!("conditional {word} arguments require 'boxed': true");
        let place = match data {
            Data::Named(name) => name.span,
            _ => member.name.span,
        };
        let note = format!("member '{}' is conditional", member.name.text);
        sink.push(Diagnostic::error(place, message).note_at(member.name.span, note));
    }
}

/// The first conditional member of a struct or of what it derives from.
fn conditional_member<'a>(name: &str, symbols: &Symbols<'a>) -> Option<&'a Member> {
    let mut name = name;
    for _ in 0..=crate::limits::MAX_DERIVATION {
        let (_, definition) = symbols.find(name)?;
        let Kind::Struct { base, members } = &definition.kind else {
            return None;
        };
        if let Some(member) = members.iter().find(|member| member.cond.is_some()) {
            return Some(member);
        }
        name = &base.as_ref()?.text;
    }
    None
}

fn cannot_take(word: &str, key: &str, name: &Name, symbols: &Symbols<'_>, sink: &mut Sink) {
    if let Some(referent) = symbols.find_type(&name.text) {
        let words = type_in_words(&name.text, referent);
        let message = format!("{word}'s '{key}' cannot take {words}");
        sink.push(at_definition(
            Diagnostic::error(name.span, message),
            referent,
        ));
    }
}

/// Commands return objects, so that members can be added later; some old ones do not.
fn returns(
    definition: &Definition,
    command: &Command,
    ast: &Ast,
    symbols: &Symbols<'_>,
    sink: &mut Sink,
) {
    let Some(ty) = &command.returns else {
        return;
    };
    if ast
        .pragma
        .command_returns_exceptions
        .contains(&definition.name.text)
    {
        return;
    }
    match symbols.find_type(&ty.name.text) {
        Some(Referent::Definition(_, target))
            if matches!(target.kind, Kind::Struct { .. } | Kind::Union(_)) => {}
        Some(_) => cannot_take("command", "returns", &ty.name, symbols, sink),
        None => {}
    }
}
