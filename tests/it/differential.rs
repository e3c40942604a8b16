//! The same sessions on qemu-storage-daemon and here: what differs is in `differences.json`, and in
//! `docs/differences.md` with its reason.
//!
//! qemu-storage-daemon has no drives. Sessions with drives are compared with what QEMU's emulator 10.0.2 has answered: that is in
//! `snapshots/qemu__*`, and is made anew by `QBLOCKD_TEST_QEMU=qemu-system-x86_64 INSTA_UPDATE=always cargo test --test it differential`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::Value;

use super::harness::{self, Program, run_to_end};
use super::qmp::golden;
use super::session::{self, Exchange};

/// A text of qemu-storage-daemon that is another here.
struct Difference {
    id: String,
    theirs: String,
    ours: String,
}

fn differences() -> Vec<Difference> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/differences.json");
    let list: Vec<Value> = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let text = |entry: &Value, key: &str| entry[key].as_str().unwrap().to_owned();
    list.iter()
        .map(|entry| Difference {
            id: text(entry, "id"),
            theirs: text(entry, "theirs"),
            ours: text(entry, "ours"),
        })
        .collect()
}

/// Compares one exchange; gives back the differences that make the two equal.
fn explain(
    theirs: &Exchange,
    ours: &Exchange,
    known: &[Difference],
) -> Result<BTreeSet<usize>, String> {
    let mut used = BTreeSet::new();
    let mut expected = comparable(&theirs.received);
    let actual = comparable(&ours.received);
    for (at, difference) in known.iter().enumerate() {
        // Only where the two differ, and where we say what the difference says: a text that both have stays.
        if expected != actual
            && expected.contains(&difference.theirs)
            && actual.contains(&difference.ours)
        {
            let replaced = expected.replace(&difference.theirs, &difference.ours);
            let lines: Vec<String> = replaced.lines().map(str::to_owned).collect();
            expected = comparable(&lines);
            used.insert(at);
        }
    }
    if expected == actual {
        return Ok(used);
    }
    Err(format!(
        "-> {}\nqemu-storage-daemon, as far as known:\n{expected}\nqblockd:\n{actual}\n",
        ours.sent
    ))
}

/// What was received, with lists of nodes in an order that does not depend on when their layers were opened.
fn comparable(received: &[String]) -> String {
    let messages = received
        .iter()
        .map(|message| serde_json::from_str(message).unwrap())
        .filter(|message: &Value| {
            // The reference pauses all jobs of a disk for a moment whenever the graph changes, and tells of it.
            !matches!(
                message["data"]["status"].as_str(),
                Some("paused" | "running")
            )
        });
    let sorted = messages.map(|mut message: Value| {
        if let Some(list) = message.get_mut("return").and_then(Value::as_array_mut) {
            for entry in list.iter_mut() {
                without_ours(entry);
                if entry["node-name"]
                    .as_str()
                    .is_some_and(|name| name.starts_with('#'))
                {
                    entry["node-name"] = "#block".into();
                }
            }
            list.sort_by_key(Value::to_string);
        }
        if let Some(graph) = message
            .get_mut("return")
            .filter(|it| it["nodes"][0]["id"].is_u64())
        {
            *graph = by_name(graph);
        }
        message.to_string()
    });
    sorted.collect::<Vec<_>>().join("\n")
}

/// Takes out members of jobs that are ours; what says which device a guest sees, since the emulator has no guest; and counters of
/// nodes below drives, where the reference has zeroes.
fn without_ours(entry: &mut Value) {
    let Some(members) = entry.as_object_mut() else {
        return;
    };
    members.retain(|key, _| !matches!(key.as_str(), "started-at" | "rate" | "time-left"));
    let is_drive = members.contains_key("device") && !members.contains_key("auto-dismiss");
    if is_drive {
        members.retain(|key, _| !matches!(key.as_str(), "qdev" | "io-status" | "removable"));
        for below in ["parent", "backing"] {
            if let Some(below) = members.get_mut(below) {
                below["stats"] = Value::Null;
                without_ours(below);
            }
        }
    }
}

/// A block graph whose lines have names at their ends, in an order that does not depend on numbers.
fn by_name(graph: &Value) -> Value {
    let list = |key: &str| graph[key].as_array().unwrap().clone();
    let mut names = BTreeMap::new();
    let mut points = Vec::new();
    for point in list("nodes") {
        let name = point["name"].as_str().unwrap();
        let name = if name.starts_with('#') {
            "#block"
        } else {
            name
        };
        let text = format!("{} {name}", point["type"].as_str().unwrap());
        names.insert(point["id"].as_u64().unwrap(), text.clone());
        points.push(text);
    }
    let mut lines = list("edges");
    for line in &mut lines {
        for end in ["parent", "child"] {
            line[end] = names[&line[end].as_u64().unwrap()].as_str().into();
        }
    }
    points.sort();
    lines.sort_by_key(Value::to_string);
    serde_json::json!({"nodes": points, "edges": lines})
}

/// Sessions that qemu-storage-daemon can follow.
const SESSIONS: &[&str] = &[
    "session",
    "external",
    "nodes",
    "graph",
    "reopen",
    "resize",
    "snapshots",
    "transactions",
    "exports",
    "corrupt",
    "options",
    "data-file",
    "csi-qsd",
    "blockstats",
    "backup",
    "backup-refusals",
    "job-verbs",
    "job-groups",
    "create-jobs",
    "job-errors",
    "libvirt",
];

/// Sessions with drives.
const DRIVE_SESSIONS: &[&str] = &["drive-backup", "drive-commands"];

/// What the emulator has answered to a session. If there is one, it is asked again.
fn recorded(name: &str) -> Vec<Exchange> {
    let file = format!("qemu__{name}");
    if harness::emulator().is_some() {
        let exchanges = session::run(Program::Qemu, &session::read(name));
        golden(&file, &exchanges);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("snapshots/{file}.snap"));
    let text = fs::read_to_string(path).unwrap();
    let mut exchanges: Vec<Exchange> = Vec::new();
    for line in text.lines() {
        if let Some(sent) = line.strip_prefix("-> ") {
            exchanges.push(Exchange {
                sent: sent.to_owned(),
                received: Vec::new(),
            });
        } else if let Some(received) = line.strip_prefix("<- ") {
            let last = exchanges.last_mut().unwrap();
            last.received.push(received.to_owned());
        }
    }
    exchanges
}

#[test]
fn sessions_get_the_same_answers_as_on_qemu_storage_daemon_and_from_qemu() {
    let Some(()) = harness::need(&["qemu-storage-daemon", "qemu-img", "qemu-io"]) else {
        return;
    };
    let known = differences();
    let mut used = BTreeSet::new();
    let mut unexplained = String::new();
    let on_daemon = |name| session::run(Program::QemuStorageDaemon, &session::read(name));
    let sessions = SESSIONS
        .iter()
        .map(|name| (*name, on_daemon(name)))
        .chain(DRIVE_SESSIONS.iter().map(|name| (*name, recorded(name))));
    for (name, theirs) in sessions {
        let session = session::read(name);
        let ours = session::run(Program::Qblockd, &session);
        assert_eq!(theirs.len(), ours.len());
        for (theirs, ours) in theirs.iter().zip(&ours) {
            match explain(theirs, ours, &known) {
                Ok(these) => used.extend(these),
                Err(text) => unexplained.push_str(&format!("[{name}] {text}\n")),
            }
        }
    }
    assert!(unexplained.is_empty(), "{unexplained}");
    let stale: Vec<&str> = (0..known.len())
        .filter(|at| !used.contains(at))
        .map(|at| known[at].theirs.as_str())
        .collect();
    assert!(stale.is_empty(), "no longer different: {stale:#?}");
}

#[test]
fn every_difference_is_documented_and_the_other_way_round() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/differences.md");
    let page = fs::read_to_string(path).unwrap();
    let documented: BTreeSet<&str> = page
        .lines()
        .filter_map(|line| line.strip_prefix("### ")?.split_once(": "))
        .map(|(id, _)| id)
        .collect();
    let known = differences();
    let listed: BTreeSet<&str> = known.iter().map(|each| each.id.as_str()).collect();
    assert_eq!(listed, documented);
}

/// Wrong command lines: the same sentence and the same exit code, but for the program's name.
#[test]
fn wrong_command_lines_get_the_same_messages_as_from_qemu_storage_daemon() {
    let Some(()) = harness::need(&["qemu-storage-daemon"]) else {
        return;
    };
    let cases: &[&[&str]] = &[
        &["--blockdev", "driver=bogus,node-name=x"],
        &["--blockdev", ""],
        &["--blockdev", "foo"],
        &["--blockdev", "driver=null-co"],
        &["--blockdev", "driver=null-co,node-name=a,size=1M"],
        &["--blockdev", "driver=null-co,node-name=a,size=abc"],
        &["--blockdev", "driver=null-co,node-name=a,read-zeroes=maybe"],
        &["--blockdev", "driver=null-co,node-name=a,read-zeroes"],
        &["--blockdev", "driver=null-co,node-name=a,bogus=1"],
        &["--blockdev", "driver=null-co,node-name=a,,b"],
        &["--blockdev", "driver=null-co,node-name=a,=3"],
        &["--blockdev", "driver=qcow2,node-name=a,x.0=3,x.2=4"],
        &["--blockdev", "driver=qcow2,node-name=a,file.driver=file"],
        &[
            "--blockdev",
            "driver=qcow2,node-name=a,file.driver=file,file.filename=nonexistent",
        ],
        &[
            "--blockdev",
            "driver=qcow2,node-name=a,file=1,file.driver=file",
        ],
        &[
            "--blockdev",
            r#"{"driver":"null-co","node-name":"a","size":"1"}"#,
        ],
        &["--blockdev", r#"{"driver":"null-co","node-name":"a""#],
        &["--blockdev", r#"{"driver":"null-co","node-name":"a"}x"#],
        &["--blockdev", "[1]"],
        &["--blockdev", "help"],
        &[
            "--blockdev",
            "driver=qcow2,node-name=a,file=f,cache-size=1M",
        ],
        &[
            "--blockdev",
            "driver=qcow2,node-name=a,file=f,overlap-check=bogus",
        ],
        &[
            "--blockdev",
            "driver=qcow2,node-name=a,file=f,overlap-check.bogus=on",
        ],
        &["--blockdev", "driver=file,node-name=a,filename=f,aio=bogus"],
        &[
            "--blockdev",
            "driver=host_device,node-name=a,filename=/etc/passwd,read-only=on",
        ],
        &["--bogus"],
        &["--blockdev"],
        &["extra"],
        &["-x"],
        &["--chardev", "bogus,id=a"],
        &["--chardev", "id=a"],
        &["--chardev", "socket"],
        &[
            "--chardev",
            "socket,id=a,path=/nonexistent/s,server=on,wait=off",
        ],
        &["--chardev", "socket,id=a,path=s,server=maybe"],
        &["--monitor", "x"],
        &["--monitor", "x,mode=bogus"],
        &["--monitor", "x,bogus=1"],
        &["--monitor", "mode=control"],
        &["--nbd-server", "addr.type=unix"],
        &["--nbd-server", "addr.type=unix,addr.path=/nonexistent/n"],
        &["--nbd-server", "addr.type=bogus"],
        &["--nbd-server", "addr.type=inet,addr.host=127.0.0.1"],
        &[
            "--nbd-server",
            "addr.type=inet,addr.host=127.0.0.1,addr.port=0,addr.ipv4=off,addr.ipv6=off",
        ],
        &[
            "--chardev",
            "socket,id=a,host=127.0.0.1,port=0,server=on,wait=off,ipv4=off,ipv6=off",
        ],
        &[
            "--chardev",
            "socket,id=a,path=s,server=on,wait=off,reconnect=1",
        ],
        &[
            "--nbd-server",
            "addr.type=inet,addr.host=127.0.0.1,addr.port=x",
        ],
        &[
            "--nbd-server",
            "addr.type=unix,addr.path=n,max-connections=x",
        ],
        &[
            "--nbd-server",
            "addr.type=unix,addr.path=n",
            "--nbd-server",
            "addr.type=unix,addr.path=n2",
        ],
        &["--export", "type=nbd,id=e,node-name=x"],
        &["--export", "type=nbd,id=e"],
        &["--export", "type=bogus,id=e"],
        &[
            "--blockdev",
            "null-co,node-name=x",
            "--export",
            "nbd,id=e,node-name=x",
        ],
        &[
            "--blockdev",
            "null-co,node-name=x",
            "--nbd-server",
            "addr.type=unix,addr.path=n",
            "--export",
            "nbd,id=e,node-name=x",
            "--export",
            "nbd,id=f,node-name=x",
        ],
        &[
            "--blockdev",
            "null-co,node-name=x,read-only=on",
            "--nbd-server",
            "addr.type=unix,addr.path=n",
            "--export",
            "nbd,id=e,node-name=x,writable=on",
        ],
        &["--pidfile", "/nonexistent/p"],
        &["--daemonize", "--blockdev", "bogus"],
    ];
    let folder = tempfile::tempdir().unwrap();
    for arguments in cases {
        let said = |program| {
            let output = run_to_end(program, folder.path(), arguments);
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            let (_, message) = text.split_once(": ").unwrap_or(("", text.as_str()));
            (output.status.code(), message.to_owned())
        };
        let (code, theirs) = said(Program::QemuStorageDaemon);
        // The full path of a parameter where the peer has the last part only (difference `full-path`).
        let theirs = theirs.replace("Parameter 'type' does", "Parameter 'addr.type' does");
        let ours = said(Program::Qblockd);
        assert!(
            ours == (code, theirs.clone())
                || ours == (code, theirs.replace("'addr.type'", "'type'")),
            "{arguments:?}: {ours:?}, {theirs:?}"
        );
    }
}
