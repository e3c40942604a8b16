//! The crash laboratory as a command (docs/crash-safety.md):
//!
//! ```text
//! cargo run --release -p block --features crashlab --example crashlab -- --minutes 10
//! ```
//!
//! Prints its seed and its figures, and for every failure the shortest script it could find. Exits with 1 if there was one.

use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use block::crashlab::compare::{CLUSTER_SIZES, Comparison, OPERATIONS, Program, Row};
use block::crashlab::lab::{Failure, Outcome, Plan, run};
use block::crashlab::oracle::Samples;
use block::crashlab::qemu::Qemu;
use block::crashlab::script::Images;
use block::crashlab::states::Effort;

const USAGE: &str = "\
crashlab compare [--seed N] [--per-epoch N]
  the table of unsafe states: snapshot operations of QEMU and of qblockd, side by side
crashlab [--seed N] [--images KIND] [--minutes M] [--scripts N] [--per-epoch N] [--second N] [--qemu N]
  --seed N       first script; the others follow (a random one)
  --images KIND  any, extended-l2, bitmaps, data-file, overlay, v2, large (any: all but large)
  --minutes M    ends behind this time (1)
  --scripts N    ends behind this many scripts (no end)
  --per-epoch N  at most this many states between two flushes (all)
  --second N     crashes while recovering for one of N states; 0: none (20)
  --qemu N       repair and reading by QEMU for one of N states; 0: none (500)";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1).peekable();
    let compares = args.next_if(|first| first == "compare").is_some();
    let plan = match parse(args) {
        Ok(plan) => plan,
        Err(problem) => {
            eprintln!("{problem}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if compares {
        return match compare(&plan) {
            Ok(()) => ExitCode::SUCCESS,
            Err(problem) => {
                eprintln!("{problem}");
                ExitCode::FAILURE
            }
        };
    }
    println!(
        "seed {}, QEMU for one of {} states",
        plan.seed, plan.samples.qemu
    );
    // A panic of the engine is a failure like others, and is reported with its script.
    std::panic::set_hook(Box::new(|_| {}));
    let mut told = Duration::ZERO;
    let outcome = run(&plan, |so_far| {
        if so_far.time >= told + Duration::from_secs(60) {
            told = so_far.time;
            eprintln!("{}", figures(so_far));
        }
    });
    println!("{}", figures(&outcome));
    for failure in &outcome.failures {
        show(failure);
    }
    ExitCode::from(u8::from(!outcome.failures.is_empty()))
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Plan, String> {
    let mut plan = Plan {
        seed: fastrand::u64(..1_000_000_000),
        images: Images::Any,
        scripts: u64::MAX,
        time: Duration::from_secs(60),
        effort: Effort::default(),
        samples: Samples {
            second: 20,
            qemu: 500,
        },
    };
    while let Some(name) = args.next() {
        let value = args.next().ok_or(format!("{name} needs a value"))?;
        match name.as_str() {
            "--seed" => plan.seed = number(&value)?,
            "--minutes" => plan.time = Duration::from_secs_f64(number::<f64>(&value)? * 60.0),
            "--images" => plan.images = images(&value)?,
            "--scripts" => plan.scripts = number(&value)?,
            "--per-epoch" => plan.effort.per_epoch = number(&value)?,
            "--second" => plan.samples.second = number(&value)?,
            "--qemu" => plan.samples.qemu = number(&value)?,
            _ => return Err(format!("unknown option {name}")),
        }
    }
    if plan.samples.qemu > 0 && Qemu::find().is_none() {
        println!("qemu-img and qemu-io are not installed: nothing is asked of QEMU");
        plan.samples.qemu = 0;
    }
    Ok(plan)
}

fn images(text: &str) -> Result<Images, String> {
    Ok(match text {
        "any" => Images::Any,
        "extended-l2" => Images::ExtendedL2,
        "bitmaps" => Images::Bitmaps,
        "v2" => Images::V2,
        "large" => Images::Large,
        "data-file" => Images::DataFile,
        "overlay" => Images::Overlay,
        _ => return Err(format!("there are no images of kind {text}")),
    })
}

fn number<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| format!("'{text}' is not a number that fits here"))
}

fn figures(outcome: &Outcome) -> String {
    let states = &outcome.figures;
    let each = outcome.time.as_secs_f64() * 1e6 / states.states.max(1) as f64;
    format!(
        "scripts {}, log records {}, states {} (and {} that were the same), of these\n\
         \x20 dirty, repaired at open {}; leaking {}; with stale COPIED flags {}\n\
         \x20 of a second crash {}; repaired and read by QEMU too {}\n\
         failures {}, {:.0} s, {each:.0} us per state",
        outcome.scripts,
        outcome.records,
        states.states,
        states.duplicates,
        states.dirty,
        states.leaking,
        states.stale_flags,
        states.second,
        states.by_qemu,
        outcome.failures.len(),
        outcome.time.as_secs_f64()
    )
}

fn compare(plan: &Plan) -> Result<(), String> {
    let mut comparison = Comparison::new(plan.effort, plan.seed)
        .ok_or("qemu-img, qemu-io and qemu-storage-daemon are needed")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .map_err(|error| error.to_string())?;
    println!(
        "seed {}, at most {} states between two flushes\n",
        plan.seed, plan.effort.per_epoch
    );
    println!(
        "| operation | clusters | by | opened by | log | states | lost | poisoned | `check` complains |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let mut examples = Vec::new();
    for operation in OPERATIONS {
        for cluster_size in CLUSTER_SIZES {
            for row in runtime.block_on(comparison.rows(operation, cluster_size))? {
                println!("{}", line(&row));
                examples.extend(row.example.map(|example| {
                    format!("{operation:?} by {:?}, {cluster_size}: {example}", row.by)
                }));
            }
        }
    }
    println!();
    examples.iter().for_each(|example| println!("{example}"));
    Ok(())
}

fn line(row: &Row) -> String {
    let complaints = match row.opened_by {
        Program::Qemu => row.complaints.to_string(),
        Program::Qblockd => String::new(),
    };
    let name = |program| match program {
        Program::Qemu => "QEMU",
        Program::Qblockd => "qblockd",
    };
    format!(
        "| {:?} | {} | {} | {} | {} | {} | {} | {} | {complaints} |",
        row.operation,
        row.cluster_size,
        name(row.by),
        name(row.opened_by),
        row.records,
        row.states,
        row.lost,
        row.poisoned
    )
}

fn show(failure: &Failure) {
    let script = &failure.script;
    println!("\nFAILURE, seed {}, {:?}", script.seed, script.case);
    for op in &script.before {
        println!("  before: {op:?}");
    }
    for op in &script.ops {
        println!("  {op:?}");
    }
    println!("{}", failure.problem);
}
