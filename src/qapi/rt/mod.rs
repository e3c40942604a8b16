//! The runtime of the generated code.
//!
//! * [`error`]: what a command answers when it fails
//! * [`dispatch`]: the shape of the command table
//! * [`json`]: the reader and the writer of the wire

pub mod dispatch;
pub mod error;
pub mod json;

pub use error::{ErrorClass, QmpError};

/// A JSON value of the wire. Objects keep the client's key order.
pub use serde_json::Value;

/// A JSON object of the wire.
pub type Object = serde_json::Map<String, Value>;
