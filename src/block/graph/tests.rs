//! Nodes around a memory disk whose timing the tests steer, and the rules of the graph.

use std::time::Duration;

use tokio::time::timeout;

use super::*;
use crate::driver::{Child, RequestLimits, Requests, WriteFlags, ZeroFlags};
use crate::formats::qcow2::create::{CreateOptions, create};
use crate::formats::qcow2::{OpenOptions, Qcow2};
use crate::formats::raw::Raw;
use crate::io::Data;
use crate::open::{CacheMode, DetectZeroes, DiscardMode};
use crate::protocols::memory::{Memory, OpKind};

const SHORT: Duration = Duration::from_millis(20);

fn name(text: &str) -> NodeName {
    NodeName::given(text).unwrap()
}

fn node_on(memory: &Arc<Memory>, behaviour: Behaviour) -> Arc<Node> {
    Node::new(name("n"), memory.clone(), behaviour, Vec::new())
}

fn disk(text: &str) -> Arc<Node> {
    Node::new(
        name(text),
        Memory::new(4096),
        Behaviour::default(),
        Vec::new(),
    )
}

/// A raw node on others; `writes` as its access to them, shared with nobody.
fn above(node_name: NodeName, below: &[&Arc<Node>], writes: bool) -> Arc<Node> {
    let access = Access {
        writes,
        shares_writes: false,
    };
    let links: Vec<Link> = below
        .iter()
        .map(|node| Link::new("file", node, access))
        .collect();
    let raw = Raw::new(links[0].child(), String::new(), None, None).unwrap();
    Node::new(node_name, Arc::new(raw), Behaviour::default(), links)
}

fn opened(nodes: &[&Arc<Node>]) -> Opened {
    let nodes: Vec<_> = nodes.iter().map(|node| Arc::clone(node)).collect();
    nodes.into()
}

fn names(graph: &Graph) -> Vec<&str> {
    graph.nodes().map(|node| node.name()).collect()
}

fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => "no error".to_owned(),
        Err(error) => error.message().to_owned(),
    }
}

fn blocks_of_512(memory: &Memory) {
    memory.set_limits(RequestLimits {
        alignment: 512,
        preferred: 512,
        growable: true,
    });
}

#[tokio::test]
async fn misaligned_requests_match_a_plain_vector_and_the_driver_sees_whole_blocks() {
    let memory = Memory::new(64 << 10);
    blocks_of_512(&memory);
    let discard = DiscardMode::Unmap;
    let node = node_on(
        &memory,
        Behaviour {
            discard,
            ..Behaviour::default()
        },
    );
    memory.start_log();
    let mut model = vec![0u8; 64 << 10];
    let mut random = fastrand::Rng::with_seed(11);
    for step in 0..1000u32 {
        let offset = random.usize(..model.len());
        let len = random.usize(..=(model.len() - offset).min(5000));
        let at = offset as u64;
        let range = offset..offset + len;
        match random.u8(..3) {
            0 => {
                let data = Data::from(vec![step as u8; len]);
                node.write(at, data, WriteFlags::default()).await.unwrap();
                model[range].fill(step as u8);
            }
            1 => {
                node.write_zeroes(at, len as u64, ZeroFlags::default())
                    .await
                    .unwrap();
                model[range].fill(0);
            }
            _ => {
                let read = node.read(at, len as u64).await.unwrap();
                assert_eq!(read.to_bytes(), model[range], "step {step}");
            }
        }
    }
    assert_eq!(memory.content(), model);
    for record in memory.log() {
        use crate::protocols::memory::Change;
        let (offset, len) = match record.change {
            Change::Write { offset, data, .. } => (offset, data.len()),
            Change::WriteZeroes { offset, len, .. } => (offset, len),
            other => panic!("{other:?}"),
        };
        assert_eq!((offset % 512, len % 512), (0, 0));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_of_one_block_do_not_undo_each_other() {
    let memory = Memory::new(4096);
    blocks_of_512(&memory);
    let node = node_on(&memory, Behaviour::default());
    // Sixteen tasks own 32 bytes each of one block, and one writes the block's neighbours with it in one piece.
    let tasks: Vec<_> = (0..16u64)
        .map(|index| {
            let node = node.clone();
            tokio::spawn(async move {
                for round in 1..100u8 {
                    let data = Data::from(vec![round; 32]);
                    node.write(index * 32, data, WriteFlags::default())
                        .await
                        .unwrap();
                    let read = node.read(index * 32, 32).await.unwrap().to_bytes();
                    assert_eq!(read, [round; 32][..]);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(memory.content()[..512], [99; 512]);
}

#[tokio::test]
async fn an_aligned_write_waits_for_a_read_modify_write_of_its_block() {
    let memory = Memory::new(4096);
    blocks_of_512(&memory);
    let node = node_on(&memory, Behaviour::default());
    memory.hold(OpKind::Read);
    let small = tokio::spawn({
        let node = node.clone();
        async move {
            node.write(10, Data::from(vec![1; 5]), WriteFlags::default())
                .await
        }
    });
    memory.wait_held(1).await;
    let whole = node.write(0, Data::from(vec![2; 512]), WriteFlags::default());
    let mut whole = std::pin::pin!(whole);
    assert!(timeout(SHORT, whole.as_mut()).await.is_err());
    memory.release_all();
    small.await.unwrap().unwrap();
    whole.await.unwrap();
    assert_eq!(memory.content()[..512], [2; 512]);
}

#[tokio::test]
async fn quiescing_waits_for_a_request_whose_waiter_is_gone() {
    let memory = Memory::new(4096);
    let node = node_on(&memory, Behaviour::default());
    memory.hold(OpKind::Write);
    let write = node.write(0, Data::from(vec![1; 5]), WriteFlags::default());
    assert!(timeout(SHORT, write).await.is_err());
    let mut quiesce = std::pin::pin!(node.quiesce());
    assert!(timeout(SHORT, quiesce.as_mut()).await.is_err());
    memory.release_all();
    let quiesced = quiesce.await;
    assert_eq!(memory.content()[..5], [1; 5]);
    // And while it lasts, nothing comes through.
    let read = node.read(0, 1);
    let mut read = std::pin::pin!(read);
    assert!(timeout(SHORT, read.as_mut()).await.is_err());
    drop(quiesced);
    assert_eq!(read.await.unwrap().to_bytes(), [1][..]);
}

#[tokio::test]
async fn a_closed_node_answers_errors() {
    let memory = Memory::new(4096);
    let node = node_on(&memory, Behaviour::default());
    node.close().await.unwrap();
    node.close().await.unwrap();
    assert_eq!(message(node.read(0, 1).await), "Node 'n' has been closed");
    assert_eq!(message(node.flush().await), "Node 'n' has been closed");
}

#[tokio::test]
async fn zeroes_are_detected_and_unmapped_only_where_asked() {
    for (detect_zeroes, writes, zeroes) in [
        (DetectZeroes::Off, 2, 0),
        (DetectZeroes::On, 1, 1),
        (DetectZeroes::Unmap, 1, 1),
    ] {
        let memory = Memory::new(4096);
        let behaviour = Behaviour {
            detect_zeroes,
            ..Behaviour::default()
        };
        let node = node_on(&memory, behaviour);
        for value in [0, 1] {
            let data = Data::from(vec![value; 4096]);
            node.write(0, data, WriteFlags::default()).await.unwrap();
        }
        assert_eq!(memory.count(OpKind::Write), writes);
        assert_eq!(memory.count(OpKind::WriteZeroes), zeroes);
        assert_eq!(node.count(RequestKind::Write).done, 2);
        assert_eq!(node.count(RequestKind::Write).bytes, 8192);
    }
}

#[tokio::test]
async fn compressed_clusters_are_written_through() {
    for writethrough in [false, true] {
        let memory = Memory::new(0);
        let child = Child::new(memory.clone());
        create(&child, &CreateOptions::new(1 << 20)).await.unwrap();
        let opening = Qcow2::open(child, OpenOptions::default()).await.unwrap();
        let behaviour = Behaviour {
            cache: CacheMode {
                writethrough,
                ..CacheMode::default()
            },
            ..Behaviour::default()
        };
        let node = Node::new(
            name("n"),
            opening.finish(None).await.unwrap(),
            behaviour,
            Vec::new(),
        );
        let flushes = memory.count(OpKind::Flush);
        let cluster = Data::from(vec![7; 65536]);
        node.write_compressed(0, cluster).await.unwrap();
        assert_eq!(memory.count(OpKind::Flush) > flushes, writethrough);
        assert_eq!(node.highest_write(), 65536);
    }
}

#[tokio::test]
async fn discards_reach_the_driver_only_when_the_node_unmaps() {
    for (discard, count) in [(DiscardMode::Ignore, 0), (DiscardMode::Unmap, 1)] {
        let memory = Memory::new(4096);
        let behaviour = Behaviour {
            discard,
            ..Behaviour::default()
        };
        node_on(&memory, behaviour).discard(0, 4096).await.unwrap();
        assert_eq!(memory.count(OpKind::Discard), count);
    }
}

#[tokio::test]
async fn a_read_only_node_and_ranges_outside_are_refused() {
    let memory = Memory::new(4096);
    memory.set_limits(RequestLimits {
        alignment: 1,
        preferred: 1,
        growable: false,
    });
    let behaviour = Behaviour {
        read_only: true,
        ..Behaviour::default()
    };
    let fixed = node_on(&memory, behaviour);
    let write = fixed.write(0, Data::zeroes(1), WriteFlags::default()).await;
    assert_eq!(write.unwrap_err().kind(), ErrorKind::ReadOnly);
    for (offset, len) in [(4096, 1), (0, 4097), (u64::MAX, 2)] {
        let read = fixed.read(offset, len).await;
        assert_eq!(read.unwrap_err().kind(), ErrorKind::OutOfRange);
    }
    assert!(fixed.read(4096, 0).await.unwrap().is_empty());
}

#[test]
fn a_tree_is_inserted_whole_or_not_at_all() {
    let mut graph = Graph::new();
    let file = disk("file");
    graph.insert(opened(&[&file])).unwrap();
    let other = disk("other");
    let clash = disk("file");
    let result = graph.insert(opened(&[&other, &clash]));
    assert_eq!(message(result), "Duplicate nodes with node-name='file'");
    assert_eq!(names(&graph), ["file"]);
    let twice = graph.insert(opened(&[&other, &disk("other")]));
    assert_eq!(message(twice), "Duplicate nodes with node-name='other'");
    let top = above(name("top"), &[&disk("gone")], false);
    assert_eq!(
        message(graph.insert(opened(&[&top]))),
        "Cannot find device='gone' nor node-name='gone'"
    );
}

#[test]
fn a_node_in_use_stays() {
    let mut graph = Graph::new();
    let file = disk("file");
    let top = above(name("top"), &[&file], true);
    graph.insert(opened(&[&file])).unwrap();
    graph.insert(opened(&[&top])).unwrap();
    assert_eq!(message(graph.remove("file")), "Block device file is in use");
    assert_eq!(
        message(graph.remove("none")),
        "Failed to find node with node-name='none'"
    );
    let access = Access {
        writes: true,
        shares_writes: true,
    };
    let export = User::Export("e".to_owned());
    let edge = graph.add_user(&top, export, access).unwrap();
    assert_eq!(message(graph.remove("top")), "Node top is in use");
    graph.remove_user(&edge);
    assert_eq!(graph.remove("top").unwrap().nodes.len(), 1);
    assert_eq!(graph.remove("file").unwrap().nodes.len(), 1);
    assert!(names(&graph).is_empty());
}

#[test]
fn layers_that_came_with_a_node_go_with_their_last_user() {
    let mut graph = Graph::new();
    let source = graph.names();
    let base = Node::new(
        source.next(),
        Memory::new(4096),
        Behaviour::default(),
        Vec::new(),
    );
    let apart = disk("apart");
    graph.insert(opened(&[&apart])).unwrap();
    let along = disk("along");
    let middle = above(source.next(), &[&base, &along, &apart], false);
    let top = above(name("top"), &[&middle, &base], false);
    let nodes = [&base, &along, &middle, &top];
    graph.insert(opened(&nodes)).unwrap();
    assert_eq!(
        message(graph.remove("along")),
        "Node along is not owned by the monitor"
    );
    assert_eq!(
        message(graph.remove(middle.name())),
        format!("Node {} is not owned by the monitor", middle.name())
    );
    let removed = graph.remove("top").unwrap();
    let order: Vec<&str> = removed.nodes.iter().map(|node| node.name()).collect();
    assert_eq!(order, ["top", middle.name(), "along", base.name()]);
    assert_eq!(names(&graph), ["apart"]);
}

#[test]
fn two_writers_that_do_not_share_exclude_each_other() {
    let mut graph = Graph::new();
    let file = disk("file");
    let first = above(name("first"), &[&file], true);
    graph.insert(opened(&[&file, &first])).unwrap();
    let second = above(name("second"), &[&file], true);
    assert_eq!(
        message(graph.insert(opened(&[&second]))),
        "Permission conflict on node 'file': writing by node 'second' (uses node as 'file' child) \
         is excluded by node 'first' (uses node as 'file' child)"
    );
    let both = above(name("both"), &[&file, &file], true);
    let mut fresh = Graph::new();
    let within = fresh.insert(opened(&[&file, &both]));
    assert_eq!(within.unwrap_err().kind(), ErrorKind::InUse);
    let reader = Access {
        writes: false,
        shares_writes: true,
    };
    graph
        .add_user(&file, User::Export("r".to_owned()), reader)
        .unwrap();
    let writer = Access {
        writes: true,
        shares_writes: true,
    };
    let export = graph.add_user(&file, User::Export("w".to_owned()), writer);
    assert_eq!(export.unwrap_err().kind(), ErrorKind::InUse);
}

#[test]
fn a_device_is_a_drive_or_a_node() {
    let mut graph = Graph::new();
    let root = disk("root");
    graph.insert(opened(&[&root])).unwrap();
    graph
        .add_drive(NewDrive::new("ide-hd0", Some(root.clone())))
        .unwrap();
    graph.add_drive(NewDrive::new("floppy", None)).unwrap();
    assert_eq!(graph.lookup(Some("ide-hd0"), None).unwrap().name(), "root");
    assert_eq!(
        graph.lookup(Some("x"), Some("root")).unwrap().name(),
        "root"
    );
    let missing = graph.lookup(Some("none"), Some("none")).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert_eq!(
        missing.message(),
        "Cannot find device='none' nor node-name='none'"
    );
    assert_eq!(
        message(graph.lookup(Some("floppy"), None)),
        "Device 'floppy' has no medium"
    );
    assert_eq!(message(graph.remove("root")), "Node root is in use");
    assert_eq!(
        message(graph.add_drive(NewDrive::new("root", None))),
        "Device with id 'root' is a node's name already"
    );
    assert_eq!(
        message(graph.insert(opened(&[&disk("floppy")]))),
        "node-name=floppy is conflicting with a device id"
    );
    assert!(graph.remove_drive("ide-hd0").unwrap().is_empty());
    assert!(graph.remove("root").is_ok());
}
