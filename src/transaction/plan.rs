//! What a transaction will leave, as far as its actions have said: later actions are about that.

use std::sync::Arc;

use block::graph::{Drive, Graph, Link, Node};
use qapi::rt::QmpError;

use super::{Disk, Until};
use crate::daemon::lookup;

/// What the actions so far will do to the graph, and which disks have to be held still for it.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// (below, above): who uses `below` will use `above`.
    led: Vec<(Arc<Node>, Arc<Node>)>,
    pub(super) disks: Vec<Disk>,
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
        for (below, above) in &self.led {
            if Arc::ptr_eq(below, &node) {
                node = above.clone();
            }
        }
        node
    }

    /// The overlay that an action so far puts on a node.
    pub(crate) fn covered_by(&self, node: &Arc<Node>) -> Option<&Arc<Node>> {
        let mut led = self.led.iter();
        let (_, above) = led.find(|(below, _)| Arc::ptr_eq(below, node))?;
        Some(above)
    }

    /// Whether an action so far puts a node on another, or another on it.
    pub(crate) fn mentions(&self, node: &Arc<Node>) -> bool {
        let mut led = self.led.iter();
        led.any(|(below, above)| Arc::ptr_eq(below, node) || Arc::ptr_eq(above, node))
    }

    /// Whose users will use `node`: those of the node at the beginning of the steps that lead to it; and how many steps these are.
    pub(crate) fn origin(&self, node: &Arc<Node>) -> (Arc<Node>, usize) {
        let (mut origin, mut steps) = (node.clone(), 0);
        for (below, above) in self.led.iter().rev() {
            if Arc::ptr_eq(above, &origin) {
                origin = below.clone();
                steps += 1;
            }
        }
        (origin, steps)
    }

    /// Says that the commit leads those who use `below` to `above`, which is in the graph by now. Both are held still.
    pub(crate) fn lead(&mut self, below: &Arc<Node>, above: &Arc<Node>, way_back: WayBack) {
        match way_back {
            WayBack::Open => self.hold(above),
            WayBack::WrittenDown => self.disk(above.name(), above).hold(Until::Flushes),
            WayBack::Closed => self.hold_until_decided(above),
        }
        self.hold(below);
        self.led.push((below.clone(), above.clone()));
    }

    /// Whether nothing will stand on a node but what shows its snapshots, which do not change.
    pub(crate) fn is_root(&self, graph: &Graph, node: &Arc<Node>) -> bool {
        let covered = self.led.iter().any(|(below, _)| Arc::ptr_eq(below, node));
        !covered
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

    fn disk(&mut self, device: &str, node: &Arc<Node>) -> &mut Disk {
        let is_same = |disk: &Disk| Arc::ptr_eq(&disk.node, node);
        let place = match self.disks.iter().position(is_same) {
            Some(place) => place,
            None => {
                self.disks.push(Disk {
                    device: device.to_owned(),
                    node: node.clone(),
                    changes: false,
                    until: Until::LetGo,
                    journaled: None,
                });
                self.disks.len() - 1
            }
        };
        &mut self.disks[place]
    }
}
