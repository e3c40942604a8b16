//! What the tests of this format share: images in memory, and QEMU's tools as oracles.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::protocols::memory::Memory;

/// More than any test takes that does not hang, on a busy machine too.
pub(super) const HANGS_AFTER: Duration = Duration::from_secs(120);

/// A folder of image files that goes away with the test.
pub(super) struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    /// An empty folder.
    pub(super) fn new() -> Self {
        // In memory where that exists: the tests write many small images.
        let shm = Path::new("/dev/shm");
        let dir = match shm.is_dir() {
            true => tempfile::tempdir_in(shm),
            false => tempfile::tempdir(),
        };
        Scratch { dir: dir.unwrap() }
    }

    /// A path inside.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes the disk's bytes to a file inside, with holes where the disk has none.
    pub(super) fn save(&self, name: &str, disk: &Memory) -> PathBuf {
        use std::io::{Seek, SeekFrom, Write};
        let path = self.path(name);
        let mut file = std::fs::File::create(&path).unwrap();
        let content = disk.content();
        file.set_len(content.len() as u64).unwrap();
        for (index, page) in content.chunks(4096).enumerate() {
            if page.iter().any(|byte| *byte != 0) {
                file.seek(SeekFrom::Start(index as u64 * 4096)).unwrap();
                file.write_all(page).unwrap();
            }
        }
        path
    }

    /// Reads a file inside into a disk.
    pub(super) fn load(&self, name: &str) -> Arc<Memory> {
        Memory::with_content(&std::fs::read(self.path(name)).unwrap())
    }
}

/// Runs a tool of QEMU's, whatever its outcome.
pub(super) fn run(tool: &str, args: &[&str]) -> Output {
    Command::new(tool)
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{tool} is needed by this test: {error}"))
}

/// Runs qemu-img, which must succeed, and answers its standard output.
#[track_caller]
pub(super) fn qemu_img(args: &[&str]) -> String {
    let output = run("qemu-img", args);
    assert!(
        output.status.success(),
        "qemu-img {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs commands of qemu-io on a qcow2 image; all must succeed.
#[track_caller]
pub(super) fn qemu_io(path: &str, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(path);
    let output = run("qemu-io", &args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let wrong = !output.status.success() || text.contains("verification failed");
    assert!(!wrong, "qemu-io {commands:?}: {text}");
}

/// What `qemu-img check` finds, as JSON, whatever its exit code; the texts of its findings with it.
pub(super) fn qemu_check(path: &Path) -> (Value, String) {
    let output = run(
        "qemu-img",
        &[
            "check",
            "-f",
            "qcow2",
            "--output=json",
            path.to_str().unwrap(),
        ],
    );
    let report = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    let findings = String::from_utf8_lossy(&output.stderr).into_owned();
    (report, findings)
}

/// Asserts that `qemu-img check` finds nothing wrong.
#[track_caller]
pub(super) fn assert_qemu_clean(path: &Path) -> Value {
    let (report, findings) = qemu_check(path);
    let wrong = ["corruptions", "leaks"]
        .iter()
        .any(|field| report.get(field).is_some())
        || report["check-errors"] != 0;
    assert!(!wrong, "{}: {report}\n{findings}", path.display());
    report
}

/// A current-thread runtime for one test.
pub(super) fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap()
        .block_on(future)
}
