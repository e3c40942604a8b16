//! The checked schema: what the passes before it produce and every emitter reads.
//!
//! A `Schema` in hand means that every rule of the language holds: names resolve, members do not
//! clash, unions have their discriminators. Emitters therefore never report an error. Order is
//! source order everywhere.

/// A file by its position in `Schema::files`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub usize);

/// A byte range in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The file.
    pub file: FileId,
    /// First byte.
    pub start: usize,
    /// Behind the last byte.
    pub end: usize,
}

/// A definition by its position in `Schema::definitions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DefId(pub usize);

/// A whole schema after all checks and after `if` conditions were decided.
#[derive(Debug, Clone)]
pub struct Schema {
    /// One per schema file, in the order of first inclusion; a module of the output each.
    pub modules: Vec<Module>,
    /// Every definition, in source order (included files where they are included).
    pub definitions: Vec<Definition>,
}

/// A schema file.
#[derive(Debug, Clone)]
pub struct Module {
    /// The file's name relative to the top schema file's folder, without `.json`: `block-core`.
    pub name: String,
    /// The file.
    pub file: FileId,
    /// What it contains in order: definitions and free-form documentation.
    pub items: Vec<ModuleItem>,
}

/// A part of a module.
#[derive(Debug, Clone)]
pub enum ModuleItem {
    /// A definition.
    Definition(DefId),
    /// A documentation block that belongs to no definition.
    Text(Vec<DocBlock>),
}

/// A named definition.
#[derive(Debug, Clone)]
pub struct Definition {
    /// The wire name.
    pub name: String,
    /// Where the name stands.
    pub span: Span,
    /// What it is.
    pub kind: Kind,
    /// Feature names.
    pub features: Vec<Feature>,
    /// Its documentation.
    pub doc: Doc,
    /// The module it belongs to, as an index of `Schema::modules`.
    pub module: usize,
}

/// What a definition is.
#[derive(Debug, Clone)]
pub enum Kind {
    /// A closed set of names.
    Enum(Vec<EnumValue>),
    /// An object type.
    Struct(StructDef),
    /// An object type with a part that depends on a member.
    Union(UnionDef),
    /// A type told apart by the kind of JSON value.
    Alternate(Vec<Alternative>),
    /// A command.
    Command(CommandDef),
    /// An event.
    Event(EventDef),
}

/// A value of an enum.
#[derive(Debug, Clone)]
pub struct EnumValue {
    /// The wire name.
    pub name: String,
    /// Its features.
    pub features: Vec<Feature>,
    /// Its description.
    pub doc: Vec<DocBlock>,
}

/// A struct.
#[derive(Debug, Clone)]
pub struct StructDef {
    /// The struct whose members come first.
    pub base: Option<DefId>,
    /// Its own members.
    pub members: Vec<Member>,
}

/// A union.
#[derive(Debug, Clone)]
pub struct UnionDef {
    /// The common members.
    pub base: UnionBase,
    /// The name of the base member that decides (maybe a member of the base's base).
    pub discriminator: String,
    /// The enum of the discriminator.
    pub tag_enum: DefId,
    /// One per value of the enum, in the enum's order; `None` where the schema names no type: no
    /// further members.
    pub branches: Vec<Branch>,
}

/// Where a union's common members come from.
#[derive(Debug, Clone)]
pub enum UnionBase {
    /// A named struct.
    Named(DefId),
    /// Members written in place.
    Inline(Vec<Member>),
}

/// A branch of a union.
#[derive(Debug, Clone)]
pub struct Branch {
    /// The value of the discriminator.
    pub value: String,
    /// A struct or union with the further members.
    pub ty: Option<DefId>,
}

/// A branch of an alternate.
#[derive(Debug, Clone)]
pub struct Alternative {
    /// The branch's name (not on the wire).
    pub name: String,
    /// Its type.
    pub ty: Type,
    /// Its description.
    pub doc: Vec<DocBlock>,
}

/// A member of an object type, or an argument.
#[derive(Debug, Clone)]
pub struct Member {
    /// The wire name, without the `*`.
    pub name: String,
    /// Where the name stands.
    pub span: Span,
    /// Its type.
    pub ty: Type,
    /// Whether it may be absent.
    pub optional: bool,
    /// Its features.
    pub features: Vec<Feature>,
    /// Its description.
    pub doc: Vec<DocBlock>,
}

/// A reference to a type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Type {
    /// A builtin.
    Builtin(Builtin),
    /// An enum, struct, union or alternate of the schema.
    Defined(DefId),
    /// A list of one of the above.
    Array(Box<Type>),
}

/// The builtin types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Builtin {
    Str,
    Int,
    Int8,
    Int16,
    Int32,
    Int64,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Size,
    Number,
    Bool,
    Null,
    Any,
    QType,
}

/// A command.
#[derive(Debug, Clone)]
pub struct CommandDef {
    /// Its arguments.
    pub args: Args,
    /// What it returns; `None` is the empty object.
    pub returns: Option<Type>,
    /// The handler gets one value of the argument type (wire format unchanged).
    pub boxed: bool,
    /// False: the handler gets the raw object and no marshaller is made.
    pub generate: bool,
    /// False: nothing is sent on success.
    pub success_response: bool,
    /// May be run out of band.
    pub allow_oob: bool,
    /// May be run before the daemon is ready, and (for `qmp_capabilities`) before negotiation.
    pub allow_preconfig: bool,
    /// Runs in a coroutine in QEMU; no meaning here beyond the documents.
    pub coroutine: bool,
}

/// An event.
#[derive(Debug, Clone)]
pub struct EventDef {
    /// Its data.
    pub args: Args,
    /// As for commands.
    pub boxed: bool,
}

/// The arguments of a command or the data of an event.
#[derive(Debug, Clone)]
pub enum Args {
    /// None.
    None,
    /// Members written in place.
    Inline(Vec<Member>),
    /// A named struct, or a union when boxed.
    Named(DefId),
}

/// A feature of a definition, member or value.
#[derive(Debug, Clone)]
pub struct Feature {
    /// `deprecated`, `unstable` or any other name.
    pub name: String,
    /// Its description.
    pub doc: Vec<DocBlock>,
}

/// A definition's documentation; member, value and feature descriptions stand with those.
#[derive(Debug, Clone, Default)]
pub struct Doc {
    /// The text before and between the sections.
    pub body: Vec<DocBlock>,
    /// `Returns:`.
    pub returns: Vec<DocBlock>,
    /// `Errors:`.
    pub errors: Vec<DocBlock>,
    /// `Since:`.
    pub since: Option<String>,
    /// Descriptions of arguments that come from a named argument type (`@arg:` on a command with
    /// `data: 'Name'`).
    pub arguments: Vec<(String, Vec<DocBlock>)>,
}

/// A piece of documentation text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DocBlock {
    /// `= Title` (level 1), `== Title` (level 2).
    Heading(u8, String),
    /// Running text; lines joined by `\n`. `@name` references kept as written.
    Paragraph(String),
    /// A list; each item is a block list.
    List(Vec<Vec<DocBlock>>),
    /// A literal block, as it is.
    Literal(String),
    /// `.. note::` and its kin: the directive's name and its content.
    Admonition(String, Vec<DocBlock>),
    /// `.. qmp-example::`: messages and prose between them.
    Example(Example),
}

/// An example session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// `:title:`.
    pub title: Option<String>,
    /// `:annotated:`.
    pub annotated: bool,
    /// The lines in order.
    pub lines: Vec<ExampleLine>,
}

/// A part of an example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExampleLine {
    /// `->`: what the client sends, with the line it starts at (1-based) in its file.
    Sent(String, usize),
    /// `<-`: what the server answers, with its line.
    Received(String, usize),
    /// Prose.
    Prose(String),
}

impl Schema {
    /// The definition behind an id.
    pub fn def(&self, id: DefId) -> &Definition {
        &self.definitions[id.0]
    }

    /// Every example in the documentation, with the file it stands in. The order is that of the
    /// files, and in each of the definitions.
    pub fn examples(&self) -> Vec<(FileId, &Example)> {
        let mut found = Vec::new();
        for module in &self.modules {
            let mut add = |example| found.push((module.file, example));
            for item in &module.items {
                let id = match item {
                    ModuleItem::Text(blocks) => {
                        visit_examples(blocks, &mut add);
                        continue;
                    }
                    ModuleItem::Definition(id) => *id,
                };
                let doc = &self.def(id).doc;
                let arguments = doc.arguments.iter().map(|(_, blocks)| blocks);
                for blocks in [&doc.body, &doc.returns, &doc.errors]
                    .into_iter()
                    .chain(arguments)
                {
                    visit_examples(blocks, &mut add);
                }
            }
        }
        found
    }

    /// All members of a struct, base first; `UnionDef` bases included. Empty for other kinds.
    pub fn flattened_members(&self, id: DefId) -> Vec<&Member> {
        match &self.def(id).kind {
            Kind::Struct(def) => {
                let mut all = def
                    .base
                    .map(|base| self.flattened_members(base))
                    .unwrap_or_default();
                all.extend(&def.members);
                all
            }
            Kind::Union(def) => match &def.base {
                UnionBase::Named(base) => self.flattened_members(*base),
                UnionBase::Inline(members) => members.iter().collect(),
            },
            _ => Vec::new(),
        }
    }
}

/// Calls `found` for every example in `blocks`; their nesting is limited by the parser.
fn visit_examples<'a>(blocks: &'a [DocBlock], found: &mut dyn FnMut(&'a Example)) {
    for block in blocks {
        match block {
            DocBlock::Example(example) => found(example),
            DocBlock::Admonition(_, inner) => visit_examples(inner, found),
            DocBlock::List(items) => items.iter().for_each(|item| visit_examples(item, found)),
            DocBlock::Heading(..) | DocBlock::Paragraph(_) | DocBlock::Literal(_) => {}
        }
    }
}
