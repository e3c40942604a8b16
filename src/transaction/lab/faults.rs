//! Whatever a command asks of the host fails once, at each index: it answers with an error and nothing has changed, or it has
//! happened all the same. Guests write meanwhile, and keep what they were answered. (What fails may be a request of theirs.)
//!
//! `QBLOCKD_FAULTS` is how often each kind of fault is tried per index, in thousandths (few if absent: a share that is chosen at
//! random, by the seed `QBLOCKD_CRASH_SEED`).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use block::crashlab::audit::Audit;
use block::formats::qcow2::create::Compat;
use block::io::Deed;
use qapi::rt::{QmpError, Value};
use serde_json::json;

use super::guests::{self, Written};
use super::oracle::recover;
use super::run::{Place, Runner, drive};
use super::script::{DISK_BYTES, DISKS, Op, Script, There};
use super::state::clear;
use super::tape::{Fault, Tape};
use super::tests::setting;
use crate::daemon::testing::{self, execute, without_children};
use crate::journal::Outcome;

/// A command that is tried.
struct Case {
    command: &'static str,
    arguments: fn(&Place) -> Value,
    /// What is asked before; it must succeed.
    before: fn(&Place) -> Vec<(&'static str, Value)>,
    /// So many of the first disks are reverted.
    reverted: usize,
}

/// Everything that a command that fails may not change, in words.
type State = BTreeMap<String, String>;

/// A snapshot of the disk that all have from the start.
const OLD: [&str; DISKS] = ["old", "old", "old"];

/// Files that a command may replace, or write over.
const OTHERS: [(&str, There); 3] = [
    ("there", There::Bytes),
    ("device0", There::Device),
    ("device1", There::Device),
];

fn file(place: &Place, name: &str) -> String {
    place.filename(name)
}

fn action(kind: &str, data: Value) -> Value {
    json!({"type": kind, "data": data})
}

fn nothing(_: &Place) -> Vec<(&'static str, Value)> {
    Vec::new()
}

/// A file of these names as a node, on a qcow2 image that is empty.
fn node(place: &Place, name: &str) -> Vec<(&'static str, Value)> {
    let protocol = format!("{name}-file");
    vec![
        (
            "blockdev-add",
            json!({"driver": "file", "node-name": protocol, "filename": file(place, name)}),
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": name, "file": protocol, "backing": null}),
        ),
    ]
}

fn transactions() -> Vec<Case> {
    vec![
        Case {
            command: "transaction",
            arguments: |place| {
                json!({"actions": [
                    action("blockdev-snapshot-internal-sync", json!({"device": "d0", "name": "new"})),
                    action("blockdev-snapshot-sync",
                        json!({"device": "d1", "snapshot-file": file(place, "new1")})),
                    action("x-blockdev-snapshot-delete-internal-sync",
                        json!({"device": "d2", "name": OLD[2]})),
                ]})
            },
            before: nothing,
            reverted: 0,
        },
        reverts(),
        Case {
            command: "transaction",
            arguments: |place| {
                json!({"actions": [
                    action("x-blockdev-snapshot-revert", json!({"device": "d0", "name": OLD[0]})),
                    action("drive-backup", json!({"device": "d1", "sync": "full", "job-id": "j1",
                        "target": file(place, "device0")})),
                    action("blockdev-backup", json!({"device": "d2", "sync": "full", "job-id": "j2",
                        "target": "empty"})),
                ]})
            },
            before: |place| node(place, "empty"),
            reverted: 1,
        },
        Case {
            command: "transaction",
            arguments: |place| {
                json!({"actions": [
                    action("blockdev-snapshot-sync",
                        json!({"device": "d0", "snapshot-file": file(place, "there")})),
                    action("blockdev-snapshot", json!({"node": "top", "overlay": "empty"})),
                    action("blockdev-snapshot-internal-sync", json!({"device": "d2", "name": "new"})),
                    action("drive-backup", json!({"device": "d2", "sync": "none", "job-id": "j2",
                        "target": file(place, "new2")})),
                    action("blockdev-snapshot-sync",
                        json!({"device": "d1", "snapshot-file": file(place, "device1")})),
                ]})
            },
            before: |place| {
                let mut before = node(place, "empty");
                before.extend(node(place, "top"));
                before
            },
            reverted: 0,
        },
    ]
}

/// It is done while guests go on, whose disks go back then.
fn reverts() -> Case {
    Case {
        command: "transaction",
        arguments: |_| {
            let revert = |disk: usize| {
                let data = json!({"device": drive(disk), "name": OLD[disk]});
                action("x-blockdev-snapshot-revert", data)
            };
            let delete = json!({"device": "d1", "name": OLD[1]});
            json!({"actions": [
                revert(0), revert(1),
                action("x-blockdev-snapshot-delete-internal-sync", delete),
                revert(2),
            ]})
        },
        before: nothing,
        reverted: 3,
    }
}

/// Images that are made by jobs.
fn creations() -> Vec<Case> {
    vec![
        Case {
            command: "blockdev-create",
            reverted: 0,
            arguments: |place| {
                json!({"job-id": "c", "options":
                    {"driver": "file", "filename": file(place, "made"), "size": 65536}})
            },
            before: nothing,
        },
        // What is there comes back.
        Case {
            command: "blockdev-create",
            reverted: 0,
            arguments: |place| {
                json!({"job-id": "c", "options":
                    {"driver": "file", "filename": file(place, "there"), "size": 65536}})
            },
            before: nothing,
        },
        Case {
            command: "blockdev-create",
            reverted: 0,
            arguments: |_| {
                json!({"job-id": "c", "options":
                    {"driver": "qcow2", "file": "plain", "size": 65536}})
            },
            before: |place| {
                vec![(
                    "blockdev-add",
                    json!({"driver": "file", "node-name": "plain", "filename": file(place, "empty-file")}),
                )]
            },
        },
    ]
}

/// Commands that are transactions of one action, and others that change the graph.
fn single_commands() -> Vec<Case> {
    vec![
        Case {
            command: "blockdev-snapshot-sync",
            arguments: |place| json!({"device": "d0", "snapshot-file": file(place, "empty"), "mode": "existing"}),
            before: nothing,
            reverted: 0,
        },
        Case {
            command: "blockdev-snapshot-internal-sync",
            arguments: |_| json!({"device": "d0", "name": "new"}),
            before: nothing,
            reverted: 0,
        },
        Case {
            command: "drive-backup",
            arguments: |place| {
                json!({"device": "d1", "sync": "top", "job-id": "j", "format": "qcow2",
                    "target": file(place, "empty"), "mode": "existing"})
            },
            before: nothing,
            reverted: 0,
        },
        Case {
            command: "blockdev-reopen",
            arguments: |_| {
                json!({"options": [{"driver": "qcow2", "node-name": "top", "file": "top-file",
                    "backing": "empty", "read-only": true}]})
            },
            before: |place| {
                let mut before = node(place, "empty");
                before.extend(node(place, "top"));
                before
            },
            reverted: 0,
        },
        Case {
            command: "change-backing-file",
            arguments: |_| json!({"device": "over", "image-node-name": "over", "backing-file": "elsewhere"}),
            before: |place| {
                vec![(
                    "blockdev-add",
                    json!({"driver": "qcow2", "node-name": "over",
                    "file": {"driver": "file", "filename": file(place, "over")}}),
                )]
            },
            reverted: 0,
        },
    ]
}

/// Where a case is tried.
struct Trial<'p> {
    place: &'p Place,
    tape: Arc<Tape>,
    runner: Runner<'p>,
}

impl<'p> Trial<'p> {
    /// Images and a daemon as the case wants them.
    async fn new(place: &'p Place, case: &Case) -> Result<Trial<'p>, String> {
        for folder in [&place.images, &place.state] {
            clear(folder);
        }
        let tape = Tape::new(&place.images, &place.state, 0);
        let mut script = Script::random(7);
        script.ops.clear();
        script.has_overlay = [true, false, false];
        if case.reverted == DISKS {
            for image in &mut script.images {
                image.compat = Compat::V1_1;
            }
        }
        let runner = Runner::create(place, &tape, &script).await?;
        for (name, there) in OTHERS {
            fs::write(place.images.join(name), there.bytes().unwrap()).unwrap();
        }
        fs::write(place.images.join("empty-file"), b"").unwrap();
        for (name, backing) in [("empty", None), ("top", None), ("over", Some("empty"))] {
            runner.make_image(name, backing).await?;
        }
        let trial = Trial {
            place,
            tape,
            runner,
        };
        for (command, arguments) in (case.before)(place) {
            let done = execute(&trial.runner.cx, command, arguments).await;
            done.map_err(|error| format!("{command}: {}", error.desc))?;
        }
        Ok(trial)
    }

    /// Runs the command while guests write. Answers what it answers, and what they have written.
    async fn run(&self, case: &Case) -> (Result<Value, QmpError>, Vec<Vec<Written>>) {
        let arguments = (case.arguments)(self.place);
        let command = async {
            let answer = execute(&self.runner.cx, case.command, arguments).await?;
            match case.command {
                "blockdev-create" => self.until_concluded("c").await,
                _ => Ok(answer),
            }
        };
        let edges = self.runner.edges().await;
        let (answer, guests) = guests::beside(command, edges, &self.tape, [1; DISKS]).await;
        (
            answer,
            guests.into_iter().map(|beside| beside.written).collect(),
        )
    }

    /// Whether disks, from this one on, show what their guests have written last. What has failed may be there in part.
    async fn check_guests(&self, from: usize, guests: &[Vec<Written>]) -> Result<(), String> {
        for (disk, guest) in guests.iter().enumerate().skip(from) {
            let content = self.runner.read(disk).await?;
            if let Some(last) = guest.last().filter(|last| last.is_done)
                && guests::split(content)?.0 != last.byte
            {
                return Err(format!("disk {disk} has lost a write: {guest:?}"));
            }
        }
        Ok(())
    }

    /// Waits for a job that waits for being dismissed then; its error is the command's.
    async fn until_concluded(&self, id: &str) -> Result<Value, QmpError> {
        let cx = &self.runner.cx;
        loop {
            let jobs = execute(cx, "query-jobs", json!({})).await?;
            let jobs = jobs.as_array().unwrap();
            let job = jobs.iter().find(|job| job["id"] == id).unwrap();
            if job["status"] == "concluded" {
                execute(cx, "job-dismiss", json!({"id": id})).await?;
                return match job["error"].as_str() {
                    Some(error) => Err(QmpError::generic(error)),
                    None => Ok(Value::Null),
                };
            }
            testing::a_moment().await;
        }
    }

    /// All that a failure may not change.
    async fn state(&self) -> Result<State, String> {
        let mut state = State::new();
        for entry in fs::read_dir(&self.place.images).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            state.insert(format!("file {name}"), String::new());
        }
        for entry in fs::read_dir(&self.place.state).unwrap() {
            state.insert(format!("{:?}", entry.unwrap().path()), String::new());
        }
        for (name, there) in OTHERS {
            let bytes = fs::read(self.place.images.join(name)).unwrap();
            let is_same = Some(bytes) == there.bytes();
            state.insert(name.to_owned(), format!("the same: {is_same}"));
        }
        for query in [
            "x-debug-query-block-graph",
            "query-jobs",
            "query-block-jobs",
        ] {
            let answer = execute(&self.runner.cx, query, json!({})).await;
            let answer = answer.map_err(|error| error.desc)?;
            state.insert(query.to_owned(), answer.to_string());
        }
        for disk in 0..DISKS {
            let content = guests::split(self.runner.read(disk).await?)?.1;
            state.insert(drive(disk), format!("{content:?}"));
            let edge = self.runner.edge(disk).await;
            let node = edge.node().below_filters();
            let names = node.driver().snapshots().map(|snapshots| {
                let list = snapshots.list().into_iter();
                list.map(|info| info.name).collect::<Vec<String>>()
            });
            state.insert(format!("snapshots of {disk}"), format!("{names:?}"));
        }
        Ok(state)
    }

    /// An image could not be made durable, nor what it was be put back: the next start does that.
    async fn end_and_recover(self) -> Result<(), String> {
        // The image is the one that fails to close.
        let _ = self.runner.end().await;
        let outcomes = recover(self.place, &self.tape).await?;
        if !outcomes.iter().all(|outcome| *outcome == Outcome::Removed) {
            return Err(format!("the next start has left {outcomes:?}"));
        }
        for name in ["disk0-1", "disk1-0", "disk2-0"] {
            let bytes = fs::read(self.place.images.join(name)).unwrap();
            let audit = Audit::new(&bytes)?;
            let verdict = audit.verdict()?;
            let names: Vec<&str> = audit.snapshots().iter().map(|s| &*s.name).collect();
            if names != ["old"] || !verdict.dangers.is_empty() {
                return Err(format!("{name} has {names:?}: {verdict:?}"));
            }
        }
        is_empty(&self.place.state)
    }

    /// Guests go on; then the daemon ends, and all images are sound.
    async fn end(mut self) -> Result<(), String> {
        for disk in 0..DISKS {
            let (at, len) = (512, DISK_BYTES / 2);
            self.runner.step(&Op::Write { disk, at, len }).await?;
        }
        let place = self.place;
        self.runner.end().await?;
        // A journal that could not be removed says that there is nothing to do.
        let outcomes = recover(place, &self.tape).await?;
        if !outcomes.is_empty() {
            return Err(format!("there was something to recover: {outcomes:?}"));
        }
        for entry in fs::read_dir(&place.images).unwrap() {
            let path = entry.unwrap().path();
            let bytes = fs::read(&path).unwrap();
            if !bytes.starts_with(b"QFI\xfb") {
                continue;
            }
            let audit = Audit::new(&bytes)?;
            let verdict = audit.verdict()?;
            if audit.is_dirty() || verdict.leaks > 0 || !verdict.dangers.is_empty() {
                return Err(format!("{path:?}: {verdict:?}, dirty {}", audit.is_dirty()));
            }
        }
        is_empty(&place.state)
    }
}

fn is_empty(state: &Path) -> Result<(), String> {
    match fs::read_dir(state).unwrap().next() {
        Some(_) => Err("a journal is left".to_owned()),
        None => Ok(()),
    }
}

fn difference(before: &State, after: &State) -> Option<String> {
    let keys = before.keys().chain(after.keys());
    let mut different = keys.filter(|key| before.get(*key) != after.get(*key));
    let key = different.next()?;
    Some(format!(
        "{key}: {:?} instead of {:?}",
        after.get(key),
        before.get(key)
    ))
}

/// What has been tried.
#[derive(Debug, Default)]
struct Figures {
    /// What a command asks of the host.
    indices: u64,
    failed: u64,
    happened: u64,
}

/// Tries a case with faults at all indices, or at a share of them.
async fn try_case(
    place: &Place,
    case: &Case,
    share: f64,
    random: &mut fastrand::Rng,
) -> Result<Figures, String> {
    let mut figures = Figures::default();
    let counted = Trial::new(place, case).await?;
    counted.tape.fail(u64::MAX, Fault::Io);
    let (done, guests) = counted.run(case).await;
    done.map_err(|error| error.desc)?;
    counted.check_guests(case.reverted, &guests).await?;
    figures.indices = counted.tape.deeds();
    counted.runner.cancel_jobs().await?;
    counted.end().await?;
    let mut trial = None;
    for skip in 0..figures.indices {
        for fault in [Fault::Io, Fault::NoSpace, Fault::Short] {
            if random.f64() >= share {
                continue;
            }
            let now = match trial.take() {
                Some(trial) => trial,
                None => Trial::new(place, case).await?,
            };
            let at = |problem: String| format!("{} at {skip}, {fault:?}: {problem}", case.command);
            let before = now.state().await.map_err(at)?;
            now.tape.fail(skip, fault);
            let (done, guests) = now.run(case).await;
            // A file that has failed to become durable says so from then on, since what was written is lost.
            let is_lost = matches!(now.tape.no_fault(), Some(Deed::Sync { .. }));
            match done {
                Ok(_) => {
                    figures.happened += 1;
                    if !is_lost {
                        let checked = now.check_guests(case.reverted, &guests);
                        checked.await.map_err(at)?;
                    }
                    now.runner.cancel_jobs().await.map_err(at)?;
                    match is_lost {
                        true => drop(now.runner.end().await),
                        false => now.end().await.map_err(at)?,
                    }
                }
                Err(error) => {
                    let at = |problem| at(format!("{problem}, behind: {}", error.desc));
                    figures.failed += 1;
                    if is_lost {
                        now.end_and_recover().await.map_err(at)?;
                        continue;
                    }
                    let after = now.state().await.map_err(at)?;
                    if let Some(difference) = difference(&before, &after) {
                        return Err(at(difference));
                    }
                    now.check_guests(0, &guests).await.map_err(at)?;
                    trial = Some(now);
                }
            }
        }
    }
    if let Some(trial) = trial {
        trial.end().await?;
    }
    Ok(figures)
}

#[test]
fn whatever_fails_once_a_command_has_happened_or_has_changed_nothing() {
    let _alone = without_children();
    let share = setting("QBLOCKD_FAULTS", 60) as f64 / 1000.0;
    let seed = setting("QBLOCKD_CRASH_SEED", 1);
    println!("QBLOCKD_CRASH_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let place = Place::new();
    let cases = [transactions(), single_commands(), creations()];
    for case in cases.into_iter().flatten() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        let tried = runtime.block_on(try_case(&place, &case, share, &mut random));
        match tried {
            Ok(figures) => println!("{}: {figures:?}", case.command),
            Err(problem) => panic!("QBLOCKD_CRASH_SEED={seed}: {problem}"),
        }
    }
}
