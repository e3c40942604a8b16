//! Several nodes held still.
//!
//! A request inside of a node waits where the gate of a layer below is closed. So gates are closed from the top down: were the
//! lower one first, the upper one would never be empty.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, timeout_at};

use super::node::{Node, Quiesced};
use super::table::place;

/// Holds back new requests to all of the nodes, and waits until those under way have been answered. Answers in the order of
/// `nodes`; one that occurs several times is held several times.
///
/// Nodes of which none stands on another drain at the same time. Cancellation: requests go on.
pub async fn quiesce_all(nodes: &[Arc<Node>]) -> Vec<Quiesced> {
    let held = level_by_level(nodes, |_, node| async {
        Ok::<_, std::convert::Infallible>(node.quiesce().await)
    });
    match held.await {
        Ok(held) => held,
        Err(never) => match never {},
    }
}

/// As [`quiesce_all`], for so long at most: then requests go on, and the place in `nodes` of one that is not done is the error.
pub async fn quiesce_all_within(
    nodes: &[Arc<Node>],
    limit: Duration,
) -> Result<Vec<Quiesced>, usize> {
    let end = Instant::now() + limit;
    level_by_level(nodes, |place, node| async move {
        let quiesced = timeout_at(end, node.quiesce()).await;
        quiesced.map_err(|_| place)
    })
    .await
}

async fn level_by_level<'n, E, F: Future<Output = Result<Quiesced, E>>>(
    nodes: &'n [Arc<Node>],
    quiesce: impl Fn(usize, &'n Node) -> F,
) -> Result<Vec<Quiesced>, E> {
    let places = from_the_top(nodes);
    let mut held: Vec<(usize, Quiesced)> = Vec::with_capacity(nodes.len());
    for level in places.chunk_by(|one, other| one.0 == other.0) {
        let level = level.iter().map(|(_, place)| {
            let quiesced = quiesce(*place, &nodes[*place]);
            async move { Ok((*place, quiesced.await?)) }
        });
        for quiesced in join_all(level).await {
            held.push(quiesced?);
        }
    }
    held.sort_unstable_by_key(|(place, _)| *place);
    Ok(held.into_iter().map(|(_, quiesced)| quiesced).collect())
}

/// The nodes as (height, place), the highest first.
fn from_the_top(nodes: &[Arc<Node>]) -> Vec<(usize, usize)> {
    let mut heights = Heights::default();
    let mut places: Vec<(usize, usize)> = nodes
        .iter()
        .enumerate()
        .map(|(place, node)| (heights.of(node), place))
        .collect();
    places.sort_unstable_by(|one, other| other.cmp(one));
    places
}

/// Nodes in an order in which each comes before those that it stands on.
pub(super) fn uppermost_first<'a>(nodes: impl Iterator<Item = &'a Arc<Node>>) -> Vec<Arc<Node>> {
    let mut heights = Heights::default();
    let mut nodes: Vec<Arc<Node>> = nodes.cloned().collect();
    nodes.sort_by_cached_key(|node| std::cmp::Reverse(heights.of(node)));
    nodes
}

/// How many layers are below a node, on the longest way down: always more than below any layer of it.
#[derive(Default)]
struct Heights(HashMap<usize, usize>);

impl Heights {
    fn of(&mut self, node: &Arc<Node>) -> usize {
        // Chains are long: what is to do is in a list, not on the stack.
        let mut open = vec![node.clone()];
        while let Some(top) = open.last().cloned() {
            let below: Vec<Arc<Node>> = top.links().iter().map(|link| link.edge.node()).collect();
            let unknown = below
                .iter()
                .filter(|node| !self.0.contains_key(&place(node)));
            let before = open.len();
            open.extend(unknown.cloned());
            if open.len() == before {
                let heights = below.iter().filter_map(|node| self.0.get(&place(node)));
                let height = heights.max().map_or(0, |height| height + 1);
                self.0.insert(place(&top), height);
                open.pop();
            }
        }
        self.0.get(&place(node)).copied().unwrap_or_default()
    }
}
