//! The same bytes to qemu-storage-daemon and to us give the same replies; and QEMU's own Python
//! client works. Both skip, with a line, where the program is absent.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::mock::Running;
use super::{Client, PATIENCE};

/// A qemu-storage-daemon with one monitor.
struct Qsd {
    child: Child,
    directory: tempfile::TempDir,
}

impl Qsd {
    fn start() -> Option<Qsd> {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("qsd.sock");
        let chardev = format!("socket,id=c,path={},server=on,wait=off", socket.display());
        let spawned = Command::new("qemu-storage-daemon")
            .args(["--chardev", &chardev, "--monitor", "chardev=c"])
            .spawn();
        let child = match spawned {
            Ok(child) => child,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                eprintln!("skipped: qemu-storage-daemon is not installed");
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        let qsd = Qsd { child, directory };
        let begin = Instant::now();
        while !socket.exists() {
            assert!(begin.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(5));
        }
        Some(qsd)
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("qsd.sock")
    }
}

impl Drop for Qsd {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Sends bytes in a session of its own and returns every reply up to that of a last command.
fn replies(socket: &Path, enable: Option<&str>, bytes: &[u8]) -> Vec<String> {
    let mut client = match enable {
        Some(enable) => Client::ready(socket, enable),
        None => Client::connect(socket).0,
    };
    client.send(bytes);
    // A control character ends whatever was begun, in both.
    client.send(b"\x01\n{'execute':'query-version','id':'the end'}");
    let mut lines = Vec::new();
    loop {
        let line = client.line();
        assert!(!line.is_empty(), "closed after {lines:?}");
        let last = line.contains("the end");
        lines.push(line);
        if last {
            return lines;
        }
    }
}

/// Both servers, the version of ours made equal.
fn pair() -> Option<(Qsd, Running)> {
    let qsd = Qsd::start()?;
    let (_, greeting) = Client::connect(&qsd.socket());
    // One client at a time: the next one waits until this one is gone.
    let ours = Running::with_version(greeting["QMP"]["version"].clone());
    let (_, our_greeting) = Client::connect(&ours.socket());
    assert_eq!(our_greeting, greeting);
    Some((qsd, ours))
}

const STREAMS: &[&[u8]] = &[
    b"{'execute':'query-version','id':1}{\"execute\":\"query-version\",\"id\":2}",
    b"{]\n",
    b"{\xFF",
    b"{\x01",
    b"{'bad \xFF",
    b"{'execute': 'nonexistent', 'id':'\n",
    b"%p %s\n%d",
    b"foo bar\n",
    b"42\n-0 1.5 \"x\" [1] null true\n",
    b"{\"a\":1,\"a\":2}",
    b"\"\\u12\" \"\\ud800\\u0041\" \"\\q\" \"\\ufffe\" \"\\ud83f\\udfff\" \"\\udc00\"",
    b"\"\xC0\x80\" \"\xEF\xBF\xBF\" \"\xC1\x81\" \"\xED\xA0\x80\" \"\x80\"",
    b"-a\n01\n1.\n1.5e\n.5\n+1\n0e1\nNaN\n",
    b"[1 2][,][1,]{1:2}{[1]:2}{\"a\" 1}{\"a\":1 \"b\":2}{\"a\":}{\"a\":1,}",
    b"},:[{]}]]]",
    b"\"a\tb\"\n'a\n\"a\x00b\"\n",
    b"/* comment */\n// another\n",
    b"\"\xF0\x9F\x98\x80\xE2\x82\x01\n",
    b"{'execute':'query-version','id':[1.0,1e3,0.1,-0,1.5e-7,18446744073709551616,1e16,1e17,5e-324,0.0001,1e-5]}",
    b"{'execute':'x','id':{'':'\\u0000\xC3\xA9\x7F\\/\xF0\x9F\x98\x80'}}",
    b"{'execute':'query-version','id':null}{'execute':'query-version','id':false}",
    b"{'execute':1}{'arguments':{}}{'exec-oob':'y','id':3}{'id':4}{}",
    b"{'execute':'a','arguments':null}{'execute':'a','arguments':[]}{'execute':'a','foo':1}",
    b"{'execute':'query-version','arguments':{'b':1},'id':5}{'execute':'query-version','arguments':{}}",
    b"{'execute':'qmp_capabilities','id':6}{'execute':'','id':7}",
    b"{'execute':'qmp_capabilities','arguments':{'enable':['bogus']}}{'execute':'qmp_capabilities','arguments':{'x':1}}",
    b"{'exec-oob':'query-version','id':8}{'exec-oob':'nope'}{'exec-oob':1}{'exec-oob':'x','execute':'y'}",
];

#[test]
fn the_same_bytes_give_the_same_replies_as_qemu() {
    let Some((qsd, ours)) = pair() else { return };
    for enable in [None, Some(""), Some("'oob'")] {
        for bytes in STREAMS {
            let mut expected = replies(&qsd.socket(), enable, bytes);
            let mut mine = replies(&ours.socket(), enable, bytes);
            if enable == Some("'oob'") {
                // What overtakes what is a matter of time.
                expected.sort();
                mine.sort();
            }
            assert_eq!(mine, expected, "{enable:?} {}", bytes.escape_ascii());
        }
    }
    let deep = |depth: usize| [vec![b'['; depth], vec![b']'; depth]].concat();
    for depth in [1024, 1025] {
        let expected = replies(&qsd.socket(), Some(""), &deep(depth));
        assert_eq!(
            replies(&ours.socket(), Some(""), &deep(depth)),
            expected,
            "{depth}"
        );
    }
}

/// What legitimately differs: where a message has several faults QEMU names one by hash order, and
/// it prints objects so too.
fn normalised(lines: &[String]) -> Vec<Value> {
    let parse = |line: &String| {
        let mut value: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
        let desc = value.pointer_mut("/error/desc");
        if let Some(Value::String(text)) = desc
            && text.starts_with("QMP input")
        {
            *text = "QMP input ...".to_owned();
        }
        value
    };
    lines.iter().map(parse).collect()
}

#[test]
fn mutated_streams_give_the_same_replies_as_qemu() {
    let Some((qsd, ours)) = pair() else { return };
    let seed = 0x9_2026;
    let mut random = fastrand::Rng::with_seed(seed);
    for round in 0..150 {
        let mut bytes = Vec::new();
        for _ in 0..random.usize(1..6) {
            bytes.extend_from_slice(STREAMS[random.usize(..STREAMS.len())]);
        }
        for _ in 0..random.usize(0..8) {
            let at = random.usize(..bytes.len());
            match random.u8(0..4) {
                0 => bytes[at] = random.u8(..),
                1 => bytes.insert(at, *random.choice(b"{}[]:,'\"\\ \n\xFFeE.-1").unwrap()),
                2 if bytes.len() > 1 => drop(bytes.remove(at)),
                _ => bytes.truncate(at + 1),
            }
        }
        let theirs = replies(&qsd.socket(), Some(""), &bytes);
        if theirs.iter().any(|line| line.contains("inf")) {
            // It prints a double that overflowed so, which is not JSON; we refuse the number.
            continue;
        }
        let theirs = normalised(&theirs);
        let mine = normalised(&replies(&ours.socket(), Some(""), &bytes));
        let shown = bytes.escape_ascii();
        assert_eq!(mine, theirs, "seed {seed:#x}, round {round}: {shown}");
    }
}

/// What a script of QEMU's client does in a session.
const PYTHON: &str = "
import asyncio, sys
from qemu.qmp import QMPClient, ExecuteError

async def main():
    client = QMPClient('test')
    await client.connect(sys.argv[1])
    assert client.greeting.QMP.version['package'] == 'mock', client.greeting
    assert await client.execute('query-version')
    assert await client.execute('echo', {'text': 'h\\u00e9 \\U0001F600'}) == {'text': 'h\\u00e9 \\U0001F600'}
    try:
        await client.execute('nonsense')
        raise AssertionError('accepted')
    except ExecuteError as error:
        assert error.error_class == 'CommandNotFound', error
    with client.listener('MOCK') as listener:
        await client.execute('emit', {'n': 1})
        event = await asyncio.wait_for(listener.get(), 5)
        assert event['data'] == {'n': 1}, event
    replies = await asyncio.gather(*[client.execute('echo', {'n': n}) for n in range(20)])
    assert replies == [{'n': n} for n in range(20)]
    assert await client.execute('echo-oob', oob=True) == {}
    await client.disconnect()

asyncio.run(main())
";

#[test]
fn the_python_client_works() {
    let Some(python) = crate::harness::python() else {
        return;
    };
    let server = Running::start();
    let output = Command::new(python)
        .args(["-c", PYTHON])
        .arg(server.socket())
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{complaint}");
}
