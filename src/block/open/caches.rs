//! How much metadata of a qcow2 image is kept in memory: QEMU's rules for `cache-size` and its parts.

use super::options::Qcow2Cache;
use crate::error::{Error, ErrorKind, Result};
use crate::limits::{QCOW2_L2_CACHE_BYTES, QCOW2_REFCOUNT_CACHE_BYTES};

/// Of a total that is not divided by the user, the part that goes to refcount blocks. One of them covers as much of the
/// image as four L2 tables at the usual 16 bits, and only writers need them.
const REFCOUNT_SHARE: u64 = 8;

/// The smallest entry of a cache of L2 tables in QEMU.
const MIN_ENTRY_BYTES: u64 = 512;

/// The sizes of the two caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CacheBytes {
    pub(super) l2_bytes: u64,
    pub(super) refcount_bytes: u64,
}

/// Divides what the user allows. Errors: the parts and the whole contradict each other.
pub(super) fn share(cache: &Qcow2Cache) -> Result<CacheBytes> {
    let Some(total) = cache.total else {
        return Ok(CacheBytes {
            l2_bytes: cache.l2.unwrap_or(QCOW2_L2_CACHE_BYTES),
            refcount_bytes: cache.refcounts.unwrap_or(QCOW2_REFCOUNT_CACHE_BYTES),
        });
    };
    let (l2_bytes, refcount_bytes) = match (cache.l2, cache.refcounts) {
        (Some(_), Some(_)) => {
            return Err(invalid(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            ));
        }
        (Some(l2), None) => {
            let rest = total.checked_sub(l2);
            (l2, rest.ok_or_else(|| exceeds("l2-cache-size"))?)
        }
        (None, Some(refcounts)) => {
            let rest = total.checked_sub(refcounts);
            let rest = rest.ok_or_else(|| exceeds("refcount-cache-size"))?;
            (rest, refcounts)
        }
        (None, None) => (total - total / REFCOUNT_SHARE, total / REFCOUNT_SHARE),
    };
    Ok(CacheBytes {
        l2_bytes,
        refcount_bytes,
    })
}

/// Checks `l2-cache-entry-size`.
pub(super) fn check_entry(bytes: Option<u64>, cluster_size: u64) -> Result<()> {
    match bytes {
        Some(bytes)
            if !bytes.is_power_of_two() || !(MIN_ENTRY_BYTES..=cluster_size).contains(&bytes) =>
        {
            Err(Error::new(
                ErrorKind::InvalidInput,
                format!(
                    "L2 cache entry size must be a power of two between {MIN_ENTRY_BYTES} and the \
                     cluster size ({cluster_size})"
                ),
            ))
        }
        _ => Ok(()),
    }
}

fn exceeds(part: &str) -> Error {
    invalid(&format!("{part} may not exceed cache-size"))
}

fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_total_is_kept_however_it_is_divided() {
        let cases = [
            (Some(800), None, None, (700, 100)),
            (Some(800), Some(300), None, (300, 500)),
            (Some(800), None, Some(800), (0, 800)),
            (Some(0), None, None, (0, 0)),
            (None, Some(5), None, (5, QCOW2_REFCOUNT_CACHE_BYTES)),
            (None, None, Some(5), (QCOW2_L2_CACHE_BYTES, 5)),
        ];
        for (total, l2, refcounts, expected) in cases {
            let cache = Qcow2Cache {
                total,
                l2,
                refcounts,
                l2_entry: None,
            };
            let shared = share(&cache).unwrap();
            assert_eq!((shared.l2_bytes, shared.refcount_bytes), expected);
        }
    }

    #[test]
    fn contradictions_get_qemus_sentences() {
        let cases = [
            (
                Some(1),
                Some(0),
                "cache-size, l2-cache-size and refcount-cache-size may not",
            ),
            (Some(9), None, "l2-cache-size may not exceed cache-size"),
            (
                None,
                Some(9),
                "refcount-cache-size may not exceed cache-size",
            ),
        ];
        for (l2, refcounts, expected) in cases {
            let cache = Qcow2Cache {
                total: Some(8),
                l2,
                refcounts,
                l2_entry: None,
            };
            let error = share(&cache).unwrap_err();
            assert!(error.message().starts_with(expected), "{error}");
        }
    }

    #[test]
    fn an_entry_is_a_power_of_two_up_to_a_cluster() {
        for bytes in [None, Some(512), Some(65536)] {
            check_entry(bytes, 65536).unwrap();
        }
        for bytes in [0, 256, 1000, 131_072] {
            assert!(check_entry(Some(bytes), 65536).is_err(), "{bytes}");
        }
    }
}
