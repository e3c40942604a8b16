//! The wire form of events.

use std::time::{SystemTime, UNIX_EPOCH};

use super::{Object, Value};

/// When something happened. Both parts are -1 if the clock cannot tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timestamp {
    /// Seconds since 1970 (UTC).
    pub seconds: i64,
    /// Microseconds of that second.
    pub microseconds: i64,
}

impl Timestamp {
    /// The present, by the clock of the host.
    pub fn now() -> Self {
        const UNKNOWN: Timestamp = Timestamp {
            seconds: -1,
            microseconds: -1,
        };
        let Ok(since) = SystemTime::now().duration_since(UNIX_EPOCH) else {
            return UNKNOWN;
        };
        i64::try_from(since.as_secs()).map_or(UNKNOWN, |seconds| Timestamp {
            seconds,
            microseconds: i64::from(since.subsec_micros()),
        })
    }
}

/// `{"event": .., "data": .., "timestamp": ..}`; without `data` if the event has none.
pub fn message(name: &str, data: Object, at: Timestamp) -> Value {
    let mut message = Object::new();
    message.insert("event".to_owned(), Value::from(name));
    if !data.is_empty() {
        message.insert("data".to_owned(), Value::Object(data));
    }
    let mut timestamp = Object::new();
    timestamp.insert("seconds".to_owned(), Value::from(at.seconds));
    timestamp.insert("microseconds".to_owned(), Value::from(at.microseconds));
    message.insert("timestamp".to_owned(), Value::Object(timestamp));
    Value::Object(message)
}
