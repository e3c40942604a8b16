//! Everything that a transaction over three images in memory asks of storage fails once: nothing has changed on any of them.

use std::sync::Arc;

use block::driver::NewSnapshot;
use block::formats::qcow2::check::check;
use block::formats::qcow2::create::{CreateOptions, create as make};
use block::formats::qcow2::{OpenOptions, Qcow2};
use block::protocols::memory::{Fault as StorageFault, OpKind};

use super::*;

const DISKS: [&str; 3] = ["a", "b", "c"];

/// A snapshot of each, one that is gone again, and the one that was there before replaced.
fn actions() -> Vec<Box<dyn Action>> {
    vec![
        create("a", "new"),
        operation("a", Operation::Delete(selected("old"))),
        create("b", "new"),
        operation("b", Operation::Revert(selected("old"))),
        create("c", "new"),
    ]
}

async fn node(cx: &Cx, name: &'static str) -> Arc<Node> {
    let found = cx.commit(move |control| lookup::node(&control.graph, name));
    found.await.unwrap()
}

/// The names of all snapshots of all disks.
async fn names(cx: &Cx) -> Vec<String> {
    let mut names = Vec::new();
    for disk in DISKS {
        let node = node(cx, disk).await;
        let list = node.driver().snapshots().unwrap().list();
        names.extend(list.into_iter().map(|info| format!("{disk}/{}", info.name)));
    }
    names
}

const BEFORE: [&str; 3] = ["a/old", "b/old", "c/old"];
const AFTER: [&str; 5] = ["a/new", "b/old", "b/new", "c/old", "c/new"];

/// A qcow2 image in memory, with a snapshot, as a node.
async fn in_memory(cx: &Cx, name: &str) -> Arc<Memory> {
    let memory = Memory::new(0);
    make(&memory.child(), &CreateOptions::new(1 << 20))
        .await
        .unwrap();
    let opening = Qcow2::open(memory.child(), OpenOptions::default()).await;
    let driver = opening.unwrap().finish(None).await.unwrap();
    let node = fake::insert(cx, name, driver).await;
    let data = vec![1; 65536].into();
    node.write(0, data, Default::default()).await.unwrap();
    let snapshots = node.driver().snapshots().unwrap();
    snapshots.create(NewSnapshot::named("old")).await.unwrap();
    memory
}

#[tokio::test]
async fn whatever_request_to_an_image_fails_no_image_is_changed() {
    let mut failed = 0;
    for kind in [OpKind::Read, OpKind::Write, OpKind::Flush] {
        for fault in [StorageFault::Io, StorageFault::NoSpace] {
            for faulty in 0..DISKS.len() {
                for skip in 0.. {
                    let cx = testing::running();
                    let mut memories = Vec::new();
                    for disk in DISKS {
                        memories.push(in_memory(&cx, disk).await);
                    }
                    let before = memories[faulty].count(kind);
                    memories[faulty].fail_once(kind, skip, fault);
                    let result = run(&cx, actions()).await;
                    let reached = memories[faulty].count(kind) - before > skip;
                    memories[faulty].clear_faults();
                    let place = format!("{kind:?} {skip} of {}: {fault:?}", DISKS[faulty]);
                    if result.is_err() {
                        assert!(reached, "{place}");
                        failed += 1;
                        assert_eq!(names(&cx).await, BEFORE, "{place}");
                        run(&cx, actions()).await.unwrap();
                    }
                    assert_eq!(names(&cx).await, AFTER, "{place}");
                    for (disk, memory) in DISKS.iter().zip(&memories) {
                        node(&cx, disk).await.close().await.unwrap();
                        let report = check(&memory.child()).await.unwrap();
                        assert!(report.is_clean(), "{place}: {disk}: {report:?}");
                    }
                    if !reached {
                        break;
                    }
                }
            }
        }
    }
    assert!(failed > 30, "{failed} faults have made it fail");
}
