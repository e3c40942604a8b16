//! The NBD server: disks over unix and TCP sockets, as the NBD protocol's specification has it ("fixed newstyle").
//!
//! ```text
//!   NbdServer --owns--> accepting task --owns--> connection task: negotiate, then serve
//!      |                                              |
//!   Registry <-------------- ExportRef ---------------+
//!      |
//!   ExportEvent::Closed to the control side
//! ```
//!
//! * `codec`: the wire format without I/O
//! * `registry`: the exports, and who uses them
//! * `negotiate`: the handshake of a connection
//! * `session`: its transmission phase, made of `input`, `request` and `output`
//! * `listen`, `server`: sockets and tasks
//!
//! Nothing here knows the graph, the monitor or files.

mod codec;
mod input;
mod negotiate;
mod output;
mod registry;
mod request;
mod server;
mod session;

pub use registry::NbdExportOptions;
pub use server::{NbdServer, NbdServerOptions};
