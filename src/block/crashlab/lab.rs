//! Many scripts, one after another, with figures; a failure is cut down to few operations.

use std::time::{Duration, Instant};

use super::oracle::{Figures, Oracle, Recording, Samples};
use super::qemu::Qemu;
use super::run::{Problem, Runner};
use super::script::{Images, Op, Script};
use super::states::Effort;

/// What is run.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Seed of the first script; the others follow.
    pub seed: u64,
    /// What they run on.
    pub images: Images,
    /// Ends behind this many scripts.
    pub scripts: u64,
    /// Ends with the first script that ends behind this time.
    pub time: Duration,
    /// States of a script.
    pub effort: Effort,
    /// Dearer checks.
    pub samples: Samples,
}

/// A script that has failed.
#[derive(Debug)]
pub struct Failure {
    /// As short as it could be made.
    pub script: Script,
    /// What went wrong with it.
    pub problem: Problem,
}

/// What a run has found.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Scripts that were run.
    pub scripts: u64,
    /// Records of their logs.
    pub records: u64,
    /// States and more.
    pub figures: Figures,
    /// What went wrong.
    pub failures: Vec<Failure>,
    /// How long it took.
    pub time: Duration,
}

/// Most failures that are collected: behind them there is nothing new to learn.
const MAX_FAILURES: usize = 10;

/// Runs scripts until the plan is fulfilled; tells `progress` of each.
pub fn run(plan: &Plan, mut progress: impl FnMut(&Outcome)) -> Outcome {
    let start = Instant::now();
    let mut outcome = Outcome::default();
    for seed in plan.seed..plan.seed.saturating_add(plan.scripts) {
        if start.elapsed() >= plan.time || outcome.failures.len() >= MAX_FAILURES {
            break;
        }
        let script = Script::random(seed, plan.images);
        let (figures, records, result) = run_script(&script, plan);
        outcome.scripts += 1;
        outcome.records += records;
        outcome.figures.add(&figures);
        if let Err(problem) = result {
            outcome.failures.push(shorten(script, problem, plan));
        }
        outcome.time = start.elapsed();
        progress(&outcome);
    }
    outcome
}

/// Runs one script and tries its crash states.
pub fn run_script(script: &Script, plan: &Plan) -> (Figures, u64, Result<(), Problem>) {
    let mut oracle = Oracle::new(
        plan.samples,
        (plan.samples.qemu > 0).then(Qemu::find).flatten(),
        fastrand::Rng::with_seed(script.seed ^ 0x5eed),
    );
    let mut records = 0;
    let tried = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        // Time is the script's: what the engine does behind requests happens when a script waits.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .map_err(|error| format!("no runtime: {error}"))?;
        runtime.block_on(async {
            let recording = record(script).await?;
            records = recording.log.len() as u64;
            oracle.try_states(&recording, plan.effort).await
        })
    }));
    let result = tried.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(format!("panic: {}", text.unwrap_or_default()))
    });
    (oracle.figures, records, result)
}

/// Runs a script on a new image.
pub(super) async fn record(script: &Script) -> Result<Recording, Problem> {
    let mut runner = Runner::create(&script.case).await?;
    for op in script.before.iter().chain([&Op::Flush]) {
        runner.step(op).await?;
    }
    runner.get_what_others_left().await?;
    let base = runner.start_log();
    for op in &script.ops {
        runner.step(op).await?;
    }
    Ok(Recording {
        case: script.case.clone(),
        base,
        log: runner.disk.log(),
        next_stamp: runner.next_stamp(),
        moments: std::mem::take(&mut runner.moments),
    })
}

/// Leaves out operations as long as it still fails.
fn shorten(mut script: Script, mut problem: Problem, plan: &Plan) -> Failure {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut nth = 0;
    while nth < script.before.len() + script.ops.len() && Instant::now() < deadline {
        let mut shorter = script.clone();
        let place = nth.checked_sub(shorter.before.len());
        match place {
            None => drop(shorter.before.remove(nth)),
            Some(nth) => drop(shorter.ops.remove(nth)),
        }
        match run_script(&shorter, plan).2 {
            Err(other) => {
                script = shorter;
                problem = other;
            }
            Ok(()) => nth += 1,
        }
    }
    Failure { script, problem }
}
