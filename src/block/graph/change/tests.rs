//! What is refused when nodes take each other's place, and that nothing has changed then.

use super::*;
use crate::error::ErrorKind;
use crate::formats::raw::Raw;
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
