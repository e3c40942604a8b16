//! Operations on qcow2 images, on a disk in memory that can be told to fail.

use std::sync::Arc;

use block::driver::Child;
use block::formats::qcow2::create::{CreateOptions, create};
use block::formats::qcow2::{OpenOptions, Qcow2};
use block::protocols::memory::Memory;

use super::*;
use crate::daemon::{Cx, testing};
use crate::transaction::Abort;
use crate::transaction::tests::fake;
use crate::transaction::tests::run;

/// A qcow2 disk `disk` on the memory.
async fn disk(cx: &Cx, memory: &Arc<Memory>) -> Arc<Node> {
    let file = || Child::new(memory.clone());
    create(&file(), &CreateOptions::new(1 << 20)).await.unwrap();
    let options = OpenOptions {
        filename: "disk.qcow2".to_owned(),
        ..OpenOptions::default()
    };
    let opening = Qcow2::open(file(), options).await.unwrap();
    let driver = opening.finish(None).await.unwrap();
    fake::insert(cx, "disk", driver).await
}

fn action(operation: Operation) -> Box<dyn Action> {
    Box::new(SnapshotAction::new("disk".to_owned(), operation))
}

fn snapshot(name: &str) -> Box<dyn Action> {
    let name = name.to_owned();
    action(Operation::Create { name })
}

fn named(name: &str) -> SnapshotSelector {
    SnapshotSelector {
        id: None,
        name: Some(name.to_owned()),
    }
}

fn names(disk: &Node) -> Vec<String> {
    let list = disk.driver().snapshots().unwrap().list();
    list.into_iter().map(|info| info.name).collect()
}

#[tokio::test]
async fn nothing_is_left_of_a_transaction_that_fails() {
    let (cx, memory) = (testing::running(), Memory::new(0));
    let disk = disk(&cx, &memory).await;
    run(&cx, vec![snapshot("kept")]).await.unwrap();
    let error = run(
        &cx,
        vec![
            snapshot("a"),
            action(Operation::Delete(named("kept"))),
            snapshot("kept"),
            Box::new(Abort),
        ],
    )
    .await;
    assert!(error.is_err());
    assert_eq!(names(&disk), ["kept"]);
    let twice = run(&cx, vec![snapshot("a"), snapshot("a")]).await;
    assert_eq!(
        twice.unwrap_err().desc,
        "Snapshot with name 'a' already exists on device 'disk'"
    );
    assert_eq!(names(&disk), ["kept"]);
}

#[tokio::test]
async fn an_action_sees_what_those_before_it_did() {
    let (cx, memory) = (testing::running(), Memory::new(0));
    let disk = disk(&cx, &memory).await;
    let about = run(
        &cx,
        vec![
            snapshot("a"),
            action(Operation::Revert(named("a"))),
            action(Operation::Delete(named("a"))),
            snapshot("a"),
        ],
    )
    .await
    .unwrap();
    let ids: Vec<String> = about
        .into_iter()
        .map(|about| about.snapshot.unwrap().id)
        .collect();
    assert_eq!(ids[..3], ["1", "1", "1"]);
    assert_eq!(names(&disk), ["a"]);
    let gone = [
        action(Operation::Delete(named("a"))),
        action(Operation::Revert(named("a"))),
    ];
    assert_eq!(
        run(&cx, gone.into()).await.unwrap_err().desc,
        "Snapshot with id 'null' and name 'a' does not exist on device 'disk'"
    );
    assert_eq!(names(&disk), ["a"]);
}

#[tokio::test]
async fn no_space_for_a_snapshot_is_an_error_that_names_it_and_changes_nothing() {
    let (cx, memory) = (testing::running(), Memory::new(0));
    let disk = disk(&cx, &memory).await;
    memory.set_space_limit(Some(memory.allocated()));
    let error = run(&cx, vec![snapshot("s")]).await.unwrap_err();
    let expected = "Failed to create snapshot 's' on device 'disk': ";
    assert!(error.desc.starts_with(expected), "{error}");
    assert!(error.desc.contains("No space left on device"), "{error}");
    assert!(names(&disk).is_empty());
    memory.set_space_limit(None);
    run(&cx, vec![snapshot("s")]).await.unwrap();
    assert_eq!(names(&disk), ["s"]);
}
