//! The table against the schema: the same commands, the same arguments, the handler that the
//! generator makes.

use std::collections::BTreeSet;

use crate::check::examples;
use crate::diagnostic::{Diagnostic, Sink, SourceMap};
use crate::hx::{Arg, Code, Entry, HxFile, marshaller};
use crate::ir::{
    Args, Branch, Builtin, CommandDef, Definition, Kind, Member, Schema, Span, Type, UnionBase,
};

/// Compares a table with the schema. Disagreements are errors; another order of arguments is a
/// warning.
pub fn check(hx: &HxFile, schema: &Schema, sink: &mut Sink) {
    let commands: Vec<(&Definition, &CommandDef)> = schema
        .definitions
        .iter()
        .filter_map(|definition| match &definition.kind {
            Kind::Command(command) => Some((definition, command)),
            _ => None,
        })
        .collect();
    for entry in &hx.entries {
        let name = &entry.name.text;
        match commands
            .iter()
            .find(|(definition, _)| definition.name == *name)
        {
            Some((definition, command)) => {
                check_handler(entry, command, sink);
                check_arguments(entry, definition, command, schema, sink);
            }
            // The schema may know it under a condition that does not hold either.
            None if entry.guard.is_some() => {}
            None => {
                let message = format!("command '{name}' is not in the schema");
                let known = commands
                    .iter()
                    .map(|(definition, _)| definition.name.as_str());
                sink.push(Diagnostic::error(entry.name.span, message).suggest(name, known));
            }
        }
    }
    let entries: BTreeSet<&str> = hx
        .entries
        .iter()
        .map(|entry| entry.name.text.as_str())
        .collect();
    for (definition, _) in &commands {
        if !entries.contains(definition.name.as_str()) {
            let message = format!("command '{}' has no entry in the table", definition.name);
            sink.error(definition.span, message);
        }
    }
}

/// Warns about commands without a document, and about examples that are not valid JSON or do not
/// fit the schema.
pub fn check_documents(hx: &HxFile, schema: &Schema, sources: &SourceMap, sink: &mut Sink) {
    for entry in &hx.entries {
        if hx.document(&entry.name.text).is_none() {
            let message = format!("command '{}' has no document", entry.name.text);
            sink.push(Diagnostic::warning(entry.name.span, message));
        }
    }
    for document in &hx.documents {
        // Documents that belong to no command may show the arrows themselves.
        if hx.entry(&document.title.text).is_some() {
            examples::check_lines(&document.lines, hx.file, schema, sources, sink);
        }
    }
}

/// Handlers of commands without a marshaller may be called anything.
fn check_handler(entry: &Entry, command: &CommandDef, sink: &mut Sink) {
    let Some(handler) = &entry.handler else {
        return;
    };
    let expected = marshaller(&entry.name.text);
    if command.generate && handler.text != expected {
        let message = format!("handler of '{}' should be '{expected}'", entry.name.text);
        sink.error(handler.span, message);
    }
}

/// The arguments of a command as its schema gives them.
struct Declared<'a> {
    members: Vec<&'a Member>,
    /// The members depend on a discriminator: a list cannot name them.
    is_union: bool,
}

fn declared<'a>(command: &'a CommandDef, schema: &'a Schema) -> Declared<'a> {
    match &command.args {
        Args::None => Declared {
            members: Vec::new(),
            is_union: false,
        },
        Args::Inline(members) => Declared {
            members: members.iter().collect(),
            is_union: false,
        },
        Args::Named(id) => match &schema.def(*id).kind {
            Kind::Union(union) => {
                let mut members = match &union.base {
                    UnionBase::Named(base) => schema.flattened_members(*base),
                    UnionBase::Inline(members) => members.iter().collect(),
                };
                let branches = union.branches.iter().filter_map(|Branch { ty, .. }| *ty);
                members.extend(branches.flat_map(|branch| schema.flattened_members(branch)));
                Declared {
                    members,
                    is_union: true,
                }
            }
            _ => Declared {
                members: schema.flattened_members(*id),
                is_union: false,
            },
        },
    }
}

fn check_arguments(
    entry: &Entry,
    definition: &Definition,
    command: &CommandDef,
    schema: &Schema,
    sink: &mut Sink,
) {
    let declared = declared(command, schema);
    for arg in &entry.args {
        let member = declared
            .members
            .iter()
            .find(|member| member.name == arg.name);
        match member {
            Some(member) => check_argument(arg, member, schema, sink),
            None if arg.code == Code::Open && declared.is_union => {}
            None => unknown_argument(arg, definition, &declared, sink),
        }
    }
    if entry.is_open() {
        return;
    }
    if declared.is_union {
        let message = format!(
            "the arguments of '{}' are a union, so its 'args_type' needs an 'O' argument",
            definition.name
        );
        let error = Diagnostic::error(entry.args_span, message);
        sink.push(error.note_at(definition.span, "the command is defined here"));
        return;
    }
    for member in &declared.members {
        if !entry.args.iter().any(|arg| arg.name == member.name) {
            let message = format!(
                "argument '{}' of '{}' is not in 'args_type'",
                member.name, definition.name
            );
            let error = Diagnostic::error(entry.args_span, message);
            sink.push(error.note_at(member.span, "the schema defines it here"));
        }
    }
    check_order(entry, &declared.members, definition.span, sink);
}

fn unknown_argument(arg: &Arg, definition: &Definition, declared: &Declared<'_>, sink: &mut Sink) {
    let names = || declared.members.iter().map(|member| member.name.as_str());
    let message = format!(
        "argument '{}' of '{}' is not in the schema",
        arg.name, definition.name
    );
    let mut error = Diagnostic::error(arg.span, message)
        .note_at(definition.span, "the command is defined here")
        .suggest(&arg.name, names());
    if arg.code == Code::Open && !declared.members.is_empty() {
        let list: Vec<String> = names().map(|name| format!("'{name}'")).collect();
        error = error.note(format!(
            "it accepts anything, but the schema names {}",
            list.join(", ")
        ));
    }
    sink.push(error);
}

fn check_argument(arg: &Arg, member: &Member, schema: &Schema, sink: &mut Sink) {
    let name = &arg.name;
    let complain = |message: String, sink: &mut Sink| {
        let error = Diagnostic::error(arg.span, message);
        sink.push(error.note_at(member.span, "the schema defines it here"));
    };
    if arg.code == Code::Open {
        if !member.optional {
            let message = format!("argument '{name}' is mandatory, but 'O' does not demand it");
            complain(message, sink);
        }
        return;
    }
    if arg.optional != member.optional {
        let (here, there) = match arg.optional {
            true => ("optional", "mandatory"),
            false => ("mandatory", "optional"),
        };
        complain(
            format!("argument '{name}' is {here} here and {there} in the schema"),
            sink,
        );
    }
    let (takes, sound) = match arg.code {
        Code::String(_) => ("a string", is_string(&member.ty, schema)),
        Code::Integer(_) => ("an integer", is_integer(&member.ty)),
        Code::Number => ("a number", member.ty == Type::Builtin(Builtin::Number)),
        Code::Bool | Code::Flag(_) => ("a boolean", member.ty == Type::Builtin(Builtin::Bool)),
        Code::Any | Code::Open => return,
    };
    if !sound {
        let ty = type_name(&member.ty, schema);
        complain(
            format!("argument '{name}' is {takes} here and '{ty}' in the schema"),
            sink,
        );
    }
}

fn is_string(ty: &Type, schema: &Schema) -> bool {
    match ty {
        Type::Builtin(builtin) => matches!(builtin, Builtin::Str | Builtin::QType),
        Type::Defined(id) => matches!(schema.def(*id).kind, Kind::Enum(_)),
        Type::Array(_) => false,
    }
}

fn is_integer(ty: &Type) -> bool {
    use Builtin::{Int, Int8, Int16, Int32, Int64, Size, Uint8, Uint16, Uint32, Uint64};
    let Type::Builtin(builtin) = ty else {
        return false;
    };
    let integers = [
        Int, Int8, Int16, Int32, Int64, Uint8, Uint16, Uint32, Uint64, Size,
    ];
    integers.contains(builtin)
}

fn type_name(ty: &Type, schema: &Schema) -> String {
    match ty {
        Type::Builtin(builtin) => crate::resolve::name_of(*builtin).to_owned(),
        Type::Defined(id) => schema.def(*id).name.clone(),
        Type::Array(element) => format!("[{}]", type_name(element, schema)),
    }
}

fn check_order(entry: &Entry, members: &[&Member], place: Span, sink: &mut Sink) {
    let here: Vec<&str> = entry
        .args
        .iter()
        .map(|arg| arg.name.as_str())
        .filter(|name| members.iter().any(|member| member.name == *name))
        .collect();
    let there: Vec<&str> = members
        .iter()
        .map(|member| member.name.as_str())
        .filter(|name| here.contains(name))
        .collect();
    if here != there {
        let message = format!(
            "arguments of '{}' are in another order than in the schema",
            entry.name.text
        );
        let warning = Diagnostic::warning(entry.args_span, message);
        sink.push(
            warning
                .note_at(place, "the command is defined here")
                .note(format!("the schema's order is {}", there.join(", "))),
        );
    }
}
