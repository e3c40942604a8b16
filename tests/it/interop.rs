//! Images both ways: made and snapshotted by qemu-img and used here, made here and used by QEMU's programs. A model says
//! what the disk and each snapshot must hold, and both sides are held against it.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::guest::Guest;
use super::harness::{self, Daemon, Program, Qmp, run_to_end, tool};

const SIZE: usize = 16 << 20;
const MIB: usize = 1 << 20;

const DRIVE: &[&str] = &[
    "--drive",
    "id=disk,file=disk.qcow2,discard=unmap",
    "--nbd-server",
    "unix:nbd.sock",
];

const TOOLS: &[&str] = &["qemu-img", "qemu-io", "qemu-storage-daemon"];

/// What an image must hold.
struct Model {
    active: Vec<u8>,
    snapshots: BTreeMap<String, Vec<u8>>,
}

impl Model {
    /// What qemu-img sees in an image.
    fn read(folder: &Path) -> Model {
        let snapshots = listed(folder).into_iter().map(|(_, name)| {
            let content = snapshot_content(folder, &name);
            (name, content)
        });
        Model {
            snapshots: snapshots.collect(),
            active: raw_content(folder, ""),
        }
    }

    fn snapshot(&mut self, name: &str) {
        self.snapshots.insert(name.to_owned(), self.active.clone());
    }

    /// Random commands of qemu-io, whose effect the model has too.
    fn commands(&mut self, random: &mut fastrand::Rng) -> Vec<String> {
        let mut commands = Vec::new();
        for number in 0..8 {
            let length = match random.u8(..3) {
                0 => random.usize(1..5000),
                1 => random.usize(1..32) << 12,
                _ => random.usize(1..2 * MIB),
            };
            let start = random.usize(..self.active.len() - length);
            let pattern = random.u8(1..);
            let (command, byte) = match number {
                // Whole sectors, as guests send them; with and without space given back.
                0 => ("write -z -u".to_owned(), 0),
                1 => ("write -z".to_owned(), 0),
                _ => (format!("write -P {pattern}"), pattern),
            };
            commands.push(format!("{command} {start} {length}"));
            self.active[start..start + length].fill(byte);
        }
        commands.push("flush".to_owned());
        commands
    }

    /// Holds an image against the model, as qemu-img reads it.
    fn check(&self, folder: &Path) {
        let names: Vec<String> = listed(folder).into_iter().map(|(_, name)| name).collect();
        for (name, content) in &self.snapshots {
            assert!(names.contains(name), "{name} is not in {names:?}");
            assert!(
                snapshot_content(folder, name) == *content,
                "snapshot {name}"
            );
        }
        assert_eq!(names.len(), self.snapshots.len(), "{names:?}");
        assert!(raw_content(folder, "") == self.active, "the active layer");
        // Fails for leaks too.
        tool(folder, "qemu-img check -q -f qcow2 disk.qcow2");
    }
}

fn raw_content(folder: &Path, options: &str) -> Vec<u8> {
    let line = format!("qemu-img convert -f qcow2 {options} -O raw disk.qcow2 out.raw");
    tool(folder, &line);
    std::fs::read(folder.join("out.raw")).unwrap()
}

fn snapshot_content(folder: &Path, name: &str) -> Vec<u8> {
    raw_content(folder, &format!("-l snapshot.name={name}"))
}

/// Ids and names as `qemu-img snapshot -l` lists them.
fn listed(folder: &Path) -> Vec<(String, String)> {
    let list = tool(folder, "qemu-img snapshot -l -U disk.qcow2");
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let id = words.next()?.parse::<u64>().ok()?;
        Some((id.to_string(), words.next()?.to_owned()))
    };
    list.lines().filter_map(entry).collect()
}

/// The snapshots in query-block.
fn shown(qmp: &mut Qmp) -> Value {
    let drives = qmp.ok("query-block", json!({}));
    let snapshots = &drives[0]["inserted"]["image"]["snapshots"];
    match snapshots.is_null() {
        true => json!([]),
        false => snapshots.clone(),
    }
}

fn qemu_io(daemon: &Daemon, export: &str, commands: &[String]) {
    harness::until(|| daemon.path("nbd.sock").exists(), "the export");
    let commands: Vec<String> = commands.iter().map(|one| format!("-c '{one}'")).collect();
    let said = daemon.tool(&format!(
        "qemu-io -f raw --discard=unmap {} 'nbd+unix:///{export}?socket=nbd.sock'",
        commands.join(" ")
    ));
    assert!(!said.contains("failed"), "{said}");
}

fn content(daemon: &Daemon, export: &str) -> Vec<u8> {
    let mut guest = Guest::connect(&daemon.path("nbd.sock"), export).unwrap();
    guest.content().unwrap()
}

fn snapshot(qmp: &mut Qmp, name: &str) {
    qmp.ok(
        "blockdev-snapshot-internal-sync",
        json!({"device": "disk", "name": name}),
    );
}

fn delete(qmp: &mut Qmp, name: &str) -> Value {
    qmp.ok(
        "blockdev-snapshot-delete-internal-sync",
        json!({"device": "disk", "name": name}),
    )
}

fn revert(qmp: &mut Qmp, name: &str) {
    let done = qmp.ok(
        "x-blockdev-snapshot-revert",
        json!({"device": "disk", "name": name}),
    );
    assert_eq!(done["name"], name);
}

/// A snapshot of the disk, read through a node and an export of its own.
fn view(daemon: &Daemon, qmp: &mut Qmp, name: &str) -> Vec<u8> {
    let node = json!({"driver": "qcow2", "node-name": "view", "x-snapshot": name, "file": "disk"});
    qmp.ok("blockdev-add", node);
    let export = json!({"type": "nbd", "id": "view", "node-name": "view"});
    qmp.ok("block-export-add", export);
    let content = content(daemon, "view");
    qmp.ok("block-export-del", json!({"id": "view", "mode": "hard"}));
    qmp.event("BLOCK_EXPORT_DELETED");
    qmp.ok("blockdev-del", json!({"node-name": "view"}));
    content
}

/// How images are made: lines of shell that leave a `disk.qcow2` of [`SIZE`].
const MAKE: &[&str] = &[
    "qemu-img create -q -f qcow2 disk.qcow2 16M",
    "qemu-img create -q -f qcow2 -o compat=0.10 disk.qcow2 16M",
    "qemu-img create -q -f qcow2 -o compat=0.10,cluster_size=512 disk.qcow2 16M",
    "qemu-img create -q -f qcow2 -o cluster_size=512,refcount_bits=64 disk.qcow2 16M",
    "qemu-img create -q -f qcow2 -o cluster_size=4k,refcount_bits=4 disk.qcow2 16M",
    "qemu-img create -q -f qcow2 -o cluster_size=2M,refcount_bits=32 disk.qcow2 16M",
    "qemu-img create -q -f qcow2 -o lazy_refcounts=on,cluster_size=16k disk.qcow2 16M",
    "qemu-img create -q -f qcow2 -o preallocation=metadata disk.qcow2 16M",
    "qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=128k disk.qcow2 16M",
    "qemu-img create -q -f qcow2 -o preallocation=falloc,cluster_size=8k disk.qcow2 16M",
    "qemu-img create -q -f qcow2 -o preallocation=full,compat=0.10 disk.qcow2 16M",
    // A raw backing file that is shorter than the disk, and not a multiple of a cluster.
    "qemu-img create -q -f raw base.raw 9999872 &&
     qemu-io -f raw -c 'write -P 201 0 9999872' base.raw >/dev/null &&
     qemu-img create -q -f qcow2 -b base.raw -F raw disk.qcow2 16M",
    // A chain of two, of other clusters and of another version.
    "qemu-img create -q -f qcow2 -o cluster_size=4k bottom.qcow2 12M &&
     qemu-io -f qcow2 -c 'write -P 202 1M 10M' bottom.qcow2 >/dev/null &&
     qemu-img create -q -f qcow2 -b bottom.qcow2 -F qcow2 -o compat=0.10 middle.qcow2 14M &&
     qemu-io -f qcow2 -c 'write -P 203 5M 2M' middle.qcow2 >/dev/null &&
     qemu-img create -q -f qcow2 -b middle.qcow2 -F qcow2 disk.qcow2 16M",
    // Compressed clusters, and some that cannot be compressed.
    "head -c 4M /dev/urandom >some.raw && head -c 8M /dev/zero | tr '\\0' x >>some.raw &&
     truncate -s 16M some.raw && qemu-img convert -f raw -O qcow2 -c some.raw disk.qcow2",
    "head -c 4M /dev/urandom >some.raw && head -c 8M /dev/zero | tr '\\0' x >>some.raw &&
     truncate -s 16M some.raw &&
     qemu-img convert -f raw -O qcow2 -c -o compression_type=zstd some.raw disk.qcow2",
];

/// An image of qemu-img's, with a snapshot of qemu-img's, gets snapshots, goes back to some and loses some here.
fn use_image(make: &str, random: &mut fastrand::Rng) {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    tool(folder, make);
    let io = "qemu-io -f qcow2 -c 'write -P 11 3M 1M' -c 'write -P 12 7M 70k' disk.qcow2";
    for line in [io, "qemu-img snapshot -c theirs disk.qcow2", io] {
        tool(folder, line);
    }
    let mut model = Model::read(folder);
    let mut daemon = Daemon::start_in(Program::Qblockd, folder, DRIVE);
    let mut qmp = daemon.qmp();
    for name in ["a", "b", "c"] {
        qemu_io(&daemon, "disk", &model.commands(random));
        assert!(content(&daemon, "disk") == model.active, "read back");
        snapshot(&mut qmp, name);
        model.snapshot(name);
    }
    for name in ["theirs", "b"] {
        revert(&mut qmp, name);
        model.active = model.snapshots[name].clone();
        assert!(content(&daemon, "disk") == model.active, "back to {name}");
        qemu_io(&daemon, "disk", &model.commands(random));
        for (name, content) in &model.snapshots {
            assert!(view(&daemon, &mut qmp, name) == *content, "view of {name}");
        }
    }
    for name in ["theirs", "b"] {
        assert_eq!(delete(&mut qmp, name)["name"], name);
        model.snapshots.remove(name);
    }
    qemu_io(&daemon, "disk", &model.commands(random));
    discard(&daemon, &mut model, random);
    let ours = shown(&mut qmp);
    drop(qmp);
    assert!(daemon.terminated().success());
    let info = tool(folder, "qemu-img info -f qcow2 --output=json disk.qcow2");
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["snapshots"], ours);
    model.check(folder);
    // And on in QEMU: back to a snapshot of ours, which goes away then.
    tool(folder, "qemu-img snapshot -a a disk.qcow2");
    tool(folder, "qemu-img snapshot -d a disk.qcow2");
    model.active = model.snapshots.remove("a").unwrap();
    model.check(folder);
}

/// Features that are not there yet, or that need an option: the image is refused, with the feature's name, and left as it was.
const REFUSED: &[(&str, &str)] = &[
    ("data_file=data.raw", "'data-file' is required"),
    (
        "encrypt.format=luks,encrypt.key-secret=s --object secret,id=s,data=x",
        "ncrypt",
    ),
];

#[test]
fn images_with_features_that_are_missing_are_refused_by_name() {
    let Some(()) = harness::need(TOOLS) else {
        return;
    };
    for (options, text) in REFUSED {
        let folder = tempfile::tempdir().unwrap();
        let line = format!("qemu-img create -q -f qcow2 -o {options} disk.qcow2 1M");
        tool(folder.path(), &line);
        let image = folder.path().join("disk.qcow2");
        let before = std::fs::read(&image).unwrap();
        let output = run_to_end(Program::Qblockd, folder.path(), DRIVE);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{options}: {said}");
        assert!(said.contains(text), "{options}: {said}");
        assert!(std::fs::read(&image).unwrap() == before, "{options}");
    }
}

/// Discards, after which a range holds what it held, or zeroes.
fn discard(daemon: &Daemon, model: &mut Model, random: &mut fastrand::Rng) {
    let length = random.usize(1..4 * MIB);
    let start = random.usize(..SIZE - length);
    qemu_io(daemon, "disk", &[format!("discard {start} {length}")]);
    let now = content(daemon, "disk");
    let before = &model.active;
    let end = start + length;
    assert!(before[..start] == now[..start] && before[end..] == now[end..]);
    let mut bytes = before[start..end].iter().zip(&now[start..end]);
    assert!(bytes.all(|(old, new)| new == old || *new == 0));
    model.active = now;
}

#[test]
fn images_of_qemu_img_are_used_here() {
    let Some(()) = harness::need(TOOLS) else {
        return;
    };
    let seed = harness::seed();
    for make in MAKE {
        println!("seed {seed}: {make}");
        use_image(make, &mut fastrand::Rng::with_seed(seed));
    }
}

/// qemu-storage-daemon with the same image, exported in the same place.
fn peer(folder: &Path) -> (Daemon, Qmp) {
    let arguments = [
        "--blockdev",
        "qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2,discard=unmap",
        "--nbd-server",
        "addr.type=unix,addr.path=nbd.sock",
        "--export",
        "nbd,id=e,node-name=disk,writable=on",
    ];
    let mut daemon = Daemon::start_in(Program::QemuStorageDaemon, folder, &arguments);
    let qmp = daemon.qmp();
    (daemon, qmp)
}

#[test]
fn images_made_here_go_round() {
    let Some(()) = harness::need(TOOLS) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let made = [
        "--drive",
        "id=disk,file=disk.qcow2,size=16M",
        "--nbd-server",
        "unix:nbd.sock",
    ];
    let mut daemon = Daemon::start_in(Program::Qblockd, folder, &made);
    drop(daemon.qmp());
    assert!(daemon.terminated().success());
    go_round(folder);
}

#[test]
fn images_with_subclusters_go_round() {
    let Some(()) = harness::need(TOOLS) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    tool(
        folder,
        "qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=32k disk.qcow2 16M",
    );
    go_round(folder);
}

/// Three turns on an empty image: each program writes, takes a snapshot and deletes the one before it, which was another's.
fn go_round(folder: &Path) {
    let seed = harness::seed();
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut model = Model::read(folder);
    assert!(model.active == vec![0; SIZE]);
    for turn in 0..3 {
        for program in [Program::Qblockd, Program::QemuStorageDaemon] {
            let (mut daemon, mut qmp) = match program {
                Program::Qblockd => {
                    let mut daemon = Daemon::start_in(program, folder, DRIVE);
                    let qmp = daemon.qmp();
                    (daemon, qmp)
                }
                Program::QemuStorageDaemon | Program::Qemu => peer(folder),
            };
            qemu_io(&daemon, "disk", &model.commands(&mut random));
            let before: Vec<String> = model.snapshots.keys().cloned().collect();
            let name = format!("{program:?}{turn}");
            snapshot(&mut qmp, &name);
            model.snapshot(&name);
            qemu_io(&daemon, "disk", &model.commands(&mut random));
            if let Some(last) = before.last() {
                delete(&mut qmp, last);
                model.snapshots.remove(last);
            }
            qemu_io(&daemon, "disk", &model.commands(&mut random));
            assert!(content(&daemon, "disk") == model.active, "{name}");
            drop(qmp);
            assert!(daemon.terminated().success());
            model.check(folder);
        }
        let commands = model.commands(&mut random);
        let commands: Vec<String> = commands.iter().map(|one| format!("-c '{one}'")).collect();
        let io = format!(
            "qemu-io -f qcow2 -d unmap {} disk.qcow2",
            commands.join(" ")
        );
        tool(folder, &io);
        tool(
            folder,
            &format!("qemu-img snapshot -c img{turn} disk.qcow2"),
        );
        model.snapshot(&format!("img{turn}"));
        model.check(folder);
    }
}

/// Images with the guest's data in a file of its own, written here and by QEMU's programs in turns.
#[test]
fn images_with_a_data_file_go_round() {
    let Some(()) = harness::need(TOOLS) else {
        return;
    };
    let seed = harness::seed();
    let mut random = fastrand::Rng::with_seed(seed);
    for options in [
        "data_file=data.raw",
        "data_file=data.raw,data_file_raw=on,cluster_size=4k",
        "data_file=data.raw,extended_l2=on,cluster_size=128k",
        "data_file=data.raw,data_file_raw=on,extended_l2=on",
    ] {
        println!("seed {seed}: {options}");
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let line = format!("qemu-img create -q -f qcow2 -o {options} disk.qcow2 16M");
        tool(folder, &line);
        let mut model = Model::read(folder);
        for program in [
            Program::Qblockd,
            Program::QemuStorageDaemon,
            Program::Qblockd,
        ] {
            let mut daemon = Daemon::start_in(program, folder, DATA_FILE);
            let mut qmp = daemon.qmp();
            qemu_io(&daemon, "disk", &model.commands(&mut random));
            let new = json!({"device": "disk", "name": "s"});
            let reply = qmp.execute("blockdev-snapshot-internal-sync", new);
            let refusal = "Failed to get a snapshot list: Operation not supported";
            assert_eq!(reply["error"]["desc"], refusal);
            qemu_io(&daemon, "disk", &model.commands(&mut random));
            assert!(content(&daemon, "disk") == model.active, "{program:?}");
            discard(&daemon, &mut model, &mut random);
            drop(qmp);
            assert!(daemon.terminated().success());
            model.check(folder);
            if options.contains("raw=on") {
                let raw = std::fs::read(folder.join("data.raw")).unwrap();
                assert!(raw == model.active, "the raw file behind {program:?}");
            }
        }
        let commands = model.commands(&mut random);
        let commands: Vec<String> = commands.iter().map(|one| format!("-c '{one}'")).collect();
        let io = format!(
            "qemu-io -f qcow2 -d unmap {} disk.qcow2",
            commands.join(" ")
        );
        tool(folder, &io);
        let mut daemon = Daemon::start_in(Program::Qblockd, folder, DATA_FILE);
        drop(daemon.qmp());
        assert!(content(&daemon, "disk") == model.active, "behind qemu-io");
        assert!(daemon.terminated().success());
    }
}

/// Arguments of either program for `disk.qcow2` with `data.raw`.
const DATA_FILE: &[&str] = &[
    "--blockdev",
    "qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2,discard=unmap,\
     data-file.driver=file,data-file.filename=data.raw,data-file.discard=unmap",
    "--nbd-server",
    "addr.type=unix,addr.path=nbd.sock",
    "--export",
    "nbd,id=e,node-name=disk,writable=on",
];

#[test]
fn a_disk_grows_while_it_is_in_use() {
    let Some(()) = harness::need(TOOLS) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    tool(folder, "qemu-img create -q -f qcow2 disk.qcow2 16M");
    let mut random = fastrand::Rng::with_seed(1);
    let mut model = Model::read(folder);
    let mut daemon = Daemon::start_in(Program::Qblockd, folder, DRIVE);
    let mut qmp = daemon.qmp();
    qemu_io(&daemon, "disk", &model.commands(&mut random));
    snapshot(&mut qmp, "small");
    model.snapshot("small");
    qmp.ok("block_resize", json!({"device": "disk", "size": 24 * MIB}));
    model.active.resize(24 * MIB, 0);
    assert!(
        content(&daemon, "disk") == model.active,
        "zeroes at the end"
    );
    qemu_io(&daemon, "disk", &["write -P 9 15M 9M".to_owned()]);
    model.active[15 * MIB..].fill(9);
    snapshot(&mut qmp, "large");
    model.snapshot("large");
    drop(qmp);
    assert!(daemon.terminated().success());
    // qemu-img reads a snapshot with the disk's size of now.
    let mut padded = model.snapshots["small"].clone();
    padded.resize(24 * MIB, 0);
    let small = model.snapshots.insert("small".to_owned(), padded).unwrap();
    model.check(folder);
    // The snapshot knows its size: going back to it makes the disk small again.
    tool(folder, "qemu-img snapshot -a small disk.qcow2");
    let mut daemon = Daemon::start_in(Program::Qblockd, folder, DRIVE);
    let mut qmp = daemon.qmp();
    harness::until(|| daemon.path("nbd.sock").exists(), "the export");
    assert!(content(&daemon, "disk") == small, "the small disk");
    delete(&mut qmp, "large");
    delete(&mut qmp, "small");
    drop(qmp);
    assert!(daemon.terminated().success());
    let end = Model {
        active: small,
        snapshots: BTreeMap::new(),
    };
    end.check(folder);
}

#[test]
fn an_image_in_use_is_refused_by_either() {
    let Some(()) = harness::need(TOOLS) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    tool(folder, "qemu-img create -q -f qcow2 disk.qcow2 16M");
    let node = json!({
        "driver": "qcow2",
        "node-name": "other",
        "file": {"driver": "file", "filename": "disk.qcow2"}
    });
    let locked = "Failed to get \"write\" lock";
    let refused_tool = |line: &str, text: &str| {
        let output = std::process::Command::new("sh")
            .args(["-c", line])
            .current_dir(folder)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_ne!(output.status.code(), Some(0), "{line}");
        assert!(said.contains(text), "{line}: {said}");
    };

    let (mut theirs, qmp) = peer(folder);
    let output = run_to_end(Program::Qblockd, folder, DRIVE);
    let said = String::from_utf8_lossy(&output.stderr);
    println!("{said}");
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains(locked), "{said}");
    let other = tempfile::tempdir().unwrap();
    let mut ours = Daemon::start_in(Program::Qblockd, other.path(), &[]);
    let mut absolute = node.clone();
    absolute["file"]["filename"] = folder.join("disk.qcow2").to_str().unwrap().into();
    let (class, desc) = ours.qmp().error("blockdev-add", absolute.clone());
    println!("{desc}");
    assert_eq!(class, "GenericError");
    assert!(desc.starts_with(locked), "{desc}");
    drop((ours, qmp));
    assert!(theirs.terminated().success());

    let mut ours = Daemon::start_in(Program::Qblockd, folder, DRIVE);
    drop(ours.qmp());
    let mut theirs = Daemon::start_in(Program::QemuStorageDaemon, other.path(), &[]);
    let (_, desc) = theirs.qmp().error("blockdev-add", absolute);
    assert!(desc.starts_with(locked), "{desc}");
    refused_tool("qemu-img snapshot -c s disk.qcow2", locked);
    refused_tool("qemu-io -f qcow2 -c 'write 0 1' disk.qcow2", locked);
    refused_tool(
        "qemu-img info disk.qcow2",
        "Failed to get shared \"write\" lock",
    );
    tool(folder, "qemu-img info -U disk.qcow2");
    let mut second = ours.qmp();
    let (_, desc) = second.error("blockdev-add", node);
    println!("{desc}");
    drop(second);
    assert!(ours.terminated().success());
    tool(folder, "qemu-img info disk.qcow2");
}
