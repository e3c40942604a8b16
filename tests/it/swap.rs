//! The file below an image that guests use is changed for another by blockdev-reopen, again and again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde_json::{Value, json};

use super::guest::{Guest, Request};
use super::harness::{Daemon, Program, Qmp, need, tool};

const MIB: u64 = 1 << 20;
const SWAPS: usize = 30;

/// An image in `a`, of which `b` and `c` are copies, exported as `e`; it has all its clusters, so that copies stay sound whichever of them
/// is written. `short` is cut off, and `other` is another image.
fn start() -> (tempfile::TempDir, Daemon, Qmp) {
    let folder = tempfile::tempdir().unwrap();
    let make = "qemu-img create -q -f qcow2 a 16M && qemu-io -f qcow2 -c 'write -q -P 1 0 16M' a && cp a b && cp a c && \
                head -c 1000 a > short && qemu-img create -q -f qcow2 other 8M";
    tool(folder.path(), make);
    let server = ["--nbd-server", "unix:nbd.sock"];
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &server);
    let mut qmp = daemon.qmp();
    for name in ["a", "b", "c", "short", "other"] {
        let file = json!({"driver": "file", "node-name": format!("{name}-file"), "filename": name, "auto-read-only": true});
        qmp.ok("blockdev-add", file);
    }
    let raw = json!({"driver": "raw", "node-name": "b-raw", "file": "b-file"});
    qmp.ok("blockdev-add", raw);
    let image = json!({"driver": "qcow2", "node-name": "image", "file": "a-file"});
    qmp.ok("blockdev-add", image);
    let export =
        json!({"type": "nbd", "id": "e", "node-name": "image", "name": "e", "writable": true});
    qmp.ok("block-export-add", export);
    (folder, daemon, qmp)
}

fn on(file: &str) -> Value {
    json!({"options": [{"driver": "qcow2", "node-name": "image", "file": file}]})
}

#[test]
fn an_image_goes_on_in_a_copy_of_its_file_while_guests_use_it() {
    let Some(()) = need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let (folder, daemon, mut qmp) = start();
    let socket = folder.path().join("nbd.sock");
    let stop = AtomicBool::new(false);
    let served = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut guest = Guest::connect(&socket, "e").unwrap();
            let mut count = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let offset = count * 12_288 % (7 * MIB);
                assert_eq!(guest.read(offset, 8192).unwrap(), [1; 8192]);
                count += 1;
            }
            count
        });
        let writer = scope.spawn(|| {
            let mut guest = Guest::connect(&socket, "e").unwrap();
            let mut count = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let offset = 8 * MIB + count * 12_288 % (7 * MIB);
                let data = vec![count as u8; 8192];
                assert_eq!(guest.run(&Request::Write { offset, data }).unwrap(), 0);
                if count.is_multiple_of(16) {
                    assert_eq!(guest.run(&Request::Flush).unwrap(), 0);
                }
                count += 1;
            }
            count
        });
        for swap in 0..SWAPS {
            // By way of a window too.
            qmp.ok(
                "blockdev-reopen",
                on(["b-raw", "c-file", "a-file"][swap % 3]),
            );
        }
        stop.store(true, Ordering::Relaxed);
        [reader.join().unwrap(), writer.join().unwrap()]
    });
    assert!(served.iter().all(|count| *count > 10), "{served:?}");
    // What is written goes to the file that the image is in, and to no other.
    let mut guest = Guest::connect(&socket, "e").unwrap();
    for (pattern, file) in [(101, "a"), (102, "b"), (103, "c")] {
        let node = if file == "b" {
            "b-raw".to_owned()
        } else {
            format!("{file}-file")
        };
        qmp.ok("blockdev-reopen", on(&node));
        let data = vec![pattern; 65536];
        assert_eq!(
            guest
                .run(&Request::Write {
                    offset: 15 * MIB,
                    data
                })
                .unwrap(),
            0
        );
    }
    drop(guest);
    assert!(daemon.terminate().success());
    for (pattern, file) in [(101, "a"), (102, "b"), (103, "c")] {
        let look = format!(
            "qemu-img check -q {file} && qemu-io -f qcow2 -c 'read -q -P {pattern} 15M 64k' -c 'read -q -P 1 0 7M' {file}"
        );
        assert_eq!(tool(folder.path(), &look), "");
    }
}

#[test]
fn a_file_that_cannot_take_the_place_is_refused_and_guests_notice_nothing() {
    let Some(()) = need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let (folder, daemon, mut qmp) = start();
    let mut guest = Guest::connect(&folder.path().join("nbd.sock"), "e").unwrap();
    let data = vec![7; 512];
    assert_eq!(guest.run(&Request::Write { offset: 0, data }).unwrap(), 0);
    let another = "qcow2: the new 'file' does not show the image that is open";
    for (file, expected) in [
        ("short-file", another),
        ("other-file", another),
        (
            "image",
            "Making 'image' a file child of 'image' would create a cycle",
        ),
        ("nope", "Cannot find device='' nor node-name='nope'"),
    ] {
        let (_, error) = qmp.error("blockdev-reopen", on(file));
        assert_eq!(error, expected, "{file}");
        assert_eq!(guest.read(0, 512).unwrap(), [7; 512]);
    }
    drop(guest);
    assert!(daemon.terminate().success());
    tool(
        folder.path(),
        "qemu-img check -q a && qemu-img check -q other",
    );
}
