//! What drives and nodes have done, as `query-blockstats` shows it.

use std::time::Duration;

use block::graph::{Drive, DriveStats, Node, RequestCount, RequestKind, Totals};
use qapi::types::{
    BlockDeviceStats, BlockStats, BlockStatsSpecific, BlockStatsSpecificBranch,
    BlockStatsSpecificFile,
};

use super::signed;

/// A drive, with the tree of nodes below it.
pub(in crate::commands) fn drive_stats(drive: &Drive) -> BlockStats {
    let root = drive.node();
    let below = root.as_ref().map(|root| tree(root, Backing::Shown));
    let highest = root.map_or(0, |root| root.highest_write());
    BlockStats {
        device: Some(drive.id.clone()),
        qdev: Some(drive.id.clone()),
        stats: of_drive(drive.stats(), highest),
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
pub(in crate::commands) fn node_stats(node: &Node) -> BlockStats {
    tree(node, Backing::Hidden)
}

/// Whether backing images are shown. Where all nodes are listed they are there anyway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backing {
    Shown,
    Hidden,
}

/// Built from the base up, so that no chain is too deep to be shown.
fn tree(node: &Node, backing: Backing) -> BlockStats {
    let mut chain = vec![node_alone(node)];
    let mut below = node.link("backing");
    while backing == Backing::Shown
        && let Some(node) = below
    {
        chain.push(node_alone(&node));
        below = node.link("backing");
    }
    let mut shown = None;
    while let Some(stats) = chain.pop() {
        let backing = shown.take().map(Box::new);
        shown = Some(BlockStats { backing, ..stats });
    }
    shown.unwrap_or_else(|| node_alone(node))
}

/// A node without what backs it.
fn node_alone(node: &Node) -> BlockStats {
    // What a format keeps apart from its data is no disk's.
    let data = node.link("data-file").or_else(|| node.link("file"));
    BlockStats {
        device: None,
        qdev: None,
        node_name: Some(node.name().to_owned()),
        stats: of_node(node),
        driver_specific: specific(node),
        parent: data.map(|data| Box::new(node_alone(&data))),
        backing: None,
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
