//! The reference as Markdown: a page for each schema file, and an index.

mod text;

use std::collections::BTreeMap;

use super::OutputFile;
use super::rustdoc::escape;
use crate::ir::{
    Args, Builtin, CommandDef, DefId, Definition, DocBlock, Kind, Member, ModuleItem, Schema,
    StructDef, Type, UnionBase, UnionDef,
};
use text::{
    cell, ended, examples, feature_list, feature_words, prose, push, value_table, with_headings,
};

/// All pages, the index first.
pub(super) fn pages(schema: &Schema, folder: &str) -> Vec<OutputFile> {
    let pages = Pages {
        schema,
        folder,
        users: users(schema),
    };
    let mut files = vec![pages.index()];
    for module in 0..schema.modules.len() {
        if !schema.modules[module].items.is_empty() && pages.defines(module) {
            files.push(pages.page(module));
        }
    }
    files
}

struct Pages<'s> {
    schema: &'s Schema,
    folder: &'s str,
    /// What mentions a type.
    users: BTreeMap<DefId, Vec<DefId>>,
}

impl Pages<'_> {
    fn defines(&self, module: usize) -> bool {
        self.schema
            .definitions
            .iter()
            .any(|def| def.module == module)
    }

    fn index(&self) -> OutputFile {
        let mut text = format!("<!-- @generated from {}/ -->\n\n", self.folder);
        for module in &self.schema.modules {
            if let Some(ModuleItem::Text(doc)) = module.items.first()
                && !self.defines_in(&module.items)
            {
                text.push_str(&with_headings(doc));
            }
        }
        self.listing(&mut text, "Commands", |kind| {
            matches!(kind, Kind::Command(_))
        });
        self.listing(&mut text, "Events", |kind| matches!(kind, Kind::Event(_)));
        self.listing(&mut text, "Types", |kind| {
            !matches!(kind, Kind::Command(_) | Kind::Event(_))
        });
        OutputFile {
            path: "README.md".to_owned(),
            text: ended(text),
        }
    }

    fn defines_in(&self, items: &[ModuleItem]) -> bool {
        items
            .iter()
            .any(|item| matches!(item, ModuleItem::Definition(_)))
    }

    /// A list of links, with the first sentence of each where there is one.
    fn listing(&self, text: &mut String, title: &str, wanted: fn(&Kind) -> bool) {
        let mut ids: Vec<DefId> = (0..self.schema.definitions.len())
            .map(DefId)
            .filter(|id| wanted(&self.schema.def(*id).kind))
            .collect();
        ids.sort_by_key(|id| &self.schema.def(*id).name);
        if ids.is_empty() {
            return;
        }
        push(text, &format!("## {title}"));
        let rows: Vec<String> = ids
            .iter()
            .map(|id| {
                let def = self.schema.def(*id);
                format!(
                    "| {} | {} |",
                    self.link(*id),
                    cell(&def.doc.body[..def.doc.body.len().min(1)])
                )
            })
            .collect();
        push(text, &format!("| | |\n|---|---|\n{}", rows.join("\n")));
    }

    fn page(&self, module: usize) -> OutputFile {
        let module = &self.schema.modules[module];
        let mut text = format!(
            "<!-- @generated from {}/{}.json -->\n\n",
            self.folder, module.name
        );
        for item in &module.items {
            match item {
                ModuleItem::Text(doc) => text.push_str(&with_headings(doc)),
                ModuleItem::Definition(id) => self.definition(&mut text, *id),
            }
        }
        OutputFile {
            path: page_path(&module.name),
            text: ended(text),
        }
    }

    fn definition(&self, text: &mut String, id: DefId) {
        let def = self.schema.def(id);
        push(
            text,
            &format!("<a id=\"{}\"></a>\n### {}", def.name, escape(&def.name)),
        );
        let since = def.doc.since.as_ref();
        let since = since
            .map(|since| format!(", since {}", escape(since)))
            .unwrap_or_default();
        push(text, &format!("*{}{since}*", kind_name(&def.kind)));
        push(text, &prose(&def.doc.body));
        match &def.kind {
            Kind::Enum(values) => push(text, &value_table(values)),
            Kind::Struct(data) => self.structure(text, data),
            Kind::Union(union) => self.union(text, union),
            Kind::Alternate(branches) => {
                let rows: Vec<String> = branches
                    .iter()
                    .map(|branch| format!("| {} | {} |", self.ty(&branch.ty), cell(&branch.doc)))
                    .collect();
                push(
                    text,
                    &format!("| One of | |\n|---|---|\n{}", rows.join("\n")),
                );
            }
            Kind::Command(command) => self.command(text, def, command),
            Kind::Event(event) => self.arguments(text, "Data", def, &event.args),
        }
        push(text, &feature_list(&def.features));
        push(text, &examples(&def.doc.body));
        self.used_by(text, id);
    }

    fn structure(&self, text: &mut String, data: &StructDef) {
        let members: Vec<&Member> = data.members.iter().collect();
        push(text, &self.member_table("Member", &members, &[]));
        if let Some(base) = data.base {
            let also = if members.is_empty() { "The" } else { "And the" };
            push(text, &format!("{also} members of {}.", self.link(base)));
        } else if members.is_empty() {
            push(text, "No members.");
        }
    }

    fn union(&self, text: &mut String, union: &UnionDef) {
        match &union.base {
            UnionBase::Named(base) => push(text, &format!("The members of {}.", self.link(*base))),
            UnionBase::Inline(members) => {
                let members: Vec<&Member> = members.iter().collect();
                push(text, &self.member_table("Member", &members, &[]));
            }
        }
        let rows: Vec<String> = union
            .branches
            .iter()
            .map(|branch| {
                let ty = branch.ty.map_or("nothing".to_owned(), |ty| self.link(ty));
                format!("| `{}` | {ty} |", branch.value)
            })
            .collect();
        let head = format!(
            "| If `{}` is | then also the members of |",
            union.discriminator
        );
        push(text, &format!("{head}\n|---|---|\n{}", rows.join("\n")));
    }

    fn command(&self, text: &mut String, def: &Definition, command: &CommandDef) {
        self.arguments(text, "Argument", def, &command.args);
        let returns = match &command.returns {
            Some(ty) => format!("**Returns** {}: {}", self.ty(ty), prose(&def.doc.returns)),
            None => "**Returns** nothing.".to_owned(),
        };
        push(text, &returns);
        if !def.doc.errors.is_empty() {
            push(text, &format!("**Errors**\n\n{}", prose(&def.doc.errors)));
        }
        let mut flags = Vec::new();
        if command.allow_oob {
            flags.push("It can be run out of band.");
        }
        if !command.success_response {
            flags.push("Nothing is sent when it succeeds.");
        }
        push(text, &flags.join(" "));
    }

    fn arguments(&self, text: &mut String, title: &str, def: &Definition, args: &Args) {
        match args {
            Args::None => {}
            Args::Inline(members) => {
                let members: Vec<&Member> = members.iter().collect();
                push(
                    text,
                    &self.member_table(title, &members, &def.doc.arguments),
                );
            }
            Args::Named(id) => match self.schema.def(*id).kind {
                Kind::Union(_) => {
                    push(
                        text,
                        &format!("{title}s: the members of {}.", self.link(*id)),
                    );
                }
                _ => {
                    let members = self.schema.flattened_members(*id);
                    push(
                        text,
                        &self.member_table(title, &members, &def.doc.arguments),
                    );
                }
            },
        }
    }

    /// A table of members. `described` holds what the user of a named type says of its members.
    fn member_table(
        &self,
        title: &str,
        members: &[&Member],
        described: &[(String, Vec<DocBlock>)],
    ) -> String {
        if members.is_empty() {
            return String::new();
        }
        let rows: Vec<String> = members
            .iter()
            .map(|member| {
                let own = described.iter().find(|(name, _)| *name == member.name);
                let mut doc = cell(own.map_or(&member.doc, |(_, doc)| doc));
                doc.push_str(&feature_words(&member.features));
                let optional = if member.optional { "optional" } else { "" };
                format!(
                    "| `{}` | {} | {optional} | {doc} |",
                    member.name,
                    self.ty(&member.ty)
                )
            })
            .collect();
        format!(
            "| {title} | Type | | |\n|---|---|---|---|\n{}",
            rows.join("\n")
        )
    }

    fn used_by(&self, text: &mut String, id: DefId) {
        if let Some(users) = self.users.get(&id) {
            let links: Vec<String> = users.iter().map(|user| self.link(*user)).collect();
            push(text, &format!("Used by {}.", links.join(", ")));
        }
    }

    /// A type with links.
    fn ty(&self, ty: &Type) -> String {
        match ty {
            Type::Builtin(builtin) => format!("`{}`", builtin_name(*builtin)),
            Type::Defined(id) => self.link(*id),
            Type::Array(element) => format!("list of {}", self.ty(element)),
        }
    }

    fn link(&self, id: DefId) -> String {
        let def = self.schema.def(id);
        let page = page_path(&self.schema.modules[def.module].name);
        format!("[{}]({page}#{})", escape(&def.name), def.name)
    }
}

/// Who mentions each type, in schema order.
fn users(schema: &Schema) -> BTreeMap<DefId, Vec<DefId>> {
    let mut users: BTreeMap<DefId, Vec<DefId>> = BTreeMap::new();
    for (at, def) in schema.definitions.iter().enumerate() {
        for used in mentions(def) {
            let list = users.entry(used).or_default();
            if !list.contains(&DefId(at)) {
                list.push(DefId(at));
            }
        }
    }
    users
}

/// The types that a definition names.
fn mentions(def: &Definition) -> Vec<DefId> {
    let of_members = |members: &[Member]| -> Vec<DefId> {
        members
            .iter()
            .filter_map(|member| super::plan::defined(&member.ty))
            .collect()
    };
    let of_args = |args: &Args| match args {
        Args::None => Vec::new(),
        Args::Inline(members) => of_members(members),
        Args::Named(id) => vec![*id],
    };
    match &def.kind {
        Kind::Enum(_) => Vec::new(),
        Kind::Struct(data) => {
            let mut used = of_members(&data.members);
            used.extend(data.base);
            used
        }
        Kind::Union(union) => {
            let mut used = match &union.base {
                UnionBase::Named(base) => vec![*base],
                UnionBase::Inline(members) => of_members(members),
            };
            used.extend(union.branches.iter().filter_map(|branch| branch.ty));
            used
        }
        Kind::Alternate(branches) => branches
            .iter()
            .filter_map(|branch| super::plan::defined(&branch.ty))
            .collect(),
        Kind::Command(command) => {
            let mut used = of_args(&command.args);
            used.extend(command.returns.as_ref().and_then(super::plan::defined));
            used
        }
        Kind::Event(event) => of_args(&event.args),
    }
}

fn page_path(module: &str) -> String {
    let name = module.trim_start_matches("../").replace('/', "-");
    format!("{name}.md")
}

fn kind_name(kind: &Kind) -> &'static str {
    match kind {
        Kind::Enum(_) => "Enum",
        Kind::Struct(_) => "Object",
        Kind::Union(_) => "Union",
        Kind::Alternate(_) => "Alternate",
        Kind::Command(_) => "Command",
        Kind::Event(_) => "Event",
    }
}

fn builtin_name(builtin: Builtin) -> &'static str {
    match builtin {
        Builtin::Str => "str",
        Builtin::Int => "int",
        Builtin::Int8 => "int8",
        Builtin::Int16 => "int16",
        Builtin::Int32 => "int32",
        Builtin::Int64 => "int64",
        Builtin::Uint8 => "uint8",
        Builtin::Uint16 => "uint16",
        Builtin::Uint32 => "uint32",
        Builtin::Uint64 => "uint64",
        Builtin::Size => "size",
        Builtin::Number => "number",
        Builtin::Bool => "bool",
        Builtin::Null => "null",
        Builtin::Any => "any",
        Builtin::QType => "QType",
    }
}
