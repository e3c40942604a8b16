//! What is taken back at the same time, and what is not.

use std::time::Duration;

use block::driver::BoxFuture;
use qapi::rt::QmpError;

use super::*;
use crate::daemon::{Control, testing};
use crate::transaction::tests::fake::Log;
use crate::transaction::{Action, Completion, Concerns, Plan, dry_run, run};

fn keys(about: &str) -> Keys {
    match about {
        "*" => Keys::All,
        about => Keys::These(about.chars().map(|name| Key::Name(name.into())).collect()),
    }
}

/// The places of what is taken back at the same time, one time after the other.
fn steps(about: &[&str]) -> String {
    let about: Vec<Keys> = about.iter().map(|about| keys(about)).collect();
    let mut order = Order::new(&about.iter().collect::<Vec<&Keys>>());
    let mut steps = Vec::new();
    while !order.ready.is_empty() {
        let step = Vec::from_iter(std::mem::take(&mut order.ready));
        step.iter().for_each(|at| order.is_over(*at));
        let step: Vec<String> = step.iter().map(usize::to_string).collect();
        steps.push(step.join(" "));
    }
    steps.join(", ")
}

#[test]
fn what_has_something_in_common_goes_in_reverse_and_the_rest_together() {
    for (about, expected) in [
        (vec![], ""),
        (vec!["a", "b", "c"], "2 1 0"),
        (vec!["a", "a", "a"], "2, 1, 0"),
        (vec!["a", "a", "b", "b"], "3 1, 2 0"),
        // The middle one has something in common with both.
        (vec!["a", "ab", "b"], "2, 1, 0"),
        (vec!["ab", "a", "b"], "2 1, 0"),
        (vec!["a", "b", "ab"], "2, 1 0"),
        // What is about everything comes between those before and behind it.
        (vec!["a", "*", "b"], "2, 1, 0"),
        (vec!["a", "b", "*", "c", "d"], "4 3, 2, 1 0"),
        (vec!["*", "*"], "1, 0"),
        (vec!["a", "*", "", "a"], "3 2, 1, 0"),
        // What there is nothing to do for.
        (vec!["", "", ""], "2 1 0"),
    ] {
        assert_eq!(steps(&about), expected, "{about:?}");
    }
}

/// Takes so long to be taken back.
struct Slow {
    number: usize,
    about: String,
    log: Log,
}

impl Action for Slow {
    fn resolve(&mut self, _: &mut Control, _: &mut Plan) -> Result<(), QmpError> {
        Ok(())
    }

    fn concerns(&self) -> Concerns {
        Concerns::These {
            names: vec![self.about.clone()],
            files: Vec::new(),
            images: Vec::new(),
        }
    }

    fn abort<'a>(&'a mut self, _: &'a Cx) -> BoxFuture<'a, Option<Stays>> {
        Box::pin(async {
            self.log.note(format!("begin {}", self.number));
            // The later, the longer.
            let wait = Duration::from_millis(self.number as u64);
            tokio::time::sleep(wait).await;
            self.log.note(format!("end {}", self.number));
            Some(Stays {
                device: self.number.to_string(),
                file: self.number.to_string().into(),
            })
        })
    }
}

fn slow(number: usize, about: String, log: &Log) -> Box<dyn Action> {
    let log = log.clone();
    Box::new(Slow { number, about, log })
}

#[tokio::test(start_paused = true)]
async fn many_are_taken_back_at_once_and_those_of_one_disk_one_by_one() {
    const DISKS: usize = 2 * limits::TRANSACTION_PREPARING;
    let (cx, log) = (testing::running(), Log::default());
    // Two for each disk.
    let actions = || -> Vec<Box<dyn Action>> {
        let actions = (0..2 * DISKS).map(|number| slow(number, format!("{}", number / 2), &log));
        actions.collect()
    };
    for is_dry in [false, true] {
        let begin = tokio::time::Instant::now();
        if is_dry {
            let done = dry_run(&cx, actions(), Completion::Individual).await;
            assert!(done.unwrap().iter().all(|done| done.error.is_none()));
        } else {
            let mut actions = actions();
            actions.push(Box::new(crate::transaction::Abort));
            let failed = run(&cx, actions, Completion::Individual).await;
            let stay = (0..2 * DISKS)
                .rev()
                .map(|number| format!("'{number}'"))
                .collect::<Vec<String>>();
            let expected = format!(
                "Transaction aborted using Abort action; and what was done to {} could not be taken back, see the daemon's log",
                stay.join(", ")
            );
            assert_eq!(failed.unwrap_err().desc, expected);
        }
        let took = begin.elapsed();
        let one_by_one = (0..2 * DISKS as u64).sum::<u64>();
        assert!(took < Duration::from_millis(one_by_one / 20), "{took:?}");
        check_order(&log.take(), DISKS);
    }
}

/// Each disk's later action has ended before its earlier one begins, and there are never too many at once.
fn check_order(log: &str, disks: usize) {
    let notes: Vec<&str> = log.split(", ").collect();
    assert_eq!(notes.len(), 4 * disks);
    let at = |note: String| notes.iter().position(|other| *other == note).unwrap();
    for disk in 0..disks {
        let (earlier, later) = (2 * disk, 2 * disk + 1);
        assert!(at(format!("end {later}")) < at(format!("begin {earlier}")));
    }
    let (mut now, mut most) = (0_usize, 0);
    for note in notes {
        match note.starts_with("begin") {
            true => now += 1,
            false => now -= 1,
        }
        most = most.max(now);
    }
    assert_eq!(most, limits::TRANSACTION_PREPARING);
}
