//! What is done to layers follows from what is done to the nodes on them.

use super::super::{Behaviour, Graph, NewDrive, NodeName};
use super::*;
use crate::formats::raw::Raw;
use crate::protocols::memory::Memory;

fn disk(name: &str, links: Vec<Link>) -> Arc<Node> {
    let name = NodeName::given(name).unwrap();
    match links.first().map(Link::child) {
        None => Node::new(name, Memory::new(4096), Behaviour::default(), links),
        Some(below) => {
            let raw = Arc::new(Raw::new(below, String::new(), None, None).unwrap());
            Node::new(name, raw, Behaviour::default(), links)
        }
    }
}

fn access(writes: bool, shares_writes: bool) -> Access {
    Access {
        writes,
        shares_writes,
    }
}

fn insert(graph: &mut Graph, node: &Arc<Node>) {
    let nodes = vec![node.clone()];
    graph.insert(nodes.into()).unwrap();
}

/// `user name used permissions shared`, a letter for each permission.
fn lines(graph: &Graph) -> Vec<String> {
    let letters = |set: Permissions| -> String {
        let all = [
            ('r', Permissions::CONSISTENT_READ),
            ('w', Permissions::WRITE),
            ('u', Permissions::WRITE_UNCHANGED),
            ('s', Permissions::RESIZE),
        ];
        let held = all.iter().filter(|(_, one)| set.has(*one));
        held.map(|(letter, _)| *letter).collect()
    };
    let diagram = graph.diagram();
    let name = |number: u64| {
        let vertex = diagram.vertices.iter().find(|one| one.number == number);
        vertex.unwrap().name.clone()
    };
    let arrows = diagram.arrows.iter().map(|arrow| {
        format!(
            "{} {} {} {} {}",
            name(arrow.parent),
            arrow.name,
            name(arrow.child),
            letters(arrow.permissions),
            letters(arrow.shared)
        )
    });
    arrows.collect()
}

#[test]
fn a_raw_layer_passes_on_what_is_done_to_it() {
    let mut graph = Graph::new();
    let file = disk("file", Vec::new());
    let raw = disk("raw", vec![Link::new("file", &file, access(true, true))]);
    insert(&mut graph, &file);
    insert(&mut graph, &raw);
    assert_eq!(lines(&graph), ["raw file file  rwus"]);
    let export = User::Export("e".to_owned());
    let edge = graph.add_user(&raw, export, access(true, true)).unwrap();
    assert_eq!(lines(&graph), ["raw file file rw rwu", " root raw rw rwu"]);
    graph.remove_user(&edge);
    assert_eq!(lines(&graph), ["raw file file  rwus"]);
}

#[test]
fn a_backing_is_read_and_shows_what_is_enforced() {
    let mut graph = Graph::new();
    let base = disk("base", Vec::new());
    let top = disk("top", vec![Link::new("backing", &base, Access::BACKING)]);
    insert(&mut graph, &base);
    insert(&mut graph, &top);
    graph
        .add_drive(NewDrive::new("hd", Some(top.clone())))
        .unwrap();
    assert_eq!(
        lines(&graph),
        ["top backing base r ru", "hd root top rw rwus"]
    );
}

#[test]
fn a_job_is_one_point_with_several_lines() {
    let mut graph = Graph::new();
    let (source, target) = (disk("source", Vec::new()), disk("target", Vec::new()));
    insert(&mut graph, &source);
    insert(&mut graph, &target);
    let job = || User::Job("backup".to_owned());
    graph.add_user(&source, job(), access(false, true)).unwrap();
    graph.add_user(&target, job(), access(true, false)).unwrap();
    assert_eq!(
        lines(&graph),
        [
            "backup target target rw ru",
            "backup main node source r rwus"
        ]
    );
    let vertices = graph.diagram().vertices;
    let kinds: Vec<_> = vertices.iter().map(|one| (one.kind, one.number)).collect();
    let expected = [
        (VertexKind::Driver, 3),
        (VertexKind::Driver, 2),
        (VertexKind::Job, 1),
    ];
    assert_eq!(kinds, expected);
}
