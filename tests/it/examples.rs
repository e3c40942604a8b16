//! Every example in `schema/`, in the JSON files and in `qmp-commands.hx`, run against a daemon.
//!
//! An example is a session of its own. What it takes for granted (drives, nodes, a server, an export) is made before it,
//! by [`Scene`]. Replies and events are compared member by member: values that differ from run to run by their kind, all
//! others exactly. The replies about the protocol itself are long, so their examples show some entries of them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use block::driver::HeaderSwitch;
use block::io::IoContext;
use qapi_gen::ir::ExampleLine;
use qapi_gen::load::Disk;
use qapi_gen::{Loaded, Options, load_hx, load_schema};
use qblockd::journal::{ActionKind, Identity, Journal, JournaledAction, StagedImage};
use serde_json::{Value, json};

use super::guest::{Guest, Request};
use super::harness::{Daemon, Program, Qmp};

const GIBIBYTE: u64 = 1 << 30;

/// Values that differ from run to run.
const VARYING: &[&str] = &[
    "actual-size",
    "date-sec",
    "date-nsec",
    "vm-clock-sec",
    "vm-clock-nsec",
    "seconds",
    "microseconds",
    "rd_total_time_ns",
    "wr_total_time_ns",
    "flush_total_time_ns",
    "idle_time_ns",
    "started-at",
    "rate",
];

/// Members that examples leave out for their length.
const LEFT_OUT: &[&str] = &["parent"];

/// Documented for clients that know it, and sent by no job that there is.
const NEVER_SENT: &[&str] = &["BLOCK_JOB_READY"];

/// A message of an example and where it stands.
struct Message {
    sent: bool,
    text: String,
    place: String,
}

impl Message {
    fn value(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{}: {error}", self.place))
    }

    /// The command that is sent, or the event that is received.
    fn subject(&self) -> String {
        let value = self.value();
        let name = value.get("execute").or_else(|| value.get("event"));
        let name = name.and_then(Value::as_str);
        name.unwrap_or_else(|| {
            panic!(
                "{}: an example begins with a command or an event",
                self.place
            )
        })
        .to_owned()
    }
}

/// The sessions of one kind of document.
fn sessions(of: &[(String, &[ExampleLine])]) -> Vec<Vec<Message>> {
    let message = |path: &str, line: &ExampleLine| {
        let (sent, text, number) = match line {
            ExampleLine::Sent(text, number) => (true, text, number),
            ExampleLine::Received(text, number) => (false, text, number),
            ExampleLine::Prose(_) => return None,
        };
        Some(Message {
            sent,
            text: text.clone(),
            place: format!("{path}:{number}"),
        })
    };
    of.iter()
        .map(|(path, lines)| {
            lines
                .iter()
                .filter_map(|line| message(path, line))
                .collect()
        })
        .collect()
}

/// The sessions of the schema, and those of the command table.
fn all() -> (Vec<Vec<Message>>, Vec<Vec<Message>>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema");
    let loaded = load_schema(&folder.join("qapi-schema.json"), &Disk, &Options::default());
    let mut loaded = loaded.unwrap_or_else(|failure| panic!("{}", failure.render()));
    let table = load_hx(&folder.join("qmp-commands.hx"), &Disk, &mut loaded);
    let table = table.unwrap_or_else(|failure| panic!("{}", failure.render()));
    let Loaded {
        schema, sources, ..
    } = &loaded;
    let path = |file| sources.file(file).path.clone();
    let in_schema: Vec<_> = schema
        .examples()
        .into_iter()
        .map(|(file, example)| (path(file), example.lines.as_slice()))
        .collect();
    // A document that is not about a command explains the arrows.
    let about_commands = table
        .documents
        .iter()
        .filter(|document| table.entry(&document.title.text).is_some());
    let in_table: Vec<_> = about_commands
        .map(|document| (path(table.file), document.lines.as_slice()))
        .collect();
    (sessions(&in_schema), sessions(&in_table))
}

/// What is there before an example runs.
#[derive(Default)]
struct Scene {
    arguments: Vec<String>,
    before: Vec<(&'static str, Value)>,
    /// The image leads guest data onto its own refcounts.
    damaged: bool,
    /// The name of an export whose client writes; and reads and flushes, if the image is not damaged.
    guest: Option<&'static str>,
    /// A transaction over two images was cut off between them.
    cut_off: bool,
    /// The image leads the first cluster of the disk nowhere.
    unreadable: bool,
    /// The state that a job is in, and does nothing more by itself.
    job: Option<(&'static str, &'static str)>,
}

impl Scene {
    /// The one that examples about a command or an event take for granted.
    fn of(subject: &str) -> Scene {
        let empty = Scene::default;
        let exported = || empty().node().server().export("disk0");
        match subject {
            "query-block"
            | "blockdev-snapshot-delete-internal-sync"
            | "x-blockdev-snapshot-revert" => empty().drive(0, "disk.qcow2").snapshot("monday"),
            "blockdev-snapshot-internal-sync" | "blockdev-snapshot-sync" | "block_resize" => {
                empty().drive(0, "disk.qcow2")
            }
            "blockdev-snapshot" => {
                let file = json!({"driver": "file", "filename": "disk.qcow2"});
                let overlay = json!({"driver": "qcow2", "node-name": "overlay", "backing": null, "file": file});
                empty().drive(0, "other.qcow2").run("blockdev-add", overlay)
            }
            "transaction" => {
                let drives = empty().drive(0, "disk.qcow2").drive(1, "other.qcow2");
                drives.snapshot("thursday")
            }
            "query-named-block-nodes" => empty().raw_file(),
            "blockdev-add" => {
                let drive = empty().drive(0, "other.qcow2").snapshot("monday");
                drive.raw_file()
            }
            "blockdev-del" | "blockdev-reopen" => empty().node(),
            "change-backing-file" => empty().overlay(),
            "nbd-server-stop" => empty().server(),
            "nbd-server-add" => empty().drive(0, "disk.qcow2").server(),
            "nbd-server-remove" => empty()
                .drive(0, "disk.qcow2")
                .server()
                .run("nbd-server-add", json!({"device": "ide-hd0"})),
            "block-export-add" => empty().node().server(),
            "block-export-del" | "query-block-exports" | "x-debug-query-block-graph" => exported(),
            "BLOCK_EXPORT_DELETED" => exported().run("block-export-del", json!({"id": "export0"})),
            "BLOCK_IMAGE_CORRUPTED" => Scene {
                damaged: true,
                guest: Some("disk0"),
                ..exported()
            },
            "X_TRANSACTION_RECOVERED" => Scene {
                cut_off: true,
                arguments: ["--state-dir", "state"].map(str::to_owned).to_vec(),
                ..empty()
            },
            "drive-backup" => empty().drive(0, "disk.qcow2"),
            "blockdev-backup" => empty().drive(0, "other.qcow2").node(),
            "job-resume" | "block-job-resume" => {
                let waiting = empty().backup("paused", json!({"sync": "none"}));
                let paused = waiting.run("job-pause", json!({"id": "paused"}));
                paused.job("paused", "paused")
            }
            "job-finalize" | "block-job-finalize" => empty()
                .backup("pending", json!({"sync": "full", "auto-finalize": false}))
                .job("pending", "pending"),
            "job-dismiss" | "block-job-dismiss" => empty()
                .backup("done", json!({"sync": "full", "auto-dismiss": false}))
                .job("done", "concluded"),
            "JOB_STATUS_CHANGE" => empty().backup("ide-hd0", json!({"sync": "none"})),
            "BLOCK_JOB_COMPLETED" => empty().backup("ide-hd0", json!({"sync": "full"})),
            "BLOCK_JOB_CANCELLED" => empty()
                .backup("ide-hd0", json!({"sync": "none"}))
                .run("block-job-cancel", json!({"device": "ide-hd0"})),
            "BLOCK_JOB_ERROR" => Scene {
                unreadable: true,
                ..empty().backup("ide-hd0", json!({"sync": "full"}))
            },
            "BLOCK_JOB_PENDING" => {
                let manual = json!({"sync": "full", "auto-finalize": false});
                empty().backup("ide-hd0", manual)
            }
            name if name.contains("job-") || name.ends_with("-jobs") => empty()
                .backup("ide-hd0", json!({"sync": "none"}))
                .job("ide-hd0", "running"),
            "SHUTDOWN" => empty().run("quit", json!({})),
            "STOP" => empty().run("stop", json!({})),
            "RESUME" => empty().run("stop", json!({})).run("cont", json!({})),
            "BLOCK_IO_ERROR" => Scene {
                damaged: true,
                guest: Some("ide-hd0"),
                ..empty()
                    .drive(0, "disk.qcow2,werror=stop")
                    .server()
                    .export("ide-hd0")
            },
            "query-blockstats" => Scene {
                guest: Some("ide-hd0"),
                ..empty().drive(0, "disk.qcow2").server().export("ide-hd0")
            },
            _ => empty(),
        }
    }

    fn drive(mut self, number: usize, file: &str) -> Scene {
        let drive = format!("id=ide-hd{number},file={file},size=1G");
        self.arguments.extend(["--drive".to_owned(), drive]);
        self
    }

    /// A snapshot of the first drive.
    fn snapshot(self, name: &str) -> Scene {
        let snapshot = json!({"device": "ide-hd0", "name": name});
        self.run("blockdev-snapshot-internal-sync", snapshot)
    }

    /// A drive, and a job that copies it.
    fn backup(self, id: &str, arguments: Value) -> Scene {
        let mut all = json!({"device": "ide-hd0", "job-id": id, "target": "backup.qcow2"});
        for (key, value) in arguments.as_object().unwrap() {
            all[key] = value.clone();
        }
        self.drive(0, "disk.qcow2").run("drive-backup", all)
    }

    fn job(mut self, id: &'static str, status: &'static str) -> Scene {
        self.job = Some((id, status));
        self
    }

    fn raw_file(self) -> Scene {
        let file = json!({"driver": "file", "node-name": "disk-file", "filename": "disk.raw"});
        self.run("blockdev-add", file)
    }

    fn node(self) -> Scene {
        let file = json!({"driver": "file", "filename": "disk.qcow2"});
        let node = json!({"driver": "qcow2", "node-name": "disk0", "file": file});
        self.run("blockdev-add", node)
    }

    /// The same on a backing.
    fn overlay(self) -> Scene {
        let file = |name: &str| json!({"driver": "file", "filename": name});
        let node = json!({"driver": "qcow2", "node-name": "disk0", "file": file("disk.qcow2"),
                          "backing": {"driver": "raw", "file": file("disk.raw")}});
        self.run("blockdev-add", node)
    }

    fn server(self) -> Scene {
        let address = json!({"type": "unix", "data": {"path": "nbd.sock"}});
        self.run("nbd-server-start", json!({"addr": address}))
    }

    fn export(self, disk: &str) -> Scene {
        let export = json!({"type": "nbd", "id": "export0", "node-name": disk, "writable": true});
        self.run("block-export-add", export)
    }

    fn run(mut self, command: &'static str, arguments: Value) -> Scene {
        self.before.push((command, arguments));
        self
    }
}

/// Runs a session, and answers what does not fit.
fn run(session: &[Message], image: &Path) -> Result<(), String> {
    let subject = session[0].subject();
    let scene = Scene::of(&subject);
    let folder = tempfile::tempdir().unwrap();
    fs::copy(image, folder.path().join("disk.qcow2")).unwrap();
    let raw = fs::File::create(folder.path().join("disk.raw")).unwrap();
    raw.set_len(GIBIBYTE).unwrap();
    if scene.damaged {
        damage(&folder.path().join("disk.qcow2"), 0x20000);
    }
    if scene.unreadable {
        damage(&folder.path().join("disk.qcow2"), 0x50200);
    }
    if scene.cut_off {
        cut_off(folder.path(), image);
    }
    let arguments: Vec<&str> = scene.arguments.iter().map(String::as_str).collect();
    let mut daemon = Daemon::start_in(Program::Qblockd, folder.path(), &arguments);
    let mut qmp = match subject.as_str() {
        "qmp_capabilities" => daemon.raw_qmp(),
        _ => daemon.qmp(),
    };
    for (command, arguments) in scene.before {
        qmp.ok(command, arguments);
    }
    if let Some((id, status)) = scene.job {
        wait_for_job(&mut qmp, id, status);
    }
    // It stays until the end: the machine may have stopped for its request.
    let _guest = scene.guest.map(|disk| {
        let mut guest = Guest::connect(&folder.path().join("nbd.sock"), disk).unwrap();
        let data = vec![1; 65536];
        guest
            .submit(0, &Request::Write { offset: 0, data })
            .unwrap();
        if !scene.damaged {
            assert_eq!(guest.reply().unwrap(), (0, 0));
            guest.read(0, 4096).unwrap();
            assert_eq!(guest.run(&Request::Flush).unwrap(), 0);
        }
        guest
    });
    converse(session, &mut qmp)
}

/// Waits until a job has come to rest in a state.
fn wait_for_job(qmp: &mut Qmp, id: &str, status: &str) {
    loop {
        let jobs = qmp.ok("query-block-jobs", json!({}));
        let mut jobs = jobs.as_array().unwrap().iter();
        let job = jobs.find(|job| job["device"] == id);
        let job = job.unwrap_or_else(|| panic!("no job {id}"));
        if job["status"] == status && job["busy"] == false {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Gives a new image an L2 table, in the first cluster behind its own, that leads the first cluster of the disk to this
/// offset: that of the image's refcounts, or one where no cluster begins.
fn damage(image: &Path, offset: u64) {
    const COPIED: u64 = 1 << 63;
    let file = fs::OpenOptions::new().write(true).open(image).unwrap();
    let put = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).unwrap();
    put(0x30000, &(COPIED | 0x40000).to_be_bytes());
    put(0x40000, &[0; 0x10000]);
    put(0x40000, &(COPIED | offset).to_be_bytes());
    put(0x20008, &1_u16.to_be_bytes());
}

/// Leaves the journal of a transaction that takes snapshots of two images, of which one has been switched, and puts an overlay on a third.
fn cut_off(folder: &Path, image: &Path) {
    let images = ["a.qcow2", "b.qcow2"].map(|name| folder.join(name));
    let staged = images.each_ref().map(|path| {
        fs::copy(image, path).unwrap();
        StagedImage {
            path: path.clone(),
            file: Identity::of(&fs::metadata(path).unwrap()),
            offset: 0,
        }
    });
    let sector = fs::read(image).unwrap()[..512].to_vec();
    let mut other = sector.clone();
    // Lazy refcounts: a bit that changes nothing else.
    other[87] ^= 1;
    let switch = |before: &[u8], after: &[u8]| HeaderSwitch {
        before: before.to_vec(),
        after: after.to_vec(),
    };
    let switches = vec![(0, switch(&other, &sector)), (1, switch(&sector, &other))];
    let snapshot = |disk: usize, path: &PathBuf| JournaledAction {
        image: Some(path.clone()),
        snapshot: Some("monday".to_owned()),
        ..JournaledAction::new(ActionKind::Create, format!("ide-hd{disk}"))
    };
    let mut actions = vec![snapshot(0, &images[0]), snapshot(1, &images[1])];
    let overlay = folder.join("c2.qcow2");
    actions.push(JournaledAction {
        image: Some(folder.join("c.qcow2")),
        filename: Some(overlay.clone()),
        ..JournaledAction::new(ActionKind::OverlayFile, "ide-hd2".to_owned())
    });
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let journal = Journal::open(&folder.join("state"), &IoContext::new()).unwrap();
        let mut entry = journal.begin(actions).await.unwrap();
        entry
            .creates(overlay.clone(), folder.join("beside"), None)
            .await
            .unwrap();
        fs::copy(image, &overlay).unwrap();
        entry.created(overlay).await.unwrap();
        entry.stages(staged.to_vec()).await.unwrap();
        entry.commit(switches).await.unwrap();
    });
}

fn converse(session: &[Message], qmp: &mut Qmp) -> Result<(), String> {
    let mut command = String::new();
    let mut answered = true;
    for message in session {
        if message.sent {
            command = message.subject();
            qmp.send(&message.text);
            assert!(answered, "{}: no reply to the one before", message.place);
            answered = false;
            continue;
        }
        let expected = message.value();
        let actual = match expected["event"].as_str() {
            Some(event) => qmp.event(event),
            None => {
                answered = true;
                qmp.reply()
            }
        };
        let excerpt = ["query-commands", "query-qmp-schema"].contains(&command.as_str());
        let differences = match excerpt {
            true => missing_entries(&expected["return"], &actual["return"]),
            false => compare("", &expected, &actual),
        };
        if !differences.is_empty() {
            let differences = differences.join("\n  ");
            return Err(format!("{}:\n  {differences}", message.place));
        }
    }
    match answered {
        true => Ok(()),
        false => Err(format!("{}: no reply in the end", session[0].place)),
    }
}

/// Where two values differ other than they may.
fn compare(path: &str, expected: &Value, actual: &Value) -> Vec<String> {
    let key = path.rsplit('.').next().unwrap_or(path);
    let same = match (expected, actual) {
        (Value::Object(expected), Value::Object(actual)) => {
            let keys: BTreeSet<&String> = expected.keys().chain(actual.keys()).collect();
            let member = |key: &String| {
                let path = format!("{path}.{key}");
                match (expected.get(key), actual.get(key)) {
                    (Some(expected), Some(actual)) => compare(&path, expected, actual),
                    (None, Some(_)) if LEFT_OUT.contains(&key.as_str()) => Vec::new(),
                    (Some(_), None) => vec![format!("{path} is not in the reply")],
                    (None, actual) => vec![format!("{path} is not in the example: {actual:?}")],
                }
            };
            return keys.into_iter().flat_map(member).collect();
        }
        (Value::Array(expected), Value::Array(actual)) if expected.len() == actual.len() => {
            let pairs = expected.iter().zip(actual).enumerate();
            return pairs
                .flat_map(|(at, (expected, actual))| {
                    compare(&format!("{path}[{at}]"), expected, actual)
                })
                .collect();
        }
        (Value::Number(_), Value::Number(actual)) if VARYING.contains(&key) => actual.is_u64(),
        (Value::String(_), Value::String(actual)) if key == "uuid" => actual.len() == 36,
        (Value::String(expected), Value::String(actual)) if expected.starts_with("/images/") => {
            Path::new(expected).file_name() == Path::new(actual).file_name()
        }
        // Made-up names of nodes.
        (Value::String(expected), Value::String(actual)) if expected.starts_with("#block") => {
            actual.starts_with("#block")
        }
        // Names of types, which are numbers and change with the schema.
        (Value::String(expected), Value::String(actual)) if is_number(expected) => {
            is_number(actual)
        }
        _ => expected == actual,
    };
    match same {
        true => Vec::new(),
        false => vec![format!(
            "{path}: {expected} in the example, {actual} in the reply"
        )],
    }
}

fn is_number(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit()) && !text.is_empty()
}

/// Entries of an example that are not in a list.
fn missing_entries(expected: &Value, actual: &Value) -> Vec<String> {
    let entries = |list: &Value| list.as_array().expect("a list").clone();
    let actual = entries(actual);
    let is_missing = |entry: &Value| {
        !actual
            .iter()
            .any(|other| compare("", entry, other).is_empty())
    };
    let missing = entries(expected).into_iter().filter(is_missing);
    missing
        .map(|entry| format!("no such entry: {entry}"))
        .collect()
}

/// An image of a gibibyte, made by the daemon.
fn make_image(folder: &Path) {
    let arguments = ["--drive", "id=d,file=disk.qcow2,size=1G"];
    let mut daemon = Daemon::start_in(Program::Qblockd, folder, &arguments);
    drop(daemon.qmp());
    assert!(daemon.terminate().success());
}

#[test]
fn examples_are_what_the_daemon_says() {
    let folder = tempfile::tempdir().unwrap();
    make_image(folder.path());
    let image = folder.path().join("disk.qcow2");
    let (schema, table) = all();
    let complaints: Vec<String> = schema
        .iter()
        .chain(&table)
        .filter(|session| !NEVER_SENT.contains(&session[0].subject().as_str()))
        .filter_map(|session| run(session, &image).err())
        .collect();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn every_command_has_an_example_in_both_places_and_every_event_one() {
    let mut daemon = Daemon::start(Program::Qblockd, &[]);
    let schema_reply = daemon.qmp().ok("query-qmp-schema", json!({}));
    let names = |kind: &str| -> BTreeSet<String> {
        let entries = schema_reply.as_array().unwrap().iter();
        entries
            .filter(|entry| entry["meta-type"] == kind)
            .map(|entry| entry["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let (schema, table) = all();
    let shown = |sessions: &[Vec<Message>]| -> BTreeSet<String> {
        let messages = sessions.iter().flatten();
        messages
            .filter(|message| message.sent || message.text.contains("\"event\""))
            .map(Message::subject)
            .collect()
    };
    assert_eq!(shown(&table), names("command"));
    let all_names: BTreeSet<String> = names("command").union(&names("event")).cloned().collect();
    assert_eq!(shown(&schema), all_names);
}

/// Counts the arrows without the parser, so that none is lost in it.
#[test]
fn no_example_is_overlooked() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema");
    let mut arrows = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let text = fs::read_to_string(entry.unwrap().path()).unwrap();
        let is_arrow = |line: &&str| {
            let line = line.trim_start_matches(['#', ' ']);
            ["->", "<-"].iter().any(|arrow| {
                line.strip_prefix(arrow)
                    .is_some_and(|rest| rest.trim_start().starts_with('{'))
            })
        };
        arrows += text.lines().filter(is_arrow).count();
    }
    let (schema, table) = all();
    let messages: usize = schema.iter().chain(&table).map(Vec::len).sum();
    assert_eq!(messages, arrows);
    assert!(
        schema
            .iter()
            .chain(&table)
            .all(|session| !session.is_empty())
    );
}
