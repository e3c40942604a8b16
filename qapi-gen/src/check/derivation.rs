//! What an object type is made of: cycles through bases and branches, and members that clash.

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::ast::{Ast, Base, Data, Definition, Kind, Member, Name};
use crate::check::names::c_name;
use crate::diagnostic::{Diagnostic, Sink};
use crate::ir::Span;
use crate::limits::MAX_DERIVATION;
use crate::resolve::{Referent, Symbols};

/// A member of an object, its own or inherited.
#[derive(Debug, Clone)]
struct Flat {
    name: String,
    span: Span,
    /// The definition that writes it down.
    owner: usize,
}

/// The members of an object by their name as an identifier.
#[derive(Debug, Clone)]
struct FlatMembers {
    by_name: Rc<BTreeMap<String, Flat>>,
    /// How many levels of bases and branches lie below.
    depth: usize,
}

/// The members of every object type.
pub(super) struct Derivation<'a> {
    ast: &'a Ast,
    symbols: &'a Symbols<'a>,
    /// By definition; `None` if they cannot be told because of an error.
    members: BTreeMap<usize, Option<FlatMembers>>,
    /// The definitions that are being worked on, outermost first.
    stack: Vec<usize>,
}

impl<'a> Derivation<'a> {
    /// Works out the members of every object type and reports cycles.
    pub(super) fn new(ast: &'a Ast, symbols: &'a Symbols<'a>, sink: &mut Sink) -> Derivation<'a> {
        let mut derivation = Derivation {
            ast,
            symbols,
            members: BTreeMap::new(),
            stack: Vec::new(),
        };
        for index in 0..ast.definitions.len() {
            derivation.visit(index, sink);
        }
        derivation
    }

    /// The members of a definition: its base's, its own, and those of all its branches.
    fn visit(&mut self, index: usize, sink: &mut Sink) -> Option<FlatMembers> {
        if let Some(known) = self.members.get(&index) {
            return known.clone();
        }
        let definition = &self.ast.definitions[index];
        let result = match definition.broken {
            true => None,
            false => self.collect(index, definition, sink),
        };
        self.members.insert(index, result.clone());
        result
    }

    fn collect(
        &mut self,
        index: usize,
        definition: &'a Definition,
        sink: &mut Sink,
    ) -> Option<FlatMembers> {
        let mut all = BTreeMap::new();
        self.stack.push(index);
        let mut sound = true;
        let mut depth = 0;
        for name in sources(definition) {
            match self.source(name, sink) {
                Some(source) => {
                    depth = depth.max(source.depth + 1);
                    let members = source.by_name.iter();
                    all.extend(members.map(|(key, flat)| (key.clone(), flat.clone())));
                }
                None => sound = false,
            }
        }
        self.stack.pop();
        for member in super::own_members(&definition.kind) {
            all.insert(c_name(&member.name.text), flat(member, index));
        }
        sound.then(|| FlatMembers {
            by_name: Rc::new(all),
            depth,
        })
    }

    /// The members that a base or branch type brings in.
    fn source(&mut self, name: &Name, sink: &mut Sink) -> Option<FlatMembers> {
        let (index, definition) = match self.symbols.find_type(&name.text)? {
            Referent::Definition(index, definition) => (index, definition),
            Referent::Builtin(_) => return None,
        };
        if !matches!(definition.kind, Kind::Struct { .. } | Kind::Union(_)) {
            return None;
        }
        if let Some(start) = self.stack.iter().position(|one| *one == index) {
            let message = format!("object '{}' contains itself", definition.name.text);
            let mut error = Diagnostic::error(name.span, message);
            for step in &self.stack[start + 1..] {
                let step = &self.ast.definitions[*step].name;
                error = error.note_at(step.span, format!("by way of '{}'", step.text));
            }
            sink.push(error);
            return None;
        }
        let too_deep = self.stack.len() > MAX_DERIVATION;
        let found = if too_deep {
            None
        } else {
            self.visit(index, sink)
        };
        if too_deep
            || found
                .as_ref()
                .is_some_and(|found| found.depth >= MAX_DERIVATION)
        {
            let message = format!("object derives through more than {MAX_DERIVATION} levels");
            sink.error(name.span, message);
            return None;
        }
        found
    }

    /// Reports members of a definition that clash with others of the same object.
    pub(super) fn clashes(&self, index: usize, definition: &Definition, sink: &mut Sink) {
        let mut seen: BTreeMap<String, Flat> = BTreeMap::new();
        let base = match &definition.kind {
            Kind::Struct {
                base: Some(base), ..
            } => Some(base),
            Kind::Union(union) => match &union.base {
                Base::Named(base) => Some(base),
                Base::Inline(_) => None,
            },
            _ => None,
        };
        if let Some(members) = base.and_then(|base| self.known(&base.text)) {
            seen.extend(
                members
                    .by_name
                    .iter()
                    .map(|(key, flat)| (key.clone(), flat.clone())),
            );
        }
        for member in super::own_members(&definition.kind) {
            let key = c_name(&member.name.text);
            match seen.get(&key) {
                Some(first) => {
                    sink.push(self.clash(index, &flat(member, index), first, member.name.span))
                }
                None => drop(seen.insert(key, flat(member, index))),
            }
        }
        if let Kind::Union(union) = &definition.kind {
            for branch in &union.branches {
                let Some(members) = self.known(&branch.ty.name.text) else {
                    continue;
                };
                for (key, member) in members.by_name.iter() {
                    if let Some(first) = seen.get(key) {
                        let place = branch.ty.name.span;
                        let error = self.clash(index, member, first, place);
                        sink.push(error.note_at(member.span, "the member of the branch is here"));
                    }
                }
            }
        }
    }

    fn known(&self, name: &str) -> Option<&FlatMembers> {
        let (index, _) = self.symbols.find(name)?;
        self.members.get(&index)?.as_ref()
    }

    fn clash(&self, index: usize, member: &Flat, first: &Flat, place: Span) -> Diagnostic {
        let owned = |flat: &Flat| match flat.owner == index {
            true => format!("member '{}'", flat.name),
            false => {
                let owner = &self.ast.definitions[flat.owner].name.text;
                format!("member '{}' of type '{owner}'", flat.name)
            }
        };
        let message = format!("{} collides with {}", owned(member), owned(first));
        Diagnostic::error(place, message).note_at(first.span, "the first one is here")
    }
}

fn flat(member: &Member, owner: usize) -> Flat {
    Flat {
        name: member.name.text.clone(),
        span: member.name.span,
        owner,
    }
}

/// The types whose members are members of a definition.
fn sources(definition: &Definition) -> Vec<&Name> {
    match &definition.kind {
        Kind::Struct { base, .. } => base.iter().collect(),
        Kind::Union(union) => {
            let base = match &union.base {
                Base::Named(base) => Some(base),
                Base::Inline(_) => None,
            };
            base.into_iter()
                .chain(union.branches.iter().map(|branch| &branch.ty.name))
                .collect()
        }
        _ => match super::data_of(&definition.kind) {
            Some(Data::Named(name)) => vec![name],
            _ => Vec::new(),
        },
    }
}
