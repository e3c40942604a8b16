//! What a correct schema becomes.

use qapi_gen::ir::{
    Args, DocBlock, ExampleLine, Feature, Kind, Member, ModuleItem, Schema, Type, UnionBase,
};

use qapi_gen::{Dialect, Options};

use crate::{load, load_with};

/// A schema as short text, one definition per line.
pub(crate) fn describe(schema: &Schema) -> String {
    let lines: Vec<String> = schema
        .definitions
        .iter()
        .map(|definition| {
            let name = &definition.name;
            let text = match &definition.kind {
                Kind::Enum(values) => {
                    let values: Vec<&str> =
                        values.iter().map(|value| value.name.as_str()).collect();
                    format!("enum {name}: {}", values.join(" "))
                }
                Kind::Struct(def) => {
                    let base = def.base.map_or(String::new(), |base| {
                        format!(" < {}", schema.def(base).name)
                    });
                    format!("struct {name}{base}: {}", members(schema, &def.members))
                }
                Kind::Union(def) => {
                    let base = match &def.base {
                        UnionBase::Named(base) => format!("< {}", schema.def(*base).name),
                        UnionBase::Inline(own) => members(schema, own),
                    };
                    let branches: Vec<String> = def
                        .branches
                        .iter()
                        .map(|branch| {
                            let ty = branch.ty.map_or("-", |ty| &schema.def(ty).name);
                            format!("{}={ty}", branch.value)
                        })
                        .collect();
                    format!(
                        "union {name}: {base} | {} {}",
                        def.discriminator,
                        branches.join(" ")
                    )
                }
                Kind::Alternate(alternatives) => {
                    let list: Vec<String> =
                        alternatives.iter().map(|one| ty(schema, &one.ty)).collect();
                    format!("alternate {name}: {}", list.join(" "))
                }
                Kind::Command(def) => {
                    let returns = def
                        .returns
                        .as_ref()
                        .map_or(String::new(), |ret| format!(" -> {}", ty(schema, ret)));
                    let flags = [
                        (def.boxed, " boxed"),
                        (!def.generate, " raw"),
                        (!def.success_response, " silent"),
                        (def.allow_oob, " oob"),
                        (def.allow_preconfig, " preconfig"),
                        (def.coroutine, " coroutine"),
                    ];
                    let flags: String = flags
                        .iter()
                        .filter(|(set, _)| *set)
                        .map(|(_, word)| *word)
                        .collect();
                    format!(
                        "command {name}({}){returns}{flags}",
                        args(schema, &def.args)
                    )
                }
                Kind::Event(def) => format!("event {name}({})", args(schema, &def.args)),
            };
            format!("{text}{}", features(&definition.features))
                .trim_end()
                .to_owned()
        })
        .collect();
    lines.join("\n")
}

fn args(schema: &Schema, args: &Args) -> String {
    match args {
        Args::None => String::new(),
        Args::Inline(own) => members(schema, own),
        Args::Named(id) => schema.def(*id).name.clone(),
    }
}

fn members(schema: &Schema, members: &[Member]) -> String {
    let list: Vec<String> = members
        .iter()
        .map(|member| {
            let optional = if member.optional { "?" } else { "" };
            let features = features(&member.features);
            format!(
                "{}{optional}: {}{features}",
                member.name,
                ty(schema, &member.ty)
            )
        })
        .collect();
    list.join(", ")
}

fn features(features: &[Feature]) -> String {
    features
        .iter()
        .map(|feature| format!(" +{}", feature.name))
        .collect()
}

fn ty(schema: &Schema, of: &Type) -> String {
    match of {
        Type::Builtin(builtin) => format!("{builtin:?}").to_lowercase(),
        Type::Defined(id) => schema.def(*id).name.clone(),
        Type::Array(element) => format!("[{}]", ty(schema, element)),
    }
}

#[test]
fn every_construct_arrives() {
    let text = "
        { 'enum': 'Tag', 'prefix': 'TAG',
          'data': [ 'a', { 'name': 'b', 'features': [ 'f' ] }, 'c' ] }
        { 'struct': 'Base', 'data': { 'tag': 'Tag', '*n': 'uint16' } }
        { 'struct': 'Derived', 'base': 'Base', 'data': { 'l': [ 'Derived' ], '*any': 'any',
            'old': { 'type': 'str', 'features': [ 'deprecated' ] } } }
        { 'union': 'Uni', 'base': 'Derived', 'discriminator': 'tag',
          'data': { 'c': 'Empty', 'a': 'Empty' } }
        { 'struct': 'Empty', 'data': {} }
        { 'alternate': 'Alt', 'data': { 's': 'str', 'o': 'Empty', 'l': [ 'int' ] } }
        { 'command': 'plain' }
        { 'command': 'empty', 'data': {}, 'allow-oob': true, 'allow-preconfig': true }
        { 'command': 'named', 'data': 'Derived', 'returns': [ 'Empty' ], 'coroutine': true }
        { 'command': 'uni', 'data': 'Uni', 'boxed': true, 'features': [ 'unstable' ] }
        { 'command': 'raw', 'data': { 'q': 'QType' }, 'gen': false, 'success-response': false }
        { 'event': 'HAPPENED', 'data': { 'when': 'size' } }";
    let expected = "\
enum Tag: a b c
struct Base: tag: Tag, n?: uint16
struct Derived < Base: l: [Derived], any?: any, old: str +deprecated
union Uni: < Derived | tag a=Empty b=- c=Empty
struct Empty:
alternate Alt: str Empty [int]
command plain()
command empty() oob preconfig
command named(Derived) -> [Empty] coroutine
command uni(Uni) boxed +unstable
command raw(q: qtype) raw silent
event HAPPENED(when: size)";
    assert_eq!(describe(&load(text).unwrap().schema), expected);
}

fn paragraph(text: &str) -> DocBlock {
    DocBlock::Paragraph(text.to_owned())
}

#[test]
fn documentation_is_taken_apart() {
    let text = "\
##
# = Title
#
# Free text
# over two lines.
##

##
# @do-it:
#
# The body, with @x.
#
# @x: first line
#     second line
#
#     - an item
#       of two lines
#     - another
#
# @y: short (since 2.0)
#
# Features:
#
# @unstable: not settled
#
# Returns: something
#
# Errors:
#     - If it fails,
#       GenericError
#
# TODO: dropped
#
# Since: 1.5
#
# .. note:: Take
#    care.
#
# Like so::
#
#     literal
#       text
#
# .. qmp-example::
#    :title: A long
#        title
#    :annotated:
#
#    First this:
#
#    -> { \"execute\": \"do-it\",
#         \"arguments\": { \"x\": 1 } }
#    ... later ...
#    <- { \"return\": {} }
##
{ 'command': 'do-it', 'data': { 'x': 'int', '*y': 'int' },
  'returns': 'Thing', 'features': [ 'unstable' ] }
{ 'struct': 'Thing', 'data': {} }
";
    let loaded = load(text).unwrap();
    let schema = &loaded.schema;
    let ModuleItem::Text(free) = &schema.modules[0].items[0] else {
        panic!("free text comes first");
    };
    let title = DocBlock::Heading(1, "Title".to_owned());
    assert_eq!(*free, [title, paragraph("Free text\nover two lines.")]);

    let definition = &schema.definitions[0];
    let Kind::Command(command) = &definition.kind else {
        panic!("it is a command");
    };
    let Args::Inline(members) = &command.args else {
        panic!("with members in place");
    };
    let items = vec![
        vec![paragraph("an item\nof two lines")],
        vec![paragraph("another")],
    ];
    assert_eq!(
        members[0].doc,
        [paragraph("first line\nsecond line"), DocBlock::List(items)]
    );
    assert_eq!(members[1].doc, [paragraph("short (since 2.0)")]);
    assert_eq!(definition.features[0].doc, [paragraph("not settled")]);

    let doc = &definition.doc;
    assert_eq!(doc.returns, [paragraph("something")]);
    let errors = vec![vec![paragraph("If it fails,\nGenericError")]];
    assert_eq!(doc.errors, [DocBlock::List(errors)]);
    assert_eq!(doc.since.as_deref(), Some("1.5"));
    let note = DocBlock::Admonition("note".to_owned(), vec![paragraph("Take\ncare.")]);
    assert_eq!(doc.body[0], paragraph("The body, with @x."));
    assert_eq!(doc.body[1], note);
    assert_eq!(doc.body[2], paragraph("Like so:"));
    assert_eq!(doc.body[3], DocBlock::Literal("literal\n  text".to_owned()));
    let DocBlock::Example(example) = &doc.body[4] else {
        panic!("an example ends it");
    };
    assert_eq!(example.title.as_deref(), Some("A long title"));
    assert!(example.annotated);
    let message = "{ \"execute\": \"do-it\",\n  \"arguments\": { \"x\": 1 } }";
    assert_eq!(
        example.lines,
        [
            ExampleLine::Prose("First this:".to_owned()),
            ExampleLine::Sent(message.to_owned(), 51),
            ExampleLine::Prose("... later ...".to_owned()),
            ExampleLine::Received("{ \"return\": {} }".to_owned(), 54),
        ]
    );
    assert_eq!(doc.body.len(), 5);
}

#[test]
fn arguments_of_a_named_type_may_be_described_at_the_command() {
    let text = "{ 'struct': 'Thing', 'data': { 'a': 'int' } }
##
# @do-it:
#
# @a: what it means here
##
{ 'command': 'do-it', 'data': 'Thing' }";
    let loaded = load(text).unwrap();
    let arguments = &loaded.schema.definitions[1].doc.arguments;
    assert_eq!(
        *arguments,
        [("a".to_owned(), vec![paragraph("what it means here")])]
    );
}

#[test]
fn the_legacy_dialect_becomes_the_modern_one() {
    let text = "
########################################
# a banner
########################################

##
# @Outer
#
# What it is.
#
# @plain: #optional a member
#         over two lines
#
# Notes: kept by nobody
#
# Since: 0.14.0
##
{ 'type': 'Outer', 'data': { '*plain': 'int',
  'nested': { 'deep': { 'x': 'bool' }, '*dict2': [ 'int' ] } } }
{ 'enum': 'Event', 'data': [ 'l1_grow.alloc_table', 'UP' ] }
{ 'union': 'Simple', 'data': { 'number': 'int', 'a-list': [ 'str' ], 'outer': 'Outer' } }
{ 'union': 'WithBase', 'base': 'Outer', 'data': { 'number': 'size' } }
{ 'type': 'FlatBase', 'data': { 'event': 'Event' } }
{ 'union': 'Flat', 'base': 'FlatBase', 'discriminator': 'event', 'data': { 'UP': 'Empty' } }
{ 'type': 'Empty', 'data': {} }
{ 'union': 'Anonymous', 'discriminator': {}, 'data': { 'definition': 'Flat', 'reference': 'str' } }
{ 'command': 'netdev_add', 'data': { 'type': 'str', '*props': '**' }, 'gen': 'no' }
{ 'command': 'qom-get', 'returns': 'visitor', 'gen': 'no' }
{ 'command': 'guest-shutdown', 'success-response': 'no' }
{ 'command': 'get-strings', 'returns': [ 'str' ] }
";
    let options = Options {
        dialect: Dialect::Legacy,
        ..Options::default()
    };
    let loaded = load_with(text, &options).unwrap_or_else(|failure| panic!("{}", failure.render()));
    let expected = "\
struct OuterNestedDeep: x: bool
struct OuterNested: deep: OuterNestedDeep, dict2?: [int]
struct Outer: plain?: int, nested: OuterNested
enum Event: l1_grow.alloc_table UP
struct SimpleNumberWrapper: data: int
struct SimpleAListWrapper: data: [str]
struct SimpleOuterWrapper: data: Outer
enum SimpleKind: number a-list outer
union Simple: type: SimpleKind | type number=SimpleNumberWrapper a-list=SimpleAListWrapper \
outer=SimpleOuterWrapper
struct WithBaseNumberWrapper: data: size
enum WithBaseKind: number
struct WithBaseBase < Outer: type: WithBaseKind
union WithBase: < WithBaseBase | type number=WithBaseNumberWrapper
struct FlatBase: event: Event
union Flat: < FlatBase | event l1_grow.alloc_table=- UP=Empty
struct Empty:
alternate Anonymous: Flat str
command netdev_add(type: str, props?: any) raw
command qom-get() -> any raw
command guest-shutdown() silent
command get-strings() -> [str]";
    assert_eq!(describe(&loaded.schema), expected);
    let outer = &loaded.schema.definitions[2];
    assert_eq!(outer.doc.body, [paragraph("What it is.")]);
    assert_eq!(outer.doc.since.as_deref(), Some("0.14.0"));
    let Kind::Struct(def) = &outer.kind else {
        panic!("it is a struct");
    };
    assert_eq!(
        def.members[0].doc,
        [paragraph("#optional a member\nover two lines")]
    );
    // The modern dialect knows nothing of this.
    assert!(load(text).is_err());
}
