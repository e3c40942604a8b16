//! The suite's part of the laboratory.
//!
//! `QBLOCKD_POWER_CUTS` is how many scripts are tried (few if absent), `QBLOCKD_CRASH_SEED` the seed of the first.

use super::oracle::{Figures, Oracle, Samples};
use super::run::Place;
use super::script::Script;
use super::state::Forgotten;
use crate::daemon::testing::without_children;

/// What the environment says.
pub(super) fn setting(name: &str, absent: u64) -> u64 {
    std::env::var(name).map_or(absent, |text| text.parse().expect("a number"))
}

/// Tries a script on a runtime of its own, whose time is the script's.
fn try_script(
    seed: u64,
    samples: Samples,
    forgotten: Option<Forgotten>,
) -> (Figures, Result<(), String>) {
    let place = Place::new();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    let mut oracle = Oracle {
        place: &place,
        samples,
        random: fastrand::Rng::with_seed(seed),
        figures: Figures::default(),
        forgotten,
    };
    let result = runtime.block_on(oracle.try_script(&Script::random(seed)));
    (oracle.figures, result)
}

#[test]
fn power_cuts_leave_transactions_over_several_disks_done_or_not_done() {
    let _alone = without_children();
    let scripts = setting("QBLOCKD_POWER_CUTS", 6);
    let first = setting("QBLOCKD_CRASH_SEED", fastrand::u64(..1_000_000_000));
    println!("QBLOCKD_CRASH_SEED={first}");
    let samples = Samples {
        per_epoch: 8,
        second: 12,
        written: 12,
        qemu: 60,
    };
    let mut all = Figures::default();
    for seed in first..first + scripts {
        let (figures, result) = try_script(seed, samples, None);
        all.add(&figures);
        if let Err(problem) = result {
            panic!(
                "QBLOCKD_CRASH_SEED={seed}: {problem}\n{:?}",
                Script::random(seed)
            );
        }
    }
    println!("{all:?}");
}

#[test]
fn the_laboratory_finds_flushes_that_are_missing() {
    let _alone = without_children();
    let samples = Samples {
        per_epoch: 40,
        second: 0,
        written: 0,
        qemu: 0,
    };
    for forgotten in [Forgotten::Images, Forgotten::Journals, Forgotten::Names] {
        let mut tried = 0..40;
        let found = tried.find(|seed| try_script(*seed, samples, Some(forgotten)).1.is_err());
        println!("{forgotten:?}: found by script {found:?}");
        assert!(found.is_some(), "{forgotten:?}");
    }
}
