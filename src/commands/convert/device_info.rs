//! Nodes as `query-block` and `query-named-block-nodes` show them.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use block::driver::{DriverInfo, FormatSpecific, PersistentBitmap, Requests};
use block::graph::{Behaviour, Link, Node};
use block::open::{CacheMode, DetectZeroes};
use qapi::types::{
    BlockDeviceInfo, BlockdevCacheInfo, BlockdevDetectZeroesOptions, ImageInfo, ImageInfoSpecific,
    ImageInfoSpecificBranch, ImageInfoSpecificFile, ImageInfoSpecificFileWrapper,
    ImageInfoSpecificQCow2, ImageInfoSpecificQCow2Wrapper, Qcow2BitmapInfo, Qcow2BitmapInfoFlags,
    Qcow2CompressionType, SnapshotInfo,
};

use super::signed;

/// How much of a backing chain is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::commands) enum Depth {
    /// Each image inside the one that it backs.
    WholeChain,
    /// None of it.
    Flat,
}

/// What one answer shows of nodes. Each is asked once, however many chains it is in: the kernel is, too.
#[derive(Default)]
pub(in crate::commands) struct Devices {
    /// By the address of the node, which is kept for that.
    seen: HashMap<usize, (Arc<Node>, Seen)>,
}

/// What is known of a node.
struct Seen {
    info: DriverInfo,
    /// Without what backs it.
    image: ImageInfo,
}

impl Devices {
    fn seen(&mut self, node: &Arc<Node>) -> &Seen {
        let look = || {
            let info = facts(node);
            let image = image(node, info.clone(), None);
            (node.clone(), Seen { info, image })
        };
        let place = Arc::as_ptr(node).addr();
        &self.seen.entry(place).or_insert_with(look).1
    }

    /// The image, and the chain inside of it. Built from the base up, so that no chain is too deep to be shown.
    fn image_chain(&mut self, node: &Arc<Node>, depth: Depth) -> ImageInfo {
        let nodes: Vec<Arc<Node>> = match depth {
            Depth::WholeChain => chain(node).collect(),
            Depth::Flat => vec![node.clone()],
        };
        let mut below = None;
        for node in nodes.iter().skip(1).rev() {
            let mut image = self.seen(node).image.clone();
            image.backing_image = below;
            below = Some(Box::new(image));
        }
        let mut image = self.seen(node).image.clone();
        image.backing_image = below;
        image
    }

    /// A node, with its image.
    pub(in crate::commands) fn device_info(
        &mut self,
        node: &Arc<Node>,
        depth: Depth,
    ) -> BlockDeviceInfo {
        let below = chain(node).nth(1);
        let backing_file = below.map(|below| self.seen(&below).info.filename.clone());
        let image = self.image_chain(node, depth);
        let info = &self.seen(node).info;
        device_info(node, depth, info, (image, backing_file))
    }
}

fn device_info(
    node: &Arc<Node>,
    depth: Depth,
    info: &DriverInfo,
    (image, backing_file): (ImageInfo, Option<String>),
) -> BlockDeviceInfo {
    let Behaviour {
        read_only,
        discard: _,
        detect_zeroes,
        cache,
    } = node.behaviour();
    let chain_below = chain(node).skip(1);
    let unsettled = info.unsettled_tables;
    let unsettled = (unsettled > 0).then(|| signed(unsettled));
    let snapshot = info.snapshot.clone().map(super::snapshot);
    BlockDeviceInfo {
        file: info.filename.clone(),
        node_name: Some(node.name().to_owned()),
        ro: read_only,
        drv: info.driver.to_owned(),
        backing_file,
        backing_file_depth: match depth {
            Depth::WholeChain => signed(chain_below.count() as u64),
            Depth::Flat => 0,
        },
        active: true,
        encrypted: false,
        detect_zeroes: match detect_zeroes {
            DetectZeroes::Off => BlockdevDetectZeroesOptions::Off,
            DetectZeroes::On => BlockdevDetectZeroesOptions::On,
            DetectZeroes::Unmap => BlockdevDetectZeroesOptions::Unmap,
        },
        bps: 0,
        bps_rd: 0,
        bps_wr: 0,
        iops: 0,
        iops_rd: 0,
        iops_wr: 0,
        image,
        cache: cache_info(cache),
        write_threshold: 0,
        x_unsettled_tables: unsettled,
        x_snapshot: snapshot,
    }
}

/// What the driver says of itself, and of the file that holds its bytes, which a format does not know.
fn facts(node: &Node) -> DriverInfo {
    let mut info = node.driver().info();
    let mut below = node.link("file").or_else(|| node.link(Link::IMAGE));
    while let Some(file) = below {
        let DriverInfo {
            filename,
            actual_size,
            ..
        } = file.driver().info();
        if info.filename.is_empty() {
            info.filename = filename;
        }
        info.actual_size = info.actual_size.or(actual_size);
        below = file.link("file");
    }
    if let Some(data) = node.link("data-file") {
        let inside = info.actual_size.unwrap_or(0);
        info.actual_size = facts(&data).actual_size.map(|outside| inside + outside);
    }
    info
}

/// The node whose bytes these are in the end.
fn bottom(node: &Arc<Node>) -> Arc<Node> {
    let mut bottom = node.clone();
    while let Some(file) = bottom.link("file") {
        bottom = file;
    }
    bottom
}

/// The node and what backs it, from the top down. Raw layers and filters are no links of the chain. A snapshot is backed by
/// what backs its image.
fn chain(node: &Arc<Node>) -> impl Iterator<Item = Arc<Node>> {
    std::iter::successors(Some(node.clone()), |node| {
        let image = node.link(Link::IMAGE);
        image.as_ref().unwrap_or(node).link("backing")
    })
}

fn image(node: &Arc<Node>, info: DriverInfo, backing_image: Option<Box<ImageInfo>>) -> ImageInfo {
    let DriverInfo {
        driver,
        filename,
        cluster_size,
        backing_filename,
        backing_format,
        actual_size,
        specific,
        dirty,
        // Facts of the node, not of the image.
        unsettled_tables: _,
        snapshot: _,
    } = info;
    let snapshots: Vec<SnapshotInfo> = node
        .driver()
        .snapshots()
        .map(|snapshots| snapshots.list())
        .unwrap_or_default()
        .into_iter()
        .map(super::snapshot)
        .collect();
    ImageInfo {
        // Where nothing is stored nothing can be dirty.
        dirty_flag: (bottom(node).driver().info().driver != "null-co").then_some(dirty),
        actual_size: actual_size.map(signed),
        virtual_size: signed(node.size()),
        cluster_size: cluster_size.map(signed),
        full_backing_filename: backing_filename
            .as_deref()
            .map(|backing| resolve(&filename, backing)),
        backing_filename,
        backing_filename_format: backing_format,
        snapshots: (!snapshots.is_empty()).then_some(snapshots),
        format_specific: specific_info(driver, specific),
        backing_image,
        format: driver.to_owned(),
        filename,
    }
}

/// Where a backing file is, whose name is relative to the image that names it.
fn resolve(image: &str, backing: &str) -> String {
    let has_protocol = backing
        .split_once(':')
        .is_some_and(|(protocol, _)| !protocol.contains('/'));
    if has_protocol || backing.starts_with('/') {
        return backing.to_owned();
    }
    match Path::new(image).parent() {
        Some(folder) => folder.join(backing).to_string_lossy().into_owned(),
        None => backing.to_owned(),
    }
}

fn specific_info(driver: &str, specific: FormatSpecific) -> Option<ImageInfoSpecific> {
    let branch = match specific {
        FormatSpecific::None if driver == "file" => {
            ImageInfoSpecificBranch::File(ImageInfoSpecificFileWrapper {
                data: ImageInfoSpecificFile {
                    extent_size_hint: None,
                },
            })
        }
        FormatSpecific::None => return None,
        FormatSpecific::Qcow2 {
            compat,
            lazy_refcounts,
            refcount_bits,
            corrupt,
            extended_l2,
            compression_type,
            bitmaps,
            data_file,
            data_file_raw,
        } => ImageInfoSpecificBranch::Qcow2(ImageInfoSpecificQCow2Wrapper {
            data: ImageInfoSpecificQCow2 {
                compat: compat.to_owned(),
                data_file,
                data_file_raw,
                extended_l2,
                lazy_refcounts,
                corrupt,
                refcount_bits: i64::from(refcount_bits),
                bitmaps: (!bitmaps.is_empty())
                    .then(|| bitmaps.into_iter().map(bitmap_info).collect()),
                compression_type: Qcow2CompressionType::from_name(compression_type)
                    .unwrap_or(Qcow2CompressionType::Zlib),
            },
        }),
    };
    Some(ImageInfoSpecific { r#type: branch })
}

fn bitmap_info(bitmap: PersistentBitmap) -> Qcow2BitmapInfo {
    let PersistentBitmap {
        name,
        granularity,
        in_use,
        auto,
    } = bitmap;
    let flags = [
        (in_use, Qcow2BitmapInfoFlags::InUse),
        (auto, Qcow2BitmapInfoFlags::Auto),
    ];
    Qcow2BitmapInfo {
        name,
        granularity,
        flags: flags
            .into_iter()
            .filter_map(|(set, flag)| set.then_some(flag))
            .collect(),
    }
}

fn cache_info(cache: CacheMode) -> BlockdevCacheInfo {
    let CacheMode {
        direct,
        no_flush,
        writethrough,
    } = cache;
    BlockdevCacheInfo {
        writeback: !writethrough,
        direct,
        no_flush,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backing_files_are_found_beside_their_image() {
        for (image, backing, full) in [
            ("o.qcow2", "a.qcow2", "a.qcow2"),
            ("/img/o.qcow2", "a.qcow2", "/img/a.qcow2"),
            ("dir/o.qcow2", "../a.qcow2", "dir/../a.qcow2"),
            ("/img/o.qcow2", "/base/a.qcow2", "/base/a.qcow2"),
            ("/img/o.qcow2", "nbd://host/x", "nbd://host/x"),
        ] {
            assert_eq!(resolve(image, backing), full);
        }
    }

    #[test]
    fn a_bitmap_shows_the_flags_that_are_set() {
        let bitmap = |in_use, auto| {
            let bitmap = PersistentBitmap {
                name: "b".to_owned(),
                granularity: 512,
                in_use,
                auto,
            };
            bitmap_info(bitmap).flags
        };
        let (in_use, auto) = (Qcow2BitmapInfoFlags::InUse, Qcow2BitmapInfoFlags::Auto);
        assert_eq!(bitmap(false, false), []);
        assert_eq!(bitmap(false, true), [auto]);
        assert_eq!(bitmap(true, false), [in_use]);
        assert_eq!(bitmap(true, true), [in_use, auto]);
    }
}
