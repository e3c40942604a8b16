//! Programs that users have: what they send and start, on the live daemon, and on qemu-storage-daemon where that can
//! answer it. `sessions/csi-qsd.qmp` is one more.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use super::harness::{self, Daemon, Loop, Program, Qmp, run_to_end, tool};
use super::nbd::client::{self as nbd, Client};
use super::session;

/// The longest line that a Go client's scanner takes.
const GO_LINE_BYTES: usize = 64 << 10;

/// Two drives, exported, as the README starts them.
fn two_drives() -> Option<Daemon> {
    harness::need(&["qemu-img", "qemu-io"])?;
    let mut daemon = Daemon::start(
        Program::Qblockd,
        &[
            "--drive",
            "id=ide-hd0,file=disk0.qcow2,size=16M",
            "--drive",
            "id=ide-hd1,file=disk1.qcow2,size=16M",
            "--nbd-server",
            "unix:nbd.sock",
        ],
    );
    daemon.qmp();
    Some(daemon)
}

const PYTHON: &str = "
import asyncio, sys
from qemu.qmp import QMPClient, ExecuteError

def snapshots(drive):
    return [each['name'] for each in drive['inserted']['image'].get('snapshots', [])]

def action(device, name):
    return {'type': 'blockdev-snapshot-internal-sync', 'data': {'device': device, 'name': name}}

async def main():
    client = QMPClient('live')
    await client.connect(sys.argv[1])
    execute = client.execute
    await execute('blockdev-snapshot-internal-sync', {'device': 'ide-hd0', 'name': 'one'})
    await execute('transaction', {'actions': [action('ide-hd0', 'two'), action('ide-hd1', 'two')]})
    drives = {each['device']: each for each in await execute('query-block')}
    assert snapshots(drives['ide-hd0']) == ['one', 'two'], drives
    assert snapshots(drives['ide-hd1']) == ['two'], drives
    # The second action fails, so the first one is undone.
    try:
        await execute('transaction', {'actions': [action('ide-hd1', 'three'), action('ide-hd0', 'one')]})
        raise AssertionError('accepted')
    except ExecuteError as error:
        assert 'already exists' in str(error), error
    try:
        await execute('blockdev-snapshot-internal-sync', {'device': 'nope', 'name': 'x'})
        raise AssertionError('accepted')
    except ExecuteError as error:
        assert error.error_class == 'DeviceNotFound', error
    gone = await execute('blockdev-snapshot-delete-internal-sync', {'device': 'ide-hd0', 'name': 'one'})
    assert (gone['id'], gone['name']) == ('1', 'one'), gone
    drives = {each['device']: each for each in await execute('query-block')}
    assert snapshots(drives['ide-hd0']) == ['two'], drives
    assert snapshots(drives['ide-hd1']) == ['two'], drives
    with client.listener('BLOCK_EXPORT_DELETED') as deleted:
        await execute('block-export-del', {'id': 'ide-hd1'})
        event = await asyncio.wait_for(deleted.get(), 10)
        assert event['data'] == {'id': 'ide-hd1'}, event
    with client.listener('SHUTDOWN') as shutdown:
        await execute('quit')
        event = await asyncio.wait_for(shutdown.get(), 10)
        assert event['data'] == {'guest': False, 'reason': 'host-qmp-quit'}, event
    try:
        await client.disconnect()
    except EOFError:
        pass

asyncio.run(main())
";

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn pythons_qmp_client_takes_and_deletes_snapshots_and_sees_events() {
    let Some(python) = harness::python() else {
        return;
    };
    let Some(mut daemon) = two_drives() else {
        return;
    };
    let mut command = Command::new(python);
    command.args(["-c", PYTHON]).arg(daemon.path("qmp.sock"));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(daemon.exited().success());
    daemon.tool("qemu-img check -q disk0.qcow2 && qemu-img check -q disk1.qcow2");
}

const SHELL: &str = "\
query-status
blockdev-snapshot-internal-sync device=ide-hd0 name=one
transaction(
blockdev-snapshot-internal-sync device=ide-hd0 name=two
blockdev-snapshot-internal-sync device=ide-hd1 name=two
)
blockdev-snapshot-delete-internal-sync device=ide-hd0 name=one
blockdev-snapshot-internal-sync device=nope name=x
query-block
";

#[test]
fn qmp_shell_runs_a_script() {
    let Some(python) = harness::python() else {
        return;
    };
    let Some(mut daemon) = two_drives() else {
        return;
    };
    let mut shell = Command::new(python)
        .args(["-m", "qemu.qmp.qmp_shell"])
        .arg(daemon.path("qmp.sock"))
        .env("HOME", daemon.path(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    shell
        .stdin
        .take()
        .unwrap()
        .write_all(SHELL.as_bytes())
        .unwrap();
    let output = shell.wait_with_output().unwrap();
    let said = text(&output.stdout);
    assert!(output.status.success(), "{said}{}", text(&output.stderr));
    for expected in [
        "DeviceNotFound",
        "Cannot find device='nope' nor node-name='nope'",
        "\"name\": \"two\"",
    ] {
        assert!(said.contains(expected), "{expected} in {said}");
    }
    let drives = daemon.qmp().ok("query-block", json!({}));
    assert_eq!(snapshot_names(&drives[0]), ["two"]);
    assert_eq!(snapshot_names(&drives[1]), ["two"]);
}

fn snapshot_names(drive: &Value) -> Vec<&str> {
    let list = drive["inserted"]["image"]["snapshots"].as_array();
    let names = list.into_iter().flatten().map(|each| each["name"].as_str());
    names.map(Option::unwrap).collect()
}

/// What a program answers to bytes that come in these pieces, as many replies as are expected, normalised.
fn answers(program: Program, pieces: &[&str], replies: usize) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    tool(folder.path(), "qemu-img create -q -f qcow2 a.qcow2 16M");
    let node = "driver=qcow2,node-name=a,file.driver=file,file.node-name=fa,file.filename=a.qcow2";
    let mut daemon = Daemon::start_in(program, folder.path(), &["--blockdev", node]);
    let mut qmp = daemon.raw_qmp();
    for piece in pieces {
        qmp.send(piece);
    }
    let received: Vec<Value> = (0..replies).map(|_| qmp.reply()).collect();
    session::normalised(received)
}

/// go-qemu ends no line, gives no id, and may send a message before the reply to the one before has come.
#[test]
fn a_go_client_gets_the_same_replies_from_both() {
    let Some(()) = harness::need(&["qemu-storage-daemon", "qemu-img"]) else {
        return;
    };
    let snapshot =
        r#"{"execute":"blockdev-snapshot-internal-sync","arguments":{"device":"a","name":"s"}}"#;
    let pieces = [
        r#"{"execute":"qmp_capabilities"}"#,
        r#"{"execute":"query-block"}{"execute":"query-named-block-nodes","arguments":{"flat":true}}"#,
        snapshot,
        snapshot,
        r#"{"execute":"query-named-block-nodes","arguments":{"flat":true}}{"execute":"nonsense"}"#,
        r#"{"execute":"query-blo"#,
        r#"ck"}"#,
    ];
    let ours = answers(Program::Qblockd, &pieces, 8);
    let theirs = answers(Program::QemuStorageDaemon, &pieces, 8);
    assert_eq!(ours, theirs);
}

#[test]
fn every_reply_fits_into_a_go_clients_line() {
    let Some(mut daemon) = two_drives() else {
        return;
    };
    let mut qmp = daemon.qmp();
    for number in 0..20 {
        let name = format!("a-name-as-long-as-schedulers-make-them-{number}");
        let arguments = json!({"device": "ide-hd0", "name": name});
        qmp.ok("blockdev-snapshot-internal-sync", arguments);
    }
    for command in [
        "query-qmp-schema",
        "query-commands",
        "query-block",
        "query-named-block-nodes",
        "query-block-exports",
    ] {
        let reply = qmp.execute(command, json!({})).to_string();
        assert!(reply.len() < GO_LINE_BYTES, "{command}: {}", reply.len());
    }
}

/// corvus finds a drive by the path of its image, takes snapshots of several drives in one transaction and deletes them.
#[test]
fn corvus_finds_drives_by_their_files() {
    let Some(()) = harness::need(&["qemu-img"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let files: Vec<PathBuf> = ["root", "data", "log"]
        .map(|name| folder.path().join(format!("{name}.qcow2")))
        .to_vec();
    let mut arguments = Vec::new();
    for (number, file) in files.iter().enumerate() {
        let file = file.display();
        tool(
            folder.path(),
            &format!("qemu-img create -q -f qcow2 {file} 16M"),
        );
        arguments.extend([
            "--drive".to_owned(),
            format!("file={file},if=virtio,id=vd{number},index={number}"),
        ]);
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &arguments);
    let mut qmp = daemon.qmp();
    let drives = qmp.ok("query-block", json!({}));
    let device_of = |file: &PathBuf| {
        let is_it = |drive: &&Value| {
            let inserted = &drive["inserted"];
            inserted["file"] == json!(file) && inserted["image"]["filename"] == json!(file)
        };
        let drive = drives.as_array().unwrap().iter().find(is_it);
        drive.unwrap_or_else(|| panic!("{file:?} in {drives}"))["device"].clone()
    };
    let devices: Vec<Value> = files.iter().map(device_of).collect();
    let actions: Vec<Value> = devices
        .iter()
        .map(|device| {
            let data = json!({"device": device, "name": "nightly"});
            json!({"type": "blockdev-snapshot-internal-sync", "data": data})
        })
        .collect();
    qmp.ok("transaction", json!({"actions": actions}));
    for device in &devices {
        let which = json!({"device": device, "name": "nightly"});
        let deleted = qmp.ok("blockdev-snapshot-delete-internal-sync", which);
        assert_eq!(deleted["name"], "nightly");
    }
    for drive in qmp.ok("query-block", json!({})).as_array().unwrap() {
        assert_eq!(snapshot_names(drive), [""; 0]);
    }
}

/// A daemon that left its starter, known by its pid file.
struct Detached {
    folder: tempfile::TempDir,
}

impl Detached {
    fn start(program: Program, folder: tempfile::TempDir, arguments: &[String]) -> Detached {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let Output { status, stderr, .. } = run_to_end(program, folder.path(), &arguments);
        assert!(status.success(), "{program:?}: {}", text(&stderr));
        Detached { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn pid(&self) -> Option<u32> {
        let text = fs::read_to_string(self.path("pid")).ok()?;
        text.trim().parse().ok()
    }

    /// Waits until it has ended and left nothing but these files.
    fn ended(&self, pid: u32, left: &[&str]) {
        let process = PathBuf::from(format!("/proc/{pid}"));
        harness::until(|| !process.exists(), "the end of the daemon");
        let mut names: Vec<String> = fs::read_dir(self.folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, left);
    }
}

impl Drop for Detached {
    fn drop(&mut self) {
        // Only of a test that failed is there something to end.
        if let Some(pid) = self.pid() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    }
}

/// The command line of Proxmox for the state of a TPM, and what it sends then. Answers the replies.
fn proxmox(program: Program) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    tool(folder.path(), "qemu-img create -q -f qcow2 tpm.qcow2 4M");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let arguments = [
        "--daemonize".to_owned(),
        "--chardev".to_owned(),
        format!("socket,id=qmp,path={},server=on,wait=off", path("qsd.qmp")),
        "--monitor".to_owned(),
        "chardev=qmp,mode=control".to_owned(),
        "--pidfile".to_owned(),
        path("pid"),
    ];
    let image = path("tpm.qcow2");
    let daemon = Detached::start(program, folder, &arguments);
    let pid = daemon.pid().unwrap();
    let mut qmp = harness::connect(&daemon.path("qsd.qmp"));
    let cache = json!({"direct": true, "no-flush": false});
    let node = json!({
        "driver": "qcow2", "node-name": "drive-tpmstate0", "read-only": false, "discard": "unmap",
        "detect-zeroes": "unmap", "cache": cache,
        "file": {
            "driver": "file", "node-name": "e0", "filename": image, "aio": "io_uring", "read-only": false,
            "discard": "unmap", "detect-zeroes": "unmap", "cache": cache,
        },
    });
    let snapshot = json!({"device": "drive-tpmstate0", "name": "before-update"});
    let mut replies = vec![
        qmp.execute("qmp_capabilities", json!({})),
        qmp.execute("blockdev-add", node),
        qmp.execute("blockdev-snapshot-internal-sync", snapshot.clone()),
        qmp.execute("blockdev-snapshot-internal-sync", snapshot.clone()),
        qmp.execute("blockdev-snapshot-delete-internal-sync", snapshot.clone()),
        qmp.execute("blockdev-snapshot-delete-internal-sync", snapshot),
        qmp.execute("blockdev-del", json!({"node-name": "drive-tpmstate0"})),
        qmp.execute("blockdev-del", json!({"node-name": "drive-tpmstate0"})),
        qmp.execute("block-export-del", json!({"id": "tpmstate0"})),
        qmp.execute("quit", json!({})),
    ];
    qmp.rest();
    daemon.ended(pid, &["tpm.qcow2"]);
    for reply in &mut replies {
        let shown = reply.to_string().replace(&image, "tpm.qcow2");
        *reply = serde_json::from_str(&shown).unwrap();
    }
    session::normalised(replies)
}

#[test]
fn proxmox_keeps_a_tpms_state() {
    let Some(()) = harness::need(&["qemu-storage-daemon", "qemu-img"]) else {
        return;
    };
    assert_eq!(
        proxmox(Program::Qblockd),
        proxmox(Program::QemuStorageDaemon)
    );
}

/// What Proxmox needs beyond this is refused with the errors that tell a client that something is absent.
#[test]
fn what_is_absent_is_refused_as_unknown() {
    let mut daemon = Daemon::start(Program::Qblockd, &["--blockdev", "null-co,node-name=n"]);
    let mut qmp = daemon.qmp();
    let group = json!({"qom-type": "throttle-group", "id": "t"});
    let throttle =
        json!({"driver": "throttle", "node-name": "x", "throttle-group": "t", "file": "n"});
    let fuse = json!({"type": "fuse", "id": "e", "node-name": "n", "mountpoint": "/m"});
    for (command, arguments, class, sentence) in [
        (
            "object-add",
            group,
            "CommandNotFound",
            "The command object-add has not been found",
        ),
        (
            "blockdev-add",
            throttle,
            "GenericError",
            "Parameter 'driver' does not accept value 'throttle'",
        ),
        (
            "block-export-add",
            fuse,
            "GenericError",
            "Parameter 'type' does not accept value 'fuse'",
        ),
    ] {
        let expected = (class.to_owned(), sentence.to_owned());
        assert_eq!(qmp.error(command, arguments), expected);
    }
    let schema = qmp.ok("query-qmp-schema", json!({})).to_string();
    for word in ["throttle", "fuse", "object-add"] {
        assert!(!schema.contains(word), "{word} is promised");
    }
}

/// The command line of subprovisioner, a client of the kernel's kind (it knows NBD_OPT_EXPORT_NAME only), and SIGTERM.
/// Answers what the client saw: the negotiation's bytes and the data.
fn subprovisioner(program: Program) -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    tool(
        folder.path(),
        "qemu-img create -q -f qcow2 volume.qcow2 16M",
    );
    let path = |name: &str| folder.path().join(name).display().to_string();
    let arguments = [
        "--blockdev".to_owned(),
        format!(
            "driver=file,node-name=file,filename={},cache.direct=on",
            path("volume.qcow2")
        ),
        "--blockdev".to_owned(),
        "driver=qcow2,node-name=qcow2,file=file,cache.direct=on".to_owned(),
        "--nbd-server".to_owned(),
        format!("addr.type=unix,addr.path={}", path("nbd.sock")),
        "--export".to_owned(),
        "type=nbd,id=export,node-name=qcow2,name=default,writable=on".to_owned(),
        "--daemonize".to_owned(),
        "--pidfile".to_owned(),
        path("pid"),
    ];
    let daemon = Detached::start(program, folder, &arguments);
    let pid = daemon.pid().unwrap();
    let mut seen = Vec::new();
    // With the padding of old clients, and without it.
    for (flags, padding) in [(1, 124), (3, 0)] {
        let mut client = Client::connect(&daemon.path("nbd.sock"));
        client.handshake(flags);
        client.send(&nbd::option(nbd::EXPORT_NAME, b"default"));
        seen.push(client.take(8 + 2 + padding));
        client.write(1 << 20, &[flags as u8; 4096]);
        assert_eq!(client.simple(&nbd::request(0, nbd::FLUSH, 2, 0, 0)), 0);
        seen.push(client.read((1 << 20) - 512, 1024));
        client.send(&nbd::request(0, nbd::DISC, 3, 0, 0));
        assert!(client.is_closed());
    }
    let terminated = Command::new("kill").arg(pid.to_string()).status();
    assert!(terminated.unwrap().success());
    match program {
        Program::Qblockd => daemon.ended(pid, &["volume.qcow2"]),
        Program::QemuStorageDaemon | Program::Qemu => {
            daemon.ended(pid, &["nbd.sock", "volume.qcow2"])
        }
    }
    tool(daemon.folder.path(), "qemu-img check -q volume.qcow2");
    tool(
        daemon.folder.path(),
        "qemu-io -f qcow2 -c 'read -P 3 1M 4k' volume.qcow2",
    );
    seen
}

#[test]
fn subprovisioner_serves_a_volume_to_the_kernels_client() {
    let Some(()) = harness::need(&["qemu-storage-daemon", "qemu-img", "qemu-io"]) else {
        return;
    };
    let ours = subprovisioner(Program::Qblockd);
    let theirs = subprovisioner(Program::QemuStorageDaemon);
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(&ours[..8], &theirs[..8], "size or data");
        assert_eq!(ours.len(), theirs.len());
    }
    // The data behind the negotiations.
    assert_eq!((&ours[1], &ours[3]), (&theirs[1], &theirs[3]));
    // What the export is offered with: all that the other one offers.
    let flags = |seen: &[u8]| u16::from_be_bytes([seen[8], seen[9]]);
    assert_eq!(flags(&ours[0]) & flags(&theirs[0]), flags(&theirs[0]));
}

/// The bytes of the host that a file takes.
fn space(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_deleted_snapshot_gives_its_space_back_unless_that_is_off() {
    let Some(()) = harness::need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    for program in [Program::Qblockd, Program::QemuStorageDaemon] {
        if program == Program::QemuStorageDaemon
            && harness::need(&["qemu-storage-daemon"]).is_none()
        {
            continue;
        }
        let kept = [true, false].map(|pass| space_after_deletion(program, pass));
        assert!(
            kept[0] < 6 << 20 && kept[1] > 7 << 20,
            "{program:?}: {kept:?}"
        );
    }
}

/// 4 MiB in a snapshot, 4 MiB over them, and the snapshot deleted.
fn space_after_deletion(program: Program, pass_discard_snapshot: bool) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    tool(folder.path(), "qemu-img create -q -f qcow2 a.qcow2 16M");
    tool(
        folder.path(),
        "qemu-io -f qcow2 -c 'write -P 1 0 4M' a.qcow2",
    );
    let mut daemon = Daemon::start_in(program, folder.path(), &[]);
    let mut qmp = daemon.qmp();
    let node = json!({
        "driver": "qcow2", "node-name": "a", "pass-discard-snapshot": pass_discard_snapshot,
        "file": {"driver": "file", "filename": "a.qcow2"},
    });
    qmp.ok("blockdev-add", node);
    let snapshot = json!({"device": "a", "name": "s"});
    qmp.ok("blockdev-snapshot-internal-sync", snapshot.clone());
    write_through(&mut qmp, &daemon);
    qmp.ok("blockdev-snapshot-delete-internal-sync", snapshot);
    qmp.ok("quit", json!({}));
    assert!(daemon.exited().success());
    tool(folder.path(), "qemu-img check -q a.qcow2");
    space(&folder.path().join("a.qcow2"))
}

fn write_through(qmp: &mut Qmp, daemon: &Daemon) {
    let address = json!({"type": "unix", "data": {"path": "nbd.sock"}});
    qmp.ok("nbd-server-start", json!({"addr": address}));
    qmp.ok("nbd-server-add", json!({"device": "a", "writable": true}));
    daemon.tool("qemu-io -f raw -c 'write -P 2 0 4M' 'nbd+unix:///a?socket=nbd.sock'");
    qmp.ok("nbd-server-stop", json!({}));
}

/// Volumes of a volume manager are opened as `host_device`, with an image or raw bytes in them.
#[test]
fn devices_are_opened_by_their_own_driver() {
    let Some(()) = harness::need(&["qemu-img", "losetup"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    tool(folder.path(), "truncate -s 32M volume");
    let Some(device) = Loop::attach(&folder.path().join("volume")) else {
        return;
    };
    tool(
        folder.path(),
        &format!("qemu-img create -q -f qcow2 {} 16M", device.0),
    );
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &[]);
    let mut qmp = daemon.qmp();
    let file = json!({"driver": "host_device", "node-name": "f", "filename": device.0, "aio": "native",
                      "cache": {"direct": true}});
    qmp.ok(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "a", "file": file}),
    );
    qmp.ok(
        "blockdev-snapshot-internal-sync",
        json!({"device": "a", "name": "s"}),
    );
    let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
    let drivers: Vec<&Value> = nodes
        .as_array()
        .unwrap()
        .iter()
        .map(|node| &node["drv"])
        .collect();
    assert_eq!(drivers, ["qcow2", "host_device"]);
    qmp.ok("quit", json!({}));
    assert!(daemon.exited().success());
    tool(
        folder.path(),
        &format!("qemu-img check -q -f qcow2 {}", device.0),
    );
}
