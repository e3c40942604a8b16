//! Who has a file open here: for the message that it is in use.

use std::sync::Arc;

use super::Opener;
use crate::driver::{Claims, Need};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Link, Node};
use crate::io::FileIdentity;

impl Opener {
    /// The same error. If it says that a file is in use, and a node here uses it, the message says which.
    pub async fn with_owner(&self, error: Error, filename: &str) -> Error {
        if error.kind() != ErrorKind::InUse {
            return error;
        }
        let file = FileIdentity::at(&self.io, filename).await.ok();
        match file.and_then(|file| self.owner(file, None)) {
            Some(owner) => owned(&error, &owner, filename),
            None => error,
        }
    }

    /// As [`Opener::with_owner`], for the file below a node that cannot be held ready.
    pub fn with_owner_of(&self, error: Error, node: &Arc<Node>) -> Error {
        let below = |node: &Arc<Node>| node.link("file").filter(|_| node.driver().is_window());
        let Some(own) = std::iter::successors(Some(node.clone()), below).last() else {
            return error;
        };
        let file = own.driver().host_file();
        let file = file.filter(|_| error.kind() == ErrorKind::InUse);
        match file.and_then(|file| self.owner(file, Some(&own))) {
            Some(owner) => owned(&error, &owner, &own.driver().info().filename),
            None => error,
        }
    }

    /// Refuses a file that a node here has open, used or not: where a new file takes its place, the node would go on with the old one.
    pub async fn check_unopened(&self, filename: &str) -> Result<()> {
        // Where nothing is, it will be made; what is in a device is made there.
        let file = FileIdentity::at(&self.io, filename).await.ok();
        let file = file.filter(|file| file.inode != 0);
        let Some(owner) = file.and_then(|file| self.nearest(|node| has(node, file))) else {
            return Ok(());
        };
        let error = Error::new(ErrorKind::InUse, "Failed to get \"write\" lock");
        Err(owned(&error, &owner, filename))
    }

    /// The name of what uses the file. `but` is what cannot have it.
    fn owner(&self, file: FileIdentity, but: Option<&Arc<Node>>) -> Option<Owner> {
        self.nearest(|node| {
            let is_held = |claims: &dyn Claims| claims.held() > Need::Nothing;
            has(node, file)
                && node.driver().claims().is_none_or(is_held)
                && !but.is_some_and(|other| Arc::ptr_eq(other, node))
        })
    }

    /// What is closest above a node like this; with a name that a user gave, if there is one.
    fn nearest(&self, is_it: impl Fn(&Arc<Node>) -> bool) -> Option<Owner> {
        if !self.directory.any(&is_it) {
            return None;
        }
        let is_given = |name: &str| !name.starts_with('#');
        let named = self.directory.all().into_iter();
        let distances = named.filter_map(|(name, node)| {
            let (distance, way) = layers_above(&node, &is_it)?;
            // A filter goes by what it shows.
            let name = match is_given(&name) {
                true => name,
                false => node.below_filters().name().to_owned(),
            };
            Some((!is_given(&name), way, distance, name))
        });
        let (_, way, _, name) = distances.min()?;
        Some(Owner { name, way })
    }
}

fn has(node: &Arc<Node>, file: FileIdentity) -> bool {
    node.driver().host_file() == Some(file)
}

/// Who has a file open.
struct Owner {
    /// A drive or a node.
    name: String,
    way: Way,
}

/// How a node comes to what is below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    /// It is what the node shows, or part of it.
    Content,
    /// What the node shows is copied there.
    Copy,
}

fn owned(error: &Error, owner: &Owner, filename: &str) -> Error {
    // Instead of the question whether another process has it.
    let what = error.message().split(". ").next().unwrap_or_default();
    let Owner { name, way } = owner;
    let who = match way {
        Way::Content => format!("'{name}'"),
        Way::Copy => format!("A backup of '{name}'"),
    };
    let text = format!("{what}. {who} of this daemon has the image [{filename}] open");
    Error::new(ErrorKind::InUse, text)
}

/// How many layers a node is above one like this, and how it comes there. `None` if it is not.
fn layers_above(node: &Arc<Node>, is_it: impl Fn(&Arc<Node>) -> bool) -> Option<(usize, Way)> {
    let mut layer = vec![(Way::Content, node.clone())];
    let mut distance = 0;
    while !layer.is_empty() {
        let found = layer.iter().filter(|(_, node)| is_it(node));
        if let Some(way) = found.map(|(way, _)| *way).min() {
            return Some((distance, way));
        }
        let below = layer.iter().flat_map(|(way, node)| {
            let below = |link: &Link| match link.role {
                Link::TARGET => (Way::Copy, link.edge.node()),
                _ => (*way, link.edge.node()),
            };
            let links = node.links();
            links.iter().map(below).collect::<Vec<_>>()
        });
        layer = below.collect();
        distance += 1;
    }
    None
}
