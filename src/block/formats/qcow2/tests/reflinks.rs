//! Clusters that a file system shares: images in files, with a witness, for whom every file system can do that.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::error::ErrorKind;
use crate::formats::qcow2::check::check;
use crate::io::{Deed, IoContext, Verdict, Witness};
use crate::open::{Aio, CacheMode, FileOptions, Locking};
use crate::protocols::file::{File, FileAccess};

const CLUSTER: u64 = 4096;
const SIZE: u64 = 64 * CLUSTER;

/// Makes changes fail when asked to.
#[derive(Debug, Default)]
struct Failing(AtomicBool);

impl Witness for Failing {
    fn begins(&self, deed: &Deed) -> (u64, Verdict) {
        let fails = self.0.load(Ordering::Relaxed) && matches!(deed, Deed::Change { .. });
        let verdict = match fails {
            true => Verdict::Fail(std::io::ErrorKind::PermissionDenied.into()),
            false => Verdict::Do,
        };
        (0, verdict)
    }

    fn ends(&self, _: u64, _: &Deed) {}

    fn pause(&self) -> u32 {
        0
    }
}

async fn open_file(io: &IoContext, path: &Path) -> Arc<File> {
    let options = FileOptions {
        filename: path.to_str().unwrap().to_owned(),
        aio: Aio::Threads,
        locking: Locking::Off,
    };
    let access = FileAccess {
        read_only: false,
        auto_read_only: false,
        cache: CacheMode::default(),
    };
    Arc::new(File::open(io, &options, access).await.unwrap())
}

/// A file full of one byte, and an image in another file whose disk is full of 1.
async fn files(folder: &Path, failing: &Arc<Failing>) -> (Arc<File>, Arc<File>) {
    let io = IoContext::witnessed(failing.clone());
    std::fs::write(folder.join("source"), vec![7; SIZE as usize]).unwrap();
    std::fs::write(folder.join("image"), b"").unwrap();
    let source = open_file(&io, &folder.join("source")).await;
    let file = open_file(&io, &folder.join("image")).await;
    let options = CreateOptions {
        cluster_size: CLUSTER,
        ..CreateOptions::new(SIZE)
    };
    create(&Child::new(file.clone()), &options).await.unwrap();
    let image = open_in(&file).await;
    write(&image, 0, vec![1; SIZE as usize]).await.unwrap();
    image.close().await.unwrap();
    (source, file)
}

async fn open_in(file: &Arc<File>) -> Arc<Qcow2> {
    let opening = Qcow2::open(Child::new(file.clone()), OpenOptions::default()).await;
    opening.unwrap().finish(None).await.unwrap()
}

async fn share(image: &Qcow2, source: &File, at: u64, len: u64) -> Result<()> {
    let from = source.host_range(at, len).await.unwrap().unwrap();
    image.write_shared(at, from).await
}

#[tokio::test]
async fn whole_clusters_are_shared_and_nothing_else_changes() {
    let folder = tempfile::tempdir().unwrap();
    let failing = Arc::new(Failing::default());
    let (source, file) = files(folder.path(), &failing).await;
    let image = open_in(&file).await;
    let mut model = vec![1; SIZE as usize];
    for (at, len) in [
        (CLUSTER / 2, CLUSTER),
        (CLUSTER, 512),
        (CLUSTER, CLUSTER + 512),
    ] {
        let refused = share(&image, &source, at, len).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{at} {len}");
    }
    failing.0.store(true, Ordering::Relaxed);
    let failed = share(&image, &source, 8 * CLUSTER, 4 * CLUSTER).await;
    failing.0.store(false, Ordering::Relaxed);
    assert!(failed.is_err());
    assert_same(&read(&image, 0, SIZE).await, &model);

    share(&image, &source, 4 * CLUSTER, 3 * CLUSTER)
        .await
        .unwrap();
    model[4 * CLUSTER as usize..7 * CLUSTER as usize].fill(7);
    assert_same(&read(&image, 0, SIZE).await, &model);
    image.close().await.unwrap();
    let report = check(&Child::new(file.clone())).await.unwrap();
    assert!(report.is_clean(), "{:#?}", report.findings);
    let image = open_in(&file).await;
    assert_same(&read(&image, 0, SIZE).await, &model);
    image.close().await.unwrap();
}

/// What an entry says that is wrong is not written over: what it refers to would be freed.
#[tokio::test]
async fn a_damaged_entry_is_not_replaced_by_what_is_shared() {
    let folder = tempfile::tempdir().unwrap();
    let (source, file) = files(folder.path(), &Arc::default()).await;
    let raw = Child::new(file.clone());
    let word = async |at: u64| {
        let bytes = raw.read(at, 8).await.unwrap().to_bytes();
        u64::from_be_bytes(bytes[..].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00
    };
    let table = word(word(40).await).await;
    let second = table + 8;
    // To the middle of a cluster, and to the table itself.
    for (wrong, text) in [
        (word(second).await | 512, "unaligned"),
        (table | 1 << 63, "Preventing metadata from being freed"),
    ] {
        let bytes = wrong.to_be_bytes().to_vec();
        let data = Data::from(bytes.clone());
        raw.write(second, data, WriteFlags::default())
            .await
            .unwrap();
        let image = open_in(&file).await;
        let error = share(&image, &source, 0, 2 * CLUSTER).await.unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        let _ = image.close().await;
        let is = raw.read(second, 8).await.unwrap().to_bytes();
        assert_eq!(is, bytes, "{text}");
    }
}
