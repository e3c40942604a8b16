//! The suite's part of the laboratory.
//!
//! `QBLOCKD_POWER_CUTS` is how many scripts are tried (few if absent), `QBLOCKD_CRASH_SEED` the seed of the first: the same one if
//! absent, so that what the suite says depends on the code alone. `QBLOCKD_CRASH_DENSITY` is how many times as many states of
//! each are tried, with second crashes and starts that fail among them.

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
    script: &Script,
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
        random: fastrand::Rng::with_seed(script.seed),
        figures: Figures::default(),
        forgotten,
    };
    let result = runtime.block_on(oracle.try_script(script));
    (oracle.figures, result)
}

impl Samples {
    /// What the suite tries, for 1; more of it, for more.
    fn of_density(density: u32) -> Samples {
        Samples {
            per_epoch: 8 * density as usize,
            second: (12 / density).max(1),
            written: (12 / density).max(1),
            qemu: 60,
            failing: (25 * density).min(75) as u8,
        }
    }
}

/// Tries scripts, a few if nothing else is said.
fn try_scripts(few: u64, script: fn(u64) -> Script) {
    let _alone = without_children();
    let scripts = setting("QBLOCKD_POWER_CUTS", few);
    let first = setting("QBLOCKD_CRASH_SEED", 1);
    println!("QBLOCKD_CRASH_SEED={first}");
    let samples = Samples::of_density(setting("QBLOCKD_CRASH_DENSITY", 1) as u32);
    let mut all = Figures::default();
    for seed in first..first + scripts {
        let script = script(seed);
        let (figures, result) = try_script(&script, samples, None);
        all.add(&figures);
        if let Err(problem) = result {
            panic!("QBLOCKD_CRASH_SEED={seed}: {problem}\n{script:?}");
        }
    }
    println!("{all:?}");
}

#[test]
fn power_cuts_leave_transactions_over_several_disks_done_or_not_done() {
    try_scripts(5, Script::random);
}

#[test]
fn power_cuts_leave_what_is_taken_back_not_done_while_guests_write() {
    try_scripts(5, Script::taken_back);
}

#[test]
fn power_cuts_leave_disks_that_go_back_beside_guests_as_they_were_or_gone_back() {
    try_scripts(5, Script::goes_ahead);
}

#[test]
fn the_laboratory_finds_flushes_that_are_missing() {
    let _alone = without_children();
    let samples = Samples {
        per_epoch: 40,
        second: 0,
        written: 0,
        qemu: 0,
        failing: 0,
    };
    for forgotten in [Forgotten::Images, Forgotten::Journals, Forgotten::Names] {
        let mut tried = 0..40;
        let found = tried.find(|seed| {
            try_script(&Script::random(*seed), samples, Some(forgotten))
                .1
                .is_err()
        });
        println!("{forgotten:?}: found by script {found:?}");
        assert!(found.is_some(), "{forgotten:?}");
    }
}
