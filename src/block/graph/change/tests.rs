//! What is refused when nodes take each other's place, and that nothing has changed then.

use super::*;
use crate::error::ErrorKind;
use crate::formats::qcow2::create::{CreateOptions, create};
use crate::formats::qcow2::{OpenOptions, Qcow2};
use crate::formats::raw::Raw;
use crate::graph::node::LOOKS;
use crate::graph::{Behaviour, Link, NewDrive, NodeName, User};
use crate::protocols::memory::Memory;

const WRITER: Access = Access {
    writes: true,
    shares_writes: true,
};
const READER: Access = Access {
    writes: false,
    shares_writes: false,
};

fn disk(graph: &mut Graph, name: &str, read_only: bool) -> Arc<Node> {
    let name = NodeName::given(name).unwrap();
    let behaviour = Behaviour {
        read_only,
        ..Behaviour::default()
    };
    let node = Node::new(name, Memory::new(4096), behaviour, Vec::new());
    insert(graph, &node)
}

fn on(graph: &mut Graph, name: &str, below: &Arc<Node>, access: Access) -> Arc<Node> {
    let link = Link::new("file", below, access);
    let raw = Raw::new(link.child(), String::new(), None, None).unwrap();
    let name = NodeName::given(name).unwrap();
    let node = Node::new(name, Arc::new(raw), Behaviour::default(), vec![link]);
    insert(graph, &node)
}

fn insert(graph: &mut Graph, node: &Arc<Node>) -> Arc<Node> {
    let nodes = vec![node.clone()];
    graph.insert(nodes.into()).unwrap()
}

fn leads(graph: &Graph, drive: &str) -> String {
    graph
        .drive(drive)
        .unwrap()
        .node()
        .unwrap()
        .name()
        .to_owned()
}

#[tokio::test]
async fn drives_and_parents_follow_and_what_the_new_node_stands_on_stays() {
    let mut graph = Graph::new();
    let base = disk(&mut graph, "base", false);
    graph
        .add_drive(NewDrive::new("d", Some(base.clone())))
        .unwrap();
    let other = on(&mut graph, "other", &base, WRITER);
    let middle = on(&mut graph, "middle", &base, WRITER);
    let above = on(&mut graph, "above", &middle, WRITER);
    let held = base.quiesce().await;
    graph.insert_above(&base, &above, &held).unwrap();
    assert_eq!(leads(&graph, "d"), "above");
    assert_eq!(other.link("file").unwrap().name(), "above");
    assert_eq!(middle.link("file").unwrap().name(), "base");
    assert_eq!(graph.users(&base).count(), 0);
    assert_eq!(
        graph.users(&above).collect::<Vec<_>>(),
        [&User::Drive("d".to_owned())]
    );
    let removed = graph.remove_drive("d").unwrap();
    assert!(removed.is_empty(), "nodes with a name stay");
}

#[tokio::test]
async fn a_writer_is_not_led_to_where_it_may_not_write() {
    let mut graph = Graph::new();
    let old = disk(&mut graph, "old", false);
    let fixed = disk(&mut graph, "fixed", true);
    let taken = disk(&mut graph, "taken", false);
    let reader = User::Export("r".to_owned());
    graph.add_user(&taken, reader, READER).unwrap();
    graph
        .add_drive(NewDrive::new("d", Some(old.clone())))
        .unwrap();
    let held = old.quiesce().await;
    let error = graph.replace(&old, &fixed, &held).unwrap_err();
    assert_eq!(error.message(), "Block node is read-only");
    let error = graph.replace(&old, &taken, &held).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert_eq!(
        error.message(),
        "Permission conflict on node 'taken': writing by block device 'd' is excluded by export 'r'"
    );
    assert_eq!(leads(&graph, "d"), "old");
    let unknown = Node::new(
        NodeName::given("unknown").unwrap(),
        Memory::new(1),
        Behaviour::default(),
        Vec::new(),
    );
    let error = graph.replace(&old, &unknown, &held).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn a_filter_that_a_job_uses_stays() {
    let mut graph = Graph::new();
    let base = disk(&mut graph, "base", false);
    graph
        .add_drive(NewDrive::new("d", Some(base.clone())))
        .unwrap();
    let filter = on(&mut graph, "filter", &base, WRITER);
    let held = base.quiesce().await;
    graph.insert_above(&base, &filter, &held).unwrap();
    drop(held);
    let job = graph.add_user(&filter, User::Job("j".to_owned()), WRITER);
    let held = filter.quiesce().await;
    let error = graph.take_out_filter(&filter, "file", &held).unwrap_err();
    assert_eq!(error.message(), "Node 'filter' is in use by job 'j'");
    assert_eq!(leads(&graph, "d"), "filter");
    graph.remove_user(&job.unwrap());
    let removed = graph.take_out_filter(&filter, "file", &held).unwrap();
    drop(held);
    assert!(!removed.is_empty());
    assert_eq!(leads(&graph, "d"), "base");
    assert!(graph.node("filter").is_none());
}

/// An image in memory that can be an overlay.
async fn image(graph: &mut Graph, name: &str) -> Arc<Node> {
    let memory = Memory::new(0);
    let made = create(&memory.child(), &CreateOptions::new(65536)).await;
    made.unwrap();
    let opening = Qcow2::open(memory.child(), OpenOptions::default()).await;
    let driver = opening.unwrap().finish(None).await.unwrap();
    let name = NodeName::given(name).unwrap();
    insert(
        graph,
        &Node::new(name, driver, Behaviour::default(), Vec::new()),
    )
}

async fn put_on(graph: &mut Graph, below: &Arc<Node>, above: &Arc<Node>) {
    let held = [below.quiesce().await, above.quiesce().await];
    graph.check_append(below, above).unwrap();
    graph.check_replace(below, above).unwrap();
    graph.append(below, above, [&held[0], &held[1]]).unwrap();
}

/// How many looks at nodes it takes to put one more overlay on each of these disks, whose chains are so long already.
async fn looks_for_overlays(disks: usize, overlays: usize) -> u64 {
    let mut graph = Graph::new();
    let mut ends = Vec::new();
    for disk in 0..disks {
        let mut below = image(&mut graph, &format!("disk{disk}")).await;
        let drive = NewDrive::new(format!("drive{disk}"), Some(below.clone()));
        graph.add_drive(drive).unwrap();
        for overlay in 0..overlays {
            let above = image(&mut graph, &format!("overlay{disk}.{overlay}")).await;
            put_on(&mut graph, &below, &above).await;
            below = above;
        }
        ends.push((below, image(&mut graph, &format!("last{disk}")).await));
    }
    LOOKS.set(0);
    for (below, above) in &ends {
        put_on(&mut graph, below, above).await;
    }
    assert_eq!(leads(&graph, "drive0"), "last0");
    LOOKS.get()
}

/// Guests wait for this: how long must depend neither on how many disks get overlays with them, nor on how many they have.
#[tokio::test]
async fn an_overlay_takes_no_longer_among_many_or_on_a_long_chain() {
    let one = looks_for_overlays(1, 1).await;
    assert!(one > 0);
    assert_eq!(looks_for_overlays(1, 100).await, one);
    assert_eq!(looks_for_overlays(100, 1).await, 100 * one);
}
