//! The checker against `qemu-img check`, on sound and on damaged images.

use std::path::Path;
use std::sync::Arc;

use super::super::testing::{Scratch, assert_qemu_clean, block_on, qemu_check, qemu_img, qemu_io};
use super::*;
use crate::driver::Requests;
use crate::protocols::memory::{Change, Memory};

/// An image of qemu-img's with data, zeroes, a compressed cluster, discards and two snapshots.
pub(super) fn sample(scratch: &Scratch, options: &str) -> Arc<Memory> {
    let path = scratch.path("sample.qcow2");
    let path = path.to_str().unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path, "4M"]);
    let io = |commands: &[&str]| qemu_io(path, commands);
    io(&[
        "write -P 1 0 1M",
        "write -c -P 2 1M 128k",
        "write -P 3 3M 64k",
    ]);
    qemu_img(&["snapshot", "-c", "first", path]);
    io(&["write -P 4 64k 256k", "discard 512k 128k"]);
    qemu_img(&["snapshot", "-c", "second", path]);
    io(&["write -P 5 2M 192k", "write -c -P 6 2560k 64k"]);
    scratch.load("sample.qcow2")
}

pub(super) fn overwrite(disk: &Memory, offset: u64, bytes: &[u8]) {
    let change = Change::Write {
        offset,
        data: bytes.to_vec().into(),
        fua: false,
    };
    disk.apply(&change).unwrap();
}

pub(super) fn u64_at(disk: &Memory, offset: u64) -> u64 {
    let bytes = block_on(disk.read(offset, 8)).unwrap().to_bytes();
    u64::from_be_bytes(bytes[..].try_into().unwrap())
}

/// What both checkers say, in one comparable form.
type Counts = [u64; 8];

fn ours(disk: &Arc<Memory>) -> (Counts, Vec<String>) {
    let r = block_on(check(&disk.child())).unwrap();
    let counts = [
        r.check_errors,
        r.corruptions,
        r.leaks,
        r.total_clusters,
        r.allocated_clusters,
        r.fragmented_clusters,
        r.compressed_clusters,
        r.image_end_offset,
    ];
    (counts, r.findings)
}

fn qemus(path: &Path) -> (Option<Counts>, String) {
    let (report, findings) = qemu_check(path);
    let field = |name: &str| report.get(name).map_or(0, |value| value.as_u64().unwrap());
    let counts = report.is_object().then(|| {
        [
            field("check-errors"),
            field("corruptions"),
            field("leaks"),
            field("total-clusters"),
            field("allocated-clusters"),
            field("fragmented-clusters"),
            field("compressed-clusters"),
            field("image-end-offset"),
        ]
    });
    (counts, findings)
}

pub(super) const OPTIONS: [&str; 6] = [
    "cluster_size=4k",
    "cluster_size=512,refcount_bits=32",
    "cluster_size=64k,compat=0.10",
    "cluster_size=4k,refcount_bits=64",
    "cluster_size=1k,refcount_bits=16,lazy_refcounts=on",
    "cluster_size=32k,refcount_bits=32",
];

#[test]
fn sound_images_are_clean_with_the_same_figures_as_qemus() {
    let scratch = Scratch::new();
    for options in OPTIONS {
        let disk = sample(&scratch, options);
        let (counts, findings) = ours(&disk);
        let (wanted, text) = qemus(&scratch.save("copy.qcow2", &disk));
        assert_eq!(Some(counts), wanted, "{options}: {findings:?} {text}");
        assert!(block_on(check(&disk.child())).unwrap().is_clean());
    }
}

/// Places of 64-bit values that hold an image together.
fn metadata_words(disk: &Memory) -> Vec<u64> {
    let header = block_on(read_header(&Child::new(disk.fork()))).unwrap();
    let cluster_size = header.geometry().cluster_size();
    let l1 = header.l1_table_offset.0;
    let mut words: Vec<u64> = (0..u64::from(header.l1_size)).map(|n| l1 + 8 * n).collect();
    for table in words.clone() {
        let l2 = u64_at(disk, table) & 0x00ff_ffff_ffff_fe00;
        if l2 != 0 {
            words.extend((0..cluster_size / 8).map(|n| l2 + 8 * n));
        }
    }
    let reftable = header.refcount_table_offset.0;
    for entry in (0..cluster_size / 8).map(|n| reftable + 8 * n) {
        let block = u64_at(disk, entry);
        if block != 0 {
            words.push(entry);
            words.extend((0..cluster_size / 8).map(|n| block + 8 * n));
        }
    }
    words.extend((0..4).map(|n| header.snapshots_offset.0 + 8 * n));
    words.retain(|&at| u64_at(disk, at) != 0);
    words
}

#[test]
fn damaged_images_get_the_same_counts_as_from_qemu() {
    let scratch = Scratch::new();
    let seed = 20;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut compared = 0;
    for options in [
        "cluster_size=4k",
        "cluster_size=512,refcount_bits=32",
        "cluster_size=1k,refcount_bits=16",
    ] {
        let sound = sample(&scratch, options);
        let words = metadata_words(&sound);
        for round in 0..40 {
            let disk = sound.fork();
            for _ in 0..random.usize(1..4) {
                let at = words[random.usize(..words.len())];
                let old = u64_at(&disk, at);
                let new = match random.u8(..6) {
                    0 => 0,
                    1 => old ^ 1 << 63,
                    2 => old ^ 1 << random.u32(..64),
                    3 => old.wrapping_add(512 * random.u64(..64)),
                    4 => u64_at(&disk, words[random.usize(..words.len())]),
                    _ => old ^ 1 << random.u32(9..20),
                };
                overwrite(&disk, at, &new.to_be_bytes());
            }
            let (wanted, text) = qemus(&scratch.save("damaged.qcow2", &disk));
            let Some(wanted) = wanted else {
                // qemu-img gives up without figures; we must not call such an image sound either.
                continue;
            };
            let (counts, findings) = ours(&disk);
            assert_eq!(
                counts, wanted,
                "{options}, seed {seed}, round {round}: ours {findings:#?}\nQEMU's {text}"
            );
            compared += 1;
        }
    }
    assert!(compared > 100, "only {compared} images were compared");
}

#[test]
fn hostile_headers_and_tables_never_panic() {
    let scratch = Scratch::new();
    let sound = sample(&scratch, "cluster_size=512");
    let mut random = fastrand::Rng::with_seed(7);
    let words = metadata_words(&sound);
    for _ in 0..400 {
        let disk = sound.fork();
        for _ in 0..random.usize(1..6) {
            let at = match random.bool() {
                true => random.u64(..112),
                false => words[random.usize(..words.len())],
            };
            overwrite(&disk, at, &random.u64(..).to_be_bytes());
        }
        // Any answer is fine; what counts is that there is one.
        let _ = block_on(check(&disk.child()));
        let _ = block_on(repair(&disk.child(), Repair::All, &CheckOptions::default()));
    }
}

#[test]
fn structures_that_share_a_cluster_are_found_although_refcounts_agree() {
    let scratch = Scratch::new();
    let disk = sample(&scratch, "cluster_size=4k");
    let header = block_on(read_header(&disk.child())).unwrap();
    let words = metadata_words(&disk);
    let l1 = header.l1_table_offset.0;
    let l2 = u64_at(&disk, l1) & 0x00ff_ffff_ffff_fe00;
    let entry = words.iter().find(|&&at| at > l2 && at < l2 + 4096).unwrap();
    overwrite(&disk, *entry, &l1.to_be_bytes());
    let report = block_on(check(&disk.child())).unwrap();
    assert_eq!(report.overlaps, 1, "{:?}", report.findings);
    assert!(report.is_broken());
}

#[test]
fn wrong_refcounts_and_flags_are_repaired() {
    let scratch = Scratch::new();
    for options in OPTIONS {
        let disk = sample(&scratch, options);
        let path = scratch.save("before.qcow2", &disk);
        let before = qemu_img(&["map", "--output=json", path.to_str().unwrap()]);
        let header = block_on(read_header(&disk.child())).unwrap();
        let cluster_size = header.geometry().cluster_size();
        // Every refcount of the first block becomes 0.
        let block = u64_at(&disk, header.refcount_table_offset.0);
        overwrite(&disk, block, &vec![0; cluster_size as usize]);
        let report = block_on(check(&disk.child())).unwrap();
        assert!(report.is_broken(), "{options}");
        block_on(repair(&disk.child(), Repair::All, &CheckOptions::default())).unwrap();
        let after = block_on(check(&disk.child())).unwrap();
        assert!(after.is_clean(), "{options}: {:#?}", after.findings);
        let path = scratch.save("repaired.qcow2", &disk);
        assert_qemu_clean(&path);
        let repaired = qemu_img(&["map", "--output=json", path.to_str().unwrap()]);
        assert_eq!(before, repaired, "{options}");
    }
}
