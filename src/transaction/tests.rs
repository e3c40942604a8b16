//! The order of things, with actions and disks that write down what happens to them.

pub(super) mod fake;
mod faults;

use block::driver::Requests as _;
use block::driver::SnapshotSelector;
use block::graph::NewDrive;
use block::open::NullOptions;
use block::protocols::memory::Memory;
use block::protocols::null::Null;
use futures_util::FutureExt;

use super::*;
use crate::daemon::{lookup, testing};
use fake::{Fault, Log};

/// Writes down what happens to it.
struct Recorder {
    name: &'static str,
    fate: Fate,
    log: Log,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Works,
    FailsIn(&'static str),
    HangsInStage,
    PanicsIn(&'static str),
}

impl Recorder {
    fn run(&self, what: &'static str) -> Result<(), QmpError> {
        self.log.note(format!("{what} {}", self.name));
        match self.fate {
            Fate::FailsIn(place) if place == what => Err(QmpError::generic("no")),
            Fate::PanicsIn(place) if place == what => panic!("as the test wants it"),
            _ => Ok(()),
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let _ = self.run("drop");
    }
}

impl Action for Recorder {
    fn resolve(&mut self, _: &mut Control, _: &mut Plan) -> Result<(), QmpError> {
        self.run("resolve")
    }

    fn prepare<'a>(&'a mut self, _: &'a Preparing) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(async { self.run("prepare") })
    }

    fn stage<'a>(&'a mut self, _: &'a mut Held) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(async {
            self.run("stage")?;
            match self.fate {
                Fate::HangsInStage => std::future::pending().await,
                _ => Ok(()),
            }
        })
    }

    fn check(&self, _: &Control) -> Result<(), QmpError> {
        match self.fate {
            Fate::FailsIn("check") => self.run("check"),
            _ => Ok(()),
        }
    }

    fn commit(&mut self, _: &mut Control, _: &Held) {
        self.run("commit").unwrap();
    }

    fn finish<'a>(&'a mut self, _: &'a Cx) -> BoxFuture<'a, ()> {
        Box::pin(async { self.run("finish").unwrap() })
    }

    fn abort<'a>(&'a mut self, _: &'a Cx) -> BoxFuture<'a, Option<Stays>> {
        Box::pin(async {
            self.run("abort").unwrap();
            None
        })
    }
}

fn recorder(name: &'static str, fate: Fate, log: &Log) -> Box<dyn Action> {
    Box::new(Recorder {
        name,
        fate,
        log: log.clone(),
    })
}

fn create(device: &str, name: &str) -> Box<dyn Action> {
    operation(
        device,
        Operation::Create {
            name: name.to_owned(),
        },
    )
}

fn operation(device: &str, operation: Operation) -> Box<dyn Action> {
    Box::new(SnapshotAction::new(device.to_owned(), operation))
}

fn selected(name: &str) -> SnapshotSelector {
    SnapshotSelector {
        id: None,
        name: Some(name.to_owned()),
    }
}

/// Runs a transaction without jobs.
pub(super) async fn run(cx: &Cx, actions: Vec<Box<dyn Action>>) -> Result<Vec<Effect>, QmpError> {
    super::run(cx, actions, Completion::Individual).await
}

#[tokio::test]
async fn what_the_graph_would_refuse_is_an_error_and_nothing_is_committed() {
    let (cx, log) = (testing::running(), Log::default());
    fake::disk(&cx, "d", &[], &log).await;
    let actions = vec![
        create("d", "s"),
        recorder("a", Fate::Works, &log),
        recorder("b", Fate::FailsIn("check"), &log),
    ];
    let error = run(&cx, actions).await.unwrap_err();
    assert_eq!(error.desc, "no");
    let log = log.take();
    assert!(log.contains("prepare d, check b, roll back d"), "{log}");
    assert!(log.contains("abort b, abort a"), "{log}");
    assert!(!log.contains("commit"), "{log}");
}

#[tokio::test]
async fn each_phase_is_over_before_the_next_begins() {
    let (cx, log) = (testing::running(), Log::default());
    let action = |name| recorder(name, Fate::Works, &log);
    let result = run(&cx, vec![action("a"), action("b")]).await;
    assert_eq!(result, Ok(vec![Effect::default(); 2]));
    assert_eq!(
        log.take(),
        "resolve a, prepare a, resolve b, prepare b, stage a, stage b, commit a, commit b, finish a, finish b, \
         drop a, drop b"
    );
}

#[tokio::test]
async fn after_a_failure_what_was_begun_is_aborted_in_reverse() {
    let cx = testing::running();
    let prepared = "resolve a, prepare a, resolve b";
    let aborted = "abort b, abort a, drop a, drop b";
    for (place, expected) in [
        ("resolve", format!("{prepared}, drop b, abort a, drop a")),
        ("prepare", format!("{prepared}, prepare b, {aborted}")),
        (
            "stage",
            format!("{prepared}, prepare b, stage a, stage b, {aborted}"),
        ),
    ] {
        for fate in [Fate::FailsIn(place), Fate::PanicsIn(place)] {
            let log = Log::default();
            let actions = vec![recorder("a", Fate::Works, &log), recorder("b", fate, &log)];
            assert!(run(&cx, actions).await.is_err());
            assert_eq!(log.take(), expected, "{fate:?}");
        }
    }
}

#[tokio::test]
async fn a_disk_is_changed_once_however_many_actions_are_about_it() {
    let (cx, log) = (testing::running(), Log::default());
    fake::disk(&cx, "a", &[], &log).await;
    fake::disk(&cx, "b", &[], &log).await;
    let effects = run(
        &cx,
        vec![
            create("a", "x"),
            recorder("other", Fate::Works, &log),
            create("b", "x"),
            operation("a", Operation::Revert(selected("x"))),
            operation("a", Operation::Delete(selected("y"))),
        ],
    )
    .await;
    let names: Vec<Option<String>> = effects
        .unwrap()
        .into_iter()
        .map(|effect| Some(effect.snapshot?.name))
        .collect();
    let name = |name: &str| Some(name.to_owned());
    assert_eq!(names, [name("x"), None, name("x"), name("x"), name("y")]);
    assert_eq!(
        log.take(),
        "resolve other, prepare other, flush a, flush b, change a, change b, create x of a, stage other, create x of b, \
         revert x of a, delete y of a, prepare a, prepare b, commit a, commit b, commit other, finish a, finish b, \
         finish other, drop other"
    );
}

/// More than a task may ask for in one turn: letting go is not interrupted by what the disks do behind it.
#[tokio::test]
async fn guests_of_all_disks_go_on_before_any_disk_is_written_to() {
    let (cx, log) = (testing::running(), Log::default());
    let mut actions = Vec::new();
    for number in 0..300 {
        let name: &str = Box::leak(format!("disk{number}").into());
        fake::disk(&cx, name, &[Fault::Marks], &log).await;
        actions.push(create(name, "x"));
    }
    run(&cx, actions).await.unwrap();
    let log = log.take();
    let order = log
        .split(", ")
        .filter_map(|noted| noted.split_once(" disk"));
    let order: Vec<&str> = order.map(|(what, _)| what).collect();
    let last = |what| order.iter().rposition(|noted| *noted == what).unwrap();
    let first = |what| order.iter().position(|noted| *noted == what).unwrap();
    assert_eq!(
        order.iter().filter(|noted| **noted == "let go").count(),
        300
    );
    assert!(last("create x of") < first("let go"));
    assert_eq!(first("let go") + 299, last("let go"), "at once");
    assert!(last("let go") < first("mark"));
}

fn revert(device: &str) -> Box<dyn Action> {
    operation(device, Operation::Revert(selected("x")))
}

#[tokio::test]
async fn disks_that_go_back_are_held_when_their_images_have_been_switched() {
    let (cx, log) = (testing::running(), Log::default());
    fake::disk(&cx, "a", &[Fault::Ahead], &log).await;
    fake::disk(&cx, "b", &[Fault::Ahead], &log).await;
    fake::disk(&cx, "c", &[], &log).await;
    let delete = |device| operation(device, Operation::Delete(selected("y")));
    run(&cx, vec![revert("a"), delete("b")]).await.unwrap();
    assert_eq!(
        log.take(),
        "change a, change b, go ahead a, go ahead b, revert x of a, delete y of b, prepare a, prepare b, \
         commit a, commit b, hold a, hold b, finish a, finish b"
    );
    // One that needs its guests to stand still makes all of them do so, and so does a snapshot that is taken.
    run(&cx, vec![revert("a"), revert("c")]).await.unwrap();
    let log_of_both = log.take();
    let (_, held) = log_of_both.split_once("drop a, drop c, ").unwrap();
    assert_eq!(
        held,
        "flush a, flush c, change a, change c, hold a, revert x of a, revert x of c, prepare a, prepare c, \
         commit a, commit c, finish a, finish c"
    );
    run(&cx, vec![revert("a"), create("b", "z")]).await.unwrap();
    assert!(!log.take().contains("go ahead"));
}

#[tokio::test]
async fn disks_that_cannot_be_held_do_not_go_back() {
    let (cx, log) = (testing::running(), Log::default());
    fake::disk(&cx, "a", &[Fault::Ahead], &log).await;
    fake::disk(&cx, "b", &[Fault::Ahead, Fault::Hold], &log).await;
    let error = run(&cx, vec![revert("a"), revert("b")]).await.unwrap_err();
    assert_eq!(
        error.desc,
        "Failed to revert to snapshot 'x' on device 'b': hold: no"
    );
    assert!(log.take().ends_with(
        "commit a, commit b, hold a, hold b fails, roll back a, drop a, roll back b, drop b"
    ));
}

#[tokio::test]
async fn guests_go_on_while_images_are_switched_that_go_back() {
    let (cx, log) = (testing::running(), Log::default());
    fake::disk(&cx, "a", &[Fault::Ahead, Fault::CommitWaits], &log).await;
    let command = {
        let cx = cx.clone();
        tokio::spawn(async move { run(&cx, vec![revert("a")]).await.map(drop) })
    };
    while !log.has("prepare a") {
        tokio::task::yield_now().await;
    }
    let a = cx.commit(|control| lookup::node(&control.graph, "a")).await;
    a.unwrap().read(0, 1).await.unwrap();
    log.note(fake::GO_ON.to_owned());
    command.await.unwrap().unwrap_err();
    assert!(log.take().ends_with("commit a fails, roll back a, drop a"));
}

/// Three disks of which the second has these faults, and an action besides.
async fn with_faults(faults: &'static [Fault]) -> (String, String) {
    let (cx, log) = (testing::running(), Log::default());
    let mut actions = Vec::new();
    for (name, faults) in [("a", &[] as &[Fault]), ("b", faults), ("c", &[])] {
        fake::disk(&cx, name, faults, &log).await;
        actions.push(create(name, "x"));
    }
    actions.insert(1, recorder("other", Fate::Works, &log));
    let error = run(&cx, actions).await.unwrap_err();
    (error.desc, log.take())
}

const BEGIN: &str = "resolve other, prepare other, flush a, flush b, flush c";
const END: &str =
    "roll back a, drop a, roll back b, drop b, roll back c, drop c, abort other, drop other";

#[tokio::test]
async fn a_change_that_fails_before_its_commit_leaves_nothing_to_take_back() {
    let failed = "Failed to create snapshot 'x' on device 'b'";
    assert_eq!(
        with_faults(&[Fault::Change]).await,
        (
            format!("{failed}: change: no"),
            format!(
                "{BEGIN}, change a, change b fails, change c, create x of a, stage other, \
                 roll back a, drop a, roll back c, drop c, abort other, drop other"
            )
        )
    );
    let begin = format!("{BEGIN}, change a, change b, change c, create x of a, stage other");
    assert_eq!(
        with_faults(&[Fault::Create]).await,
        (
            format!("{failed}: create x of: no"),
            format!("{begin}, create x of b fails, {END}")
        )
    );
    assert_eq!(
        with_faults(&[Fault::Prepare]).await,
        (
            format!("{failed}: prepare: no"),
            format!(
                "{begin}, create x of b, create x of c, prepare a, prepare b fails, prepare c, {END}"
            )
        )
    );
}

#[tokio::test]
async fn a_commit_that_fails_takes_the_others_back() {
    let committed = format!(
        "{BEGIN}, change a, change b, change c, create x of a, stage other, create x of b, create x of c, \
         prepare a, prepare b, prepare c, commit a"
    );
    let failed = "Failed to create snapshot 'x' on device 'b'";
    assert_eq!(
        with_faults(&[Fault::Commit]).await,
        (
            format!("{failed}: commit: no"),
            format!("{committed}, commit b fails, commit c, {END}")
        )
    );
    let (error, log) = with_faults(&[Fault::CommitPanics]).await;
    assert!(error.starts_with("Internal error"), "{error}");
    assert_eq!(log, format!("{committed}, commit c, {END}"));
}

#[tokio::test]
async fn a_dry_run_tries_every_action_and_leaves_nothing() {
    let (cx, log) = (testing::running(), Log::default());
    fake::disk(&cx, "a", &[Fault::Create], &log).await;
    fake::disk(&cx, "b", &[Fault::Prepare], &log).await;
    let actions = vec![
        recorder("fine", Fate::Works, &log),
        recorder("unknown", Fate::FailsIn("resolve"), &log),
        recorder("unfit", Fate::FailsIn("prepare"), &log),
        create("a", "x"),
        create("b", "x"),
        recorder("late", Fate::PanicsIn("stage"), &log),
    ];
    let previews = dry_run(&cx, actions, Completion::Individual).await.unwrap();
    let text = |preview: &Preview| preview.error.as_ref().map(|error| error.desc.clone());
    let errors: Vec<Option<String>> = previews.iter().map(text).collect();
    let failed = |device: &str, why: &str| {
        let text = format!("Failed to create snapshot 'x' on device '{device}': {why}: no");
        Some(text)
    };
    let no = Some("no".to_owned());
    assert_eq!(errors[..3], [None, no.clone(), no]);
    assert_eq!(
        errors[3..5],
        [failed("a", "create x of"), failed("b", "prepare")]
    );
    assert!(errors[5].as_ref().unwrap().starts_with("Internal error"));
    let named = previews[4].effect.snapshot.as_ref();
    assert_eq!(named.map(|info| info.name.as_str()), Some("x"));
    assert_eq!(
        log.take(),
        "resolve fine, prepare fine, resolve unknown, drop unknown, resolve unfit, prepare unfit, abort unfit, drop unfit, \
         resolve late, prepare late, flush a, flush b, change a, change b, stage fine, create x of a fails, create x of b, \
         stage late, prepare a, prepare b fails, roll back a, drop a, roll back b, drop b, abort late, abort fine, \
         drop fine, drop late"
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

#[tokio::test]
async fn what_cannot_be_taken_back_is_named_to_the_client_and_in_the_log() {
    log::set_logger(&LINES).unwrap();
    log::set_max_level(log::LevelFilter::Error);
    let (cx, log) = (testing::running(), Log::default());
    fake::disk(&cx, "a", &[Fault::RollBack], &log).await;
    fake::disk(&cx, "b", &[Fault::Commit], &log).await;
    let actions = vec![create("a", "x"), create("b", "x")];
    assert_eq!(
        run(&cx, actions).await.unwrap_err().desc,
        "Failed to create snapshot 'x' on device 'b': commit: no; and what was done to 'a' could not be taken back, \
         see the daemon's log"
    );
    let lines = LINES.0.lock().unwrap().join("\n");
    for part in ["device 'a'", "roll back: no", "'a.qcow2'"] {
        assert!(lines.contains(part), "{lines}");
    }
}

/// Sends a request to a disk, which waits until guests go on.
struct Asks {
    node: Arc<Node>,
}

impl Action for Asks {
    fn resolve(&mut self, _: &mut Control, plan: &mut Plan) -> Result<(), QmpError> {
        plan.hold(&self.node);
        Ok(())
    }

    fn prepare<'a>(&'a mut self, _: &'a Preparing) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(async {
            self.node.read(0, 1).await.unwrap();
            Ok(())
        })
    }

    fn stage<'a>(&'a mut self, held: &'a mut Held) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(async {
            assert!(held.quiesced(&self.node).is_some());
            let read = self.node.read(0, 1).now_or_never();
            assert!(read.is_none(), "{read:?}");
            Err(QmpError::generic("held"))
        })
    }

    fn abort<'a>(&'a mut self, _: &'a Cx) -> BoxFuture<'a, Option<Stays>> {
        Box::pin(async {
            self.node.read(0, 1).await.unwrap();
            None
        })
    }
}

#[tokio::test]
async fn requests_wait_from_stage_to_commit_only_and_go_on_after_a_failure() {
    let cx = testing::running();
    let node = fake::insert(&cx, "a", Memory::new(512)).await;
    let error = run(&cx, vec![Box::new(Asks { node: node.clone() })]).await;
    assert_eq!(error.unwrap_err().desc, "held");
    node.read(0, 1).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_hangs_makes_the_transaction_fail_and_the_others_go_on() {
    let (cx, log) = (testing::running(), Log::default());
    fake::disk(&cx, "a", &[], &log).await;
    let options = NullOptions {
        size: 512,
        read_zeroes: true,
        latency_ns: 3_600_000_000_000,
    };
    let hangs = fake::insert(&cx, "hangs", Arc::new(Null::new(&options))).await;
    let mut read = hangs.read(0, 512);
    assert!((&mut read).now_or_never().is_none());
    let asks = Box::new(Asks {
        node: hangs.clone(),
    });
    let result = run(&cx, vec![create("a", "x"), asks]).await;
    assert_eq!(
        result.unwrap_err().desc,
        "Device 'hangs' has not finished its requests within 10 s"
    );
    let a = cx.commit(|control| lookup::node(&control.graph, "a")).await;
    a.unwrap().read(0, 1).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_hangs_while_it_is_staged_is_not_waited_for() {
    let (cx, log) = (testing::running(), Log::default());
    let actions = vec![
        recorder("a", Fate::Works, &log),
        recorder("b", Fate::HangsInStage, &log),
    ];
    let error = run(&cx, actions).await.unwrap_err();
    assert_eq!(
        error.desc,
        "A disk of the transaction has not answered within 10 s"
    );
    let log = log.take();
    assert!(
        log.ends_with("stage a, stage b, abort b, abort a, drop a, drop b"),
        "{log}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_hangs_in_its_switch_is_taken_back_with_the_others() {
    let (error, log) = with_faults(&[Fault::CommitHangs]).await;
    assert_eq!(
        error,
        "Failed to create snapshot 'x' on device 'b': the disk has not answered within 10 s"
    );
    assert!(
        log.ends_with(&format!("commit a, commit c, {END}")),
        "{log}"
    );
}

/// Puts a node on what a device means, as a snapshot into a new layer does.
struct Covers {
    device: &'static str,
    above: Arc<Node>,
    below: Option<Arc<Node>>,
}

impl Action for Covers {
    fn resolve(&mut self, control: &mut Control, plan: &mut Plan) -> Result<(), QmpError> {
        self.below = Some(plan.device(&control.graph, self.device)?);
        Ok(())
    }

    fn enter<'a>(
        &'a mut self,
        _: &'a Preparing,
        plan: &'a mut Plan,
    ) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(async {
            plan.lead(self.below.as_ref().unwrap(), &self.above, WayBack::Open);
            Ok(())
        })
    }
}

#[tokio::test]
async fn a_drive_is_what_the_actions_before_have_made_of_it_and_a_node_stays_itself() {
    let (cx, log) = (testing::running(), Log::default());
    for name in ["bottom", "middle", "top"] {
        fake::disk(&cx, name, &[], &log).await;
    }
    let node = |name: &'static str| {
        let found = cx.commit(move |control| lookup::node(&control.graph, name));
        found.map(Result::unwrap)
    };
    let bottom = node("bottom").await;
    let added = cx.commit(move |control| {
        let drive = NewDrive::new("drive", Some(bottom));
        control.graph.add_drive(drive).map_err(lookup::from_engine)
    });
    added.await.unwrap();
    let cover = |above| -> Box<dyn Action> {
        Box::new(Covers {
            device: "drive",
            above,
            below: None,
        })
    };
    let taken = run(
        &cx,
        vec![
            create("drive", "1"),
            cover(node("middle").await),
            create("drive", "2"),
            cover(node("top").await),
            create("drive", "3"),
        ],
    )
    .await;
    taken.unwrap();
    let log_of = log.take();
    for taken in [
        "create 1 of bottom",
        "create 2 of middle",
        "create 3 of top",
    ] {
        assert!(log_of.contains(taken), "{log_of}");
    }
    let covered = vec![cover(node("middle").await), create("bottom", "1")];
    let error = run(&cx, covered).await.unwrap_err();
    assert_eq!(error.desc, "Need a root block node");
}
