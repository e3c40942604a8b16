//! Backups within a file system whose files can share blocks: they take no space, and are whole.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::harness::{Daemon, Program, need, tool};

/// Bytes of a disk.
const SIZE: u64 = 16 << 20;

/// An XFS of its own, unmounted in the end.
struct Xfs(tempfile::TempDir);

impl Xfs {
    /// Mounts one, or says that it may not.
    fn mount() -> Option<Xfs> {
        let folder = tempfile::tempdir().unwrap();
        // The smallest that mkfs.xfs makes is 300 MiB.
        let make = "truncate -s 320M xfs.img && mkfs.xfs -q -m reflink=1 xfs.img && mkdir mounted";
        tool(folder.path(), make);
        let mounted = Command::new("mount")
            .args(["-o", "loop", "xfs.img", "mounted"])
            .current_dir(folder.path())
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(Xfs(folder)),
            refused => {
                eprintln!("cannot mount an XFS: nothing is tested ({refused:?})");
                None
            }
        }
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("mounted")
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        // Busy if a test failed and its daemon still ends; lazily then.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

/// Bytes in use, with all that was written.
fn used(folder: &Path) -> u64 {
    let used = tool(folder, "sync -f . && df -B1 --output=used . | tail -1");
    used.trim().parse().unwrap()
}

#[test]
fn a_backup_shares_blocks_where_files_can() {
    let tools = ["qemu-img", "mkfs.xfs", "mount", "df", "sync"];
    let Some(()) = need(&tools) else { return };
    let Some(xfs) = Xfs::mount() else { return };
    let folder = &xfs.path();
    tool(
        folder,
        "head -c 16M /dev/urandom > raw.img && qemu-img convert -O qcow2 raw.img qcow2.img",
    );
    let drives: &[&str] = &[
        "--drive",
        "id=raw,file=raw.img,format=raw",
        "--drive",
        "id=qcow2,file=qcow2.img,format=qcow2",
    ];
    let mut daemon = Daemon::start_in(Program::Qblockd, folder, drives);
    let mut qmp = daemon.qmp();
    for (device, format, shares) in [
        ("raw", "raw", true),
        ("raw", "qcow2", true),
        ("qcow2", "raw", true),
        ("qcow2", "qcow2", true),
        ("raw", "raw", false),
        ("qcow2", "qcow2", false),
    ] {
        let target = format!("{device}-{format}-{shares}.img");
        let before = used(folder);
        let arguments = json!({"device": device, "sync": "full", "target": target, "format": format,
                               "x-perf": {"use-copy-range": shares}});
        qmp.ok("drive-backup", arguments);
        let event = qmp.event("BLOCK_JOB_COMPLETED");
        assert_eq!(event["data"].get("error"), None, "{event}");
        let taken = used(folder) - before;
        match shares {
            true => assert!(taken < SIZE / 8, "{target} takes {taken} bytes"),
            false => assert!(taken >= SIZE, "{target} takes only {taken} bytes"),
        }
        tool(
            folder,
            &format!("qemu-img compare -q -U -f raw -F {format} raw.img {target}"),
        );
        if format == "qcow2" {
            tool(folder, &format!("qemu-img check -q -f qcow2 {target}"));
        }
    }
    qmp.ok("quit", json!({}));
    assert!(daemon.exited().success());
}
