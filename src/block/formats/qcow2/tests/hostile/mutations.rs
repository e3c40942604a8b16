//! Damaged images and random operations on them: nothing may panic, hang or take memory without bound.
//!
//! A case is a seed: which image, what is damaged, what is done with it. `QBLOCKD_MUTATIONS=COUNT` runs that many cases
//! instead of the few of an ordinary run, `QBLOCKD_MUTATION_SEED=N` begins at another one. A failure names its seed, and
//! `QBLOCKD_MUTATION_SEED=N QBLOCKD_MUTATIONS=1` runs it again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::driver::{NewSnapshot, Preallocation, SnapshotSelector, Snapshots};
use crate::formats::qcow2::check::{CheckOptions, Repair, check, repair};

/// Cases of an ordinary run: a few seconds.
const CASES: u64 = 1500;

/// Operations on each image.
const STEPS: u64 = 24;

/// Host bytes that a case may use beyond its image.
const SPACE: u64 = 24 << 20;

/// How long one case may take before it counts as hanging: far more than the slowest takes on a busy machine.
const HANGS_AFTER: Duration = Duration::from_secs(60);

/// Numbers that break things: borders of widths, limits and units.
const NUMBERS: [u64; 24] = [
    0,
    1,
    2,
    7,
    8,
    40,
    104,
    511,
    512,
    1023,
    1024,
    4096,
    65535,
    65536,
    1 << 20,
    32 << 20,
    u32::MAX as u64,
    1 << 32,
    1 << 55,
    1 << 56,
    1 << 62,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// Replaces a few fields or bytes of the image.
fn damage(disk: &Memory, random: &mut fastrand::Rng) {
    let mut image = disk.content();
    let cluster = 1_usize << u32::from_be_bytes(image[20..24].try_into().unwrap());
    for _ in 0..random.u8(1..=5) {
        let len = image.len();
        let clusters = len / cluster;
        match random.u8(..16) {
            0 => image[random.usize(..104)] = random.u8(..),
            1 => put(
                &mut image,
                8 * random.usize(1..13),
                8,
                number(random, cluster),
            ),
            2 => put(
                &mut image,
                4 * random.usize(1..26),
                4,
                number(random, cluster),
            ),
            3 => image[random.usize(..cluster.min(700))] ^= 1 << random.u8(..8),
            4..9 => {
                // An entry of a table: most of the metadata lie in the first clusters, or in short ones.
                let most = clusters.min(if random.bool() { 6 } else { 40 });
                let at = random.usize(..most) * cluster + 8 * random.usize(..cluster.min(512) / 8);
                put(&mut image, at, 8, entry(random, cluster, clusters));
            }
            9..11 => {
                let at = random.usize(..len);
                image[at] = random.u8(..);
            }
            11..13 => {
                let (from, to) = (random.usize(..len / 8) * 8, random.usize(..len / 8) * 8);
                image.copy_within(from..from + 8, to);
            }
            13 => {
                let (from, to) = (random.usize(..clusters), random.usize(..clusters));
                let from = from * cluster..(from + 1) * cluster;
                image.copy_within(from, to * cluster);
            }
            14 => image[79] |= 1 << random.u8(..2),
            _ => {
                let at = random.usize(..clusters) * cluster;
                let byte = [0, 0xff, 0x11][random.usize(..3)];
                image[at..at + cluster].fill(byte);
            }
        }
    }
    replace(disk, &image);
    if random.u8(..20) == 0 {
        let size = match random.bool() {
            true => random.u64(..image.len() as u64),
            false => image.len() as u64 + (1 << random.u8(10..44)),
        };
        disk.apply(&Change::Resize { size }).unwrap();
    }
}

fn number(random: &mut fastrand::Rng, cluster: usize) -> u64 {
    let base = NUMBERS[random.usize(..NUMBERS.len())];
    match random.u8(..6) {
        0 => base.wrapping_add(1),
        1 => base.wrapping_sub(1),
        2 => cluster as u64 * random.u64(..64),
        3 => random.u64(..),
        _ => base,
    }
}

fn entry(random: &mut fastrand::Rng, cluster: usize, clusters: usize) -> u64 {
    let flags = [0, 0, 1 << 63, 1 << 63, 1 << 62, 1, 1 << 63 | 1, 3 << 62];
    let place = random.u64(..clusters as u64 + 3) * cluster as u64;
    match random.u8(..8) {
        0..5 => place | flags[random.usize(..flags.len())],
        5 => place | 1 << random.u8(..64),
        _ => number(random, cluster),
    }
}

/// One random operation; its answer does not matter.
async fn operate(image: &Qcow2, random: &mut fastrand::Rng) {
    let size = image.size();
    let offset = match random.u8(..10) {
        0 => size.saturating_sub(random.u64(..100_000)),
        1 => random.u64(..),
        2 => random.u64(..=size),
        _ => random.u64(..400_000),
    };
    let most = [1, 600, 70_000, 300_000][random.usize(..4)];
    let len = random.u64(..=most);
    let flags = ZeroFlags {
        may_unmap: random.bool(),
        fua: random.u8(..8) == 0,
        no_fallback: random.u8(..8) == 0,
    };
    match random.u8(..24) {
        0..5 => {
            let bytes = Data::from(vec![random.u8(..); len as usize]);
            let fua = random.u8(..8) == 0;
            let _ = image.write(offset, bytes, WriteFlags { fua }).await;
        }
        5..8 => drop(image.read(offset, len).await),
        8..10 => drop(image.write_zeroes(offset, len, flags).await),
        10..12 => drop(image.discard(offset, len).await),
        12 => {
            // As long as a client may ask for.
            let long = (u64::from(u32::MAX)).min(size);
            match random.bool() {
                true => drop(image.write_zeroes(0, long, flags).await),
                false => drop(image.discard(0, long).await),
            }
        }
        13..15 => drop(image.flush().await),
        15 => {
            let cluster = image.image.g.cluster_size();
            let bytes = Data::from(vec![random.u8(..); cluster as usize]);
            let offset = offset / cluster * cluster;
            let _ = image.write_compressed(offset, bytes).await;
        }
        16 => {
            let long = size.saturating_sub(offset).min(1 << 40);
            let _ = image.block_status(offset, long.max(1)).await;
        }
        17..19 => {
            let new = NewSnapshot {
                name: format!("new{}", random.u8(..4)),
                date_sec: 0,
                date_nsec: 0,
                vm_clock_nsec: 0,
            };
            let _ = Snapshots::create(image, new).await;
        }
        19..21 => {
            let list = image.list();
            if !list.is_empty() {
                let victim = &list[random.usize(..list.len())];
                let which = SnapshotSelector {
                    id: Some(victim.id.clone()),
                    name: random.bool().then(|| victim.name.clone()),
                };
                let _ = Snapshots::delete(image, which).await;
            }
        }
        21 => {
            let size = match random.u8(..4) {
                0 => number(random, 4096),
                1 => size / 2 / 512 * 512,
                _ => random.u64(..4000) * 512,
            };
            let _ = image.resize(size, Preallocation::Off).await;
        }
        22 => drop(image.info()),
        _ => {
            let (a, b) = (random.u64(..300_000), random.u64(..300_000));
            let bytes = Data::from(vec![1; 5000]);
            let writes = (
                image.write(a, bytes.clone(), WriteFlags::default()),
                image.write(b, bytes, WriteFlags::default()),
            );
            let _ = futures_util::future::join(writes.0, writes.1).await;
        }
    }
}

/// Opens and uses a damaged image.
async fn use_image(disk: &Arc<Memory>, random: &mut fastrand::Rng) {
    let before = disk.fork();
    let options = OpenOptions {
        read_only: random.u8(..6) == 0,
        pass_discard: random.bool(),
        l2_cache_bytes: [0, 1 << 20][random.usize(..2)],
        refcount_cache_bytes: [0, 1 << 20][random.usize(..2)],
        ..OpenOptions::default()
    };
    let backing = random.bool().then(|| Memory::new(200_000).child());
    let opened = match Qcow2::open(disk.child(), options).await {
        Ok(opening) => opening.finish(backing).await,
        Err(error) => Err(error),
    };
    let image = match opened {
        Ok(image) => image,
        Err(error) => {
            assert!(!error.message().is_empty());
            // Only the repair of a dirty image changes anything before the image is open.
            let features = before.child().read(79, 1).await.unwrap().to_bytes();
            if features[0] & 1 == 0 {
                assert_eq!(disk.size(), before.size());
                if disk.size() < 64 << 20 {
                    assert_same(&disk.content(), &before.content());
                }
            }
            return;
        }
    };
    for _ in 0..STEPS {
        operate(&image, random).await;
        tokio::task::yield_now().await;
    }
    let _ = image.close().await;
}

/// Checks the damaged image and repairs it: what counts as repaired has right refcounts.
async fn check_and_repair(disk: &Arc<Memory>) {
    let _ = check(&disk.child()).await;
    match repair(&disk.child(), Repair::All, &CheckOptions::default()).await {
        Ok(_) => {
            let report = check(&disk.child()).await.unwrap();
            let wrong: Vec<_> = report.findings.iter().collect();
            let counts = wrong
                .iter()
                .filter(|text| !text.contains("is incomplete") && !text.contains("bitmap"));
            assert_eq!(counts.count(), 0, "after a repair: {wrong:?}");
        }
        Err(error) => assert!(!error.message().is_empty()),
    }
}

async fn case(images: &[Arc<Memory>], seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let disk = images[random.usize(..images.len())].fork();
    damage(&disk, &mut random);
    disk.set_space_limit(Some(disk.allocated() + SPACE));
    check_and_repair(&disk.fork()).await;
    use_image(&disk, &mut random).await;
    assert!(disk.allocated() <= SPACE + (8 << 20));
    // What is left must still open or be refused, and be checked, in the same way.
    let _ = check(&disk.child()).await;
    if random.bool() {
        use_image(&disk, &mut random).await;
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn damaged_images_neither_panic_nor_hang_nor_take_unbounded_memory() {
    let count = setting("QBLOCKD_MUTATIONS", CASES);
    let first = setting("QBLOCKD_MUTATION_SEED", 1);
    let images = block_on(valid_images());
    let next = AtomicU64::new(first);
    let running = Mutex::new(Vec::<(u64, Instant)>::new());
    let failed = Mutex::new(Vec::new());
    let workers = 2;
    let left = AtomicU64::new(workers);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= first + count {
                        left.fetch_sub(1, Ordering::SeqCst);
                        return;
                    }
                    running.lock().unwrap().push((seed, Instant::now()));
                    let ran = catch_unwind(AssertUnwindSafe(|| block_on(case(&images, seed))));
                    if ran.is_err() {
                        failed.lock().unwrap().push(seed);
                        eprintln!("mutation seed {seed} panicked");
                    }
                    let mut running = running.lock().unwrap();
                    let at = running.iter().position(|(other, _)| *other == seed);
                    let (_, began) = running.swap_remove(at.unwrap());
                    if began.elapsed() > Duration::from_secs(5) {
                        eprintln!("mutation seed {seed} took {:?}", began.elapsed());
                    }
                }
            });
        }
        while left.load(Ordering::SeqCst) > 0 {
            std::thread::sleep(Duration::from_millis(20));
            let running = running.lock().unwrap();
            if let Some((seed, _)) = running.iter().find(|(_, at)| at.elapsed() > HANGS_AFTER) {
                // A thread cannot be stopped: all that is left is to say which case it is.
                eprintln!("mutation seed {seed} hangs");
                std::process::abort();
            }
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "seeds that panicked: {failed:?}");
}
