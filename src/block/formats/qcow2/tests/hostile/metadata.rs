//! Metadata of every kind that an image can have, and writes that would land there: guest data by a damaged entry, metadata by a
//! mistake of ours, and clusters that damaged refcounts call free.

use super::*;
use crate::formats::qcow2::owners::Owner;
use crate::units::ClusterIndex;

/// Number of an image's cluster that holds metadata of this kind, and is not `not`.
fn cluster_of(image: &Qcow2, owner: Owner, not: &[u64]) -> u64 {
    let clusters = image.image.g.clusters_for(image.image.file.size());
    let is = |index: &u64| image.image.owners.get(ClusterIndex(*index)) == Some(owner);
    let mut found = (0..clusters).filter(is);
    found.find(|index| !not.contains(index)).unwrap()
}

fn l2_of(image: &Qcow2) -> u64 {
    let l1 = image.image.l1();
    l1.get(0).l2_offset().unwrap().0
}

/// Points guest cluster 0 to a host cluster, as one that is ours, and writes there: it must be prevented.
async fn assert_protected(disk: &Arc<Memory>, cluster: u64, name: &str) {
    let (at, size) = {
        let image = open(disk).await;
        (l2_of(&image), image.image.g.cluster_size())
    };
    let mut damaged = disk.content();
    put(&mut damaged, at as usize, 8, COPIED | (cluster * size));
    let disk = Memory::with_content(&damaged);
    let (image, mut events) = open_reporting(&disk).await;
    assert_corrupt(name, write(&image, 0, vec![9; 512]).await);
    let events = reported(&mut events);
    let message = format!("Preventing invalid write on metadata (overlaps with {name})");
    assert_eq!((events.len(), &events[0].message), (1, &message));
    drop(image);
    // Not a byte of the guest's, though a bitmap has been marked as in use before.
    let at = (cluster * size) as usize;
    assert!(
        disk.content()[at..].iter().take(512).any(|b| *b != 9),
        "{name}"
    );
}

#[test]
fn tables_that_only_snapshots_use_are_protected_too() {
    block_on(async {
        let disk = new_image(&options()).await;
        let image = open(&disk).await;
        write(&image, 0, vec![1; CLUSTER]).await.unwrap();
        write(&image, FAR, vec![1; CLUSTER]).await.unwrap();
        let active_l1 = image.image.l1().offset().0 / CLUSTER as u64;
        let old_l2 = l2_of(&image) / CLUSTER as u64;
        Snapshots::create(&*image, named("s")).await.unwrap();
        write(&image, 0, vec![2; CLUSTER]).await.unwrap();
        assert_ne!(l2_of(&image) / CLUSTER as u64, old_l2);
        let inactive_l1 = cluster_of(&image, Owner::L1Table, &[active_l1]);
        let table = cluster_of(&image, Owner::SnapshotTable, &[]);
        image.close().await.unwrap();
        for (cluster, name) in [
            (active_l1, "active L1 table"),
            (inactive_l1, "inactive L1 table"),
            (old_l2, "inactive L2 table"),
            (table, "snapshot table"),
        ] {
            assert_protected(&disk, cluster, name).await;
        }
    });
}

#[test]
fn bitmaps_are_protected_too() {
    let scratch = Scratch::new();
    let path = scratch.path("bitmaps.qcow2");
    let path = path.to_str().unwrap();
    let options = "cluster_size=4k";
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path, "16M"]);
    qemu_img(&["bitmap", "--add", path, "one"]);
    qemu_io(path, &["write -P 1 0 100k"]);
    let disk = scratch.load("bitmaps.qcow2");
    block_on(async {
        for (owner, name) in [
            (Owner::BitmapDirectory, "bitmap directory"),
            (Owner::BitmapTable, "bitmap table"),
            (Owner::Bitmap, "bitmap"),
        ] {
            let cluster = cluster_of(&*open(&disk.fork()).await, owner, &[]);
            assert_protected(&disk, cluster, name).await;
        }
    });
}

#[test]
fn metadata_in_a_wrong_place_are_not_written() {
    block_on(async {
        // A mistake of ours that nothing else would find: a table in memory lies where none lies.
        for (owner, text) in [
            (Owner::L2Table, "invalid write of an L2 table at"),
            (Owner::RefcountBlock, "invalid write of a refcount block at"),
            (Owner::L1Table, "invalid write of an L1 table at"),
        ] {
            let disk = Memory::with_content(&sample().await);
            let (image, mut events) = open_reporting(&disk).await;
            image.flush().await.unwrap();
            let cluster = ClusterIndex(cluster_of(&image, owner, &[]));
            // New clusters behind a new table, so that each kind is to be written.
            write(&image, 2 << 20, vec![8; CLUSTER]).await.unwrap();
            write(&image, 0, vec![1; CLUSTER]).await.unwrap();
            image.discard(8192, 4096).await.unwrap();
            image.image.l1().mark([0]);
            let before = disk.content();
            image.image.owners.release(cluster, 1);
            assert_corrupt(text, image.flush().await);
            let events = reported(&mut events);
            assert_eq!(events.len(), 1, "{text}");
            assert!(
                events[0].fatal && events[0].message.contains(text),
                "{events:?}"
            );
            assert!(
                events[0].message.ends_with("holds no metadata"),
                "{events:?}"
            );
            let at = cluster.0 as usize * CLUSTER;
            assert_same(&disk.content()[at..at + CLUSTER], &before[at..at + CLUSTER]);
            assert_corrupt(text, write(&image, FAR, vec![1]).await);
            assert_eq!(read(&image, FAR, 4).await, [3; 4]);
        }
    });
}

#[test]
fn metadata_that_refcounts_call_free_are_kept_and_reported() {
    block_on(async {
        // L1 table, L2 table and refcount block are not counted.
        for (cluster, text) in [
            (2, "Refcount of a refcount block at 0x2000 is 0"),
            (3, "Refcount of an L1 table at 0x3000 is 0"),
            (4, "Refcount of an L2 table at 0x4000 is 0"),
        ] {
            let mut damaged = sample().await;
            put(&mut damaged, REFBLOCK + 2 * cluster, 2, 0);
            let disk = Memory::with_content(&damaged);
            let (image, mut events) = open_reporting(&disk).await;
            for index in 0..40 {
                let bytes = vec![index as u8; CLUSTER];
                write(&image, 65536 + index * 4096, bytes).await.unwrap();
            }
            let events = reported(&mut events);
            assert_eq!((events.len(), events[0].fatal), (1, false), "{events:?}");
            assert_eq!(events[0].message, text);
            assert_eq!(read(&image, 0, 4).await, [1; 4]);
            assert_rest_works(text, &image).await;
            image.close().await.unwrap();
        }
    });
}

#[test]
fn a_cluster_that_is_in_use_and_not_counted_is_reported_when_it_goes() {
    block_on(async {
        let mut damaged = sample().await;
        put(&mut damaged, REFBLOCK + 2 * 5, 2, 0);
        let disk = Memory::with_content(&damaged);
        let (image, mut events) = open_reporting(&disk).await;
        image.discard(0, 4096).await.unwrap();
        image.flush().await.unwrap();
        image.flush().await.unwrap();
        let events = reported(&mut events);
        assert_eq!(events.len(), 1);
        let text = "Refcount of the cluster at 0x5000 is 0, but it was in use";
        assert_eq!(events[0].message, text);
        assert_rest_works(text, &image).await;
        image.close().await.unwrap();
    });
}

#[test]
fn an_image_with_very_many_snapshots_opens_soon() {
    const COUNT: usize = 20_000;
    block_on(async {
        let mut image = sample().await;
        snapshot(&mut image, 0, 1);
        let entry = image[16 * CLUSTER..16 * CLUSTER + 58].to_vec();
        put(&mut image, 60, 4, COUNT as u64);
        let table_clusters = (COUNT * 64).div_ceil(CLUSTER);
        image.resize((16 + table_clusters) * CLUSTER, 0);
        for index in 0..COUNT {
            let at = 16 * CLUSTER + 64 * index;
            image[at..at + 58].copy_from_slice(&entry);
            put(
                &mut image,
                at,
                8,
                ((16 + table_clusters + index) * CLUSTER) as u64,
            );
        }
        let disk = Memory::with_content(&image);
        let size = ((16 + table_clusters + COUNT) * CLUSTER) as u64;
        disk.apply(&Change::Resize { size }).unwrap();
        let began = std::time::Instant::now();
        let image = open(&disk).await;
        assert_eq!(image.list().len(), COUNT);
        assert!(began.elapsed() < HANGS_AFTER, "{:?}", began.elapsed());
    });
}
