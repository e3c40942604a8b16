//! Overlays in transactions: what they leave, and that nothing is left of those that fail.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use block::driver::{SnapshotSelector, WriteFlags};
use block::graph::{Edge, NewDrive};
use block::io::Data;
use block::open::Opener;
use futures_util::FutureExt as _;
use tempfile::TempDir;

use super::*;
use crate::daemon::testing;
use crate::transaction::tests::fake::{self, Fault, GO_ON, Log};
use crate::transaction::tests::run;
use crate::transaction::{Abort, Operation, SnapshotAction};

const MIB: u64 = 1 << 20;

/// A daemon with a drive, and the folder that its images are in.
struct Disk {
    cx: Cx,
    folder: TempDir,
}

impl Disk {
    async fn new() -> Disk {
        let disk = Disk {
            cx: testing::running(),
            folder: tempfile::tempdir().unwrap(),
        };
        disk.qemu_img(&["create", "-q", "-f", "qcow2", "base", "1M"]);
        let options = options(
            &disk.path("base"),
            Some("base".to_owned()),
            "qcow2",
            &disk.null(),
        );
        let opener = disk
            .with(|control| Opener::new(&control.io, &control.graph))
            .await;
        let opened = open(&opener, &options.unwrap()).await.unwrap();
        disk.with(|control| {
            let root = control.graph.insert(opened).unwrap();
            let drive = NewDrive {
                id: "d".to_owned(),
                root: Some(root),
                policy: Default::default(),
            };
            control.graph.add_drive(drive).unwrap();
        })
        .await;
        disk
    }

    /// Something that is written to as usual.
    fn null(&self) -> Arc<Node> {
        let options = block::open::NullOptions {
            size: 0,
            read_zeroes: true,
            latency_ns: 0,
        };
        let driver = Arc::new(block::protocols::null::Null::new(&options));
        let name = block::graph::NameSource::default().next();
        Node::new(name, driver, Default::default(), Vec::new())
    }

    async fn with<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut Control) -> T + Send + 'static,
    ) -> T {
        let looked = self.cx.commit(|control| Ok(look(control)));
        looked.await.unwrap()
    }

    fn path(&self, name: &str) -> String {
        let path: PathBuf = self.folder.path().join(name);
        path.to_str().unwrap().to_owned()
    }

    fn qemu_img(&self, arguments: &[&str]) -> String {
        let _child = testing::child();
        let run = Command::new("qemu-img")
            .args(arguments)
            .current_dir(self.folder.path())
            .output()
            .unwrap();
        assert!(run.status.success(), "{run:?}");
        String::from_utf8(run.stdout).unwrap()
    }

    async fn edge(&self) -> Edge {
        let edge = self.with(|control| control.graph.drive("d").unwrap().root.clone());
        edge.await.unwrap()
    }

    async fn write(&self, byte: u8) {
        let data = Data::from(vec![byte; 4096]);
        let edge = self.edge().await;
        edge.write(0, data, WriteFlags::default()).await.unwrap();
    }

    async fn first(&self) -> u8 {
        self.edge().await.read(0, 1).await.unwrap().to_bytes()[0]
    }

    /// An overlay in a file of this name.
    fn overlay(&self, name: &str, is_there: bool) -> Box<dyn Action> {
        let file = OverlayFile {
            filename: self.path(name),
            node_name: Some(name.to_owned()),
            format: "qcow2".to_owned(),
            is_there,
        };
        let overlay = Overlay::File(file);
        Box::new(ExternalSnapshot::new(Some("d".to_owned()), None, overlay))
    }

    fn internal(&self, operation: Operation) -> Box<dyn Action> {
        Box::new(SnapshotAction::new("d".to_owned(), operation))
    }

    /// The chain of the drive, its files and the nodes: what a failure must leave as it is.
    async fn state(&self) -> (Vec<String>, Vec<String>, usize) {
        let (chain, nodes) = self
            .with(|control| {
                let root = control.graph.drive("d").unwrap().node();
                let chain = std::iter::successors(root, |node| node.link("backing"));
                let chain: Vec<String> = chain.map(|node| node.name().to_owned()).collect();
                (chain, control.graph.nodes().count())
            })
            .await;
        let files = fs::read_dir(self.folder.path()).unwrap();
        let mut files: Vec<String> = files
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        (chain, files, nodes)
    }
}

/// An overlay on a disk, and a snapshot on another whose change fails when it is told to. Answers when guests use the overlay.
async fn fails_late(
    disk: &Disk,
    log: &Log,
    overlay: Box<dyn Action>,
) -> tokio::task::JoinHandle<Result<(), QmpError>> {
    fake::disk(&disk.cx, "other", &[Fault::CommitWaits], log).await;
    let before = disk.edge().await.node();
    let snapshot = SnapshotAction::new(
        "other".to_owned(),
        Operation::Create {
            name: "s".to_owned(),
        },
    );
    let cx = disk.cx.clone();
    let running = tokio::spawn(async move {
        let done = run(&cx, vec![overlay, Box::new(snapshot)]).await;
        done.map(drop)
    });
    while Arc::ptr_eq(&disk.edge().await.node(), &before) {
        testing::a_moment().await;
    }
    running
}

type Make = fn(&Disk) -> Box<dyn Action>;

fn named(name: &str) -> SnapshotSelector {
    SnapshotSelector {
        id: None,
        name: Some(name.to_owned()),
    }
}

#[tokio::test]
async fn each_overlay_of_a_transaction_is_put_on_the_one_before() {
    let disk = Disk::new().await;
    disk.write(1).await;
    let actions = ["one", "two", "three"].map(|name| disk.overlay(name, false));
    let effects = run(&disk.cx, actions.into()).await.unwrap();
    assert_eq!(effects[1].node_name.as_deref(), Some("two"));
    let (chain, files, nodes) = disk.state().await;
    assert_eq!(chain, ["three", "two", "one", "base"]);
    assert_eq!((files.len(), nodes), (4, 8));
    assert_eq!(disk.first().await, 1);
    disk.write(2).await;
    disk.edge().await.flush().await.unwrap();
    for (name, last) in [
        ("base", true),
        ("one", true),
        ("two", true),
        ("three", false),
    ] {
        let read_only = disk.with(move |control| {
            let node = control.graph.node(name).unwrap();
            (
                node.behaviour().read_only,
                node.link("file").unwrap().behaviour().read_only,
            )
        });
        assert_eq!(read_only.await, (last, last), "{name}");
    }
    // As other programs see it: the layers below are theirs to read.
    for name in ["base", "one", "two"] {
        disk.qemu_img(&["check", "-q", name]);
    }
    let info = disk.qemu_img(&["info", "-U", "--backing-chain", "three"]);
    for name in ["two", "one", "base"] {
        let line = format!("backing file: {}\n", disk.path(name));
        assert!(info.contains(&line), "{info}");
    }
}

#[tokio::test]
async fn nothing_is_left_of_overlays_of_a_transaction_that_fails() {
    let disk = Disk::new().await;
    disk.write(1).await;
    disk.qemu_img(&["create", "-q", "-f", "qcow2", "two", "7M"]);
    fs::write(disk.path("text"), "no image").unwrap();
    let before = disk.state().await;
    let former = fs::read(disk.path("two")).unwrap();
    let failing: [Make; 6] = [
        |_| Box::new(Abort),
        |disk| disk.overlay("none", true),
        |disk| disk.overlay("text", true),
        |disk| disk.overlay("base", false),
        |disk| disk.overlay("one", false),
        |disk| disk.internal(Operation::Delete(named("none"))),
    ];
    for last in failing {
        let actions = vec![
            disk.overlay("one", false),
            disk.overlay("two", false),
            last(&disk),
        ];
        run(&disk.cx, actions).await.unwrap_err();
        assert_eq!(disk.state().await, before);
        assert_eq!(fs::read(disk.path("two")).unwrap(), former);
    }
    disk.write(2).await;
    assert_eq!(disk.first().await, 2);
}

#[tokio::test]
async fn what_guests_write_to_an_overlay_of_a_transaction_that_fails_is_written_to_what_is_below() {
    let (disk, log) = (Disk::new().await, Log::default());
    disk.write(1).await;
    let edge = disk.edge().await;
    let zero = WriteFlags::default();
    edge.write(2 * 4096, Data::from(vec![1; 4096]), zero)
        .await
        .unwrap();
    let before = disk.state().await;
    let running = fails_late(&disk, &log, disk.overlay("one", false)).await;
    // Guests go on, but nothing of it is durable: it is not decided that there is an overlay.
    disk.write(2).await;
    let flags = block::driver::ZeroFlags::default();
    edge.write_zeroes(2 * 4096, 4096, flags).await.unwrap();
    let mut flush = edge.flush();
    assert!((&mut flush).now_or_never().is_none());
    let mut fua = edge.write(MIB - 4096, Data::from(vec![3; 4096]), WriteFlags::fua(true));
    assert!((&mut fua).now_or_never().is_none());
    log.note(GO_ON.to_owned());
    let error = running.await.unwrap().unwrap_err();
    assert!(error.desc.ends_with("commit: no"), "{}", error.desc);
    flush.await.unwrap();
    fua.await.unwrap();
    let mut after = disk.state().await;
    after.2 -= 1;
    assert_eq!(after, before);
    let read = edge.read(0, MIB).await.unwrap().to_bytes();
    assert_eq!((read[0], read[4095], read[2 * 4096]), (2, 2, 0));
    assert_eq!(read[MIB as usize - 1], 3);
    edge.flush().await.unwrap();
    disk.qemu_img(&["check", "-q", "-U", "base"]);
}

#[tokio::test]
async fn an_overlay_stays_where_what_guests_have_written_has_no_other_place() {
    let (disk, log) = (Disk::new().await, Log::default());
    fake::disk(&disk.cx, "full", &[Fault::Write], &log).await;
    disk.with(|control| {
        let root = control.graph.node("full").unwrap().clone();
        let drive = control.graph.drive("d").unwrap().root.clone().unwrap();
        let held = drive.node().quiesce().now_or_never().unwrap();
        control.graph.replace(&drive.node(), &root, &held).unwrap();
    })
    .await;
    let running = fails_late(&disk, &log, disk.overlay("one", false)).await;
    let edge = disk.edge().await;
    let data = Data::from(vec![2; 512]);
    edge.write(0, data, WriteFlags::default()).await.unwrap();
    log.note(GO_ON.to_owned());
    let error = running.await.unwrap().unwrap_err().desc;
    assert!(
        error.ends_with("and what was done to 'd' could not be taken back, see the daemon's log"),
        "{error}"
    );
    assert_eq!(edge.node().name(), "one");
    assert!(fs::exists(disk.path("one")).unwrap());
    assert_eq!(disk.first().await, 2);
    edge.flush().await.unwrap();
}

#[tokio::test]
async fn guests_wait_for_an_overlay_that_was_there_before() {
    let (disk, log) = (Disk::new().await, Log::default());
    disk.qemu_img(&["create", "-q", "-f", "qcow2", "one", "1M"]);
    disk.write(1).await;
    let before = disk.state().await;
    fake::disk(&disk.cx, "other", &[Fault::CommitWaits], &log).await;
    let create = Operation::Create {
        name: "s".to_owned(),
    };
    let snapshot: Box<dyn Action> = Box::new(SnapshotAction::new("other".to_owned(), create));
    let actions = vec![disk.overlay("one", true), snapshot];
    let cx = disk.cx.clone();
    let running = tokio::spawn(async move { run(&cx, actions).await.map(drop) });
    while !log.has("prepare other") {
        testing::a_moment().await;
    }
    let edge = disk.edge().await;
    let data = Data::from(vec![2; 4096]);
    let mut write = edge.write(0, data, WriteFlags::default());
    assert!((&mut write).now_or_never().is_none());
    log.note(GO_ON.to_owned());
    running.await.unwrap().unwrap_err();
    write.await.unwrap();
    let mut after = disk.state().await;
    after.2 -= 1;
    assert_eq!(after, before);
    assert_eq!(disk.first().await, 2);
}

#[tokio::test]
async fn an_overlay_has_the_size_that_a_revert_before_it_leaves() {
    let disk = Disk::new().await;
    let create = Operation::Create {
        name: "s".to_owned(),
    };
    disk.write(1).await;
    run(&disk.cx, vec![disk.internal(create)]).await.unwrap();
    disk.write(2).await;
    let edge = disk.edge().await;
    edge.resize(3 * MIB, Preallocation::Off).await.unwrap();
    let actions = vec![
        disk.internal(Operation::Revert(named("s"))),
        disk.overlay("one", false),
    ];
    run(&disk.cx, actions).await.unwrap();
    assert_eq!(edge.node().name(), "one");
    assert_eq!(edge.size(), MIB);
    assert_eq!(disk.first().await, 1);
    // Internal snapshots go on, in the overlay.
    let create = Operation::Create {
        name: "s".to_owned(),
    };
    let actions = vec![disk.internal(create), disk.overlay("two", false)];
    run(&disk.cx, actions).await.unwrap();
    let list = disk.qemu_img(&["snapshot", "-U", "-l", "one"]);
    assert!(list.contains(" s "), "{list}");
}

#[tokio::test]
async fn a_chain_ends_where_it_could_not_be_opened_again() {
    let disk = Disk::new().await;
    let most = block::limits::MAX_CHAIN_DEPTH;
    let mut made = 1;
    while made < most {
        // Many at once are no way past it.
        let more =
            (made..most.min(made + 50)).map(|number| disk.overlay(&format!("o{number}"), false));
        let more: Vec<_> = more.collect();
        let count = more.len();
        run(&disk.cx, more).await.unwrap();
        made += count;
    }
    let (chain, ..) = disk.state().await;
    assert_eq!(chain.len(), most);
    let before = disk.state().await;
    let error = run(&disk.cx, vec![disk.overlay("more", false)]).await;
    let error = error.unwrap_err();
    assert!(error.desc.contains("can have no more"), "{}", error.desc);
    assert_eq!(disk.state().await, before);
    disk.write(3).await;
    assert_eq!(disk.first().await, 3);
    // What only the base has passes all layers.
    let read = disk.edge().await.read(MIB - 1, 1).await.unwrap();
    assert_eq!(read.to_bytes()[0], 0);
}
