//! Random guests beside a copy: of every format, to every format, in every way.

use super::*;

pub(super) const SIZE: u64 = (1 << 20) + (300 << 10) + 512;
const SLOT: u64 = 4096;
const GUESTS: u64 = 3;

/// One way to copy.
#[derive(Debug, Clone, Copy)]
struct Case {
    source: Format,
    target: Format,
    sync: SyncMode,
    point_in_time: PointInTime,
    target_content: TargetContent,
    compress: bool,
}

fn cases() -> Vec<Case> {
    let formats = [Format::Raw, Format::Qcow2(64 << 10), Format::Qcow2(4 << 10)];
    let targets = [
        Format::Raw,
        Format::Qcow2(64 << 10),
        Format::Qcow2(256 << 10),
    ];
    let mut cases = Vec::new();
    for source in formats {
        for target in targets {
            for sync in [SyncMode::Full, SyncMode::Top] {
                for point_in_time in [
                    PointInTime::Auto,
                    PointInTime::CopyBeforeWrite,
                    PointInTime::InternalSnapshot,
                ] {
                    let possible =
                        source != Format::Raw || point_in_time != PointInTime::InternalSnapshot;
                    // A raw disk is its own top layer, and has none below.
                    if possible
                        && (sync == SyncMode::Full
                            || source != Format::Raw && target != Format::Raw)
                    {
                        cases.push(Case {
                            source,
                            target,
                            sync,
                            point_in_time,
                            target_content: TargetContent::Unknown,
                            compress: false,
                        });
                    }
                }
            }
        }
    }
    let plain = cases.clone();
    cases.extend(
        plain
            .iter()
            .filter(|case| case.sync == SyncMode::Full)
            .map(|case| Case {
                target_content: TargetContent::Zero,
                compress: case.target != Format::Raw,
                ..*case
            }),
    );
    cases
}

pub(super) fn noise(random: &mut fastrand::Rng, len: u64) -> Vec<u8> {
    // Zeroes, text that can be compressed, and noise.
    match random.u8(0..3) {
        0 => vec![0; len as usize],
        1 => vec![random.u8(..); len as usize],
        _ => std::iter::repeat_with(|| random.u8(..))
            .take(len as usize)
            .collect(),
    }
}

/// What a guest knows of its slots: `None` where it has discarded.
pub(super) type Known = Vec<(u64, Option<Vec<u8>>)>;

/// Changes slots of its own all over the disk, so that guests meet in clusters and never in bytes.
pub(super) async fn guest(
    disk: Arc<CopyBeforeWrite>,
    number: u64,
    mut random: fastrand::Rng,
) -> Known {
    let mut known = Known::new();
    for _ in 0..40 {
        let slot = random.u64(0..SIZE / SLOT / GUESTS) * GUESTS + number;
        let offset = slot * SLOT;
        let bytes = match random.u8(0..4) {
            0 => {
                disk.discard(offset, SLOT).await.unwrap();
                None
            }
            1 => {
                let flags = ZeroFlags {
                    may_unmap: random.bool(),
                    ..ZeroFlags::default()
                };
                disk.write_zeroes(offset, SLOT, flags).await.unwrap();
                Some(vec![0; SLOT as usize])
            }
            _ => {
                let bytes = noise(&mut random, SLOT);
                put(&*disk, offset, bytes.clone()).await.unwrap();
                Some(bytes)
            }
        };
        known.push((offset, bytes));
    }
    known
}

/// Changes long ranges anywhere, with no regard to others.
pub(super) async fn rude_guest(disk: Arc<CopyBeforeWrite>, mut random: fastrand::Rng) {
    for _ in 0..10 {
        let len = random.u64(1..SIZE / 3);
        let offset = random.u64(0..SIZE - len);
        match random.u8(0..3) {
            0 => disk.discard(offset, len).await.unwrap(),
            1 => {
                let zeroes = disk.write_zeroes(offset, len, ZeroFlags::default());
                zeroes.await.unwrap();
            }
            _ => put(&*disk, offset, noise(&mut random, len)).await.unwrap(),
        }
    }
}

pub(super) async fn fill(disk: &dyn Requests, random: &mut fastrand::Rng, times: u64) {
    for _ in 0..times {
        let len = SLOT * random.u64(1..40);
        let offset = random.u64(0..(SIZE - len) / SLOT) * SLOT;
        let bytes = noise(random, len);
        put(disk, offset, bytes).await.unwrap();
    }
}

async fn run_case(case: Case, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let base = Memory::new(SIZE);
    fill(&*base, &mut random, 10).await;
    let backing = (case.source != Format::Raw).then(|| base.child());
    let (_, source) = disk(case.source, SIZE, backing.clone()).await;
    fill(&*source, &mut random, 15).await;
    let under = backing.filter(|_| case.sync == SyncMode::Top);
    let (target_file, target) = disk(case.target, SIZE, under.clone()).await;
    if case.target_content == TargetContent::Unknown && case.sync == SyncMode::Full {
        fill(&*target, &mut random, 10).await;
    }
    let before = content(&*source).await;
    let options = CopyOptions {
        sync: case.sync,
        target_cluster: target.info().cluster_size,
        target_content: case.target_content,
        compress: case.compress,
        point_in_time: case.point_in_time,
        max_workers: random.u32(1..6),
        max_chunk: 1 << random.u32(16..20),
        guest_memory: 1 << random.u32(16..20),
        min_cluster_size: [0, 1 << 17][random.usize(0..2)],
        ..CopyOptions::default()
    };
    let setup = setup(
        Jitter::new(source, random.u64(..), 6),
        Jitter::new(target, random.u64(..), 30),
        options,
    );
    setup.copier.activate().unwrap();
    let guests: Vec<_> = (0..GUESTS)
        .map(|number| tokio::spawn(guest(setup.guest.clone(), number, random.fork())))
        .collect();
    let rude = random
        .bool()
        .then(|| tokio::spawn(rude_guest(setup.guest.clone(), random.fork())));
    setup.copier.run(Owner::strict()).await.unwrap();
    let mut live = before.clone();
    let mut unknown = vec![false; before.len()];
    for guest in guests {
        for (offset, bytes) in guest.await.unwrap() {
            let range = offset as usize..(offset + SLOT) as usize;
            unknown[range.clone()].fill(bytes.is_none());
            if let Some(bytes) = bytes {
                live[range].copy_from_slice(&bytes);
            }
        }
    }
    if let Some(rude) = rude {
        rude.await.unwrap();
        unknown.fill(true);
    }
    setup.copier.close().await.unwrap();
    let progress = setup.copier.progress();
    assert_eq!(progress.done, progress.total);
    assert_same(&content(&*setup.target).await, &before, "target");
    for (index, byte) in content(&*setup.source).await.into_iter().enumerate() {
        assert!(
            unknown[index] || byte == live[index],
            "source at {index:#x}"
        );
    }
    if let Some(snapshots) = setup.source.snapshots() {
        assert!(snapshots.list().is_empty());
    }
    setup.target.inner.close().await.unwrap();
    if case.target != Format::Raw {
        let again = open(&target_file, under).await;
        assert_same(&content(&*again).await, &before, "target, opened again");
    }
}

/// What fleecing shows: the source, and in front of it what the target has.
#[tokio::test]
async fn with_sync_none_target_and_source_together_show_the_point_in_time() {
    for seed in rounds() {
        let mut random = fastrand::Rng::with_seed(seed);
        let (_, source) = disk(Format::Qcow2(64 << 10), SIZE, None).await;
        fill(&*source, &mut random, 15).await;
        let before = content(&*source).await;
        let (_, target) = disk(
            Format::Qcow2(64 << 10),
            SIZE,
            Some(Child::new(source.clone())),
        )
        .await;
        let options = CopyOptions {
            sync: SyncMode::None,
            ..CopyOptions::default()
        };
        let setup = setup(
            Jitter::new(source, seed, 3),
            Jitter::new(target, seed, 3),
            options,
        );
        setup.copier.activate().unwrap();
        let copier = setup.copier.clone();
        let running = tokio::spawn(async move { copier.run(Owner::strict()).await });
        for _ in 0..10 {
            rude_guest(setup.guest.clone(), random.fork()).await;
            guest(setup.guest.clone(), 0, random.fork()).await;
            let shown = content(&*setup.target).await;
            assert_same(&shown, &before, "target over source");
        }
        running.abort();
        let _ = running.await;
        setup.copier.close().await.unwrap();
    }
}

/// How often each case is tried: `COPY_ROUNDS`, from the seed `COPY_SEED` on.
pub(super) fn rounds() -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let first = number("COPY_SEED").unwrap_or(1);
    first..first + number("COPY_ROUNDS").unwrap_or(1)
}

#[test]
fn the_target_holds_what_the_source_held_whatever_guests_do() {
    for seed in rounds() {
        for (index, case) in cases().into_iter().enumerate() {
            println!("seed {seed}, case {index}: {case:?}");
            tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .build()
                .unwrap()
                .block_on(run_case(case, seed * 1000 + index as u64));
        }
    }
}

#[test]
fn threads_do_not_change_that() {
    for seed in rounds() {
        for (index, case) in cases().into_iter().enumerate().step_by(5) {
            println!("seed {seed}, case {index}: {case:?}");
            tokio::runtime::Builder::new_multi_thread()
                .worker_threads(4)
                .enable_time()
                .build()
                .unwrap()
                .block_on(run_case(case, seed * 1000 + index as u64));
        }
    }
}
