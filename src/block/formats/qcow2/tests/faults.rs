//! Failing storage: every request of a scenario fails once, and the image is sound afterwards, leaks nothing, and
//! holds old or new bytes where the request failed and the right ones everywhere else.

use super::*;
use crate::driver::Preallocation;
use crate::formats::qcow2::create::{DataFileOptions, create_with_data_file};
use crate::protocols::memory::{Fault, OpKind};

const SIZE: u64 = 1 << 20;
/// Bytes of the model that may be old or new: written by requests that failed.
const UNKNOWN: u16 = 0x100;

fn options() -> CreateOptions {
    let mut options = CreateOptions::new(SIZE);
    options.cluster_size = 4096;
    // Blocks of 512 counters: the refcount structures grow on the way.
    options.refcount_bits = 64;
    options
}

/// Notes what a request to write `byte` did to the model. Answers whether it succeeded.
fn note(model: &mut [u16], at: u64, len: u64, byte: u8, result: Result<()>) -> bool {
    let ok = result.is_ok();
    let value = if ok { u16::from(byte) } else { UNKNOWN };
    model[at as usize..(at + len) as usize].fill(value);
    ok
}

/// A short life of an image; requests that fail are noted and the rest goes on.
async fn scenario(image: &Qcow2, model: &mut [u16]) {
    for (at, len, byte) in [
        (0, 4096, 1),
        (10_000, 100, 2),
        (40_960, 300_000, 3),
        (41_000, 10, 4),
    ] {
        let result = write(image, at, vec![byte; len as usize]).await;
        note(model, at, len, byte, result);
    }
    let _ = image.flush().await;
    let result = image.write_zeroes(49_152, 40_960, unmap()).await;
    note(model, 49_152, 40_960, 0, result);
    let result = image.discard(122_880, 8192).await;
    note(model, 122_880, 8192, 0, result);
    let _ = image.flush().await;
    let _ = image.flush().await;
    for (at, len, byte) in [(51_000, 20_000, 5), (800_000, 100_000, 6), (0, 10, 7)] {
        let result = write(image, at, vec![byte; len as usize]).await;
        note(model, at, len, byte, result);
    }
    let cluster = image.image.g.cluster_size();
    let bytes = Data::from(vec![8; cluster as usize]);
    let result = image.write_compressed(720_896, bytes).await;
    note(model, 720_896, cluster, 8, result);
    let _ = image.resize(4 * SIZE, Preallocation::Off).await;
    let _ = image.resize(SIZE, Preallocation::Off).await;
    let _ = image.flush().await;
}

fn assert_known(content: &[u8], model: &[u16]) {
    for (at, (byte, wanted)) in content.iter().zip(model).enumerate() {
        if *wanted != UNKNOWN {
            assert_eq!(u16::from(*byte), *wanted, "at {at:#x}");
        }
    }
}

fn extended() -> CreateOptions {
    CreateOptions {
        cluster_size: 16384,
        extended_l2: true,
        ..options()
    }
}

/// Clusters so small, and so little memory, that refcount blocks are evicted and read again all the time.
fn cramped() -> CreateOptions {
    CreateOptions {
        cluster_size: 512,
        ..options()
    }
}

fn with_data_file(options: CreateOptions, raw: bool) -> CreateOptions {
    let file = DataFileOptions { name: None, raw };
    CreateOptions {
        data_file: Some(file),
        ..options
    }
}

/// A new image; its data file, if it has one, is the second disk.
async fn make(options: &CreateOptions) -> Arc<Memory> {
    if options.data_file.is_none() {
        return new_image(options).await;
    }
    let disk = Memory::pair();
    let data = disk.second().unwrap().child();
    create_with_data_file(&disk.child(), &data, options)
        .await
        .unwrap();
    disk
}

async fn open_both(disk: &Arc<Memory>, options: OpenOptions) -> Arc<Qcow2> {
    let data = disk.second().map(|data| data.child());
    let opening = Qcow2::open(disk.child(), options).await.unwrap();
    opening.with_data_file(data).finish(None).await.unwrap()
}

/// Runs the scenario with one fault of the disk with this number; answers whether the fault was reached.
async fn one_fault(
    options: &CreateOptions,
    number: usize,
    kind: OpKind,
    skip: u64,
    fault: Fault,
) -> bool {
    let disk = make(options).await;
    let failing = disk.numbered(number);
    let before = failing.count(kind);
    let small = OpenOptions {
        l2_cache_bytes: 0,
        refcount_cache_bytes: 0,
        ..OpenOptions::default()
    };
    let image = open_both(&disk, small).await;
    let opened = failing.count(kind) - before;
    failing.fail_once(kind, skip, fault);
    let mut model = vec![0; SIZE as usize];
    scenario(&image, &mut model).await;
    let reached = failing.count(kind) - before - opened > skip;
    failing.clear_faults();
    // The image works on: everywhere, allocated or not.
    if image.size() != SIZE {
        image.resize(SIZE, Preallocation::Off).await.unwrap();
    }
    let at = 600_000;
    let result = write(&image, at, vec![9; 30_000]).await;
    assert!(
        note(&mut model, at, 30_000, 9, result),
        "{kind:?} {skip} {fault:?}"
    );
    let result = write(&image, 100, vec![10; 50]).await;
    assert!(note(&mut model, 100, 50, 10, result));
    assert_known(&read(&image, 0, SIZE).await, &model);
    image.close().await.unwrap();
    let report = check_report(&disk).await;
    assert!(report.is_clean(), "{kind:?} {skip} {fault:?}: {report:?}");
    let again = open_both(&disk, OpenOptions::default()).await;
    let content = read(&again, 0, SIZE).await;
    assert_known(&content, &model);
    if again.image.data.is_raw() {
        // A shrink that fails in its end leaves the file longer than the disk.
        let raw = disk.second().unwrap().content();
        assert_same(&raw[..SIZE as usize], &content);
    }
    reached
}

async fn check_report(disk: &Arc<Memory>) -> crate::formats::qcow2::check::CheckReport {
    crate::formats::qcow2::check::check(&disk.child())
        .await
        .unwrap()
}

#[tokio::test]
async fn a_fault_at_any_request_leaves_a_sound_image_without_leaks() {
    let faults = [Fault::Io, Fault::NoSpace, Fault::Torn(512)];
    for kind in [OpKind::Write, OpKind::Flush, OpKind::Read, OpKind::Discard] {
        for fault in faults {
            let mut skip = 0;
            while one_fault(&options(), 0, kind, skip, fault).await {
                skip += 1;
            }
            let enough = match kind {
                OpKind::Write => 20,
                OpKind::Flush => 4,
                _ => 1,
            };
            assert!(skip >= enough, "{kind:?} was reached {skip} times");
        }
    }
}

#[tokio::test]
async fn a_fault_at_any_request_leaves_sound_subclusters() {
    for kind in [OpKind::Write, OpKind::Flush, OpKind::Read] {
        for fault in [Fault::Io, Fault::Torn(700)] {
            let mut skip = 0;
            while one_fault(&extended(), 0, kind, skip, fault).await {
                skip += 1;
            }
            assert!(skip > 0, "{kind:?} was never reached");
        }
    }
}

#[tokio::test]
async fn a_fault_at_any_request_to_a_data_file_or_beside_it_leaves_a_sound_image() {
    for made in [
        with_data_file(options(), false),
        with_data_file(options(), true),
        with_data_file(extended(), false),
        with_data_file(extended(), true),
    ] {
        for (number, kind) in [
            (0, OpKind::Write),
            (0, OpKind::Flush),
            (0, OpKind::Read),
            (1, OpKind::Write),
            (1, OpKind::WriteZeroes),
            (1, OpKind::Discard),
            (1, OpKind::Flush),
            (1, OpKind::Read),
            (1, OpKind::BlockStatus),
            (1, OpKind::Resize),
        ] {
            for fault in [Fault::Io, Fault::Torn(700)] {
                let mut skip = 0;
                while one_fault(&made, number, kind, skip, fault).await {
                    skip += 1;
                }
                let is_needed = matches!(kind, OpKind::Write | OpKind::Flush | OpKind::Resize);
                assert!(
                    skip > 0 || !is_needed,
                    "{number} {kind:?} was never reached"
                );
            }
        }
    }
}

#[tokio::test]
async fn refcounts_that_cannot_be_read_again_are_not_changed_twice() {
    let mut skip = 0;
    while one_fault(&cramped(), 0, OpKind::Read, skip, Fault::Io).await {
        skip += 1;
    }
    assert!(skip >= 5, "{skip} reads");
}

#[tokio::test]
async fn storage_that_stays_broken_leaves_at_most_leaks() {
    for kind in [OpKind::Write, OpKind::Flush] {
        for skip in 0..30 {
            let disk = new_image(&options()).await;
            let image = open(&disk).await;
            disk.fail_from(kind, skip, Fault::Io);
            let mut model = vec![0; SIZE as usize];
            scenario(&image, &mut model).await;
            // As if the process had died here.
            let copy = disk.fork();
            let report = check_report(&copy).await;
            assert_eq!(report.corruptions, 0, "{kind:?} {skip}: {report:?}");
            disk.clear_faults();
            if image.close().await.is_ok() {
                let report = check_report(&disk).await;
                assert_eq!(report.corruptions, 0, "{kind:?} {skip}: {report:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_full_disk_fails_new_clusters_and_no_others() {
    let disk = new_image(&options()).await;
    let image = open(&disk).await;
    let mut model = vec![0_u16; SIZE as usize];
    note(
        &mut model,
        0,
        65536,
        1,
        write(&image, 0, vec![1; 65536]).await,
    );
    image.flush().await.unwrap();
    disk.set_space_limit(Some(disk.allocated() + 3 * 4096));
    let mut failed = 0;
    for index in 20..40_u64 {
        let result = write(&image, index * 4096, vec![2; 4096]).await;
        failed += u32::from(!note(&mut model, index * 4096, 4096, 2, result));
    }
    assert!(failed >= 15);
    let result = write(&image, 5000, vec![3; 5000]).await;
    assert!(
        note(&mut model, 5000, 5000, 3, result),
        "allocated clusters still work"
    );
    image.flush().await.unwrap();
    // Freed space serves again.
    image.discard(32768, 32768).await.unwrap();
    note(&mut model, 32768, 32768, 0, Ok(()));
    image.flush().await.unwrap();
    image.flush().await.unwrap();
    let result = write(&image, 20 * 4096, vec![4; 4096]).await;
    assert!(note(&mut model, 20 * 4096, 4096, 4, result));
    assert_known(&read(&image, 0, SIZE).await, &model);
    image.close().await.unwrap();
    assert!(check_report(&disk).await.is_clean());
}

#[tokio::test]
async fn a_broken_flush_is_reported_and_done_again() {
    let disk = new_image(&options()).await;
    let image = open(&disk).await;
    write(&image, 0, vec![1; 65536]).await.unwrap();
    disk.fail_once(OpKind::Flush, 1, Fault::Io);
    assert!(image.flush().await.is_err());
    image.flush().await.unwrap();
    let copy = disk.fork();
    let report = check_report(&copy).await;
    assert!(report.is_clean(), "{report:?}");
    assert_same(&read(&*open(&copy).await, 0, 65536).await, &[1; 65536]);
}
