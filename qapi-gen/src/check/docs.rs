//! Documentation: it is there, what it describes exists, and what exists is described.

use std::collections::BTreeSet;

use crate::ast::{Ast, Data, Definition, EnumValue, Feature, Kind, Name};
use crate::check::{data_of, own_members};
use crate::diagnostic::{Diagnostic, Sink};
use crate::docparse::{DefinitionDoc, Section};
use crate::resolve::{Referent, Symbols};

/// Checks the documentation of a definition.
pub(super) fn check(definition: &Definition, ast: &Ast, symbols: &Symbols<'_>, sink: &mut Sink) {
    let name = &definition.name;
    let Some(doc) = &definition.doc else {
        if ast.pragma.doc_required {
            let message = format!("documentation comment required for '{}'", name.text);
            sink.error(name.span, message);
        }
        return;
    };
    sections(definition, doc, sink);
    if definition.broken {
        return;
    }
    described_members(definition, doc, ast, symbols, sink);
    features(definition, doc, sink);
}

fn sections(definition: &Definition, doc: &DefinitionDoc, sink: &mut Sink) {
    let returns = match &definition.kind {
        Kind::Command(command) => Some(command.returns.is_some()),
        _ => None,
    };
    let mut only_commands = |section: &Option<Section>, tag: &str| {
        if let (Some(section), None) = (section, returns) {
            let message = format!("'{tag}' section is only valid for commands");
            sink.error(section.span, message);
        }
    };
    only_commands(&doc.returns, "Returns");
    only_commands(&doc.errors, "Errors");
    if let (Some(section), Some(false), false) = (&doc.returns, returns, definition.broken) {
        let message = format!(
            "'Returns' section, but command '{}' doesn't return anything",
            definition.name.text
        );
        sink.error(section.span, message);
    }
}

/// What may or must be described: role and name.
fn describable(definition: &Definition) -> Vec<(&'static str, &Name)> {
    let mut names: Vec<(&str, &Name)> = own_members(&definition.kind)
        .iter()
        .map(|member| ("member", &member.name))
        .collect();
    match &definition.kind {
        Kind::Enum(values) => names.extend(values.iter().map(|value| ("value", &value.name))),
        Kind::Alternate(branches) => {
            names.extend(branches.iter().map(|branch| ("branch", &branch.name)));
        }
        _ => {}
    }
    names
}

fn described_members(
    definition: &Definition,
    doc: &DefinitionDoc,
    ast: &Ast,
    symbols: &Symbols<'_>,
    sink: &mut Sink,
) {
    let names = describable(definition);
    let mut known: Vec<&str> = names.iter().map(|(_, name)| name.text.as_str()).collect();
    if let Some(Data::Named(ty)) = data_of(&definition.kind) {
        match argument_names(&ty.text, symbols) {
            Some(inherited) => known.extend(inherited),
            // The type is unknown or broken, which has been reported.
            None => return,
        }
    }
    let set: BTreeSet<&str> = known.iter().copied().collect();
    for described in &doc.members {
        let text = &described.name.text;
        if !set.contains(text.as_str()) {
            let message = format!("documented member '{text}' does not exist");
            let error = Diagnostic::error(described.name.span, message);
            sink.push(error.suggest(text, known.iter().copied()));
        }
    }
    if ast
        .pragma
        .documentation_exceptions
        .contains(&definition.name.text)
    {
        return;
    }
    let described: BTreeSet<&str> = doc
        .members
        .iter()
        .map(|member| member.name.text.as_str())
        .collect();
    for (role, name) in names {
        if !described.contains(name.text.as_str()) {
            sink.error(
                name.span,
                format!("{role} '{}' lacks documentation", name.text),
            );
        }
    }
}

/// The names of the arguments that a named type gives, without those of union branches.
fn argument_names<'a>(ty: &str, symbols: &Symbols<'a>) -> Option<Vec<&'a str>> {
    let mut names = Vec::new();
    let mut next = Some(ty);
    let mut steps = 0;
    while let Some(name) = next {
        let Some(Referent::Definition(_, definition)) = symbols.find_type(name) else {
            return None;
        };
        if definition.broken || steps > crate::limits::MAX_DERIVATION {
            return None;
        }
        steps += 1;
        names.extend(
            own_members(&definition.kind)
                .iter()
                .map(|member| member.name.text.as_str()),
        );
        next = match &definition.kind {
            Kind::Struct { base, .. } => base.as_ref().map(|base| base.text.as_str()),
            Kind::Union(union) => match &union.base {
                crate::ast::Base::Named(base) => Some(&base.text),
                crate::ast::Base::Inline(_) => None,
            },
            _ => None,
        };
    }
    Some(names)
}

/// A feature is described once, for all that carry it: the definition, its members, its values.
fn features(definition: &Definition, doc: &DefinitionDoc, sink: &mut Sink) {
    let values: &[EnumValue] = match &definition.kind {
        Kind::Enum(values) => values,
        _ => &[],
    };
    let of_members = own_members(&definition.kind)
        .iter()
        .flat_map(|member| &member.features);
    let of_values = values.iter().flat_map(|value| &value.features);
    let all: Vec<&Feature> = definition
        .features
        .iter()
        .chain(of_members)
        .chain(of_values)
        .collect();
    let known = || all.iter().map(|feature| feature.name.text.as_str());
    for described in &doc.features {
        let text = &described.name.text;
        if !known().any(|name| name == text) {
            let message = format!("documented feature '{text}' does not exist");
            let error = Diagnostic::error(described.name.span, message);
            sink.push(error.suggest(text, known()));
        }
    }
    let described: BTreeSet<&str> = doc
        .features
        .iter()
        .map(|feature| feature.name.text.as_str())
        .collect();
    for feature in &all {
        if !described.contains(feature.name.text.as_str()) {
            let message = format!("feature '{}' lacks documentation", feature.name.text);
            sink.error(feature.name.span, message);
        }
    }
}
