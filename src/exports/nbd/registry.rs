//! The exports of a server: which names there are, who uses them, and when they are gone.
//!
//! An export lives until it has been removed *and* its last connection has ended. Whoever brings this about, the control
//! side or a connection, sends `ExportEvent::Closed` after the node has been let go of.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::driver::Requests;
use block::error::{Error, ErrorKind, Result};
use tokio::sync::{mpsc, watch};

use super::codec::constants::NBD_MAX_STRING;
use crate::exports::{ExportEvent, ExportInfo, RemoveMode};

/// What an export is made of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NbdExportOptions {
    /// Unique among the exports of the process; the caller has checked that it is well formed.
    pub id: String,
    /// What clients ask for; unique in the server, at most 4096 bytes. The empty name is what clients get that ask for none.
    pub name: String,
    /// Text for people, shown in lists; at most 4096 bytes.
    pub description: Option<String>,
    /// The node as the user called it, for queries.
    pub node_name: String,
    /// Whether clients may write.
    pub writable: bool,
    /// Whether every write is durable before it is answered.
    pub writethrough: bool,
}

struct Entry {
    options: Arc<NbdExportOptions>,
    node: Arc<dyn Requests>,
    connections: usize,
    /// Becomes true when the export is removed; connections then end.
    closing: watch::Sender<bool>,
}

impl Entry {
    fn is_closing(&self) -> bool {
        *self.closing.borrow()
    }
}

/// The exports of one server.
pub(super) struct Registry {
    /// In the order in which they were added.
    entries: Mutex<VecDeque<Entry>>,
    events: mpsc::UnboundedSender<ExportEvent>,
}

impl Registry {
    pub(super) fn new(events: mpsc::UnboundedSender<ExportEvent>) -> Self {
        Registry {
            entries: Mutex::default(),
            events,
        }
    }

    /// The list is whole between any two statements that can panic, so a poisoned lock is as good as another.
    fn lock(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(&self, options: NbdExportOptions, node: Arc<dyn Requests>) -> Result<()> {
        let invalid = |text| Err(Error::new(ErrorKind::InvalidInput, text));
        if options.name.len() > NBD_MAX_STRING {
            return invalid(format!("export name '{}' too long", options.name));
        }
        if let Some(description) = &options.description
            && description.len() > NBD_MAX_STRING
        {
            return invalid(format!("description '{description}' too long"));
        }
        let mut entries = self.lock();
        let taken = |text| Err(Error::new(ErrorKind::AlreadyExists, text));
        if entries.iter().any(|entry| entry.options.id == options.id) {
            return taken(format!(
                "Block export id '{}' is already in use",
                options.id
            ));
        }
        if find(&entries, &options.name).is_some() {
            return taken(format!(
                "NBD server already has export named '{}'",
                options.name
            ));
        }
        entries.push_back(Entry {
            options: Arc::new(options),
            node,
            connections: 0,
            closing: watch::Sender::new(false),
        });
        Ok(())
    }

    pub(super) fn remove(&self, id: &str, mode: RemoveMode) -> Result<()> {
        let entries = self.lock();
        let Some(at) = entries.iter().position(|entry| entry.options.id == id) else {
            return Err(not_found(id));
        };
        let entry = &entries[at];
        if entry.is_closing() {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("Export '{id}' is already shutting down"),
            ));
        }
        if mode == RemoveMode::Safe && entry.connections > 0 {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("export '{id}' still in use"),
            ));
        }
        entry.closing.send_replace(true);
        self.finish_if_unused(entries, at);
        Ok(())
    }

    /// Removes all, hard.
    pub(super) fn remove_all(&self) {
        for export in self.list() {
            // One that is shutting down already, or has just gone, is as wanted.
            let _ = self.remove(&export.id, RemoveMode::Hard);
        }
    }

    /// The id of the export that clients know as `name`.
    pub(super) fn id_of_name(&self, name: &str) -> Result<String> {
        let entries = self.lock();
        match find(&entries, name) {
            Some(entry) => Ok(entry.options.id.clone()),
            None => Err(not_found(name)),
        }
    }

    /// All of them, the newest first, as QEMU lists them.
    pub(super) fn list(&self) -> Vec<ExportInfo> {
        let entries = self.lock();
        let info = |entry: &Entry| ExportInfo {
            id: entry.options.id.clone(),
            name: entry.options.name.clone(),
            node_name: entry.options.node_name.clone(),
            writable: entry.options.writable,
            shutting_down: entry.is_closing(),
            connections: entry.connections,
        };
        entries.iter().rev().map(info).collect()
    }

    /// What NBD_OPT_LIST tells: names and descriptions, the oldest first.
    pub(super) fn names(&self) -> Vec<Arc<NbdExportOptions>> {
        let entries = self.lock();
        let alive = entries.iter().filter(|entry| !entry.is_closing());
        alive.map(|entry| entry.options.clone()).collect()
    }

    /// A use of the export that clients know as `name`.
    pub(super) fn open(self: &Arc<Self>, name: &str) -> Option<ExportRef> {
        let mut entries = self.lock();
        let entry = entries
            .iter_mut()
            .find(|entry| entry.options.name == name && !entry.is_closing())?;
        entry.connections += 1;
        Some(ExportRef {
            options: entry.options.clone(),
            node: Some(
                entry
                    .node
                    .for_client()
                    .unwrap_or_else(|| entry.node.clone()),
            ),
            closing: entry.closing.subscribe(),
            registry: self.clone(),
        })
    }

    /// Ends the export at `at` if it has been removed and nobody uses it.
    fn finish_if_unused(&self, mut entries: MutexGuard<'_, VecDeque<Entry>>, at: usize) {
        let unused = |entry: &Entry| entry.is_closing() && entry.connections == 0;
        if !entries.get(at).is_some_and(unused) {
            return;
        }
        let Some(entry) = entries.remove(at) else {
            return;
        };
        // Outside of the lock: the last reference to a node may close files.
        drop(entries);
        let id = entry.options.id.clone();
        drop(entry);
        // Without a receiver nobody is left to care.
        let _ = self.events.send(ExportEvent::Closed { id });
    }
}

fn find<'e>(entries: &'e VecDeque<Entry>, name: &str) -> Option<&'e Entry> {
    entries
        .iter()
        .find(|entry| entry.options.name == name && !entry.is_closing())
}

fn not_found(what: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("Export '{what}' is not found"))
}

/// A connection's use of an export. The export outlives it; dropping it is what ends the use.
pub(super) struct ExportRef {
    options: Arc<NbdExportOptions>,
    /// `None` only while this is dropped.
    node: Option<Arc<dyn Requests>>,
    closing: watch::Receiver<bool>,
    registry: Arc<Registry>,
}

impl ExportRef {
    pub(super) fn options(&self) -> &NbdExportOptions {
        &self.options
    }

    pub(super) fn node(&self) -> Arc<dyn Requests> {
        match &self.node {
            Some(node) => node.clone(),
            None => unreachable!("the node is taken in drop only"),
        }
    }

    /// Becomes true when the export is removed.
    pub(super) fn closing(&self) -> watch::Receiver<bool> {
        self.closing.clone()
    }
}

impl Drop for ExportRef {
    fn drop(&mut self) {
        // The node first: when the event is sent, no reference of this connection may be left.
        self.node = None;
        let mut entries = self.registry.lock();
        let mine = |entry: &Entry| Arc::ptr_eq(&entry.options, &self.options);
        let Some(at) = entries.iter().position(mine) else {
            return;
        };
        if let Some(entry) = entries.get_mut(at) {
            entry.connections -= 1;
        }
        self.registry.finish_if_unused(entries, at);
    }
}
