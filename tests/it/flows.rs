//! Backups and external snapshots as users' programs drive them: Python's `qemu.qmp`, the fleecing of backup tools, and the polling
//! of those that listen to no events.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::{Value, json};

use super::guest::{Guest, Request};
use super::harness::{self, Daemon, Program, Qmp, tool};

/// Two disks with something on them, as drives that are exported.
fn two_disks(folder: &Path) -> Option<Daemon> {
    harness::need(&["qemu-img", "qemu-io"])?;
    for (disk, byte) in [("disk0", 1), ("disk1", 2)] {
        let make = format!(
            "qemu-img create -q -f qcow2 {disk}.qcow2 16M && qemu-io -f qcow2 -c 'write -q -P {byte} 0 5M' {disk}.qcow2 && \
             cp {disk}.qcow2 {disk}-before.qcow2"
        );
        tool(folder, &make);
    }
    let arguments = [
        "--drive",
        "id=disk0,file=disk0.qcow2,format=qcow2",
        "--drive",
        "id=disk1,file=disk1.qcow2,format=qcow2",
        "--nbd-server",
        "unix:nbd.sock",
        "--state-dir",
        "state",
    ];
    let mut daemon = Daemon::start_in(Program::Qblockd, folder, &arguments);
    daemon.qmp();
    Some(daemon)
}

fn write(daemon: &Daemon, disk: &str, byte: u8) {
    let mut guest = Guest::connect(&daemon.path("nbd.sock"), disk).unwrap();
    for offset in [0, 1 << 20, 12 << 20] {
        let data = vec![byte; 128 << 10];
        assert_eq!(guest.run(&Request::Write { offset, data }).unwrap(), 0);
    }
    assert_eq!(guest.run(&Request::Flush).unwrap(), 0);
}

const PYTHON: &str = "
import asyncio, sys, os
from qemu.qmp import QMPClient, ExecuteError
from qemu.qmp.events import EventListener

async def refused(execute, command, arguments, text):
    try:
        await execute(command, arguments)
    except ExecuteError as error:
        assert text in str(error), error
        return error
    raise AssertionError(command + ' was accepted')

async def ended(listener, jobs):
    'Waits for the ends of jobs, and answers the errors of those that have one.'
    errors = {}
    while jobs:
        event = await asyncio.wait_for(listener.get(), 60)
        jobs = jobs - {event['data']['device']}
        if event['event'] == 'BLOCK_JOB_CANCELLED' or 'error' in event['data']:
            errors[event['data']['device']] = event['data'].get('error', 'cancelled')
    return errors

def backup(disk, target, **more):
    data = {'device': disk, 'job-id': 'backup-' + disk, 'sync': 'full', 'target': target, 'format': 'qcow2'}
    return {'type': 'drive-backup', 'data': {**data, **more}}

def overlay(disk, file):
    return {'type': 'blockdev-snapshot-sync', 'data': {'device': disk, 'snapshot-file': file, 'format': 'qcow2'}}

async def main():
    client = QMPClient('backup')
    await client.connect(sys.argv[1])
    execute = client.execute
    ends = EventListener(('BLOCK_JOB_COMPLETED', 'BLOCK_JOB_CANCELLED'))
    client.register_listener(ends)
    # What would happen: nothing has.
    plan = [overlay('disk0', 'over0.qcow2'), backup('disk1', 'target1.qcow2')]
    dry = await execute('transaction', {'actions': plan, 'x-dry-run': True})
    assert [len(dry['x-actions']), os.path.exists('over0.qcow2')] == [2, False], dry
    assert not any('error' in action for action in dry['x-actions']), dry
    wrong = plan + [backup('nope', 'x.qcow2')]
    dry = await execute('transaction', {'actions': wrong, 'x-dry-run': True})
    assert ['error' in action for action in dry['x-actions']] == [False, False, True], dry
    # Both disks at one time.
    both = [backup('disk0', 'target0.qcow2'), backup('disk1', 'target1.qcow2')]
    grouped = {'completion-mode': 'grouped'}
    await execute('transaction', {'actions': both, 'properties': grouped})
    assert await ended(ends, {'backup-disk0', 'backup-disk1'}) == {}
    # One that is cancelled takes the other with it.
    slow = [backup('disk0', 'slow0.qcow2', speed=65536), backup('disk1', 'slow1.qcow2', speed=65536)]
    await execute('transaction', {'actions': slow, 'properties': grouped})
    jobs = await execute('query-block-jobs')
    assert sorted(job['device'] for job in jobs) == ['backup-disk0', 'backup-disk1'], jobs
    await execute('block-job-cancel', {'device': 'backup-disk1'})
    assert set(await ended(ends, {'backup-disk0', 'backup-disk1'})) == {'backup-disk0', 'backup-disk1'}
    assert await execute('query-block-jobs') == []
    error = await refused(execute, 'block-job-cancel', {'device': 'backup-disk1'}, 'not found')
    assert error.error_class == 'DeviceNotActive', error
    # An overlay on each, or none.
    await refused(execute, 'transaction', {'actions': [overlay('disk0', 'over0.qcow2'), overlay('disk1', 'none/over1.qcow2')]},
                  'No such file or directory')
    assert not os.path.exists('over0.qcow2')
    await execute('transaction', {'actions': [overlay('disk0', 'over0.qcow2'), overlay('disk1', 'over1.qcow2')]})
    drives = {drive['device']: drive['inserted']['image'] for drive in await execute('query-block')}
    assert drives['disk0']['filename'].endswith('over0.qcow2'), drives
    assert drives['disk0']['backing-image']['filename'].endswith('disk0.qcow2'), drives
    with client.listener('SHUTDOWN') as shutdown:
        await execute('quit')
        await asyncio.wait_for(shutdown.get(), 10)
    try:
        await client.disconnect()
    except EOFError:
        pass

asyncio.run(main())
";

#[test]
fn pythons_client_drives_backups_snapshots_and_dry_runs() {
    let Some(python) = harness::python() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let Some(mut daemon) = two_disks(folder.path()) else {
        return;
    };
    let mut command = Command::new(python);
    command
        .args(["-c", PYTHON, "qmp.sock"])
        .current_dir(folder.path());
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(daemon.exited().success());
    for disk in ["0", "1"] {
        let compare = format!("qemu-img compare -q disk{disk}-before.qcow2 target{disk}.qcow2");
        tool(folder.path(), &compare);
        tool(
            folder.path(),
            &format!("qemu-img compare -q disk{disk}-before.qcow2 over{disk}.qcow2"),
        );
    }
}

/// What a client sees that asks again and again, until there is no such job. Answers what was shown last.
fn polled(qmp: &mut Qmp, device: &str) -> Option<Value> {
    let deadline = Instant::now() + harness::PATIENCE;
    let mut last: Option<Value> = None;
    loop {
        let jobs = qmp.ok("query-block-jobs", json!({}));
        let job = jobs
            .as_array()
            .unwrap()
            .iter()
            .find(|job| job["device"] == device)
            .cloned();
        let Some(job) = job else {
            return last;
        };
        let done = |job: &Value| job["offset"].as_u64().unwrap();
        assert!(done(&job) <= job["len"].as_u64().unwrap(), "{job}");
        assert!(
            last.as_ref().is_none_or(|last| done(last) <= done(&job)),
            "{last:?} {job}"
        );
        assert!(Instant::now() < deadline, "{job}");
        last = Some(job);
    }
}

/// Without ids and events: the job has the drive's name, and is gone when it has ended.
#[test]
fn a_client_that_polls_sees_a_backup_end_and_cancels_another() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut daemon) = two_disks(folder.path()) else {
        return;
    };
    let mut qmp = daemon.qmp();
    let backup = |target: &str, speed: u64| json!({"device": "disk0", "target": target, "sync": "full", "speed": speed});
    qmp.ok("drive-backup", backup("target.qcow2", 4 << 20));
    write(&daemon, "disk0", 9);
    let last = polled(&mut qmp, "disk0").unwrap();
    assert_eq!(
        (&last["type"], &last["speed"]),
        (&json!("backup"), &json!(4 << 20))
    );
    tool(
        folder.path(),
        "qemu-img compare -q disk0-before.qcow2 target.qcow2",
    );
    qmp.ok("drive-backup", backup("cancelled.qcow2", 65536));
    qmp.ok(
        "block-job-set-speed",
        json!({"device": "disk0", "speed": 131_072}),
    );
    qmp.ok("block-job-cancel", json!({"device": "disk0"}));
    polled(&mut qmp, "disk0");
    for command in [
        "block-job-cancel",
        "block-job-pause",
        "block-job-resume",
        "block-job-complete",
    ] {
        let (class, text) = qmp.error(command, json!({"device": "disk0"}));
        assert_eq!(class, "DeviceNotActive", "{command}: {text}");
    }
    // The target belongs to nobody any more.
    tool(folder.path(), "qemu-img check -q cancelled.qcow2");
    qmp.ok("quit", json!({}));
    assert!(daemon.exited().success());
}

/// A backup tool reads the disk as it was over NBD, from an image that takes what guests overwrite; the slow reader is in no
/// guest's way. Then everything is taken away again.
#[test]
fn a_backup_tool_reads_a_point_in_time_by_fleecing() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut daemon) = two_disks(folder.path()) else {
        return;
    };
    let mut qmp = daemon.qmp();
    for round in 0..2 {
        let actions: Vec<Value> = ["disk0", "disk1"]
            .map(|disk| {
                let name = format!("{disk}-fleecing");
                tool(folder.path(), &format!("rm -f {name} && qemu-img create -q -f qcow2 {name} 16M"));
                let file = json!({"driver": "file", "filename": name});
                let node = json!({"driver": "qcow2", "node-name": name, "file": file, "backing": disk, "discard": "unmap"});
                qmp.ok("blockdev-add", node);
                let data = json!({"device": disk, "job-id": format!("fleecing-{disk}"), "target": name, "sync": "none"});
                json!({"type": "blockdev-backup", "data": data})
            })
            .into();
        qmp.ok("transaction", json!({"actions": actions}));
        for disk in ["disk0", "disk1"] {
            let before = format!("qemu-img convert -U -O raw {disk}.qcow2 {disk}-{round}.raw");
            tool(folder.path(), &before);
            let export = json!({"type": "nbd", "id": format!("e-{disk}"), "node-name": format!("{disk}-fleecing"),
                "name": format!("fleecing-{disk}")});
            qmp.ok("block-export-add", export);
            write(&daemon, disk, 10 + round);
            let read = format!(
                "qemu-img compare -q -f raw -F raw {disk}-{round}.raw 'nbd+unix:///fleecing-{disk}?socket=nbd.sock'"
            );
            tool(folder.path(), &read);
        }
        for disk in ["disk0", "disk1"] {
            let jobs = qmp.ok("query-block-jobs", json!({}));
            let id = format!("fleecing-{disk}");
            assert!(
                jobs.as_array()
                    .unwrap()
                    .iter()
                    .any(|job| job["device"] == id.as_str())
            );
            qmp.ok(
                "block-export-del",
                json!({"id": format!("e-{disk}"), "mode": "hard"}),
            );
            qmp.event("BLOCK_EXPORT_DELETED");
            qmp.ok("block-job-cancel", json!({"device": id}));
            polled(&mut qmp, &id);
            qmp.ok(
                "blockdev-del",
                json!({"node-name": format!("{disk}-fleecing")}),
            );
        }
        let nodes = qmp.ok("query-named-block-nodes", json!({"flat": true}));
        assert_eq!(
            nodes.as_array().unwrap().len(),
            4,
            "nothing is left: {nodes}"
        );
    }
    // Guests have what they wrote.
    for disk in ["disk0", "disk1"] {
        let mut guest = Guest::connect(&daemon.path("nbd.sock"), disk).unwrap();
        assert!(guest.read(1 << 20, 4096).unwrap() == [11; 4096]);
    }
    qmp.ok("quit", json!({}));
    assert!(daemon.exited().success());
    tool(
        folder.path(),
        "qemu-img check -q disk0.qcow2 && qemu-img check -q disk1.qcow2",
    );
}
