//! Our schema against that of qemu-storage-daemon, over introspection.
//!
//! A client of QSD must find what it uses: all that we take, QSD takes, with the same types and the
//! same optional members; all that QSD always sends, we send.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::process::{Command, Stdio};

use crate::rt::Value;

/// Commands and events of QEMU's that QSD lacks and we have, since drives' users come from QEMU.
const NOT_IN_QSD: &[&str] = &[
    "query-status",
    "stop",
    "cont",
    "STOP",
    "RESUME",
    "SHUTDOWN",
    "X_TRANSACTION_RECOVERED",
    "x-blockdev-snapshot-revert",
];

/// What is ours in types that QSD has too: optional members, and values of enumerations that only clients send. Clients ignore
/// what they do not know in a reply, and need not send it.
const OURS: &[&str] = &[
    "rate",
    "started-at",
    "time-left",
    "x-actions",
    "x-dry-run",
    "x-blockdev-snapshot-delete-internal-sync",
    "x-blockdev-snapshot-revert",
    "x-point-in-time",
    "x-snapshot",
    "x-unsettled-tables",
];

/// A schema by the names of its entities.
struct Schema(BTreeMap<String, Value>);

impl Schema {
    fn new(infos: Value) -> Self {
        let Value::Array(infos) = infos else {
            panic!("no list: {infos}")
        };
        Schema(
            infos
                .into_iter()
                .map(|info| (text(&info, "name").to_owned(), info))
                .collect(),
        )
    }

    fn entity(&self, name: &str) -> &Value {
        self.0
            .get(name)
            .unwrap_or_else(|| panic!("no entity '{name}'"))
    }
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key]
        .as_str()
        .unwrap_or_else(|| panic!("no string '{key}' in {value}"))
}

fn items<'v>(value: &'v Value, key: &str) -> &'v [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

/// Which way values of a type travel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    In,
    Out,
}

struct Comparison<'s> {
    ours: &'s Schema,
    theirs: &'s Schema,
    /// Pairs of types that are compared already, or on the way: types recurse.
    seen: BTreeSet<(String, String, Way)>,
    found: Vec<String>,
}

impl Comparison<'_> {
    fn types(&mut self, place: &str, our_name: &str, their_name: &str, way: Way) {
        if !self
            .seen
            .insert((our_name.to_owned(), their_name.to_owned(), way))
        {
            return;
        }
        let (ours, theirs) = (self.ours.entity(our_name), self.theirs.entity(their_name));
        let kind = text(ours, "meta-type");
        if kind != text(theirs, "meta-type") {
            self.found
                .push(format!("{place}: {ours} is {theirs} there"));
            return;
        }
        match kind {
            "builtin" if ours["json-type"] != theirs["json-type"] => {
                self.found
                    .push(format!("{place}: {our_name} is {their_name} there"));
            }
            "array" => {
                let (ours, theirs) = (text(ours, "element-type"), text(theirs, "element-type"));
                self.types(&format!("{place}[]"), ours, theirs, way);
            }
            "enum" => {
                let known: Vec<&str> = items(theirs, "members")
                    .iter()
                    .map(|value| text(value, "name"))
                    .collect();
                for value in items(ours, "members") {
                    let name = text(value, "name");
                    let ours_to_take = way == Way::In && OURS.contains(&name);
                    if !known.contains(&name) && !ours_to_take {
                        self.found
                            .push(format!("{place}: value '{name}' is unknown there"));
                    }
                }
            }
            "object" => self.objects(place, our_name, their_name, way),
            "alternate" => self.alternates(place, ours, theirs, way),
            _ => {}
        }
    }

    fn objects(&mut self, place: &str, our_name: &str, their_name: &str, way: Way) {
        let (ours, theirs) = (self.ours.entity(our_name), self.theirs.entity(their_name));
        for member in items(ours, "members") {
            let name = text(member, "name");
            let place = format!("{place}.{name}");
            let theirs = items(theirs, "members")
                .iter()
                .find(|their| text(their, "name") == name);
            let Some(their) = theirs else {
                let may_be_left_out = member.get("default").is_some();
                if !(may_be_left_out && OURS.contains(&name)) {
                    self.found.push(format!("{place} is unknown there"));
                }
                continue;
            };
            let optional = (
                member.get("default").is_some(),
                their.get("default").is_some(),
            );
            match (way, optional) {
                (Way::In, (ours, theirs)) if ours != theirs => {
                    self.found
                        .push(format!("{place}: optional {ours}, there {theirs}"));
                }
                (Way::Out, (true, false)) => {
                    self.found.push(format!("{place} is always there with QSD"));
                }
                _ => {}
            }
            self.types(&place, text(member, "type"), text(their, "type"), way);
        }
        for their in items(theirs, "members") {
            let name = text(their, "name");
            let ours = items(ours, "members")
                .iter()
                .any(|member| text(member, "name") == name);
            if their.get("default").is_none() && !ours {
                self.found.push(format!("{place}.{name} is missing here"));
            }
        }
        // An answer need not have branches: none of the values that we give has one there.
        let is_plain = way == Way::Out && ours.get("tag").is_none();
        if ours.get("tag") != theirs.get("tag") && !is_plain {
            self.found.push(format!("{place}: another discriminator"));
        }
        for variant in items(ours, "variants") {
            let case = text(variant, "case");
            let place = format!("{place}({case})");
            match items(theirs, "variants")
                .iter()
                .find(|their| text(their, "case") == case)
            {
                Some(their) => {
                    self.types(&place, text(variant, "type"), text(their, "type"), way);
                }
                None if way == Way::In && OURS.contains(&case) => {}
                None => self.found.push(format!("{place} is unknown there")),
            }
        }
    }

    /// Branches of one kind of entity belong together: that is how values are told apart.
    fn alternates(&mut self, place: &str, ours: &Value, theirs: &Value, way: Way) {
        let kind = |schema: &Schema, branch: &Value| {
            let entity = schema.entity(text(branch, "type"));
            entity
                .get("json-type")
                .unwrap_or(&entity["meta-type"])
                .clone()
        };
        for branch in items(ours, "members") {
            let wanted = kind(self.ours, branch);
            let mut candidates = items(theirs, "members").iter();
            match candidates.find(|their| kind(self.theirs, their) == wanted) {
                Some(their) => self.types(place, text(branch, "type"), text(their, "type"), way),
                None => self.found.push(format!("{place}: no {wanted} there")),
            }
        }
    }
}

/// The answers of QSD to a session, without the greeting; `None` where it is not installed.
pub(super) fn session_with_qsd(requests: &[Value]) -> Option<Vec<Value>> {
    let mut qsd = Command::new("qemu-storage-daemon")
        .args(["--chardev", "stdio,id=m", "--monitor", "chardev=m"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .ok()?;
    let mut session = String::from("{'execute':'qmp_capabilities'}");
    session.extend(requests.iter().map(Value::to_string));
    session.push_str("{'execute':'quit'}");
    qsd.stdin
        .as_mut()
        .unwrap()
        .write_all(session.as_bytes())
        .unwrap();
    let output = qsd.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let replies = text.lines().skip(2).take(requests.len());
    Some(
        replies
            .map(|line| serde_json::from_str(line).unwrap())
            .collect(),
    )
}

#[test]
fn our_schema_is_a_part_of_qsds() {
    let query = serde_json::json!({"execute": "query-qmp-schema"});
    let Some(mut answers) = session_with_qsd(&[query]) else {
        eprintln!("skipped: qemu-storage-daemon is not installed");
        return;
    };
    let theirs = answers.remove(0)["return"].take();
    let ours = Schema::new(serde_json::from_str(crate::introspection::SCHEMA).unwrap());
    let theirs = Schema::new(theirs);
    let mut comparison = Comparison {
        ours: &ours,
        theirs: &theirs,
        seen: BTreeSet::new(),
        found: Vec::new(),
    };
    let mut compared = 0;
    let is_entry = |info: &Value| ["command", "event"].contains(&text(info, "meta-type"));
    let entries: Vec<_> = ours.0.iter().filter(|(_, info)| is_entry(info)).collect();
    for (name, info) in &entries {
        let kind = text(info, "meta-type");
        if NOT_IN_QSD.contains(&name.as_str()) {
            continue;
        }
        let Some(their) = theirs.0.get(name.as_str()) else {
            comparison.found.push(format!("{name} is unknown there"));
            continue;
        };
        let way = if kind == "command" { Way::In } else { Way::Out };
        comparison.types(name, text(info, "arg-type"), text(their, "arg-type"), way);
        if kind == "command" {
            let place = format!("{name} ->");
            comparison.types(
                &place,
                text(info, "ret-type"),
                text(their, "ret-type"),
                Way::Out,
            );
        }
        for key in ["allow-oob", "features"] {
            assert_eq!(info.get(key), their.get(key), "{name}: {key}");
        }
        compared += 1;
    }
    assert_eq!(comparison.found, Vec::<String>::new());
    // Every command and event but the exceptions was compared.
    assert!(entries.len() > crate::COMMAND_NAMES.len());
    assert_eq!(compared, entries.len() - NOT_IN_QSD.len());
}
