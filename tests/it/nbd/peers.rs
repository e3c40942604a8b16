//! The tools that people use, against the server. A missing one is skipped with a message.

use std::process::Command;

use block::protocols::memory::OpKind;

use super::Fixture;

/// Runs a tool: its output, or `None` when it is not installed.
fn run(tool: &str, arguments: &[&str]) -> Option<String> {
    // The distribution's Python first: it is the one that nbdsh's module is installed for.
    let path = format!("/usr/bin:{}", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("timeout");
    command
        .arg("60")
        .arg(tool)
        .args(arguments)
        .env("PATH", path);
    let output = match command.output() {
        Ok(output) if output.status.code() == Some(127) => {
            println!("skipped: {tool} is not installed");
            return None;
        }
        output => output.expect("coreutils"),
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{tool} {arguments:?}: {out}{err}");
    Some(out)
}

#[test]
fn nbdinfo_sees_everything() {
    let fixture = Fixture::with(8 << 20, |_| {});
    fixture.add("other", |options| {
        options.description = Some("a text".into())
    });
    fixture.simple().write(1 << 20, &[1; 65536]);
    let Some(info) = run("nbdinfo", &["--json", &fixture.uri("disk")]) else {
        return;
    };
    for fact in [
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"export-size\": 8388608",
        "\"is_read_only\": false",
        "\"can_cache\": true",
        "\"can_df\": true",
        "\"can_fast_zero\": true",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_multi_conn\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"block_size_minimum\": 1",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
        "\"base:allocation\"",
    ] {
        assert!(info.contains(fact), "{fact} in {info}");
    }
    let list = run("nbdinfo", &["--list", &fixture.uri("")]).unwrap();
    assert!(
        list.contains("export=\"disk\"") && list.contains("a text"),
        "{list}"
    );
    let map = run("nbdinfo", &["--map", &fixture.uri("disk")]).unwrap();
    let fields: Vec<Vec<&str>> = map
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(fields[0][..3], ["0", "1048576", "3"]);
    assert_eq!(fields[1][..3], ["1048576", "65536", "0"]);
    assert_eq!(fields[2][..3], ["1114112", "7274496", "3"]);
}

#[test]
fn nbdcopy_copies_both_ways() {
    let fixture = Fixture::with(16 << 20, |_| {});
    let mut random = fastrand::Rng::with_seed(1);
    let mut content = vec![0; 16 << 20];
    content[1 << 20..5 << 20].fill_with(|| random.u8(..));
    content[15 << 20..].fill(7);
    let source = fixture.folder.path().join("source");
    let target = fixture.folder.path().join("target");
    std::fs::write(&source, &content).unwrap();
    let (source, target) = (source.to_str().unwrap(), target.to_str().unwrap());
    if run("nbdcopy", &["--flush", source, &fixture.uri("disk")]).is_none() {
        return;
    }
    assert!(fixture.disk.content() == content);
    assert!(fixture.disk.count(OpKind::Flush) > 0);
    run("nbdcopy", &[&fixture.uri("disk"), target]);
    assert!(std::fs::read(target).unwrap() == content);
}

#[test]
fn nbdsh_uses_every_command() {
    let fixture = Fixture::new();
    let script = r#"
h.set_strict_mode(0)
h.pwrite(b"x" * 65536, 131072, nbd.CMD_FLAG_FUA)
assert h.pread(65538, 131071) == b"\0" + b"x" * 65536 + b"\0"
chunks = []
h.pread_structured(262144, 0, lambda data, offset, kind, error: chunks.append((offset, len(data), kind)))
assert chunks == [(0, 131072, nbd.READ_HOLE), (131072, 65536, nbd.READ_DATA), (196608, 65536, nbd.READ_HOLE)], chunks
h.zero(4096, 131072, nbd.CMD_FLAG_NO_HOLE)
h.zero(4096, 139264, nbd.CMD_FLAG_FAST_ZERO)
h.trim(65536, 131072)
h.cache(65536, 0)
h.flush()
for command in (lambda: h.pread(2, 1048575), lambda: h.trim(2, 1048575), lambda: h.pread(512, 0, 0x10)):
    try:
        command()
        assert False
    except nbd.Error as error:
        assert error.errno == "EINVAL", error
try:
    h.pwrite(b"xx", 1048575)
    assert False
except nbd.Error as error:
    assert error.errno == "ENOSPC", error
cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([n] * 4096)), n * 4096) for n in range(64)]
while h.aio_in_flight() > 0:
    h.poll(-1)
assert h.pread(64 * 4096, 0) == b"".join(bytes([n]) * 4096 for n in range(64))
"#;
    run(
        "nbdsh",
        &[
            "--base-allocation",
            "--uri",
            &fixture.uri("disk"),
            "-c",
            script,
        ],
    );
}

#[test]
fn qemu_img_and_qemu_io_read_and_write() {
    let fixture = Fixture::with(16 << 20, |_| {});
    let uri = fixture.uri("disk");
    let commands = [
        "write -P 1 0 1M",
        "write -z 512k 4k",
        "discard 8M 1M",
        "flush",
        "read -P 1 0 512k",
        "read -P 0 512k 4k",
    ];
    let mut arguments = vec!["-f", "raw"];
    arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
    arguments.push(&uri);
    let Some(out) = run("qemu-io", &arguments) else {
        return;
    };
    assert!(!out.contains("failed"), "{out}");
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &uri]).unwrap();
    assert!(
        map.contains(
            "\"start\": 524288, \"length\": 4096, \"depth\": 0, \"present\": true, \"zero\": true"
        ),
        "{map}"
    );
    let copy = fixture.folder.path().join("copy.qcow2");
    let copy = copy.to_str().unwrap();
    run(
        "qemu-img",
        &[
            "convert", "-f", "raw", "-O", "qcow2", "-m", "8", "-W", &uri, copy,
        ],
    );
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "qcow2", &uri, copy],
    );
    fixture.add("back", |_| {});
    run(
        "qemu-img",
        &[
            "convert",
            "-n",
            "-f",
            "qcow2",
            "-O",
            "raw",
            copy,
            &fixture.uri("back"),
        ],
    );
    run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "qcow2", &uri, copy],
    );
}

#[test]
fn fio_verifies_over_several_connections() {
    let fixture = Fixture::with(32 << 20, |_| {});
    let uri = format!("--uri={}", fixture.uri("disk"));
    let arguments = [
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        "--rw=randwrite",
        "--bsrange=4k-64k",
        "--iodepth=16",
        "--size=8m",
        "--numjobs=3",
        "--offset_increment=8m",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        // Else it leaves files where it was started.
        "--verify_state_save=0",
        "--randseed=1",
    ];
    let Some(out) = run("fio", &arguments) else {
        return;
    };
    assert!(out.contains("err= 0"), "{out}");
    assert!(fixture.disk.count(OpKind::Write) > 300);
}

#[test]
fn fifty_clients_at_once() {
    let fixture = Fixture::new();
    std::thread::scope(|scope| {
        for number in 0..50u64 {
            let fixture = &fixture;
            scope.spawn(move || {
                let mut client = fixture.simple();
                for round in 0..20 {
                    let data = [number as u8 ^ round; 777];
                    client.write(number * 1000, &data);
                    assert_eq!(client.read(number * 1000, 777), data);
                }
            });
        }
    });
}
