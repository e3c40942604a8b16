//! The loop with commands and handlers from a test instead of from sockets.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use block::driver::{Requests, WriteFlags};
use block::graph::{Behaviour, ErrorPolicy, NewDrive, Node, NodeName};
use block::io::Data;
use block::protocols::memory::{Memory, OpKind};
use futures_util::future::join_all;
use qapi::rt::Object;
use serde_json::json;
use tokio::time::timeout;

use super::*;
use crate::commands::{self, Turn};
use crate::daemon::service::DaemonService;
use crate::daemon::testing::parts;
use crate::monitor::{Request, Service, Session};

/// Longer than anything takes that does not wait.
const PATIENCE: Duration = Duration::from_secs(30);

fn request(name: &str) -> Request {
    Request {
        name: name.to_owned(),
        arguments: Object::new(),
    }
}

/// Answers a command of a client of its own.
async fn execute(service: &DaemonService, name: &str, arguments: Value) -> Result<Value, QmpError> {
    let Value::Object(arguments) = arguments else {
        panic!("the arguments of {name} are no object");
    };
    let request = Request {
        name: name.to_owned(),
        arguments,
    };
    service.execute(request, &Session::new(&[])).await
}

/// Puts a disk into the graph that is in memory.
async fn insert(cx: &Cx, name: &str, memory: &Arc<Memory>) -> Arc<Node> {
    let name = NodeName::given(name).unwrap();
    let node = Node::new(name, memory.clone(), Behaviour::default(), Vec::new());
    let opened = vec![node.clone()].into();
    let inserted = cx.commit(|control| Ok(control.graph.insert(opened).unwrap()));
    inserted.await.unwrap();
    node
}

/// A loop whose drive `d` is a disk in memory.
async fn with_drive(memory: Arc<Memory>) -> (Arc<DaemonService>, Cx, Arc<Memory>) {
    let (control_loop, service, cx) = parts();
    tokio::spawn(control_loop.run(std::future::ready(Ok(()))));
    let root = insert(&cx, "disk", &memory).await;
    let drive = NewDrive {
        id: "d".to_owned(),
        root: Some(root),
        policy: ErrorPolicy::default(),
    };
    let added = cx.commit(|control| {
        let added = control.graph.add_drive(drive);
        added.map_err(commands::from_engine)
    });
    added.await.unwrap();
    (service, cx, memory)
}

#[tokio::test]
async fn queries_are_answered_beside_a_command_that_waits_and_others_are_not() {
    let (service, _cx, memory) = with_drive(Memory::new(1 << 20)).await;
    memory.hold(OpKind::Flush);
    let stopping = async {
        let stopped = execute(&service, "stop", json!({})).await;
        assert!(stopped.is_ok(), "{stopped:?}");
    };
    let others = async {
        memory.wait_held(1).await;
        for name in qapi::COMMAND_NAMES {
            if commands::turn(name) == Turn::Looks {
                let answer = timeout(PATIENCE, execute(&service, name, json!({})));
                assert!(answer.await.unwrap().is_ok(), "{name}");
            }
        }
        // What the command has done so far is so.
        let status = execute(&service, "query-status", json!({})).await.unwrap();
        assert_eq!(status["status"], "paused");
        let mut going_on = std::pin::pin!(execute(&service, "cont", json!({})));
        let waits = timeout(Duration::from_millis(20), &mut going_on).await;
        assert!(waits.is_err(), "it does not wait: {waits:?}");
        memory.release_all();
        going_on.await.unwrap();
    };
    tokio::join!(stopping, others);
    let status = execute(&service, "query-status", json!({})).await.unwrap();
    assert_eq!(status["status"], "running");
}

#[tokio::test]
async fn queries_are_answered_until_a_daemon_that_is_to_end_has_ended() {
    let (service, cx, memory) = with_drive(Memory::new(1 << 20)).await;
    memory.hold(OpKind::Flush);
    let stopping = async { execute(&service, "stop", json!({})).await.unwrap() };
    let others = async {
        memory.wait_held(1).await;
        let ending = cx.commit(|control| {
            control.stop(StopCause::Signal);
            Ok(())
        });
        ending.await.unwrap();
        let answer = execute(&service, "query-status", json!({})).await;
        assert!(answer.is_ok(), "{answer:?}");
        memory.release_all();
    };
    tokio::join!(stopping, others);
    while execute(&service, "query-version", json!({})).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let late = execute(&service, "query-version", json!({})).await;
    assert_eq!(late, Err(crate::daemon::cx::ending()));
}

#[tokio::test]
async fn a_query_can_change_nothing() {
    let (_service, cx, _memory) = with_drive(Memory::new(1 << 20)).await;
    let query = cx.as_query();
    let refused = query.commit(|control| {
        control.stop_machine();
        Ok(())
    });
    assert_eq!(refused.await, Err(internal_error()));
    let is_paused = query.look(|control| control.graph.machine().state());
    assert_eq!(is_paused.await, Ok(block::graph::RunState::Running));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neither_queries_nor_commands_keep_the_others_waiting() {
    let (service, _cx, _memory) = with_drive(Memory::new(1 << 20)).await;
    for (many, few) in [("query-status", "cont"), ("cont", "query-status")] {
        let ended = Arc::new(AtomicUsize::new(0));
        let busy = (0..64).map(|_| {
            let (service, ended) = (service.clone(), ended.clone());
            tokio::spawn(async move {
                while ended.load(Ordering::SeqCst) == 0 {
                    execute(&service, many, json!({})).await.unwrap();
                }
            })
        });
        let busy: Vec<_> = busy.collect();
        let patient = async {
            for _ in 0..100 {
                execute(&service, few, json!({})).await.unwrap();
            }
        };
        let done = timeout(PATIENCE, patient).await;
        ended.store(1, Ordering::SeqCst);
        assert!(done.is_ok(), "{many} lets no {few} through");
        join_all(busy).await;
    }
}

#[tokio::test]
async fn a_job_whose_target_hangs_can_be_cancelled_beside_a_command_that_waits_for_guests() {
    // More than may wait for the target.
    const CLUSTERS: u64 = 1100;
    let content = vec![1; (CLUSTERS as usize) << 16];
    let (service, cx, _memory) = with_drive(Memory::with_content(&content)).await;
    let target = Memory::new(CLUSTERS << 16);
    insert(&cx, "target", &target).await;
    target.hold(OpKind::Write);
    let backup = json!({"job-id": "j", "device": "d", "target": "target", "sync": "full"});
    execute(&service, "blockdev-backup", backup).await.unwrap();
    let guest = cx.look(|control| control.graph.drive("d").unwrap().client());
    let guest = guest.await.unwrap();
    let written = Arc::new(AtomicUsize::new(0));
    let counting = written.clone();
    let writing = tokio::spawn(async move {
        for cluster in 0..CLUSTERS {
            let data = Data::from(vec![2; 512]);
            let write = guest.write(cluster << 16, data, WriteFlags::default());
            write.await.unwrap();
            counting.fetch_add(1, Ordering::SeqCst);
        }
    });
    let mut before = usize::MAX;
    while std::mem::replace(&mut before, written.load(Ordering::SeqCst)) != before {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(!writing.is_finished(), "guests do not wait for the target");
    let mut stopping = std::pin::pin!(execute(&service, "stop", json!({})));
    let waits = timeout(Duration::from_millis(50), &mut stopping).await;
    assert!(waits.is_err(), "it does not wait for guests: {waits:?}");
    let paused = execute(&service, "query-status", json!({})).await.unwrap();
    assert_eq!(paused["running"], false);
    let cancelled = execute(&service, "block-job-cancel", json!({"device": "j"})).await;
    cancelled.unwrap();
    timeout(PATIENCE, stopping).await.unwrap().unwrap();
    target.release_all();
    execute(&service, "cont", json!({})).await.unwrap();
    timeout(PATIENCE, writing).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_panic_in_a_commit_or_a_handler_is_an_error_and_the_loop_goes_on() {
    let (control_loop, service, cx) = parts();
    let running = tokio::spawn(control_loop.run(async move {
        let failed = cx.commit::<(), _>(|_| panic!("as the test wants it")).await;
        assert_eq!(failed, Err(internal_error()));
        // The next commit finds the loop alive.
        cx.commit(|control| Ok(control.graph.drives().len()))
            .await?;
        Ok(())
    }));
    let session = Session::new(&[]);
    let nodes = service.execute(request("query-block"), &session).await;
    assert_eq!(nodes, Ok(Value::Array(Vec::new())));
    let quit = service.execute(request("quit"), &session).await;
    assert!(quit.is_ok());
    assert_eq!(running.await.unwrap().startup, Ok(()));

    let (control_loop, _service, _cx) = parts();
    let finished = control_loop
        .run(async { panic!("as the test wants it") })
        .await;
    assert_eq!(finished.startup, Err(internal_error()));
}

#[tokio::test]
async fn commands_wait_for_the_start_and_for_each_other() {
    let (control_loop, service, cx) = parts();
    let started = Arc::new(AtomicUsize::new(0));
    let ready = started.clone();
    let running = tokio::spawn(control_loop.run(async move {
        tokio::time::sleep(Duration::from_millis(50)).await;
        cx.commit(|_| Ok(())).await?;
        ready.store(1, Ordering::SeqCst);
        Ok(())
    }));
    let session = Session::new(&[]);
    let answers = futures_util::future::join_all((0..5).map(|_| async {
        let answer = service.execute(request("query-version"), &session).await;
        (answer.is_ok(), started.load(Ordering::SeqCst))
    }));
    assert_eq!(answers.await, [(true, 1); 5]);
    service.execute(request("quit"), &session).await.unwrap();
    drop(running.await.unwrap());
    // Nobody is there any more; a client must get an answer all the same.
    let late = service.execute(request("query-version"), &session).await;
    assert_eq!(late, Err(crate::daemon::cx::ending()));
}

#[tokio::test]
async fn a_start_that_fails_ends_the_loop_with_its_message() {
    let (control_loop, _service, _cx) = parts();
    let finished = control_loop
        .run(async { Err(QmpError::generic("--drive x: no")) })
        .await;
    assert_eq!(finished.startup, Err(QmpError::generic("--drive x: no")));
    assert_eq!(finished.control.stop_cause(), Some(StopCause::StartFailed));
}
