//! The checked definitions to the intermediate representation: conditions decided, names resolved,
//! documentation attached.
//!
//! Runs only when no pass before it found an error, so names resolve here.

use std::collections::BTreeMap;

use crate::Options;
use crate::ast::{self, Ast, Base, Cond, Data, Definition, Feature, Item, Kind, Member, TypeRef};
use crate::configure;
use crate::docparse::{DefinitionDoc, Described};
use crate::ir::{self, DefId, DocBlock, Schema};
use crate::resolve::{Referent, Symbols};

/// Builds the schema for the given set of conditions.
pub(crate) fn lower(ast: &Ast, symbols: &Symbols<'_>, options: &Options) -> Schema {
    let mut lowering = Lowering {
        symbols,
        options,
        ids: BTreeMap::new(),
    };
    for (index, definition) in ast.definitions.iter().enumerate() {
        if lowering.holds(definition.cond.as_ref()) {
            let id = DefId(lowering.ids.len());
            lowering.ids.insert(index, id);
        }
    }
    let definitions = ast
        .definitions
        .iter()
        .enumerate()
        .filter(|(index, _)| lowering.ids.contains_key(index))
        .map(|(_, definition)| lowering.definition(definition))
        .collect();
    let modules = ast
        .modules
        .iter()
        .map(|module| ir::Module {
            name: module.name.clone(),
            file: module.file,
            items: module
                .items
                .iter()
                .filter_map(|item| lowering.item(item))
                .collect(),
        })
        .collect();
    Schema {
        modules,
        definitions,
    }
}

struct Lowering<'a> {
    symbols: &'a Symbols<'a>,
    options: &'a Options,
    /// By index in `Ast::definitions`; those whose condition is false have none.
    ids: BTreeMap<usize, DefId>,
}

impl Lowering<'_> {
    fn holds(&self, cond: Option<&Cond>) -> bool {
        configure::holds(cond, &|name| self.options.defines.contains(name))
    }

    fn item(&self, item: &Item) -> Option<ir::ModuleItem> {
        match item {
            Item::Definition(index) => {
                let id = self.ids.get(index)?;
                Some(ir::ModuleItem::Definition(*id))
            }
            Item::Text(doc) => Some(ir::ModuleItem::Text(doc.text.clone())),
        }
    }

    /// The id of a named type. It exists: unknown names and uses less conditional than the type are
    /// errors.
    fn id(&self, name: &str) -> DefId {
        match self.symbols.find_type(name) {
            Some(Referent::Definition(index, _)) => self.ids[&index],
            _ => unreachable!("'{name}' was checked to be a defined type"),
        }
    }

    fn ty(&self, ty: &TypeRef) -> ir::Type {
        let element = match self.symbols.find_type(&ty.name.text) {
            Some(Referent::Builtin(builtin)) => ir::Type::Builtin(builtin),
            _ => ir::Type::Defined(self.id(&ty.name.text)),
        };
        match ty.array {
            true => ir::Type::Array(Box::new(element)),
            false => element,
        }
    }

    fn definition(&self, definition: &Definition) -> ir::Definition {
        let doc = Docs(definition.doc.as_ref());
        let kind = match &definition.kind {
            Kind::Enum(values) => ir::Kind::Enum(self.enum_values(values, doc)),
            Kind::Struct { base, members } => ir::Kind::Struct(ir::StructDef {
                base: base.as_ref().map(|base| self.id(&base.text)),
                members: self.members(members, doc),
            }),
            Kind::Union(union) => ir::Kind::Union(self.union(union, doc)),
            Kind::Alternate(branches) => ir::Kind::Alternate(
                branches
                    .iter()
                    .filter(|branch| self.holds(branch.cond.as_ref()))
                    .map(|branch| ir::Alternative {
                        name: branch.name.text.clone(),
                        ty: self.ty(&branch.ty),
                        doc: doc.member(&branch.name.text),
                    })
                    .collect(),
            ),
            Kind::Command(command) => ir::Kind::Command(ir::CommandDef {
                args: self.args(&command.data, doc),
                returns: command.returns.as_ref().map(|ty| self.ty(ty)),
                boxed: command.boxed.is_some(),
                generate: command.generate,
                success_response: command.success_response,
                allow_oob: command.allow_oob,
                allow_preconfig: command.allow_preconfig,
                coroutine: command.coroutine,
            }),
            Kind::Event(event) => ir::Kind::Event(ir::EventDef {
                args: self.args(&event.data, doc),
                boxed: event.boxed.is_some(),
            }),
        };
        ir::Definition {
            name: definition.name.text.clone(),
            span: definition.name.span,
            kind,
            features: self.features(&definition.features, doc),
            doc: self.doc(definition),
            module: definition.module,
        }
    }

    fn enum_values(&self, values: &[ast::EnumValue], doc: Docs<'_>) -> Vec<ir::EnumValue> {
        values
            .iter()
            .filter(|value| self.holds(value.cond.as_ref()))
            .map(|value| ir::EnumValue {
                name: value.name.text.clone(),
                features: self.features(&value.features, doc),
                doc: doc.member(&value.name.text),
            })
            .collect()
    }

    fn union(&self, union: &ast::Union, doc: Docs<'_>) -> ir::UnionDef {
        let tag_enum = crate::check::discriminator_enum(union, self.symbols);
        let Some((index, Kind::Enum(values))) =
            tag_enum.map(|(index, definition)| (index, &definition.kind))
        else {
            unreachable!("the discriminator was checked to be of enum type");
        };
        let branches = values
            .iter()
            .filter(|value| self.holds(value.cond.as_ref()))
            .map(|value| {
                let branch = union
                    .branches
                    .iter()
                    .find(|branch| branch.name.text == value.name.text)
                    .filter(|branch| self.holds(branch.cond.as_ref()));
                ir::Branch {
                    value: value.name.text.clone(),
                    ty: branch.map(|branch| self.id(&branch.ty.name.text)),
                }
            })
            .collect();
        ir::UnionDef {
            base: match &union.base {
                Base::Named(name) => ir::UnionBase::Named(self.id(&name.text)),
                Base::Inline(members) => ir::UnionBase::Inline(self.members(members, doc)),
            },
            discriminator: union.discriminator.text.clone(),
            tag_enum: self.ids[&index],
            branches,
        }
    }

    fn args(&self, data: &Data, doc: Docs<'_>) -> ir::Args {
        match data {
            Data::None => ir::Args::None,
            Data::Inline(members) if members.is_empty() => ir::Args::None,
            Data::Inline(members) => ir::Args::Inline(self.members(members, doc)),
            Data::Named(name) => ir::Args::Named(self.id(&name.text)),
        }
    }

    fn members(&self, members: &[Member], doc: Docs<'_>) -> Vec<ir::Member> {
        members
            .iter()
            .filter(|member| self.holds(member.cond.as_ref()))
            .map(|member| ir::Member {
                name: member.name.text.clone(),
                span: member.name.span,
                ty: self.ty(&member.ty),
                optional: member.optional,
                features: self.features(&member.features, doc),
                doc: doc.member(&member.name.text),
            })
            .collect()
    }

    fn features(&self, features: &[Feature], doc: Docs<'_>) -> Vec<ir::Feature> {
        features
            .iter()
            .filter(|feature| self.holds(feature.cond.as_ref()))
            .map(|feature| ir::Feature {
                name: feature.name.text.clone(),
                doc: doc.feature(&feature.name.text),
            })
            .collect()
    }

    fn doc(&self, definition: &Definition) -> ir::Doc {
        let Some(doc) = &definition.doc else {
            return ir::Doc::default();
        };
        let text = |section: &Option<crate::docparse::Section>| {
            section
                .as_ref()
                .map(|section| section.text.clone())
                .unwrap_or_default()
        };
        let data = match &definition.kind {
            Kind::Command(command) => Some(&command.data),
            Kind::Event(event) => Some(&event.data),
            _ => None,
        };
        let arguments = match data {
            Some(Data::Named(_)) => doc
                .members
                .iter()
                .map(|member| (member.name.text.clone(), member.text.clone()))
                .collect(),
            _ => Vec::new(),
        };
        ir::Doc {
            body: doc.body.clone(),
            returns: text(&doc.returns),
            errors: text(&doc.errors),
            since: doc.since.clone(),
            arguments,
        }
    }
}

/// Lookup of descriptions; there may be no documentation at all.
#[derive(Clone, Copy)]
struct Docs<'a>(Option<&'a DefinitionDoc>);

impl Docs<'_> {
    fn member(self, name: &str) -> Vec<DocBlock> {
        self.0
            .map(|doc| text_of(&doc.members, name))
            .unwrap_or_default()
    }

    fn feature(self, name: &str) -> Vec<DocBlock> {
        self.0
            .map(|doc| text_of(&doc.features, name))
            .unwrap_or_default()
    }
}

fn text_of(list: &[Described], name: &str) -> Vec<DocBlock> {
    list.iter()
        .find(|one| one.name.text == name)
        .map(|one| one.text.clone())
        .unwrap_or_default()
}
