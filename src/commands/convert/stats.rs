//! What drives and nodes have done, as `query-blockstats` shows it.

use std::sync::Arc;
use std::time::Duration;

use block::graph::{Drive, DriveStats, Node, RequestCount, RequestKind, Totals};
use block::limits::MAX_CHAIN_DEPTH;
use qapi::types::{
    BlockDeviceStats, BlockStats, BlockStatsSpecific, BlockStatsSpecificBranch,
    BlockStatsSpecificFile,
};

use super::signed;
use crate::limits;

/// What one answer shows. Layers that many nodes share are shown for each of them, and clients can stack nodes as they like, so that
/// the number of entries is bounded, apart from those of the drives and nodes that are asked for.
#[derive(Debug)]
pub(in crate::commands) struct Answer {
    left: usize,
}

/// A drive and what it has done.
pub(in crate::commands) struct Counted {
    id: String,
    root: Option<Arc<Node>>,
    stats: DriveStats,
}

impl Counted {
    pub(in crate::commands) fn new(drive: &Drive) -> Self {
        Counted {
            id: drive.id.clone(),
            root: drive.node(),
            stats: drive.stats(),
        }
    }
}

/// Whether backing images are shown. Where all nodes are listed they are there anyway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backing {
    Shown,
    Hidden,
}

impl Answer {
    pub(in crate::commands) fn new() -> Self {
        Answer {
            left: limits::STATS_ENTRIES,
        }
    }

    /// A drive, with the tree of nodes below it.
    pub(in crate::commands) fn drive(&mut self, drive: Counted) -> BlockStats {
        let Counted { id, root, stats } = drive;
        let highest = root.as_ref().map_or(0, |root| root.highest_write());
        let below = root.map(|root| self.tree(&root, Backing::Shown, MAX_CHAIN_DEPTH));
        BlockStats {
            device: Some(id.clone()),
            qdev: Some(id),
            stats: of_drive(stats, highest),
            ..below.unwrap_or_else(|| BlockStats {
                device: None,
                qdev: None,
                node_name: None,
                stats: of_drive(DriveStats::default(), 0),
                driver_specific: None,
                parent: None,
                backing: None,
            })
        }
    }

    /// A node, with those that hold its data.
    pub(in crate::commands) fn node(&mut self, node: &Node) -> BlockStats {
        self.tree(node, Backing::Hidden, MAX_CHAIN_DEPTH)
    }

    /// A node with what is below it, `depth` layers at most. What backs it, a filter's node among that, is built from the base up, because
    /// such chains are long.
    fn tree(&mut self, node: &Node, backing: Backing, depth: usize) -> BlockStats {
        let mut chain = Vec::new();
        let mut below = match backing {
            Backing::Shown => backed_by(node),
            Backing::Hidden => None,
        };
        while let Some(node) = below
            && chain.len() < depth
            && self.take()
        {
            below = backed_by(&node);
            chain.push(node);
        }
        let mut shown = None;
        for (at, node) in chain.iter().enumerate().rev() {
            let image = self.image(node, shown, backing, depth - at - 1);
            shown = Some(Box::new(image));
        }
        self.image(node, shown, backing, depth)
    }

    /// A node with the one that has its data, and what backs it.
    fn image(
        &mut self,
        node: &Node,
        backed_by: Option<Box<BlockStats>>,
        backing: Backing,
        depth: usize,
    ) -> BlockStats {
        // What a format keeps apart from its data is no disk's.
        let data = node.link("data-file").or_else(|| node.link("file"));
        let data = data.filter(|_| depth > 0 && self.take());
        let parent = data.map(|data| {
            // What a filter is on is shown in full where backing images are.
            let backing = match node.driver().is_filter() {
                true => Backing::Hidden,
                false => backing,
            };
            Box::new(self.tree(&data, backing, depth - 1))
        });
        BlockStats {
            device: None,
            qdev: None,
            node_name: Some(node.name().to_owned()),
            stats: of_node(node),
            driver_specific: specific(node),
            parent,
            backing: backed_by,
        }
    }

    /// Takes the place of an entry, if there is one left.
    fn take(&mut self) -> bool {
        let is_left = self.left > 0;
        self.left -= usize::from(is_left);
        is_left
    }
}

/// What QEMU shows as a backing image: also what a filter is on.
fn backed_by(node: &Node) -> Option<Arc<Node>> {
    match node.driver().is_filter() {
        true => node.link("file"),
        false => node.link("backing"),
    }
}

fn specific(node: &Node) -> Option<BlockStatsSpecific> {
    let RequestCount {
        done,
        bytes,
        failed,
    } = node.count(RequestKind::Discard);
    let file = BlockStatsSpecificFile {
        discard_nb_ok: done,
        discard_nb_failed: failed,
        discard_bytes_ok: bytes,
    };
    let branch = match node.driver().info().driver {
        "file" => BlockStatsSpecificBranch::File(file),
        "host_device" => BlockStatsSpecificBranch::HostDevice(file),
        _ => return None,
    };
    Some(BlockStatsSpecific { driver: branch })
}

fn of_drive(stats: DriveStats, highest: u64) -> BlockDeviceStats {
    let DriveStats {
        read,
        write,
        discard,
        flush,
        idle,
    } = stats;
    BlockDeviceStats {
        idle_time_ns: idle.map(nanoseconds),
        account_invalid: true,
        account_failed: true,
        ..device_stats([read, write, discard, flush], highest)
    }
}

fn of_node(node: &Node) -> BlockDeviceStats {
    let totals = |kind| {
        let RequestCount {
            done,
            bytes,
            failed,
        } = node.count(kind);
        Totals {
            done,
            bytes,
            failed,
            ..Totals::default()
        }
    };
    let (bytes, zeroes) = (totals(RequestKind::Write), totals(RequestKind::WriteZeroes));
    let write = Totals {
        done: bytes.done + zeroes.done,
        bytes: bytes.bytes + zeroes.bytes,
        failed: bytes.failed + zeroes.failed,
        ..Totals::default()
    };
    let (read, discard) = (totals(RequestKind::Read), totals(RequestKind::Discard));
    let flush = totals(RequestKind::Flush);
    device_stats([read, write, discard, flush], node.highest_write())
}

fn device_stats([read, write, discard, flush]: [Totals; 4], highest: u64) -> BlockDeviceStats {
    BlockDeviceStats {
        rd_bytes: signed(read.bytes),
        wr_bytes: signed(write.bytes),
        zone_append_bytes: 0,
        unmap_bytes: signed(discard.bytes),
        rd_operations: signed(read.done),
        wr_operations: signed(write.done),
        zone_append_operations: 0,
        flush_operations: signed(flush.done),
        unmap_operations: signed(discard.done),
        rd_total_time_ns: nanoseconds(read.time),
        wr_total_time_ns: nanoseconds(write.time),
        zone_append_total_time_ns: 0,
        flush_total_time_ns: nanoseconds(flush.time),
        unmap_total_time_ns: nanoseconds(discard.time),
        wr_highest_offset: signed(highest),
        rd_merged: 0,
        wr_merged: 0,
        zone_append_merged: 0,
        unmap_merged: 0,
        idle_time_ns: None,
        failed_rd_operations: signed(read.failed),
        failed_wr_operations: signed(write.failed),
        failed_zone_append_operations: 0,
        failed_flush_operations: signed(flush.failed),
        failed_unmap_operations: signed(discard.failed),
        invalid_rd_operations: signed(read.invalid),
        invalid_wr_operations: signed(write.invalid),
        invalid_zone_append_operations: 0,
        invalid_flush_operations: signed(flush.invalid),
        invalid_unmap_operations: signed(discard.invalid),
        account_invalid: false,
        account_failed: false,
        timed_stats: Vec::new(),
    }
}

fn nanoseconds(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}
