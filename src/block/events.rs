//! What happens to nodes and drives by itself, on its way up: plain data in a bounded channel, for the owner of the graph.
//!
//! ```text
//!   driver ── Reporter (knows the node's name) ──> channel ──> Receiver: whoever owns the graph
//! ```
//!
//! Reporting never waits and never fails: it is done in the middle of guests' requests. What does not fit into the channel
//! is lost, and the log says so.

use std::fmt;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::limits::MAX_WAITING_EVENTS;

/// Something that has happened to a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeEvent {
    /// The node's name, given or made up; the drive's id for what happens to a drive.
    pub node: String,
    /// What it was.
    pub what: Happening,
}

/// What can happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happening {
    /// Damage was found in an image.
    ImageCorrupted(Corruption),
    /// Requests of a drive's guests have failed; the drive has the details.
    GuestErrors,
}

/// Damage of an image. Of each image the first that is harmless for now is reported, and the first that is not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corruption {
    /// What is wrong, as a sentence without a dot.
    pub message: String,
    /// The bytes of the image's file that a request would have reached, where one did.
    pub place: Option<HostBytes>,
    /// The image takes no more changes and says in its header that it needs a repair.
    pub fatal: bool,
}

/// Bytes of an image's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostBytes {
    /// Where they begin.
    pub offset: u64,
    /// How many they are.
    pub len: u64,
}

/// A channel for events of all nodes of a graph.
pub fn channel() -> (EventSink, mpsc::Receiver<NodeEvent>) {
    let (sender, receiver) = mpsc::channel(MAX_WAITING_EVENTS);
    (EventSink(Some(sender)), receiver)
}

/// Where events go; without a channel, nowhere. Clones are the same place.
#[derive(Debug, Clone, Default)]
pub struct EventSink(Option<mpsc::Sender<NodeEvent>>);

impl EventSink {
    /// What a node's driver reports to.
    pub fn reporter(&self, node: &str) -> Reporter {
        Reporter {
            node: node.into(),
            sink: self.clone(),
        }
    }
}

/// Reports what happens to one node. The default reports to nobody.
#[derive(Clone, Default)]
pub struct Reporter {
    node: Arc<str>,
    sink: EventSink,
}

impl Reporter {
    /// The node's name; empty for a driver that is no node.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Reports it. Never waits.
    pub fn report(&self, what: Happening) {
        let Some(sender) = &self.sink.0 else {
            return;
        };
        let event = NodeEvent {
            node: self.node.to_string(),
            what,
        };
        match sender.try_send(event) {
            // Nobody listens any more at the end of the process.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => {}
            Err(mpsc::error::TrySendError::Full(event)) => {
                log::error!("an event is lost, too many are waiting: {event:?}");
            }
        }
    }
}

impl fmt::Debug for Reporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reporter").field(&self.node).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corrupted(message: &str) -> Happening {
        Happening::ImageCorrupted(Corruption {
            message: message.to_owned(),
            place: None,
            fatal: false,
        })
    }

    #[test]
    fn events_arrive_in_order_with_the_nodes_name_until_the_channel_is_full() {
        let (sink, mut events) = channel();
        let (a, b) = (sink.reporter("a"), sink.reporter("b"));
        a.report(corrupted("first"));
        for _ in 0..2 * MAX_WAITING_EVENTS {
            b.report(corrupted("more"));
        }
        let first = events.try_recv().unwrap();
        assert_eq!((&*first.node, first.what), ("a", corrupted("first")));
        let mut rest = 0;
        while let Ok(event) = events.try_recv() {
            assert_eq!(event.node, "b");
            rest += 1;
        }
        assert_eq!(rest, MAX_WAITING_EVENTS - 1);
        drop(events);
        a.report(corrupted("heard by nobody"));
        Reporter::default().report(corrupted("heard by nobody"));
    }
}
