//! The daemon as a process: its start, its signals, its files.

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};

use serde_json::json;

use super::harness::{self, Daemon, Program, run_to_end};

#[test]
fn quit_removes_sockets_and_pid_file_and_succeeds() {
    let folder = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start_in(
        Program::Qblockd,
        folder.path(),
        &["--nbd-server", "unix:nbd.sock", "--pidfile", "pid"],
    );
    let mut qmp = daemon.qmp();
    let pid = fs::read_to_string(daemon.path("pid")).unwrap();
    assert_eq!(pid, format!("{}\n", daemon.id()));
    qmp.ok("quit", json!({}));
    let shutdown = qmp.event("SHUTDOWN");
    assert_eq!(
        shutdown["data"],
        json!({"guest": false, "reason": "host-qmp-quit"})
    );
    assert!(daemon.wait().success());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_signal_ends_it_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &[]);
    let mut qmp = daemon.qmp();
    assert!(daemon.terminate().success());
    assert_eq!(qmp.event("SHUTDOWN")["data"]["reason"], "host-signal");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_held_pid_file_is_refused_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = Daemon::start_in(Program::Qblockd, folder.path(), &["--pidfile", "pid"]);
    first.qmp();
    let second = run_to_end(Program::Qblockd, folder.path(), &["--pidfile", "pid"]);
    assert_eq!(second.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&second.stderr),
        "qblockd: cannot create PID file: Cannot lock pid file: Resource temporarily unavailable\n"
    );
    assert_eq!(
        fs::read_to_string(first.path("pid")).unwrap(),
        format!("{}\n", first.id())
    );
}

#[test]
fn daemonize_returns_when_the_daemon_answers() {
    let folder = tempfile::tempdir().unwrap();
    let output = run_to_end(
        Program::Qblockd,
        folder.path(),
        &["--daemonize", "--pidfile", "pid", "--qmp", "unix:qmp.sock"],
    );
    assert!(output.status.success(), "{output:?}");
    let pid = fs::read_to_string(folder.path().join("pid")).unwrap();
    let mut qmp = harness::connect(&folder.path().join("qmp.sock"));
    qmp.ok("qmp_capabilities", json!({}));
    qmp.ok("quit", json!({}));
    qmp.event("SHUTDOWN");
    harness::until(
        || !folder.path().join("pid").exists(),
        &format!("process {pid} to end"),
    );
    assert!(!folder.path().join("qmp.sock").exists());
}

#[test]
fn a_drive_alone_gets_an_image_sockets_and_a_next_step() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tempfile::tempdir().unwrap();
    let mut child = Program::Qblockd
        .command()
        .args(["--drive", "id=disk,file=disk.raw,format=raw,size=1M"])
        .current_dir(folder.path())
        .env("XDG_RUNTIME_DIR", runtime.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let sockets = runtime.path().join(format!("qblockd-{}", child.id()));
    harness::until(|| sockets.join("nbd.sock").exists(), "the sockets");
    assert_eq!(
        fs::metadata(folder.path().join("disk.raw")).unwrap().len(),
        1 << 20
    );
    let mut qmp = harness::connect(&sockets.join("qmp.sock"));
    qmp.ok("qmp_capabilities", json!({}));
    let exports = qmp.ok("query-block-exports", json!({}));
    assert_eq!(exports[0]["id"], "disk");
    let status = Command::new("kill").arg(child.id().to_string()).status();
    assert!(status.unwrap().success());
    assert!(child.wait().unwrap().success());
    let mut said = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    let url = format!("nbd+unix:///disk?socket={}/nbd.sock", sockets.display());
    assert!(said.contains(&url), "{said}");
    assert_eq!(fs::read_dir(runtime.path()).unwrap().count(), 0);
}

#[test]
fn a_start_that_fails_late_leaves_no_sockets() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tempfile::tempdir().unwrap();
    let output = Program::Qblockd
        .command()
        .args(["--drive", "id=disk,file=disk.raw,format=raw,size=1M"])
        .args(["--pidfile", "missing/pid"])
        .current_dir(folder.path())
        .env("XDG_RUNTIME_DIR", runtime.path())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.starts_with("qblockd: cannot create PID file: "),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(fs::read_dir(runtime.path()).unwrap().count(), 0);
}

#[test]
fn a_state_directory_that_is_none_is_named_as_such() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "").unwrap();
    let output = harness::run_to_end(Program::Qblockd, folder.path(), &["--state-dir", "file"]);
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "qblockd: --state-dir file: Not a directory\n"
    );
}

#[test]
fn nobody_at_the_other_end_of_standard_output_is_no_panic() {
    let folder = tempfile::tempdir().unwrap();
    for argument in ["--help", "--version"] {
        let mut child = Program::Qblockd
            .command()
            .arg(argument)
            .current_dir(folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.stderr.is_empty(), "{output:?}");
    }
}

/// A drive on an image that qemu-img made, exported as `disk` on nbd.sock.
fn drive() -> Option<Daemon> {
    harness::need(&["qemu-img", "qemu-io"])?;
    let daemon = Daemon::start(
        Program::Qblockd,
        &[
            "--drive",
            "id=disk,file=disk.qcow2,size=64M",
            "--nbd-server",
            "unix:nbd.sock",
        ],
    );
    harness::until(|| daemon.path("qmp.sock").exists(), "the daemon");
    Some(daemon)
}

fn io(daemon: &Daemon, command: &str) {
    harness::until(|| daemon.path("nbd.sock").exists(), "the export");
    daemon.tool(&format!(
        "qemu-io -f raw -c '{command}' 'nbd+unix:///disk?socket=nbd.sock'"
    ));
}

#[test]
fn a_snapshot_has_what_was_written_before_it_and_the_image_is_sound() {
    let Some(mut daemon) = drive() else { return };
    let mut qmp = daemon.qmp();
    io(&daemon, "write -P 1 0 4M");
    qmp.ok(
        "blockdev-snapshot-internal-sync",
        json!({"device": "disk", "name": "one"}),
    );
    io(&daemon, "write -P 2 1M 4M");
    let actions = ["two", "three"].map(|name| {
        json!({"type": "blockdev-snapshot-internal-sync", "data": {"device": "disk", "name": name}})
    });
    qmp.ok("transaction", json!({"actions": actions}));
    io(&daemon, "write -P 3 0 64M");
    let deleted = qmp.ok(
        "blockdev-snapshot-delete-internal-sync",
        json!({"device": "disk", "name": "two"}),
    );
    assert_eq!(
        (&deleted["id"], &deleted["name"]),
        (&json!("2"), &json!("two"))
    );
    qmp.ok("quit", json!({}));
    assert_eq!(qmp.event("SHUTDOWN")["data"]["reason"], "host-qmp-quit");
    harness::until(|| !daemon.path("nbd.sock").exists(), "the end");
    assert!(daemon.exited().success());
    daemon.tool("qemu-img check disk.qcow2");
    daemon.tool("qemu-img convert -l snapshot.name=one -O raw disk.qcow2 one.raw");
    daemon.tool("qemu-img convert -l snapshot.name=three -O raw disk.qcow2 three.raw");
    daemon.tool("qemu-io -f raw -c 'read -P 1 0 4M' -c 'read -P 0 4M 60M' one.raw");
    daemon.tool(
        "qemu-io -f raw -c 'read -P 1 0 1M' -c 'read -P 2 1M 4M' -c 'read -P 0 5M 59M' three.raw",
    );
    daemon.tool("qemu-io -f qcow2 -c 'read -P 3 0 64M' disk.qcow2");
}

#[test]
fn a_transaction_that_fails_leaves_no_snapshot() {
    let Some(mut daemon) = drive() else { return };
    let mut qmp = daemon.qmp();
    let snapshot =
        json!({"type": "blockdev-snapshot-internal-sync", "data": {"device": "disk", "name": "s"}});
    let actions = json!({"actions": [snapshot, {"type": "abort", "data": {}}]});
    let (class, _) = qmp.error("transaction", actions);
    assert_eq!(class, "GenericError");
    let drives = qmp.ok("query-block", json!({}));
    assert_eq!(drives[0]["inserted"]["image"].get("snapshots"), None);
    // The guest goes on.
    io(&daemon, "write 0 1M");
}

#[test]
fn a_killed_daemon_leaves_its_flushed_writes_and_snapshots() {
    let Some(mut daemon) = drive() else { return };
    let mut qmp = daemon.qmp();
    io(&daemon, "write -P 7 0 1M");
    qmp.ok(
        "blockdev-snapshot-internal-sync",
        json!({"device": "disk", "name": "one"}),
    );
    io(&daemon, "write -P 8 0 1M");
    daemon.kill();
    // At most leaks, which are repaired; nothing that is wrong.
    daemon.tool("qemu-img check -r leaks disk.qcow2");
    daemon.tool("qemu-img convert -l snapshot.name=one -O raw disk.qcow2 one.raw");
    daemon.tool("qemu-io -f raw -c 'read -P 7 0 1M' one.raw");
    daemon.tool("qemu-io -f qcow2 -c 'read -P 8 0 1M' disk.qcow2");
}

/// A disk that was always raw, into which its guest wrote the header of an image with a backing file of its choice.
#[test]
fn a_raw_disk_with_the_header_of_an_image_stays_raw() {
    let Some(()) = harness::need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("secret"), vec![7; 1 << 20]).unwrap();
    let make = "qemu-img create -q -f qcow2 -b secret -F raw evil 1M && truncate -s 1M evil && cp evil disk";
    harness::tool(folder.path(), make);
    let driver = |format: &str| {
        let drive = format!("id=d,file=disk,{format}readonly=on");
        let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &["--drive", &drive]);
        let mut qmp = daemon.qmp();
        let drives = qmp.ok("query-block", json!({}));
        drives[0]["inserted"]["drv"].as_str().unwrap().to_owned()
    };
    assert_eq!(driver("format=raw,"), "raw");
    assert_eq!(
        driver("format=auto,"),
        "qcow2",
        "because the user asks for it"
    );
    // Written by the guest, the header is the disk's content and nothing else.
    fs::write(folder.path().join("disk"), vec![0; 1 << 20]).unwrap();
    let start = |format: &str| {
        let drive = format!("id=d,file=disk,{format}");
        Daemon::start_in(
            Program::Qblockd,
            folder.path(),
            &["--drive", &drive, "--nbd-server", "unix:nbd.sock"],
        )
    };
    let disk = "nbd+unix:///d?socket=nbd.sock";
    for _ in 0..2 {
        let mut daemon = start("format=raw");
        exported(&mut daemon);
        daemon.tool(&format!("qemu-img convert -n -f raw -O raw evil '{disk}'"));
        daemon.tool(&format!("qemu-img compare -f raw -F raw evil '{disk}'"));
        assert!(daemon.terminate().success());
    }
    // Probed as raw, it is kept from becoming an image.
    fs::write(folder.path().join("disk"), vec![0; 1 << 20]).unwrap();
    for _ in 0..2 {
        let mut daemon = start("format=auto");
        exported(&mut daemon);
        daemon.tool(&format!(
            "! qemu-img convert -q -n -f raw -O raw evil '{disk}' 2>/dev/null"
        ));
        assert!(daemon.terminate().success());
    }
}

/// Waits for the end of the start, and with it for the export of a drive: commands wait for that too.
fn exported(daemon: &mut Daemon) {
    let exports = daemon.qmp().ok("query-block-exports", json!({}));
    assert_eq!(exports.as_array().map(Vec::len), Some(1));
}

#[test]
fn a_drive_without_a_format_is_told_what_to_type() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("disk"), vec![0; 1 << 20]).unwrap();
    let output = run_to_end(Program::Qblockd, folder.path(), &["--drive", "file=disk"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "qblockd: --drive file=disk: Image is not in qcow2 format; type format=raw if it is a raw disk, or format=auto \
         to find out\n"
    );
}
