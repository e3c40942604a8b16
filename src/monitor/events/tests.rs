//! Who gets which event, and when, with paused time.

use std::time::Duration;

use super::*;
use crate::monitor::Session;

const LIMITS: &[RateLimit] = &[limit("LIMITED", None), limit("KEYED", Some("id"))];

fn event(name: &'static str, members: &[(&str, &str)]) -> Event {
    let data = members.iter();
    Event {
        name,
        data: data
            .map(|(k, v)| ((*k).to_owned(), Value::from(*v)))
            .collect(),
    }
}

/// What a subscribed client has been sent since the last look, without timestamps.
async fn seen(outbox: &Outbox) -> Vec<String> {
    let mut lines = Vec::new();
    while let Ok(Some(batch)) = tokio::time::timeout(Duration::ZERO, outbox.batch()).await {
        outbox.wrote(batch.len());
        let text = String::from_utf8(batch.to_vec()).unwrap();
        lines.extend(text.lines().map(|line| {
            let (_, event) = line.split_once("}, ").unwrap();
            event.trim_end_matches('}').to_owned()
        }));
    }
    lines
}

fn client(events: &Events) -> (Arc<Outbox>, Subscription) {
    let outbox = Arc::new(Outbox::new(Session::new(&[]), Style::Compact));
    let subscription = events.subscribe(&outbox);
    (outbox, subscription)
}

#[tokio::test(start_paused = true)]
async fn the_first_goes_at_once_and_the_last_of_each_window_when_it_ends() {
    let events = Events::new(LIMITS);
    let (outbox, _subscription) = client(&events);
    let runner = events.clone();
    let timer = tokio::spawn(async move { runner.run().await });
    for n in ["1", "2", "3"] {
        events.emit(event("LIMITED", &[("n", n)]));
    }
    assert_eq!(
        seen(&outbox).await,
        [r#""event": "LIMITED", "data": {"n": "1""#]
    );
    tokio::time::sleep(Duration::from_millis(990)).await;
    assert!(seen(&outbox).await.is_empty());
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(
        seen(&outbox).await,
        [r#""event": "LIMITED", "data": {"n": "3""#]
    );
    // The delayed one has opened a window of its own.
    tokio::time::sleep(Duration::from_millis(500)).await;
    events.emit(event("LIMITED", &[("n", "4")]));
    assert!(seen(&outbox).await.is_empty());
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(
        seen(&outbox).await,
        [r#""event": "LIMITED", "data": {"n": "4""#]
    );
    // After a window without events the next goes at once again.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert!(events.hub.lock().windows.is_empty());
    events.emit(event("LIMITED", &[("n", "5")]));
    assert_eq!(seen(&outbox).await.len(), 1);
    timer.abort();
}

#[tokio::test(start_paused = true)]
async fn keyed_kinds_are_limited_per_value_and_others_not_at_all() {
    let events = Events::new(LIMITS);
    let (outbox, _subscription) = client(&events);
    for id in ["a", "b", "a", "b"] {
        events.emit(event("KEYED", &[("id", id)]));
        events.emit(event("FREE", &[]));
    }
    let seen = seen(&outbox).await;
    let count = |text: &str| seen.iter().filter(|line| line.contains(text)).count();
    assert_eq!((count("KEYED"), count("FREE")), (2, 4));
    assert!(
        seen.contains(&r#""event": "FREE""#.to_owned()),
        "no empty data: {seen:?}"
    );
}

#[tokio::test]
async fn who_left_gets_nothing() {
    let events = Events::new(LIMITS);
    let (outbox, subscription) = client(&events);
    drop(subscription);
    events.emit(event("FREE", &[]));
    assert!(seen(&outbox).await.is_empty());
    assert!(events.hub.lock().outboxes.is_empty());
}

#[tokio::test(start_paused = true)]
async fn kept_events_go_to_every_client_until_one_has_said_something_behind_them() {
    let events = Events::new(LIMITS);
    let told = Arc::new(AtomicBool::new(false));
    let tell = told.clone();
    events.keep(vec![event("KEPT", &[])], move || {
        tell.store(true, Ordering::Relaxed);
    });
    let (first, silent) = client(&events);
    let (second, talks) = client(&events);
    for outbox in [&first, &second] {
        assert_eq!(seen(outbox).await, [r#""event": "KEPT""#]);
    }
    // One that has gone without a word has not seen it.
    drop(silent);
    let (third, _waits) = client(&events);
    assert_eq!(seen(&third).await, [r#""event": "KEPT""#]);
    assert!(!told.load(Ordering::Relaxed));
    talks.heard();
    assert!(told.load(Ordering::Relaxed));
    let (late, _late) = client(&events);
    assert!(seen(&late).await.is_empty());
}
