//! Random lives: many jobs in groups, verbs and reports at random moments, and what must hold whatever happens.

use std::collections::HashMap;

use fastrand::Rng;

use super::*;

/// What a job's task would do, and what was said about the job.
#[derive(Debug, Default)]
struct Life {
    group: usize,
    auto_finalize: bool,
    /// What the task was told and has not done: it does these in order.
    todo: Vec<Effect>,
    /// The pause that the work is to report.
    pause: Option<u64>,
    working: bool,
    forced: bool,
    history: Vec<Status>,
    notices: Vec<Notice>,
    prepared: bool,
    committed: bool,
    aborted: bool,
    forgotten: bool,
}

struct World {
    machine: Machine,
    rng: Rng,
    lives: HashMap<JobKey, Life>,
    alive: Vec<JobKey>,
    groups: usize,
}

impl World {
    fn pick(&mut self) -> Option<JobKey> {
        self.rng.choice(self.alive.iter().copied())
    }

    fn make_group(&mut self) {
        let group = self.machine.new_group();
        self.groups += 1;
        let mut keys = Vec::new();
        for _ in 0..self.rng.usize(1..4) {
            let spec = JobSpec {
                auto_finalize: self.rng.bool(),
                auto_dismiss: self.rng.bool(),
                ..spec(&format!("job{}", self.lives.len()))
            };
            let life = Life {
                group: self.groups,
                auto_finalize: spec.auto_finalize,
                ..Life::default()
            };
            let key = self
                .machine
                .create(spec, Some(group), Audience::Clients)
                .unwrap();
            self.lives.insert(key, life);
            self.alive.push(key);
            keys.push(key);
        }
        self.follow();
        // A transaction is abandoned as a whole, and jobs may be cancelled before they are started.
        let is_abandoned = self.rng.u8(..) < 40;
        for key in keys {
            if self.rng.u8(..) < 20 {
                let _ = self.machine.cancel(key, Cancel::Force);
            }
            match is_abandoned {
                true => self.machine.abandon(key),
                false => self.machine.start(key),
            }
            self.follow();
        }
    }

    /// Takes the effects in, and checks that each is allowed.
    fn follow(&mut self) {
        for effect in self.machine.take_effects() {
            let key = key_of(&effect);
            self.check_group(key, &effect);
            let life = self.lives.get_mut(&key).unwrap();
            assert!(!life.forgotten, "{effect:?} after its end");
            life.take(effect);
            if life.forgotten {
                self.alive.retain(|alive| *alive != key);
            }
        }
    }

    fn check_group(&self, key: JobKey, effect: &Effect) {
        let group = self.lives[&key].group;
        let members = || self.lives.values().filter(|life| life.group == group);
        match effect {
            Effect::Prepare(_) => {
                let is_pending = |life: &Life| life.history.last() == Some(&Status::Pending);
                assert!(members().all(is_pending), "prepared before all are done");
            }
            Effect::Commit(_) => {
                assert!(
                    members().all(|life| life.prepared),
                    "committed before all are prepared"
                );
                assert!(
                    !members().any(|life| life.aborted),
                    "committed beside an aborted one"
                );
            }
            Effect::Abort(_) => {
                assert!(
                    !members().any(|life| life.committed),
                    "aborted beside a committed one"
                );
                assert!(
                    !members().any(|life| life.working),
                    "aborted while others are at work"
                );
            }
            _ => {}
        }
    }

    fn verb(&mut self, key: JobKey) {
        let before = format!("{:?}", self.machine.jobs);
        let verb = self.rng.choice(Verb::ALL).unwrap();
        let done = match verb {
            Verb::Cancel if self.rng.bool() => self.machine.cancel(key, Cancel::Soft),
            _ => apply(&mut self.machine, key, verb),
        };
        if done.is_err() {
            assert_eq!(
                before,
                format!("{:?}", self.machine.jobs),
                "refused, and changed"
            );
            assert!(self.machine.effects.is_empty(), "refused, and done");
        }
        self.follow();
    }

    /// The task does something: part of its work, or what it was told.
    fn step(&mut self, key: JobKey) {
        let life = self.lives.get_mut(&key).unwrap();
        let fails = self.rng.u8(..) < 40;
        let result = || if fails { Err("no".to_owned()) } else { Ok(()) };
        if life.working && life.forced {
            life.working = false;
            self.machine.ran(key, Err("stopped".to_owned()));
        } else if life.working {
            match (life.pause, self.rng.u8(..6)) {
                // Reported once or more, and maybe too late.
                (Some(pause), 0..3) => self.machine.paused(key, pause),
                (None, 0) => {
                    life.working = false;
                    self.machine.ran(key, result());
                }
                (None, 1) => self.machine.ready(key),
                (None, 2) => {
                    let ignore = (Operation::Write, ErrorAction::Ignore);
                    self.machine.io_error(key, ignore, IoStatus::Failed);
                }
                (None, 3) => {
                    let stop = (Operation::Read, ErrorAction::Stop);
                    self.machine.io_error(key, stop, IoStatus::Failed);
                }
                _ => {}
            }
        } else if !life.todo.is_empty() {
            match life.todo.remove(0) {
                Effect::Prepare(_) => {
                    let result = result();
                    life.prepared = result.is_ok();
                    self.machine.prepared(key, result);
                }
                Effect::Commit(_) | Effect::Abort(_) => self.machine.finished(key),
                other => panic!("{other:?}"),
            }
        }
        self.follow();
    }
}

fn key_of(effect: &Effect) -> JobKey {
    let (Effect::Tell(key, _)
    | Effect::Run(key)
    | Effect::Pause(key, _)
    | Effect::Resume(key)
    | Effect::Cancel(key, _)
    | Effect::Complete(key)
    | Effect::Prepare(key)
    | Effect::Commit(key)
    | Effect::Abort(key)
    | Effect::Forget(key)) = effect;
    *key
}

impl Life {
    fn take(&mut self, effect: Effect) {
        match effect {
            Effect::Tell(_, Notice::Status(status)) => {
                match self.history.last() {
                    None => assert_eq!(status, Status::Created),
                    Some(last) => {
                        let is_news = *last != status;
                        assert!(last.may_become(status) && is_news, "{last:?} {status:?}");
                    }
                }
                self.history.push(status);
            }
            Effect::Tell(_, notice) => self.note(notice),
            Effect::Run(_) => self.working = true,
            Effect::Pause(_, number) => self.pause = Some(number),
            Effect::Resume(_) => self.pause = None,
            Effect::Cancel(_, how) => self.forced |= how == Cancel::Force,
            Effect::Complete(_) => {}
            Effect::Prepare(_) => self.todo.push(effect),
            Effect::Commit(_) => {
                self.committed = true;
                self.todo.push(effect);
            }
            Effect::Abort(_) => {
                self.aborted = true;
                self.todo.push(effect);
            }
            Effect::Forget(_) => self.forgotten = true,
        }
    }

    fn note(&mut self, notice: Notice) {
        let status = *self.history.last().unwrap();
        match &notice {
            Notice::Pending => assert_eq!((status, self.auto_finalize), (Status::Pending, false)),
            Notice::Ready => assert_eq!(status, Status::Ready),
            Notice::Completed(error) => {
                assert_eq!(error.is_some(), self.aborted, "{self:?}");
                assert_eq!(error.is_none(), self.committed);
            }
            Notice::Cancelled => assert!(self.aborted),
            Notice::Error(..) => assert!(self.working),
            Notice::Status(_) => unreachable!(),
        }
        self.notices.push(notice);
    }

    /// Looks back on it.
    fn check(&self) {
        assert!(self.forgotten, "{self:?}");
        assert_eq!(self.history.last(), Some(&Status::Null));
        let was = |status| self.history.contains(&status);
        let is_end = |n: &&Notice| matches!(n, Notice::Completed(_) | Notice::Cancelled);
        let ends = self.notices.iter().filter(is_end).count();
        assert_eq!(ends, usize::from(was(Status::Running)), "{self:?}");
        assert_eq!(was(Status::Aborting), !self.committed, "{self:?}");
        assert!(!(self.committed && self.aborted));
    }
}

fn live(seed: u64) {
    let mut world = World {
        machine: Machine::default(),
        rng: Rng::with_seed(seed),
        lives: HashMap::new(),
        alive: Vec::new(),
        groups: 0,
    };
    for _ in 0..300 {
        if world.alive.is_empty() || world.rng.u8(..20) == 0 {
            world.make_group();
            continue;
        }
        let Some(key) = world.pick() else {
            continue;
        };
        match world.rng.u8(..3) {
            0 => world.verb(key),
            _ => world.step(key),
        }
    }
    // Every job ends when the daemon wants it to, and its task does what it is told.
    for _ in 0..10_000 {
        let Some(key) = world.pick() else {
            break;
        };
        world.machine.end(key);
        world.follow();
        if !world.lives[&key].forgotten {
            world.step(key);
        }
    }
    world.lives.values().for_each(Life::check);
    let Machine {
        jobs, ids, groups, ..
    } = &world.machine;
    assert!(jobs.is_empty() && ids.is_empty() && groups.is_empty());
}

#[test]
fn whatever_happens_every_job_ends_as_its_group_does() {
    let seeds = match std::env::var("JOB_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..500).collect(),
    };
    for seed in seeds {
        let lived = std::panic::catch_unwind(|| live(seed));
        assert!(lived.is_ok(), "JOB_SEED={seed}");
    }
}
