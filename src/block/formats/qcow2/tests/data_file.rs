//! Guest data in a file of their own.

mod entries;

use super::super::check::check;
use super::*;
use crate::driver::{AmendOptions, BackingFile, NewSnapshot, Preallocation, SnapshotSelector};
use crate::error::ErrorKind;
use crate::formats::qcow2::create::{Compat, DataFileOptions, create_with_data_file};
use crate::formats::qcow2::testing::{block_on, qemu_io};
use crate::protocols::memory::{Fault, OpKind};

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 65536;

/// An image and the file with its data.
struct Pair {
    disk: Arc<Memory>,
    data: Arc<Memory>,
    /// Where the image says that the data file is. QEMU looks for it from where it runs.
    scratch: Arc<Scratch>,
}

fn options(size: u64, raw: bool) -> CreateOptions {
    let mut options = CreateOptions::new(size);
    options.data_file = Some(DataFileOptions {
        name: Some("data.raw".to_owned()),
        raw,
    });
    options
}

impl Pair {
    async fn new(size: u64, raw: bool) -> Pair {
        Pair::make(&options(size, raw)).await
    }

    async fn make(options: &CreateOptions) -> Pair {
        Pair::make_over(Memory::new(0), options).await
    }

    async fn make_over(data: Arc<Memory>, options: &CreateOptions) -> Pair {
        let (disk, scratch) = (Memory::new(0), Arc::new(Scratch::new()));
        let mut options = options.clone();
        let name = scratch.path("data.raw").to_str().unwrap().to_owned();
        options.data_file.as_mut().unwrap().name = Some(name);
        create_with_data_file(&disk.child(), &data.child(), &options)
            .await
            .unwrap();
        Pair {
            disk,
            data,
            scratch,
        }
    }

    /// With the image's bytes as given.
    fn damaged(&self, content: &[u8]) -> Pair {
        Pair {
            disk: Memory::with_content(content),
            data: self.data.fork(),
            scratch: self.scratch.clone(),
        }
    }

    async fn try_open(&self, options: OpenOptions) -> Result<Arc<Qcow2>> {
        let opening = Qcow2::open(self.disk.child(), options).await?;
        let opening = opening.with_data_file(Some(self.data.child()));
        opening.finish(None).await
    }

    async fn open(&self) -> Arc<Qcow2> {
        self.try_open(OpenOptions::default()).await.unwrap()
    }

    /// Writes both to files that qemu-img finds.
    fn save(&self) -> std::path::PathBuf {
        self.scratch.save("data.raw", &self.data);
        self.scratch.save("image.qcow2", &self.disk)
    }

    /// Both as QEMU has left them.
    fn load(self) -> Pair {
        Pair {
            disk: self.scratch.load("image.qcow2"),
            data: self.scratch.load("data.raw"),
            ..self
        }
    }

    /// Closes the image, and compares what qemu-img says of it and reads, and what a raw data file holds.
    async fn verify(&self, image: Arc<Qcow2>, expected: &[u8]) {
        let raw = image.image.data.is_raw();
        image.close().await.unwrap();
        let path = self.save();
        let theirs = assert_qemu_clean(&path);
        let ours = check(&self.disk.child()).await.unwrap();
        for (field, number) in [
            ("allocated-clusters", ours.allocated_clusters),
            ("fragmented-clusters", ours.fragmented_clusters),
        ] {
            let theirs = theirs.get(field).and_then(serde_json::Value::as_u64);
            assert_eq!(theirs.unwrap_or(0), number, "{field}");
        }
        assert_same(&qemu_content(&self.scratch, &path), expected);
        if raw {
            assert_same(&self.data.content(), expected);
        }
    }
}

#[test]
fn data_go_to_their_file_at_their_own_offset_and_metadata_to_the_image() {
    block_on(async {
        for raw in [false, true] {
            let pair = Pair::new(4 * MIB, raw).await;
            let image = pair.open().await;
            let before = pair.disk.allocated();
            write(&image, 3 * MIB + 5, vec![7; 100_000]).await.unwrap();
            write(&image, 0, vec![8; 10]).await.unwrap();
            let data = pair.data.content();
            assert_eq!(data.len() as u64, 4 * MIB);
            assert!(data[3 * MIB as usize + 5..][..100_000] == vec![7; 100_000]);
            assert_eq!(data[..11], [8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 0]);
            image.flush().await.unwrap();
            let metadata = pair.disk.allocated() - before;
            assert!(metadata <= 2 * CLUSTER, "{metadata} bytes of metadata");
            let status = image.block_status(3 * MIB, CLUSTER).await.unwrap();
            assert_eq!(status.host_offset, Some(3 * MIB));
            let mut expected = vec![0; 4 * MIB as usize];
            expected[3 * MIB as usize + 5..][..100_000].fill(7);
            expected[..10].fill(8);
            assert_same(&read(&image, 0, 4 * MIB).await, &expected);
            pair.verify(image, &expected).await;
        }
    });
}

#[test]
fn what_a_data_file_held_before_shows_only_in_a_raw_one() {
    block_on(async {
        for (raw, preallocation) in [
            (false, Preallocation::Off),
            (false, Preallocation::Metadata),
            (true, Preallocation::Off),
        ] {
            let data = Memory::with_content(&vec![0xee; MIB as usize]);
            let mut options = options(2 * MIB, raw);
            options.preallocation = preallocation;
            let pair = Pair::make_over(data, &options).await;
            let image = pair.open().await;
            let mut expected = vec![0; 2 * MIB as usize];
            if raw {
                expected[..MIB as usize].fill(0xee);
            }
            assert_same(&read(&image, 0, 2 * MIB).await, &expected);
            // The rest of a cluster is not what the file held there.
            write(&image, 70_000, vec![1; 10]).await.unwrap();
            expected[70_000..70_010].fill(1);
            pair.verify(image, &expected).await;
        }
    });
}

#[test]
fn random_operations_leave_what_the_model_says_with_a_data_file() {
    let cases = [
        (false, 9, false),
        (true, 9, false),
        (false, 16, false),
        (true, 16, false),
        (false, 21, false),
        (false, 14, true),
        (true, 14, true),
        (false, 16, true),
        (true, 17, true),
    ];
    for (seed, (raw, cluster_bits, extended)) in cases.into_iter().enumerate() {
        println!("seed {seed}, raw {raw}, {cluster_bits} cluster bits, extended {extended}");
        // Not a multiple of the cluster size: the data file ends where the disk does.
        let mut made = options(6 * MIB + 512 * 7, raw);
        made.cluster_size = 1 << cluster_bits;
        made.extended_l2 = extended;
        block_on(random_run(seed as u64, &made));
    }
}

async fn random_run(seed: u64, made: &CreateOptions) {
    let size = made.size;
    let pair = Pair::make(made).await;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut model = vec![0; size as usize];
    for _ in 0..3 {
        let image = pair.open().await;
        for _ in 0..60 {
            step(&image, &mut model, &mut random).await;
        }
        assert_same(&read(&image, 0, size).await, &model);
        assert!(pair.data.size() <= size);
        pair.verify(image, &model).await;
    }
    // And on in QEMU.
    let path = pair.save();
    let path = path.to_str().unwrap();
    qemu_io(
        path,
        &[
            "write -P 9 100k 300k",
            "write -z -u 200k 100k",
            "write -z 0 64k",
        ],
    );
    model[100 << 10..400 << 10].fill(9);
    model[200 << 10..300 << 10].fill(0);
    model[..64 << 10].fill(0);
    let pair = pair.load();
    let image = pair.open().await;
    assert_same(&read(&image, 0, size).await, &model);
    for _ in 0..30 {
        step(&image, &mut model, &mut random).await;
    }
    pair.verify(image, &model).await;
}

/// One random step on the image and on the model.
async fn step(image: &Qcow2, model: &mut [u8], random: &mut fastrand::Rng) {
    let size = model.len() as u64;
    let offset = random.u64(..size);
    let most = [100, 5000, 70_000, 600_000][random.usize(..4)];
    let len = random.u64(1..=most).min(size - offset);
    let range = offset as usize..(offset + len) as usize;
    match random.u8(..20) {
        0..10 => {
            let byte = random.u8(1..);
            let bytes = vec![byte; len as usize];
            write(image, offset, bytes.clone()).await.unwrap();
            model[range].copy_from_slice(&bytes);
        }
        10..14 => {
            let flags = ZeroFlags {
                may_unmap: random.bool(),
                ..ZeroFlags::default()
            };
            image.write_zeroes(offset, len, flags).await.unwrap();
            model[range].fill(0);
        }
        14..16 => {
            image.discard(offset, len).await.unwrap();
            let now = read(image, offset, len).await;
            let whole = image.image.g.cluster_size() * 2;
            let bytes = now.iter().zip(&model[range.clone()]);
            assert!(bytes.clone().all(|(new, old)| new == old || *new == 0));
            assert!(len < whole || now.contains(&0), "nothing was discarded");
            model[range].copy_from_slice(&now);
        }
        16 => image.flush().await.unwrap(),
        _ => assert_same(&read(image, offset, len).await, &model[range]),
    }
}

#[test]
fn zeroes_and_discards_reach_the_data_file_as_its_kind_asks() {
    block_on(async {
        for raw in [false, true] {
            let pair = Pair::new(4 * MIB, raw).await;
            let image = pair.open().await;
            write(&image, 0, vec![5; 4 << 20]).await.unwrap();
            image.write_zeroes(CLUSTER, CLUSTER, unmap()).await.unwrap();
            image.discard(3 * CLUSTER, CLUSTER).await.unwrap();
            let keep = ZeroFlags::default();
            image
                .write_zeroes(5 * CLUSTER, CLUSTER, keep)
                .await
                .unwrap();
            let data = pair.data.content();
            let is_zero = |nth: u64| {
                data[(nth * CLUSTER) as usize..][..CLUSTER as usize] == vec![0; CLUSTER as usize]
            };
            assert!(is_zero(1) && is_zero(3) && !is_zero(2));
            assert_eq!(
                is_zero(5),
                raw,
                "only a raw file must hold zeroes where none are needed"
            );
            assert!(pair.data.allocated() <= 4 * MIB - 2 * CLUSTER);
            let status = image.block_status(CLUSTER, CLUSTER).await.unwrap();
            assert!(status.zero && status.len == CLUSTER);
            // A cluster that was given back is used again at once, and stays.
            write(&image, CLUSTER + 100, vec![6; 10]).await.unwrap();
            for _ in 0..3 {
                image.flush().await.unwrap();
            }
            let mut expected = vec![5; 4 << 20];
            for nth in [1, 3, 5] {
                expected[(nth * CLUSTER) as usize..][..CLUSTER as usize].fill(0);
            }
            expected[CLUSTER as usize + 100..][..10].fill(6);
            assert_same(&read(&image, 0, 4 * MIB).await, &expected);
            pair.verify(image, &expected).await;
        }
    });
}

#[test]
fn without_discards_a_data_file_keeps_its_space_and_shows_zeroes_all_the_same() {
    block_on(async {
        let pair = Pair::new(MIB, false).await;
        let options = OpenOptions {
            pass_discard: false,
            ..OpenOptions::default()
        };
        let image = pair.try_open(options).await.unwrap();
        write(&image, 0, vec![5; 1 << 20]).await.unwrap();
        image.discard(0, MIB).await.unwrap();
        assert_eq!(pair.data.allocated(), MIB);
        assert_same(&read(&image, 0, MIB).await, &vec![0; 1 << 20]);
        write(&image, 1000, vec![6; 10]).await.unwrap();
        let mut expected = vec![0; 1 << 20];
        expected[1000..1010].fill(6);
        pair.verify(image, &expected).await;
    });
}

#[test]
fn a_data_file_is_as_long_as_the_disk() {
    block_on(async {
        for raw in [false, true] {
            let pair = Pair::new(MIB, raw).await;
            let image = pair.open().await;
            write(&image, 0, vec![5; 1 << 20]).await.unwrap();
            let mut expected = vec![5; 1 << 20];
            for size in [3 * MIB + 512, MIB - 1024, 300 * MIB, 2 * MIB] {
                image.resize(size, Preallocation::Off).await.unwrap();
                expected.resize(size as usize, 0);
                assert_eq!(pair.data.size(), size);
            }
            write(&image, 2 * MIB - 10, vec![6; 10]).await.unwrap();
            expected[2 * MIB as usize - 10..].fill(6);
            assert_same(&read(&image, 0, 2 * MIB).await, &expected);
            pair.verify(image, &expected).await;
        }
    });
}

#[test]
fn a_raw_data_file_is_mapped_all_over_after_growth_and_shows_nothing_old() {
    block_on(async {
        let pair = Pair::new(MIB, true).await;
        // Somebody has made the file longer, with content.
        let long = vec![0xee; 2 << 20];
        pair.data
            .write(MIB, long.into(), WriteFlags::default())
            .await
            .unwrap();
        let image = pair.open().await;
        image
            .resize(2 * MIB + 512, Preallocation::Off)
            .await
            .unwrap();
        let mut expected = vec![0; 2 * MIB as usize + 512];
        assert_same(&read(&image, 0, 2 * MIB + 512).await, &expected);
        image.close().await.unwrap();
        // What is behind the disk's end is left to whoever wrote it.
        assert_eq!(pair.data.size(), 3 * MIB);
        pair.data
            .resize(2 * MIB + 512, Preallocation::Off)
            .await
            .unwrap();
        let bytes = vec![1; 10];
        pair.data
            .write(2 * MIB + 500, bytes.into(), WriteFlags::default())
            .await
            .unwrap();
        expected[2 * MIB as usize + 500..][..10].fill(1);
        let image = pair.open().await;
        pair.verify(image, &expected).await;
    });
}

#[test]
fn subclusters_of_a_raw_data_file_are_data_again_when_the_disk_has_been_shorter() {
    block_on(async {
        let mut made = options(MIB, true);
        made.extended_l2 = true;
        let pair = Pair::make(&made).await;
        let image = pair.open().await;
        let size = MIB - CLUSTER / 2;
        image.resize(size, Preallocation::Off).await.unwrap();
        image.resize(MIB, Preallocation::Off).await.unwrap();
        let status = image.block_status(size, CLUSTER / 2).await.unwrap();
        assert_eq!(status.host_offset, Some(size));
        image.close().await.unwrap();
        // What another program writes to the file shows.
        let bytes = Data::from(vec![7; 10]);
        pair.data
            .write(MIB - 100, bytes, WriteFlags::default())
            .await
            .unwrap();
        let mut expected = vec![0; MIB as usize];
        expected[MIB as usize - 100..][..10].fill(7);
        let image = pair.open().await;
        pair.verify(image, &expected).await;
    });
}

#[test]
fn growth_that_fails_leaves_disk_and_data_file_as_they_were() {
    block_on(async {
        for raw in [false, true] {
            for kind in [
                OpKind::Write,
                OpKind::WriteZeroes,
                OpKind::Flush,
                OpKind::Resize,
            ] {
                for skip in 0..6 {
                    for metadata in [false, true] {
                        let pair = Pair::new(MIB, raw).await;
                        let image = pair.open().await;
                        write(&image, 0, vec![5; 1 << 20]).await.unwrap();
                        image.flush().await.unwrap();
                        let failing = if metadata { &pair.disk } else { &pair.data };
                        failing.fail_once(kind, skip, Fault::Io);
                        let grown = image.resize(MIB + 700 * 512, Preallocation::Off).await;
                        failing.clear_faults();
                        let size = MIB + if grown.is_ok() { 700 * 512 } else { 0 };
                        assert_eq!(image.size(), size);
                        assert_eq!(pair.data.size(), size);
                        let mut expected = vec![5; 1 << 20];
                        expected.resize(size as usize, 0);
                        image.close().await.unwrap();
                        let report = check(&pair.disk.child()).await.unwrap();
                        assert!(report.is_clean(), "{report:?}");
                        let image = pair.open().await;
                        assert_same(&read(&image, 0, size).await, &expected);
                    }
                }
            }
        }
    });
}

#[test]
fn what_the_format_cannot_do_with_a_data_file_is_refused() {
    block_on(async {
        let pair = Pair::new(MIB, false).await;
        let image = pair.open().await;
        let snapshots = image.snapshots().unwrap();
        let new = NewSnapshot::named("s");
        let error = snapshots.create(new).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert_eq!(
            error.message(),
            "Failed to get a snapshot list: Operation not supported"
        );
        let which = SnapshotSelector::default();
        assert!(snapshots.delete(which.clone()).await.is_err());
        assert!(snapshots.view(which).await.is_err());
        assert!(snapshots.change().await.is_err());
        assert!(snapshots.list().is_empty());
        let compressed = image.write_compressed(0, Data::from(vec![1; 65536])).await;
        assert_eq!(compressed.unwrap_err().kind(), ErrorKind::Unsupported);
        image.close().await.unwrap();
    });
}

#[test]
fn a_data_file_is_given_where_it_is_needed_and_only_there() {
    block_on(async {
        let pair = Pair::new(MIB, true).await;
        let opening = Qcow2::open(pair.disk.child(), OpenOptions::default()).await;
        let error = opening.unwrap().finish(None).await.unwrap_err();
        let text = "'data-file' is required for this image (the image names '/";
        assert!(error.message().starts_with(text), "{error}");
        let opening = Qcow2::open(pair.disk.child(), OpenOptions::default()).await;
        let opening = opening.unwrap().with_data_file(Some(pair.data.child()));
        let error = opening.finish(Some(pair.data.child())).await.unwrap_err();
        assert!(
            error.message().contains("cannot have a backing file"),
            "{error}"
        );
        let plain = new_image(&CreateOptions::new(MIB)).await;
        let opening = Qcow2::open(plain.child(), OpenOptions::default()).await;
        let opening = opening.unwrap().with_data_file(Some(pair.data.child()));
        let error = opening.finish(None).await.unwrap_err();
        assert_eq!(
            error.message(),
            "'data-file' can only be set for images with an external data file"
        );
        // A device that is too small.
        let small = Memory::new(MIB - 512);
        small.set_limits(crate::driver::RequestLimits {
            growable: false,
            ..pair.data.limits()
        });
        let pair = Pair {
            data: small,
            ..pair
        };
        let error = pair.try_open(OpenOptions::default()).await.unwrap_err();
        assert!(
            error
                .message()
                .starts_with("The data file has 1048064 bytes"),
            "{error}"
        );
    });
}

#[test]
fn a_new_image_with_a_data_file_is_as_qemu_makes_it() {
    for raw in [false, true] {
        let pair = block_on(Pair::new(5 * MIB, raw));
        let ours = pair.save();
        let path = pair.scratch.path("theirs.qcow2");
        let data = pair.scratch.path("data.raw");
        let made = format!(
            "data_file={},data_file_raw={}",
            data.to_str().unwrap(),
            if raw { "on" } else { "off" }
        );
        let theirs = path.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &made, theirs, "5M"]);
        let info = |path: &Path| -> serde_json::Value {
            let info = qemu_img(&["info", "--output=json", path.to_str().unwrap()]);
            let mut info: serde_json::Value = serde_json::from_str(&info).unwrap();
            info["format-specific"].take()
        };
        assert_eq!(info(&ours), info(&path));
        let clusters = |path: &Path| {
            let mut report = assert_qemu_clean(path);
            report["allocated-clusters"].take()
        };
        assert_eq!(clusters(&ours), clusters(&path));
    }
}

#[test]
fn wrong_options_of_a_data_file_are_refused_with_qemus_texts() {
    for (text, change) in [
        (
            "External data files are only supported with compatibility level 1.1 and above \
             (use version=v3 or greater)",
            (|o| o.compat = Compat::V0_10) as fn(&mut CreateOptions),
        ),
        (
            "Backing file and data-file-raw cannot be used at the same time",
            |o| o.backing.name = Some("base.raw".to_owned()),
        ),
    ] {
        let mut wrong = options(MIB, true);
        change(&mut wrong);
        let (disk, data) = (Memory::new(0), Memory::new(0));
        let made = block_on(create_with_data_file(&disk.child(), &data.child(), &wrong));
        assert_eq!(made.unwrap_err().message(), text);
        assert_eq!(disk.size() + data.size(), 0);
    }
}

#[test]
fn a_data_file_need_not_stay_raw() {
    block_on(async {
        let pair = Pair::new(MIB, true).await;
        let image = pair.open().await;
        write(&image, 0, vec![5; 1 << 20]).await.unwrap();
        let backing = AmendOptions {
            backing: Some(BackingFile {
                name: Some("base.raw".to_owned()),
                format: Some("raw".to_owned()),
            }),
            ..AmendOptions::default()
        };
        let error = image.amend(backing.clone()).await.unwrap_err();
        assert!(error.message().contains("data-file-raw"), "{error}");
        let no_longer_raw = AmendOptions {
            data_file_raw: Some(false),
            ..backing
        };
        image.amend(no_longer_raw).await.unwrap();
        // A backing file may show from now on, so the zeroes must be in the tables; they need not be in the file.
        let keep = ZeroFlags::default();
        image.write_zeroes(0, CLUSTER, keep).await.unwrap();
        assert_eq!(pair.data.content()[7], 5);
        assert_eq!(read(&image, 0, 2).await, [0, 0]);
        image.close().await.unwrap();
        let base = Memory::with_content(&vec![9; 1 << 20]);
        let opening = Qcow2::open(pair.disk.child(), OpenOptions::default()).await;
        let opening = opening.unwrap().with_data_file(Some(pair.data.child()));
        let image = opening.finish(Some(base.child())).await.unwrap();
        assert_eq!(read(&image, CLUSTER - 1, 2).await, [0, 5]);
    });
}

#[test]
fn a_dirty_image_is_repaired_without_counting_its_data() {
    block_on(async {
        for raw in [false, true] {
            let pair = Pair::new(MIB, raw).await;
            let image = pair.open().await;
            write(&image, 0, vec![5; 3 << 16]).await.unwrap();
            image.close().await.unwrap();
            let mut content = pair.disk.content();
            // The dirty bit, a refcount of the L1 table, and a COPIED flag.
            content[79] |= 1;
            content[2 * 65536 + 7] = 9;
            content[4 * 65536 + 8] = 0;
            let damaged = pair.damaged(&content);
            let image = damaged.open().await;
            assert_eq!(read(&image, CLUSTER, 2).await, [5, 5]);
            let report = check(&damaged.disk.child()).await.unwrap();
            assert!(report.is_clean(), "{report:?}");
            assert_eq!(damaged.disk.content()[4 * 65536 + 8], 0x80);
            write(&image, CLUSTER, vec![6; 2]).await.unwrap();
            let mut expected = vec![0; MIB as usize];
            expected[..3 << 16].fill(5);
            expected[CLUSTER as usize..][..2].fill(6);
            damaged.verify(image, &expected).await;
        }
    });
}
