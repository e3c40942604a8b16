//! Warnings about a schema that is correct: experimental names, types nobody uses, values nobody
//! can write.

use std::collections::BTreeSet;

use crate::Options;
use crate::ast::{Ast, Base, Data, Definition, Feature, Kind, Member, Name, TypeRef};
use crate::check::{names, own_members};
use crate::diagnostic::{Diagnostic, Sink};
use crate::resolve::{Referent, Symbols};

/// Runs all lints.
pub(super) fn check(ast: &Ast, symbols: &Symbols<'_>, options: &Options, sink: &mut Sink) {
    for definition in &ast.definitions {
        unstable(definition, sink);
    }
    similar_names(ast, sink);
    if options.warn_unused {
        unused(ast, symbols, sink);
    }
    uninhabited(ast, symbols, sink);
}

/// `x-` means experimental, but clients are told by the feature `unstable` only.
fn unstable(definition: &Definition, sink: &mut Sink) {
    if matches!(definition.kind, Kind::Command(_) | Kind::Event(_)) {
        experimental(
            &definition.name,
            &definition.features,
            definition.kind.word(),
            sink,
        );
    }
    if has_unstable(&definition.features) {
        return;
    }
    for member in own_members(&definition.kind) {
        experimental(&member.name, &member.features, "member", sink);
    }
    if let Kind::Enum(values) = &definition.kind {
        for value in values {
            experimental(&value.name, &value.features, "value", sink);
        }
    }
}

fn has_unstable(features: &[Feature]) -> bool {
    features
        .iter()
        .any(|feature| feature.name.text == "unstable")
}

fn experimental(name: &Name, features: &[Feature], role: &str, sink: &mut Sink) {
    let stem = names::stem(&name.text).unwrap_or(&name.text);
    let prefix = &name.text[..name.text.len() - stem.len()];
    if prefix.to_ascii_lowercase().ends_with("x-") && !has_unstable(features) {
        let message = format!(
            "experimental {role} '{}' lacks feature 'unstable'",
            name.text
        );
        sink.push(Diagnostic::warning(name.span, message));
    }
}

/// Commands, events or types whose names differ only in punctuation or case.
fn similar_names(ast: &Ast, sink: &mut Sink) {
    let mut seen = std::collections::BTreeMap::new();
    for definition in &ast.definitions {
        let class = match definition.kind {
            Kind::Command(_) => "command",
            Kind::Event(_) => "event",
            _ => "type",
        };
        let letters: String = definition
            .name
            .text
            .chars()
            .filter(char::is_ascii_alphanumeric)
            .map(|c| c.to_ascii_lowercase())
            .collect();
        let name = &definition.name;
        if let Some(first) = seen.insert((class, letters), name) {
            let message = format!(
                "{class} '{}' differs from '{}' only in punctuation or case",
                name.text, first.text
            );
            let warning = Diagnostic::warning(name.span, message);
            sink.push(warning.note_at(first.span, "the other one is here"));
        }
    }
}

/// Types that no command and no event leads to.
fn unused(ast: &Ast, symbols: &Symbols<'_>, sink: &mut Sink) {
    let mut reached: BTreeSet<usize> = BTreeSet::new();
    let mut queue: Vec<usize> = Vec::new();
    for (index, definition) in ast.definitions.iter().enumerate() {
        if matches!(definition.kind, Kind::Command(_) | Kind::Event(_)) {
            reached.insert(index);
            queue.push(index);
        }
    }
    if queue.is_empty() {
        // A schema of types alone is a library for others.
        return;
    }
    while let Some(index) = queue.pop() {
        for name in uses(&ast.definitions[index]) {
            if let Some(Referent::Definition(used, _)) = symbols.find_type(&name.text)
                && reached.insert(used)
            {
                queue.push(used);
            }
        }
    }
    for (index, definition) in ast.definitions.iter().enumerate() {
        if !reached.contains(&index) {
            let (word, name) = (definition.kind.word(), &definition.name);
            let message = format!("{word} '{}' is not used by any command or event", name.text);
            sink.push(Diagnostic::warning(name.span, message));
        }
    }
}

/// Every type name that a definition mentions.
fn uses(definition: &Definition) -> Vec<&Name> {
    let mut names: Vec<&Name> = own_members(&definition.kind)
        .iter()
        .map(|member| &member.ty.name)
        .collect();
    match &definition.kind {
        Kind::Enum(_) => {}
        Kind::Struct { base, .. } => names.extend(base),
        Kind::Union(union) => {
            if let Base::Named(base) = &union.base {
                names.push(base);
            }
            names.extend(union.branches.iter().map(|branch| &branch.ty.name));
        }
        Kind::Alternate(branches) => names.extend(branches.iter().map(|branch| &branch.ty.name)),
        Kind::Command(command) => {
            names.extend(named(&command.data));
            names.extend(command.returns.as_ref().map(|ty| &ty.name));
        }
        Kind::Event(event) => names.extend(named(&event.data)),
    }
    names
}

fn named(data: &Data) -> Option<&Name> {
    match data {
        Data::Named(name) => Some(name),
        _ => None,
    }
}

/// Types of which no finite value exists, because each contains another of its kind.
fn uninhabited(ast: &Ast, symbols: &Symbols<'_>, sink: &mut Sink) {
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); ast.definitions.len()];
    for (index, definition) in ast.definitions.iter().enumerate() {
        for name in uses(definition) {
            if let Some(Referent::Definition(used, _)) = symbols.find_type(&name.text) {
                users[used].push(index);
            }
        }
    }
    // Whenever a type is settled its users are looked at again; each use is followed once.
    let mut inhabited = vec![false; ast.definitions.len()];
    let mut queue: Vec<usize> = (0..ast.definitions.len()).collect();
    while let Some(index) = queue.pop() {
        if !inhabited[index] && has_value(&ast.definitions[index], symbols, &inhabited) {
            inhabited[index] = true;
            queue.append(&mut users[index]);
        }
    }
    for (index, definition) in ast.definitions.iter().enumerate() {
        if !inhabited[index] {
            let (word, name) = (definition.kind.word(), &definition.name);
            let message = format!("no finite value of {word} '{}' exists", name.text);
            let note = "a mandatory member leads back to it; make one optional or a list";
            sink.push(Diagnostic::warning(name.span, message).note(note));
        }
    }
}

fn has_value(definition: &Definition, symbols: &Symbols<'_>, inhabited: &[bool]) -> bool {
    let settled = |name: &Name| match symbols.find_type(&name.text) {
        Some(Referent::Definition(index, _)) => inhabited[index],
        _ => true,
    };
    let ty = |ty: &TypeRef| ty.array || settled(&ty.name);
    let members = |members: &[Member]| {
        members
            .iter()
            .all(|member| member.optional || ty(&member.ty))
    };
    match &definition.kind {
        Kind::Struct { base, .. } => {
            base.as_ref().is_none_or(settled) && members(own_members(&definition.kind))
        }
        Kind::Union(union) => {
            let base = match &union.base {
                Base::Named(name) => settled(name),
                Base::Inline(own) => members(own),
            };
            let values = super::discriminator_enum(union, symbols).map(|(_, tag)| &tag.kind);
            let uncovered = match values {
                Some(Kind::Enum(values)) => values.len() > union.branches.len(),
                _ => true,
            };
            base && (uncovered || union.branches.iter().any(|branch| settled(&branch.ty.name)))
        }
        Kind::Alternate(branches) => branches.iter().any(|branch| ty(&branch.ty)),
        Kind::Enum(_) | Kind::Command(_) | Kind::Event(_) => true,
    }
}
