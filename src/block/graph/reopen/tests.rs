//! Nodes on real files that become read-only and writable, beside other programs and under readers.

use std::process::Command;

use super::*;
use crate::driver::{Requests, WriteFlags};
use crate::formats::qcow2::create::{CreateOptions, create};
use crate::graph::User;
use crate::io::{Data, IoContext};
use crate::open::{
    Aio, DriverOptions, FileOptions, Locking, NodeOptions, NodeRef, Opener, Qcow2Options, open,
};
use crate::protocols::file::{File, FileAccess};

const MIB: u64 = 1 << 20;

struct Disk {
    graph: Graph,
    folder: tempfile::TempDir,
    io: IoContext,
}

impl Disk {
    fn new() -> Self {
        Disk {
            graph: Graph::new(),
            folder: tempfile::tempdir().unwrap(),
            io: IoContext::new(),
        }
    }

    fn path(&self, name: &str) -> String {
        let path = self.folder.path().join(name);
        path.to_str().unwrap().to_owned()
    }

    fn file(&self, name: &str) -> FileOptions {
        FileOptions {
            filename: self.path(name),
            aio: Aio::Threads,
            locking: Locking::On,
        }
    }

    async fn image(&self, name: &str) {
        std::fs::File::create(self.path(name)).unwrap();
        let options = self.file(name);
        let file = File::open(&self.io, &options, FileAccess::default());
        let file = Arc::new(file.await.unwrap());
        let child = crate::driver::Child::new(file.clone());
        create(&child, &CreateOptions::new(MIB)).await.unwrap();
        crate::driver::Driver::close(&*file).await.unwrap();
    }

    async fn open(&mut self, name: &str, read_only: bool) -> Result<Arc<Node>> {
        let file = NodeOptions::new(DriverOptions::File(self.file(name)));
        let qcow2 = Qcow2Options::new(NodeRef::Inline(Arc::new(file)));
        let options = NodeOptions {
            node_name: Some(name.to_owned()),
            read_only,
            ..NodeOptions::new(DriverOptions::Qcow2(qcow2))
        };
        let opened = open(&Opener::new(&self.io, &self.graph), &options).await?;
        self.graph.insert(opened)
    }

    async fn reopen(&mut self, node: &Arc<Node>, read_only: bool) -> Result<()> {
        let change = NodeChange::read_only(node, read_only);
        let ready = self.graph.reopen(vec![change])?.prepare().await?;
        self.graph
            .reopened(ready)
            .map(|removed| assert!(removed.is_empty()))
    }

    /// What another program makes of the image.
    fn qemu_img(&self, arguments: &[&str], name: &str) -> bool {
        let run = Command::new("qemu-img")
            .args(arguments)
            .arg(self.path(name))
            .output();
        run.unwrap().status.success()
    }
}

async fn write(node: &Arc<Node>, byte: u8) -> Result<()> {
    let data = Data::from(vec![byte; 4096]);
    node.write(8192, data, WriteFlags::default()).await
}

async fn first(node: &Arc<Node>) -> u8 {
    node.read(8192, 1).await.unwrap().to_bytes()[0]
}

#[tokio::test]
async fn an_image_that_becomes_read_only_is_clean_and_can_be_read_by_others() {
    let mut disk = Disk::new();
    disk.image("a").await;
    let node = disk.open("a", false).await.unwrap();
    let file = node.link("file").unwrap();
    let snapshots = node.driver();
    for round in 1..4u8 {
        write(&node, round).await.unwrap();
        let name = format!("s{round}");
        let new = crate::driver::NewSnapshot::named(name);
        snapshots.snapshots().unwrap().create(new).await.unwrap();
        write(&node, round + 100).await.unwrap();
        assert!(!disk.qemu_img(&["check"], "a"), "it is locked");
        disk.reopen(&node, true).await.unwrap();
        assert!(file.behaviour().read_only);
        assert!(!node.driver().info().dirty);
        assert!(disk.qemu_img(&["check"], "a"));
        assert_eq!(
            write(&node, 9).await.unwrap_err().kind(),
            ErrorKind::ReadOnly
        );
        assert_eq!(first(&node).await, round + 100);
        // Nobody else may write as long as it is open.
        assert!(!disk.qemu_img(&["snapshot", "-c", "x"], "a"));
        disk.reopen(&node, false).await.unwrap();
        assert!(!file.behaviour().read_only);
    }
    write(&node, 200).await.unwrap();
    disk.graph.remove("a").unwrap().close().await.unwrap();
    assert!(disk.qemu_img(&["check"], "a"));
}

#[tokio::test]
async fn an_image_that_was_opened_read_only_can_be_written_to() {
    let mut disk = Disk::new();
    disk.image("a").await;
    let node = disk.open("a", true).await.unwrap();
    disk.reopen(&node, false).await.unwrap();
    for byte in [7, 8] {
        write(&node, byte).await.unwrap();
        assert_eq!(first(&node).await, byte);
    }
    disk.reopen(&node, true).await.unwrap();
    disk.graph.remove("a").unwrap().close().await.unwrap();
    assert!(disk.qemu_img(&["check"], "a"));
}

#[tokio::test]
async fn a_reader_elsewhere_keeps_an_image_from_becoming_writable() {
    let mut disk = Disk::new();
    disk.image("a").await;
    let node = disk.open("a", true).await.unwrap();
    let mut other = Disk::new();
    std::mem::swap(&mut other.folder, &mut disk.folder);
    let reader = other.open("a", true).await.unwrap();
    std::mem::swap(&mut other.folder, &mut disk.folder);
    let error = disk.reopen(&node, false).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(error.message().contains("\"write\" lock"), "{error}");
    assert!(node.behaviour().read_only);
    other.graph.remove("a").unwrap().close().await.unwrap();
    drop(reader);
    disk.reopen(&node, false).await.unwrap();
    write(&node, 1).await.unwrap();
}

#[tokio::test]
async fn a_node_below_writers_stays_writable() {
    let mut disk = Disk::new();
    disk.image("a").await;
    let node = disk.open("a", false).await.unwrap();
    let access = Access {
        writes: true,
        shares_writes: true,
    };
    let user = User::Export("e".to_owned());
    let edge = disk.graph.add_user(&node, user, access).unwrap();
    let error = disk.reopen(&node, true).await.unwrap_err();
    assert_eq!(
        error.message(),
        "Read-only block node 'a' cannot support read-write users"
    );
    write(&node, 1).await.unwrap();
    disk.graph.remove_user(&edge);
    disk.reopen(&node, true).await.unwrap();
    let user = User::Export("e".to_owned());
    let error = disk.graph.add_user(&node, user, access).unwrap_err();
    assert_eq!(error.message(), "Block node is read-only");
}

#[tokio::test]
async fn a_change_that_is_given_up_changes_nothing() {
    let mut disk = Disk::new();
    disk.image("a").await;
    let node = disk.open("a", false).await.unwrap();
    for _ in 0..3 {
        let change = NodeChange::read_only(&node, true);
        let ready = disk.graph.reopen(vec![change]).unwrap().prepare().await;
        drop(ready.unwrap());
        write(&node, 1).await.unwrap();
        assert!(!disk.qemu_img(&["check"], "a"));
    }
    // Somebody begins to write between the check and the change.
    let change = NodeChange::read_only(&node, true);
    let ready = disk
        .graph
        .reopen(vec![change])
        .unwrap()
        .prepare()
        .await
        .unwrap();
    let access = Access {
        writes: true,
        shares_writes: true,
    };
    let user = User::Export("e".to_owned());
    disk.graph.add_user(&node, user, access).unwrap();
    assert_eq!(
        disk.graph.reopened(ready).unwrap_err().kind(),
        ErrorKind::InUse
    );
    write(&node, 2).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_go_on_while_backings_and_modes_change() {
    let mut disk = Disk::new();
    for name in ["top", "one", "two"] {
        disk.image(name).await;
    }
    let one = disk.open("one", false).await.unwrap();
    let two = disk.open("two", false).await.unwrap();
    let top = disk.open("top", false).await.unwrap();
    write(&one, 1).await.unwrap();
    write(&two, 2).await.unwrap();
    for node in [&one, &two] {
        disk.reopen(node, true).await.unwrap();
    }
    let user = User::Export("e".to_owned());
    let reader = Access {
        writes: false,
        shares_writes: true,
    };
    let edge = disk.graph.add_user(&top, user, reader).unwrap();
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let edge = edge.clone();
            tokio::spawn(async move {
                for _ in 0..2000 {
                    let read = edge.read(8192, 4096).await.unwrap().to_bytes();
                    assert!(read[0] <= 2 && read.iter().all(|byte| *byte == read[0]));
                }
            })
        })
        .collect();
    for round in 0..60 {
        let backing = [Some(one.clone()), Some(two.clone()), None][round % 3].clone();
        let mut change = NodeChange::read_only(&top, round % 2 == 0);
        change.layers = vec![("backing", backing)];
        let ready = disk.graph.reopen(vec![change]).unwrap().prepare().await;
        drop(disk.graph.reopened(ready.unwrap()).unwrap());
        assert_eq!(first(&top).await as usize, (round + 1) % 3);
    }
    for reader in readers {
        reader.await.unwrap();
    }
    let mut change = NodeChange::read_only(&one, true);
    change.layers = vec![("backing", Some(top.clone()))];
    let mut back = NodeChange::read_only(&top, true);
    back.layers = vec![("backing", Some(one.clone()))];
    let error = disk.graph.reopen(vec![change, back]).unwrap_err();
    assert_eq!(
        error.message(),
        "Making 'top' a backing child of 'one' would create a cycle"
    );
}
