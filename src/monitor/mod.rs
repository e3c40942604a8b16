//! QMP on sockets: framing, greeting, negotiation, queues, ids and events.
//!
//! The monitor does not know what a command does, nor that disks exist. It turns bytes into
//! [`Request`]s, hands them to a [`Service`] and turns the answers back into bytes.
//!
//! ```text
//!            bytes             Request                     Result<Value, QmpError>
//!  client ----------> reader ----------> queue of 8 ----> Service::execute -------+
//!    ^                  |                                                         |
//!    |                  +--- exec-oob --> Service::execute_oob ---+               |
//!    |    bounded                                                 v               v
//!    +----------------------------- outbox <----------------------+---------------+
//!                                      ^
//!                                      +------ Events::emit, rate limited, to every session
//! ```

mod budget;
mod connection;
mod descriptors;
mod events;
mod outbox;
mod server;
mod service;
mod session;
mod stream;
mod wire;

pub use events::{Event, Events, RATE_LIMITS, RateLimit};
pub use server::Server;
pub use service::{AnswerFuture, CommandInfo, Request, Service};
pub use session::{Capability, Session, SessionId};
