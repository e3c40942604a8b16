//! The graph as a drawing: who stands on what, and what each does to what it stands on. For `x-debug-query-block-graph`.
//!
//! What a node does to its layers follows from what is done to the node, as in QEMU: a format passes reads on, and writes where it
//! is written. So permissions are computed from the users down. What [`Access`] does not share is not shared in the drawing either.

use std::collections::HashMap;
use std::ops::{BitAnd, BitOr};
use std::sync::Arc;

use super::Graph;
use super::access::{Access, Layer, Use, User, layer};
use super::node::{Link, Node};
use super::table::place;

/// What a user of a node does to it, or lets others do, as a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Permissions(u8);

impl Permissions {
    /// Nothing.
    pub const NONE: Permissions = Permissions(0);
    /// Reads see what a guest would see.
    pub const CONSISTENT_READ: Permissions = Permissions(1);
    /// The content changes.
    pub const WRITE: Permissions = Permissions(2);
    /// What is there is written once more.
    pub const WRITE_UNCHANGED: Permissions = Permissions(4);
    /// The size changes.
    pub const RESIZE: Permissions = Permissions(8);
    /// Everything.
    pub const ALL: Permissions = Permissions(15);

    const CHANGES: Permissions = Permissions(Self::WRITE.0 | Self::RESIZE.0);

    /// Whether all of `other` is in it.
    pub fn has(self, other: Permissions) -> bool {
        self & other == other
    }

    fn without(self, other: Permissions) -> Self {
        Permissions(self.0 & !other.0)
    }
}

impl BitOr for Permissions {
    type Output = Permissions;

    fn bitor(self, other: Permissions) -> Permissions {
        Permissions(self.0 | other.0)
    }
}

impl BitAnd for Permissions {
    type Output = Permissions;

    fn bitand(self, other: Permissions) -> Permissions {
        Permissions(self.0 & other.0)
    }
}

/// What is drawn as a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VertexKind {
    /// A drive or an export.
    Backend,
    /// A job.
    Job,
    /// A node.
    Driver,
}

/// A point of the drawing. Its number is its place in the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vertex {
    /// What it is.
    pub kind: VertexKind,
    /// The name of a node, or the id of a drive or job. Exports have none, as in QEMU.
    pub name: String,
    /// From 1 up, as it is met.
    pub number: u64,
}

/// A line of the drawing: one uses another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrow {
    /// The number of the user.
    pub parent: u64,
    /// The number of what is used.
    pub child: u64,
    /// The role that it has for the user.
    pub name: &'static str,
    /// What the user does to it.
    pub permissions: Permissions,
    /// What the user lets others do to it.
    pub shared: Permissions,
}

/// The drawing. Both lists are in the order of QEMU's: what is met last comes first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Diagram {
    /// Drives, exports, jobs and nodes.
    pub vertices: Vec<Vertex>,
    /// Who uses whom.
    pub arrows: Vec<Arrow>,
}

/// What is done to something, and what others may do to it meanwhile.
#[derive(Debug, Clone, Copy)]
struct Done {
    permissions: Permissions,
    shared: Permissions,
}

impl Done {
    const NOTHING: Done = Done {
        permissions: Permissions::NONE,
        shared: Permissions::ALL,
    };

    fn and(self, other: Done) -> Done {
        Done {
            permissions: self.permissions | other.permissions,
            shared: self.shared & other.shared,
        }
    }
}

impl Graph {
    /// Draws it. Takes time in proportion to nodes and edges.
    pub fn diagram(&self) -> Diagram {
        let mut drawing = Drawing {
            diagram: Diagram::default(),
            numbers: HashMap::new(),
            done: self.what_is_done(),
        };
        let is_job = |user: &Use| matches!(user.user, User::Job(_));
        for user in self.uses_from_outside().filter(|user| !is_job(user)) {
            drawing.backend(user);
        }
        for user in self.uses_from_outside().filter(|user| is_job(user)) {
            drawing.job(user);
        }
        for node in self.nodes() {
            drawing.node(node);
        }
        drawing.diagram.vertices.reverse();
        drawing.diagram.arrows.reverse();
        drawing.diagram
    }

    /// What all users together do to each node.
    fn what_is_done(&self) -> HashMap<usize, Done> {
        let mut done: HashMap<usize, Done> = HashMap::new();
        // How many of those above are still to be looked at.
        let mut above: HashMap<usize, usize> = HashMap::new();
        for node in self.nodes() {
            for link in node.links() {
                *above.entry(place(&link.edge.node())).or_default() += 1;
            }
        }
        for user in self.uses_from_outside() {
            let at = done
                .entry(place(&user.edge.node()))
                .or_insert(Done::NOTHING);
            *at = at.and(by_user(user));
        }
        let tops = self
            .nodes()
            .filter(|node| !above.contains_key(&place(node)));
        let mut ready: Vec<Arc<Node>> = tops.cloned().collect();
        while let Some(node) = ready.pop() {
            let to_node = done.get(&place(&node)).copied().unwrap_or(Done::NOTHING);
            for link in node.links() {
                let below = link.edge.node();
                let at = done.entry(place(&below)).or_insert(Done::NOTHING);
                *at = at.and(by_node(&node, &link, to_node));
                if let Some(left) = above.get_mut(&place(&below)) {
                    *left -= 1;
                    if *left == 0 {
                        ready.push(below);
                    }
                }
            }
        }
        done
    }
}

struct Drawing {
    diagram: Diagram,
    numbers: HashMap<Key, u64>,
    done: HashMap<usize, Done>,
}

/// What has a number.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Key {
    User(User),
    Node(usize),
}

impl Drawing {
    fn number(&mut self, key: Key) -> u64 {
        let next = self.numbers.len() as u64 + 1;
        *self.numbers.entry(key).or_insert(next)
    }

    fn vertex(&mut self, key: Key, kind: VertexKind, name: &str) -> u64 {
        let number = self.number(key);
        self.diagram.vertices.push(Vertex {
            kind,
            name: name.to_owned(),
            number,
        });
        number
    }

    fn arrow(&mut self, parent: u64, child: &Arc<Node>, name: &'static str, done: Done) {
        let Done {
            permissions,
            shared,
        } = done;
        let child = self.number(Key::Node(place(child)));
        self.diagram.arrows.push(Arrow {
            parent,
            child,
            name,
            permissions,
            shared,
        });
    }

    fn backend(&mut self, user: &Use) {
        let name = match &user.user {
            User::Drive(id) => id,
            User::Export(_) | User::Job(_) => "",
        };
        let key = Key::User(user.user.clone());
        let number = self.vertex(key, VertexKind::Backend, name);
        self.arrow(number, &user.edge.node(), "root", by_user(user));
    }

    fn job(&mut self, user: &Use) {
        let User::Job(id) = &user.user else { return };
        let key = Key::User(user.user.clone());
        let number = match self.numbers.get(&key) {
            Some(number) => *number,
            None => self.vertex(key, VertexKind::Job, id),
        };
        let role = match user.access.writes {
            true => "target",
            false => "main node",
        };
        self.arrow(number, &user.edge.node(), role, by_user(user));
    }

    fn node(&mut self, node: &Arc<Node>) {
        let number = self.vertex(Key::Node(place(node)), VertexKind::Driver, node.name());
        let to_node = self.done.get(&place(node)).copied();
        let to_node = to_node.unwrap_or(Done::NOTHING);
        // The youngest layer first, as in QEMU.
        for link in node.links().iter().rev() {
            let done = by_node(node, link, to_node);
            self.arrow(number, &link.edge.node(), link.role, done);
        }
    }
}

fn by_user(user: &Use) -> Done {
    let writes = match user.access.writes {
        true => Permissions::WRITE,
        false => Permissions::NONE,
    };
    let shared = match user.user {
        // A resize of what is exported is a command, which tells the export.
        User::Export(_) => Permissions::ALL.without(Permissions::RESIZE),
        User::Drive(_) | User::Job(_) => Permissions::ALL,
    };
    Done {
        permissions: Permissions::CONSISTENT_READ | writes,
        shared: limit(shared, user.access),
    }
}

/// What a node does to a layer when this is done to the node.
fn by_node(node: &Node, link: &Link, to_node: Done) -> Done {
    use Permissions as P;
    let Done {
        permissions,
        shared,
    } = to_node;
    let (permissions, shared) = match layer(node, link.role) {
        Layer::Filtered => (permissions, shared),
        Layer::Data => {
            let grows = match permissions.has(P::WRITE) && !is_raw(node) {
                true => P::RESIZE,
                false => P::NONE,
            };
            (permissions | grows, shared.without(P::RESIZE))
        }
        Layer::Image => {
            let writes = match node.behaviour().read_only {
                true => P::NONE,
                false => P::CHANGES,
            };
            let permissions = permissions | writes | P::CONSISTENT_READ;
            (permissions, shared.without(P::CHANGES))
        }
        Layer::Backing => {
            let others = match shared.has(P::WRITE) {
                true => P::ALL,
                false => P::ALL.without(P::CHANGES),
            };
            (permissions & P::CONSISTENT_READ, others)
        }
        Layer::Snapshot => (permissions & P::CONSISTENT_READ, P::ALL),
        Layer::Target => (P::WRITE, P::CONSISTENT_READ),
    };
    Done {
        permissions,
        shared: limit(shared, link.access),
    }
}

fn is_raw(node: &Node) -> bool {
    node.driver().info().driver == "raw"
}

/// What is enforced.
fn limit(shared: Permissions, access: Access) -> Permissions {
    match access.shares_writes {
        true => shared,
        false => shared.without(Permissions::CHANGES),
    }
}

#[cfg(test)]
mod tests;
