//! The rules of the language, each independent of the others, all reporting to one sink.
//!
//! A definition that is broken in shape is skipped, and so is what depends on it: one mistake, one
//! message.

mod conditions;
mod derivation;
mod docs;
pub(crate) mod examples;
mod lints;
mod names;
mod types;

use crate::ast::{Ast, Base, Data, Definition, Kind, Member, Union};
use crate::diagnostic::Sink;
use crate::resolve::{Referent, Symbols};
use crate::{Dialect, Options};
use derivation::Derivation;

/// Checks everything. Lints run only over a schema without errors.
pub(crate) fn check(ast: &Ast, symbols: &Symbols<'_>, options: &Options, sink: &mut Sink) {
    let derivation = Derivation::new(ast, symbols, sink);
    types::feature_count(ast, sink);
    for (index, definition) in ast.definitions.iter().enumerate() {
        let is_modern = options.dialect == Dialect::Modern;
        if is_modern {
            docs::check(definition, ast, symbols, sink);
        }
        if definition.broken {
            continue;
        }
        if is_modern {
            names::check(definition, &ast.pragma, sink);
        }
        types::check(definition, ast, symbols, options.dialect, sink);
        derivation.clashes(index, definition, sink);
        conditions::check(definition, symbols, sink);
    }
    if sink.error_count() == 0 && options.dialect == Dialect::Modern {
        lints::check(ast, symbols, options, sink);
    }
}

/// The enum of a union's discriminator, if the discriminator is a member of the base and of an enum
/// type.
pub(crate) fn discriminator_enum<'a>(
    union: &Union,
    symbols: &Symbols<'a>,
) -> Option<(usize, &'a Definition)> {
    let member = match &union.base {
        Base::Inline(members) => by_name(members, &union.discriminator.text)?,
        Base::Named(base) => inherited_member(&base.text, &union.discriminator.text, symbols)?,
    };
    match symbols.find_type(&member.ty.name.text)? {
        Referent::Definition(index, definition)
            if matches!(definition.kind, Kind::Enum(_)) && !member.ty.array =>
        {
            Some((index, definition))
        }
        _ => None,
    }
}

fn by_name<'m>(members: &'m [Member], name: &str) -> Option<&'m Member> {
    members.iter().find(|member| member.name.text == name)
}

/// The member `name` of the struct `base` or of what it derives from.
fn inherited_member<'a>(base: &str, name: &str, symbols: &Symbols<'a>) -> Option<&'a Member> {
    let mut base = base;
    for _ in 0..=crate::limits::MAX_DERIVATION {
        let (_, definition) = symbols.find(base)?;
        let Kind::Struct {
            base: next,
            members,
        } = &definition.kind
        else {
            return None;
        };
        if let Some(member) = by_name(members, name) {
            return Some(member);
        }
        base = &next.as_ref()?.text;
    }
    None
}

/// The data of a command or event.
fn data_of(kind: &Kind) -> Option<&Data> {
    match kind {
        Kind::Command(command) => Some(&command.data),
        Kind::Event(event) => Some(&event.data),
        _ => None,
    }
}

/// The members that a definition writes down itself.
fn own_members(kind: &Kind) -> &[Member] {
    match kind {
        Kind::Struct { members, .. } => members,
        Kind::Union(Union {
            base: Base::Inline(members),
            ..
        }) => members,
        _ => match data_of(kind) {
            Some(Data::Inline(members)) => members,
            _ => &[],
        },
    }
}

/// `built-in type 'int'`, `enum type 'E'`, for messages.
fn type_in_words(name: &str, referent: Referent<'_>) -> String {
    match referent {
        Referent::Builtin(_) => format!("built-in type '{name}'"),
        Referent::Definition(_, definition) => {
            format!("{} type '{name}'", definition.kind.word())
        }
    }
}
