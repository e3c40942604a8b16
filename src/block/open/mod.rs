//! Opening nodes: options as plain data in, nodes of the graph out. The only place that names every driver.
//!
//! * `options`: what a node is made of
//! * `backing`: what the header of an image may refer to
//!
//! Opening does I/O and may take long, so it works on an [`Opener`], which knows the nodes that exist, and not on the
//! graph. The graph is touched by `Graph::insert` only, which decides again whether names are free.

// Lands ahead of the qcow2 driver that has headers to follow.
#[allow(dead_code)]
mod backing;
mod options;

use std::collections::HashMap;
use std::sync::Arc;

use crate::driver::{BoxFuture, Child, Driver};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::raw::Raw;
use crate::graph::{Access, Behaviour, Graph, Link, NameSource, Node, NodeName, Opened};
use crate::io::IoContext;
use crate::limits::{MAX_CHAIN_DEPTH, MAX_DISK_SIZE};
use crate::protocols::file::{File, FileAccess};
use crate::protocols::null::Null;

pub use options::{
    Aio, BackingOption, CacheMode, DetectZeroes, DiscardMode, DriverOptions, FileOptions, Locking,
    NodeOptions, NodeRef, NullOptions, Qcow2Options, RawOptions,
};

/// What opening needs to know of the graph at its start.
#[derive(Debug, Clone)]
pub struct Opener {
    io: IoContext,
    names: NameSource,
    nodes: HashMap<String, Arc<Node>>,
}

impl Opener {
    /// As the graph is now.
    pub fn new(io: &IoContext, graph: &Graph) -> Self {
        let nodes = graph.nodes();
        Opener {
            io: io.clone(),
            names: graph.names(),
            nodes: nodes
                .map(|node| (node.name().to_owned(), node.clone()))
                .collect(),
        }
    }
}

/// Opens a node with everything below it that does not exist yet.
///
/// Files are locked from here on. Cancellation: whatever was opened is closed again; nothing has been written.
pub async fn open(opener: &Opener, options: &NodeOptions) -> Result<Opened> {
    let mut opening = Opening {
        opener,
        nodes: Vec::new(),
    };
    opening.open(options, 0).await?;
    Ok(Opened {
        nodes: opening.nodes,
    })
}

/// One call of `open`: the nodes so far, layers below first.
struct Opening<'a> {
    opener: &'a Opener,
    nodes: Vec<Arc<Node>>,
}

impl Opening<'_> {
    fn open<'a>(
        &'a mut self,
        options: &'a NodeOptions,
        depth: usize,
    ) -> BoxFuture<'a, Result<Arc<Node>>> {
        Box::pin(async move {
            if depth > MAX_CHAIN_DEPTH {
                return Err(invalid(format!(
                    "More than {MAX_CHAIN_DEPTH} layers are refused: does an image refer to itself?"
                )));
            }
            let name = self.name(options)?;
            let (driver, links, read_only) = match &options.driver {
                DriverOptions::File(file) => self.open_file(file, options).await?,
                DriverOptions::Null(null) => open_null(null, options)?,
                DriverOptions::Raw(raw) => self.open_raw(raw, options, depth).await?,
                DriverOptions::Qcow2(_) => {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        "Driver 'qcow2' is not available",
                    ));
                }
            };
            let node = Node::new(name, driver, behaviour(options, read_only)?, links);
            self.nodes.push(node.clone());
            Ok(node)
        })
    }

    /// The node's name, refused early when it is taken: nothing is opened then.
    fn name(&self, options: &NodeOptions) -> Result<NodeName> {
        let Some(given) = &options.node_name else {
            return Ok(self.opener.names.next());
        };
        let name = NodeName::given(given)?;
        let taken = self.nodes.iter().any(|node| node.name() == given);
        if taken || self.opener.nodes.contains_key(given) {
            return Err(Error::new(
                ErrorKind::AlreadyExists,
                format!("Duplicate nodes with node-name='{given}'"),
            ));
        }
        Ok(name)
    }

    async fn open_file(&self, file: &FileOptions, options: &NodeOptions) -> Result<Parts> {
        let access = FileAccess {
            read_only: options.read_only,
            auto_read_only: options.auto_read_only,
            cache: options.cache,
        };
        let driver = File::open(&self.opener.io, file, access).await?;
        let read_only = driver.is_read_only();
        Ok((Arc::new(driver), Vec::new(), read_only))
    }

    async fn open_raw(
        &mut self,
        raw: &RawOptions,
        options: &NodeOptions,
        depth: usize,
    ) -> Result<Parts> {
        let file = self.child(&raw.file, options, depth).await?;
        let read_only = effective_read_only(options, &file)?;
        let filename = file.driver().info().filename;
        let driver = Raw::new(Child::new(file.clone()), filename, raw.offset, raw.size)?;
        // Raw adds no metadata of its own that a second writer could destroy.
        let access = Access {
            writes: !read_only,
            shares_writes: true,
        };
        Ok((
            Arc::new(driver),
            vec![link("file", file, access)],
            read_only,
        ))
    }

    /// The `file` child of a format: a node that exists, or one opened with what it inherits.
    async fn child(
        &mut self,
        below: &NodeRef,
        parent: &NodeOptions,
        depth: usize,
    ) -> Result<Arc<Node>> {
        match below {
            NodeRef::Name(name) => {
                let existing = self.opener.nodes.get(name).cloned();
                existing.ok_or_else(|| {
                    Error::new(
                        ErrorKind::NotFound,
                        format!("Cannot find device='{name}' nor node-name='{name}'"),
                    )
                })
            }
            NodeRef::Inline(options) => {
                let options = inherited(options, parent);
                self.open(&options, depth + 1).await
            }
        }
    }
}

/// A driver, its layers below, and whether it turned out to be read-only.
type Parts = (Arc<dyn Driver>, Vec<Link>, bool);

/// What a layer below takes over from the node that brings it along.
fn inherited(options: &NodeOptions, parent: &NodeOptions) -> NodeOptions {
    NodeOptions {
        read_only: options.read_only || parent.read_only,
        auto_read_only: options.auto_read_only || parent.auto_read_only,
        // A format has decided already which discards are to have an effect.
        discard: DiscardMode::Unmap,
        cache: CacheMode {
            direct: options.cache.direct || parent.cache.direct,
            no_flush: options.cache.no_flush || parent.cache.no_flush,
            writethrough: options.cache.writethrough,
        },
        ..options.clone()
    }
}

fn behaviour(options: &NodeOptions, read_only: bool) -> Result<Behaviour> {
    if options.detect_zeroes == DetectZeroes::Unmap && options.discard != DiscardMode::Unmap {
        return Err(invalid(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
                .to_owned(),
        ));
    }
    Ok(Behaviour {
        read_only,
        discard: options.discard,
        detect_zeroes: options.detect_zeroes,
        cache: options.cache,
    })
}

/// Whether a node on `below` is read-only: as asked, or because it may be and must.
fn effective_read_only(options: &NodeOptions, below: &Node) -> Result<bool> {
    if !options.read_only && below.behaviour().read_only && !options.auto_read_only {
        return Err(Error::new(ErrorKind::ReadOnly, "Block node is read-only"));
    }
    Ok(options.read_only || below.behaviour().read_only)
}

fn open_null(null: &NullOptions, options: &NodeOptions) -> Result<Parts> {
    if null.size > MAX_DISK_SIZE {
        return Err(invalid(format!(
            "A disk of {} bytes is larger than the {MAX_DISK_SIZE} allowed",
            null.size
        )));
    }
    Ok((Arc::new(Null::new(null)), Vec::new(), options.read_only))
}

fn link(role: &'static str, node: Arc<Node>, access: Access) -> Link {
    Link { role, node, access }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

#[cfg(test)]
mod tests;
