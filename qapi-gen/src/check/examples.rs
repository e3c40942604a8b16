//! The examples in documents: valid JSON, known commands and events, and members as the schema has
//! them.
//!
//! Examples are what people copy. Those of our own documents are run against the daemon too; this
//! finds the mistakes without one, and in other people's documents. All findings are warnings.

use serde_json::{Map, Value};

use crate::diagnostic::{Diagnostic, Sink, SourceMap};
use crate::ir::{
    Args, Builtin, CommandDef, DefId, ExampleLine, FileId, Kind, Member, Schema, Type, UnionBase,
};

type Object = Map<String, Value>;

/// Checks every example in the documentation of a schema.
pub(crate) fn check(schema: &Schema, sources: &SourceMap, sink: &mut Sink) {
    for (file, example) in schema.examples() {
        check_lines(&example.lines, file, schema, sources, sink);
    }
}

/// Checks one session.
pub(crate) fn check_lines(
    lines: &[ExampleLine],
    file: FileId,
    schema: &Schema,
    sources: &SourceMap,
    sink: &mut Sink,
) {
    let mut session = Session {
        schema,
        command: None,
    };
    for line in lines {
        let (text, number, sent) = match line {
            ExampleLine::Sent(text, number) => (text, *number, true),
            ExampleLine::Received(text, number) => (text, *number, false),
            ExampleLine::Prose(_) => continue,
        };
        let finding = match serde_json::from_str(text) {
            Err(error) => Some(format!("example is not valid JSON: {error}")),
            Ok(message) => match sent {
                true => session.sent(&message),
                false => session.received(&message),
            }
            .err()
            .map(|error| format!("example does not fit the schema: {error}")),
        };
        if let Some(message) = finding {
            sink.push(Diagnostic::warning(
                sources.line_span(file, number),
                message,
            ));
        }
    }
}

struct Session<'a> {
    schema: &'a Schema,
    /// The command that was sent last.
    command: Option<&'a CommandDef>,
}

impl<'a> Session<'a> {
    fn sent(&mut self, message: &Value) -> Result<(), String> {
        let Value::Object(message) = message else {
            return Err("a request is an object".to_owned());
        };
        self.command = None;
        let name = message.get("execute").or_else(|| message.get("exec-oob"));
        let Some(Value::String(name)) = name else {
            return Err("a request has a string 'execute'".to_owned());
        };
        let found = self
            .schema
            .definitions
            .iter()
            .find(|definition| definition.name == *name);
        let Some(Kind::Command(command)) = found.map(|definition| &definition.kind) else {
            return Err(format!("there is no command '{name}'"));
        };
        self.command = Some(command);
        if !command.generate {
            // The handler takes what it likes.
            return Ok(());
        }
        self.arguments(&command.args, message.get("arguments"), "arguments")
    }

    fn received(&self, message: &Value) -> Result<(), String> {
        let Value::Object(message) = message else {
            return Ok(());
        };
        if let Some(value) = message.get("return")
            && let Some(command) = self.command
        {
            return match &command.returns {
                Some(ty) => self.value(ty, value, "return"),
                None if value.as_object().is_some_and(Map::is_empty) => Ok(()),
                None => Err("the command returns {}".to_owned()),
            };
        }
        let Some(Value::String(name)) = message.get("event") else {
            return Ok(());
        };
        let found = self
            .schema
            .definitions
            .iter()
            .find(|definition| definition.name == *name);
        match found.map(|definition| &definition.kind) {
            Some(Kind::Event(event)) => self.arguments(&event.args, message.get("data"), "data"),
            _ => Err(format!("there is no event '{name}'")),
        }
    }

    fn arguments(&self, args: &Args, value: Option<&Value>, path: &str) -> Result<(), String> {
        let empty = Map::new();
        let object = match value {
            None => &empty,
            Some(Value::Object(object)) => object,
            Some(_) => return Err(format!("'{path}' is no object")),
        };
        let members = match args {
            Args::None => Vec::new(),
            Args::Inline(members) => members.iter().collect(),
            Args::Named(id) => self.members(*id, object),
        };
        self.object(&members, object, path)
    }

    /// The members that an object type has for these values: those of the union branches chosen
    /// included.
    fn members(&self, id: DefId, object: &Object) -> Vec<&'a Member> {
        let Kind::Union(union) = &self.schema.def(id).kind else {
            return self.schema.flattened_members(id);
        };
        let mut members = match &union.base {
            UnionBase::Named(base) => self.schema.flattened_members(*base),
            UnionBase::Inline(members) => members.iter().collect(),
        };
        if let Some(Value::String(tag)) = object.get(&union.discriminator)
            && let Some(branch) = union.branches.iter().find(|branch| branch.value == *tag)
            && let Some(branch) = branch.ty
        {
            members.extend(self.members(branch, object));
        }
        members
    }

    fn object(&self, members: &[&Member], object: &Object, path: &str) -> Result<(), String> {
        for member in members {
            let path = format!("{path}.{}", member.name);
            match object.get(&member.name) {
                Some(value) => self.value(&member.ty, value, &path)?,
                None if member.optional => {}
                None => return Err(format!("'{path}' is missing")),
            }
        }
        match object
            .keys()
            .find(|key| !members.iter().any(|member| member.name == **key))
        {
            Some(key) => Err(format!("'{path}.{key}' is unexpected")),
            None => Ok(()),
        }
    }

    fn value(&self, ty: &Type, value: &Value, path: &str) -> Result<(), String> {
        match (ty, value) {
            (Type::Builtin(builtin), _) => match fits(*builtin, value) {
                true => Ok(()),
                false => Err(format!(
                    "'{path}' is no {}",
                    crate::resolve::name_of(*builtin)
                )),
            },
            (Type::Array(element), Value::Array(items)) => items
                .iter()
                .enumerate()
                .try_for_each(|(n, item)| self.value(element, item, &format!("{path}[{n}]"))),
            (Type::Array(_), _) => Err(format!("'{path}' is no array")),
            (Type::Defined(id), _) => self.defined(*id, value, path),
        }
    }

    fn defined(&self, id: DefId, value: &Value, path: &str) -> Result<(), String> {
        let definition = self.schema.def(id);
        match (&definition.kind, value) {
            (Kind::Enum(values), Value::String(name)) => {
                match values.iter().any(|value| value.name == *name) {
                    true => Ok(()),
                    false => Err(format!(
                        "'{path}': '{name}' is no value of {}",
                        definition.name
                    )),
                }
            }
            (Kind::Alternate(alternatives), _) => {
                match alternatives.iter().find(|one| self.is_kind(&one.ty, value)) {
                    Some(one) => self.value(&one.ty, value, path),
                    None => Err(format!("'{path}' fits no branch of {}", definition.name)),
                }
            }
            (Kind::Struct(_) | Kind::Union(_), Value::Object(object)) => {
                self.object(&self.members(id, object), object, path)
            }
            _ => Err(format!("'{path}' is no {}", definition.name)),
        }
    }

    /// Whether an alternate chooses the branch of this type for a value.
    fn is_kind(&self, ty: &Type, value: &Value) -> bool {
        match ty {
            Type::Array(_) => value.is_array(),
            Type::Builtin(builtin) => match builtin {
                Builtin::Str | Builtin::QType => value.is_string(),
                Builtin::Bool => value.is_boolean(),
                Builtin::Null => value.is_null(),
                Builtin::Any => true,
                _ => value.is_number(),
            },
            Type::Defined(id) => match self.schema.def(*id).kind {
                Kind::Enum(_) => value.is_string(),
                _ => value.is_object(),
            },
        }
    }
}

/// Whether a value is of a builtin type.
fn fits(builtin: Builtin, value: &Value) -> bool {
    let within = |low: i64, high: u64| match (value.as_i64(), value.as_u64()) {
        (_, Some(value)) => value <= high,
        (Some(value), None) => value >= low,
        (None, None) => false,
    };
    match builtin {
        Builtin::Str | Builtin::QType => value.is_string(),
        Builtin::Bool => value.is_boolean(),
        Builtin::Null => value.is_null(),
        Builtin::Any => true,
        Builtin::Number => value.is_number(),
        Builtin::Int | Builtin::Int64 => within(i64::MIN, i64::MAX.unsigned_abs()),
        Builtin::Int8 => within(i8::MIN.into(), i8::MAX.unsigned_abs().into()),
        Builtin::Int16 => within(i16::MIN.into(), i16::MAX.unsigned_abs().into()),
        Builtin::Int32 => within(i32::MIN.into(), i32::MAX.unsigned_abs().into()),
        Builtin::Uint8 => within(0, u8::MAX.into()),
        Builtin::Uint16 => within(0, u16::MAX.into()),
        Builtin::Uint32 => within(0, u32::MAX.into()),
        // Negative numbers wrap, as clients of old rely on.
        Builtin::Uint64 | Builtin::Size => within(i64::MIN, u64::MAX),
    }
}
