//! The one namespace of types, commands and events, and the lookup of type names in it.

use std::collections::BTreeMap;

use crate::ast::{Ast, Base, Data, Definition, Kind, Name, TypeRef};
use crate::diagnostic::{Diagnostic, Sink};
use crate::ir::Builtin;

/// The builtin types by name.
pub(crate) const BUILTINS: [(&str, Builtin); 16] = [
    ("str", Builtin::Str),
    ("int", Builtin::Int),
    ("int8", Builtin::Int8),
    ("int16", Builtin::Int16),
    ("int32", Builtin::Int32),
    ("int64", Builtin::Int64),
    ("uint8", Builtin::Uint8),
    ("uint16", Builtin::Uint16),
    ("uint32", Builtin::Uint32),
    ("uint64", Builtin::Uint64),
    ("size", Builtin::Size),
    ("number", Builtin::Number),
    ("bool", Builtin::Bool),
    ("null", Builtin::Null),
    ("any", Builtin::Any),
    ("QType", Builtin::QType),
];

/// The name of a builtin type.
pub(crate) fn name_of(builtin: Builtin) -> &'static str {
    let found = BUILTINS.iter().find(|(_, known)| *known == builtin);
    found.map_or("", |(name, _)| name)
}

/// What a type name stands for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Referent<'a> {
    Builtin(Builtin),
    /// A definition and its index.
    Definition(usize, &'a Definition),
}

/// The namespace.
pub(crate) struct Symbols<'a> {
    ast: &'a Ast,
    by_name: BTreeMap<&'a str, usize>,
}

impl<'a> Symbols<'a> {
    /// Declares every definition and reports those that are declared twice.
    pub(crate) fn declare(ast: &'a Ast, sink: &mut Sink) -> Symbols<'a> {
        let mut by_name: BTreeMap<&str, usize> = BTreeMap::new();
        for (index, definition) in ast.definitions.iter().enumerate() {
            let name = &definition.name;
            if BUILTINS.iter().any(|(builtin, _)| *builtin == name.text) {
                let message = format!("built-in type '{}' is already defined", name.text);
                sink.error(name.span, message);
                continue;
            }
            if let Some(first) = by_name.get(name.text.as_str()) {
                let message = format!("'{}' is already defined", name.text);
                let first = ast.definitions[*first].name.span;
                let error = Diagnostic::error(name.span, message);
                sink.push(error.note_at(first, "previous definition is here"));
                continue;
            }
            by_name.insert(&name.text, index);
        }
        Symbols { ast, by_name }
    }

    /// The definition called `name`, of any kind.
    pub(crate) fn find(&self, name: &str) -> Option<(usize, &'a Definition)> {
        let index = *self.by_name.get(name)?;
        Some((index, &self.ast.definitions[index]))
    }

    /// The type called `name`.
    pub(crate) fn find_type(&self, name: &str) -> Option<Referent<'a>> {
        if let Some((_, builtin)) = BUILTINS.iter().find(|(known, _)| *known == name) {
            return Some(Referent::Builtin(*builtin));
        }
        let (index, definition) = self.find(name)?;
        match definition.kind {
            Kind::Command(_) | Kind::Event(_) => None,
            _ => Some(Referent::Definition(index, definition)),
        }
    }

    /// The names of all types.
    fn types(&self) -> impl Iterator<Item = &'a str> {
        let defined = self
            .ast
            .definitions
            .iter()
            .filter(|definition| !matches!(definition.kind, Kind::Command(_) | Kind::Event(_)));
        BUILTINS
            .iter()
            .map(|(name, _)| *name)
            .chain(defined.map(|definition| definition.name.text.as_str()))
    }

    /// Reports every use of a name that is no type.
    pub(crate) fn check_uses(&self, sink: &mut Sink) {
        for definition in &self.ast.definitions {
            self.check_definition(definition, sink);
        }
    }

    fn check_definition(&self, definition: &Definition, sink: &mut Sink) {
        let word = definition.kind.word();
        match &definition.kind {
            Kind::Enum(_) => {}
            Kind::Struct { base, members } => {
                if let Some(base) = base {
                    self.check_name(base, "'base'", sink);
                }
                for member in members {
                    let role = format!("member '{}'", member.name.text);
                    self.check_name(&member.ty.name, &role, sink);
                }
            }
            Kind::Union(union) => {
                match &union.base {
                    Base::Named(name) => self.check_name(name, "'base'", sink),
                    Base::Inline(members) => {
                        for member in members {
                            let role = format!("member '{}'", member.name.text);
                            self.check_name(&member.ty.name, &role, sink);
                        }
                    }
                }
                for branch in &union.branches {
                    let role = format!("branch '{}'", branch.name.text);
                    self.check_name(&branch.ty.name, &role, sink);
                }
            }
            Kind::Alternate(branches) => {
                for branch in branches {
                    let role = format!("branch '{}'", branch.name.text);
                    self.check_name(&branch.ty.name, &role, sink);
                }
            }
            Kind::Command(command) => {
                self.check_data(&command.data, word, sink);
                if let Some(TypeRef { name, .. }) = &command.returns {
                    self.check_name(name, "command's 'returns'", sink);
                }
            }
            Kind::Event(event) => self.check_data(&event.data, word, sink),
        }
    }

    fn check_data(&self, data: &Data, word: &str, sink: &mut Sink) {
        match data {
            Data::None => {}
            Data::Named(name) => self.check_name(name, &format!("{word}'s 'data'"), sink),
            Data::Inline(members) => {
                for member in members {
                    let role = format!("member '{}'", member.name.text);
                    self.check_name(&member.ty.name, &role, sink);
                }
            }
        }
    }

    fn check_name(&self, name: &Name, role: &str, sink: &mut Sink) {
        if self.find_type(&name.text).is_some() {
            return;
        }
        let message = format!("{role} uses unknown type '{}'", name.text);
        let mut error = Diagnostic::error(name.span, message);
        match self.find(&name.text) {
            Some((_, other)) => {
                let note = format!(
                    "'{}' is defined here as {}",
                    name.text,
                    a(other.kind.word())
                );
                error = error.note_at(other.name.span, note);
            }
            None => error = error.suggest(&name.text, self.types()),
        }
        sink.push(error);
    }
}

/// The word with its article.
pub(crate) fn a(word: &str) -> String {
    let article = if word.starts_with(['a', 'e', 'i', 'o']) {
        "an"
    } else {
        "a"
    };
    format!("{article} {word}")
}
