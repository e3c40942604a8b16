//! Snapshots in transactions that fail, on a disk in memory that can be told to fail.

use std::sync::Mutex;

use block::driver::Child;
use block::formats::qcow2::create::{CreateOptions, create};
use block::formats::qcow2::{OpenOptions, Qcow2};
use block::graph::{Behaviour, NodeName};
use block::protocols::memory::{Fault, Memory, OpKind};

use super::*;
use crate::transaction::{Abort, run};

/// A qcow2 node `disk` on the memory.
async fn node(memory: &Arc<Memory>) -> Arc<Node> {
    let file = || Child::new(memory.clone());
    create(&file(), &CreateOptions::new(1 << 20)).await.unwrap();
    let options = OpenOptions {
        filename: "disk.qcow2".to_owned(),
        ..OpenOptions::default()
    };
    let opening = Qcow2::open(file(), options).await.unwrap();
    let driver = opening.finish(None).await.unwrap();
    let name = NodeName::given("disk").unwrap();
    Node::new(name, driver, Behaviour::default(), Vec::new())
}

fn snapshot(node: &Arc<Node>, name: &str) -> Box<dyn Action> {
    Box::new(SnapshotInternal::new(
        "disk".to_owned(),
        name.to_owned(),
        node.clone(),
    ))
}

fn names(node: &Node) -> Vec<String> {
    let list = node.driver().snapshots().unwrap().list();
    list.into_iter().map(|info| info.name).collect()
}

/// Breaks the disk for good, and fails.
struct Break(Arc<Memory>);

impl Action for Break {
    fn prepare(&mut self) -> BoxFuture<'_, Result<(), QmpError>> {
        Box::pin(async {
            for kind in [OpKind::Write, OpKind::WriteZeroes, OpKind::Flush] {
                self.0.fail_from(kind, 0, Fault::Io);
            }
            Err(QmpError::generic("broken"))
        })
    }

    fn abort(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn commit(self: Box<Self>) {}
}

/// Keeps log lines for the test to look at.
struct Lines(Mutex<Vec<String>>);

static LINES: Lines = Lines(Mutex::new(Vec::new()));

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

#[tokio::test]
async fn what_was_created_is_deleted_again() {
    let memory = Memory::new(0);
    let node = node(&memory).await;
    run(vec![snapshot(&node, "kept")]).await.unwrap();
    let error = run(vec![
        snapshot(&node, "a"),
        snapshot(&node, "b"),
        Box::new(Abort),
    ])
    .await;
    assert!(error.is_err());
    assert_eq!(names(&node), ["kept"]);
    let twice = run(vec![snapshot(&node, "a"), snapshot(&node, "a")]).await;
    assert_eq!(
        twice.unwrap_err().desc,
        "Snapshot with name 'a' already exists on device 'disk'"
    );
    assert_eq!(names(&node), ["kept"]);
}

#[tokio::test]
async fn no_space_for_a_snapshot_is_an_error_that_names_it_and_changes_nothing() {
    let memory = Memory::new(0);
    let node = node(&memory).await;
    memory.set_space_limit(Some(memory.allocated()));
    let error = run(vec![snapshot(&node, "s")]).await.unwrap_err();
    let expected = "Failed to create snapshot 's' on device 'disk': ";
    assert!(error.desc.starts_with(expected), "{error}");
    assert!(error.desc.contains("No space left on device"), "{error}");
    assert!(names(&node).is_empty());
    memory.set_space_limit(None);
    run(vec![snapshot(&node, "s")]).await.unwrap();
    assert_eq!(names(&node), ["s"]);
}

#[tokio::test]
async fn a_deletion_that_fails_in_the_rollback_tells_the_user_what_to_do() {
    log::set_logger(&LINES).unwrap();
    log::set_max_level(log::LevelFilter::Error);
    let memory = Memory::new(0);
    let node = node(&memory).await;
    let error = run(vec![snapshot(&node, "s"), Box::new(Break(memory))]).await;
    assert_eq!(error.unwrap_err().desc, "broken");
    let lines = LINES.0.lock().unwrap().join("\n");
    for part in [
        "device 'disk': snapshot 's' (id 1)",
        "blockdev-snapshot-delete-internal-sync",
        "qemu-img snapshot -d s disk.qcow2",
    ] {
        assert!(lines.contains(part), "{lines}");
    }
}
