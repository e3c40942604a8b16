//! Headers of many sizes, changed into each other: every state on the way is the old or the new one.

use super::super::{
    Autoclear, Compatible, EXT_BACKING_FORMAT, Extension, Incompatible, Version, features,
};
use super::*;
use crate::error::ErrorKind;
use crate::units::HostOffset;

fn random_header(random: &mut fastrand::Rng, cluster_bits: u32) -> Header {
    let version = match random.u8(..4) {
        0 => Version::V2,
        _ => Version::V3,
    };
    let mut extensions = Vec::new();
    if random.bool() {
        let (kind, data) = (EXT_BACKING_FORMAT, b"qcow2".to_vec());
        extensions.push(Extension { kind, data });
    }
    for kind in 1..=random.u32(..3) {
        let data = (0..random.usize(..60)).map(|_| random.u8(..)).collect();
        extensions.push(Extension { kind, data });
    }
    if random.bool() {
        let (kind, data) = (EXT_FEATURE_NAMES, features::name_table());
        let at = random.usize(..=extensions.len());
        extensions.insert(at, Extension { kind, data });
    }
    let lengths = [1, 30, 200, 400, 1023];
    let name_len = lengths[random.usize(..lengths.len())];
    let name = (0..name_len).map(|_| random.alphanumeric()).collect();
    Header {
        version,
        backing_name: random.bool().then_some(name),
        cluster_bits,
        size: 1 << 20,
        crypt_method: 0,
        l1_size: 1 << 6,
        l1_table_offset: HostOffset(0x40000),
        refcount_table_offset: HostOffset(0x20000),
        refcount_table_clusters: 1,
        nb_snapshots: 0,
        snapshots_offset: HostOffset(0),
        incompatible: Incompatible(0),
        compatible: Compatible(0),
        autoclear: Autoclear(0),
        refcount_order: 4,
        trailing: match version {
            Version::V2 => Vec::new(),
            Version::V3 => vec![0; 8 * random.usize(..3)],
        },
        extensions,
    }
}

fn without_names(header: &Header) -> Header {
    let mut header = header.clone();
    header.extensions.retain(|e| e.kind != EXT_FEATURE_NAMES);
    header
}

/// The cluster with part of some bytes written: any of the sectors that they touch.
fn torn(cluster: &[u8], at: usize, bytes: &[u8], random: &mut fastrand::Rng) -> Vec<u8> {
    let mut state = cluster.to_vec();
    for (index, byte) in bytes.iter().enumerate() {
        if random.u64(..) >> ((at + index) / SECTOR % 64) & 1 != 0 {
            state[at + index] = *byte;
        }
    }
    state
}

#[test]
fn a_torn_rewrite_leaves_the_old_or_the_new_header() {
    let mut random = fastrand::Rng::with_seed(7);
    let (mut refused, mut staged) = (0, 0);
    for round in 0..4000 {
        let cluster_bits = [9, 10, 11, 12, 16][round % 5];
        let old = random_header(&mut random, cluster_bits);
        let Ok(mut cluster) = old.to_bytes() else {
            continue;
        };
        cluster.resize(1 << cluster_bits, 0);
        let mut previous = old;
        // Headers that follow each other, so that names are in odd places too.
        for _ in 0..4 {
            let new = random_header(&mut random, cluster_bits);
            let plan = match Rewrite::plan(&cluster, &new) {
                Ok(plan) => plan,
                Err(error) => {
                    refused += u32::from(error.kind() == ErrorKind::Unsupported);
                    let fits = without_names(&new).to_bytes().is_ok();
                    assert_eq!(fits, error.kind() == ErrorKind::Unsupported);
                    continue;
                }
            };
            assert!((1..=2).contains(&plan.stages.len()));
            staged += plan.stages.len() - 1;
            for stage in plan.stages {
                assert_eq!(without_names(&stage.header), without_names(&new));
                assert_eq!(stage.sector.len(), SECTOR);
                for (at, bytes) in &stage.ahead {
                    assert!(*at >= SECTOR);
                    let state = torn(&cluster, *at, bytes, &mut random);
                    assert_eq!(Header::parse(&state).unwrap(), previous);
                }
                for (at, bytes) in &stage.ahead {
                    cluster[*at..*at + bytes.len()].copy_from_slice(bytes);
                }
                assert_eq!(Header::parse(&cluster).unwrap(), previous);
                cluster[..SECTOR].copy_from_slice(&stage.sector);
                assert_eq!(Header::parse(&cluster).unwrap(), stage.header);
                previous = stage.header;
            }
            let state = torn(&cluster, SECTOR, &plan.rest, &mut random);
            assert_eq!(Header::parse(&state).unwrap(), previous);
            cluster[SECTOR..SECTOR + plan.rest.len()].copy_from_slice(&plan.rest);
            assert_eq!(Header::parse(&cluster).unwrap(), previous);
        }
    }
    assert!(
        refused > 100 && staged > 1000,
        "{refused} refused, {staged} staged"
    );
}

/// A cluster of one sector has no place behind it, and needs none for what fits in without the feature names.
#[test]
fn a_header_of_one_sector_is_rewritten_with_its_backing_name() {
    let mut random = fastrand::Rng::with_seed(2);
    let mut old = random_header(&mut random, 9);
    old.version = Version::V2;
    old.trailing.clear();
    old.extensions.clear();
    old.backing_name = Some("/images/of/a/guest/base.qcow2".to_owned());
    let mut cluster = old.to_bytes().unwrap();
    cluster.resize(SECTOR, 0);
    let mut new = old;
    new.version = Version::V3;
    new.extensions = vec![Extension {
        kind: EXT_FEATURE_NAMES,
        data: features::name_table(),
    }];
    let plan = Rewrite::plan(&cluster, &new).unwrap();
    let [stage] = &plan.stages[..] else {
        panic!("{plan:?}")
    };
    assert!(stage.ahead.is_empty());
    assert_eq!(Header::parse(&stage.sector).unwrap(), without_names(&new));
}

#[test]
fn nothing_of_the_old_name_is_left() {
    let mut random = fastrand::Rng::with_seed(1);
    let mut old = random_header(&mut random, 16);
    old.backing_name = Some("secret".repeat(100));
    let mut cluster = old.to_bytes().unwrap();
    cluster.resize(1 << 16, 0);
    let mut new = old.clone();
    new.backing_name = None;
    let plan = Rewrite::plan(&cluster, &new).unwrap();
    for stage in plan.stages {
        for (at, bytes) in &stage.ahead {
            cluster[*at..*at + bytes.len()].copy_from_slice(bytes);
        }
        cluster[..SECTOR].copy_from_slice(&stage.sector);
    }
    cluster[SECTOR..SECTOR + plan.rest.len()].copy_from_slice(&plan.rest);
    assert!(!cluster.windows(6).any(|bytes| bytes == b"secret"));
    assert_eq!(Header::parse(&cluster).unwrap(), new);
}
