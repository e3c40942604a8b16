//! Operations on qcow2 images, on a disk in memory that can be told to fail.

use std::sync::Arc;

use block::driver::Child;
use block::formats::qcow2::create::{CreateOptions, create};
use block::formats::qcow2::{OpenOptions, Qcow2};
use block::graph::{Behaviour, Node, NodeName};
use block::protocols::memory::Memory;

use super::*;
use crate::transaction::{Abort, run};

/// A qcow2 disk `disk` on the memory.
async fn disk(memory: &Arc<Memory>) -> Disk {
    let file = || Child::new(memory.clone());
    create(&file(), &CreateOptions::new(1 << 20)).await.unwrap();
    let options = OpenOptions {
        filename: "disk.qcow2".to_owned(),
        ..OpenOptions::default()
    };
    let opening = Qcow2::open(file(), options).await.unwrap();
    let driver = opening.finish(None).await.unwrap();
    let name = NodeName::given("disk").unwrap();
    Disk {
        device: "disk".to_owned(),
        node: Node::new(name, driver, Behaviour::default(), Vec::new()),
        views: Vec::new(),
    }
}

fn action(disk: &Disk, operation: Operation) -> Box<dyn Action> {
    Box::new(SnapshotAction::new(disk.clone(), operation).unwrap())
}

fn snapshot(disk: &Disk, name: &str) -> Box<dyn Action> {
    let name = name.to_owned();
    action(disk, Operation::Create { name })
}

fn named(name: &str) -> SnapshotSelector {
    SnapshotSelector {
        id: None,
        name: Some(name.to_owned()),
    }
}

fn names(disk: &Disk) -> Vec<String> {
    let list = disk.node.driver().snapshots().unwrap().list();
    list.into_iter().map(|info| info.name).collect()
}

#[tokio::test]
async fn nothing_is_left_of_a_transaction_that_fails() {
    let memory = Memory::new(0);
    let disk = disk(&memory).await;
    run(vec![snapshot(&disk, "kept")]).await.unwrap();
    let error = run(vec![
        snapshot(&disk, "a"),
        action(&disk, Operation::Delete(named("kept"))),
        snapshot(&disk, "kept"),
        Box::new(Abort),
    ])
    .await;
    assert!(error.is_err());
    assert_eq!(names(&disk), ["kept"]);
    let twice = run(vec![snapshot(&disk, "a"), snapshot(&disk, "a")]).await;
    assert_eq!(
        twice.unwrap_err().desc,
        "Snapshot with name 'a' already exists on device 'disk'"
    );
    assert_eq!(names(&disk), ["kept"]);
}

#[tokio::test]
async fn an_action_sees_what_those_before_it_did() {
    let memory = Memory::new(0);
    let disk = disk(&memory).await;
    let about = run(vec![
        snapshot(&disk, "a"),
        action(&disk, Operation::Revert(named("a"))),
        action(&disk, Operation::Delete(named("a"))),
        snapshot(&disk, "a"),
    ])
    .await
    .unwrap();
    let ids: Vec<String> = about.into_iter().map(|about| about.unwrap().id).collect();
    assert_eq!(ids[..3], ["1", "1", "1"]);
    assert_eq!(names(&disk), ["a"]);
    let gone = [
        action(&disk, Operation::Delete(named("a"))),
        action(&disk, Operation::Revert(named("a"))),
    ];
    assert_eq!(
        run(gone.into()).await.unwrap_err().desc,
        "Snapshot with id 'null' and name 'a' does not exist on device 'disk'"
    );
    assert_eq!(names(&disk), ["a"]);
}

#[tokio::test]
async fn no_space_for_a_snapshot_is_an_error_that_names_it_and_changes_nothing() {
    let memory = Memory::new(0);
    let disk = disk(&memory).await;
    memory.set_space_limit(Some(memory.allocated()));
    let error = run(vec![snapshot(&disk, "s")]).await.unwrap_err();
    let expected = "Failed to create snapshot 's' on device 'disk': ";
    assert!(error.desc.starts_with(expected), "{error}");
    assert!(error.desc.contains("No space left on device"), "{error}");
    assert!(names(&disk).is_empty());
    memory.set_space_limit(None);
    run(vec![snapshot(&disk, "s")]).await.unwrap();
    assert_eq!(names(&disk), ["s"]);
}
