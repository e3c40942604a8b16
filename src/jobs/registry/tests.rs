//! Jobs with their tasks: what a client sees of work that is held, throttled, stopped by errors and cancelled.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use block::driver::BoxFuture;
use block::graph::OnError;

use super::*;
use crate::jobs::Verb;

/// Does what the test wants, and writes down what becomes of it.
struct Script {
    work: Work,
    log: Arc<Mutex<Vec<&'static str>>>,
}

enum Work {
    /// So many pieces of 1 MiB.
    Pieces(u64),
    /// As before, of which the third fails with this error, once.
    FailsOnce(ErrorKind, OnError),
    Panics,
    Forever,
    /// Two parts at once: one that takes as long as the test wants, one that begins and ends all the time.
    Parts(Arc<tokio::sync::Notify>),
}

const PIECE: u64 = 1 << 20;

impl Script {
    fn note(&self, what: &'static str) {
        self.log.lock().unwrap().push(what);
    }

    async fn parts(cx: &JobContext, enough: &tokio::sync::Notify) {
        let long = async {
            cx.begin(0).await;
            enough.notified().await;
            cx.end();
        };
        let short = async {
            loop {
                cx.begin(0).await;
                tokio::task::yield_now().await;
                cx.end();
            }
        };
        tokio::join!(long, short);
    }

    async fn pieces(cx: &JobContext, count: u64) {
        cx.set_remaining(count * PIECE);
        for _ in 0..count {
            cx.throttle(PIECE).await;
            cx.advance(PIECE);
        }
    }
}

impl JobDriver for Script {
    fn run<'a>(&'a mut self, cx: &'a JobContext) -> BoxFuture<'a, Result<()>> {
        Box::pin(async {
            match self.work {
                Work::Pieces(count) => Script::pieces(cx, count).await,
                Work::FailsOnce(kind, policy) => {
                    Script::pieces(cx, 2).await;
                    cx.on_error(Operation::Write, policy, Error::new(kind, "no"))
                        .await?;
                    Script::pieces(cx, 1).await;
                }
                Work::Panics => panic!("as the test wants it"),
                Work::Forever => std::future::pending().await,
                Work::Parts(ref enough) => Script::parts(cx, enough).await,
            }
            Ok(())
        })
    }

    fn commit(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async { self.note("commit") })
    }

    fn abort(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async { self.note("abort") })
    }

    fn clean(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async { self.note("clean") })
    }
}

struct NoGraph;

impl GraphAccess for NoGraph {
    fn change(
        &self,
        _: Vec<Arc<block::graph::Node>>,
        _: crate::jobs::GraphChange,
    ) -> BoxFuture<'_, Vec<block::graph::Removed>> {
        Box::pin(std::future::ready(Vec::new()))
    }
}

struct World {
    jobs: Jobs,
    reports: mpsc::UnboundedReceiver<JobReport>,
    log: Arc<Mutex<Vec<&'static str>>>,
    started: AtomicUsize,
}

impl World {
    fn new() -> Self {
        let (sender, reports) = mpsc::unbounded_channel();
        World {
            jobs: Jobs::new(sender, Arc::new(NoGraph)),
            reports,
            log: Arc::default(),
            started: AtomicUsize::new(0),
        }
    }

    /// Starts a job that stays until it is dismissed.
    fn start(&mut self, work: Work, speed: u64) -> JobKey {
        let id = format!("job{}", self.started.fetch_add(1, Ordering::Relaxed));
        let spec = JobSpec {
            id,
            kind: JobKind::Backup,
            speed,
            len: 0,
            auto_finalize: true,
            auto_dismiss: false,
        };
        let key = self.jobs.create(spec, None, Audience::Clients).unwrap();
        let log = self.log.clone();
        self.jobs.start(key, Box::new(Script { work, log }));
        key
    }

    /// Lives until the first job is in this state.
    async fn until(&mut self, status: Status) -> JobInfo {
        loop {
            let info = self.jobs.list().remove(0);
            if info.status == status {
                return info;
            }
            let report = self.reports.recv().await.unwrap();
            self.jobs.apply(report);
        }
    }

    /// Lives for so long.
    async fn pass(&mut self, time: Duration) {
        let end = tokio::time::Instant::now() + time;
        while let Ok(report) = tokio::time::timeout_at(end, self.reports.recv()).await {
            self.jobs.apply(report.unwrap());
        }
    }

    fn told(&mut self) -> Vec<String> {
        let events = self.jobs.take_events().into_iter();
        let short = events.map(|event| match event.notice {
            Notice::Status(status) => status.name().to_owned(),
            notice => format!("{notice:?} {}", event.progress.offset / PIECE),
        });
        short.collect()
    }

    fn log(&self) -> String {
        self.log.lock().unwrap().join(", ")
    }
}

#[tokio::test]
async fn a_job_does_its_work_and_is_dismissed() {
    let mut world = World::new();
    let key = world.start(Work::Pieces(5), 0);
    let info = world.until(Status::Concluded).await;
    let progress = Progress {
        offset: 5 * PIECE,
        len: 5 * PIECE,
        speed: 0,
    };
    assert_eq!((info.progress, info.error), (progress, None));
    assert_eq!(
        world.told(),
        [
            "created",
            "running",
            "waiting",
            "pending",
            "Completed(None) 5",
            "concluded"
        ]
    );
    assert_eq!(world.log(), "commit, clean");
    world.jobs.dismiss(key).unwrap();
    assert!(world.jobs.is_empty());
    assert_eq!(world.told(), ["null"]);
}

#[tokio::test]
async fn a_throttled_job_is_held_and_cancelled_at_once() {
    let mut world = World::new();
    // A piece takes some twelve days.
    let key = world.start(Work::Pieces(5), 1);
    world.pass(Duration::from_millis(20)).await;
    let info = world.jobs.list().remove(0);
    assert_eq!((info.progress.offset, info.busy), (PIECE, false));
    world.jobs.pause(key).unwrap();
    assert!(info.rate > 0);
    let info = world.until(Status::Paused).await;
    assert!(info.paused);
    assert_eq!((info.rate, info.time_left), (0, None));
    world.jobs.resume(key).unwrap();
    world.until(Status::Running).await;
    world.jobs.cancel(key, Cancel::Soft).unwrap();
    let info = world.until(Status::Concluded).await;
    assert_eq!(info.error.as_deref(), Some("Operation canceled"));
    assert_eq!(
        world.told(),
        [
            "created",
            "running",
            "paused",
            "running",
            "aborting",
            "Cancelled 1",
            "concluded"
        ]
    );
    assert_eq!(world.log(), "abort, clean");
}

#[tokio::test]
async fn a_new_speed_counts_at_once() {
    let mut world = World::new();
    let key = world.start(Work::Pieces(5), 1);
    world.pass(Duration::from_millis(20)).await;
    world.jobs.set_speed(key, 0).unwrap();
    assert_eq!(
        world.until(Status::Concluded).await.progress.offset,
        5 * PIECE
    );
    let error = world.jobs.set_speed(key, 1).unwrap_err();
    let text = "Job 'job0' in state 'concluded' cannot accept command verb 'set-speed'";
    assert_eq!(error.message(), text);
    let key = world.start(Work::Forever, 0);
    let error = world.jobs.set_speed(key, -1).unwrap_err();
    assert_eq!(
        error.message(),
        "Parameter 'speed' expects a non-negative value"
    );
    assert!(!Status::Concluded.accepts(Verb::SetSpeed));
}

#[tokio::test]
async fn an_error_is_what_the_policy_makes_of_it() {
    let full = ErrorKind::NoSpace;
    for (kind, policy) in [
        (ErrorKind::Io, OnError::Report),
        (full, OnError::Report),
        (ErrorKind::Io, OnError::Enospc),
    ] {
        let mut world = World::new();
        world.start(Work::FailsOnce(kind, policy), 0);
        let info = world.until(Status::Concluded).await;
        assert_eq!(info.error.as_deref(), Some("no"), "{policy:?}");
        assert!(world.told().contains(&"Error(Write, Report) 2".to_owned()));
    }
    for (kind, policy, status) in [
        (full, OnError::Enospc, IoStatus::NoSpace),
        (full, OnError::Stop, IoStatus::NoSpace),
        (ErrorKind::Io, OnError::Stop, IoStatus::Failed),
    ] {
        let mut world = World::new();
        let key = world.start(Work::FailsOnce(kind, policy), 0);
        let info = world.until(Status::Paused).await;
        assert_eq!((info.io_status, info.progress.offset), (status, 2 * PIECE));
        let error = world.jobs.pause(key).unwrap_err();
        assert_eq!(error.message(), "Job is already paused");
        world.jobs.resume(key).unwrap();
        let info = world.until(Status::Concluded).await;
        assert_eq!((info.error, info.progress.offset), (None, 3 * PIECE));
    }
    let mut world = World::new();
    world.start(Work::FailsOnce(ErrorKind::Io, OnError::Ignore), 0);
    let info = world.until(Status::Concluded).await;
    assert_eq!((info.error, info.progress.offset), (None, 3 * PIECE));
}

#[tokio::test]
async fn a_panic_is_a_failure_of_the_job() {
    let mut world = World::new();
    world.start(Work::Panics, 0);
    let info = world.until(Status::Concluded).await;
    assert!(info.error.unwrap().starts_with("Internal error"));
    assert_eq!(world.log(), "abort, clean");
}

#[tokio::test]
async fn all_jobs_end_with_the_daemon() {
    let mut world = World::new();
    for work in [Work::Forever, Work::Pieces(3), Work::Pieces(0)] {
        world.start(work, 1);
    }
    let held = world.start(Work::Forever, 0);
    world.jobs.pause(held).unwrap();
    let spec = JobSpec {
        id: "made".to_owned(),
        kind: JobKind::Create,
        speed: 0,
        len: 0,
        auto_finalize: false,
        auto_dismiss: true,
    };
    let made = world.jobs.create(spec, None, Audience::Clients).unwrap();
    world.pass(Duration::from_millis(20)).await;
    world.jobs.abandon(made);
    while !world.jobs.is_empty() {
        world.jobs.end_all();
        world.pass(Duration::from_millis(1)).await;
    }
    assert_eq!(world.log().matches("clean").count(), 4);
}

#[tokio::test]
async fn queries_tell_block_jobs_from_others() {
    let mut world = World::new();
    let spec = JobSpec {
        id: "create".to_owned(),
        kind: JobKind::Create,
        speed: 0,
        len: 0,
        auto_finalize: true,
        auto_dismiss: false,
    };
    world.jobs.create(spec, None, Audience::Clients).unwrap();
    assert!(world.jobs.find("create").is_ok());
    let error = world.jobs.find_block_job("create").unwrap_err();
    assert_eq!(error.message(), "Block job 'create' not found");
    assert_eq!(world.jobs.find("x").unwrap_err().message(), "Job not found");
}

#[tokio::test]
async fn a_job_is_paused_when_no_part_of_it_is_under_way() {
    let mut world = World::new();
    let enough = Arc::new(tokio::sync::Notify::new());
    let key = world.start(Work::Parts(enough.clone()), 0);
    world.pass(Duration::from_millis(5)).await;
    world.jobs.pause(key).unwrap();
    world.pass(Duration::from_millis(30)).await;
    let info = world.jobs.list().remove(0);
    assert_eq!((info.status, info.paused), (Status::Running, true));
    enough.notify_one();
    world.until(Status::Paused).await;
    // Let go before it has stopped: nothing is told of it.
    world.jobs.resume(key).unwrap();
    world.jobs.pause(key).unwrap();
    world.jobs.resume(key).unwrap();
    world.pass(Duration::from_millis(5)).await;
    world.jobs.cancel(key, Cancel::Force).unwrap();
    world.until(Status::Concluded).await;
    let told = world.told();
    assert_eq!(
        told[..4],
        ["created", "running", "paused", "running"],
        "{told:?}"
    );
    assert_eq!(told[4], "aborting", "{told:?}");
}

#[test]
fn the_time_left_is_never_said_to_be_over_before_it_is() {
    assert_eq!(time_left(10, 3), Some(4));
    assert_eq!(time_left(1, 1000), Some(1));
    assert_eq!(time_left(0, 3), Some(0));
    assert_eq!(time_left(10, 0), None);
}
