//! The JSON of QMP: a streaming reader of QEMU's dialect and a writer of its output form.
//!
//! ```text
//! bytes in any pieces -> lexer -> tokens -> builder -> Result<Value, JsonError>, one per message
//! ```
//!
//! The dialect is RFC 8259 with three differences: strings may stand in single quotes (and `\'` is
//! an escape), messages need no separator, and noncharacters are refused. A broken message costs
//! one error; then the reader finds its feet again as QEMU's does, so that a client which sends
//! garbage still gets an answer to its next command. Nothing here recurses: input cannot drive the
//! stack.

mod builder;
mod decoder;
mod lexer;
pub mod limits;
#[cfg(test)]
mod tests;
mod text;
mod writer;

pub use decoder::{Decoder, JsonError};
pub use limits::Limits;
pub use writer::{Style, write};
