//! The order of prepare, commit, abort and clean, with actions that write down what happens to them.

use std::sync::{Arc, Mutex};

use super::*;

/// Writes down what happens to it.
struct Recorder {
    name: &'static str,
    fate: Fate,
    log: Arc<Mutex<Vec<String>>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Works,
    Fails,
    Panics,
}

impl Recorder {
    fn note(&self, what: &str) {
        self.log
            .lock()
            .unwrap()
            .push(format!("{what} {}", self.name));
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.note("clean");
    }
}

impl Action for Recorder {
    fn prepare(&mut self) -> BoxFuture<'_, Result<(), QmpError>> {
        Box::pin(async {
            self.note("prepare");
            match self.fate {
                Fate::Works => Ok(()),
                Fate::Fails => Err(QmpError::generic("no")),
                Fate::Panics => panic!("as the test wants it"),
            }
        })
    }

    fn abort(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async { self.note("abort") })
    }

    fn commit(self: Box<Self>) {
        self.note("commit");
    }
}

/// Runs three actions of which the last has the given fate.
fn run_three(last: Fate) -> (Result<(), QmpError>, String) {
    let log = Arc::default();
    let action = |name, fate| -> Box<dyn Action> {
        Box::new(Recorder {
            name,
            fate,
            log: Arc::clone(&log),
        })
    };
    let actions = vec![
        action("a", Fate::Works),
        action("b", Fate::Works),
        action("c", last),
    ];
    let result = run(actions).now_or_never().unwrap();
    let log = log.lock().unwrap().join(", ");
    (result, log)
}

#[test]
fn all_are_prepared_before_any_is_committed() {
    let (result, log) = run_three(Fate::Works);
    assert_eq!(result, Ok(()));
    assert_eq!(
        log,
        "prepare a, prepare b, prepare c, commit a, clean a, commit b, clean b, commit c, clean c"
    );
}

#[test]
fn after_a_failure_the_others_are_aborted_in_reverse() {
    for fate in [Fate::Fails, Fate::Panics] {
        let (result, log) = run_three(fate);
        assert!(result.is_err());
        assert_eq!(
            log,
            "prepare a, prepare b, prepare c, abort b, abort a, clean a, clean b, clean c"
        );
    }
}
