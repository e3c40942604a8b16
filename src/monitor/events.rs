//! Events: broadcast to every negotiated session, with QEMU's rate limits.
//!
//! ```text
//! emit ---- not limited, or its window is closed ----> every outbox
//!    \                                                     ^
//!     +--- window open: keep as the last one --- timer ----+   (the window opens again)
//! ```

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

use qapi::rt::json::Style;
use qapi::rt::{Object, Value};

use super::outbox::Outbox;
use super::wire;
use crate::limits;

/// Something that happened, as clients see it.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The wire name.
    pub name: &'static str,
    /// The data; left out on the wire if empty.
    pub data: Object,
}

/// A kind of event that is sent at most once per [`limits::QMP_EVENT_WINDOW`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimit {
    /// The wire name.
    pub event: &'static str,
    /// The member of the data whose values are limited each on its own; `None` limits the kind.
    pub key: Option<&'static str>,
}

/// The kinds that QEMU limits, modern and old.
pub const RATE_LIMITS: &[RateLimit] = &[
    limit("RTC_CHANGE", None),
    limit("BALLOON_CHANGE", None),
    limit("WATCHDOG", None),
    limit("HV_BALLOON_STATUS_REPORT", None),
    limit("QUORUM_FAILURE", None),
    limit("QUORUM_REPORT_BAD", Some("node-name")),
    limit("BLOCK_IO_ERROR", Some("qom-path")),
    limit("VSERPORT_CHANGE", Some("id")),
    limit("MEMORY_DEVICE_SIZE_CHANGE", Some("qom-path")),
];

const fn limit(event: &'static str, key: Option<&'static str>) -> RateLimit {
    RateLimit { event, key }
}

/// The way of events to the clients. Clones are the same way.
#[derive(Debug, Clone)]
pub struct Events {
    hub: Arc<Hub>,
}

#[derive(Debug)]
struct Hub {
    limits: &'static [RateLimit],
    state: Mutex<State>,
    /// A window has opened: the timer must look again.
    opened: Notify,
}

#[derive(Debug, Default)]
struct State {
    // Locked while outboxes are pushed to, so that all clients see the same order. Outboxes lock
    // nothing else.
    outboxes: Vec<Arc<Outbox>>,
    /// Events that every new client gets until one has seen them.
    kept: Option<Kept>,
    windows: HashMap<(&'static str, String), Window>,
}

#[derive(Debug)]
struct Window {
    ends: Instant,
    /// The last event that came while the window was open.
    last: Option<Stamped>,
}

/// Events that are sent until they have been seen.
struct Kept {
    events: Vec<Stamped>,
    /// Told when they have.
    seen: Box<dyn FnOnce() + Send>,
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.events).finish()
    }
}

/// An event and when it happened, which a delay does not change.
#[derive(Debug)]
struct Stamped {
    event: Event,
    at: SystemTime,
}

impl Events {
    /// A way without clients, with these kinds limited; see [`RATE_LIMITS`].
    pub fn new(limits: &'static [RateLimit]) -> Events {
        Events {
            hub: Arc::new(Hub {
                limits,
                state: Mutex::default(),
                opened: Notify::new(),
            }),
        }
    }

    /// Sends an event to every session that has ended its negotiation. Never waits.
    pub fn emit(&self, event: Event) {
        let key = self.hub.window_of(&event);
        let mut state = self.hub.lock();
        let stamped = Stamped {
            event,
            at: SystemTime::now(),
        };
        let Some(key) = key else {
            state.send(&stamped);
            return;
        };
        if let Some(window) = state.windows.get_mut(&key) {
            window.last = Some(stamped);
            return;
        }
        if state.windows.len() < limits::QMP_EVENT_WINDOWS {
            let ends = Instant::now() + limits::QMP_EVENT_WINDOW;
            state.windows.insert(key, Window { ends, last: None });
            self.hub.opened.notify_one();
        }
        state.send(&stamped);
    }

    /// Sends what rate limits held back when its time has come. Never ends: its owner drops it.
    pub(super) async fn run(&self) {
        loop {
            let next = self.hub.lock().windows.values().map(|w| w.ends).min();
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => self.hub.lock().expire(Instant::now()),
                () = self.hub.opened.notified() => {}
            }
        }
    }

    /// Sends events to every client when it has ended its negotiation, until one sends another command behind them: then they have
    /// been seen, and `seen` is called. Called once, before there are clients.
    pub fn keep(&self, events: Vec<Event>, seen: impl FnOnce() + Send + 'static) {
        let at = SystemTime::now();
        let events = events.into_iter().map(|event| Stamped { event, at });
        self.hub.lock().kept = Some(Kept {
            events: events.collect(),
            seen: Box::new(seen),
        });
    }

    /// Delivers events to an outbox until the subscription is dropped.
    pub(super) fn subscribe(&self, outbox: &Arc<Outbox>) -> Subscription {
        let mut state = self.hub.lock();
        state.outboxes.push(Arc::clone(outbox));
        let kept = state.kept.iter().flat_map(|kept| &kept.events);
        for stamped in kept {
            outbox.push_event(stamped.text(outbox.style()));
        }
        Subscription {
            events: self.clone(),
            outbox: Arc::clone(outbox),
            owes: AtomicBool::new(state.kept.is_some()),
        }
    }
}

/// A client's place among those that get events.
#[derive(Debug)]
pub(super) struct Subscription {
    events: Events,
    outbox: Arc<Outbox>,
    /// The client was sent kept events, and has not said anything since.
    owes: AtomicBool,
}

impl Subscription {
    /// The client has sent a command: it goes on behind the events that it got when it came.
    pub(super) fn heard(&self) {
        if !self.owes.swap(false, Ordering::Relaxed) {
            return;
        }
        let kept = self.events.hub.lock().kept.take();
        if let Some(Kept { seen, .. }) = kept {
            seen();
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = self.events.hub.lock();
        state
            .outboxes
            .retain(|other| !Arc::ptr_eq(other, &self.outbox));
    }
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The window an event falls into, if its kind is limited.
    fn window_of(&self, event: &Event) -> Option<(&'static str, String)> {
        let limit = self.limits.iter().find(|limit| limit.event == event.name)?;
        let value = limit.key.and_then(|key| event.data.get(key));
        let value = value.and_then(Value::as_str).unwrap_or_default();
        Some((limit.event, value.to_owned()))
    }
}

impl State {
    fn send(&self, stamped: &Stamped) {
        // Most clients share one style: the text is made once for each.
        let mut compact: Option<Bytes> = None;
        let mut pretty: Option<Bytes> = None;
        for outbox in &self.outboxes {
            let made = match outbox.style() {
                Style::Compact => &mut compact,
                Style::Pretty => &mut pretty,
            };
            let text = made.get_or_insert_with(|| stamped.text(outbox.style()));
            outbox.push_event(text.clone());
        }
    }

    fn expire(&mut self, now: Instant) {
        let mut due = Vec::new();
        self.windows.retain(|_, window| {
            if window.ends > now {
                return true;
            }
            // What was held back goes out, and the window opens again; else it is over.
            match window.last.take() {
                Some(last) => {
                    due.push(last);
                    window.ends = now + limits::QMP_EVENT_WINDOW;
                    true
                }
                None => false,
            }
        });
        due.sort_by_key(|stamped| stamped.at);
        for stamped in &due {
            self.send(stamped);
        }
    }
}

impl Stamped {
    fn text(&self, style: Style) -> Bytes {
        let (seconds, microseconds) = match self.at.duration_since(UNIX_EPOCH) {
            Ok(since) => (
                i64::try_from(since.as_secs()).unwrap_or(-1),
                i64::from(since.subsec_micros()),
            ),
            // A clock before 1970 is a failed clock; the protocol says so with -1.
            Err(_) => (-1, -1),
        };
        let timestamp = Object::from_iter([
            ("seconds".to_owned(), Value::from(seconds)),
            ("microseconds".to_owned(), Value::from(microseconds)),
        ]);
        let mut message = Object::new();
        message.insert("timestamp".to_owned(), Value::Object(timestamp));
        message.insert("event".to_owned(), Value::from(self.event.name));
        if !self.event.data.is_empty() {
            message.insert("data".to_owned(), Value::Object(self.event.data.clone()));
        }
        wire::line(&message, style)
    }
}

#[cfg(test)]
mod tests;
