//! Crashes: the states that a killed process or a power cut may leave, made from the log of a random run.
//!
//! Each is opened, checked and compared: no corruption, and every byte that a guest flush has covered, unless a later
//! request has touched it.

use std::ops::Range;

use super::*;
use crate::driver::Preallocation;
use crate::formats::qcow2::check::check;
use crate::protocols::memory::{Change, Record};

const SIZE: u64 = 512 << 10;

/// A guest flush that has succeeded: what the log had by then, and the disk's content.
struct Flushed {
    log_len: usize,
    content: Vec<u8>,
    /// Ranges that requests after it have touched.
    touched: Vec<Range<usize>>,
}

/// Runs random requests; answers the disk before, the log, and the flushes.
async fn random_run(
    seed: u64,
    options: &CreateOptions,
) -> (Arc<Memory>, Vec<Record>, Vec<Flushed>) {
    let disk = new_image(options).await;
    let before = disk.fork();
    disk.start_log();
    let image = open(&disk).await;
    let mut random = fastrand::Rng::with_seed(seed);
    let mut content = vec![0; SIZE as usize];
    let mut flushes = vec![Flushed {
        log_len: 0,
        content: content.clone(),
        touched: Vec::new(),
    }];
    for _ in 0..40 {
        let offset = random.u64(..SIZE);
        let len = random.u64(1..60_000).min(SIZE - offset);
        let range = offset as usize..(offset + len) as usize;
        if let Some(last) = flushes.last_mut() {
            last.touched.push(range.clone());
        }
        match random.u8(..10) {
            0..5 => {
                let byte = random.u8(1..);
                write(&image, offset, vec![byte; range.len()])
                    .await
                    .unwrap();
                content[range].fill(byte);
            }
            5 => {
                image.write_zeroes(offset, len, unmap()).await.unwrap();
                content[range].fill(0);
            }
            6 => {
                image.discard(offset, len).await.unwrap();
                content[range.clone()].copy_from_slice(&read(&image, offset, len).await);
            }
            7 => {
                // Moves the L1 table at small clusters.
                let more = SIZE * random.u64(2..64);
                image.resize(more, Preallocation::Off).await.unwrap();
                image.resize(SIZE, Preallocation::Off).await.unwrap();
            }
            _ => {
                image.flush().await.unwrap();
                flushes.push(Flushed {
                    log_len: disk.log().len(),
                    content: content.clone(),
                    touched: Vec::new(),
                });
            }
        }
    }
    image.close().await.unwrap();
    (before, disk.log(), flushes)
}

/// Checks a state in which at least the first `log_len` records have happened.
async fn check_state(disk: &Arc<Memory>, log_len: usize, flushes: &[Flushed], what: &str) {
    let report = check(&disk.child()).await.unwrap();
    assert_eq!(report.corruptions, 0, "{what}: {report:?}");
    let last = flushes
        .iter()
        .rposition(|flush| flush.log_len <= log_len)
        .unwrap();
    let image = open(disk).await;
    let len = image.size().min(SIZE);
    let content = read(&image, 0, len).await;
    let mut expected = flushes[last].content[..len as usize].to_vec();
    for range in flushes[last].touched.iter() {
        let range = range.start.min(content.len())..range.end.min(content.len());
        expected[range.clone()].copy_from_slice(&content[range]);
    }
    assert_same(&content, &expected);
    // The image works on, and repairs nothing into something worse.
    write(&image, 1000, vec![0xee; 100_000]).await.unwrap();
    image.close().await.unwrap();
    let report = check(&disk.child()).await.unwrap();
    assert_eq!(report.corruptions, 0, "{what}, written to: {report:?}");
}

fn crash_options() -> Vec<CreateOptions> {
    [
        (512, 64, false),
        (4096, 16, false),
        (65536, 16, false),
        (16384, 16, true),
    ]
    .map(|(cluster_size, refcount_bits, extended_l2)| {
        let mut options = CreateOptions::new(SIZE);
        options.cluster_size = cluster_size;
        options.refcount_bits = refcount_bits;
        options.extended_l2 = extended_l2;
        options
    })
    .into()
}

#[tokio::test]
async fn a_killed_process_leaves_a_sound_image_at_every_write() {
    for (seed, options) in crash_options().iter().enumerate() {
        let (disk, log, flushes) = random_run(seed as u64, options).await;
        for (done, record) in log.iter().enumerate() {
            let state = disk.fork();
            let what = format!("cluster size {}, {done} records", options.cluster_size);
            check_state(&state, done, &flushes, &what).await;
            disk.apply(&record.change).unwrap();
        }
    }
}

#[tokio::test]
async fn a_power_cut_leaves_a_sound_image_whatever_of_the_last_writes_is_lost() {
    for (seed, options) in crash_options().iter().enumerate() {
        let (disk, log, flushes) = random_run(seed as u64 + 10, options).await;
        let mut random = fastrand::Rng::with_seed(seed as u64);
        let mut start = 0;
        for end in (0..log.len()).filter(|at| matches!(log[*at].change, Change::Flush)) {
            // Any subset of the writes since the last flush of the disk.
            for _ in 0..5 {
                let state = disk.fork();
                let keep = random.f32();
                for record in &log[start..end] {
                    if random.f32() < keep {
                        state.apply(&record.change).unwrap();
                    }
                }
                let what = format!(
                    "cluster size {}, epoch {start}..{end}",
                    options.cluster_size
                );
                check_state(&state, start, &flushes, &what).await;
            }
            for record in &log[start..end] {
                disk.apply(&record.change).unwrap();
            }
            // The flush itself has happened too.
            start = end + 1;
        }
    }
}

#[tokio::test]
async fn what_an_interrupted_shrink_leaves_does_not_come_back_when_the_disk_grows() {
    for options in crash_options() {
        let disk = new_image(&options).await;
        let image = open(&disk).await;
        write(&image, 0, vec![1; SIZE as usize]).await.unwrap();
        image.flush().await.unwrap();
        let before = disk.fork();
        disk.start_log();
        image.resize(SIZE / 4, Preallocation::Off).await.unwrap();
        for record in disk.log() {
            before.apply(&record.change).unwrap();
            let state = before.fork();
            let image = open(&state).await;
            if image.size() == SIZE {
                continue;
            }
            image.resize(SIZE, Preallocation::Off).await.unwrap();
            let mut expected = vec![1; SIZE as usize / 4];
            expected.resize(SIZE as usize, 0);
            assert_same(&read(&image, 0, SIZE).await, &expected);
        }
    }
}
