//! What goes on behind snapshot operations when the next one comes, or the image is closed.

use std::time::Duration;

use tokio::time::Instant;

use super::*;
use crate::formats::qcow2::testing::HANGS_AFTER;
use crate::limits::QCOW2_SETTLE_ON_CLOSE;

/// Runs with a clock that jumps ahead whenever everybody waits.
fn with_jumping_clock<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    runtime.unwrap().block_on(future)
}

#[test]
fn closing_ends_in_time_when_settling_is_slow_and_the_next_open_repairs() {
    let scratch = Scratch::new();
    let path = scratch.path("slow.qcow2");
    let path = path.to_str().unwrap();
    let options = "cluster_size=512";
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path, "4M"]);
    qemu_io(path, &["write -P 1 0 4M"]);
    let disk = scratch.load("slow.qcow2");
    let expected = content(&scratch, &disk, None);
    with_jumping_clock(async {
        // Few of the 128 tables stay in memory.
        let options = OpenOptions {
            l2_cache_bytes: 0,
            ..OpenOptions::default()
        };
        let opening = Qcow2::open(disk.child(), options).await.unwrap();
        let image = opening.finish(None).await.unwrap();
        image.image.hold_settler(true);
        let new = NewSnapshot::named("s");
        image.create(new).await.unwrap();
        // Reads take a second, each.
        disk.hold(OpKind::Read);
        let slow = disk.clone();
        let releasing = tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
                slow.release_one(0);
            }
        });
        let started = Instant::now();
        image.close().await.unwrap();
        let took = started.elapsed();
        releasing.abort();
        disk.release_all();
        // What was read ahead when the time was over comes to its end.
        let bounds = QCOW2_SETTLE_ON_CLOSE..QCOW2_SETTLE_ON_CLOSE + Duration::from_secs(30);
        assert!(bounds.contains(&took), "closing took {took:?}");
        let info = image.info();
        assert!(info.dirty && info.unsettled_tables > 50, "{info:?}");
    });
    let header = block_on(read_header(&disk.child())).unwrap();
    assert!(header.incompatible.has(Incompatible::DIRTY));
    // QEMU repairs it before it writes.
    let path = scratch.save("slow.qcow2", &disk);
    qemu_io(path.to_str().unwrap(), &["write -P 9 0 4M"]);
    assert_qemu_clean(&path);
    let written = scratch.load("slow.qcow2");
    assert!(content(&scratch, &written, Some("s")) == expected);
    // So do we.
    let image = Open::new(&disk);
    assert!(!image.image.info().dirty);
    image.assert_clean();
    image.close();
    for snapshot in [None, Some("s")] {
        assert!(content(&scratch, &disk, snapshot) == expected);
    }
}

#[test]
fn snapshot_operations_do_not_wait_for_punching_and_closing_does() {
    let scratch = Scratch::new();
    let disk = sample(&scratch, "cluster_size=4k");
    let expected = content(&scratch, &disk, None);
    let image = Open::new(&disk);
    image.settle();
    disk.hold(OpKind::Discard);
    image.delete("theirs").unwrap();
    image.runtime.block_on(async {
        let held = disk.wait_held(1);
        tokio::time::timeout(HANGS_AFTER, held).await.unwrap();
        let new = NewSnapshot::named("during");
        let creating = image.image.create(new);
        let created = tokio::time::timeout(HANGS_AFTER, creating).await;
        created.unwrap().unwrap();
        let mut closing = image.image.close();
        let early = tokio::time::timeout(Duration::from_millis(50), &mut closing).await;
        assert!(
            early.is_err(),
            "a late hole could hit another program's data"
        );
        disk.release_all();
        closing.await.unwrap();
    });
    assert_eq!(image.assert_clean().leaks, 0);
    for snapshot in [None, Some("during")] {
        assert!(content(&scratch, &disk, snapshot) == expected);
    }
}
