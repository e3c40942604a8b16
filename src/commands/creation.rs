//! `blockdev-create`.

use std::sync::Arc;

use block::driver::{BackingFile, Claim, Compat, Need, Preallocation};
use block::error::Result as EngineResult;
use block::formats::qcow2::CompressionType;
use block::formats::qcow2::create::{CreateOptions, DataFileOptions};
use block::graph::{Access, Graph, Node, Resizer, User};
use block::open::{NewContent, NewImage, NodeRef, Opener};
use qapi::commands::BlockdevCreate;
use qapi::handlers::BlockCreate;
use qapi::rt::QmpError;
use qapi::types::{
    BlockdevCreateOptions, BlockdevCreateOptionsBranch, BlockdevCreateOptionsFile,
    BlockdevCreateOptionsQcow2, BlockdevQcow2Version, PreallocMode, Qcow2CompressionType,
};

use super::{Handlers, convert};
use crate::daemon::Cx;
use crate::jobs::create::{CreateJob, Creation, Place, Qcow2Creation};
use crate::jobs::{Audience, JobKind, JobSpec};

impl BlockCreate<Cx> for Handlers {
    async fn blockdev_create(cx: &Cx, args: BlockdevCreate) -> Result<(), QmpError> {
        let BlockdevCreate { job_id, options } = args;
        let wanted = wanted(options)?;
        let nodes = wanted.nodes();
        let nodes = cx.commit(move |control| {
            let graph = &control.graph;
            let nodes = nodes
                .iter()
                .map(|name| graph.lookup(Some(name), Some(name)));
            // What is missing is the job's error.
            Ok(nodes.filter_map(EngineResult::ok).collect::<Vec<_>>())
        });
        let claimed = claim_all(cx, nodes.await?).await;
        cx.commit(move |control| {
            let spec = JobSpec {
                id: job_id.clone(),
                kind: JobKind::Create,
                speed: 0,
                len: 1,
                auto_finalize: true,
                auto_dismiss: false,
            };
            let key = control.jobs.create(spec, None, Audience::Clients);
            let key = key.map_err(convert::from_engine)?;
            // What is wrong from here on is the job's error.
            let creation = claimed.and_then(|claimed| {
                let places = wanted.places(&mut control.graph, &job_id);
                drop(claimed);
                places
            });
            let opener = Opener::new(&control.io, &control.graph);
            let job = CreateJob::new(&control.io, opener, control.jobs.graph(), creation);
            control.jobs.start(key, Box::new(job));
            Ok(())
        })
        .await
    }
}

/// What is to be made, with nodes by name.
enum Wanted {
    File(NewImage),
    Qcow2 {
        file: NodeRef,
        data_file: Option<NodeRef>,
        options: Box<CreateOptions>,
    },
}

fn wanted(options: BlockdevCreateOptions) -> Result<Wanted, QmpError> {
    let BlockdevCreateOptions { driver } = options;
    match driver {
        BlockdevCreateOptionsBranch::File(options) => Ok(Wanted::File(file(options))),
        BlockdevCreateOptionsBranch::Qcow2(options) => qcow2(options),
        _ => Err(QmpError::generic("Driver does not support blockdev-create")),
    }
}

fn file(options: BlockdevCreateOptionsFile) -> NewImage {
    let BlockdevCreateOptionsFile {
        filename,
        size,
        preallocation,
    } = options;
    NewImage {
        filename,
        content: NewContent::Raw {
            size,
            preallocation: mode(preallocation),
        },
    }
}

fn qcow2(options: BlockdevCreateOptionsQcow2) -> Result<Wanted, QmpError> {
    let BlockdevCreateOptionsQcow2 {
        file,
        data_file,
        data_file_raw,
        extended_l2,
        size,
        version,
        backing_file,
        backing_fmt,
        cluster_size,
        preallocation,
        lazy_refcounts,
        refcount_bits,
        compression_type,
    } = options;
    let usual = CreateOptions::new(size);
    let raw = data_file_raw.unwrap_or(false);
    let options = CreateOptions {
        size,
        cluster_size: cluster_size.unwrap_or(usual.cluster_size),
        compat: match version {
            None | Some(BlockdevQcow2Version::V3) => Compat::V1_1,
            Some(BlockdevQcow2Version::V2) => Compat::V0_10,
        },
        // What does not fit is no width: 0 is refused with all others.
        refcount_bits: refcount_bits
            .map_or(usual.refcount_bits, |bits| u32::try_from(bits).unwrap_or(0)),
        lazy_refcounts: lazy_refcounts.unwrap_or(false),
        compression_type: match compression_type {
            None | Some(Qcow2CompressionType::Zlib) => usual.compression_type,
            Some(Qcow2CompressionType::Zstd) => CompressionType::Zstd,
        },
        extended_l2: extended_l2.unwrap_or(false),
        preallocation: mode(preallocation),
        backing: BackingFile {
            name: backing_file,
            format: backing_fmt.map(|driver| driver.as_str().to_owned()),
        },
        data_file: (raw || data_file.is_some()).then_some(DataFileOptions { name: None, raw }),
    };
    Ok(Wanted::Qcow2 {
        file: convert::node_ref(file)?,
        data_file: data_file.map(convert::node_ref).transpose()?,
        options: Box::new(options),
    })
}

fn mode(mode: Option<PreallocMode>) -> Preallocation {
    match mode {
        None | Some(PreallocMode::Off) => Preallocation::Off,
        Some(PreallocMode::Metadata) => Preallocation::Metadata,
        Some(PreallocMode::Falloc) => Preallocation::Falloc,
        Some(PreallocMode::Full) => Preallocation::Full,
    }
}

/// Holds nodes ready for an image to be written to them.
async fn claim_all(cx: &Cx, nodes: Vec<Arc<Node>>) -> EngineResult<Claim> {
    let mut all = Claim::none();
    for node in nodes {
        all.add(convert::claim(cx, &node, Need::Writes).await?);
    }
    Ok(all)
}

impl Wanted {
    /// The names of the nodes that it goes to.
    fn nodes(&self) -> Vec<String> {
        let references = match self {
            Wanted::File(_) => [None, None],
            Wanted::Qcow2 {
                file, data_file, ..
            } => [Some(file), data_file.as_ref()],
        };
        let references = references.into_iter().flatten();
        let names = references.filter_map(|reference| match reference {
            NodeRef::Name(name) => Some(name.clone()),
            NodeRef::Inline(_) => None,
        });
        names.collect()
    }

    /// Takes the nodes into use for the job. After an error none is.
    fn places(self, graph: &mut Graph, job: &str) -> EngineResult<Creation> {
        let (file, data_file, options) = match self {
            Wanted::File(image) => return Ok(Creation::File(image)),
            Wanted::Qcow2 {
                file,
                data_file,
                options,
            } => (file, data_file, *options),
        };
        let file = place(graph, job, file)?;
        let data_file = match data_file.map(|data_file| place(graph, job, data_file)) {
            None => None,
            Some(Ok(place)) => Some(place),
            Some(Err(error)) => {
                if let Place::Node(edge) = &file {
                    graph.remove_user(edge);
                }
                return Err(error);
            }
        };
        Ok(Creation::Qcow2(Box::new(Qcow2Creation {
            file,
            data_file,
            options,
        })))
    }
}

fn place(graph: &mut Graph, job: &str, reference: NodeRef) -> EngineResult<Place> {
    let name = match reference {
        NodeRef::Inline(options) => return Ok(Place::Open(options)),
        NodeRef::Name(name) => name,
    };
    let node = graph.lookup(Some(&name), Some(&name))?;
    graph.check_resize(&node, Resizer::Job(job))?;
    let access = Access {
        writes: true,
        shares_writes: true,
    };
    let user = User::Job(job.to_owned());
    graph.add_user(&node, user, access).map(Place::Node)
}

#[cfg(test)]
mod tests;
