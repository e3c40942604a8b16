//! Sources whose file somebody else cuts off while they are copied: an error of the source, and no zeroes in place of what was there.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use serde_json::json;

use super::super::guest::Guest;
use super::super::harness::{Daemon, Program, need, tool};
use super::until;

const MIB: u64 = 1 << 20;
const EIO: i32 = 5;

/// Where the file is cut off: the copy has not come as far by then.
const LEFT: u64 = 24 * MIB;

#[test]
fn a_source_that_is_cut_off_is_an_error_and_can_be_put_right() {
    let Some(()) = need(&["qemu-img"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    tool(folder.path(), "head -c 32M /dev/urandom > before.raw");
    for (format, to, policy) in [
        ("raw", "qcow2", "report"),
        ("raw", "raw", "stop"),
        ("qcow2", "raw", "report"),
        ("qcow2", "qcow2", "stop"),
    ] {
        tool(
            folder.path(),
            &format!("rm -f t.img; qemu-img convert -f raw -O {format} before.raw d.img"),
        );
        let drive = [
            "--drive",
            &format!("id=d,file=d.img,format={format}"),
            "--nbd-server",
            "unix:nbd.sock",
        ];
        let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &drive);
        let mut qmp = daemon.qmp();
        let backup = json!({"device": "d", "target": "t.img", "format": to, "sync": "full", "speed": 2 * MIB,
            "auto-dismiss": false, "on-source-error": policy});
        qmp.ok("drive-backup", backup);
        let path = folder.path().join("d.img");
        let whole = fs::read(&path).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(LEFT).unwrap();
        qmp.ok("block-job-set-speed", json!({"device": "d", "speed": 0}));
        let error = qmp.event("BLOCK_JOB_ERROR")["data"].clone();
        assert_eq!(
            error,
            json!({"device": "d", "operation": "read", "action": policy})
        );
        let mut guest = Guest::connect(&folder.path().join("nbd.sock"), "d").unwrap();
        let read = guest.read(31 * MIB, 4096);
        assert_eq!(read.unwrap_err().raw_os_error(), Some(EIO));
        if policy == "stop" {
            until(&mut qmp, "d", Some("paused"));
            file.write_all_at(&whole[LEFT as usize..], LEFT).unwrap();
            qmp.ok("block-job-resume", json!({"device": "d"}));
        }
        let job = until(&mut qmp, "d", Some("concluded"));
        let cut_off = job["error"]
            .as_str()
            .map(|text| text.contains("somebody has cut it off"));
        assert_eq!(cut_off, (policy == "report").then_some(true), "{job}");
        drop(guest);
        drop(qmp);
        assert!(daemon.terminate().success());
        if policy == "stop" {
            let compare = format!("qemu-img compare -q -f raw -F {to} before.raw t.img");
            tool(folder.path(), &compare);
        }
    }
}
