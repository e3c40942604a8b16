//! Reading a schema: the top file, its includes, and from each the items in order.
//!
//! Files are read through [`Reader`] only, so that everything else is a pure function of the texts.

use std::collections::BTreeSet;
use std::io::{self, Read as _};
use std::path::{Component, Path, PathBuf};

use crate::Dialect;
use crate::ast::{Ast, Definition, Item, Module, Name};
use crate::diagnostic::{Diagnostic, Sink, SourceMap};
use crate::docparse::{self, Comment, DefinitionDoc};
use crate::ir::{FileId, Span};
use crate::legacy;
use crate::limits::{MAX_FILE_BYTES, MAX_FILES, MAX_INCLUDE_DEPTH};
use crate::parse::{self, Node};
use crate::shape::{self, Directive};

/// Where source texts come from.
pub trait Reader {
    /// The text of the file at `path`.
    ///
    /// # Errors
    /// Whatever keeps the text from being read; the message is shown to the user.
    fn read(&self, path: &Path) -> io::Result<String>;
}

/// Reads from the file system.
#[derive(Debug, Clone, Copy, Default)]
pub struct Disk;

impl Reader for Disk {
    fn read(&self, path: &Path) -> io::Result<String> {
        let mut bytes = Vec::new();
        let file = std::fs::File::open(path)?;
        file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
        if u64::try_from(bytes.len()).unwrap_or(u64::MAX) > MAX_FILE_BYTES {
            let message = format!("larger than {MAX_FILE_BYTES} bytes");
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
        }
        String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            let message = format!("not UTF-8 at byte {at}");
            io::Error::new(io::ErrorKind::InvalidData, message)
        })
    }
}

/// Reads `path`, or says why not as QEMU does, and names the file.
pub(crate) fn read_top(path: &Path, what: &str, reader: &dyn Reader) -> Result<String, String> {
    reader
        .read(path)
        .map_err(|error| format!("can't read {what} '{}': {error}", path.display()))
}

/// Reads the schema whose top file has the text `text`.
pub(crate) fn load(
    top: &Path,
    text: String,
    reader: &dyn Reader,
    dialect: Dialect,
    sources: &mut SourceMap,
    sink: &mut Sink,
) -> Ast {
    let mut loader = Loader {
        reader,
        dialect,
        sources,
        sink,
        ast: Ast::default(),
        root: normal(top.parent().unwrap_or(Path::new(""))),
        known: BTreeSet::new(),
        stack: Vec::new(),
    };
    loader.file(normal(top), text, None);
    loader.ast
}

struct Loader<'a> {
    reader: &'a dyn Reader,
    dialect: Dialect,
    sources: &'a mut SourceMap,
    sink: &'a mut Sink,
    ast: Ast,
    /// The folder of the top file: modules are named relative to it.
    root: PathBuf,
    /// All files so far: including one again does nothing.
    known: BTreeSet<PathBuf>,
    /// The files that are being read, outermost first.
    stack: Vec<PathBuf>,
}

impl Loader<'_> {
    fn file(&mut self, path: PathBuf, text: String, included_at: Option<Span>) {
        let shown = path.display().to_string();
        let id = self.sources.add_included(shown, text, included_at);
        let module = self.ast.modules.len();
        self.ast.modules.push(Module {
            name: module_name(&self.root, &path),
            file: id,
            items: Vec::new(),
        });
        self.known.insert(path.clone());
        self.stack.push(path);
        let text = &self.sources.file(id).text;
        let items = match self.dialect {
            Dialect::Modern => parse::parse(id, text, self.sink),
            Dialect::Legacy => parse::parse(id, &legacy::plain_comments(text), self.sink),
        };
        let mut waiting: Option<DefinitionDoc> = None;
        for item in items {
            match item {
                parse::Item::Doc(span) => {
                    self.unclaimed(waiting.take());
                    waiting = self.comment(id, module, span);
                }
                // Its documentation is not to blame.
                parse::Item::Broken => waiting = None,
                parse::Item::Object(node) => {
                    let Some(node) = self.directive(node, &mut waiting) else {
                        continue;
                    };
                    match self.dialect {
                        Dialect::Modern => self.definition(node, module, waiting.take()),
                        Dialect::Legacy => self.legacy_definition(id, node, module),
                    }
                }
            }
        }
        self.unclaimed(waiting);
        self.stack.pop();
    }

    /// Parses a comment; definition documentation is returned to wait for its definition.
    fn comment(&mut self, id: FileId, module: usize, span: Span) -> Option<DefinitionDoc> {
        let source = self.sources.file(id);
        match docparse::parse(id, source, span, self.sink)? {
            Comment::Definition(doc) => Some(*doc),
            Comment::Free(doc) => {
                self.ast.modules[module].items.push(Item::Text(doc));
                None
            }
        }
    }

    fn unclaimed(&mut self, doc: Option<DefinitionDoc>) {
        if let Some(doc) = doc {
            let name = &doc.symbol.text;
            let message = format!("documentation for '{name}' is not followed by the definition");
            self.sink.error(doc.symbol.span, message);
        }
    }

    /// Carries out a directive; gives the node back if it is none.
    fn directive(&mut self, node: Node, waiting: &mut Option<DefinitionDoc>) -> Option<Node> {
        match shape::directive(node, &mut self.ast.pragma, self.sink) {
            Err(node) => return Some(node),
            Ok(Some(Directive::Include(name))) => {
                self.unclaimed(waiting.take());
                self.include(&name);
            }
            Ok(Some(Directive::Pragma) | None) => self.unclaimed(waiting.take()),
        }
        None
    }

    fn definition(&mut self, node: Node, module: usize, doc: Option<DefinitionDoc>) {
        let Some(mut definition) = shape::definition(node, self.sink) else {
            return;
        };
        if let Some(doc) = &doc
            && doc.symbol.text != definition.name.text
        {
            let message = format!("documentation comment is for '{}'", doc.symbol.text);
            let error = Diagnostic::error(doc.symbol.span, message);
            let note = format!("the definition that follows is '{}'", definition.name.text);
            self.sink.push(error.note_at(definition.name.span, note));
            definition.broken = true;
        }
        definition.doc = doc;
        self.declare(definition, module);
    }

    fn declare(&mut self, mut definition: Definition, module: usize) {
        definition.module = module;
        let index = self.ast.definitions.len();
        self.ast.definitions.push(definition);
        self.ast.modules[module].items.push(Item::Definition(index));
    }

    /// The definition itself comes last of those that it implies.
    fn legacy_definition(&mut self, id: FileId, node: Node, module: usize) {
        let source = self.sources.file(id);
        let doc = legacy::comment_above(&source.text, node.span.start).map(|(start, end)| {
            docparse::parse_legacy(
                source,
                Span {
                    file: id,
                    start,
                    end,
                },
            )
        });
        let mut nodes = legacy::modernise(node);
        let last = nodes.pop();
        for implied in nodes {
            self.definition(implied, module, None);
        }
        let Some(mut definition) = last.and_then(|node| shape::definition(node, self.sink)) else {
            return;
        };
        definition.doc = doc;
        self.declare(definition, module);
    }

    fn include(&mut self, name: &Name) {
        let folder = self.stack.last().and_then(|path| path.parent());
        let path = normal(&folder.unwrap_or(Path::new("")).join(&name.text));
        if self.stack.contains(&path) {
            self.sink
                .error(name.span, format!("inclusion loop for {}", name.text));
            return;
        }
        if self.known.contains(&path) {
            return;
        }
        if self.stack.len() >= MAX_INCLUDE_DEPTH || self.known.len() >= MAX_FILES {
            let message = format!(
                "too many includes: at most {MAX_FILES} files, {MAX_INCLUDE_DEPTH} levels deep"
            );
            self.sink.error(name.span, message);
            return;
        }
        match self.reader.read(&path) {
            Ok(text) => self.file(path, text, Some(name.span)),
            Err(error) => {
                let message = format!("can't read include file '{}': {error}", path.display());
                self.sink.error(name.span, message);
                // Once is enough, however often it is included.
                self.known.insert(path);
            }
        }
    }
}

/// The path without `.` and, where the text alone tells, without `..`.
fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match (part, out.components().next_back()) {
            (Component::CurDir, _) => {}
            (Component::ParentDir, Some(Component::Normal(_))) => drop(out.pop()),
            _ => out.push(part),
        }
    }
    out
}

/// `block-core` for `schema/block-core.json` below `schema`.
fn module_name(root: &Path, path: &Path) -> String {
    let relative = path.strip_prefix(root).unwrap_or(path);
    let text = relative.to_string_lossy().replace('\\', "/");
    text.strip_suffix(".json").unwrap_or(&text).to_owned()
}
