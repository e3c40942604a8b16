//! `BlockdevOptions` to the engine's node options.

use std::sync::Arc;

use block::open::{
    Aio, BackingOption, CacheMode, DetectZeroes, DiscardMode, DriverOptions, FileOptions, Locking,
    NodeOptions, NodeRef, NullOptions, Qcow2Cache, Qcow2Options, RawOptions, UnnamedFormat,
};
use qapi::rt::QmpError;
use qapi::types::{
    BlockdevAioOptions, BlockdevCacheOptions, BlockdevDetectZeroesOptions, BlockdevDiscardOptions,
    BlockdevOptions, BlockdevOptionsBranch, BlockdevOptionsFile, BlockdevOptionsNull,
    BlockdevOptionsQcow2, BlockdevOptionsRaw, BlockdevRef, BlockdevRefOrNull, OnOffAuto,
};

/// Converts a node with the layers that are written out inside of it. What they inherit is the engine's matter.
pub(in crate::commands) fn node_options(options: BlockdevOptions) -> Result<NodeOptions, QmpError> {
    convert(options, Sharing::Exclusive)
}

/// Converts what stands for a node.
pub(in crate::commands) fn node_ref(below: BlockdevRef) -> Result<NodeRef, QmpError> {
    reference(below, Sharing::Exclusive)
}

/// Whether other programs may use the image at the same time. A layer takes it over from the one it is inside of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sharing {
    Exclusive,
    Forced,
}

fn convert(options: BlockdevOptions, above: Sharing) -> Result<NodeOptions, QmpError> {
    let BlockdevOptions {
        driver,
        node_name,
        discard,
        cache,
        read_only,
        auto_read_only,
        force_share,
        detect_zeroes,
    } = options;
    let BlockdevCacheOptions { direct, no_flush } = cache.unwrap_or(BlockdevCacheOptions {
        direct: None,
        no_flush: None,
    });
    let sharing = match force_share {
        Some(true) if read_only != Some(true) && above == Sharing::Exclusive => {
            return Err(QmpError::generic(
                "force-share=on can only be used with read-only images",
            ));
        }
        Some(true) => Sharing::Forced,
        Some(false) => Sharing::Exclusive,
        None => above,
    };
    let driver = driver_options(driver, sharing)?;
    let shows_snapshot = matches!(&driver, DriverOptions::Qcow2(qcow2) if qcow2.snapshot.is_some());
    if shows_snapshot && read_only == Some(false) && auto_read_only != Some(true) {
        return Err(QmpError::generic(
            "A node with 'x-snapshot' is read-only: leave 'read-only' out",
        ));
    }
    Ok(NodeOptions {
        node_name,
        read_only: shows_snapshot || read_only.unwrap_or(false),
        auto_read_only: auto_read_only.unwrap_or(false),
        discard: match discard {
            Some(BlockdevDiscardOptions::Unmap) => DiscardMode::Unmap,
            Some(BlockdevDiscardOptions::Ignore) | None => DiscardMode::Ignore,
        },
        detect_zeroes: match detect_zeroes {
            None | Some(BlockdevDetectZeroesOptions::Off) => DetectZeroes::Off,
            Some(BlockdevDetectZeroesOptions::On) => DetectZeroes::On,
            Some(BlockdevDetectZeroesOptions::Unmap) => DetectZeroes::Unmap,
        },
        cache: CacheMode {
            direct: direct.unwrap_or(false),
            no_flush: no_flush.unwrap_or(false),
            writethrough: false,
        },
        driver,
    })
}

fn driver_options(
    driver: BlockdevOptionsBranch,
    sharing: Sharing,
) -> Result<DriverOptions, QmpError> {
    Ok(match driver {
        BlockdevOptionsBranch::File(options) => DriverOptions::File(file_options(options, sharing)),
        BlockdevOptionsBranch::HostDevice(options) => {
            DriverOptions::HostDevice(file_options(options, sharing))
        }
        BlockdevOptionsBranch::NullCo(options) => DriverOptions::Null(null_options(options)?),
        BlockdevOptionsBranch::Raw(options) => {
            let BlockdevOptionsRaw { file, offset, size } = options;
            DriverOptions::Raw(RawOptions {
                file: reference(file, sharing)?,
                offset: offset
                    .map(|offset| unsigned("offset", offset))
                    .transpose()?,
                size: size.map(|size| unsigned("size", size)).transpose()?,
            })
        }
        BlockdevOptionsBranch::Qcow2(options) => {
            DriverOptions::Qcow2(qcow2_options(options, sharing)?)
        }
    })
}

fn file_options(options: BlockdevOptionsFile, sharing: Sharing) -> FileOptions {
    let BlockdevOptionsFile {
        filename,
        locking,
        aio,
        // Sizes of batches are the engine's matter, and no image changes hands while it is open here.
        aio_max_batch: _,
        drop_cache: _,
    } = options;
    FileOptions {
        filename,
        aio: match aio {
            None | Some(BlockdevAioOptions::Threads) => Aio::Threads,
            // Linux' older interface for the same purpose; io_uring does all it did.
            Some(BlockdevAioOptions::IoUring | BlockdevAioOptions::Native) => Aio::IoUring,
        },
        locking: match locking {
            // The user takes the responsibility for what others do to the image.
            _ if sharing == Sharing::Forced => Locking::Off,
            None | Some(OnOffAuto::Auto) => Locking::Auto,
            Some(OnOffAuto::On) => Locking::On,
            Some(OnOffAuto::Off) => Locking::Off,
        },
    }
}

fn null_options(options: BlockdevOptionsNull) -> Result<NullOptions, QmpError> {
    let BlockdevOptionsNull {
        size,
        latency_ns,
        read_zeroes,
    } = options;
    let default = NullOptions::default();
    Ok(NullOptions {
        size: size.map_or(Ok(default.size), |size| unsigned("size", size))?,
        read_zeroes: read_zeroes.unwrap_or(default.read_zeroes),
        latency_ns: latency_ns.unwrap_or(default.latency_ns),
    })
}

fn qcow2_options(
    options: BlockdevOptionsQcow2,
    sharing: Sharing,
) -> Result<Qcow2Options, QmpError> {
    let BlockdevOptionsQcow2 {
        file,
        backing,
        lazy_refcounts,
        pass_discard_request,
        pass_discard_snapshot,
        // Writes are always checked against all that can be named here, at no cost.
        overlap_check: _,
        cache_size,
        l2_cache_size,
        l2_cache_entry_size,
        refcount_cache_size,
        cache_clean_interval,
        data_file,
        x_snapshot,
    } = options;
    if cache_clean_interval.is_some_and(|seconds| u32::try_from(seconds).is_err()) {
        return Err(QmpError::generic("Cache clean interval too big"));
    }
    let bytes = |name, size: Option<i64>| size.map(|size| unsigned(name, size)).transpose();
    Ok(Qcow2Options {
        file: reference(file, sharing)?,
        backing: match backing {
            None => BackingOption::FromImage(UnnamedFormat::Refused),
            Some(BlockdevRefOrNull::Null) => BackingOption::Detached,
            Some(BlockdevRefOrNull::Reference(name)) if name.is_empty() => BackingOption::Detached,
            Some(BlockdevRefOrNull::Reference(name)) => BackingOption::Node(NodeRef::Name(name)),
            Some(BlockdevRefOrNull::Definition(options)) => {
                BackingOption::Node(NodeRef::Inline(Arc::new(convert(*options, sharing)?)))
            }
        },
        data_file: data_file.map(|file| reference(file, sharing)).transpose()?,
        lazy_refcounts,
        pass_discard_request,
        pass_discard_snapshot,
        cache: Qcow2Cache {
            total: bytes("cache-size", cache_size)?,
            l2: bytes("l2-cache-size", l2_cache_size)?,
            refcounts: bytes("refcount-cache-size", refcount_cache_size)?,
            l2_entry: bytes("l2-cache-entry-size", l2_cache_entry_size)?,
        },
        snapshot: x_snapshot,
    })
}

fn reference(reference: BlockdevRef, above: Sharing) -> Result<NodeRef, QmpError> {
    Ok(match reference {
        BlockdevRef::Reference(name) => NodeRef::Name(name),
        BlockdevRef::Definition(options) => NodeRef::Inline(Arc::new(convert(*options, above)?)),
    })
}

fn unsigned(name: &str, value: i64) -> Result<u64, QmpError> {
    u64::try_from(value).map_err(|_| {
        QmpError::generic(format!(
            "Value '{value}' is out of range for parameter '{name}'"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use qapi::rt::Path;

    fn converted(json: &str) -> Result<NodeOptions, String> {
        let value = serde_json::from_str(json).unwrap();
        let options = BlockdevOptions::decode(value, &Path::json()).unwrap();
        node_options(options).map_err(|error| error.desc)
    }

    #[test]
    fn sharing_by_force_reaches_the_layer_with_the_file() {
        let node = converted(
            r#"{"driver": "qcow2", "node-name": "a", "read-only": true, "force-share": true,
                "file": {"driver": "file", "filename": "a"}}"#,
        )
        .unwrap();
        let DriverOptions::Qcow2(Qcow2Options {
            file: NodeRef::Inline(file),
            ..
        }) = node.driver
        else {
            panic!("{node:?}");
        };
        let DriverOptions::File(file) = &file.driver else {
            panic!("{file:?}");
        };
        assert_eq!(file.locking, Locking::Off);
    }

    #[test]
    fn values_that_mean_nothing_are_refused() {
        for (json, message) in [
            (
                r#"{"driver": "null-co", "size": -1}"#,
                "Value '-1' is out of range for parameter 'size'",
            ),
            (
                r#"{"driver": "null-co", "force-share": true}"#,
                "force-share=on can only be used with read-only images",
            ),
        ] {
            assert_eq!(converted(json), Err(message.to_owned()), "{json}");
        }
    }
}
