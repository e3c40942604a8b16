//! The moment that backups show: that of internal snapshots which the same transaction takes, whatever guests write meanwhile.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;

use super::until;
use crate::guest::{Guest, Request};
use crate::harness::{Daemon, Program, need, tool};

const SIZE: u64 = 16 << 20;
const CYCLES: usize = 8;
const DISKS: [&str; 2] = ["d0", "d1"];

/// Writes all over a disk until it is told to stop.
fn write(folder: &Path, disk: &str, stop: &AtomicBool) {
    let mut guest = Guest::connect(&folder.join("nbd.sock"), disk).unwrap();
    let mut number = 0_u8;
    while !stop.load(Ordering::Relaxed) {
        number = number.wrapping_add(1);
        let len = fastrand::choice([512, 4096, 65536]).unwrap();
        let offset = fastrand::u64(..SIZE / 65536) * 65536;
        let data = vec![number; len];
        assert_eq!(guest.run(&Request::Write { offset, data }).unwrap(), 0);
    }
}

#[test]
fn backups_show_the_moment_of_their_transaction() {
    let Some(()) = need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let make = "for i in 0 1; do qemu-img create -q -f qcow2 d$i.qcow2 16M; \
                qemu-io -f qcow2 -c 'write -q -P 1 0 12M' d$i.qcow2; done";
    tool(folder.path(), make);
    let arguments = [
        "--drive",
        "id=d0,file=d0.qcow2",
        "--drive",
        "id=d1,file=d1.qcow2",
        "--nbd-server",
        "unix:nbd.sock",
    ];
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &arguments);
    let mut qmp = daemon.qmp();
    let stop = Arc::new(AtomicBool::new(false));
    let guests = DISKS.map(|disk| {
        let (folder, stop) = (folder.path().to_owned(), stop.clone());
        std::thread::spawn(move || write(&folder, disk, &stop))
    });
    for cycle in 0..CYCLES {
        let kept = ["auto", "copy-before-write", "internal-snapshot"][cycle % 3];
        let actions = DISKS.map(|disk| {
            let snapshot = json!({"device": disk, "name": format!("s{cycle}")});
            let target = format!("{disk}-{cycle}.qcow2");
            let backup = json!({"device": disk, "sync": "full", "target": target,
                                "x-perf": {"x-point-in-time": kept}});
            [
                json!({"type": "blockdev-snapshot-internal-sync", "data": snapshot}),
                json!({"type": "drive-backup", "data": backup}),
            ]
        });
        qmp.ok("transaction", json!({"actions": actions.concat()}));
        for disk in DISKS {
            until(&mut qmp, disk, None);
        }
    }
    stop.store(true, Ordering::Relaxed);
    for guest in guests {
        guest.join().unwrap();
    }
    assert!(daemon.terminate().success());
    for disk in DISKS {
        for cycle in 0..CYCLES {
            let line = format!(
                "qemu-img convert -l snapshot.name=s{cycle} -O raw {disk}.qcow2 was.raw && \
                 qemu-img compare -q -f raw was.raw {disk}-{cycle}.qcow2"
            );
            tool(folder.path(), &line);
        }
    }
}
