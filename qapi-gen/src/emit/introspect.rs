//! The reply of query-qmp-schema.
//!
//! Commands and events come first, in schema order, then the types that they use, in the order of
//! first use; what nothing uses does not appear. Names of types are no part of the interface, so
//! all but the builtin ones are numbers, in the order of first mention, and lists are called after
//! their elements: `[3]`. Bases are dissolved into their users. All integer types are `int`.

use std::collections::BTreeMap;

use quote::quote;
use serde_json::{Map, Value, json};

use super::plan::Plan;
use super::{OutputFile, format_file};
use crate::ir::{Args, Builtin, CommandDef, DefId, Feature, Kind, Member, Schema, Type, UnionDef};

/// A type that can be mentioned.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Entity {
    Builtin(&'static str, &'static str),
    Defined(DefId),
    /// Arguments or data that are written in place, by their command or event.
    Arguments(DefId),
    /// The object type without members.
    Empty,
    /// `QType`.
    QType,
    List(Box<Entity>),
}

/// The list of SchemaInfo of a schema.
pub fn schema_info(schema: &Schema) -> Vec<Value> {
    let mut masker = Masker {
        schema,
        names: BTreeMap::new(),
        used: Vec::new(),
    };
    let mut infos = Vec::new();
    for (at, def) in schema.definitions.iter().enumerate() {
        match &def.kind {
            Kind::Command(command) => infos.push(masker.command(DefId(at), command)),
            Kind::Event(event) => {
                let data = masker.arguments(DefId(at), &event.args);
                infos.push(info(
                    &def.name,
                    "event",
                    json!({ "arg-type": data }),
                    &def.features,
                ));
            }
            _ => {}
        }
    }
    // Describing a type mentions others, which are then described in turn.
    let mut at = 0;
    while let Some(entity) = masker.used.get(at).cloned() {
        infos.push(masker.describe(&entity));
        at += 1;
    }
    infos
}

/// The generated module with the reply as text, an entity to a line.
pub(super) fn file(plan: &Plan<'_>) -> OutputFile {
    let lines: Vec<String> = schema_info(plan.schema)
        .iter()
        .map(Value::to_string)
        .collect();
    let text = format!("[\n{}\n]", lines.join(",\n"));
    let source = plan
        .modules
        .first()
        .map_or("an empty schema", |module| module.source.as_str());
    let literal = raw_string(&text);
    let body = quote! {
        /// The reply of query-qmp-schema as JSON text.
        pub const SCHEMA: &str = #literal;
    };
    OutputFile {
        path: "introspection.rs".to_owned(),
        text: format_file(source, body),
    }
}

/// The text as a raw string literal, so that it can be read where it stands.
fn raw_string(text: &str) -> proc_macro2::Literal {
    let literal = format!("r#\"{text}\"#");
    match literal.parse() {
        // Schema names hold neither quotes nor number signs.
        Ok(literal) => literal,
        Err(_) => proc_macro2::Literal::string(text),
    }
}

struct Masker<'s> {
    schema: &'s Schema,
    names: BTreeMap<Entity, String>,
    used: Vec<Entity>,
}

impl Masker<'_> {
    fn command(&mut self, id: DefId, command: &CommandDef) -> Value {
        let args = self.arguments(id, &command.args);
        let returns = match &command.returns {
            Some(ty) => self.mention(self.entity(ty)),
            None => self.mention(Entity::Empty),
        };
        let mut rest = json!({ "arg-type": args, "ret-type": returns });
        if command.allow_oob {
            rest["allow-oob"] = Value::Bool(true);
        }
        let def = self.schema.def(id);
        info(&def.name, "command", rest, &def.features)
    }

    /// The name of the type of arguments or data.
    fn arguments(&mut self, id: DefId, args: &Args) -> String {
        self.mention(match args {
            Args::None => Entity::Empty,
            Args::Inline(members) if members.is_empty() => Entity::Empty,
            Args::Inline(_) => Entity::Arguments(id),
            Args::Named(id) => Entity::Defined(*id),
        })
    }

    fn entity(&self, ty: &Type) -> Entity {
        match ty {
            Type::Builtin(Builtin::QType) => Entity::QType,
            Type::Builtin(builtin) => {
                let (name, json_type) = builtin_names(*builtin);
                Entity::Builtin(name, json_type)
            }
            Type::Defined(id) => Entity::Defined(*id),
            Type::Array(element) => Entity::List(Box::new(self.entity(element))),
        }
    }

    /// The name of a type. It will be described.
    fn mention(&mut self, entity: Entity) -> String {
        if !self.used.contains(&entity) {
            self.used.push(entity.clone());
        }
        match &entity {
            Entity::Builtin(name, _) => (*name).to_owned(),
            Entity::List(element) => {
                let element = self.mention((**element).clone());
                format!("[{element}]")
            }
            _ => {
                let next = self.names.len().to_string();
                self.names.entry(entity).or_insert(next).clone()
            }
        }
    }

    fn describe(&mut self, entity: &Entity) -> Value {
        let name = self.mention(entity.clone());
        match entity {
            Entity::Builtin(_, json_type) => {
                info(&name, "builtin", json!({ "json-type": json_type }), &[])
            }
            Entity::List(element) => {
                let element = self.mention((**element).clone());
                info(&name, "array", json!({ "element-type": element }), &[])
            }
            Entity::Empty => info(&name, "object", json!({ "members": [] }), &[]),
            Entity::QType => {
                let values = [
                    "none", "qnull", "qnum", "qstring", "qdict", "qlist", "qbool",
                ];
                let members: Vec<Value> = values
                    .iter()
                    .map(|value| json!({ "name": value }))
                    .collect();
                info(
                    &name,
                    "enum",
                    json!({ "members": members, "values": values }),
                    &[],
                )
            }
            Entity::Arguments(id) => {
                let members = match &self.schema.def(*id).kind {
                    Kind::Command(CommandDef {
                        args: Args::Inline(members),
                        ..
                    }) => members,
                    Kind::Event(event) => match &event.args {
                        Args::Inline(members) => members,
                        _ => return Value::Null,
                    },
                    _ => return Value::Null,
                };
                let members = self.members(members.iter());
                info(&name, "object", json!({ "members": members }), &[])
            }
            Entity::Defined(id) => self.definition(&name, *id),
        }
    }

    fn definition(&mut self, name: &str, id: DefId) -> Value {
        let def = self.schema.def(id);
        match &def.kind {
            Kind::Enum(values) => {
                let members: Vec<Value> = values
                    .iter()
                    .map(|value| with_features(json!({ "name": value.name }), &value.features))
                    .collect();
                let names: Vec<&String> = values.iter().map(|value| &value.name).collect();
                let rest = json!({ "members": members, "values": names });
                info(name, "enum", rest, &def.features)
            }
            Kind::Struct(_) => {
                let members = self.members(self.schema.flattened_members(id).into_iter());
                info(name, "object", json!({ "members": members }), &def.features)
            }
            Kind::Union(union) => {
                let rest = self.union(id, union);
                info(name, "object", rest, &def.features)
            }
            Kind::Alternate(branches) => {
                let members: Vec<Value> = branches
                    .iter()
                    .map(|branch| json!({ "type": self.mention(self.entity(&branch.ty)) }))
                    .collect();
                info(
                    name,
                    "alternate",
                    json!({ "members": members }),
                    &def.features,
                )
            }
            // Commands and events are no types; `check` has made sure that nothing refers to one.
            Kind::Command(_) | Kind::Event(_) => Value::Null,
        }
    }

    fn union(&mut self, id: DefId, union: &UnionDef) -> Value {
        let members = self.members(self.schema.flattened_members(id).into_iter());
        let variants: Vec<Value> = union
            .branches
            .iter()
            .map(|branch| {
                let ty = self.mention(branch.ty.map_or(Entity::Empty, Entity::Defined));
                json!({ "case": branch.value, "type": ty })
            })
            .collect();
        json!({ "members": members, "tag": union.discriminator, "variants": variants })
    }

    fn members<'m>(&mut self, members: impl Iterator<Item = &'m Member>) -> Vec<Value> {
        members
            .map(|member| {
                let ty = self.mention(self.entity(&member.ty));
                let mut info = json!({ "name": member.name, "type": ty });
                if member.optional {
                    info["default"] = Value::Null;
                }
                with_features(info, &member.features)
            })
            .collect()
    }
}

/// An entry: name and kind first, features last.
fn info(name: &str, meta_type: &str, rest: Value, features: &[Feature]) -> Value {
    let mut info = Map::new();
    info.insert("name".to_owned(), Value::from(name));
    info.insert("meta-type".to_owned(), Value::from(meta_type));
    if let Value::Object(rest) = rest {
        info.extend(rest);
    }
    with_features(Value::Object(info), features)
}

fn with_features(mut info: Value, features: &[Feature]) -> Value {
    if !features.is_empty() {
        let names: Vec<&String> = features.iter().map(|feature| &feature.name).collect();
        info["features"] = json!(names);
    }
    info
}

/// The name and JSON type of a builtin; the integers are one.
fn builtin_names(builtin: Builtin) -> (&'static str, &'static str) {
    match builtin {
        Builtin::Str => ("str", "string"),
        Builtin::Number => ("number", "number"),
        Builtin::Bool => ("bool", "boolean"),
        Builtin::Null => ("null", "null"),
        Builtin::Any => ("any", "value"),
        Builtin::QType => ("QType", "string"),
        Builtin::Int
        | Builtin::Int8
        | Builtin::Int16
        | Builtin::Int32
        | Builtin::Int64
        | Builtin::Uint8
        | Builtin::Uint16
        | Builtin::Uint32
        | Builtin::Uint64
        | Builtin::Size => ("int", "int"),
    }
}
