//! The loop with commands and handlers from a test instead of from sockets.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use qapi::rt::Object;

use super::*;
use crate::daemon::testing::parts;
use crate::monitor::{Request, Service, Session};

fn request(name: &str) -> Request {
    Request {
        name: name.to_owned(),
        arguments: Object::new(),
    }
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
