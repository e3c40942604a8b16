//! The exports as control state: the server they are on, and the nodes that they keep from being deleted.

use std::collections::HashMap;
use std::sync::Arc;

use block::driver::Requests;
use block::error::{Error, ErrorKind, Result};
use block::graph::{Access, Client, Edge, Graph, Node, User};
use tokio::sync::mpsc;

use crate::exports::nbd::{NbdExportOptions, NbdServer};
use crate::exports::{ExportEvent, ExportInfo, RemoveMode};
use crate::limits;

/// The NBD server, if there is one, and what is exported.
pub struct Exports {
    server: Option<NbdServer>,
    /// How what is exported is reached, until the event says that it is gone.
    edges: HashMap<String, Edge>,
    events: mpsc::UnboundedSender<ExportEvent>,
}

/// What is to be exported.
pub struct Exported {
    /// The node, which the export keeps in the graph.
    pub node: Arc<Node>,
    /// Requests are those of the guest of a drive whose root the node is, and not straight ones.
    pub guest: Option<Arc<Client>>,
}

impl Exports {
    pub(super) fn new(events: mpsc::UnboundedSender<ExportEvent>) -> Self {
        Exports {
            server: None,
            edges: HashMap::new(),
            events,
        }
    }

    /// Where a new server reports to.
    pub fn events(&self) -> mpsc::UnboundedSender<ExportEvent> {
        self.events.clone()
    }

    /// The running server.
    pub fn server(&self) -> Result<&NbdServer> {
        self.server.as_ref().ok_or_else(not_running)
    }

    /// Whether a server may be started.
    pub fn check_no_server(&self) -> Result<()> {
        match &self.server {
            None => Ok(()),
            Some(_) => Err(Error::new(
                ErrorKind::AlreadyExists,
                "NBD server already running",
            )),
        }
    }

    /// Makes a server the one that exports are added to. There is none yet.
    pub fn set_server(&mut self, server: NbdServer) {
        self.server = Some(server);
    }

    /// Takes the server out, to be stopped outside of the loop.
    pub fn take_server(&mut self) -> Result<NbdServer> {
        self.server.take().ok_or_else(not_running)
    }

    /// Whether an export has this id, also one that is shutting down.
    pub fn contains(&self, id: &str) -> bool {
        self.edges.contains_key(id)
    }

    /// What queries show, the newest first.
    pub fn list(&self) -> Vec<ExportInfo> {
        let mut exports = self
            .server
            .as_ref()
            .map(NbdServer::exports)
            .unwrap_or_default();
        for export in &mut exports {
            if let Some(edge) = self.edges.get(&export.id) {
                // It may have come to another node since.
                edge.node().name().clone_into(&mut export.node_name);
            }
        }
        exports
    }

    /// Exports a node of the graph, or a drive.
    pub fn add(
        &mut self,
        graph: &mut Graph,
        options: NbdExportOptions,
        disk: &Exported,
    ) -> Result<()> {
        if self.edges.len() >= limits::EXPORTS {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("There are {} exports and can be no more", limits::EXPORTS),
            ));
        }
        let user = User::Export(options.id.clone());
        let access = Access {
            writes: options.writable,
            shares_writes: true,
        };
        let edge = graph.add_user(&disk.node, user, access)?;
        let id = options.id.clone();
        let requests: Arc<dyn Requests> = match &disk.guest {
            Some(guest) => guest.clone(),
            None => Arc::new(edge.clone()),
        };
        let added = self
            .server()
            .and_then(|server| server.add(options, requests));
        match added {
            Ok(()) => {
                self.edges.insert(id, edge);
                Ok(())
            }
            Err(error) => {
                graph.remove_user(&edge);
                Err(error)
            }
        }
    }

    /// Begins to remove an export; an event tells when it is gone.
    pub fn remove(&self, id: &str, mode: RemoveMode) -> Result<()> {
        match &self.server {
            Some(server) => server.remove(id, mode),
            None => Err(Error::new(
                ErrorKind::NotFound,
                format!("Export '{id}' is not found"),
            )),
        }
    }

    /// An export is gone.
    pub(super) fn closed(&mut self, graph: &mut Graph, id: &str) {
        if let Some(edge) = self.edges.remove(id) {
            graph.remove_user(&edge);
        }
    }
}

fn not_running() -> Error {
    Error::new(ErrorKind::InvalidInput, "NBD server not running")
}

impl std::fmt::Debug for Exports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exports")
            .field("running", &self.server.is_some())
            .field("exported", &self.edges.len())
            .finish_non_exhaustive()
    }
}
