//! `qblockd check` beside `qemu-img check`: figures, sentences and exit codes on the same images.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use super::harness::{Daemon, Program, need, tool};

/// Runs a check, ours or qemu-img's, on an image of the folder.
fn check(program: &str, folder: &Path, arguments: &[&str]) -> Output {
    Command::new(program)
        .arg("check")
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap()
}

const OURS: &str = env!("CARGO_BIN_EXE_qblockd");

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// An image with data, zeroes, a compressed cluster and two snapshots.
fn sample(folder: &Path, options: &str) {
    tool(
        folder,
        &format!(
            "qemu-img create -q -f qcow2 -o {options} a.qcow2 8M && \
             qemu-io -c 'write -P 1 0 1M' -c 'write -c -P 2 1M 64k' -c 'write -P 3 3M 64k' a.qcow2 && \
             qemu-img snapshot -c first a.qcow2 && \
             qemu-io -c 'write -P 4 64k 256k' -c 'write -z 2M 64k' a.qcow2 && \
             qemu-img snapshot -c second a.qcow2 && \
             qemu-io -c 'write -P 5 4M 192k' a.qcow2"
        ),
    );
}

/// The active layer and both snapshots, as qemu-img reads them.
fn contents(folder: &Path, image: &str) -> Vec<Vec<u8>> {
    ["", "-l snapshot.name=first", "-l snapshot.name=second"]
        .map(|layer| {
            let line = format!("qemu-img convert -U -f qcow2 -O raw {layer} {image} content.raw");
            tool(folder, &line);
            fs::read(folder.join("content.raw")).unwrap()
        })
        .into()
}

struct Image(fs::File);

impl Image {
    fn open(folder: &Path, name: &str) -> Image {
        let mut options = OpenOptions::new();
        Image(
            options
                .read(true)
                .write(true)
                .open(folder.join(name))
                .unwrap(),
        )
    }

    fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.0.write_all_at(bytes, at).unwrap();
    }

    /// Where the first refcount block lies. Its counters have 16 bits.
    fn refblock(&self) -> u64 {
        self.word(self.word(48))
    }

    /// A cluster behind everything, counted once and used by nobody.
    fn leak(&self) {
        let end = self.0.metadata().unwrap().len().next_multiple_of(65536);
        self.put(end, &[7; 65536]);
        self.put(self.refblock() + end / 65536 * 2, &[0, 1]);
    }

    /// The dirty bit, and counts that nobody has kept.
    fn forget_refcounts(&self) {
        self.put(79, &[1]);
        self.put(self.refblock() + 8, &[0; 40]);
    }

    /// Two entries of an L2 table that cannot be.
    fn damage(&self) {
        let l2 = self.word(self.word(40)) & 0x00ff_ffff_ffff_fe00;
        self.put(l2, &(1_u64 << 40).to_be_bytes());
        self.put(l2 + 8, &(self.word(l2 + 8) + 512).to_be_bytes());
    }
}

type Damage = (&'static str, fn(&Image), i32);

const DAMAGES: [Damage; 4] = [
    ("clean", |_| {}, 0),
    ("leaky", Image::leak, 3),
    ("dirty", Image::forget_refcounts, 2),
    ("damaged", Image::damage, 2),
];

#[test]
fn figures_and_exit_codes_are_those_of_qemu_img() {
    let Some(()) = need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for options in ["compat=1.1", "compat=0.10", "lazy_refcounts=on"] {
        for (what, damage, code) in DAMAGES {
            let _ = fs::remove_file(folder.join("a.qcow2"));
            sample(folder, options);
            damage(&Image::open(folder, "a.qcow2"));
            let what = format!("{options}, {what}");
            let arguments = ["--output=json", "a.qcow2"];
            let [ours, theirs] = [OURS, "qemu-img"].map(|tool| check(tool, folder, &arguments));
            let shown = format!("{what}: {ours:?} {theirs:?}");
            assert_eq!(ours.status.code(), Some(code), "{shown}");
            assert_eq!(theirs.status.code(), Some(code), "{shown}");
            let [ours, theirs] = [ours, theirs]
                .map(|output| serde_json::from_slice::<Value>(&output.stdout).unwrap());
            // Maps of `serde_json` are equal whatever their order.
            assert_eq!(ours, theirs, "{shown}");
            let [ours, theirs] = [OURS, "qemu-img"].map(|tool| check(tool, folder, &["a.qcow2"]));
            assert_eq!(text(&ours.stdout), text(&theirs.stdout), "{what}");
            assert_eq!(
                ours.stderr.is_empty(),
                code == 0,
                "{what}: findings go to standard error"
            );
            let quiet = check(OURS, folder, &["-q", "a.qcow2"]);
            assert_eq!(
                (quiet.status.code(), quiet.stdout),
                (Some(code), Vec::new())
            );
        }
    }
}

#[test]
fn repairs_end_as_those_of_qemu_img() {
    let Some(()) = need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (damage, what) in [
        (Image::leak as fn(&Image), "leaks"),
        (Image::leak, "all"),
        (Image::forget_refcounts, "all"),
    ] {
        let _ = fs::remove_file(folder.join("a.qcow2"));
        sample(folder, "compat=1.1");
        let content = contents(folder, "a.qcow2");
        damage(&Image::open(folder, "a.qcow2"));
        fs::copy(folder.join("a.qcow2"), folder.join("b.qcow2")).unwrap();
        let option = format!("--repair={what}");
        let ours = check(OURS, folder, &[&option, "a.qcow2"]);
        let theirs = check("qemu-img", folder, &["-r", what, "b.qcow2"]);
        assert_eq!(ours.status.code(), Some(0), "{what}: {ours:?}");
        let [ours, theirs] = [ours, theirs].map(|output| text(&output.stdout));
        assert!(
            ours.contains("Double checking the fixed image now"),
            "{ours}"
        );
        let behind = |text: &str| text.split("now...").nth(1).map(str::to_owned);
        if what == "leaks" {
            assert_eq!(ours, theirs);
        }
        assert!(
            behind(&ours).unwrap().contains("No errors were found"),
            "{ours}"
        );
        tool(folder, "qemu-img check -q a.qcow2");
        assert!(contents(folder, "a.qcow2") == content, "{what}");
        assert!(contents(folder, "b.qcow2") == content, "{what}");
        let again = check(OURS, folder, &["-r", "all", "--output", "json", "a.qcow2"]);
        let again: Value = serde_json::from_slice(&again.stdout).unwrap();
        assert!(again.get("corruptions-fixed").is_none(), "{again}");
    }
}

#[test]
fn what_cannot_be_repaired_is_named_and_left() {
    let Some(()) = need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    sample(folder, "compat=1.1");
    Image::open(folder, "a.qcow2").damage();
    let before = fs::read(folder.join("a.qcow2")).unwrap();
    let ours = check(OURS, folder, &["--repair", "a.qcow2"]);
    assert_eq!(ours.status.code(), Some(2), "{ours:?}");
    let findings = text(&ours.stderr);
    assert!(
        findings.contains("errors that new refcounts do not cure: L2 table at"),
        "{findings}"
    );
    let second = "): the data cluster is not properly aligned";
    assert!(findings.contains(second), "{findings}");
    assert!(fs::read(folder.join("a.qcow2")).unwrap() == before);
}

#[test]
fn checks_that_cannot_be_made_end_with_1() {
    let Some(()) = need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::write(folder.join("raw"), [7; 4096]).unwrap();
    for (arguments, message) in [
        (&["missing"][..], "No such file"),
        (&["raw"], "not in qcow2 format"),
        (&["-r", "all", "raw"], "not in qcow2 format"),
        (&[], "check: Expecting one image file name"),
    ] {
        let output = check(OURS, folder, arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(
            said.starts_with("qblockd: ") && said.contains(message),
            "{said}"
        );
        assert!(output.stdout.is_empty());
    }
    // An image that is served is in use, for a repair as for a check.
    sample(folder, "compat=1.1");
    let mut daemon = Daemon::start_in(
        Program::Qblockd,
        folder,
        &[
            "--blockdev",
            "qcow2,node-name=a,file.driver=file,file.filename=a.qcow2",
        ],
    );
    daemon.qmp();
    for arguments in [&["a.qcow2"][..], &["--repair", "a.qcow2"]] {
        let output = check(OURS, folder, arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(
            said.contains("lock. Is another process using the image [a.qcow2]?"),
            "{said}"
        );
    }
    drop(daemon);
}

/// qemu-img deletes the snapshots of an image with bitmaps when it may repair, also where nothing is wrong: 10.0.2 does.
#[test]
fn a_repair_keeps_snapshots_and_bitmaps_of_the_same_image() {
    let Some(()) = need(&["qemu-img", "qemu-io"]) else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    sample(folder, "cluster_size=64k");
    tool(folder, "qemu-img bitmap --add a.qcow2 changes");
    let wanted = contents(folder, "a.qcow2");
    let info = |image: &str| -> (usize, Value) {
        let text = tool(folder, &format!("qemu-img info --output=json {image}"));
        let info: Value = serde_json::from_str(&text).unwrap();
        let snapshots = info["snapshots"].as_array().map_or(0, Vec::len);
        let bitmaps = info["format-specific"]["data"]["bitmaps"].clone();
        (snapshots, bitmaps)
    };
    let before = info("a.qcow2");
    assert_eq!(
        (before.0, before.1[0]["name"].as_str()),
        (2, Some("changes"))
    );
    for (name, damage, _) in &DAMAGES[..3] {
        tool(folder, &format!("cp a.qcow2 {name}.qcow2"));
        let image = format!("{name}.qcow2");
        damage(&Image::open(folder, &image));
        let repaired = check(OURS, folder, &["--repair", &image]);
        assert!(repaired.status.success(), "{}", text(&repaired.stderr));
        assert_eq!(info(&image), before, "{name}");
        assert!(contents(folder, &image) == wanted, "{name}");
    }
    let theirs = check("qemu-img", folder, &["-q", "-r", "all", "a.qcow2"]);
    println!(
        "qemu-img: exit code {:?}, {} snapshots left",
        theirs.status.code(),
        info("a.qcow2").0
    );
}
