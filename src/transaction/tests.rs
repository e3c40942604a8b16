//! The order of things, with actions and disks that write down what happens to them.

mod fake;

use block::driver::Requests as _;
use block::driver::SnapshotSelector;
use futures_util::FutureExt;

use super::*;
use fake::{Fault, Log};

/// Writes down what happens to it.
struct Recorder {
    name: &'static str,
    fate: Fate,
    log: Log,
}

#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Works,
    Fails,
    Panics,
}

impl Recorder {
    fn note(&self, what: &str) {
        self.log.note(format!("{what} {}", self.name));
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.note("clean");
    }
}

impl Action for Recorder {
    fn prepare<'a>(&'a mut self, _: &'a mut Changes) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(async {
            self.note("prepare");
            match self.fate {
                Fate::Works => Ok(()),
                Fate::Fails => Err(QmpError::generic("no")),
                Fate::Panics => panic!("as the test wants it"),
            }
        })
    }

    fn abort(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async { self.note("abort") })
    }

    fn commit(self: Box<Self>) -> Option<SnapshotInfo> {
        self.note("commit");
        None
    }
}

fn recorder(name: &'static str, fate: Fate, log: &Log) -> Box<dyn Action> {
    Box::new(Recorder {
        name,
        fate,
        log: log.clone(),
    })
}

fn create(disk: &Disk, name: &str) -> Box<dyn Action> {
    operation(
        disk,
        Operation::Create {
            name: name.to_owned(),
        },
    )
}

fn operation(disk: &Disk, operation: Operation) -> Box<dyn Action> {
    Box::new(SnapshotAction::new(disk.clone(), operation).unwrap())
}

fn selected(name: &str) -> SnapshotSelector {
    SnapshotSelector {
        id: None,
        name: Some(name.to_owned()),
    }
}

type Answer = Result<Vec<Option<SnapshotInfo>>, String>;

/// Runs a transaction of which nothing waits.
fn run_now(actions: Vec<Box<dyn Action>>) -> Answer {
    let result = run(actions).now_or_never().unwrap();
    result.map_err(|error| error.desc)
}

#[test]
fn all_are_prepared_before_any_is_committed() {
    let log = Log::default();
    let action = |name| recorder(name, Fate::Works, &log);
    let result = run_now(vec![action("a"), action("b"), action("c")]);
    assert_eq!(result, Ok(vec![None, None, None]));
    assert_eq!(
        log.take(),
        "prepare a, prepare b, prepare c, commit a, clean a, commit b, clean b, commit c, clean c"
    );
}

#[test]
fn after_a_failure_the_others_are_aborted_in_reverse() {
    for fate in [Fate::Fails, Fate::Panics] {
        let log = Log::default();
        let action = |name| recorder(name, Fate::Works, &log);
        let result = run_now(vec![action("a"), action("b"), recorder("c", fate, &log)]);
        assert!(result.is_err());
        assert_eq!(
            log.take(),
            "prepare a, prepare b, prepare c, abort b, abort a, clean a, clean b, clean c"
        );
    }
}

#[test]
fn a_disk_is_changed_once_however_many_actions_are_about_it() {
    let log = Log::default();
    let (a, b) = (fake::disk("a", &[], &log), fake::disk("b", &[], &log));
    let about = run_now(vec![
        create(&a, "x"),
        recorder("other", Fate::Works, &log),
        create(&b, "x"),
        operation(&a, Operation::Revert(selected("x"))),
        operation(&a, Operation::Delete(selected("y"))),
    ]);
    let names: Vec<Option<String>> = about
        .unwrap()
        .into_iter()
        .map(|about| Some(about?.name))
        .collect();
    let name = |name: &str| Some(name.to_owned());
    assert_eq!(names, [name("x"), None, name("x"), name("x"), name("y")]);
    assert_eq!(
        log.take(),
        "flush a, flush b, change a, change b, create x of a, prepare other, create x of b, revert x of a, \
         delete y of a, prepare a, prepare b, commit a, commit b, commit other, clean other, finish a, finish b"
    );
}

/// Three disks of which the second has these faults, and actions besides.
fn with_faults(faults: &'static [Fault]) -> (String, String) {
    let log = Log::default();
    let disks = [("a", &[] as &[Fault]), ("b", faults), ("c", &[])];
    let disks = disks.map(|(name, faults)| fake::disk(name, faults, &log));
    let mut actions: Vec<_> = disks.iter().map(|disk| create(disk, "x")).collect();
    actions.insert(1, recorder("other", Fate::Works, &log));
    let error = run_now(actions).unwrap_err();
    (error, log.take())
}

#[test]
fn a_change_that_fails_before_its_commit_leaves_nothing_to_take_back() {
    let begin = "flush a, flush b, flush c";
    let (end, clean) = ("abort other, drop a", "clean other");
    let failed = "Failed to create snapshot 'x' on device 'b'";
    assert_eq!(
        with_faults(&[Fault::Change]),
        (
            format!("{failed}: change: no"),
            format!(
                "{begin}, change a, change b fails, change c, create x of a, prepare other, {end}, drop c, {clean}"
            )
        )
    );
    assert_eq!(
        with_faults(&[Fault::Create]),
        (
            format!("{failed}: create x of: no"),
            format!(
                "{begin}, change a, change b, change c, create x of a, prepare other, create x of b fails, \
                 {end}, drop b, drop c, {clean}"
            )
        )
    );
    assert_eq!(
        with_faults(&[Fault::Prepare]),
        (
            format!("{failed}: prepare: no"),
            format!(
                "{begin}, change a, change b, change c, create x of a, prepare other, create x of b, create x of c, \
                 prepare a, prepare b fails, prepare c, {end}, drop b, drop c, {clean}"
            )
        )
    );
}

const COMMITTED: &str = "flush a, flush b, flush c, change a, change b, change c, create x of a, prepare other, \
                         create x of b, create x of c, prepare a, prepare b, prepare c, commit a";
const END: &str = "abort other, drop a, drop b, drop c, clean other";

#[test]
fn a_commit_that_fails_takes_the_others_back() {
    let failed = "Failed to create snapshot 'x' on device 'b'";
    assert_eq!(
        with_faults(&[Fault::Commit]),
        (
            format!("{failed}: commit: no"),
            format!("{COMMITTED}, commit b fails, commit c, roll back a, roll back c, {END}")
        )
    );
    let (error, log) = with_faults(&[Fault::CommitPanics]);
    assert!(error.starts_with("Internal error"), "{error}");
    assert_eq!(
        log,
        format!("{COMMITTED}, commit c, roll back a, roll back c, {END}")
    );
}

/// Keeps log lines for the test to look at.
struct Lines(std::sync::Mutex<Vec<String>>);

static LINES: Lines = Lines(std::sync::Mutex::new(Vec::new()));

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

#[test]
fn what_cannot_be_taken_back_is_named_to_the_client_and_in_the_log() {
    log::set_logger(&LINES).unwrap();
    log::set_max_level(log::LevelFilter::Error);
    let log = Log::default();
    let disks = [
        fake::disk("a", &[Fault::RollBack], &log),
        fake::disk("b", &[Fault::Commit], &log),
    ];
    let actions = disks.iter().map(|disk| create(disk, "x")).collect();
    assert_eq!(
        run_now(actions).unwrap_err(),
        "Failed to create snapshot 'x' on device 'b': commit: no; and what was done to 'a' could not be taken back, \
         see the daemon's log"
    );
    let lines = LINES.0.lock().unwrap().join("\n");
    for part in ["device 'a'", "roll back: no", "'a.qcow2'"] {
        assert!(lines.contains(part), "{lines}");
    }
}

#[tokio::test]
async fn requests_wait_until_the_end_and_go_on_after_a_failure() {
    /// Sends a request to a disk that is held.
    struct Asks(Disk);

    impl Action for Asks {
        fn prepare<'a>(&'a mut self, _: &'a mut Changes) -> BoxFuture<'a, Result<(), QmpError>> {
            Box::pin(async {
                let read = self.0.node.read(0, 1).now_or_never();
                assert!(read.is_none(), "{read:?}");
                Err(QmpError::generic("held"))
            })
        }

        fn commit(self: Box<Self>) -> Option<SnapshotInfo> {
            None
        }
    }

    let log = Log::default();
    let disk = fake::disk("a", &[], &log);
    let asks = Box::new(Asks(disk.clone()));
    let error = run(vec![create(&disk, "x"), asks]).await.unwrap_err();
    assert_eq!(error.desc, "held");
    disk.node.read(0, 1).await.unwrap();
}
