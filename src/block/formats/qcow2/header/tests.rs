//! The header codec against bytes of every kind: whole, short, hostile.

use super::*;

fn sample(version: Version) -> Header {
    Header {
        version,
        backing_name: Some("base.qcow2".into()),
        cluster_bits: 16,
        size: 10 << 30,
        crypt_method: 0,
        l1_size: 20,
        l1_table_offset: HostOffset(0x30000),
        refcount_table_offset: HostOffset(0x10000),
        refcount_table_clusters: 1,
        nb_snapshots: 2,
        snapshots_offset: HostOffset(0x90000),
        incompatible: Incompatible(0),
        compatible: Compatible(match version {
            Version::V2 => 0,
            Version::V3 => Compatible::LAZY_REFCOUNTS,
        }),
        autoclear: Autoclear(0),
        refcount_order: 4,
        trailing: match version {
            Version::V2 => vec![],
            Version::V3 => vec![0, 0, 0, 0, 0, 0, 0, 0, 7, 7, 7, 7, 7, 7, 7, 7],
        },
        extensions: vec![
            Extension {
                kind: EXT_BACKING_FORMAT,
                data: b"qcow2".to_vec(),
            },
            Extension {
                kind: 0x1234_5678,
                data: vec![1, 2, 3],
            },
        ],
    }
}

fn bytes(header: &Header) -> Vec<u8> {
    let mut bytes = header.to_bytes().unwrap();
    bytes.resize(1 << header.cluster_bits, 0);
    bytes
}

fn refused(change: impl FnOnce(&mut Header)) -> String {
    let mut header = sample(Version::V3);
    change(&mut header);
    let parsed = Header::parse(&bytes(&header)).unwrap();
    assert_eq!(parsed, header);
    parsed.validate().unwrap_err().message().to_owned()
}

#[test]
fn a_header_comes_back_as_it_was_with_unknown_parts() {
    for version in [Version::V2, Version::V3] {
        let header = sample(version);
        let read = Header::parse(&bytes(&header)).unwrap();
        assert_eq!(read, header);
        read.validate().unwrap();
        assert_eq!(read.backing_format().as_deref(), Some("qcow2"));
    }
}

#[test]
fn the_switch_is_the_neighbouring_fields_of_the_first_sector() {
    for (version, end) in [(Version::V2, 72), (Version::V3, 80)] {
        let header = sample(version);
        let (offset, part) = header.switch_bytes();
        assert_eq!(offset, HostOffset(36));
        assert_eq!(part, bytes(&header)[36..end]);
    }
}

#[test]
fn no_prefix_of_a_header_panics() {
    let whole = bytes(&sample(Version::V3));
    for len in 0..512 {
        let _ = Header::parse(&whole[..len]);
    }
    for at in 0..200 {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut damaged = whole.clone();
            damaged[at] = value;
            let _ = Header::parse(&damaged).and_then(|header| header.validate());
        }
    }
}

#[test]
fn structure_that_cannot_be_is_refused_by_name() {
    let parse = |at: usize, with: &[u8]| {
        let mut image = bytes(&sample(Version::V3));
        image[at..at + with.len()].copy_from_slice(with);
        Header::parse(&image).unwrap_err().message().to_owned()
    };
    assert_eq!(parse(0, b"QFI\xfc"), "Image is not in qcow2 format");
    assert_eq!(parse(4, &[0, 0, 0, 9]), "Unsupported qcow2 version 9");
    assert_eq!(parse(20, &[0, 0, 0, 8]), "Unsupported cluster size: 2^8");
    assert_eq!(parse(20, &[0, 0, 0, 22]), "Unsupported cluster size: 2^22");
    assert_eq!(parse(8, &[1]), "Invalid backing file offset");
    assert_eq!(parse(16, &[0, 0, 4, 0]), "Backing file name too long");
    assert_eq!(parse(100, &[0, 0, 0, 96]), "qcow2 header too short");
    let long = (1_u32 << 17).to_be_bytes();
    assert_eq!(parse(100, &long), "qcow2 header exceeds cluster size");
    // The first extension starts behind the 120 header bytes.
    assert!(parse(124, &[0xff; 4]).starts_with("Header extension too large"));
}

#[test]
fn fields_outside_of_the_limits_are_refused_by_name() {
    assert!(refused(|h| h.refcount_order = 7).starts_with("Reference count entry width"));
    assert_eq!(refused(|h| h.l1_size = 19), "L1 table is too small");
    assert_eq!(
        refused(|h| h.l1_size = 1 << 23),
        "Active L1 table too large"
    );
    let text = refused(|h| h.l1_table_offset = HostOffset(0x30001));
    assert_eq!(text, "Active L1 table offset invalid");
    let text = refused(|h| h.l1_table_offset = HostOffset(!0xffff));
    assert_eq!(text, "Active L1 table offset invalid");
    assert!(refused(|h| h.refcount_table_clusters = 129).contains("too large"));
    assert!(refused(|h| h.refcount_table_clusters = 0).contains("reference count table"));
    assert_eq!(
        refused(|h| h.nb_snapshots = 65537),
        "Snapshot table too large"
    );
    assert!(refused(|h| h.size = u64::MAX).contains("too big"));
}

#[test]
fn unknown_features_are_refused_with_their_names() {
    let text = refused(|h| {
        h.incompatible = Incompatible(1 << 40 | 1 << 41);
        let mut data = vec![0, 40];
        data.extend(b"time travel");
        data.resize(48, 0);
        let kind = EXT_FEATURE_NAMES;
        h.extensions.push(Extension { kind, data });
    });
    assert_eq!(
        text,
        "Unsupported qcow2 feature(s): time travel, Unknown incompatible feature: 20000000000"
    );
}

#[test]
fn extended_l2_entries_need_clusters_with_room_for_subclusters() {
    let text = refused(|h| {
        h.incompatible = Incompatible(16);
        h.cluster_bits = 13;
    });
    assert_eq!(text, "Unsupported subcluster size: 256");
}

#[test]
fn what_is_not_supported_yet_says_so() {
    assert!(refused(|h| h.crypt_method = 2).contains("LUKS"));
    assert!(
        refused(|h| {
            h.incompatible = Incompatible(8);
            h.trailing[0] = 2;
        })
        .contains("unknown compression type: 2")
    );
    assert!(refused(|h| h.trailing[0] = 1).contains("does not match"));
}
