//! Ways out of the graph: what guests and tools read and write disks through.
//!
//! An export serves a node's data path, `block::driver::Requests`, and knows nothing else of the graph. The control side
//! gives it the node, and gets data back: a list of exports for queries, and an event when an export is gone.
//!
//! * [`nbd`]: the Network Block Device protocol over unix and TCP sockets

pub mod nbd;

/// What queries show of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// The id that the user gave it; unique among the exports of the process.
    pub id: String,
    /// The name that clients ask for.
    pub name: String,
    /// The node that is served.
    pub node_name: String,
    /// Whether clients may write.
    pub writable: bool,
    /// It has been removed, and waits for its last client to be gone.
    pub shutting_down: bool,
    /// Clients that use it now.
    pub connections: usize,
}

/// What exports tell the control side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExportEvent {
    /// The export with this id is gone: no request of it is under way and it has let go of its node.
    Closed {
        /// The export's id.
        id: String,
    },
}

/// How an export is removed while clients use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RemoveMode {
    /// It is an error.
    #[default]
    Safe,
    /// They are disconnected when their requests in flight have been answered.
    Hard,
}
