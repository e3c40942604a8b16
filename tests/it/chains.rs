//! Long chains, and nodes that change below a guest that works.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde_json::{Value, json};

use super::guest::{Guest, Request};
use super::harness::{self, Daemon, Program, Qmp};

/// As many images as a chain may have.
const LAYERS: usize = 200;
const CLUSTER: usize = 64 << 10;

fn file(name: &str) -> Value {
    json!({"driver": "file", "filename": name})
}

/// `0.q` with 64 KiB of sevens at its start, and on it `1.q` and so on.
fn make_chain(daemon: &Daemon, layers: usize) {
    daemon.tool("qemu-img create -q -f qcow2 0.q 16M");
    daemon.tool("qemu-io -f qcow2 0.q -c 'write -q -P 7 0 64k'");
    for layer in 1..layers {
        let below = layer - 1;
        daemon.tool(&format!(
            "qemu-img create -q -f qcow2 -u -b {below}.q -F qcow2 {layer}.q 16M"
        ));
    }
}

fn serve(qmp: &mut Qmp, node: &str) {
    let address = json!({"type": "unix", "data": {"path": "nbd.sock"}});
    qmp.ok("nbd-server-start", json!({"addr": address}));
    let export = json!({"type": "nbd", "id": "e", "node-name": node, "writable": true});
    qmp.ok("block-export-add", export);
}

fn write(guest: &mut Guest, offset: u64, data: Vec<u8>) {
    assert_eq!(guest.run(&Request::Write { offset, data }).unwrap(), 0);
}

#[test]
fn a_chain_of_two_hundred_images_is_served_and_shown() {
    let Some(()) = harness::need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let mut daemon = Daemon::start(Program::Qblockd, &[]);
    make_chain(&daemon, LAYERS);
    let mut qmp = daemon.qmp();
    let top = format!("{}.q", LAYERS - 1);
    let by_headers = json!({"driver": "qcow2", "node-name": "top", "file": file(&top)});
    qmp.ok("blockdev-add", by_headers);
    let flat = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    assert_eq!(flat.as_array().unwrap().len(), 2 * LAYERS);
    let graph = qmp.ok("x-debug-query-block-graph", json!({}));
    assert_eq!(graph["edges"].as_array().unwrap().len(), 2 * LAYERS - 1);
    serve(&mut qmp, "top");
    let mut guest = Guest::connect(&daemon.path("nbd.sock"), "top").unwrap();
    // From the bottom, from nowhere, and from the top.
    assert_eq!(guest.read(0, CLUSTER as u32).unwrap(), vec![7; CLUSTER]);
    assert_eq!(guest.read(8 << 20, 4 << 20).unwrap(), vec![0; 4 << 20]);
    write(&mut guest, 512, vec![9; 512]);
    let read = guest.read(0, 2048).unwrap();
    assert_eq!((read[511], read[512], read[1024]), (7, 9, 7));
    drop(guest);
    qmp.ok("block-export-del", json!({"id": "e", "mode": "hard"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    qmp.ok("blockdev-del", json!({"node-name": "top"}));
    // One image more is one too many, and a chain does not end in itself.
    daemon.tool(&format!(
        "qemu-img create -q -f qcow2 -u -b {top} -F qcow2 more.q 16M"
    ));
    daemon.tool("qemu-img create -q -f qcow2 -u -b loop1.q -F qcow2 loop0.q 16M");
    daemon.tool("qemu-img create -q -f qcow2 -u -b loop0.q -F qcow2 loop1.q 16M");
    for (image, reason) in [
        ("more.q", "More than 200 layers"),
        ("loop0.q", "is its own backing file"),
    ] {
        let options = json!({"driver": "qcow2", "node-name": "no", "file": file(image)});
        let (_, message) = qmp.error("blockdev-add", options);
        assert!(message.contains(reason), "{message}");
    }
    let mut by_options = json!({"driver": "qcow2", "file": file("0.q"), "backing": null});
    for layer in 1..LAYERS / 2 {
        by_options = json!({"driver": "qcow2", "file": file(&format!("{layer}.q")),
                            "backing": by_options});
    }
    by_options["node-name"] = "half".into();
    qmp.ok("blockdev-add", by_options);
    let flat = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    assert_eq!(flat.as_array().unwrap().len(), LAYERS);
    qmp.ok("blockdev-del", json!({"node-name": "half"}));
}

/// A guest writes and reads while its image gets other options, another file and another backing.
#[test]
fn a_guest_works_on_while_its_node_is_reopened() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    const ROUNDS: usize = 30;
    let mut daemon = Daemon::start(Program::Qblockd, &[]);
    daemon.tool("qemu-img create -q -f qcow2 one.q 16M");
    daemon.tool("qemu-img create -q -f qcow2 two.q 16M");
    daemon.tool("qemu-img create -q -f qcow2 disk.q 16M");
    let mut qmp = daemon.qmp();
    for (name, image) in [("one", "one.q"), ("two", "two.q")] {
        let options = json!({"driver": "qcow2", "node-name": name, "file": file(image),
                             "read-only": true});
        qmp.ok("blockdev-add", options);
    }
    let file = json!({"driver": "file", "node-name": "file", "filename": "disk.q"});
    qmp.ok("blockdev-add", file);
    let disk = json!({"driver": "qcow2", "node-name": "disk", "file": "file", "backing": "one"});
    qmp.ok("blockdev-add", disk);
    serve(&mut qmp, "disk");
    let ended = AtomicBool::new(false);
    let socket = daemon.path("nbd.sock");
    let rounds = thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut guest = Guest::connect(&socket, "disk").unwrap();
            let mut rounds = 0_u64;
            while !ended.load(Ordering::Relaxed) {
                let at = rounds % 200 * CLUSTER as u64;
                let byte = rounds as u8 | 1;
                write(&mut guest, at, vec![byte; 4096]);
                assert_eq!(guest.read(at, 4096).unwrap(), vec![byte; 4096]);
                rounds += 1;
            }
            rounds
        });
        for round in 0..ROUNDS {
            let (backing, zeroes) = [("one", "off"), ("two", "on")][round % 2];
            let mut options = json!({"driver": "qcow2", "node-name": "disk", "file": "file",
                                     "backing": backing, "detect-zeroes": zeroes,
                                     "l2-cache-size": 65536 << (round % 5)});
            if round % 3 == 0 {
                options["backing"] = Value::Null;
            }
            qmp.ok("blockdev-reopen", json!({"options": [options]}));
        }
        ended.store(true, Ordering::Relaxed);
        guest.join().unwrap()
    });
    assert!(rounds > 0);
    // Another file would be written with what is in memory of the present one.
    let other = json!({"driver": "file", "node-name": "other-file", "filename": "disk2.q"});
    daemon.tool("qemu-img create -q -f qcow2 disk2.q 16M");
    qmp.ok("blockdev-add", other);
    let options = json!({"driver": "qcow2", "node-name": "disk", "file": "other-file",
                         "backing": null});
    let (_, message) = qmp.error("blockdev-reopen", json!({"options": [options]}));
    assert_eq!(
        message,
        "qcow2: the new 'file' does not show the image that is open"
    );
    qmp.ok("block-export-del", json!({"id": "e", "mode": "hard"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    let options = json!({"driver": "qcow2", "node-name": "disk", "file": "file",
                         "backing": null, "read-only": true});
    qmp.ok("blockdev-reopen", json!({"options": [options]}));
    // Read-only, it can be read by others.
    daemon.tool("qemu-img check -q disk.q");
}

#[test]
fn no_image_is_made_its_own_backing_file() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let make = "qemu-img create -q -f qcow2 base 1M && qemu-img create -q -f qcow2 -b base -F qcow2 mid && \
                qemu-img create -q -f qcow2 -b mid -F qcow2 top && ln top hard && ln -s top symbolic && ln base again";
    harness::tool(folder.path(), make);
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &[]);
    let mut qmp = daemon.qmp();
    let node = |name: &str| json!({"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": name}});
    qmp.ok("blockdev-add", node("base"));
    for (name, backing) in [("mid", "base"), ("top", "mid")] {
        let mut overlay = node(name);
        overlay["backing"] = json!(backing);
        qmp.ok("blockdev-add", overlay);
    }
    for image in ["mid", "top"] {
        for file in ["top", "./top", "hard", "symbolic", "file:top"] {
            let change = json!({"device": "top", "image-node-name": image, "backing-file": file});
            let (_, error) = qmp.error("change-backing-file", change);
            let expected = format!(
                "Could not change backing file to '{file}': node 'top' would be its own backing file"
            );
            assert_eq!(error, expected, "{image}");
        }
    }
    // Another name of the same backing, and one that nothing has yet, are the user's business.
    for file in ["again", "later", "base"] {
        let change = json!({"device": "top", "image-node-name": "mid", "backing-file": file});
        qmp.ok("change-backing-file", change);
    }
    assert!(daemon.terminate().success());
    harness::tool(folder.path(), "qemu-img info --backing-chain top");
}
