//! Verbs in every state, groups step by step, and random lives of many jobs.

mod lives;

use super::*;

fn spec(id: &str) -> JobSpec {
    JobSpec {
        id: id.to_owned(),
        kind: JobKind::Backup,
        speed: 0,
        len: 0,
        auto_finalize: true,
        auto_dismiss: true,
    }
}

fn manual(id: &str) -> JobSpec {
    JobSpec {
        auto_finalize: false,
        auto_dismiss: false,
        ..spec(id)
    }
}

/// What clients are told, and what the work is, in short.
fn log(machine: &mut Machine) -> Vec<String> {
    let name = |machine: &Machine, key: JobKey| match machine.get(key) {
        Some(job) => job.spec.id.clone(),
        None => "gone".to_owned(),
    };
    let effects = machine.take_effects().into_iter();
    let short = effects.map(|effect| match effect {
        Effect::Tell(key, Notice::Status(status)) => {
            format!("{} {}", name(machine, key), status.name())
        }
        Effect::Tell(key, Notice::Completed(Some(error))) => {
            format!("{} COMPLETED {error}", name(machine, key))
        }
        Effect::Tell(key, Notice::Completed(None)) => format!("{} COMPLETED", name(machine, key)),
        Effect::Tell(key, notice) => {
            format!(
                "{} {}",
                name(machine, key),
                format!("{notice:?}").to_uppercase()
            )
        }
        Effect::Run(key) => format!("run {}", name(machine, key)),
        Effect::Pause(key, number) => format!("pause {} {number}", name(machine, key)),
        Effect::Resume(key) => format!("resume {}", name(machine, key)),
        Effect::Cancel(key, how) => format!("cancel {} {how:?}", name(machine, key)),
        Effect::Complete(key) => format!("complete {}", name(machine, key)),
        Effect::Prepare(key) => format!("prepare {}", name(machine, key)),
        Effect::Commit(key) => format!("commit {}", name(machine, key)),
        Effect::Abort(key) => format!("abort {}", name(machine, key)),
        Effect::Forget(key) => format!("forget {}", name(machine, key)),
    });
    short.collect()
}

/// A machine with the job `j` in this state. `other` keeps it waiting where it has to.
fn in_state(status: Status) -> (Machine, JobKey) {
    let mut machine = Machine::default();
    let group = machine.new_group();
    let key = machine
        .create(manual("j"), Some(group), Audience::Clients)
        .unwrap();
    let other = (status == Status::Waiting)
        .then(|| machine.create(spec("other"), Some(group), Audience::Clients));
    if status != Status::Created {
        machine.start(key);
    }
    match status {
        Status::Created | Status::Running => {}
        Status::Paused => {
            machine.pause(key).unwrap();
            machine.paused(key, 1);
        }
        Status::Ready => machine.ready(key),
        Status::Standby => {
            machine.ready(key);
            machine.pause(key).unwrap();
            machine.paused(key, 1);
        }
        Status::Waiting | Status::Pending => machine.ran(key, Ok(())),
        Status::Aborting => machine.ran(key, Err("no".to_owned())),
        Status::Concluded | Status::Null => {
            machine.ran(key, Err("no".to_owned()));
            machine.finished(key);
        }
    }
    if status == Status::Null {
        machine.dismiss(key).unwrap();
    } else {
        assert_eq!(machine.get(key).unwrap().status, status);
    }
    drop(other);
    machine.take_effects();
    (machine, key)
}

fn apply(machine: &mut Machine, key: JobKey, verb: Verb) -> Result<()> {
    match verb {
        Verb::Cancel => machine.cancel(key, Cancel::Force),
        Verb::Pause => machine.pause(key),
        Verb::Resume => machine.resume(key),
        Verb::SetSpeed => machine.set_speed(key, 1),
        Verb::Complete => machine.complete(key),
        Verb::Finalize => machine.finalize(key),
        Verb::Dismiss => machine.dismiss(key),
    }
}

#[test]
fn every_verb_in_every_state() {
    // As qemu-storage-daemon has them. P: taken, but for a job that is paused already; R: not paused.
    const TABLE: &[(Verb, &str)] = &[
        //              created running paused ready standby waiting pending aborting concluded
        (Verb::Cancel, "+++++++--"),
        (Verb::Pause, "++P+P----"),
        (Verb::Resume, "RR+R+RRRR"),
        (Verb::SetSpeed, "+++++----"),
        (Verb::Complete, "---++----"),
        (Verb::Finalize, "------+--"),
        (Verb::Dismiss, "--------+"),
    ];
    for (verb, row) in TABLE {
        for (status, expected) in Status::ALL.into_iter().zip(row.chars()) {
            let (mut machine, key) = in_state(status);
            let answer = apply(&mut machine, key, *verb);
            let text = answer.map_err(|error| error.message().to_owned());
            let (state, verb) = (status.name(), verb.name());
            let wanted = match expected {
                '+' => Ok(()),
                'P' => Err("Job is already paused".to_owned()),
                'R' => Err("Can't resume a job that was not paused".to_owned()),
                _ => Err(format!(
                    "Job 'j' in state '{state}' cannot accept command verb '{verb}'"
                )),
            };
            assert_eq!(text, wanted, "{verb} in {state}");
            if wanted.is_err() {
                assert_eq!(
                    log(&mut machine),
                    [""; 0],
                    "a refused verb has changed nothing"
                );
            }
        }
        let (mut machine, key) = in_state(Status::Null);
        let error = apply(&mut machine, key, *verb).unwrap_err();
        assert_eq!(error.message(), "Job not found");
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}

#[test]
fn a_job_that_does_well() {
    let mut machine = Machine::default();
    let key = machine.create(spec("j"), None, Audience::Clients).unwrap();
    machine.start(key);
    assert_eq!(log(&mut machine), ["j created", "j running", "run j"]);
    machine.ran(key, Ok(()));
    assert_eq!(log(&mut machine), ["j waiting", "j pending", "prepare j"]);
    machine.prepared(key, Ok(()));
    assert_eq!(log(&mut machine), ["commit j"]);
    machine.finished(key);
    let end = [
        "gone COMPLETED",
        "gone concluded",
        "gone null",
        "forget gone",
    ];
    assert_eq!(log(&mut machine), end);
    assert!(machine.groups.is_empty() && machine.ids.is_empty());
}

#[test]
fn a_job_that_waits_for_the_users_word() {
    let mut machine = Machine::default();
    let key = machine
        .create(manual("j"), None, Audience::Clients)
        .unwrap();
    machine.start(key);
    machine.ran(key, Ok(()));
    let begin = [
        "j created",
        "j running",
        "run j",
        "j waiting",
        "j pending",
        "j PENDING",
    ];
    assert_eq!(log(&mut machine), begin);
    machine.finalize(key).unwrap();
    assert_eq!(log(&mut machine), ["prepare j"]);
    assert!(machine.finalize(key).is_err(), "it was given");
    machine.prepared(key, Ok(()));
    assert!(machine.cancel(key, Cancel::Force).is_err(), "too late");
    machine.finished(key);
    assert_eq!(
        log(&mut machine),
        ["commit j", "j COMPLETED", "j concluded"]
    );
    machine.dismiss(key).unwrap();
    assert_eq!(log(&mut machine), ["gone null", "forget gone"]);
}

#[test]
fn a_failure_is_told_with_its_reason() {
    let mut machine = Machine::default();
    let key = machine
        .create(manual("j"), None, Audience::Clients)
        .unwrap();
    machine.start(key);
    machine.take_effects();
    machine.ran(key, Err("Input/output error".to_owned()));
    assert_eq!(log(&mut machine), ["j aborting", "abort j"]);
    machine.finished(key);
    assert_eq!(
        log(&mut machine),
        ["j COMPLETED Input/output error", "j concluded"]
    );
    assert_eq!(
        machine.get(key).unwrap().failure.as_deref(),
        Some("Input/output error")
    );
}

#[test]
fn what_cannot_be_prepared_is_aborted_with_its_group() {
    let mut machine = Machine::default();
    let group = machine.new_group();
    let [a, b] = ["a", "b"].map(|id| {
        machine
            .create(manual(id), Some(group), Audience::Clients)
            .unwrap()
    });
    for key in [a, b] {
        machine.start(key);
        machine.ran(key, Ok(()));
    }
    machine.finalize(a).unwrap();
    machine.take_effects();
    machine.prepared(b, Err("no".to_owned()));
    assert_eq!(log(&mut machine), ["b aborting", "abort b"]);
    machine.finished(b);
    assert_eq!(
        log(&mut machine),
        ["b COMPLETED no", "b concluded", "a aborting", "abort a"]
    );
    machine.finished(a);
    assert_eq!(log(&mut machine), ["a CANCELLED", "a concluded"]);
}

#[test]
fn a_paused_job_that_is_cancelled_does_not_try_again() {
    let (mut machine, key) = in_state(Status::Paused);
    machine.cancel(key, Cancel::Force).unwrap();
    assert_eq!(
        log(&mut machine),
        ["cancel j Force", "j running", "resume j"]
    );
    // The report of a pause that was taken back, and an error that came too late.
    machine.paused(key, 1);
    let stop = (Operation::Read, ErrorAction::Stop);
    machine.io_error(key, stop, IoStatus::Failed);
    machine.ran(key, Err("whatever".to_owned()));
    machine.finished(key);
    let end = ["j aborting", "abort j", "j CANCELLED", "j concluded"];
    assert_eq!(log(&mut machine), end);
    let failure = machine.get(key).unwrap().failure.clone();
    assert_eq!(failure.as_deref(), Some("Operation canceled"));
}

#[test]
fn a_pause_before_the_start_holds_the_work() {
    let (mut machine, key) = in_state(Status::Created);
    machine.pause(key).unwrap();
    assert_eq!(log(&mut machine), [""; 0]);
    machine.start(key);
    assert_eq!(log(&mut machine), ["j running", "pause j 1", "run j"]);
    machine.paused(key, 1);
    machine.resume(key).unwrap();
    assert_eq!(log(&mut machine), ["j paused", "j running", "resume j"]);
}

#[test]
fn a_job_that_was_made_and_is_not_started_leaves_no_block_job_event() {
    let mut machine = Machine::default();
    let key = machine
        .create(manual("j"), None, Audience::Clients)
        .unwrap();
    machine.abandon(key);
    let wanted = [
        "gone created",
        "gone aborting",
        "gone concluded",
        "gone null",
        "forget gone",
    ];
    assert_eq!(log(&mut machine), wanted);
    // Cancelled in between: what was made for it is given back by its task.
    let (mut machine, key) = in_state(Status::Created);
    machine.cancel(key, Cancel::Force).unwrap();
    machine.start(key);
    assert_eq!(log(&mut machine), ["j aborting", "abort j"]);
    machine.finished(key);
    assert_eq!(
        log(&mut machine),
        ["gone concluded", "gone null", "forget gone"]
    );
}

#[test]
fn an_error_that_stops_holds_until_the_user_resumes() {
    let (mut machine, key) = in_state(Status::Running);
    let stop = (Operation::Write, ErrorAction::Stop);
    machine.io_error(key, stop, IoStatus::NoSpace);
    machine.io_error(key, stop, IoStatus::Failed);
    machine.paused(key, 1);
    assert_eq!(machine.get(key).unwrap().io_status, IoStatus::NoSpace);
    assert!(machine.pause(key).is_err());
    machine.resume(key).unwrap();
    assert_eq!(machine.get(key).unwrap().io_status, IoStatus::Ok);
    let wanted = [
        "j ERROR(WRITE, STOP)",
        "pause j 1",
        "j ERROR(WRITE, STOP)",
        "j paused",
        "j running",
        "resume j",
    ];
    assert_eq!(log(&mut machine), wanted);
}

#[test]
fn a_ready_job_ends_softly_or_completes() {
    let (mut machine, key) = in_state(Status::Ready);
    machine.cancel(key, Cancel::Soft).unwrap();
    assert_eq!(log(&mut machine), ["cancel j Soft"]);
    let error = machine.complete(key).unwrap_err();
    assert_eq!(
        error.message(),
        "The active block job 'j' cannot be completed"
    );
    machine.ran(key, Ok(()));
    assert_eq!(log(&mut machine), ["j waiting", "j pending", "j PENDING"]);

    let (mut machine, key) = in_state(Status::Standby);
    machine.complete(key).unwrap();
    machine.resume(key).unwrap();
    assert_eq!(log(&mut machine), ["complete j", "j ready", "resume j"]);
}

#[test]
fn ids_are_well_formed_and_in_use_once() {
    let mut machine = Machine::default();
    for id in ["", "0j", "a b", "-"] {
        let error = machine
            .create(spec(id), None, Audience::Clients)
            .unwrap_err();
        assert_eq!(error.message(), format!("Invalid job ID '{id}'"));
    }
    let key = machine.create(spec("j"), None, Audience::Clients).unwrap();
    let error = machine
        .create(spec("j"), None, Audience::Clients)
        .unwrap_err();
    assert_eq!(error.message(), "Job ID 'j' already in use");
    machine.abandon(key);
    machine.create(spec("j"), None, Audience::Clients).unwrap();
}

mod groups {
    use super::*;

    fn two() -> (Machine, [JobKey; 2]) {
        let mut machine = Machine::default();
        let group = machine.new_group();
        let keys = ["a", "b"].map(|id| {
            machine
                .create(manual(id), Some(group), Audience::Clients)
                .unwrap()
        });
        for key in keys {
            machine.start(key);
        }
        machine.take_effects();
        (machine, keys)
    }

    /// The orders of events here are those that qemu-storage-daemon sends.
    #[test]
    fn they_end_together() {
        let (mut machine, [a, b]) = two();
        machine.ran(a, Ok(()));
        assert_eq!(log(&mut machine), ["a waiting"]);
        machine.ran(b, Ok(()));
        let wanted = [
            "b waiting",
            "b pending",
            "b PENDING",
            "a pending",
            "a PENDING",
        ];
        assert_eq!(log(&mut machine), wanted);
        machine.finalize(a).unwrap();
        machine.prepared(b, Ok(()));
        machine.prepared(a, Ok(()));
        assert_eq!(log(&mut machine), ["prepare b", "prepare a", "commit b"]);
        machine.finished(b);
        machine.finished(a);
        let wanted = [
            "b COMPLETED",
            "b concluded",
            "commit a",
            "a COMPLETED",
            "a concluded",
        ];
        assert_eq!(log(&mut machine), wanted);
    }

    #[test]
    fn one_that_fails_cancels_the_other() {
        let (mut machine, [a, b]) = two();
        machine.ran(b, Err("no".to_owned()));
        assert_eq!(log(&mut machine), ["b aborting", "cancel a Force"]);
        machine.ran(a, Err("cancelled".to_owned()));
        assert_eq!(log(&mut machine), ["a aborting", "abort b"]);
        machine.finished(b);
        machine.finished(a);
        let wanted = [
            "b COMPLETED no",
            "b concluded",
            "abort a",
            "a CANCELLED",
            "a concluded",
        ];
        assert_eq!(log(&mut machine), wanted);
    }

    #[test]
    fn one_that_is_cancelled_takes_one_that_waits_with_it() {
        let (mut machine, [a, b]) = two();
        machine.ran(a, Ok(()));
        machine.cancel(b, Cancel::Soft).unwrap();
        machine.ran(b, Err("cancelled".to_owned()));
        machine.finished(b);
        machine.finished(a);
        let wanted = [
            "a waiting",
            "cancel b Force",
            "b aborting",
            "abort b",
            "b CANCELLED",
            "b concluded",
            "a aborting",
            "abort a",
            "a CANCELLED",
            "a concluded",
        ];
        assert_eq!(log(&mut machine), wanted);
    }

    #[test]
    fn strangers_do_not_care() {
        let mut machine = Machine::default();
        let [a, b] =
            ["a", "b"].map(|id| machine.create(spec(id), None, Audience::Clients).unwrap());
        machine.start(a);
        machine.start(b);
        machine.ran(a, Err("no".to_owned()));
        machine.finished(a);
        assert_eq!(machine.get(b).unwrap().status, Status::Running);
    }
}
