//! Conditional definitions: whoever uses one must be there only when it is.
//!
//! QEMU leaves this to the C compiler, which sees one configuration; here all of them are looked
//! at.

use crate::ast::{Base, Cond, Data, Definition, Kind, Member, Name};
use crate::check::{discriminator_enum, own_members};
use crate::configure::{self, Leak};
use crate::diagnostic::{Diagnostic, Sink};
use crate::resolve::{Referent, Symbols};

/// Checks every use that a definition makes of another.
pub(super) fn check(definition: &Definition, symbols: &Symbols<'_>, sink: &mut Sink) {
    let mut check = Check { symbols, sink };
    let own = definition.cond.as_ref();
    for member in own_members(&definition.kind) {
        check.member(own, member);
    }
    match &definition.kind {
        Kind::Enum(_) => {}
        Kind::Struct { base, .. } => {
            if let Some(base) = base {
                check.uses(&[own], base);
            }
        }
        Kind::Union(union) => {
            if let Base::Named(base) = &union.base {
                check.uses(&[own], base);
            }
            let tag = discriminator_enum(union, symbols).map(|(_, tag)| &tag.kind);
            for branch in &union.branches {
                let value = match tag {
                    Some(Kind::Enum(values)) => values
                        .iter()
                        .find(|value| value.name.text == branch.name.text),
                    _ => None,
                };
                let value = value.and_then(|value| value.cond.as_ref());
                check.uses(&[own, branch.cond.as_ref(), value], &branch.ty.name);
            }
        }
        Kind::Alternate(branches) => {
            for branch in branches {
                check.uses(&[own, branch.cond.as_ref()], &branch.ty.name);
            }
        }
        Kind::Command(command) => {
            check.data(own, &command.data);
            if let Some(ty) = &command.returns {
                check.uses(&[own], &ty.name);
            }
        }
        Kind::Event(event) => check.data(own, &event.data),
    }
}

struct Check<'a> {
    symbols: &'a Symbols<'a>,
    sink: &'a mut Sink,
}

impl Check<'_> {
    fn member(&mut self, own: Option<&Cond>, member: &Member) {
        self.uses(&[own, member.cond.as_ref()], &member.ty.name);
    }

    fn data(&mut self, own: Option<&Cond>, data: &Data) {
        if let Data::Named(name) = data {
            self.uses(&[own], name);
        }
    }

    fn uses(&mut self, conds: &[Option<&Cond>], name: &Name) {
        let Some(Referent::Definition(_, used)) = self.symbols.find_type(&name.text) else {
            return;
        };
        let example = match configure::leak(conds, used.cond.as_ref()) {
            Leak::None => return,
            Leak::TooComplex => "the conditions are too complex to compare".to_owned(),
            Leak::With(names) if names.is_empty() => {
                "with nothing defined it is used but does not exist".to_owned()
            }
            Leak::With(names) => {
                format!(
                    "with {} alone it is used but does not exist",
                    names.join(", ")
                )
            }
        };
        let cond = used
            .cond
            .as_ref()
            .map(configure::describe)
            .unwrap_or_default();
        let message = format!(
            "conditional type '{}' is used where its condition need not hold",
            name.text
        );
        self.sink.push(
            Diagnostic::error(name.span, message)
                .note_at(used.name.span, format!("it exists if {cond}"))
                .note(example),
        );
    }
}
