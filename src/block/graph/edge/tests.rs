//! Nodes that change under readers and writers: no request is lost, fails, or reaches a node whose place another has taken.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::*;
use crate::driver::{
    BlockStatus, BoxFuture, Child, Driver, DriverInfo, Preallocation, RequestLimits, Requests,
    WriteFlags, ZeroFlags,
};
use crate::error::Result;
use crate::formats::raw::Raw;
use crate::graph::{Access, Behaviour, Graph, Link, NodeName, User, quiesce_all};
use crate::io::Data;

const SHORT: Duration = Duration::from_millis(20);
const DISK: usize = 4096;
const WRITERS: usize = 6;
const SLOT: usize = 64;

/// Bytes in memory, which several of these share, with a note of whether requests may come at present.
struct Shared {
    bytes: Arc<Mutex<Vec<u8>>>,
    in_place: AtomicBool,
    /// Requests that came when none should.
    astray: AtomicU64,
}

impl Shared {
    fn new(bytes: &Arc<Mutex<Vec<u8>>>, in_place: bool) -> Arc<Self> {
        Arc::new(Shared {
            bytes: bytes.clone(),
            in_place: AtomicBool::new(in_place),
            astray: AtomicU64::new(0),
        })
    }

    /// A request: it lasts for some polls.
    async fn pass<T>(&self, work: impl FnOnce(&mut Vec<u8>) -> T) -> Result<T> {
        let check = || {
            if !self.in_place.load(Ordering::SeqCst) {
                self.astray.fetch_add(1, Ordering::SeqCst);
            }
        };
        check();
        tokio::task::yield_now().await;
        check();
        Ok(work(&mut self.bytes.lock().unwrap()))
    }
}

impl Requests for Shared {
    fn size(&self) -> u64 {
        DISK as u64
    }

    fn limits(&self) -> RequestLimits {
        RequestLimits {
            alignment: 1,
            preferred: 1,
            growable: false,
        }
    }

    fn read(&self, offset: u64, len: u64) -> BoxFuture<'_, Result<Data>> {
        let range = offset as usize..(offset + len) as usize;
        Box::pin(self.pass(move |bytes| Data::from(bytes[range].to_vec())))
    }

    fn write(&self, offset: u64, data: Data, _: WriteFlags) -> BoxFuture<'_, Result<()>> {
        let at = offset as usize;
        Box::pin(self.pass(move |bytes| {
            bytes[at..at + data.len() as usize].copy_from_slice(&data.to_bytes());
        }))
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.pass(|_| ()))
    }

    fn discard(&self, _: u64, _: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.pass(|_| ()))
    }

    fn flush(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.pass(|_| ()))
    }

    fn block_status(&self, _: u64, len: u64) -> BoxFuture<'_, Result<BlockStatus>> {
        Box::pin(self.pass(move |_| BlockStatus {
            len,
            allocated: true,
            zero: false,
            host_offset: None,
            compressed: false,
        }))
    }

    fn resize(&self, _: u64, _: Preallocation) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.pass(|_| ()))
    }
}

impl Driver for Shared {
    fn info(&self) -> DriverInfo {
        DriverInfo {
            driver: "shared",
            ..DriverInfo::default()
        }
    }

    fn children(&self) -> Vec<(&'static str, Child)> {
        Vec::new()
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
}

fn name(text: &str) -> NodeName {
    NodeName::given(text).unwrap()
}

fn node(text: &str, driver: Arc<dyn Driver>, links: Vec<Link>) -> Arc<Node> {
    Node::new(name(text), driver, Behaviour::default(), links)
}

const ALL: Access = Access {
    writes: true,
    shares_writes: true,
};

/// A raw node on another.
fn raw(text: &str, below: &Arc<Node>) -> Arc<Node> {
    let link = Link::new("file", below, ALL);
    let driver = Raw::new(link.child(), String::new(), None, None).unwrap();
    node(text, Arc::new(driver), vec![link])
}

fn insert(graph: &mut Graph, node: &Arc<Node>) {
    let nodes = vec![node.clone()];
    graph.insert(nodes.into()).unwrap();
}

/// Clients that write to places of their own and read them back, until told to stop.
struct Clients {
    tasks: JoinSet<()>,
    stop: Arc<AtomicBool>,
    round: Arc<Notify>,
}

impl Clients {
    fn start(edge: &Edge) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(Notify::new());
        let mut tasks = JoinSet::new();
        for client in 0..WRITERS {
            let (edge, stop, done) = (edge.clone(), stop.clone(), done.clone());
            tasks.spawn(async move {
                let at = (client * SLOT) as u64;
                let mut round = 0u64;
                while !stop.load(Ordering::SeqCst) {
                    round += 1;
                    let data = Data::from(vec![round as u8; SLOT]);
                    edge.write(at, data, WriteFlags::default()).await.unwrap();
                    let read = edge.read(at, SLOT as u64).await.unwrap();
                    assert_eq!(read.to_bytes(), [round as u8; SLOT][..]);
                    match round % 8 {
                        0 => edge.flush().await.unwrap(),
                        1 => edge.discard(4000, 10).await.unwrap(),
                        2 => assert_eq!(edge.block_status(0, 8).await.unwrap().len, 8),
                        _ => {}
                    }
                    done.notify_one();
                }
            });
        }
        Clients {
            tasks,
            stop,
            round: done,
        }
    }

    /// Waits until the clients have got on.
    async fn progress(&self) {
        self.round.notified().await;
    }

    async fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.tasks.join_all().await;
    }
}

/// Two nodes of the same content take each other's place below `layers` raw layers.
async fn swapped_thousands_of_times(layers: usize) {
    let bytes = Arc::new(Mutex::new(vec![0; DISK]));
    let drivers = [Shared::new(&bytes, true), Shared::new(&bytes, false)];
    let nodes = [
        node("a", drivers[0].clone(), Vec::new()),
        node("b", drivers[1].clone(), Vec::new()),
    ];
    let mut graph = Graph::new();
    insert(&mut graph, &nodes[0]);
    insert(&mut graph, &nodes[1]);
    let mut top = nodes[0].clone();
    for layer in 0..layers {
        top = raw(&format!("layer{layer}"), &top);
        insert(&mut graph, &top);
    }
    let user = User::Export("e".to_owned());
    let edge = graph.add_user(&top, user, ALL).unwrap();
    let clients = Clients::start(&edge);
    for swap in 0..4000 {
        let (old, new) = (swap % 2, (swap + 1) % 2);
        let held = nodes[old].quiesce().await;
        // The new node's gate is open: requests may come as soon as an edge leads there.
        drivers[new].in_place.store(true, Ordering::SeqCst);
        graph.replace(&nodes[old], &nodes[new], &held).unwrap();
        drivers[old].in_place.store(false, Ordering::SeqCst);
        drop(held);
        clients.progress().await;
    }
    clients.stop().await;
    for driver in &drivers {
        assert_eq!(driver.astray.load(Ordering::SeqCst), 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_follow_a_root_that_is_replaced() {
    swapped_thousands_of_times(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_follow_in_the_middle_of_a_chain() {
    swapped_thousands_of_times(3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filters_come_and_go_under_load() {
    let bytes = Arc::new(Mutex::new(vec![0; DISK]));
    let base = node("base", Shared::new(&bytes, true), Vec::new());
    let mut graph = Graph::new();
    insert(&mut graph, &base);
    let top = raw("top", &base);
    insert(&mut graph, &top);
    let export = graph.add_user(&top, User::Export("e".to_owned()), ALL);
    let clients = Clients::start(&export.unwrap());
    let job = graph.add_user(&base, User::Job("j".to_owned()), ALL);
    let job = job.unwrap();
    for turn in 0..1000 {
        let below = if turn % 2 == 0 { &base } else { &top };
        let filter = raw("filter", below);
        insert(&mut graph, &filter);
        let held = below.quiesce().await;
        graph.insert_above(below, &filter, &held).unwrap();
        drop(held);
        if turn % 2 == 0 {
            assert!(Arc::ptr_eq(&top.link("file").unwrap(), &filter));
        }
        assert!(Arc::ptr_eq(&job.node(), &base), "jobs stay");
        let held = filter.quiesce().await;
        let removed = graph.take_out_filter(&filter, "file", &held).unwrap();
        drop(held);
        removed.close().await.unwrap();
        assert_eq!(graph.nodes().count(), 2);
        clients.progress().await;
    }
    clients.stop().await;
}

#[tokio::test]
async fn a_request_given_up_while_it_waits_holds_nothing() {
    let bytes = Arc::new(Mutex::new(vec![0; DISK]));
    let mut graph = Graph::new();
    let (old, new) = (Shared::new(&bytes, true), Shared::new(&bytes, true));
    let nodes = [
        node("a", old.clone(), Vec::new()),
        node("b", new, Vec::new()),
    ];
    insert(&mut graph, &nodes[0]);
    insert(&mut graph, &nodes[1]);
    let user = User::Export("e".to_owned());
    let edge = graph.add_user(&nodes[0], user, ALL).unwrap();
    let held = nodes[0].quiesce().await;
    assert!(timeout(SHORT, edge.read(0, 1)).await.is_err());
    let waiting = tokio::spawn({
        let edge = edge.clone();
        async move { edge.read(0, 1).await }
    });
    tokio::task::yield_now().await;
    graph.replace(&nodes[0], &nodes[1], &held).unwrap();
    old.in_place.store(false, Ordering::SeqCst);
    // It waits at the gate of the node that it was sent to, and not at the new one's.
    assert!(timeout(SHORT, nodes[1].quiesce()).await.is_ok());
    drop(held);
    waiting.await.unwrap().unwrap();
    for node in &nodes {
        drop(timeout(SHORT, node.quiesce()).await.unwrap());
    }
    assert_eq!(old.astray.load(Ordering::SeqCst), 0);
    // An end of waiting for the gate to be empty lets requests go on.
    let inside = nodes[1].clone().read(0, 1).await;
    inside.unwrap();
    assert_eq!(edge.node().name(), "b");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_are_held_from_the_top_down_in_whatever_order_they_are_named() {
    let bytes = Arc::new(Mutex::new(vec![0; DISK]));
    let base = node("base", Shared::new(&bytes, true), Vec::new());
    let middle = raw("middle", &base);
    let top = raw("top", &middle);
    let mut graph = Graph::new();
    for node in [&base, &middle, &top] {
        insert(&mut graph, node);
    }
    let edge = graph.add_user(&top, User::Export("e".to_owned()), ALL);
    let clients = Clients::start(&edge.unwrap());
    for order in [[&base, &middle, &top], [&middle, &top, &base]] {
        for _ in 0..200 {
            let nodes = order.map(Arc::clone);
            let held = quiesce_all(&nodes);
            let held = timeout(Duration::from_secs(10), held).await.unwrap();
            for (held, node) in held.iter().zip(&nodes) {
                assert!(held.is_of(node));
            }
            drop(held);
            clients.progress().await;
        }
    }
    clients.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resize_waits_for_whoever_holds_the_node() {
    let bytes = Arc::new(Mutex::new(vec![0; DISK]));
    let disk = node("disk", Shared::new(&bytes, true), Vec::new());
    let edge = Edge::new(disk.clone());
    let clients = Clients::start(&edge);
    for _ in 0..100 {
        let held = disk.quiesce().await;
        let mut resize = std::pin::pin!(edge.resize(4096, Preallocation::Off));
        let early = timeout(Duration::from_millis(1), resize.as_mut()).await;
        assert!(early.is_err());
        let second = edge.resize(4096, Preallocation::Off);
        drop(held);
        let both = futures_util::future::join(resize, second);
        let (one, other) = timeout(Duration::from_secs(10), both).await.unwrap();
        one.unwrap();
        other.unwrap();
        clients.progress().await;
    }
    clients.stop().await;
}
