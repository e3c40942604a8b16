//! Who may use a node beside whom: every pair of users, here and with qemu-storage-daemon.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::harness::{Daemon, Program, Qmp, need, tool};

const USES: [&str; 7] = [
    "reading export",
    "writing export",
    "source of a backup",
    "target of a backup",
    "backing",
    "file of a reading image",
    "file of an image",
];
/// What comes and goes at once.
const ACTS: [&str; 2] = ["resize", "deletion"];

/// Where the two differ, and why.
const DIFFERENCES: [((&str, &str), &str); 7] = [
    // Exports go on with the new size; with the reference nobody who might resize comes to what is exported.
    (("reading export", "resize"), "is allowed"),
    (("writing export", "resize"), "is allowed"),
    (("reading export", "file of an image"), "is allowed"),
    (("file of an image", "reading export"), "is allowed"),
    // What a guest writes to the target of a backup is no part of it.
    (("writing export", "target of a backup"), "is refused"),
    (("target of a backup", "writing export"), "is refused"),
    // A guest of the source may come at any time, and the image would see its file change.
    (
        ("source of a backup", "file of a reading image"),
        "is refused",
    ),
];

const SIZE: u64 = 256 << 10;

/// Uses a node in a way. `number` makes names.
fn use_node(qmp: &mut Qmp, folder: &Path, node: &str, (what, number): (&str, usize)) -> Value {
    let name = format!("{node}-{number}");
    let mut backup = |source: &str, target: &str| {
        let other =
            json!({"driver": "null-co", "node-name": name, "size": SIZE, "read-zeroes": true});
        qmp.ok("blockdev-add", other);
        let backup = json!({"device": source, "target": target, "sync": "none", "job-id": format!("{name}-job")});
        qmp.execute("blockdev-backup", backup)
    };
    match what {
        "reading export" | "writing export" => {
            let writable = what == "writing export";
            let export = json!({"type": "nbd", "id": name, "node-name": node, "name": name, "writable": writable});
            qmp.execute("block-export-add", export)
        }
        "source of a backup" => backup(node, &name),
        "target of a backup" => backup(&name, node),
        "backing" => {
            fs::copy(folder.join("overlay"), folder.join(&name)).unwrap();
            let file = json!({"driver": "file", "filename": name});
            let overlay =
                json!({"driver": "qcow2", "node-name": name, "file": file, "backing": node});
            qmp.execute("blockdev-add", overlay)
        }
        "file of a reading image" | "file of an image" => {
            let read_only = what == "file of a reading image";
            let image =
                json!({"driver": "qcow2", "node-name": name, "file": node, "read-only": read_only});
            qmp.execute("blockdev-add", image)
        }
        "resize" => qmp.execute("block_resize", json!({"node-name": node, "size": 2 * SIZE})),
        _ => qmp.execute("blockdev-del", json!({"node-name": node})),
    }
}

/// The pairs of which the second is refused, with what is said.
fn refused(program: Program) -> BTreeMap<(&'static str, &'static str), String> {
    let folder = tempfile::tempdir().unwrap();
    let make = "qemu-img create -q -f qcow2 image 1M && truncate -s 256k image && qemu-img create -q -f qcow2 overlay 256k";
    tool(folder.path(), make);
    let mut daemon = Daemon::start_in(
        program,
        folder.path(),
        &["--nbd-server", "addr.type=unix,addr.path=nbd.sock"],
    );
    let mut qmp = daemon.qmp();
    let mut refused = BTreeMap::new();
    for first in USES {
        for second in USES.into_iter().chain(ACTS) {
            // A file for each makes the name new.
            let node = format!("n{}", fs::read_dir(folder.path()).unwrap().count());
            fs::copy(folder.path().join("image"), folder.path().join(&node)).unwrap();
            let file = json!({"driver": "file", "node-name": node, "filename": node});
            qmp.ok("blockdev-add", file);
            let reply = use_node(&mut qmp, folder.path(), &node, (first, 1));
            assert_eq!(reply["return"], json!({}), "{first}: {reply}");
            let reply = use_node(&mut qmp, folder.path(), &node, (second, 2));
            if let Some(error) = reply["error"]["desc"].as_str() {
                refused.insert((first, second), error.to_owned());
            }
        }
    }
    daemon.kill();
    refused
}

#[test]
fn who_may_use_a_node_beside_whom_is_as_the_reference_has_it() {
    let Some(()) = need(&["qemu-storage-daemon", "qemu-img"]) else {
        return;
    };
    let ours = refused(Program::Qblockd);
    let theirs = refused(Program::QemuStorageDaemon);
    let mut differences = Vec::new();
    for first in USES {
        for second in USES.into_iter().chain(ACTS) {
            let pair = (first, second);
            match (ours.contains_key(&pair), theirs.contains_key(&pair)) {
                (true, false) => differences.push((pair, "is refused")),
                (false, true) => differences.push((pair, "is allowed")),
                (_, _) => {}
            }
        }
    }
    let mut expected = DIFFERENCES.to_vec();
    expected.sort_unstable();
    differences.sort_unstable();
    assert_eq!(differences, expected, "{ours:#?}");
    for (pair, text) in &ours {
        let says_who =
            text.contains("is excluded by") || text.contains(" in use") || text.contains("is busy");
        assert!(says_who, "{pair:?}: {text}");
    }
}
