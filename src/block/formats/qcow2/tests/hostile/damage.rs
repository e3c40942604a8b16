//! Damage that is found while the image is in use: what fails, what goes on, what is reported, and what the header says.

use super::*;
use crate::driver::{FormatSpecific, NewSnapshot, Preallocation, SnapshotSelector};
use crate::events::HostBytes;
use crate::formats::qcow2::owners::Owner;
use crate::protocols::memory::{Fault, OpKind};
use crate::units::ClusterIndex;

/// Guest cluster 0 with this entry.
fn with_entry(image: &[u8], entry: u64) -> Arc<Memory> {
    let mut image = image.to_vec();
    put(&mut image, L2, 8, entry);
    Memory::with_content(&image)
}

fn is_corrupt(image: &Qcow2) -> bool {
    let FormatSpecific::Qcow2 { corrupt, .. } = image.info().specific else {
        panic!("no qcow2");
    };
    corrupt.unwrap()
}

#[test]
fn damage_that_is_met_is_reported_once_and_leaves_the_image_usable() {
    let cases = [
        (
            L1,
            COPIED | 0x4200,
            "L2 table offset 0x4200 unaligned (L1 index: 0)",
            None,
        ),
        (
            L1,
            COPIED | 0x4001,
            "L1 entry 0x8000000000004001 has reserved bits set (L1 index: 0)",
            None,
        ),
        (
            L1,
            COPIED | 1 << 50,
            "L2 table offset 0x4000000000000 behind the end of the file",
            Some((1 << 50, 4096)),
        ),
        (
            L2,
            COPIED | 0x5200,
            "Cluster allocation offset 0x5200 unaligned (L2 offset: 0x4000, L2 index: 0)",
            None,
        ),
        (
            L2,
            COPIED | 0x5002,
            "L2 entry 0x8000000000005002 has reserved bits 0x2 set (L2 offset: 0x4000, L2 index: 0)",
            None,
        ),
        (
            L2,
            COMPRESSED | 0x5000,
            "Compressed cluster at 0x5000 cannot be read",
            Some((0x5000, 512)),
        ),
    ];
    block_on(async {
        let sample = sample().await;
        for (at, entry, message, place) in cases {
            let mut damaged = sample.clone();
            put(&mut damaged, at, 8, entry);
            let disk = Memory::with_content(&damaged);
            let (image, mut events) = open_reporting(&disk).await;
            for _ in 0..3 {
                assert_corrupt(message, image.read(0, 512).await);
            }
            let place = place.map(|(offset, len)| HostBytes { offset, len });
            let met = Corruption {
                message: message.to_owned(),
                place,
                fatal: false,
            };
            assert_eq!(reported(&mut events), [met]);
            assert!(!is_corrupt(&image));
            assert_rest_works(message, &image).await;
            image.close().await.unwrap();
            assert_eq!(disk.content()[79], 0, "{message}");
            assert_eq!(reported(&mut events), []);
            open(&disk).await.close().await.unwrap();
        }
    });
}

#[test]
fn an_entry_that_points_to_metadata_changes_none_and_ends_all_changes() {
    let places = [
        (0, "qcow2_header"),
        (REFTABLE, "refcount table"),
        (REFBLOCK, "refcount block"),
        (L1, "active L1 table"),
        (L2, "active L2 table"),
        (7 * CLUSTER, "active L2 table"),
    ];
    block_on(async {
        let image = sample().await;
        for (place, name) in places {
            for flags in [COPIED, 0, COPIED | 1, 1, COMPRESSED] {
                // A host cluster at 0 is none, unless the entry says compressed.
                if place == 0 && flags != COMPRESSED {
                    continue;
                }
                for how in CHANGES {
                    let what = format!("{how} on {name} with {flags:#x}");
                    let disk = with_entry(&image, flags | place as u64);
                    prevent(&disk, how, name, &what).await;
                }
            }
        }
    });
}

/// Makes a change of guest cluster 0 that must be prevented, and looks at what that leaves.
async fn prevent(disk: &Arc<Memory>, how: &str, name: &str, what: &str) {
    let before = disk.content();
    let (image, mut events) = open_reporting(disk).await;
    let result = change(&image, how).await;
    if how == "zeroes" && result.is_ok() {
        // Allocated zeroes are zeroes already: keeping them changes nothing.
        image.close().await.unwrap();
        assert_same(&disk.content(), &before);
        return;
    }
    assert_corrupt(what, result);
    // It is marked by the time of the answer.
    let mut marked = before.clone();
    marked[79] |= 2;
    assert_same(&disk.content(), &marked);
    assert!(is_corrupt(&image), "{what}");
    let events_now = reported(&mut events);
    assert_eq!(events_now.len(), 1, "{what}: {events_now:?}");
    assert!(events_now[0].fatal, "{what}");
    assert!(events_now[0].place.is_some(), "{what}");
    let message = &events_now[0].message;
    assert!(message.contains(name), "{what}: {message}");
    // No other change either, whatever it changes; reads and flushes go on.
    for how in CHANGES {
        assert_corrupt(what, change(&image, how).await);
    }
    assert_corrupt(what, write(&image, FAR, vec![4; CLUSTER]).await);
    assert_corrupt(what, image.resize(8 << 20, Preallocation::Off).await);
    assert_corrupt(what, Snapshots::create(&*image, named("new")).await);
    assert_eq!(read(&image, FAR, 10).await, [3; 10], "{what}");
    image.flush().await.unwrap();
    image.close().await.unwrap();
    assert_eq!(reported(&mut events), [], "{what}");
    assert_same(&disk.content(), &marked);
    assert_readable_only(disk).await;
}

/// The image says that it is corrupt: it opens for reading, and for writing it does not.
async fn assert_readable_only(disk: &Arc<Memory>) {
    let refused = try_open(disk, false).await.err().unwrap();
    assert_eq!(
        refused.message(),
        "qcow2: Image is corrupt; cannot be opened read/write"
    );
    let image = try_open(disk, true).await.unwrap();
    assert!(is_corrupt(&image));
    assert_eq!(read(&image, FAR, 10).await, [3; 10]);
    image.close().await.unwrap();
}

#[test]
fn a_write_on_metadata_is_reported_in_qemus_words_with_its_place() {
    block_on(async {
        let disk = with_entry(&sample().await, COPIED | REFBLOCK as u64);
        let (image, mut events) = open_reporting(&disk).await;
        let error = write(&image, 512, vec![9; 1024]).await.unwrap_err();
        let message = "Preventing invalid write on metadata (overlaps with refcount block)";
        assert_eq!(
            error.message(),
            format!("qcow2: Image is corrupt: {message}")
        );
        assert_eq!(error.errno(), libc::EIO);
        let place = HostBytes {
            offset: REFBLOCK as u64 + 512,
            len: 1024,
        };
        let prevented = Corruption {
            message: message.to_owned(),
            place: Some(place),
            fatal: true,
        };
        assert_eq!(reported(&mut events), [prevented]);
    });
}

#[test]
fn damage_that_is_met_first_does_not_hide_what_is_prevented_later() {
    block_on(async {
        let mut image = sample().await;
        put(&mut image, L2, 8, COPIED | 0x5200);
        put(&mut image, L2 + 8, 8, COPIED | L1 as u64);
        let disk = Memory::with_content(&image);
        let (image, mut events) = open_reporting(&disk).await;
        assert_corrupt("met", image.read(0, 1).await);
        assert_corrupt("prevented", write(&image, 4096, vec![1]).await);
        assert_corrupt("met again", image.read(0, 1).await);
        assert_corrupt("prevented again", write(&image, 4096, vec![1]).await);
        let fatal: Vec<bool> = reported(&mut events).iter().map(|e| e.fatal).collect();
        assert_eq!(fatal, [false, true]);
        // And the other way round.
        let disk = Memory::with_content(&{
            let mut image = disk.content();
            image[79] = 0;
            image
        });
        let (image, mut events) = open_reporting(&disk).await;
        assert_corrupt("prevented", write(&image, 4096, vec![1]).await);
        assert_corrupt("met", image.read(0, 1).await);
        let fatal: Vec<bool> = reported(&mut events).iter().map(|e| e.fatal).collect();
        assert_eq!(fatal, [true]);
    });
}

#[test]
fn what_was_answered_before_is_still_written_back() {
    block_on(async {
        let disk = with_entry(&sample().await, COPIED | L1 as u64);
        let (image, _events) = open_reporting(&disk).await;
        // A cluster that needs an entry and a count, which only the flush writes.
        write(&image, FAR + 65536, vec![8; CLUSTER]).await.unwrap();
        assert_corrupt("prevented", write(&image, 0, vec![9]).await);
        image.flush().await.unwrap();
        drop(image);
        let image = try_open(&disk, true).await.unwrap();
        assert_eq!(read(&image, FAR + 65536, 4).await, [8; 4]);
    });
}

#[test]
fn an_image_of_version_2_takes_no_more_changes_until_it_is_opened_again() {
    block_on(async {
        let mut options = options();
        options.compat = Compat::V0_10;
        let disk = new_image(&options).await;
        let image = open(&disk).await;
        write(&image, 0, vec![1; CLUSTER]).await.unwrap();
        image.close().await.unwrap();
        let disk = with_entry(&disk.content(), COPIED | L1 as u64);
        let before = disk.content();
        let (image, mut events) = open_reporting(&disk).await;
        for _ in 0..2 {
            assert_corrupt("prevented", write(&image, 0, vec![1]).await);
        }
        assert_corrupt("another", write(&image, FAR, vec![1]).await);
        assert_eq!(reported(&mut events).len(), 1);
        image.close().await.unwrap();
        assert_same(&disk.content(), &before);
        let (image, mut events) = open_reporting(&disk).await;
        write(&image, FAR, vec![1]).await.unwrap();
        assert_corrupt("prevented", write(&image, 0, vec![1]).await);
        assert_eq!(reported(&mut events).len(), 1);
    });
}

#[test]
fn an_image_that_cannot_be_marked_refuses_changes_all_the_same_and_is_marked_later() {
    block_on(async {
        let disk = with_entry(&sample().await, COPIED | L1 as u64);
        let (image, mut events) = open_reporting(&disk).await;
        disk.fail_once(OpKind::Write, 0, Fault::Io);
        assert_corrupt("prevented", write(&image, 0, vec![1]).await);
        assert_eq!(reported(&mut events).len(), 1);
        assert_eq!(disk.content()[79], 0);
        assert_corrupt("another", write(&image, FAR, vec![1]).await);
        assert_eq!(disk.content()[79], 2);
        assert_eq!(reported(&mut events), []);
        image.close().await.unwrap();
    });
}

#[test]
fn a_read_only_image_reports_what_it_meets() {
    block_on(async {
        let disk = with_entry(&sample().await, 0x5200);
        let (sink, mut events) = channel();
        let options = OpenOptions {
            read_only: true,
            reporter: sink.reporter("node"),
            ..OpenOptions::default()
        };
        let opening = Qcow2::open(disk.child(), options).await.unwrap();
        let image = opening.finish(None).await.unwrap();
        assert_corrupt("met", image.block_status(0, 10).await);
        assert_corrupt("met", image.read(0, 10).await);
        assert_eq!(reported(&mut events).len(), 1);
        let which = SnapshotSelector::default();
        let error = Snapshots::delete(&*image, which).await.unwrap_err();
        assert_ne!(error.kind(), ErrorKind::Corrupt);
    });
}

/// Lets the settler work until it has reported something.
async fn settled_report(image: &Qcow2, events: &mut Receiver<NodeEvent>) -> Vec<Corruption> {
    image.image.hold_settler(false);
    for _ in 0..1000 {
        let reports = reported(events);
        if !reports.is_empty() {
            return reports;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    panic!("nothing was reported");
}

fn new_snapshot() -> NewSnapshot {
    NewSnapshot::named("s")
}

#[test]
fn settling_reports_clusters_that_nobody_counted_and_counts_them() {
    block_on(async {
        let mut damaged = sample().await;
        put(&mut damaged, REFBLOCK + 5 * 2, 2, 0);
        let disk = Memory::with_content(&damaged);
        let (image, mut events) = open_reporting(&disk).await;
        image.create(new_snapshot()).await.unwrap();
        let reports = settled_report(&image, &mut events).await;
        let message =
            "1 clusters of the L2 table at 0x4000 were in use, but not counted; run a check";
        let (offset, len) = (L2 as u64, CLUSTER as u64);
        let met = Corruption {
            message: message.to_owned(),
            place: Some(HostBytes { offset, len }),
            fatal: false,
        };
        assert_eq!(reports, [met]);
        image.close().await.unwrap();
        let bytes = disk.content();
        assert_eq!(bytes[REFBLOCK + 10..REFBLOCK + 12], [0, 2]);
    });
}

#[test]
fn a_change_that_settling_must_not_make_is_reported_and_marked_by_it() {
    block_on(async {
        let disk = Memory::with_content(&sample().await);
        let (image, mut events) = open_reporting(&disk).await;
        image.image.hold_settler(true);
        image.create(new_snapshot()).await.unwrap();
        // Its counters are to be written where a table lies.
        let (owners, block) = (&image.image.owners, ClusterIndex(2));
        owners.release(block, 1);
        owners.claim(block, 1, Owner::L1Table).unwrap();
        let reports = settled_report(&image, &mut events).await;
        let [Corruption { message, fatal, .. }] = &reports[..] else {
            panic!("{reports:?}");
        };
        let wanted = "Preventing invalid write of a refcount block at 0x2000";
        assert!(message.starts_with(wanted) && *fatal, "{message}");
        assert!(is_corrupt(&image));
        assert_corrupt("later", write(&image, FAR, vec![1]).await);
    });
}
