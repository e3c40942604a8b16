//! How a job reaches the graph, which belongs to the control loop.

use std::sync::Arc;

use block::driver::BoxFuture;
use block::graph::{Graph, Node, Quiesced, Removed};

/// A change of the graph while nodes are held: answers what was taken out, for the job to close.
pub type GraphChange = Box<dyn FnOnce(&mut Graph, &[Quiesced]) -> Vec<Removed> + Send>;

/// The way to the graph.
pub trait GraphAccess: Send + Sync {
    /// Waits until no command runs, holds `nodes` still, changes the graph, and lets them go on.
    ///
    /// A command that is under way has looked at the graph and may be about to change it, so that jobs stand in line with
    /// commands. When the daemon ends nothing is done, and nothing answered.
    fn change(&self, nodes: Vec<Arc<Node>>, change: GraphChange) -> BoxFuture<'_, Vec<Removed>>;
}
