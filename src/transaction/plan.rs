//! What a transaction will leave, as far as its actions have said: later actions are about that.

use std::collections::HashMap;
use std::sync::Arc;

use block::graph::{Drive, Graph, Link, Node, place};
use qapi::rt::QmpError;

use super::{Disk, Until};
use crate::daemon::lookup;

/// What the actions so far will do to the graph, and which disks have to be held still for it.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// By [`place`]: who uses this node will use that one.
    above: HashMap<usize, Arc<Node>>,
    /// The same the other way round.
    below: HashMap<usize, Arc<Node>>,
    disks: Vec<Disk>,
    /// By [`place`], where a node is among the disks.
    of_node: HashMap<usize, usize>,
}

/// What becomes of guests that a commit leads elsewhere, and that have gone on there, when the transaction fails after all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WayBack {
    /// What they write is where it was written before: they can be led back at any time.
    Open,
    /// What they have written is written to where they come from, and they are led back. Nothing there is durable before it is
    /// decided.
    WrittenDown,
    /// There is none: they do not go on before it is decided.
    Closed,
}

impl Plan {
    /// What `device` will mean: a drive's root, or a node. If it is neither, the class says so.
    pub(crate) fn device(&self, graph: &Graph, device: &str) -> Result<Arc<Node>, QmpError> {
        let node = lookup::device(graph, device)?;
        Ok(self.if_drive(graph.drive(device), node))
    }

    /// As [`Plan::device`], where the node may be named apart. A node that is named by its own name stays what it is.
    pub(crate) fn device_or_node(
        &self,
        graph: &Graph,
        device: Option<&str>,
        node_name: Option<&str>,
    ) -> Result<Arc<Node>, QmpError> {
        let node = lookup::device_or_node(graph, device, node_name)?;
        Ok(self.if_drive(device.and_then(|id| graph.drive(id)), node))
    }

    fn if_drive(&self, drive: Option<&Drive>, node: Arc<Node>) -> Arc<Node> {
        match drive {
            Some(_) => self.behind(node),
            None => node,
        }
    }

    /// What those who use `node` now will use.
    pub(crate) fn behind(&self, mut node: Arc<Node>) -> Arc<Node> {
        while let Some(above) = self.covered_by(&node) {
            node = above.clone();
        }
        node
    }

    /// The overlay that an action so far puts on a node.
    pub(crate) fn covered_by(&self, node: &Arc<Node>) -> Option<&Arc<Node>> {
        self.above.get(&place(node))
    }

    /// Whether an action so far puts a node on another, or another on it.
    pub(crate) fn mentions(&self, node: &Arc<Node>) -> bool {
        let place = place(node);
        self.above.contains_key(&place) || self.below.contains_key(&place)
    }

    /// Whose users will use `node`: those of the node at the beginning of the steps that lead to it; and how many steps these are.
    pub(crate) fn origin(&self, node: &Arc<Node>) -> (Arc<Node>, usize) {
        let below = |node: &Arc<Node>| self.below.get(&place(node)).cloned();
        let steps = std::iter::successors(Some(node.clone()), below);
        let (mut origin, mut count) = (node.clone(), 0);
        for below in steps.skip(1) {
            (origin, count) = (below, count + 1);
        }
        (origin, count)
    }

    /// Says that the commit leads those who use `below` to `above`, which is in the graph by now. Both are held still.
    pub(crate) fn lead(&mut self, below: &Arc<Node>, above: &Arc<Node>, way_back: WayBack) {
        match way_back {
            WayBack::Open => self.hold(above),
            WayBack::WrittenDown => self.disk(above.name(), above).hold(Until::Flushes),
            WayBack::Closed => self.hold_until_decided(above),
        }
        self.hold(below);
        let above_it = self.above.entry(place(below));
        above_it.or_insert_with(|| above.clone());
        let below_it = self.below.entry(place(above));
        below_it.or_insert_with(|| below.clone());
    }

    /// Whether nothing will stand on a node but what shows its snapshots, which do not change.
    pub(crate) fn is_root(&self, graph: &Graph, node: &Arc<Node>) -> bool {
        self.covered_by(node).is_none()
            && graph
                .parents(node)
                .all(|(_, link)| link.role == Link::IMAGE)
    }

    /// Holds a node still while the transaction is staged, and until the graph is what it will be.
    pub(crate) fn hold(&mut self, node: &Arc<Node>) {
        self.disk(node.name(), node).hold(Until::Led);
    }

    /// Holds a node, and with it all others, still until it is decided whether the transaction happens: what guests see or do then
    /// cannot be taken back.
    pub(crate) fn hold_until_decided(&mut self, node: &Arc<Node>) {
        self.disk(node.name(), node).hold(Until::Decided);
    }

    /// Holds a node still while the transaction is staged. Its internal snapshots are changed: all actions on them share one change.
    /// `device` is what the client calls it.
    pub(crate) fn change_snapshots(&mut self, device: &str, node: &Arc<Node>) {
        self.disk(device, node).changes = true;
    }

    /// The disks that are to be held, when all actions have said which.
    pub(super) fn take_disks(&mut self) -> Vec<Disk> {
        self.of_node.clear();
        std::mem::take(&mut self.disks)
    }

    fn disk(&mut self, device: &str, node: &Arc<Node>) -> &mut Disk {
        let next = self.disks.len();
        let at = *self.of_node.entry(place(node)).or_insert(next);
        if at == next {
            self.disks.push(Disk {
                device: device.to_owned(),
                node: node.clone(),
                changes: false,
                until: Until::LetGo,
                journaled: None,
            });
        }
        &mut self.disks[at]
    }
}
