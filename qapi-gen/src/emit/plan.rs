//! Decisions that several emitters share: Rust names, locations, boxes.

use std::collections::{BTreeMap, BTreeSet};

use proc_macro2::{Ident, TokenStream};
use quote::quote;

use super::RustOptions;
use super::names::{snake_name, type_name, variant_name};
use crate::diagnostic::{Diagnostic, Note, Severity, SourceMap};
use crate::ir::{Args, DefId, Kind, Member, Module, ModuleItem, Schema, Span, Type, UnionBase};

/// A schema with everything decided that its words do not say.
pub(super) struct Plan<'s> {
    pub(super) schema: &'s Schema,
    sources: &'s SourceMap,
    /// The path of the runtime.
    pub(super) runtime: TokenStream,
    /// In the order of `Schema::modules`.
    pub(super) modules: Vec<ModuleNames>,
    /// By definition.
    names: Vec<Ident>,
    /// Uses of a type (by user and used) that go through a box, because the used one contains the
    /// user.
    boxed: BTreeSet<(DefId, DefId)>,
}

/// How a schema file is called.
pub(super) struct ModuleNames {
    /// Its Rust module.
    pub(super) rust: Ident,
    /// Its handler trait.
    pub(super) handler_trait: Ident,
    /// Its path, with the name of the schema's folder.
    pub(super) source: String,
}

impl<'s> Plan<'s> {
    pub(super) fn new(
        schema: &'s Schema,
        sources: &'s SourceMap,
        options: &RustOptions,
    ) -> Result<Self, Vec<Diagnostic>> {
        let runtime = match options.runtime.parse() {
            Ok(tokens) => tokens,
            Err(err) => panic!("'{}' is no Rust path: {err}", options.runtime),
        };
        let plan = Plan {
            schema,
            sources,
            runtime,
            modules: schema
                .modules
                .iter()
                .map(|module| module_names(module, &options.schema_folder))
                .collect(),
            names: schema
                .definitions
                .iter()
                .map(|def| match def.kind {
                    Kind::Command(_) | Kind::Event(_) => variant_name(&def.name),
                    _ => type_name(&def.name),
                })
                .collect(),
            boxed: boxes(schema),
        };
        let clashes = plan.clashes();
        if clashes.is_empty() {
            Ok(plan)
        } else {
            Err(clashes)
        }
    }

    /// The Rust name of a type, or of a command's or event's struct.
    pub(super) fn name(&self, id: DefId) -> &Ident {
        &self.names[id.0]
    }

    /// Whether `user` holds `used` in a box.
    pub(super) fn is_boxed(&self, user: DefId, used: DefId) -> bool {
        self.boxed.contains(&(user, used))
    }

    /// `schema/block-core.json:512`.
    pub(super) fn location(&self, id: DefId) -> String {
        let def = self.schema.def(id);
        let (line, _) = self.sources.line_column(def.span.file, def.span.start);
        format!("{}:{line}", self.modules[def.module].source)
    }

    /// The definitions of a module in order.
    pub(super) fn definitions(&self, module: usize) -> impl Iterator<Item = DefId> + '_ {
        self.schema.modules[module]
            .items
            .iter()
            .filter_map(|item| match item {
                ModuleItem::Definition(id) => Some(*id),
                ModuleItem::Text(_) => None,
            })
    }

    pub(super) fn has_definitions(&self, module: usize) -> bool {
        self.definitions(module).next().is_some()
    }

    /// All commands, by wire name.
    pub(super) fn sorted_commands(&self) -> Vec<DefId> {
        let mut commands: Vec<DefId> = (0..self.schema.definitions.len())
            .map(DefId)
            .filter(|id| matches!(self.schema.def(*id).kind, Kind::Command(_)))
            .collect();
        commands.sort_by(|a, b| self.schema.def(*a).name.cmp(&self.schema.def(*b).name));
        commands
    }

    /// The members of arguments or event data, base first.
    pub(super) fn argument_members(&self, args: &'s Args) -> Vec<&'s Member> {
        match args {
            Args::None => Vec::new(),
            Args::Inline(members) => members.iter().collect(),
            Args::Named(id) => self.schema.flattened_members(*id),
        }
    }

    /// Imports of the types that a module's types use from other modules.
    pub(super) fn foreign_types(&self, module: usize) -> TokenStream {
        let mut used = BTreeMap::new();
        for id in self.definitions(module) {
            for dependency in direct_uses(self.schema, id) {
                let target = self.schema.def(dependency);
                if target.module != module {
                    used.insert(self.name(dependency).to_string(), self.name(dependency));
                }
            }
        }
        let used = used.values();
        if used.len() == 0 {
            TokenStream::new()
        } else {
            quote!(use super::types::{#(#used),*};)
        }
    }

    /// Names that are different on the wire and the same in Rust.
    fn clashes(&self) -> Vec<Diagnostic> {
        let mut found = Vec::new();
        let mut modules = Scope::default();
        let (mut types, mut commands, mut events) =
            (Scope::default(), Scope::default(), Scope::default());
        for reserved in ["commands", "events", "handlers", "introspection", "types"] {
            modules.reserve(reserved);
        }
        for (at, module) in self.schema.modules.iter().enumerate() {
            let span = Span {
                file: module.file,
                start: 0,
                end: 0,
            };
            if self.has_definitions(at) {
                modules.add(&self.modules[at].rust, &module.name, span, &mut found);
            }
        }
        for (at, def) in self.schema.definitions.iter().enumerate() {
            let id = DefId(at);
            let scope = match def.kind {
                Kind::Command(_) => &mut commands,
                Kind::Event(_) => &mut events,
                _ => &mut types,
            };
            scope.add(self.name(id), &def.name, def.span, &mut found);
            if let Kind::Union(_) = def.kind {
                let branch = super::types::branch_name(self, id);
                types.add(&branch, &def.name, def.span, &mut found);
            }
            self.inner_clashes(id, &mut found);
        }
        found
    }

    /// Clashes among the values, branches or members of one definition.
    fn inner_clashes(&self, id: DefId, found: &mut Vec<Diagnostic>) {
        let def = self.schema.def(id);
        let mut scope = Scope::default();
        match &def.kind {
            Kind::Enum(values) => {
                for value in values {
                    scope.add(&variant_name(&value.name), &value.name, def.span, found);
                }
            }
            Kind::Alternate(alternatives) => {
                for branch in alternatives {
                    scope.add(&variant_name(&branch.name), &branch.name, def.span, found);
                }
            }
            Kind::Struct(_) | Kind::Union(_) => {
                for member in self.schema.flattened_members(id) {
                    scope.add(&snake_name(&member.name), &member.name, member.span, found);
                }
            }
            Kind::Command(command) => self.member_clashes(&command.args, found),
            Kind::Event(event) => self.member_clashes(&event.args, found),
        }
    }

    fn member_clashes(&self, args: &Args, found: &mut Vec<Diagnostic>) {
        let mut scope = Scope::default();
        if let Args::Inline(members) = args {
            for member in members {
                scope.add(&snake_name(&member.name), &member.name, member.span, found);
            }
        }
    }
}

/// The Rust names of one place, with whose they are.
#[derive(Default)]
struct Scope(BTreeMap<String, Option<(String, Span)>>);

impl Scope {
    fn reserve(&mut self, name: &str) {
        self.0.insert(name.to_owned(), None);
    }

    fn add(&mut self, rust: &Ident, wire: &str, span: Span, found: &mut Vec<Diagnostic>) {
        let previous = self
            .0
            .insert(rust.to_string(), Some((wire.to_owned(), span)));
        let Some(previous) = previous else { return };
        let (message, notes) = match previous {
            None => (
                format!("'{wire}' is `{rust}` in Rust, which is taken"),
                Vec::new(),
            ),
            Some((other, place)) => (
                format!("'{wire}' and '{other}' are both `{rust}` in Rust"),
                vec![Note {
                    span: Some(place),
                    message: format!("'{other}' is here"),
                }],
            ),
        };
        found.push(Diagnostic {
            severity: Severity::Error,
            span,
            message,
            notes,
        });
    }
}

fn module_names(module: &Module, folder: &str) -> ModuleNames {
    ModuleNames {
        rust: snake_name(&module.name),
        handler_trait: variant_name(&module.name),
        source: format!("{folder}/{}.json", module.name),
    }
}

/// The definition behind a type, through lists.
pub(super) fn defined(ty: &Type) -> Option<DefId> {
    match ty {
        Type::Builtin(_) => None,
        Type::Defined(id) => Some(*id),
        Type::Array(element) => defined(element),
    }
}

/// The types that the Rust code of a type names.
fn direct_uses(schema: &Schema, id: DefId) -> Vec<DefId> {
    let members = schema.flattened_members(id);
    let mut uses: Vec<DefId> = members
        .iter()
        .filter_map(|member| defined(&member.ty))
        .collect();
    match &schema.def(id).kind {
        Kind::Union(def) => {
            uses.push(def.tag_enum);
            uses.extend(def.branches.iter().filter_map(|branch| branch.ty));
        }
        Kind::Alternate(alternatives) => {
            uses.extend(alternatives.iter().filter_map(|branch| defined(&branch.ty)));
        }
        _ => {}
    }
    uses
}

/// The types whose values lie inside a value of this type. Lists do not count: they are on the
/// heap.
fn contained(schema: &Schema, id: DefId) -> Vec<DefId> {
    let by_value = |ty: &Type| match ty {
        Type::Defined(id) => Some(*id),
        Type::Builtin(_) | Type::Array(_) => None,
    };
    match &schema.def(id).kind {
        Kind::Struct(_) => schema
            .flattened_members(id)
            .iter()
            .filter_map(|member| by_value(&member.ty))
            .collect(),
        Kind::Union(def) => {
            let base = match &def.base {
                UnionBase::Named(base) => schema.flattened_members(*base),
                UnionBase::Inline(members) => members.iter().collect(),
            };
            base.iter()
                .filter_map(|member| by_value(&member.ty))
                .chain(def.branches.iter().filter_map(|branch| branch.ty))
                .collect()
        }
        Kind::Alternate(branches) => branches
            .iter()
            .filter_map(|branch| by_value(&branch.ty))
            .collect(),
        Kind::Enum(_) | Kind::Command(_) | Kind::Event(_) => Vec::new(),
    }
}

/// The uses that need a box.
///
/// Alternates come first: in `BlockdevRef`, which is a name or a whole definition, a box costs
/// nothing where a name is used. Cycles that are left are cut where a walk in schema order closes
/// them.
fn boxes(schema: &Schema) -> BTreeSet<(DefId, DefId)> {
    let all = || (0..schema.definitions.len()).map(DefId);
    let mut boxed = BTreeSet::new();
    for id in all().filter(|id| matches!(schema.def(*id).kind, Kind::Alternate(_))) {
        for used in contained(schema, id) {
            if reaches(schema, used, id) {
                boxed.insert((id, used));
            }
        }
    }
    let mut finished = BTreeSet::new();
    for id in all() {
        cut_cycles(schema, id, &mut Vec::new(), &mut finished, &mut boxed);
    }
    boxed
}

/// Whether a value of `from` can contain one of `to`.
fn reaches(schema: &Schema, from: DefId, to: DefId) -> bool {
    let mut seen = BTreeSet::new();
    let mut open = vec![from];
    while let Some(id) = open.pop() {
        if id == to {
            return true;
        }
        if seen.insert(id) {
            open.extend(contained(schema, id));
        }
    }
    false
}

/// Boxes every use that leads back to a type on the way.
fn cut_cycles(
    schema: &Schema,
    id: DefId,
    way: &mut Vec<DefId>,
    finished: &mut BTreeSet<DefId>,
    boxed: &mut BTreeSet<(DefId, DefId)>,
) {
    if finished.contains(&id) {
        return;
    }
    way.push(id);
    for used in contained(schema, id) {
        if way.contains(&used) {
            boxed.insert((id, used));
        } else if !boxed.contains(&(id, used)) {
            cut_cycles(schema, used, way, finished, boxed);
        }
    }
    way.pop();
    finished.insert(id);
}
