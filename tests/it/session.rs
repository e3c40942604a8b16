//! Sessions as data: files of commands, run on a daemon and written down with what it answers.
//!
//! A line is a message to send, or begins with one of
//! * `#`: a comment
//! * `@`: arguments of the daemon
//! * `~`: a message to send again for as long as the answer is that something is in use: a client that has ended
//!   is noticed a moment later
//! * `>`: a request of a guest, whose reply is not waited for: `EXPORT write|flush OFFSET LENGTH`, at the socket `nbd.sock`
//! * `<`: an export, whose next reply is waited for
//! * `?`: the name of an event that is waited for, and what its data must have: `NAME [MEMBER=VALUE]...`
//! * `$`: a program to run in the daemon's folder; before the first message, before the daemon is started

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::guest::{Guest, Request};
use super::harness::{Daemon, PATIENCE, Program, Qmp, tool};

/// A message and what came back until the reply was there.
#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) sent: String,
    pub(crate) received: Vec<String>,
}

/// The text of a session.
pub(crate) fn read(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/sessions");
    std::fs::read_to_string(folder.join(format!("{name}.qmp"))).unwrap()
}

/// Runs a session from start to end.
pub(crate) fn run(program: Program, session: &str) -> Vec<Exchange> {
    let folder = tempfile::tempdir().unwrap();
    let mut arguments: Vec<String> = Vec::new();
    let mut running: Option<(Daemon, Qmp)> = None;
    let mut negotiated = false;
    let mut exchanges = Vec::new();
    let mut names = Names {
        folder: format!("{}/", folder.path().display()),
        ..Names::default()
    };
    let mut guests = Guests::default();
    let mut lines = session
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .peekable();
    while let Some(line) = lines.next() {
        // For whoever looks for what has failed.
        println!("{program:?}: {line}");
        match (line.split_at(1), &mut running) {
            (("@", words), None) => arguments.extend(words.split_whitespace().map(str::to_owned)),
            (("@", _), Some(_)) => panic!("arguments after the start: {line}"),
            (("$", command), _) => {
                tool(folder.path(), command);
            }
            ((">" | "<" | "?", _), Some((_, qmp))) => {
                let received = guests.line(folder.path(), line, qmp);
                let received = received.map(|message| names.normalise(message));
                exchanges.push(Exchange {
                    sent: line.to_owned(),
                    received: received.collect(),
                });
            }
            (_, slot) => {
                let (_, qmp) = slot.get_or_insert_with(|| {
                    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
                    let mut daemon = Daemon::start_in(program, folder.path(), &arguments);
                    let qmp = daemon.raw_qmp();
                    (daemon, qmp)
                });
                // What queries show of an image changes until it is settled; that of the peer always is.
                if program == Program::Qblockd && line.contains("'query-") && negotiated {
                    qmp.settled();
                }
                negotiated |= line.contains("'qmp_capabilities'");
                let (line, reply) = match line.strip_prefix('~') {
                    Some(line) => (line, when_free(qmp, line)),
                    None => (line, qmp.exchange(line)),
                };
                let ends = line.contains("'quit'") && reply.get("return").is_some();
                // Events that the next line waits for are its.
                let awaited = lines.peek().is_some_and(|next| next.starts_with('?'));
                let events = match awaited {
                    true => Vec::new(),
                    false => std::mem::take(&mut qmp.events),
                };
                let mut received: Vec<Value> = events;
                if ends {
                    received.extend(qmp.rest());
                    // Exports end in no order among each other, and with the reply.
                    received.sort_by_key(|event| {
                        let id = event["data"]["id"].as_str().map(str::to_owned);
                        (id.is_none(), id)
                    });
                    received.insert(0, reply);
                } else {
                    received.push(reply);
                }
                exchanges.push(Exchange {
                    sent: line.to_owned(),
                    received: received
                        .into_iter()
                        .map(|message| names.normalise(message))
                        .collect(),
                });
                if ends && let Some((daemon, _)) = slot.take() {
                    assert!(daemon.wait().success());
                }
            }
        }
    }
    if let Some((daemon, qmp)) = running {
        drop(qmp);
        assert!(daemon.terminate().success());
    }
    exchanges
}

/// Connections to exports.
#[derive(Default)]
struct Guests(HashMap<String, Guest>);

impl Guests {
    /// What a line about guests and events brings.
    fn line(
        &mut self,
        folder: &Path,
        line: &str,
        qmp: &mut Qmp,
    ) -> impl Iterator<Item = Value> + use<> {
        let (kind, rest) = line.split_at(1);
        let mut words = rest.split_whitespace();
        let name = words.next().unwrap();
        if kind == "?" {
            let members: Vec<(&str, &str)> =
                words.map(|word| word.split_once('=').unwrap()).collect();
            let mut events = qmp.events_until(|event| {
                let has = |(key, value): &(&str, &str)| event["data"][*key] == *value;
                event["event"] == name && members.iter().all(has)
            });
            // What a job ignores fails again and again.
            let is_ignored = |event: &Value| event["data"]["action"] == "ignore";
            events.retain(|event| name == event["event"] || !is_ignored(event));
            events.dedup_by(|next, before| is_ignored(next) && is_ignored(before));
            // Jobs go on in no order among each other.
            events.sort_by_key(|event| job(event).map(str::to_owned));
            return events.into_iter();
        }
        let guest = self
            .0
            .entry(name.to_owned())
            .or_insert_with(|| Guest::connect(&folder.join("nbd.sock"), name).unwrap());
        if kind == "<" {
            let (_, error) = guest.reply().unwrap();
            return vec![json!({"guest": name, "error": error})].into_iter();
        }
        let operation = words.next().unwrap();
        let mut number = || words.next().unwrap().parse::<u64>().unwrap();
        let request = match operation {
            "write" => Request::Write {
                offset: number(),
                data: vec![1; number() as usize],
            },
            "flush" => Request::Flush,
            _ => panic!("{line}"),
        };
        guest.submit(0, &request).unwrap();
        Vec::new().into_iter()
    }
}

/// The job that an event tells of.
pub(crate) fn job(event: &Value) -> Option<&str> {
    let name = event["event"].as_str()?;
    let data = &event["data"];
    match name.starts_with("JOB_") || name.starts_with("BLOCK_JOB_") {
        true => data["id"].as_str().or(data["device"].as_str()),
        false => None,
    }
}

/// The reply to a message once it is not that something is still in use.
fn when_free(qmp: &mut Qmp, line: &str) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let reply = qmp.exchange(line);
        let in_use = reply["error"]["desc"]
            .as_str()
            .is_some_and(|desc| desc.contains("in use"));
        if !in_use || Instant::now() > deadline {
            return reply;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Replies without what differs from run to run.
pub(crate) fn normalised(replies: Vec<Value>) -> Vec<String> {
    let mut names = Names::default();
    let normalise = |reply| names.normalise(reply);
    replies.into_iter().map(normalise).collect()
}

/// The exchanges as a transcript.
pub(crate) fn transcript(exchanges: &[Exchange]) -> String {
    let mut text = String::new();
    for Exchange { sent, received } in exchanges {
        text.push_str(&format!("-> {sent}\n"));
        for message in received {
            text.push_str(&format!("<- {message}\n"));
        }
    }
    text
}

/// What is done of a job, and what there is to do.
const PROGRESS: [[&str; 2]; 2] = [["offset", "len"], ["current-progress", "total-progress"]];

/// What texts have of a run: made-up node names, which are numbered as they appear, and the folder.
#[derive(Default)]
struct Names {
    nodes: Vec<String>,
    folder: String,
}

impl Names {
    /// A message without what differs from run to run, its members sorted.
    fn normalise(&mut self, message: Value) -> String {
        self.value("", message).to_string()
    }

    fn value(&mut self, key: &str, value: Value) -> Value {
        match (key, value) {
            ("date-sec" | "date-nsec" | "vm-clock-sec" | "vm-clock-nsec", Value::Number(_)) => {
                "TIME".into()
            }
            ("actual-size", Value::Number(_)) => "BYTES".into(),
            // Most counters are zero.
            ("stats", Value::Object(mut counters)) => {
                counters.retain(|_, count| *count != json!(0));
                self.object(counters)
            }
            ("idle_time_ns" | "started-at" | "time-left", Value::Number(_)) => "TIME".into(),
            ("rate", Value::Number(_)) => "RATE".into(),
            (key, Value::Number(_)) if key.ends_with("_total_time_ns") => "TIME".into(),
            ("package", Value::String(_)) => "PACKAGE".into(),
            (_, Value::String(text)) if text.starts_with("#block") => self.name(text).into(),
            (_, Value::String(text)) if !self.folder.is_empty() => {
                text.replace(&self.folder, "/FOLDER/").into()
            }
            (_, Value::Array(values)) => {
                let values = values.into_iter().map(|value| self.value("", value));
                Value::Array(values.collect())
            }
            (_, Value::Object(object)) => self.object(object),
            (_, value) => value,
        }
    }

    fn object(&mut self, object: Map<String, Value>) -> Value {
        let is_under_way = PROGRESS.iter().any(|[done, all]| {
            let (done, all) = (object.get(*done), object.get(*all));
            done.is_some() && all.is_some() && done != all
        });
        let is_host_file = object.get("format").is_some_and(|format| format == "file");
        let mut members: Vec<(String, Value)> = object.into_iter().collect();
        members.retain(|(key, _)| key != "timestamp");
        members.sort_by(|(one, _), (other, _)| one.cmp(other));
        let normalised = members.into_iter().map(|(key, value)| {
            // How a format lays its file out is its own affair.
            if is_host_file && key == "virtual-size" {
                return (key, "BYTES".into());
            }
            // How far a job is depends on the moment.
            if is_under_way && PROGRESS.iter().any(|[done, _]| key == *done) {
                return (key, "PART".into());
            }
            let value = self.value(&key, value);
            (key, value)
        });
        Value::Object(normalised.collect())
    }

    fn name(&mut self, text: String) -> String {
        let known = self.nodes.iter().position(|name| *name == text);
        let at = known.unwrap_or_else(|| {
            self.nodes.push(text);
            self.nodes.len() - 1
        });
        format!("#block{at}")
    }
}
