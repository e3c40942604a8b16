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
use damage::{damage, number};
use operations::operate;

mod damage;
mod operations;

/// Cases of an ordinary run: a few seconds.
const CASES: u64 = 1500;

/// Operations on each image.
const STEPS: u64 = 24;

/// Host bytes that a case may use beyond its image.
const SPACE: u64 = 24 << 20;

/// Memory that the process of the cases may take. A huge L1 table is 32 MiB, in a few copies, in two cases at once; most need a
/// tenth of it.
const MEMORY: u64 = 512 << 20;

/// Opens and uses an image, and answers what damage was found.
async fn use_image(disk: &Arc<Memory>, random: &mut fastrand::Rng) -> Vec<Corruption> {
    let before = disk.fork();
    let (sink, mut events) = channel();
    let options = OpenOptions {
        reporter: sink.reporter("node"),
        read_only: random.u8(..6) == 0,
        pass_discard: random.bool(),
        l2_cache_bytes: [0, 1 << 20][random.usize(..2)],
        refcount_cache_bytes: [0, 1 << 20][random.usize(..2)],
        ..OpenOptions::default()
    };
    let backing = random.bool().then(|| Memory::new(200_000).child());
    let data_file = Memory::new(300 << 10);
    data_file.set_space_limit(Some(SPACE));
    let features = before.child().read(79, 1).await.unwrap().to_bytes();
    let is_outside = features.first().is_some_and(|bits| bits & 4 != 0);
    let data_file = is_outside.then(|| data_file.child());
    let opened = match Qcow2::open(disk.child(), options).await {
        Ok(opening) => opening.with_data_file(data_file).finish(backing).await,
        Err(error) => Err(error),
    };
    let image = match opened {
        Ok(image) => image,
        Err(error) => {
            assert!(!error.message().is_empty());
            // Only the repair of a dirty image changes anything before the image is open.
            if features[0] & 1 == 0 {
                assert_eq!(disk.size(), before.size());
                if disk.size() < 64 << 20 {
                    assert_same(&disk.content(), &before.content());
                }
            }
            return Vec::new();
        }
    };
    let mut found = Vec::new();
    for _ in 0..STEPS {
        operate(&image, random).await;
        tokio::task::yield_now().await;
        found.extend(reported(&mut events));
        if found.iter().any(|corruption| corruption.fatal) {
            assert_unusable(disk, &image).await;
        }
    }
    let _ = image.close().await;
    found.extend(reported(&mut events));
    let fatal = found.iter().filter(|corruption| corruption.fatal).count();
    assert!(fatal <= 1 && found.len() <= fatal + 1, "{found:?}");
    found
}

/// What was found would have destroyed metadata: nothing is written any more, and the header says why.
async fn assert_unusable(disk: &Arc<Memory>, image: &Qcow2) {
    let size = image.size();
    if size > 0 {
        let result = write(image, size / 3, vec![1]).await;
        assert_corrupt("a write to a corrupt image", result);
    }
    let header = disk.child().read(0, 80).await.unwrap().to_bytes();
    let (version, features) = (header[7], header[79]);
    assert!(version == 2 || features & 2 != 0, "the image is not marked");
}

/// Checks the damaged image and repairs it: what counts as repaired has right refcounts.
async fn check_and_repair(disk: &Arc<Memory>) {
    let _ = check(&disk.child()).await;
    match repair(&disk.child(), Repair::All, &CheckOptions::default()).await {
        Ok(_) => {
            let report = check(&disk.child()).await.unwrap();
            let wrong: Vec<_> = report.findings.iter().collect();
            let others = ["is incomplete", "bitmap", "the data lie behind the end"];
            let counts = wrong
                .iter()
                .filter(|text| !others.iter().any(|other| text.contains(other)));
            assert_eq!(counts.count(), 0, "after a repair: {wrong:?}");
        }
        Err(error) => assert!(!error.message().is_empty()),
    }
}

async fn case(images: &[Arc<Memory>], seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let disk = images[random.usize(..images.len())].fork();
    let sound = random.u8(..12) == 0;
    if !sound {
        damage(&disk, &mut random);
    }
    disk.set_space_limit(Some(disk.allocated() + SPACE));
    check_and_repair(&disk.fork()).await;
    let found = use_image(&disk, &mut random).await;
    assert!(
        !sound || found.is_empty(),
        "found in a sound image: {found:?}"
    );
    assert!(disk.allocated() <= SPACE + (8 << 20));
    // What is left must still open or be refused, and be checked, in the same way.
    let _ = check(&disk.child()).await;
    if random.bool() {
        use_image(&disk, &mut random).await;
    }
}

/// The most memory that this process has had, in bytes.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() << 10
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn damaged_images_neither_panic_nor_hang_nor_take_unbounded_memory() {
    const OWN_PROCESS: &str = "QBLOCKD_MUTATIONS_RUN_HERE";
    if std::env::var_os(OWN_PROCESS).is_some() {
        return run();
    }
    // In a process of its own: there the memory of tests beside it does not count.
    let (_, module) = module_path!().split_once("::").unwrap();
    let name = "damaged_images_neither_panic_nor_hang_nor_take_unbounded_memory";
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([&format!("{module}::{name}"), "--exact", "--nocapture"])
        .env(OWN_PROCESS, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    eprintln!("{said}");
    assert!(output.status.success(), "{}", output.status);
    assert!(said.contains("mutations from seed"), "no test was run");
}

/// The cases that the environment asks for.
fn run() {
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
    let peak = peak_memory();
    eprintln!(
        "{count} mutations from seed {first}, {} MiB at most",
        peak >> 20
    );
    assert!(peak < MEMORY, "{peak} bytes");
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "seeds that panicked: {failed:?}");
}
