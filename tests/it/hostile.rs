//! Clients that mean harm: arguments of any kind for every command, and more connections than are served.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use serde_json::{Map, Value, json};

use crate::harness::{Daemon, PATIENCE, Program, Qmp, connect, run_to_end, until};

/// Commands of an ordinary run; `QBLOCKD_QMP_MUTATIONS` for more.
const COMMANDS: u64 = 2500;

/// What arguments are made of: the daemon's own description of them.
struct Schema {
    types: HashMap<String, Value>,
    commands: Vec<(String, String)>,
}

impl Schema {
    fn query(qmp: &mut Qmp) -> Schema {
        let mut types = HashMap::new();
        let mut commands = Vec::new();
        for entity in qmp.ok("query-qmp-schema", json!({})).as_array().unwrap() {
            let name = entity["name"].as_str().unwrap().to_owned();
            if entity["meta-type"] == "command" {
                let arguments = entity["arg-type"].as_str().unwrap().to_owned();
                commands.push((name.clone(), arguments));
            }
            types.insert(name, entity.clone());
        }
        commands.retain(|(name, _)| name != "quit");
        Schema { types, commands }
    }

    /// A value that is mostly of this type.
    fn value(&self, of: &str, random: &mut fastrand::Rng, depth: u32) -> Value {
        if depth > 6 || random.u8(..16) == 0 {
            return junk(random);
        }
        let entity = &self.types[of];
        match entity["meta-type"].as_str().unwrap() {
            "object" => self.object(entity, random, depth),
            "enum" => {
                let members = entity["members"].as_array().unwrap();
                members[random.usize(..members.len())]["name"].clone()
            }
            "array" => {
                let of = entity["element-type"].as_str().unwrap();
                let element = |_| self.value(of, random, depth + 1);
                (0..2).map(element).collect()
            }
            "alternate" => {
                let members = entity["members"].as_array().unwrap();
                let of = members[random.usize(..members.len())]["type"].as_str();
                self.value(of.unwrap(), random, depth + 1)
            }
            _ => match entity["json-type"].as_str().unwrap() {
                "int" => integer(random),
                "number" => json!(random.f64() * 1e300),
                "boolean" => json!(random.bool()),
                "string" => json!(string(random)),
                _ => junk(random),
            },
        }
    }

    fn object(&self, entity: &Value, random: &mut fastrand::Rng, depth: u32) -> Value {
        let mut object = Map::new();
        for member in entity["members"].as_array().unwrap() {
            let optional = member.get("default").is_some();
            if (optional && random.u8(..3) > 0) || random.u8(..30) == 0 {
                continue;
            }
            let name = member["name"].as_str().unwrap().to_owned();
            let value = self.value(member["type"].as_str().unwrap(), random, depth + 1);
            object.insert(name, value);
        }
        let tag = entity["tag"].as_str().and_then(|tag| object.get(tag));
        if let Some(tag) = tag.cloned() {
            let variants = entity["variants"].as_array().unwrap();
            if let Some(variant) = variants.iter().find(|variant| variant["case"] == tag) {
                let more = &self.types[variant["type"].as_str().unwrap()];
                if let Value::Object(more) = self.object(more, random, depth) {
                    object.extend(more);
                }
            }
        }
        if random.u8(..20) == 0 {
            object.insert(string(random), junk(random));
        }
        Value::Object(object)
    }
}

fn integer(random: &mut fastrand::Rng) -> Value {
    let numbers = [
        json!(-1),
        json!(0),
        json!(1),
        json!(511),
        json!(512),
        json!(1 << 20),
        json!(i64::MIN),
        json!(i64::MAX),
        json!(u64::MAX),
        json!(1e18),
        json!(-0.5),
    ];
    numbers[random.usize(..numbers.len())].clone()
}

fn string(random: &mut fastrand::Rng) -> String {
    let strings = [
        "",
        "n0",
        "n1",
        "n2",
        "e0",
        "disk",
        "snap",
        "1",
        "disk.qcow2",
        "new.sock",
        "\0",
        "a/b",
        "json:{}",
        "127.0.0.1",
        "0",
        "/dev/null",
        "/",
        "fd:3",
        "é\u{fffd}",
    ];
    match random.u8(..40) {
        0 => "x".repeat(random.usize(..70_000)),
        _ => strings[random.usize(..strings.len())].to_owned(),
    }
}

fn junk(random: &mut fastrand::Rng) -> Value {
    match random.u8(..8) {
        0 => Value::Null,
        1 => json!(random.bool()),
        2 => json!({}),
        3 => json!([]),
        4 => json!(string(random)),
        5 => (0..200).fold(json!(1), |inner, _| json!([inner])),
        6 => json!({"driver": "null-co", "size": integer(random)}),
        _ => integer(random),
    }
}

/// Sends a command and insists on an answer that is not a crash.
fn ask(qmp: &mut Qmp, command: &str, arguments: &Value) -> Value {
    let reply = qmp.execute(command, arguments.clone());
    let text = reply.to_string();
    let answered = reply.get("return").is_some() || reply.get("error").is_some();
    let broken = text.contains("Internal error");
    assert!(answered && !broken, "{command} {arguments}: {text}");
    reply
}

#[test]
fn any_arguments_get_an_answer() {
    let mut daemon = Daemon::start(
        Program::Qblockd,
        &["--drive", "id=disk,file=disk.qcow2,size=1M"],
    );
    let mut qmp = daemon.qmp();
    for size in [-1, i64::MIN, i64::MAX] {
        let node = json!({"driver": "null-co", "node-name": "first", "size": size});
        ask(&mut qmp, "blockdev-add", &node);
        ask(&mut qmp, "blockdev-del", &json!({"node-name": "first"}));
    }
    let schema = Schema::query(&mut qmp);
    let setting = |name: &str, default| std::env::var(name).map_or(default, |n| n.parse().unwrap());
    let seed = setting("QBLOCKD_QMP_SEED", 1);
    let mut random = fastrand::Rng::with_seed(seed);
    let mut errors = 0;
    let count = setting("QBLOCKD_QMP_MUTATIONS", COMMANDS);
    for number in 0..count {
        let (name, arguments) = &schema.commands[random.usize(..schema.commands.len())];
        let arguments = schema.value(arguments, &mut random, 0);
        let begun = std::time::Instant::now();
        let reply = ask(&mut qmp, name, &arguments);
        errors += u64::from(reply.get("error").is_some());
        assert!(begun.elapsed() < PATIENCE, "{number}: {name} {arguments}");
    }
    assert!(errors > 0 && errors < count, "{errors} of {count}");
    // It is whole: another client is served, and it ends when told to.
    daemon.qmp().ok("query-block", json!({}));
    assert!(daemon.terminate().success());
}

/// The resident memory of a process in bytes.
fn resident(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.id())).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

/// As many connections as this process may have.
const CONNECTIONS: usize = 800;

#[test]
fn connections_that_say_nothing_keep_nobody_out() {
    let mut daemon = Daemon::start(
        Program::Qblockd,
        &[
            "--blockdev",
            "null-co,node-name=n,size=1048576",
            "--nbd-server",
            "addr.type=unix,addr.path=nbd.sock",
            "--export",
            "nbd,id=e,node-name=n,name=e",
        ],
    );
    let mut qmp = daemon.qmp();
    let before = resident(&daemon);
    let nbd = daemon.path("nbd.sock");
    until(|| nbd.exists(), "the NBD server");
    let half_open: Vec<_> = (0..CONNECTIONS)
        .map(|_| UnixStream::connect(&nbd).unwrap())
        .collect();
    // A client that does speak is served among them.
    let mut client = UnixStream::connect(&nbd).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..8], b"NBDMAGIC");
    qmp.ok("query-version", json!({}));
    drop(half_open);
    let strangers: Vec<_> = (0..CONNECTIONS)
        .filter_map(|_| UnixStream::connect(daemon.path("qmp.sock")).ok())
        .map(|mut stream| {
            // The beginning of a message without an end; it may be too many already.
            let _ = stream.write_all(&[b'['; 900]);
            stream
        })
        .collect();
    qmp.ok("query-version", json!({}));
    let grown = resident(&daemon).saturating_sub(before);
    assert!(grown < 128 << 20, "{grown} bytes");
    drop(strangers);
    until(
        || {
            let mut stream = UnixStream::connect(daemon.path("qmp.sock")).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut greeting = [0; 8];
            stream.read_exact(&mut greeting).is_ok()
        },
        "a free place for a client",
    );
    connect(&daemon.path("qmp.sock")).execute("qmp_capabilities", json!({}));
    assert!(daemon.terminate().success());
}

/// Replaces, drops, doubles or inserts a few characters.
fn mutate(text: &str, random: &mut fastrand::Rng) -> String {
    let mut characters: Vec<char> = text.chars().collect();
    for _ in 0..random.u8(1..4) {
        let at = random
            .usize(..characters.len().max(1))
            .min(characters.len());
        let special: Vec<char> = ",,=.:{}[]'\"\\-90 \u{1}\u{e9}%".chars().collect();
        let character = special[random.usize(..special.len())];
        match random.u8(..5) {
            0 if at < characters.len() => characters[at] = character,
            1 if at < characters.len() => drop(characters.remove(at)),
            2 => characters.truncate(at),
            3 => {
                let copy: Vec<char> = characters[at..].to_vec();
                characters.extend(copy);
            }
            _ => characters.insert(at, character),
        }
    }
    characters.into_iter().collect()
}

#[test]
fn any_command_line_is_followed_or_refused_with_a_message() {
    let valid = [
        (
            "--blockdev",
            "driver=qcow2,node-name=a,file.driver=file,file.filename=disk.qcow2,read-only=on",
        ),
        (
            "--blockdev",
            "{'driver':'raw','node-name':'b','file':{'driver':'null-co','size':-1}}",
        ),
        ("--blockdev", "null-co,node-name=c,size=9223372036854775807"),
        (
            "--drive",
            "id=d,file=disk.qcow2,format=qcow2,cache=none,aio=threads,readonly=off,if=ide,index=2",
        ),
        (
            "--drive",
            "id=e,file=new.qcow2,size=1M,detect-zeroes=unmap,discard=unmap",
        ),
        ("--object", "secret,id=s,data=x"),
        ("--chardev", "socket,id=f,path=f.sock,server=on,wait=off"),
        ("--monitor", "chardev=g,mode=control,pretty=on"),
        (
            "--nbd-server",
            "addr.type=unix,addr.path=n.sock,max-connections=-1",
        ),
        ("--export", "type=nbd,id=h,node-name=c,writable=on,name=x"),
        ("--qmp", "unix:q.sock"),
    ];
    let folder = tempfile::tempdir().unwrap();
    let mut random = fastrand::Rng::with_seed(7);
    let count = std::env::var("QBLOCKD_LINE_MUTATIONS").map_or(150, |n| n.parse().unwrap());
    for _ in 0..count {
        let (option, value) = valid[random.usize(..valid.len())];
        let value = mutate(value, &mut random);
        // The last step always fails, so that no run is left standing.
        let last = "type=nbd,id=last,node-name=missing";
        let arguments = [option, &value, "--export", last];
        let output = run_to_end(Program::Qblockd, folder.path(), &arguments);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{option} {value}: {message}");
        assert!(
            message.contains("qblockd: ") && !message.contains("panicked"),
            "{option} {value}: {message}"
        );
    }
}
