//! Definitions as they are written: shape checked, names not yet resolved, conditions not yet
//! decided.

use std::collections::BTreeSet;

use crate::docparse::{DefinitionDoc, FreeDoc};
use crate::ir::{FileId, Span};
pub(crate) use crate::parse::Name;

/// All files of a schema.
#[derive(Debug, Default)]
pub(crate) struct Ast {
    pub(crate) modules: Vec<Module>,
    pub(crate) definitions: Vec<Definition>,
    pub(crate) pragma: Pragma,
}

/// A file.
#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) file: FileId,
    pub(crate) items: Vec<Item>,
}

/// A part of a file.
#[derive(Debug)]
pub(crate) enum Item {
    /// An index of `Ast::definitions`.
    Definition(usize),
    Text(FreeDoc),
}

/// What the pragmas of all files add up to.
#[derive(Debug, Default)]
pub(crate) struct Pragma {
    pub(crate) doc_required: bool,
    pub(crate) command_name_exceptions: BTreeSet<String>,
    pub(crate) command_returns_exceptions: BTreeSet<String>,
    pub(crate) documentation_exceptions: BTreeSet<String>,
    pub(crate) member_name_exceptions: BTreeSet<String>,
}

/// A named definition.
#[derive(Debug)]
pub(crate) struct Definition {
    pub(crate) name: Name,
    pub(crate) kind: Kind,
    pub(crate) cond: Option<Cond>,
    pub(crate) features: Vec<Feature>,
    pub(crate) doc: Option<DefinitionDoc>,
    pub(crate) module: usize,
    /// Something is wrong with its shape: it is declared, so that its users are not blamed, but
    /// checked no further.
    pub(crate) broken: bool,
}

/// What a definition is.
#[derive(Debug)]
pub(crate) enum Kind {
    Enum(Vec<EnumValue>),
    Struct {
        base: Option<Name>,
        members: Vec<Member>,
    },
    Union(Union),
    Alternate(Vec<Branch>),
    Command(Command),
    Event(Event),
}

impl Kind {
    /// The word that introduces it.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Kind::Enum(_) => "enum",
            Kind::Struct { .. } => "struct",
            Kind::Union(_) => "union",
            Kind::Alternate(_) => "alternate",
            Kind::Command(_) => "command",
            Kind::Event(_) => "event",
        }
    }
}

/// A value of an enum.
#[derive(Debug)]
pub(crate) struct EnumValue {
    pub(crate) name: Name,
    pub(crate) cond: Option<Cond>,
    pub(crate) features: Vec<Feature>,
}

/// A union.
#[derive(Debug)]
pub(crate) struct Union {
    pub(crate) base: Base,
    pub(crate) discriminator: Name,
    pub(crate) branches: Vec<Branch>,
}

/// The common members of a union.
#[derive(Debug)]
pub(crate) enum Base {
    Named(Name),
    Inline(Vec<Member>),
}

/// A branch of a union or alternate.
#[derive(Debug)]
pub(crate) struct Branch {
    pub(crate) name: Name,
    pub(crate) ty: TypeRef,
    pub(crate) cond: Option<Cond>,
}

/// A command.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) data: Data,
    pub(crate) returns: Option<TypeRef>,
    pub(crate) boxed: Option<Span>,
    pub(crate) generate: bool,
    pub(crate) success_response: bool,
    pub(crate) allow_oob: bool,
    pub(crate) allow_preconfig: bool,
    pub(crate) coroutine: bool,
}

/// An event.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) data: Data,
    pub(crate) boxed: Option<Span>,
}

/// The arguments of a command or the data of an event.
#[derive(Debug)]
pub(crate) enum Data {
    None,
    Inline(Vec<Member>),
    Named(Name),
}

/// A member of an object type.
#[derive(Debug)]
pub(crate) struct Member {
    /// Without the `*`.
    pub(crate) name: Name,
    pub(crate) optional: bool,
    pub(crate) ty: TypeRef,
    pub(crate) cond: Option<Cond>,
    pub(crate) features: Vec<Feature>,
}

/// A type as it is written: `'name'` or `['name']`.
#[derive(Debug, Clone)]
pub(crate) struct TypeRef {
    pub(crate) name: Name,
    pub(crate) array: bool,
}

/// A feature.
#[derive(Debug)]
pub(crate) struct Feature {
    pub(crate) name: Name,
    pub(crate) cond: Option<Cond>,
}

/// An `if` condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cond {
    Is(String),
    Not(Box<Cond>),
    All(Vec<Cond>),
    Any(Vec<Cond>),
}
