//! Everything that a transaction over three images asks of storage fails once: nothing has changed on any of them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use block::driver::NewSnapshot;
use block::formats::qcow2::check::check;
use block::formats::qcow2::create::{CreateOptions, create as make};
use block::formats::qcow2::{OpenOptions, Qcow2};
use block::io::IoContext;
use block::open::{
    Aio, DriverOptions, Existing, FileOptions, Locking, NewContent, NewImage, NodeOptions, NodeRef,
    Opener, Qcow2Options, create_image, open,
};
use block::protocols::memory::{Fault as StorageFault, OpKind};

use super::*;
use crate::journal::Journal;

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

/// A qcow2 image in a file, with a snapshot, as a node.
async fn in_file(cx: &Cx, io: &IoContext, path: &Path, name: &str) {
    let filename = path.join(name).to_str().unwrap().to_owned();
    let content = NewContent::Qcow2(Box::new(CreateOptions::new(1 << 20)));
    let image = NewImage {
        filename: filename.clone(),
        content,
    };
    create_image(io, &image, Existing::Keep)
        .await
        .unwrap()
        .keep();
    let file = FileOptions {
        filename,
        aio: Aio::Threads,
        locking: Locking::On,
    };
    let file = NodeOptions::new(DriverOptions::File(file));
    let qcow2 = Qcow2Options::new(NodeRef::Inline(Arc::new(file)));
    let mut options = NodeOptions::new(DriverOptions::Qcow2(qcow2));
    options.node_name = Some(name.to_owned());
    let opener = cx.commit(|control| Ok(Opener::new(&control.io, &control.graph)));
    let opened = open(&opener.await.unwrap(), &options).await.unwrap();
    let inserted = cx.commit(|control| control.graph.insert(opened).map_err(lookup::from_engine));
    let node = inserted.await.unwrap();
    let snapshots = node.driver().snapshots().unwrap();
    snapshots.create(NewSnapshot::named("old")).await.unwrap();
}

/// Makes a file, as a new layer does.
struct Makes(NewImage);

impl Action for Makes {
    fn resolve(&mut self, _: &mut Control, _: &mut Plan) -> Result<(), QmpError> {
        Ok(())
    }

    fn prepare<'a>(&'a mut self, with: &'a mut Preparing) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(async {
            let made = with.create_image(&self.0, Existing::Replace).await?;
            assert!(made.is_new);
            Ok(())
        })
    }
}

#[tokio::test]
async fn whatever_write_of_the_journal_fails_nothing_is_changed_and_nothing_left() {
    let folder = tempfile::tempdir().unwrap();
    let (cx, io) = (testing::running(), IoContext::new());
    for disk in DISKS {
        in_file(&cx, &io, folder.path(), disk).await;
    }
    let state = folder.path().join("state");
    let journal = Arc::new(Journal::open(&state).unwrap());
    let shared = journal.clone();
    let given = cx.commit(move |control| {
        control.journal = Some(shared);
        Ok(())
    });
    given.await.unwrap();
    let files = || {
        let entries = std::fs::read_dir(folder.path()).unwrap().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
        names.sort();
        names
    };
    let before = files();
    let mut failed = 0;
    for write in 1.. {
        let new = NewImage {
            filename: folder.path().join("new.qcow2").to_str().unwrap().to_owned(),
            content: NewContent::Qcow2(Box::new(CreateOptions::new(1 << 20))),
        };
        let mut all = actions();
        all.insert(2, Box::new(Makes(new)));
        journal.fails_in.store(write, Ordering::SeqCst);
        let result = run(&cx, all).await;
        journal.fails_in.store(0, Ordering::SeqCst);
        match result {
            Ok(_) => break,
            Err(error) => assert!(
                error
                    .desc
                    .starts_with("Could not write the journal of the transaction: "),
                "{error}"
            ),
        }
        failed += 1;
        assert_eq!(names(&cx).await, BEFORE, "write {write}");
        assert_eq!(files(), before, "write {write}");
        assert_eq!(
            std::fs::read_dir(&state).unwrap().count(),
            0,
            "write {write}"
        );
    }
    // Its beginning, the file (before and after), the images, the commit.
    assert_eq!(failed, 5);
    assert_eq!(names(&cx).await, AFTER);
    assert!(folder.path().join("new.qcow2").exists());
}
