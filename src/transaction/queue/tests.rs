//! What is prepared at the same time, and what is not.

use std::time::Duration;

use super::*;
use crate::daemon::Cx;
use crate::daemon::testing;
use crate::transaction::tests::fake::Log;
use crate::transaction::{Completion, Effect, Held, Stays, dry_run, run};

/// Takes so long to prepare, and asks the control loop meanwhile.
struct Slow {
    number: usize,
    about: String,
    file: Option<String>,
    image: Option<String>,
    fails_in: &'static str,
    log: Log,
}

impl Slow {
    fn note(&self, what: &str) -> Result<(), QmpError> {
        self.log.note(format!("{what} {}", self.number));
        match self.fails_in == what {
            true => Err(QmpError::generic(format!("{what} {}", self.number))),
            false => Ok(()),
        }
    }
}

impl Action for Slow {
    fn resolve(&mut self, _: &mut Control, _: &mut Plan) -> Result<(), QmpError> {
        self.note("resolve")
    }

    fn concerns(&self) -> Concerns {
        Concerns::These {
            names: vec![self.about.clone()],
            files: self.file.clone().into_iter().collect(),
            images: self.image.clone().into_iter().collect(),
        }
    }

    fn prepare<'a>(&'a mut self, with: &'a Preparing) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(async {
            for _ in 0..3 {
                with.cx.commit(|_| Ok(())).await?;
            }
            // The later, the sooner.
            let wait = Duration::from_millis(100_u64.saturating_sub(self.number as u64));
            tokio::time::sleep(wait).await;
            self.note("prepare")
        })
    }

    fn enter<'a>(
        &'a mut self,
        with: &'a Preparing,
        _: &'a mut Plan,
    ) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(async {
            with.cx.commit(|_| Ok(())).await?;
            self.note("enter")
        })
    }

    fn stage<'a>(&'a mut self, _: &'a mut Held) -> BoxFuture<'a, Result<(), QmpError>> {
        Box::pin(async { self.note("stage") })
    }

    fn abort<'a>(&'a mut self, _: &'a Cx) -> BoxFuture<'a, Option<Stays>> {
        Box::pin(async {
            let _ = self.note("abort");
            None
        })
    }
}

fn slow(number: usize, log: &Log) -> Slow {
    Slow {
        number,
        about: format!("disk{number}"),
        file: None,
        image: None,
        fails_in: "",
        log: log.clone(),
    }
}

fn boxed(actions: Vec<Slow>) -> Vec<Box<dyn Action>> {
    let boxed = |action| -> Box<dyn Action> { Box::new(action) };
    actions.into_iter().map(boxed).collect()
}

/// The actions in the order of their turns; a round behind a bar. What is in brackets is over when it is resolved, and what has an
/// exclamation mark begins a job.
fn turns(about: &[&str]) -> String {
    let known = about.iter().map(|text| {
        let names = text.trim_matches(['(', ')', '!']);
        let names = names.chars().map(|name| Key::Name(name.into()));
        About {
            keys: match text.contains('*') {
                true => Keys::All,
                false => Keys::These(names.collect()),
            },
            is_over: text.contains('('),
            begins_job: text.contains('!'),
        }
    });
    let rounds = rounds(&known.collect::<Vec<About>>());
    let mut turns: Vec<(usize, usize)> = rounds.into_iter().zip(0..).collect();
    turns.sort_unstable();
    let rounds = turns.chunk_by(|(one, _), (other, _)| one == other);
    let rounds = rounds.map(|round| {
        let places = round.iter().map(|(_, place)| place.to_string());
        places.collect::<Vec<String>>().join(" ")
    });
    rounds.collect::<Vec<String>>().join(" | ")
}

#[test]
fn what_has_something_in_common_has_its_turn_in_its_order() {
    for (about, expected) in [
        (vec![], ""),
        (vec!["a", "b", "c"], "0 1 2"),
        (vec!["a", "a", "b", "b"], "0 2 | 1 3"),
        (vec!["a", "a", "a", "b"], "0 3 | 1 | 2"),
        (vec!["a", "ab", "b", "c"], "0 3 | 1 | 2"),
        // Everything is before or behind what is about everything.
        (vec!["a", "a", "*", "b", "b"], "0 | 1 | 2 | 3 | 4"),
        (vec!["*", "a", "b", "*"], "0 | 1 2 | 3"),
        // What is over when it is resolved keeps nobody waiting, and waits itself.
        (vec!["(a)", "a", "b", "(b)", "b"], "0 1 2 | 3 4"),
        (vec!["(a)", "(a)", "(a)", "b"], "0 1 2 3"),
        // Jobs are made in order.
        (vec!["a", "!a", "!b", "c"], "0 3 | 1 2"),
        (vec!["!a", "b", "!b", "c", "!c", "!d"], "0 1 3 | 2 4 5"),
        (vec!["a", "!a", "*", "!b"], "0 | 1 | 2 | 3"),
    ] {
        assert_eq!(turns(&about), expected, "{about:?}");
    }
}

/// What was noted of this kind, in order.
fn of_kind(log: &str, kind: &str) -> Vec<usize> {
    let notes = log.split(", ").filter_map(|note| note.strip_prefix(kind));
    notes
        .filter_map(|number| number.trim().parse().ok())
        .collect()
}

#[tokio::test(start_paused = true)]
async fn they_are_prepared_together_and_enter_in_their_order() {
    const ACTIONS: usize = 3 * limits::TRANSACTION_PREPARING;
    let (cx, log) = (testing::running(), Log::default());
    let actions = (0..ACTIONS).map(|number| slow(number, &log)).collect();
    let begin = tokio::time::Instant::now();
    run(&cx, boxed(actions), Completion::Individual)
        .await
        .unwrap();
    assert!(
        begin.elapsed() < Duration::from_secs(1),
        "{:?}",
        begin.elapsed()
    );
    let log = log.take();
    assert_eq!(of_kind(&log, "enter"), Vec::from_iter(0..ACTIONS));
    let prepared = of_kind(&log, "prepare");
    assert!(!prepared.is_sorted(), "{prepared:?}");
    // Never more than are allowed.
    let (mut now, mut most) = (0, 0);
    for note in log.split(", ") {
        now += usize::from(note.starts_with("resolve"));
        most = most.max(now);
        now -= usize::from(note.starts_with("enter"));
    }
    assert_eq!(most, limits::TRANSACTION_PREPARING);
}

#[tokio::test(start_paused = true)]
async fn pairs_of_many_disks_are_prepared_together() {
    const DISKS: usize = 3 * limits::TRANSACTION_PREPARING;
    let (cx, log) = (testing::running(), Log::default());
    let action = |number: usize| Slow {
        about: format!("disk{}", number / 2),
        ..slow(number, &log)
    };
    let begin = tokio::time::Instant::now();
    let actions = (0..2 * DISKS).map(action).collect();
    let effects = run(&cx, boxed(actions), Completion::Individual).await;
    assert_eq!(effects.unwrap().len(), 2 * DISKS);
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?}");
    let log = log.take();
    let earlier = (0..DISKS).map(|disk| 2 * disk);
    let later = earlier.clone().map(|number| number + 1);
    let rounds: Vec<usize> = earlier.chain(later).collect();
    assert_eq!(of_kind(&log, "resolve"), rounds);
    assert_eq!(of_kind(&log, "enter"), rounds);
    assert_eq!(of_kind(&log, "stage"), Vec::from_iter(0..2 * DISKS));
}

#[tokio::test(start_paused = true)]
async fn the_first_in_order_that_fails_is_answered_whenever_its_turn_is() {
    for (places, answered) in [
        // Of the second round, before one of the first.
        (vec![(1, "prepare"), (2, "resolve")], "prepare 1"),
        (vec![(3, "enter"), (4, "prepare")], "enter 3"),
        (vec![(0, "prepare"), (1, "resolve")], "prepare 0"),
        (vec![(2, "resolve"), (3, "resolve")], "resolve 2"),
    ] {
        let (cx, log) = (testing::running(), Log::default());
        let action = |number: usize| {
            let fails_in = places.iter().find(|(place, _)| *place == number);
            Slow {
                about: format!("disk{}", number / 2),
                fails_in: fails_in.map_or("", |(_, what)| *what),
                ..slow(number, &log)
            }
        };
        let actions = boxed((0..8).map(action).collect());
        let error = run(&cx, actions, Completion::Individual).await.unwrap_err();
        assert_eq!(error.desc, answered);
        let log = log.take();
        let mut aborted = of_kind(&log, "abort");
        aborted.sort_unstable();
        let mut begun = of_kind(&log, "prepare");
        begun.sort_unstable();
        assert_eq!(aborted, begun, "{log}");
        let first: usize = answered.split(' ').next_back().unwrap().parse().unwrap();
        let entered = of_kind(&log, "enter");
        assert!(entered.iter().all(|number| *number <= first), "{log}");
        let resolved = of_kind(&log, "resolve");
        let all = (0..first).all(|number| resolved.contains(&number));
        assert!(all, "those before it may fail, too: {log}");

        let actions = boxed((0..8).map(action).collect());
        let previews = dry_run(&cx, actions, Completion::Individual).await.unwrap();
        for (number, preview) in previews.iter().enumerate() {
            let fails = places.iter().find(|(place, _)| *place == number);
            let fails = fails.map(|(_, what)| format!("{what} {number}"));
            let error = preview.error.as_ref().map(|error| error.desc.clone());
            assert_eq!(error, fails);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_image_that_names_others_is_about_anything() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let header = |version: u32, backing: u64, incompatible: u64| {
        let mut sector = [0; 512];
        sector[..4].copy_from_slice(b"QFI\xfb");
        sector[4..8].copy_from_slice(&version.to_be_bytes());
        sector[8..16].copy_from_slice(&backing.to_be_bytes());
        sector[72..80].copy_from_slice(&incompatible.to_be_bytes());
        sector.to_vec()
    };
    for (name, content, waits) in [
        ("alone", header(3, 0, 1), false),
        ("version 2", header(2, 0, u64::MAX), false),
        ("raw", vec![1; 600], false),
        ("empty", Vec::new(), false),
        ("backed", header(3, 0x200, 0), true),
        ("backed, version 2", header(2, 0x200, 0), true),
        ("with data elsewhere", header(3, 0, 4), true),
        ("cut off", header(3, 0, 0)[..70].to_vec(), true),
    ] {
        std::fs::write(path(name), content).unwrap();
        for prefix in ["", "file:"] {
            let (cx, log) = (testing::running(), Log::default());
            let other = slow(1, &log);
            let with_image = Slow {
                image: Some(format!("{prefix}{}", path(name))),
                ..slow(2, &log)
            };
            let actions = boxed(vec![other, with_image]);
            run(&cx, actions, Completion::Individual).await.unwrap();
            let log = log.take();
            let alone = "resolve 1, prepare 1, enter 1, resolve 2, prepare 2, enter 2";
            assert_eq!(log.starts_with(alone), waits, "{name}: {log}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_about_the_same_waits() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("there"), "x").unwrap();
    std::fs::hard_link(path("there"), path("other name")).unwrap();
    std::os::unix::fs::symlink(folder.path(), path("folder")).unwrap();
    let long = "x".repeat(220);
    for (one, other, waits) in [
        (("a", None), ("b", None), false),
        (("a", None), ("a", None), true),
        (("a", Some("new")), ("b", Some("new2")), false),
        (("a", Some("new")), ("b", Some("folder/new")), true),
        (("a", Some("there")), ("b", Some("other name")), true),
        // What is made beside them has the beginning of their names.
        (
            ("a", Some(&*format!("{long}1"))),
            ("b", Some(&*format!("{long}2"))),
            true,
        ),
        (("a", Some("folder")), ("b", None), true),
    ] {
        let (cx, log) = (testing::running(), Log::default());
        let action = |number, (about, file): (&str, Option<&str>)| Slow {
            about: about.to_owned(),
            file: file.map(path),
            ..slow(number, &log)
        };
        let actions = boxed(vec![action(1, one), action(2, other)]);
        run(&cx, actions, Completion::Individual).await.unwrap();
        let log = log.take();
        let alone = "resolve 1, prepare 1, enter 1, resolve 2, prepare 2, enter 2";
        assert_eq!(log.starts_with(alone), waits, "{one:?} {other:?}: {log}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_that_fails_is_answered_and_all_are_aborted_in_reverse() {
    for (places, answered) in [
        (vec![(2, "prepare"), (5, "prepare")], "prepare 2"),
        (vec![(2, "enter"), (5, "resolve")], "enter 2"),
        (vec![(2, "prepare"), (4, "resolve")], "prepare 2"),
        (vec![(4, "resolve"), (5, "prepare")], "resolve 4"),
    ] {
        let (cx, log) = (testing::running(), Log::default());
        let action = |number| {
            let fails_in = places.iter().find(|(place, _)| *place == number);
            Slow {
                fails_in: fails_in.map_or("", |(_, what)| *what),
                ..slow(number, &log)
            }
        };
        let actions = boxed((0..8).map(action).collect());
        let error = run(&cx, actions, Completion::Individual).await.unwrap_err();
        assert_eq!(error.desc, answered);
        let log = log.take();
        let aborted = of_kind(&log, "abort");
        assert!(aborted.is_sorted_by(|one, other| one > other), "{log}");
        let mut begun = of_kind(&log, "prepare");
        begun.sort_unstable_by(|one, other| other.cmp(one));
        assert_eq!(aborted, begun, "{log}");
        let entered = of_kind(&log, "enter");
        let first: usize = answered.split(' ').next_back().unwrap().parse().unwrap();
        assert!(entered.iter().all(|number| *number <= first), "{log}");

        let actions = boxed((0..8).map(action).collect());
        let previews = dry_run(&cx, actions, Completion::Individual).await.unwrap();
        for (number, preview) in previews.iter().enumerate() {
            let fails = places.iter().find(|(place, _)| *place == number);
            let fails = fails.map(|(_, what)| format!("{what} {number}"));
            let error = preview.error.as_ref().map(|error| error.desc.clone());
            assert_eq!(error, fails);
            assert_eq!(preview.effect, Effect::default());
        }
    }
}
