//! Making an image, `blockdev-create`: a file, or a format in a node.
//!
//! A file that is made is gone again if the job does not succeed. So is an image on a device: what it has overwritten there is kept in
//! memory and comes back. What was in a node that can grow is lost when its formatting begins, since that gives back all of its space: as
//! with QEMU, what is wrong with the options is found before.

use std::sync::Arc;

use block::driver::{BoxFuture, Child, Claim, Need, Preallocation, WriteFlags};
use block::error::{Error, ErrorKind, Result};
use block::formats::qcow2::create::{CreateOptions, create, create_with_data_file};
use block::graph::{Edge, Node, Opened, claim};
use block::io::{Data, IoContext};
use block::limits::MAX_OVERWRITTEN;
use block::open::{
    Created, Existing, NewContent, NewImage, NodeOptions, Opener, create_image, open,
};

use super::context::JobContext;
use super::driver::JobDriver;
use super::graph::GraphAccess;

/// What is to be made.
pub enum Creation {
    /// A file of the host.
    File(NewImage),
    /// A qcow2 image.
    Qcow2(Box<Qcow2Creation>),
}

/// A qcow2 image and where it goes.
pub struct Qcow2Creation {
    /// The image's file.
    pub file: Place,
    /// Where its data go, if not there.
    pub data_file: Option<Place>,
    /// The image; the data file's name is filled in.
    pub options: CreateOptions,
}

/// Where an image goes.
pub enum Place {
    /// A node of the graph, which the job uses until its end.
    Node(Edge),
    /// A node that is opened for this only.
    Open(Arc<NodeOptions>),
}

/// The job.
pub struct CreateJob {
    io: IoContext,
    opener: Opener,
    graph: Arc<dyn GraphAccess>,
    /// Taken when the work begins; an error if the places were not to be had.
    creation: Option<Result<Creation>>,
    edges: Vec<Edge>,
    opened: Vec<Opened>,
    /// Of the nodes that are opened for this only, which the graph does not know.
    claim: Claim,
    created: Option<Created>,
    /// What the image's device held in front.
    overwritten: Option<(Child, Data)>,
}

impl CreateJob {
    /// A job that makes this, or fails like this. Uses of nodes are given back by `graph`.
    pub fn new(
        io: &IoContext,
        opener: Opener,
        graph: Arc<dyn GraphAccess>,
        creation: Result<Creation>,
    ) -> Self {
        CreateJob {
            io: io.clone(),
            opener,
            graph,
            creation: Some(creation),
            edges: Vec::new(),
            opened: Vec::new(),
            claim: Claim::none(),
            created: None,
            overwritten: None,
        }
    }

    async fn make(&mut self) -> Result<()> {
        let Some(creation) = self.creation.take() else {
            return Ok(());
        };
        match creation? {
            Creation::File(image) => self.make_file(&image).await,
            Creation::Qcow2(image) => self.make_qcow2(*image).await,
        }
    }

    async fn make_file(&mut self, image: &NewImage) -> Result<()> {
        if let NewContent::Raw {
            preallocation: Preallocation::Metadata,
            ..
        } = &image.content
        {
            let message = "Unsupported preallocation mode: metadata";
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        self.opener.check_unopened(&image.filename).await?;
        self.created = Some(create_image(&self.io, image, Existing::Replace).await?);
        Ok(())
    }

    async fn make_qcow2(&mut self, image: Qcow2Creation) -> Result<()> {
        let Qcow2Creation {
            file,
            data_file,
            mut options,
        } = image;
        let (file, _) = self.place(file).await?;
        let Some(data_file) = data_file else {
            if options.data_file.is_some() {
                let message = "data-file-raw requires data-file";
                return Err(Error::new(ErrorKind::InvalidInput, message));
            }
            self.keep(&file, &options).await?;
            return create(&file, &options).await;
        };
        let (data, name) = self.place(data_file).await?;
        if let Some(described) = &mut options.data_file {
            described.name = Some(name);
        }
        self.keep(&file, &options).await?;
        create_with_data_file(&file, &data, &options).await
    }

    /// Keeps what the image will overwrite on a device. With preallocated metadata that may be more than is kept.
    async fn keep(&mut self, file: &Child, options: &CreateOptions) -> Result<()> {
        let len = options.overwritten_bytes()?;
        if file.limits().growable || len > file.size().min(MAX_OVERWRITTEN) {
            return Ok(());
        }
        let before = file.read(0, len).await?;
        self.overwritten = Some((file.clone(), before));
        Ok(())
    }

    /// A handle on a place, and the name of the file there.
    async fn place(&mut self, place: Place) -> Result<(Child, String)> {
        let (child, node) = match place {
            Place::Node(edge) => {
                let node = edge.node();
                self.edges.push(edge.clone());
                (Child::new(Arc::new(edge)), node)
            }
            Place::Open(options) => {
                let opened = open(&self.opener, &options).await?;
                let root = opened.root().cloned();
                self.opened.push(opened);
                let root =
                    root.ok_or_else(|| Error::new(ErrorKind::NotFound, "No node was opened"))?;
                let claimed = claim(&root, Need::Writes).await;
                let claimed = claimed.map_err(|error| self.opener.with_owner_of(error, &root));
                self.claim.add(claimed?);
                (Child::new(root.clone()), root)
            }
        };
        if node.behaviour().read_only {
            return Err(Error::new(ErrorKind::ReadOnly, "Block node is read-only"));
        }
        Ok((child, filename(&node)))
    }
}

fn filename(node: &Node) -> String {
    node.driver().info().filename
}

impl JobDriver for CreateJob {
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            // As QEMU: one step, which is done however it ends.
            cx.set_remaining(1);
            let made = self.make().await;
            cx.advance(1);
            made
        })
    }

    fn commit(&mut self) -> BoxFuture<'_, ()> {
        if let Some(created) = self.created.take() {
            created.keep();
        }
        Box::pin(async {})
    }

    fn abort(&mut self) -> BoxFuture<'_, ()> {
        self.created = None;
        let overwritten = self.overwritten.take();
        Box::pin(async {
            let Some((file, before)) = overwritten else {
                return;
            };
            let put_back = async {
                file.write(0, before, WriteFlags::default()).await?;
                file.flush().await
            };
            if let Err(error) = put_back.await {
                log::error!("what was on a device before its formatting failed: {error}");
            }
        })
    }

    fn clean(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            for opened in self.opened.drain(..) {
                for node in opened.nodes.iter().rev() {
                    if let Err(error) = node.close().await {
                        log::warn!("closing a node that an image was made in: {error}");
                    }
                }
            }
            self.claim = Claim::none();
            // Those of a job that never began, too.
            if let Some(Ok(Creation::Qcow2(image))) = self.creation.take() {
                let places = [Some(image.file), image.data_file];
                self.edges.extend(
                    places
                        .into_iter()
                        .flatten()
                        .filter_map(|place| match place {
                            Place::Node(edge) => Some(edge),
                            Place::Open(_) => None,
                        }),
                );
            }
            let edges = std::mem::take(&mut self.edges);
            if edges.is_empty() {
                return;
            }
            let give_back = self.graph.change(
                Vec::new(),
                Box::new(move |graph, _| {
                    for edge in &edges {
                        graph.remove_user(edge);
                    }
                    Vec::new()
                }),
            );
            drop(give_back.await);
        })
    }
}
