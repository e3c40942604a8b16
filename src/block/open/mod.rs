//! Opening nodes: options as plain data in, nodes of the graph out. The only place that names every driver.
//!
//! * `options`: what a node is made of
//! * `backing`: what the header of an image may refer to
//! * `create`: new images
//! * `owner`: who has a file open here
//! * `caches`: how much metadata of a qcow2 image is kept in memory
//! * `view`: internal snapshots as nodes
//!
//! Opening does I/O and may take long, so it works on an [`Opener`], which finds the nodes that exist, and not on the
//! graph. The graph is touched by `Graph::insert` only, which decides again whether names are free.

mod backing;
mod caches;
mod create;
mod options;
mod owner;
mod reopen;
mod view;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::task::JoinSet;

use crate::driver::{BoxFuture, Claim, Driver, Need, Requests};
use crate::error::{Error, ErrorKind, Result};
use crate::events::EventSink;
use crate::formats::qcow2::{self, Qcow2};
use crate::formats::raw::Raw;
use crate::graph::{
    Access, Behaviour, Directory, Graph, Link, NameSource, Node, NodeName, Opened, claim,
};
use crate::io::IoContext;
use crate::limits::{MAX_CHAIN_DEPTH, MAX_DISK_SIZE, MAX_NULL_LATENCY_NS, NESTED_LAYERS};
use crate::protocols::file::{File, FileAccess};
use crate::protocols::null::Null;

pub use backing::{backing_path, plain_path};
pub use create::{
    Created, Existing, NewContent, NewImage, OverDevice, Overwritten, PutBack, TakenBack, beside,
    create_image, final_path, whole_sectors,
};
pub use options::{
    Aio, BackingOption, CacheMode, DetectZeroes, DiscardMode, DriverOptions, FileOptions, Locking,
    NodeOptions, NodeRef, NullOptions, Qcow2Cache, Qcow2Options, RawOptions, UnnamedFormat,
};
pub use reopen::changes;

/// What opening needs to know of the graph.
#[derive(Debug, Clone)]
pub struct Opener {
    io: IoContext,
    names: NameSource,
    events: EventSink,
    directory: Directory,
}

impl Opener {
    /// For this graph, which may change while it is open.
    pub fn new(io: &IoContext, graph: &Graph) -> Self {
        Opener {
            io: io.clone(),
            names: graph.names(),
            events: graph.events(),
            directory: graph.directory(),
        }
    }
}

/// Opens a node with everything below it that does not exist yet.
///
/// Files are locked from here on, but for those that nobody uses yet. Cancellation: whatever was opened is closed again; nothing
/// has been written.
pub async fn open(opener: &Opener, options: &NodeOptions) -> Result<Opened> {
    let mut opening = Opening {
        opener: Arc::new(opener.clone()),
        nodes: Vec::new(),
        claim: Claim::none(),
        images: HashSet::new(),
    };
    opening.open(options, 0).await?;
    Ok(Opened::new(opening.nodes, opening.claim))
}

/// One call of `open`: the nodes so far, layers below first.
struct Opening {
    opener: Arc<Opener>,
    nodes: Vec<Arc<Node>>,
    /// What they need of their files.
    claim: Claim,
    /// The images above the one being opened, in the chain that their headers describe.
    images: HashSet<PathBuf>,
}

impl Opening {
    /// Opens a layer of a node. Chains are long: every so often this goes on in a task, whose stack is empty.
    async fn open_layer(&mut self, options: NodeOptions, depth: usize) -> Result<Arc<Node>> {
        if !depth.is_multiple_of(NESTED_LAYERS) {
            return self.open(&options, depth).await;
        }
        let mut inside = Opening {
            opener: self.opener.clone(),
            nodes: std::mem::take(&mut self.nodes),
            claim: std::mem::replace(&mut self.claim, Claim::none()),
            images: std::mem::take(&mut self.images),
        };
        let mut task = JoinSet::new();
        task.spawn(async move {
            let opened = inside.open(&options, depth).await;
            (inside, opened)
        });
        match task.join_next().await {
            Some(Ok((inside, opened))) => {
                *self = inside;
                opened
            }
            Some(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // The runtime ends.
            Some(Err(_)) | None => Err(invalid("Opening was given up".to_owned())),
        }
    }

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
                DriverOptions::HostDevice(device) => {
                    let opened = self.open_file(device, options).await?;
                    require_device(&device.filename, opened)?
                }
                DriverOptions::Null(null) => open_null(null, options)?,
                DriverOptions::Raw(raw) => {
                    let file = self.child(&raw.file, options, depth).await?;
                    open_raw(raw, options, &file)?
                }
                DriverOptions::Qcow2(qcow2) if qcow2.snapshot.is_some() => {
                    self.open_view(qcow2, options, depth).await?
                }
                DriverOptions::Qcow2(qcow2) => {
                    let file = self.child(&qcow2.file, options, depth).await?;
                    self.open_qcow2(qcow2, (&name, options), file, depth)
                        .await?
                }
                DriverOptions::Probed(below) => {
                    let file = self.child(below, options, depth).await?;
                    self.open_probed(below, (&name, options), file, depth)
                        .await?
                }
            };
            let node = Node::new(name, driver, behaviour(options, read_only)?, links);
            node.set_options(Arc::new(options.clone()));
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
        match self.opener.directory.get(given) {
            Some(root) if root.name() != given => Err(Error::name_of_drive(given)),
            None if !taken => Ok(name),
            _ => Err(Error::name_of_node(given)),
        }
    }

    async fn open_file(&self, file: &FileOptions, options: &NodeOptions) -> Result<Parts> {
        let access = FileAccess {
            read_only: options.read_only,
            auto_read_only: options.auto_read_only,
            cache: options.cache,
        };
        let driver = File::open_unused(&self.opener.io, file, access).await?;
        let read_only = driver.is_read_only();
        Ok((Arc::new(driver), Vec::new(), read_only))
    }

    /// The format that the file has.
    async fn open_probed(
        &mut self,
        below: &NodeRef,
        (name, options): (&NodeName, &NodeOptions),
        file: Arc<Node>,
        depth: usize,
    ) -> Result<Parts> {
        self.claim([Some(&file)], Need::Reads).await?;
        let start = file.read(0, file.size().min(4)).await?.to_bytes();
        if start[..] == qcow2::MAGIC {
            let found = Qcow2Options {
                backing: BackingOption::FromImage(UnnamedFormat::Probed),
                ..Qcow2Options::new(below.clone())
            };
            return self.open_qcow2(&found, (name, options), file, depth).await;
        }
        let read_only = effective_read_only(options, &file)?;
        let filename = file.driver().info().filename;
        log::warn!(
            "'{filename}' begins as no image does and is used as raw; type format=raw to lift the ban on \
             writing the header of an image into it"
        );
        let link = Link::new("file", &file, access_of_raw(read_only));
        let driver = Raw::probed(link.child(), filename, &qcow2::MAGIC);
        Ok((Arc::new(driver), vec![link], read_only))
    }

    async fn open_qcow2(
        &mut self,
        qcow2: &Qcow2Options,
        (name, options): (&NodeName, &NodeOptions),
        file: Arc<Node>,
        depth: usize,
    ) -> Result<Parts> {
        let data_file = match &qcow2.data_file {
            Some(below) => Some(self.child(below, options, depth).await?),
            None => None,
        };
        let mut read_only = effective_read_only(options, &file)?;
        if let Some(data_file) = &data_file {
            read_only |= effective_read_only(options, data_file)?;
        }
        let layers = [Some(&file), data_file.as_ref()];
        read_only = self.claim_format(layers, options, read_only).await?;
        let cache = caches::share(&qcow2.cache)?;
        let unmaps = options.discard == DiscardMode::Unmap;
        let open_options = qcow2::OpenOptions {
            filename: file.driver().info().filename,
            read_only,
            pass_discard: qcow2.pass_discard_request.unwrap_or(unmaps),
            pass_discard_snapshot: qcow2.pass_discard_snapshot.unwrap_or(unmaps),
            l2_cache_bytes: cache.l2_bytes,
            refcount_cache_bytes: cache.refcount_bytes,
            reporter: self.opener.events.reporter(name.as_str()),
        };
        let own = access_of_format(!read_only);
        let in_file = Link::new("file", &file, own);
        let opening = Qcow2::open(in_file.child(), open_options).await?;
        caches::check_entry(qcow2.cache.l2_entry, opening.cluster_size())?;
        let backing = match &qcow2.backing {
            BackingOption::Detached => None,
            BackingOption::Node(below) | BackingOption::Written(below) => {
                Some(self.named_backing(below, options, depth).await?)
            }
            BackingOption::FromImage(unnamed) => match opening.backing() {
                None => None,
                Some(reference) => {
                    let image = file.driver().info().filename;
                    let reference = backing::Reference {
                        image: &image,
                        filename: &reference.name,
                        format: reference.format.as_deref(),
                        unnamed: *unnamed,
                    };
                    let aio = aio_of(&qcow2.file);
                    let backing = self.image_backing(reference, options, aio, depth).await;
                    Some(backing.map_err(|error| error.context("Could not open backing file"))?)
                }
            },
        };
        self.claim([backing.as_ref()], Need::Reads).await?;
        let data_file = data_file.map(|node| Link::new("data-file", &node, own));
        let below = match qcow2.backing {
            BackingOption::Written(_) => access_of_raw(true),
            _ => Access::BACKING,
        };
        let backing = backing.map(|node| Link::new("backing", &node, below));
        let outside = data_file.as_ref().map(Link::child);
        let below = backing.as_ref().map(Link::child);
        let driver = opening.with_data_file(outside).finish(below).await?;
        let others = data_file.into_iter().chain(backing);
        let links = std::iter::once(in_file).chain(others).collect();
        Ok((driver, links, read_only))
    }

    /// Has the files of a format held ready. Answers whether it is read-only: also where they cannot be written, if the user leaves it
    /// to the node.
    async fn claim_format(
        &mut self,
        layers: [Option<&Arc<Node>>; 2],
        options: &NodeOptions,
        read_only: bool,
    ) -> Result<bool> {
        if !read_only {
            match self.claim(layers, Need::Writes).await {
                Err(error) if options.auto_read_only && forbids_writing(&error) => {}
                claimed => return claimed.map(|()| false),
            }
        }
        self.claim(layers, Need::Reads).await.map(|()| true)
    }

    /// Has layers held ready for what is going to be done to them.
    async fn claim(
        &mut self,
        layers: impl IntoIterator<Item = Option<&Arc<Node>>>,
        need: Need,
    ) -> Result<()> {
        for layer in layers.into_iter().flatten() {
            let claimed = claim(layer, need).await;
            let claimed = claimed.map_err(|error| self.opener.with_owner_of(error, layer));
            self.claim.add(claimed?);
        }
        Ok(())
    }

    /// The backing node that the user chose.
    async fn named_backing(
        &mut self,
        below: &NodeRef,
        parent: &NodeOptions,
        depth: usize,
    ) -> Result<Arc<Node>> {
        let read_only = NodeOptions {
            read_only: true,
            auto_read_only: false,
            ..parent.clone()
        };
        self.child(below, &read_only, depth).await
    }

    /// The backing node that the header of an image names.
    async fn image_backing(
        &mut self,
        reference: backing::Reference<'_>,
        parent: &NodeOptions,
        aio: Aio,
        depth: usize,
    ) -> Result<Arc<Node>> {
        let options = backing::options(reference, parent, aio)?;
        let target = self.canonical(backing::resolve(reference)?).await;
        let image = self.canonical(reference.image.to_owned()).await;
        self.images.insert(image.clone());
        if self.images.contains(&target) {
            return Err(invalid(format!(
                "'{}' is its own backing file, by way of '{}'",
                reference.filename, reference.image
            )));
        }
        let node = self.open_layer(options, depth + 1).await?;
        self.images.remove(&image);
        if let Some(file) = node.link("file") {
            // How its requests are run was asked for the image above.
            file.set_options(Arc::new(backing::file_options(reference, Aio::default())?));
        }
        Ok(node)
    }

    /// The path without links and detours; as it is where it leads nowhere, which opening it will say.
    async fn canonical(&self, path: String) -> PathBuf {
        let given = PathBuf::from(&path);
        let canonical = self.opener.io.call(move || std::fs::canonicalize(path));
        canonical.await.unwrap_or(given)
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
                let existing = self.opener.directory.get(name);
                existing.ok_or_else(|| {
                    Error::new(
                        ErrorKind::NotFound,
                        format!("Cannot find device='{name}' nor node-name='{name}'"),
                    )
                })
            }
            NodeRef::Inline(own) => {
                let options = inherited(own, parent);
                let node = self.open_layer(options, depth + 1).await?;
                node.set_options(own.clone());
                Ok(node)
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

fn require_device(filename: &str, opened: Parts) -> Result<Parts> {
    if opened.0.info().driver == "host_device" {
        return Ok(opened);
    }
    Err(invalid(format!(
        "'host_device' driver requires '{filename}' to be either a character or block device"
    )))
}

fn open_null(null: &NullOptions, options: &NodeOptions) -> Result<Parts> {
    if null.size > MAX_DISK_SIZE {
        return Err(invalid(format!(
            "A disk of {} bytes is larger than the {MAX_DISK_SIZE} allowed",
            null.size
        )));
    }
    if null.latency_ns > MAX_NULL_LATENCY_NS {
        return Err(invalid(format!(
            "A delay of {} ns is longer than the {MAX_NULL_LATENCY_NS} allowed",
            null.latency_ns
        )));
    }
    Ok((Arc::new(Null::new(null)), Vec::new(), options.read_only))
}

fn open_raw(raw: &RawOptions, options: &NodeOptions, file: &Arc<Node>) -> Result<Parts> {
    let read_only = effective_read_only(options, file)?;
    let filename = file.driver().info().filename;
    let link = Link::new("file", file, access_of_raw(read_only));
    let driver = Raw::new(link.child(), filename, raw.offset, raw.size)?;
    Ok((Arc::new(driver), vec![link], read_only))
}

/// Raw adds no metadata of its own that a second writer could destroy.
fn access_of_raw(read_only: bool) -> Access {
    Access {
        writes: !read_only,
        shares_writes: true,
    }
}

fn forbids_writing(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ReadOnly | ErrorKind::PermissionDenied
    )
}

/// What a format does to its layers: it has metadata there that nobody else may touch, and needs a backing to stay as it is.
fn access_of_format(writes: bool) -> Access {
    Access {
        writes,
        shares_writes: false,
    }
}

/// How the files of a backing chain are read: as that of the image above.
fn aio_of(file: &NodeRef) -> Aio {
    match file {
        NodeRef::Inline(options) => match &options.driver {
            DriverOptions::File(file) | DriverOptions::HostDevice(file) => file.aio,
            DriverOptions::Raw(raw) => aio_of(&raw.file),
            DriverOptions::Probed(below) => aio_of(below),
            DriverOptions::Null(_) | DriverOptions::Qcow2(_) => Aio::default(),
        },
        NodeRef::Name(_) => Aio::default(),
    }
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

#[cfg(test)]
mod tests;
