//! The NBD server, from outside: a raw client that says what no good client would, and the tools that people use.

pub(crate) mod client;
mod flags;
mod fuzz;
mod handshake;
mod lifecycle;
mod peers;
mod transmission;

use std::path::PathBuf;
use std::sync::Arc;

use block::protocols::memory::Memory;
use qblockd::exports::ExportEvent;
use qblockd::exports::nbd::{NbdExportOptions, NbdServer, NbdServerOptions};
use qblockd::listen::Address;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::harness::PATIENCE;
use client::Client;

/// The size of the disk in most tests.
const SIZE: u64 = 1 << 20;

/// A server with one writable export, `disk`, of a disk in memory.
struct Fixture {
    runtime: Runtime,
    server: Option<NbdServer>,
    disk: Arc<Memory>,
    events: UnboundedReceiver<ExportEvent>,
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Fixture::with(SIZE, |_| {})
    }

    fn with(size: u64, change: impl FnOnce(&mut NbdServerOptions)) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let folder = tempfile::tempdir().expect("a folder");
        let address = Address::Unix(folder.path().join("nbd.sock"));
        let mut options = NbdServerOptions::new(vec![address]);
        change(&mut options);
        let (sender, events) = tokio::sync::mpsc::unbounded_channel();
        let server = runtime
            .block_on(NbdServer::start(options, sender))
            .expect("a server");
        let fixture = Fixture {
            runtime,
            server: Some(server),
            disk: Memory::new(size),
            events,
            folder,
        };
        fixture.add("disk", |_| {});
        fixture
    }

    fn server(&self) -> &NbdServer {
        self.server.as_ref().expect("a running server")
    }

    /// Adds an export of the disk under this name, with the name as its id.
    fn add(&self, name: &str, change: impl FnOnce(&mut NbdExportOptions)) {
        let mut options = NbdExportOptions {
            id: name.to_owned(),
            name: name.to_owned(),
            node_name: "node0".to_owned(),
            writable: true,
            ..NbdExportOptions::default()
        };
        change(&mut options);
        self.server()
            .add(options, self.disk.clone())
            .expect("a new export");
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.path().display())
    }

    /// A client that has said nothing yet.
    fn connect(&self) -> Client {
        Client::connect(&self.path())
    }

    /// A client in the transmission phase, with simple replies.
    fn simple(&self) -> Client {
        let mut client = self.connect();
        client.handshake(3);
        client.go("disk");
        client
    }

    /// A client in the transmission phase, with structured replies and base:allocation.
    fn structured(&self) -> Client {
        let mut client = self.connect();
        client.handshake(3);
        client.structured();
        client.select_base_allocation("disk");
        client.go("disk");
        client
    }

    /// The next event.
    fn event(&mut self) -> ExportEvent {
        let next = async { tokio::time::timeout(PATIENCE, self.events.recv()).await };
        self.runtime
            .block_on(next)
            .expect("an event in time")
            .expect("a server")
    }

    fn wait_held(&self, count: usize) {
        let wait = self.disk.wait_held(count);
        let in_time = async { tokio::time::timeout(PATIENCE, wait).await };
        self.runtime
            .block_on(in_time)
            .expect("held requests in time");
    }

    /// Stops the server.
    fn stop(&mut self) {
        let server = self.server.take().expect("a running server");
        let stop = async { tokio::time::timeout(PATIENCE, server.stop()).await };
        self.runtime.block_on(stop).expect("an end in time");
    }
}
