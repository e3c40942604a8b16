//! New images, as `qemu-img` sees them.

use super::super::testing::{Scratch, assert_qemu_clean, block_on, qemu_img, run};
use super::*;
use crate::protocols::memory::{Fault, Memory, OpKind};

fn options(change: impl FnOnce(&mut CreateOptions)) -> CreateOptions {
    let mut options = CreateOptions::new(1 << 30);
    change(&mut options);
    options
}

fn info(path: &str) -> serde_json::Value {
    serde_json::from_str(&qemu_img(&["info", "-U", "--output=json", path])).unwrap()
}

#[test]
fn qemu_finds_every_geometry_sound_and_shows_what_was_asked() {
    let scratch = Scratch::new();
    for cluster_bits in 9..=21 {
        for order in 0..=6 {
            let size = 3 << (2 * cluster_bits - 5);
            let made = options(|o| {
                o.size = size;
                o.cluster_size = 1 << cluster_bits;
                o.refcount_bits = 1 << order;
                o.lazy_refcounts = order % 2 == 0;
                if order % 2 == 1 {
                    o.compression_type = CompressionType::Zstd;
                }
                o.extended_l2 = order % 3 == 1 && cluster_bits >= 14;
                if order % 3 == 0 && cluster_bits < 14 {
                    o.preallocation = Preallocation::Metadata;
                }
            });
            let disk = Memory::new(0);
            block_on(create(&disk.child(), &made)).unwrap();
            let path = scratch.save("new.qcow2", &disk);
            let report = assert_qemu_clean(&path);
            if made.preallocation == Preallocation::Metadata {
                assert_eq!(report["allocated-clusters"], report["total-clusters"]);
            }
            let info = info(path.to_str().unwrap());
            assert_eq!(info["virtual-size"], size);
            assert_eq!(info["cluster-size"], 1_u64 << cluster_bits);
            let data = &info["format-specific"]["data"];
            assert_eq!(data["refcount-bits"], 1 << order);
            assert_eq!(data["lazy-refcounts"], made.lazy_refcounts);
            assert_eq!(data["compression-type"], made.compression_type.name());
            assert_eq!(data["extended-l2"], made.extended_l2);
            assert_eq!(data["compat"], "1.1");
        }
    }
}

#[test]
fn version_2_and_a_backing_file_are_written_as_asked() {
    let scratch = Scratch::new();
    for cluster_size in [512, 65536] {
        let made = options(|o| {
            o.size = 1 << 20;
            o.cluster_size = cluster_size;
            o.compat = Compat::V0_10;
            o.backing.name = Some("base image.raw".to_owned());
            o.backing.format = Some("raw".to_owned());
        });
        let disk = Memory::with_content(&[0xff; 3000]);
        block_on(create(&disk.child(), &made)).unwrap();
        let path = scratch.save("old.qcow2", &disk);
        let info = info(path.to_str().unwrap());
        assert_eq!(info["format-specific"]["data"]["compat"], "0.10");
        assert_eq!(info["backing-filename"], "base image.raw");
        assert_eq!(info["backing-filename-format"], "raw");
    }
}

#[test]
fn preallocated_clusters_read_as_zeroes_and_take_writes_in_place() {
    for extended_l2 in [false, true] {
        assert_preallocated(&options(|o| {
            o.size = 70 << 20;
            o.preallocation = Preallocation::Metadata;
            o.extended_l2 = extended_l2;
        }));
    }
}

fn assert_preallocated(made: &CreateOptions) {
    let scratch = Scratch::new();
    let disk = Memory::new(0);
    block_on(create(&disk.child(), made)).unwrap();
    let path = scratch.save("full.qcow2", &disk);
    let path = path.to_str().unwrap();
    let before = std::fs::metadata(path).unwrap().len();
    let io = run(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "read -P 0 0 70M",
            "-c",
            "write -P 7 33M 1M",
            "-c",
            "read -P 7 33M 1M",
            path,
        ],
    );
    let text = String::from_utf8_lossy(&io.stdout).into_owned();
    assert!(
        io.status.success() && !text.contains("verification failed"),
        "{text}"
    );
    assert_eq!(std::fs::metadata(path).unwrap().len(), before);
    assert_qemu_clean(std::path::Path::new(path));
}

#[test]
fn a_device_of_fixed_size_gets_zero_clusters_over_its_old_bytes() {
    let scratch = Scratch::new();
    let disk = Memory::with_content(&vec![0xee; 3 << 20]);
    disk.set_limits(crate::driver::RequestLimits {
        alignment: 512,
        preferred: 512,
        growable: false,
    });
    let made = options(|o| {
        o.size = 1 << 20;
        o.preallocation = Preallocation::Metadata;
    });
    block_on(create(&disk.child(), &made)).unwrap();
    let path = scratch.save("device.qcow2", &disk);
    assert_qemu_clean(&path);
    let io = run(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "read -P 0 0 1M",
            path.to_str().unwrap(),
        ],
    );
    assert!(!String::from_utf8_lossy(&io.stdout).contains("verification failed"));
    let too_large = block_on(create(&disk.child(), &options(|o| o.size = 4 << 20)));
    assert!(
        too_large.is_ok(),
        "without preallocation the size does not matter"
    );
    let error = block_on(create(
        &disk.child(),
        &options(|o| o.preallocation = Preallocation::Metadata),
    ))
    .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
}

#[test]
fn wrong_options_are_refused_with_qemus_texts_and_nothing_is_written() {
    let cases: [(&str, CreateOptions); 11] = [
        (
            "Cluster size must be a power of two between 512 and 2048k",
            options(|o| o.cluster_size = 1000),
        ),
        (
            "Cluster size must be a power of two between 512 and 2048k",
            options(|o| o.cluster_size = 4 << 20),
        ),
        (
            "Refcount width must be a power of two and may not exceed 64 bits",
            options(|o| o.refcount_bits = 128),
        ),
        (
            "Different refcount widths than 16 bits require compatibility level 1.1 or above \
             (use version=v3 or greater)",
            options(|o| {
                o.refcount_bits = 8;
                o.compat = Compat::V0_10;
            }),
        ),
        (
            "Lazy refcounts only supported with compatibility level 1.1 and above \
             (use version=v3 or greater)",
            options(|o| {
                o.lazy_refcounts = true;
                o.compat = Compat::V0_10;
            }),
        ),
        (
            "Non-zlib compression type is only supported with compatibility level 1.1 and above \
             (use version=v3 or greater)",
            options(|o| {
                o.compression_type = CompressionType::Zstd;
                o.compat = Compat::V0_10;
            }),
        ),
        (
            "Extended L2 entries are only supported with compatibility level 1.1 and above \
             (use version=v3 or greater)",
            options(|o| {
                o.extended_l2 = true;
                o.compat = Compat::V0_10;
            }),
        ),
        (
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            options(|o| {
                o.extended_l2 = true;
                o.cluster_size = 8192;
            }),
        ),
        (
            "Backing format cannot be used without backing file",
            options(|o| o.backing.format = Some("raw".to_owned())),
        ),
        (
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
            options(|o| {
                o.cluster_size = 512;
                o.size = 256 << 30;
            }),
        ),
        (
            "Image size must be a multiple of 512 bytes",
            options(|o| o.size = 1000),
        ),
    ];
    for (text, wrong) in cases {
        let disk = Memory::new(0);
        let error = block_on(create(&disk.child(), &wrong)).unwrap_err();
        assert_eq!(error.message(), text);
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert_eq!(disk.count(OpKind::Write) + disk.count(OpKind::Resize), 0);
    }
}

#[test]
fn a_creation_that_fails_leaves_no_image_that_opens() {
    let made = options(|o| o.preallocation = Preallocation::Metadata);
    for skip in 0..20 {
        let disk = Memory::new(0);
        disk.fail_once(OpKind::Write, skip, Fault::NoSpace);
        let result = block_on(create(&disk.child(), &made));
        let magic = disk.content().get(..4) == Some(b"QFI\xfb");
        assert_eq!(result.is_ok(), magic, "write {skip} failed");
        if result.is_ok() {
            assert!(skip > 4, "only {skip} writes were made to fail");
            return;
        }
    }
    panic!("20 writes were not enough");
}
