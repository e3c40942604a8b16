//! The runtime of the generated code.
//!
//! * [`error`]: what a command answers when it fails
//! * [`path`]: where a value stands in a request, and the sentences about it
//! * [`decode`]: values into types, in JSON and in `key=value` syntax
//! * [`encode`]: types into values
//! * [`event`]: the wire form of events
//! * [`dispatch`]: the shape of the command table
//! * [`json`]: the reader and the writer of the wire

pub mod decode;
pub mod dispatch;
pub mod encode;
pub mod error;
pub mod event;
pub mod json;
pub mod path;
mod qtype;

pub use error::{ErrorClass, QmpError};
pub use path::Path;
pub use qtype::QType;

/// A JSON value of the wire. Objects keep the client's key order.
pub use serde_json::Value;

/// A JSON object of the wire.
pub type Object = serde_json::Map<String, Value>;
