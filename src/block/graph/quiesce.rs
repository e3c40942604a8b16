//! Several nodes held still.
//!
//! A request inside of a node waits where the gate of a layer below is closed. So gates are closed from the top down: were the
//! lower one first, the upper one would never be empty.
//!
//! Flushes go first, of all nodes: they take as long as the disk, and while one of them is under way all others go on.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, timeout_at};

use super::node::{Node, Quiesced};
use super::table::place;
use crate::io::Closed;

/// Flushes to nodes that are held back, and writes that have to be durable when they are answered. They go on when it is dropped.
#[derive(Debug)]
#[must_use]
pub struct FlushesHeld(Vec<Closed>);

impl FlushesHeld {
    /// Those of one node.
    pub(super) fn one(flushes: Closed) -> Self {
        FlushesHeld(vec![flushes])
    }
}

/// Holds back new requests to all of the nodes, and waits until those under way have been answered. Answers in the order of
/// `nodes`; one that occurs several times is held several times.
///
/// Nodes of which none stands on another drain at the same time. Cancellation: requests go on.
pub async fn quiesce_all(nodes: &[Arc<Node>]) -> Vec<Quiesced> {
    let flushes = level_by_level(nodes, nodes, |_, node: &Arc<Node>| async {
        Ok::<_, Infallible>(node.close_to_flushes().await)
    });
    let Ok(flushes) = flushes.await;
    let places: Vec<_> = nodes.iter().zip(flushes).collect();
    let held = level_by_level(
        nodes,
        places,
        |_, (node, flushes): (&Arc<Node>, Closed)| async {
            Ok::<_, Infallible>(node.quiesce_behind(flushes).await)
        },
    );
    let Ok(held) = held.await;
    held
}

/// The first part of [`quiesce_all_within`], while all but flushes go on.
pub async fn hold_flushes_within(
    nodes: &[Arc<Node>],
    limit: Duration,
) -> Result<FlushesHeld, usize> {
    let end = Instant::now() + limit;
    let flushes = level_by_level(nodes, nodes, |place, node: &Arc<Node>| async move {
        let held = timeout_at(end, node.close_to_flushes()).await;
        held.map_err(|_| place)
    });
    flushes.await.map(FlushesHeld)
}

/// As [`quiesce_all`], for so long at most: then requests go on, and the place in `nodes` of one that is not done is the error.
pub async fn quiesce_all_within(
    nodes: &[Arc<Node>],
    flushes: FlushesHeld,
    limit: Duration,
) -> Result<Vec<Quiesced>, usize> {
    let end = Instant::now() + limit;
    let places: Vec<_> = nodes.iter().zip(flushes.0).collect();
    level_by_level(
        nodes,
        places,
        |place, (node, flushes): (&Arc<Node>, Closed)| async move {
            let quiesced = timeout_at(end, node.quiesce_behind(flushes)).await;
            quiesced.map_err(|_| place)
        },
    )
    .await
}

/// Does something to all nodes, to those of one height at once, the highest first. `with` is what is needed for each.
async fn level_by_level<I, T, E, F: Future<Output = Result<T, E>>>(
    nodes: &[Arc<Node>],
    with: impl IntoIterator<Item = I>,
    hold: impl Fn(usize, I) -> F,
) -> Result<Vec<T>, E> {
    let mut with: Vec<Option<I>> = with.into_iter().map(Some).collect();
    let mut held: Vec<(usize, T)> = Vec::with_capacity(nodes.len());
    let places = from_the_top(nodes);
    for level in places.chunk_by(|one, other| one.0 == other.0) {
        let level = level.iter().filter_map(|(_, place)| {
            let held = hold(*place, with.get_mut(*place)?.take()?);
            Some(async move { Ok((*place, held.await?)) })
        });
        let level: Vec<_> = level.collect();
        for done in join_all(level).await {
            held.push(done?);
        }
    }
    held.sort_unstable_by_key(|(place, _)| *place);
    Ok(held.into_iter().map(|(_, held)| held).collect())
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
