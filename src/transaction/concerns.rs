//! What actions are about: those that have nothing in common are prepared, and taken back, at the same time.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::PathBuf;

use block::formats::qcow2::names_no_other;
use block::graph::{Graph, place};
use block::io::{FileIdentity, IoContext};
use block::open::{final_path, plain_path};
use block::units::SECTOR;

use super::Plan;
use crate::daemon::lookup;

/// What an action is about: it is not prepared, or taken back, beside another that is about the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Concerns {
    /// Anything.
    Everything,
    /// Disks, nodes and jobs of these names, and files that are made or opened.
    These {
        /// As the client names them; or is going to.
        names: Vec<String>,
        /// Paths.
        files: Vec<String>,
        /// Paths of images that are opened with whatever they name. What that is, and who else uses it, is looked for by nobody: such
        /// an image is about anything. One that names nothing is a file like others.
        images: Vec<String>,
    },
    /// Disks of these names, and that only when it is resolved: there is nothing to prepare.
    Resolved {
        /// As the client names them.
        names: Vec<String>,
    },
}

/// Something that two actions may have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Key {
    Name(String),
    Node(usize),
    Path(PathBuf),
    File(FileIdentity),
}

/// The keys of an action.
#[derive(Debug, Clone)]
pub(super) enum Keys {
    All,
    These(HashSet<Key>),
}

impl Keys {
    /// Those of an action that there is nothing to do for.
    pub(super) fn none() -> Keys {
        Keys::These(HashSet::new())
    }

    pub(super) fn meet(&self, other: &Keys) -> bool {
        match (self, other) {
            (Keys::These(own), Keys::These(other)) => !own.is_disjoint(other),
            _ => true,
        }
    }

    /// With the nodes that the names refer to at present. Layers that are put on each other are about what is below them all.
    pub(super) fn with_nodes(self, graph: &Graph, plan: &Plan) -> Keys {
        let Keys::These(mut keys) = self else {
            return Keys::All;
        };
        let named = keys.iter().filter_map(|key| match key {
            Key::Name(name) => lookup::device(graph, name).ok(),
            _ => None,
        });
        let nodes = named.flat_map(|node| {
            let (origin, _) = plan.origin(&node);
            [place(&node), place(&node.below_filters()), place(&origin)]
        });
        let nodes: Vec<usize> = nodes.collect();
        keys.extend(nodes.into_iter().map(Key::Node));
        Keys::These(keys)
    }

    /// All names that a file has, or will have.
    fn of_file(io: &IoContext, filename: &str) -> io::Result<Option<[Key; 2]>> {
        // Some file systems take so long names; a file that is made beside this one is named by the beginning of its name.
        const BEGINNING: usize = 200;
        let path = final_path(filename)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let begin: String = name.chars().take(BEGINNING).collect();
        let key = Key::Path(path.with_file_name(begin));
        Ok(match std::fs::metadata(&path) {
            Err(_) => Some([key.clone(), key]),
            Ok(metadata) => {
                let file = FileIdentity::of(&metadata);
                // Who knows what else a device is.
                let is_file = metadata.is_file() && !io.is_device(&metadata);
                is_file.then_some([key, Key::File(file)])
            }
        })
    }

    pub(super) fn new(io: &IoContext, concerns: &Concerns) -> Keys {
        let (names, files, images) = match concerns {
            Concerns::Everything => return Keys::All,
            Concerns::These {
                names,
                files,
                images,
            } => (names, &files[..], &images[..]),
            Concerns::Resolved { names } => (names, &[][..], &[][..]),
        };
        let mut keys: HashSet<Key> = names.iter().cloned().map(Key::Name).collect();
        // What is no path is refused when it is resolved.
        let path_of = |file: &str| plain_path(file).unwrap_or(file).to_owned();
        let images: Vec<String> = images.iter().map(|image| path_of(image)).collect();
        let files = files.iter().map(|file| path_of(file));
        for file in files.chain(images.iter().cloned()) {
            match Keys::of_file(io, &file) {
                Ok(Some(found)) => keys.extend(found),
                Ok(None) => return Keys::All,
                // What cannot be there fails when it is prepared.
                Err(_) => keys.extend([Key::Path(file.into())]),
            }
        }
        // They are files by now. One that an action before makes is in use, and refused, whatever it names.
        if !images.iter().all(|image| names_no_other_file(image)) {
            return Keys::All;
        }
        Keys::These(keys)
    }
}

/// Whether an image, a regular file, is all of itself. One that cannot be read is refused when it is opened.
fn names_no_other_file(path: &str) -> bool {
    let mut sector = Vec::new();
    let read = File::open(path).and_then(|file| file.take(SECTOR).read_to_end(&mut sector));
    read.is_err() || names_no_other(&sector)
}
