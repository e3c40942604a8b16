//! Who has a file open here: for the message that it is in use.

use std::sync::Arc;

use super::Opener;
use crate::error::{Error, ErrorKind};
use crate::graph::Node;
use crate::io::FileIdentity;

impl Opener {
    /// The same error. If it says that a file is in use, and a node here uses it, the message says which.
    pub async fn with_owner(&self, error: Error, filename: &str) -> Error {
        if error.kind() != ErrorKind::InUse {
            return error;
        }
        let file = FileIdentity::at(&self.io, filename).await.ok();
        let Some(owner) = file.and_then(|file| self.owner(file)) else {
            return error;
        };
        // Instead of the question whether another process has it.
        let what = error.message().split(". ").next().unwrap_or_default();
        let text = format!("{what}. '{owner}' of this daemon has the image [{filename}] open");
        Error::new(ErrorKind::InUse, text)
    }

    /// The name that a user gave to what has the file open: as close to the file as there is one.
    fn owner(&self, file: FileIdentity) -> Option<&str> {
        let is_given = |name: &str| !name.starts_with('#');
        let distances = self.nodes.iter().filter_map(|(name, node)| {
            let distance = layers_above(node, file)?;
            Some((!is_given(name), distance, name.as_str()))
        });
        distances.min().map(|(_, _, name)| name)
    }
}

/// How many layers a node is above the one that has the file open. `None` if it is not.
fn layers_above(node: &Arc<Node>, file: FileIdentity) -> Option<usize> {
    let mut layer = vec![node.clone()];
    let mut distance = 0;
    while !layer.is_empty() {
        if layer
            .iter()
            .any(|node| node.driver().host_file() == Some(file))
        {
            return Some(distance);
        }
        let below = layer.iter().flat_map(|node| node.links());
        layer = below.map(|link| link.edge.node()).collect();
        distance += 1;
    }
    None
}
