//! The generated table and marshallers, with handlers that count how often they are run.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};

use serde_json::json;

use crate::rt::dispatch::{Call, Entry, find};
use crate::rt::{Object, QmpError, Value};
use crate::{COMMAND_NAMES, commands as args, handlers, types};

/// What the handlers act on.
#[derive(Default)]
struct Counter {
    calls: AtomicUsize,
}

impl Counter {
    /// A handler that does nothing but be counted.
    fn count<T>(&self, answer: T) -> Result<T, QmpError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        Ok(answer)
    }
}

struct Fake;

impl handlers::RunState<Counter> for Fake {
    async fn query_status(cx: &Counter) -> Result<types::StatusInfo, QmpError> {
        cx.count(types::StatusInfo {
            running: true,
            status: types::RunState::Running,
        })
    }
    async fn stop(cx: &Counter) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn cont(cx: &Counter) -> Result<(), QmpError> {
        cx.count(())
    }
}

impl handlers::BlockStats<Counter> for Fake {
    async fn query_blockstats(
        cx: &Counter,
        _: args::QueryBlockstats,
    ) -> Result<Vec<types::BlockStats>, QmpError> {
        cx.count(Vec::new())
    }
}

impl handlers::BlockSnapshot<Counter> for Fake {
    async fn blockdev_snapshot_sync(
        cx: &Counter,
        _: args::BlockdevSnapshotSync,
    ) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn blockdev_snapshot(cx: &Counter, _: args::BlockdevSnapshot) -> Result<(), QmpError> {
        cx.count(())
    }
}

impl handlers::BlockCore<Counter> for Fake {
    async fn query_block(cx: &Counter) -> Result<Vec<types::BlockInfo>, QmpError> {
        cx.count(Vec::new())
    }
    async fn query_named_block_nodes(
        cx: &Counter,
        _: args::QueryNamedBlockNodes,
    ) -> Result<Vec<types::BlockDeviceInfo>, QmpError> {
        cx.count(Vec::new())
    }
    async fn blockdev_add(cx: &Counter, _: types::BlockdevOptions) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn blockdev_del(cx: &Counter, _: args::BlockdevDel) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn block_resize(cx: &Counter, _: args::BlockResize) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn blockdev_snapshot_internal_sync(
        cx: &Counter,
        _: args::BlockdevSnapshotInternalSync,
    ) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn blockdev_snapshot_delete_internal_sync(
        cx: &Counter,
        args: args::BlockdevSnapshotDeleteInternalSync,
    ) -> Result<types::SnapshotInfo, QmpError> {
        cx.count(types::SnapshotInfo {
            id: args.id.unwrap_or_default(),
            name: args.name.unwrap_or_default(),
            vm_state_size: 0,
            date_sec: 1,
            date_nsec: 2,
            vm_clock_sec: 3,
            vm_clock_nsec: 4,
            icount: None,
        })
    }
    async fn x_blockdev_snapshot_revert(
        cx: &Counter,
        args: args::XBlockdevSnapshotRevert,
    ) -> Result<types::SnapshotInfo, QmpError> {
        let args::XBlockdevSnapshotRevert { device, id, name } = args;
        let same = args::BlockdevSnapshotDeleteInternalSync { device, id, name };
        Self::blockdev_snapshot_delete_internal_sync(cx, same).await
    }
}

impl handlers::BlockCreate<Counter> for Fake {
    async fn blockdev_create(cx: &Counter, _: args::BlockdevCreate) -> Result<(), QmpError> {
        cx.count(())
    }
}

impl handlers::BlockGraph<Counter> for Fake {
    async fn x_debug_query_block_graph(cx: &Counter) -> Result<types::XDbgBlockGraph, QmpError> {
        cx.count(types::XDbgBlockGraph {
            nodes: Vec::new(),
            edges: Vec::new(),
        })
    }
    async fn blockdev_reopen(cx: &Counter, _: args::BlockdevReopen) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn change_backing_file(cx: &Counter, _: args::ChangeBackingFile) -> Result<(), QmpError> {
        cx.count(())
    }
}

impl handlers::BlockExport<Counter> for Fake {
    async fn nbd_server_start(cx: &Counter, _: args::NbdServerStart) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn nbd_server_stop(cx: &Counter) -> Result<(), QmpError> {
        cx.count(())?;
        Err(QmpError::generic("NBD server not running"))
    }
    async fn nbd_server_add(cx: &Counter, _: types::NbdServerAddOptions) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn nbd_server_remove(cx: &Counter, _: args::NbdServerRemove) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn block_export_add(cx: &Counter, _: types::BlockExportOptions) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn block_export_del(cx: &Counter, _: args::BlockExportDel) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn query_block_exports(cx: &Counter) -> Result<Vec<types::BlockExportInfo>, QmpError> {
        cx.count(Vec::new())
    }
}

impl handlers::Job<Counter> for Fake {
    async fn job_pause(cx: &Counter, _: args::JobPause) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn job_resume(cx: &Counter, _: args::JobResume) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn job_cancel(cx: &Counter, _: args::JobCancel) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn job_complete(cx: &Counter, _: args::JobComplete) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn job_dismiss(cx: &Counter, _: args::JobDismiss) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn job_finalize(cx: &Counter, _: args::JobFinalize) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn query_jobs(cx: &Counter) -> Result<Vec<types::JobInfo>, QmpError> {
        cx.count(Vec::new())
    }
}

impl handlers::BlockJob<Counter> for Fake {
    async fn block_job_set_speed(cx: &Counter, _: args::BlockJobSetSpeed) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn block_job_cancel(cx: &Counter, _: args::BlockJobCancel) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn block_job_pause(cx: &Counter, _: args::BlockJobPause) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn block_job_resume(cx: &Counter, _: args::BlockJobResume) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn block_job_complete(cx: &Counter, _: args::BlockJobComplete) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn block_job_dismiss(cx: &Counter, _: args::BlockJobDismiss) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn block_job_finalize(cx: &Counter, _: args::BlockJobFinalize) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn query_block_jobs(cx: &Counter) -> Result<Vec<types::BlockJobInfo>, QmpError> {
        cx.count(Vec::new())
    }
    async fn drive_backup(cx: &Counter, _: types::DriveBackup) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn blockdev_backup(cx: &Counter, _: types::BlockdevBackup) -> Result<(), QmpError> {
        cx.count(())
    }
}

impl handlers::Transaction<Counter> for Fake {
    async fn transaction(
        cx: &Counter,
        _: args::Transaction,
    ) -> Result<types::TransactionResult, QmpError> {
        cx.count(types::TransactionResult { x_actions: None })
    }
}

impl handlers::Control<Counter> for Fake {
    async fn qmp_capabilities(cx: &Counter, _: args::QmpCapabilities) -> Result<(), QmpError> {
        cx.count(())
    }
    async fn query_version(cx: &Counter) -> Result<types::VersionInfo, QmpError> {
        let qemu = types::VersionTriple {
            major: 10,
            minor: 0,
            micro: 2,
        };
        cx.count(types::VersionInfo {
            qemu,
            package: String::new(),
        })
    }
    async fn query_commands(cx: &Counter) -> Result<Vec<types::CommandInfo>, QmpError> {
        let names = COMMAND_NAMES.map(|name| types::CommandInfo {
            name: name.to_owned(),
        });
        cx.count(names.to_vec())
    }
    async fn quit(cx: &Counter) -> Result<(), QmpError> {
        cx.count(())
    }
}

impl handlers::Introspect<Counter> for Fake {
    async fn query_qmp_schema(cx: &Counter) -> Result<Vec<types::SchemaInfo>, QmpError> {
        cx.count(crate::schema())
    }
}

const TABLE: &[Entry<Counter>] = crate::commands::<Counter, Fake>();

/// Runs a command, and says how often a handler was reached.
pub(super) fn run(name: &str, arguments: Value) -> (Result<Value, String>, usize) {
    let cx = Counter::default();
    let entry = find(TABLE, name).unwrap();
    let Value::Object(arguments) = arguments else {
        panic!("no object: {arguments}")
    };
    let answer = match entry.call {
        Call::InBand(call) => call(&cx, arguments).and_then(finish),
        Call::OutOfBand(call) => call(&cx, arguments),
    };
    (answer.map_err(|err| err.desc), cx.calls.into_inner())
}

/// The result of a future that does not wait.
fn finish(future: impl Future<Output = Result<Value, QmpError>>) -> Result<Value, QmpError> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(answer) => answer,
        Poll::Pending => panic!("the fake handlers do not wait"),
    }
}

#[test]
fn the_table_finds_every_command() {
    for name in COMMAND_NAMES {
        assert_eq!(find(TABLE, name).map(|entry| entry.name), Some(name));
    }
    for unknown in ["", "quit2", "QUIT", "block-resize"] {
        assert!(find(TABLE, unknown).is_none());
    }
    assert_eq!(
        find(TABLE, "nbd-server-add").unwrap().features,
        ["deprecated"]
    );
    assert!(!find(TABLE, "transaction").unwrap().flags.allow_preconfig);
    assert!(find(TABLE, "quit").unwrap().flags.allow_preconfig);
}

#[test]
fn answers_are_encoded() {
    assert_eq!(run("quit", json!({})), (Ok(json!({})), 1));
    let snapshot = json!({"id": "", "name": "s", "vm-state-size": 0, "date-sec": 1, "date-nsec": 2,
                          "vm-clock-sec": 3, "vm-clock-nsec": 4});
    let arguments = json!({"device": "d", "name": "s"});
    let (answer, calls) = run("blockdev-snapshot-delete-internal-sync", arguments);
    assert_eq!((answer, calls), (Ok(snapshot), 1));
    let (answer, _) = run("nbd-server-stop", json!({}));
    assert_eq!(answer, Err("NBD server not running".to_owned()));
}

#[test]
fn bad_arguments_reach_no_handler() {
    // Every command, with a member that none has.
    for name in COMMAND_NAMES {
        let (answer, calls) = run(name, json!({"no such member": null}));
        assert!(answer.is_err(), "{name}");
        assert_eq!(calls, 0, "{name}");
    }
    let (answer, calls) = run("quit", json!({"now": true}));
    assert_eq!(
        (answer, calls),
        (Err("Parameter 'now' is unexpected".to_owned()), 0)
    );
    // Every mandatory argument of every command, left out and of the wrong kind.
    let good = [
        ("blockdev-del", json!({"node-name": "n"})),
        ("block_resize", json!({"size": 1})),
        (
            "blockdev-snapshot-internal-sync",
            json!({"device": "d", "name": "n"}),
        ),
        (
            "blockdev-snapshot-delete-internal-sync",
            json!({"device": "d"}),
        ),
        ("transaction", json!({"actions": []})),
        (
            "nbd-server-start",
            json!({"addr": {"type": "unix", "data": {"path": "p"}}}),
        ),
        ("nbd-server-add", json!({"device": "d"})),
        ("nbd-server-remove", json!({"name": "n"})),
        (
            "block-export-add",
            json!({"type": "nbd", "id": "e", "node-name": "n"}),
        ),
        ("block-export-del", json!({"id": "e"})),
        ("blockdev-add", json!({"driver": "file", "filename": "f"})),
    ];
    for (name, good) in good {
        assert_eq!(run(name, good.clone()).1, 1, "{name}");
        let Value::Object(good) = good else {
            panic!("no object")
        };
        for key in good.keys() {
            let mut without: Object = good.clone();
            without.shift_remove(key);
            let (answer, calls) = run(name, Value::Object(without));
            assert_eq!(
                (answer, calls),
                (Err(format!("Parameter '{key}' is missing")), 0)
            );
            let mut wrong: Object = good.clone();
            wrong.insert(key.clone(), Value::Null);
            let (answer, calls) = run(name, Value::Object(wrong));
            let text = answer.unwrap_err();
            assert!(
                text.starts_with(&format!("Invalid parameter type for '{key}'")),
                "{text}"
            );
            assert_eq!(calls, 0);
        }
    }
}
