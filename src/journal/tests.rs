//! Starts behind crashes at each point of a transaction over images in files.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use block::driver::{Child, Driver as _, HeaderSwitch, NewSnapshot, Requests as _, Snapshots as _};
use block::formats::qcow2::check::check;
use block::formats::qcow2::create::{Compat, CreateOptions, create};
use block::formats::qcow2::{OpenOptions, Qcow2, is_marked_dirty};
use block::io::{Deed, IoContext, Verdict, Witness};
use block::open::{Aio, CacheMode, FileOptions, Locking, beside};
use block::protocols::file::{File, FileAccess};

use super::record::Identity;
use super::*;
use crate::transaction::lab::tape::{Fault, Tape};

/// A folder with images, and a state directory.
struct Lab {
    folder: tempfile::TempDir,
    io: IoContext,
}

/// An image as a crash leaves it whose switch was prepared.
struct Staged {
    path: PathBuf,
    switch: HeaderSwitch,
}

async fn open_file(io: &IoContext, path: &Path) -> Arc<File> {
    let options = FileOptions {
        filename: path.to_str().unwrap().to_owned(),
        aio: Aio::Threads,
        locking: Locking::On,
    };
    let access = FileAccess {
        read_only: false,
        auto_read_only: false,
        cache: CacheMode::default(),
    };
    Arc::new(File::open(io, &options, access).await.unwrap())
}

/// An image, and its file, which is to be closed behind it.
async fn open_image(io: &IoContext, path: &Path) -> (Arc<Qcow2>, Arc<File>) {
    let file = open_file(io, path).await;
    let opening = Qcow2::open(Child::new(file.clone()), OpenOptions::default()).await;
    (opening.unwrap().finish(None).await.unwrap(), file)
}

/// What a guest does while a snapshot becomes durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Guest {
    Waits,
    GoesOn,
}

impl Lab {
    fn new() -> Lab {
        Lab {
            folder: tempfile::tempdir().unwrap(),
            io: IoContext::new(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        fs::canonicalize(self.folder.path()).unwrap().join(name)
    }

    fn journal(&self) -> Journal {
        Journal::open(&self.path("state"), &self.io).unwrap()
    }

    /// Makes an image that has data and a snapshot `old`, and prepares a snapshot `new` of it.
    async fn stage(&self, name: &str) -> Staged {
        self.stage_as(name, Guest::Waits).await
    }

    async fn stage_as(&self, name: &str, guest: Guest) -> Staged {
        let options = CreateOptions::new(1 << 20);
        self.stage_with(name, guest, options).await
    }

    async fn stage_with(&self, name: &str, guest: Guest, options: CreateOptions) -> Staged {
        let path = self.path(name);
        fs::write(&path, b"").unwrap();
        let file = open_file(&self.io, &path).await;
        create(&Child::new(file.clone()), &options).await.unwrap();
        file.close().await.unwrap();
        let (image, file) = open_image(&self.io, &path).await;
        let data = vec![1; 4096].into();
        image.write(0, data, Default::default()).await.unwrap();
        image.create(NewSnapshot::named("old")).await.unwrap();
        image.close().await.unwrap();
        file.close().await.unwrap();
        let (image, file) = open_image(&self.io, &path).await;
        let mut change = image.change().await.unwrap();
        change.create(NewSnapshot::named("new")).await.unwrap();
        if guest == Guest::GoesOn {
            assert!(change.let_go(Box::new(drop)).await.unwrap());
        }
        change.prepare().await.unwrap();
        let switch = change.switch().await.unwrap().unwrap();
        let left = fs::read(&path).unwrap();
        drop(change);
        image.close().await.unwrap();
        file.close().await.unwrap();
        fs::write(&path, left).unwrap();
        Staged { path, switch }
    }

    /// The journal of a transaction over the images, up to its commit.
    async fn stages(&self, staged: &[Staged]) -> Entry {
        let mut entry = self.journal().begin(Vec::new()).await.unwrap();
        let image = |staged: &Staged| StagedImage {
            path: staged.path.clone(),
            file: Identity::of(&fs::metadata(&staged.path).unwrap()),
            offset: 0,
        };
        let images = staged.iter().map(image).collect();
        entry.stages(images).await.unwrap();
        entry
    }

    async fn commits(&self, staged: &[Staged]) -> Entry {
        let mut entry = self.stages(staged).await;
        let switches = staged
            .iter()
            .map(|staged| staged.switch.clone())
            .enumerate();
        entry.commit(switches.collect()).await.unwrap();
        entry
    }

    /// A start in which this fails.
    async fn recover_refused(&mut self, refused: fn(&Deed) -> bool) -> Report {
        let refused = IoContext::witnessed(Arc::new(Refused(refused)));
        let works = std::mem::replace(&mut self.io, refused);
        let report = self.recover().await;
        self.io = works;
        report
    }

    /// A start: what it reports, and that the next one would do nothing.
    async fn recover(&self) -> Report {
        let journal = self.journal();
        let mut recovered = recover(&journal, &self.io).await.unwrap();
        assert_eq!(recovered.len(), 1);
        let report = recovered.remove(0).report;
        // Nobody has seen it: it is told again, and nothing is done again.
        let again = recover(&journal, &self.io).await.unwrap().remove(0);
        if !report.is_worth_another_try() {
            assert_eq!(again.report, report);
        }
        again.seen();
        let left = recover(&journal, &self.io).await.unwrap().len();
        assert_eq!(left, usize::from(report.is_worth_another_try()));
        report
    }

    /// Whether an image, which must be sound and without leaks, has the snapshot `new`, too.
    async fn has_snapshot(&self, name: &str) -> bool {
        let path = self.path(name);
        let (image, file) = open_image(&self.io, &path).await;
        let list = image.list();
        image.close().await.unwrap();
        assert!(
            check(&Child::new(file.clone())).await.unwrap().is_clean(),
            "{name}"
        );
        file.close().await.unwrap();
        let names: Vec<&str> = list.iter().map(|snapshot| &*snapshot.name).collect();
        assert_eq!(names[0], "old", "{name}");
        names.contains(&"new")
    }
}

/// What it says of fails.
#[derive(Debug)]
struct Refused(fn(&Deed) -> bool);

/// No header can be written.
fn is_of_header(deed: &Deed) -> bool {
    matches!(deed, Deed::Change { offset: 1..512, .. })
}

/// No name can be removed, or become another file's; and no file can be made empty.
fn takes_back(deed: &Deed) -> bool {
    let is_of_names = matches!(deed, Deed::Remove { .. } | Deed::Rename { .. });
    is_of_names || matches!(deed, Deed::Resize { .. })
}

impl Witness for Refused {
    fn begins(&self, deed: &Deed) -> (u64, Verdict) {
        let verdict = match (self.0)(deed) {
            true => Verdict::Fail(io::ErrorKind::PermissionDenied.into()),
            false => Verdict::Do,
        };
        (0, verdict)
    }

    fn ends(&self, _: u64, _: &Deed) {}

    fn pause(&self) -> u32 {
        0
    }
}

fn put(staged: &Staged, sector: &[u8]) {
    use std::os::unix::fs::FileExt as _;
    let file = fs::OpenOptions::new().write(true).open(&staged.path);
    file.unwrap().write_all_at(sector, 0).unwrap();
}

fn results(report: &Report) -> Vec<ImageResult> {
    report.images.iter().map(|image| image.result).collect()
}

fn file_results(report: &Report) -> Vec<FileResult> {
    report.files.iter().map(|file| file.result).collect()
}

/// Somebody writes to a file, a while from now.
fn is_used(path: &Path) {
    let file = fs::OpenOptions::new().write(true).open(path);
    let later = SystemTime::now() + Duration::from_secs(1);
    file.unwrap().set_modified(later).unwrap();
}

#[tokio::test]
async fn without_a_commit_nothing_has_happened_and_nothing_is_leaked() {
    let lab = Lab::new();
    let staged = [lab.stage("a").await, lab.stage("b").await];
    drop(lab.stages(&staged).await);
    let file = open_file(&lab.io, &lab.path("a")).await;
    let left = check(&Child::new(file.clone())).await.unwrap();
    assert!(left.leaks > 0, "a prepared change has taken space");
    file.close().await.unwrap();
    let report = lab.recover().await;
    assert_eq!(report.outcome, Outcome::Removed);
    for name in ["a", "b"] {
        assert!(!lab.has_snapshot(name).await);
    }
}

#[tokio::test]
async fn with_a_commit_every_image_is_switched() {
    for switched in 0..3 {
        let lab = Lab::new();
        let staged = [lab.stage("a").await, lab.stage("b").await];
        drop(lab.commits(&staged).await);
        for staged in &staged[..switched] {
            put(staged, &staged.switch.after);
        }
        let report = lab.recover().await;
        assert_eq!(report.outcome, Outcome::RolledForward);
        let mut expected = vec![ImageResult::Unchanged; switched];
        expected.resize(2, ImageResult::Switched);
        assert_eq!(results(&report), expected);
        for name in ["a", "b"] {
            assert!(lab.has_snapshot(name).await);
        }
    }
}

#[tokio::test]
async fn a_commit_that_was_revoked_is_taken_back() {
    for switched in 0..3 {
        let lab = Lab::new();
        let staged = [lab.stage("a").await, lab.stage("b").await];
        let mut entry = lab.commits(&staged).await;
        entry.revoke().await.unwrap();
        drop(entry);
        for staged in &staged[..switched] {
            put(staged, &staged.switch.after);
        }
        let report = lab.recover().await;
        assert_eq!(report.outcome, Outcome::Removed);
        let mut expected = vec![ImageResult::SwitchedBack; switched];
        expected.resize(2, ImageResult::Unchanged);
        assert_eq!(results(&report), expected);
        for name in ["a", "b"] {
            assert!(!lab.has_snapshot(name).await);
        }
    }
}

/// Whatever fails once when it is said that nothing is to happen, the next start knows it.
#[tokio::test]
async fn a_journal_that_cannot_be_written_once_goes_on_elsewhere() {
    for leaves in [false, true] {
        for skip in 0.. {
            let mut lab = Lab::new();
            let staged = lab.stage("a").await;
            let (images, state) = (lab.path(""), lab.path("state"));
            let tape = Tape::new(&images, &state, 0);
            lab.io = IoContext::witnessed(tape.clone());
            let mut entry = lab.commits(std::slice::from_ref(&staged)).await;
            put(&staged, &staged.switch.after);
            if leaves {
                entry.revoke().await.unwrap();
            }
            tape.fail(skip, Fault::Io);
            match leaves {
                true => entry.leaves(&[0], &[lab.path("stays")]).await.unwrap(),
                false => entry.revoke().await.unwrap(),
            }
            let failed = tape.no_fault();
            drop(entry);
            fs::write(state.join(format!("old.{MOVED}")), b"half").unwrap();
            let report = lab.recover().await;
            assert_eq!(report.outcome, Outcome::Removed, "{failed:?}");
            assert_eq!(results(&report), [ImageResult::SwitchedBack], "{failed:?}");
            assert!(!lab.has_snapshot("a").await);
            assert_eq!(fs::read_dir(&state).unwrap().count(), 0, "{failed:?}");
            if failed.is_none() {
                assert!(skip > 1, "nothing was tried");
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_torn_commit_is_none_and_a_transaction_that_has_ended_needs_nothing() {
    let lab = Lab::new();
    let staged = [lab.stage("a").await, lab.stage("b").await];
    drop(lab.commits(&staged).await);
    let journal = lab.journal();
    let path = journal.entries().unwrap().remove(0);
    let mut bytes = fs::read(&path).unwrap();
    let end = bytes.iter().rposition(|byte| *byte == b'\n').unwrap();
    bytes[end - 600..end - 88].fill(0);
    fs::write(&path, bytes).unwrap();
    drop(journal);
    assert_eq!(lab.recover().await.outcome, Outcome::Removed);
    assert!(!lab.has_snapshot("a").await);

    let entry = lab.commits(&staged).await;
    let path = lab.path("state").join(format!("{}.{SUFFIX}", entry.uuid()));
    let kept = lab.path("kept");
    fs::hard_link(&path, &kept).unwrap();
    entry.end().await.unwrap();
    assert!(!path.exists());
    // The name was not durably gone.
    fs::rename(&kept, &path).unwrap();
    let journal = lab.journal();
    assert!(recover(&journal, &lab.io).await.unwrap().is_empty());
    assert!(!path.exists());
    drop(journal);
    assert!(!lab.has_snapshot("a").await);
}

#[tokio::test]
async fn what_is_not_as_it_was_left_is_reported_and_not_touched() {
    let lab = Lab::new();
    let names = ["fine", "missing", "replaced", "header", "data", "locked"];
    let mut staged = Vec::new();
    for name in names {
        staged.push(lab.stage(name).await);
    }
    drop(lab.commits(&staged).await);
    fs::rename(lab.path("missing"), lab.path("elsewhere")).unwrap();
    fs::copy(lab.path("replaced"), lab.path("copy")).unwrap();
    fs::rename(lab.path("copy"), lab.path("replaced")).unwrap();
    let mut header = staged[3].switch.before.clone();
    header[511] ^= 1;
    put(&staged[3], &header);
    // As another program does that writes guest data in place.
    let data = fs::OpenOptions::new().write(true).open(lab.path("data"));
    let later = SystemTime::now() + 2 * crate::limits::JOURNAL_SWITCH;
    data.unwrap().set_modified(later).unwrap();
    // As a kill leaves it between the kernel's note of a write's time and the write.
    let fine = fs::OpenOptions::new().write(true).open(lab.path("fine"));
    fine.unwrap().set_modified(SystemTime::now()).unwrap();
    let user = open_file(&lab.io, &lab.path("locked")).await;
    let untouched = ["elsewhere", "replaced", "header", "data", "locked"];
    let before = untouched.map(|name| fs::read(lab.path(name)).unwrap());
    let report = lab.recover().await;
    assert_eq!(report.outcome, Outcome::Degraded);
    let expected = [
        ImageResult::Switched,
        ImageResult::Missing,
        ImageResult::Replaced,
        ImageResult::Changed,
        ImageResult::Changed,
        ImageResult::Failed,
    ];
    assert_eq!(results(&report), expected);
    let detail = report.images[5].detail.as_deref().unwrap_or_default();
    assert!(detail.contains("Is another process using"), "{detail}");
    assert_eq!(
        untouched.map(|name| fs::read(lab.path(name)).unwrap()),
        before
    );
    // What comes back is finished by the next start.
    user.close().await.unwrap();
    fs::rename(lab.path("elsewhere"), lab.path("missing")).unwrap();
    let report = lab.recover().await;
    assert_eq!(report.outcome, Outcome::Degraded);
    assert_eq!(results(&report)[1], ImageResult::Switched);
    assert_eq!(results(&report)[5], ImageResult::Switched);
    for name in ["fine", "missing", "locked"] {
        assert!(lab.has_snapshot(name).await);
    }
}

#[tokio::test]
async fn what_guests_wrote_that_were_let_go_keeps_nothing_from_being_switched() {
    let lab = Lab::new();
    let staged = lab.stage_as("image", Guest::GoesOn).await;
    assert!(is_marked_dirty(&staged.switch.before));
    drop(lab.commits(std::slice::from_ref(&staged)).await);
    let file = fs::OpenOptions::new().write(true).open(&staged.path);
    let later = SystemTime::now() + 2 * crate::limits::JOURNAL_SWITCH;
    file.unwrap().set_modified(later).unwrap();
    let report = lab.recover().await;
    assert_eq!(results(&report), [ImageResult::Switched]);
    assert!(lab.has_snapshot("image").await);
}

/// A daemon that takes a switch back leaves the mark until the refcounts are right again.
#[tokio::test]
async fn a_header_that_was_put_back_may_be_marked_dirty() {
    let lab = Lab::new();
    let staged = lab.stage("image").await;
    assert!(!is_marked_dirty(&staged.switch.before));
    let mut entry = lab.commits(std::slice::from_ref(&staged)).await;
    entry.revoke().await.unwrap();
    drop(entry);
    let mut sector = staged.switch.before.clone();
    sector[79] |= 1;
    let mut bytes = fs::read(&staged.path).unwrap();
    bytes[..sector.len()].copy_from_slice(&sector);
    fs::write(&staged.path, &bytes).unwrap();
    let report = lab.recover().await;
    assert_eq!(report.outcome, Outcome::Removed);
    assert_eq!(results(&report), [ImageResult::Unchanged]);
}

/// How far the making of a file was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Making {
    Announced,
    Beside,
    Made,
}

/// Makes a file as `create_image` does, up to a point.
async fn make(entry: &mut Entry, path: &Path, until: Making) {
    let was = fs::read(path).ok();
    let aside = beside(path);
    let creates = entry.creates(path.to_owned(), aside.clone(), None);
    creates.await.unwrap();
    if until == Making::Announced {
        return;
    }
    match was.as_deref() {
        None | Some(b"") => fs::write(path, b"new").unwrap(),
        Some(_) => {
            fs::write(&aside, b"new").unwrap();
            if until == Making::Beside {
                return;
            }
            let swapped = lab_swap(&aside, path);
            swapped.unwrap();
        }
    }
    entry.created(path.to_owned()).await.unwrap();
}

fn lab_swap(one: &Path, other: &Path) -> rustix::io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)
}

#[tokio::test]
async fn files_that_were_made_go_or_stay_and_what_they_replaced_comes_back() {
    for until in [Making::Announced, Making::Beside, Making::Made] {
        for commits in [false, true] {
            if commits && until < Making::Made {
                continue;
            }
            let lab = Lab::new();
            fs::write(lab.path("empty"), b"").unwrap();
            fs::write(lab.path("full"), b"old").unwrap();
            let inode = fs::metadata(lab.path("full")).unwrap().ino();
            let aside = beside(&lab.path("full"));
            let mut entry = lab.journal().begin(Vec::new()).await.unwrap();
            for name in ["fresh", "empty", "full"] {
                make(&mut entry, &lab.path(name), until).await;
            }
            if commits {
                entry.commit(Vec::new()).await.unwrap();
            }
            drop(entry);
            let report = lab.recover().await;
            let content = |name: &str| fs::read(lab.path(name)).ok();
            let now = ["fresh", "empty", "full"].map(content);
            let text = |text: &str| Some(text.as_bytes().to_vec());
            let expected = match commits {
                true => [text("new"), text("new"), text("new")],
                false => [None, text(""), text("old")],
            };
            assert_eq!(now, expected, "{until:?} {report:?}");
            let same = fs::metadata(lab.path("full")).unwrap().ino() == inode;
            assert_eq!(same, !commits);
            assert!(!aside.exists(), "{until:?}");
            let outcome = match commits {
                true => Outcome::RolledForward,
                false => Outcome::Removed,
            };
            assert_eq!(report.outcome, outcome);
        }
    }
}

#[tokio::test]
async fn names_that_do_not_become_durable_are_tried_again() {
    let mut lab = Lab::new();
    let mut entry = lab.journal().begin(Vec::new()).await.unwrap();
    let names = ["one/a", "other/a", "one/b", "other/b"];
    for name in names {
        fs::create_dir_all(lab.path(name).parent().unwrap()).unwrap();
        make(&mut entry, &lab.path(name), Making::Made).await;
    }
    drop(entry);
    let is_of_other =
        |deed: &Deed| matches!(deed, Deed::SyncFolder { path } if path.ends_with("other"));
    let report = lab.recover_refused(is_of_other).await;
    assert_eq!(report.outcome, Outcome::Degraded);
    let paths = report.files.iter().map(|file| file.path.clone());
    let reversed = names.iter().rev().map(|name| lab.path(name));
    assert_eq!(Vec::from_iter(paths), Vec::from_iter(reversed));
    let (failed, removed) = (FileResult::Failed, FileResult::Removed);
    assert_eq!(file_results(&report), [failed, removed, failed, removed]);
    let details = report.files.iter().map(|file| file.detail.is_some());
    assert_eq!(Vec::from_iter(details), [true, false, true, false]);

    let report = lab.recover().await;
    assert_eq!(report.outcome, Outcome::Removed);
    assert_eq!(file_results(&report), [FileResult::Unchanged; 4]);
    assert!(names.iter().all(|name| !lab.path(name).exists()));
}

#[tokio::test]
async fn a_file_of_somebody_else_stays() {
    let lab = Lab::new();
    let mut entry = lab.journal().begin(Vec::new()).await.unwrap();
    make(&mut entry, &lab.path("fresh"), Making::Made).await;
    drop(entry);
    fs::write(lab.path("other"), b"other").unwrap();
    fs::rename(lab.path("other"), lab.path("fresh")).unwrap();
    let report = lab.recover().await;
    assert_eq!(report.outcome, Outcome::Degraded);
    assert_eq!(report.files[0].result, FileResult::Replaced);
    assert_eq!(fs::read(lab.path("fresh")).unwrap(), b"other");
}

#[tokio::test]
async fn one_daemon_has_the_state_directory() {
    let lab = Lab::new();
    let journal = lab.journal();
    let error = Journal::open(&lab.path("state"), &lab.io).unwrap_err();
    assert_eq!(error.to_string(), "another daemon uses it");
    drop(journal);
    lab.journal();
}

#[tokio::test]
async fn what_is_left_of_an_abort_is_put_back_and_what_guests_have_written_stays() {
    let lab = Lab::new();
    let staged = [lab.stage("a").await, lab.stage("b").await];
    let mut entry = lab.commits(&staged).await;
    for name in ["overlay", "target"] {
        make(&mut entry, &lab.path(name), Making::Made).await;
    }
    entry.revoke().await.unwrap();
    let files = [lab.path("overlay")];
    entry.leaves(&[1], &files).await.unwrap();
    drop(entry);
    // The first has gone on since it was taken back.
    let mut header = staged[0].switch.before.clone();
    header[511] ^= 1;
    put(&staged[0], &header);
    put(&staged[1], &staged[1].switch.after);
    let report = lab.recover().await;
    assert_eq!(report.outcome, Outcome::Removed);
    assert_eq!(results(&report), [ImageResult::SwitchedBack]);
    assert_eq!(
        file_results(&report),
        [FileResult::Removed, FileResult::Kept]
    );
    assert!(!lab.has_snapshot("b").await);
    assert!(lab.path("overlay").exists() && !lab.path("target").exists());
}

#[tokio::test]
async fn an_image_that_cannot_be_put_back_keeps_what_the_next_start_puts_back() {
    let mut lab = Lab::new();
    let staged = lab.stage("a").await;
    let mut entry = lab.commits(std::slice::from_ref(&staged)).await;
    entry.revoke().await.unwrap();
    drop(entry);
    put(&staged, &staged.switch.after);
    let report = lab.recover_refused(is_of_header).await;
    assert_eq!(report.outcome, Outcome::Degraded);
    assert_eq!(results(&report), [ImageResult::Failed]);
    let report = lab.recover().await;
    assert_eq!(results(&report), [ImageResult::SwitchedBack]);
    assert!(!lab.has_snapshot("a").await);
}

/// Files that a failed transaction could not take back, for two reasons: the daemon says so, or the first start does.
#[tokio::test]
async fn what_has_been_left_and_used_since_is_nobodys_to_take_back() {
    use FileResult::{Changed, Failed, Removed, Restored};
    let names = ["fresh", "full", "empty"];
    for leaves in [true, false] {
        for used in [true, false] {
            let mut lab = Lab::new();
            fs::write(lab.path("empty"), b"").unwrap();
            fs::write(lab.path("full"), b"old").unwrap();
            let mut entry = lab.journal().begin(Vec::new()).await.unwrap();
            for name in names {
                make(&mut entry, &lab.path(name), Making::Made).await;
            }
            if leaves {
                entry.leaves(&[], &[]).await.unwrap();
            }
            drop(entry);
            if !leaves {
                let report = lab.recover_refused(takes_back).await;
                assert_eq!(file_results(&report), [Failed; 3]);
            }
            if used {
                names.iter().for_each(|name| is_used(&lab.path(name)));
            }
            let report = lab.recover().await;
            let text = |text: &str| Some(text.as_bytes().to_vec());
            let (expected, results, contents) = match used {
                true => (
                    Outcome::Degraded,
                    [Changed; 3],
                    [(); 3].map(|()| text("new")),
                ),
                false => (
                    Outcome::Removed,
                    [Restored, Restored, Removed],
                    [None, text("old"), text("")],
                ),
            };
            assert_eq!(report.outcome, expected, "{leaves} {used}");
            assert_eq!(file_results(&report), results, "{leaves} {used}");
            assert_eq!(
                names.map(|name| fs::read(lab.path(name)).ok()),
                contents,
                "{leaves} {used}"
            );
            let entries = fs::read_dir(lab.folder.path()).unwrap();
            let paths = entries.map(|entry| entry.unwrap().path());
            let is_aside = |path: &PathBuf| path.to_str().unwrap().contains(".full.");
            let aside: Vec<PathBuf> = paths.filter(is_aside).collect();
            let says = report.files[1].detail.as_deref();
            assert_eq!(aside.len(), usize::from(used));
            for aside in aside {
                assert_eq!(fs::read(&aside).unwrap(), b"old");
                assert!(says.unwrap().contains(aside.to_str().unwrap()), "{says:?}");
            }
        }
    }
}

/// An image that is not marked dirty does not say whether somebody uses it.
#[tokio::test]
async fn an_image_that_has_been_used_since_it_could_not_be_put_back_stays() {
    for leaves in [true, false] {
        let mut lab = Lab::new();
        let options = CreateOptions {
            compat: Compat::V0_10,
            ..CreateOptions::new(1 << 20)
        };
        let staged = lab.stage_with("a", Guest::Waits, options).await;
        assert!(!is_marked_dirty(&staged.switch.after));
        let mut entry = lab.commits(std::slice::from_ref(&staged)).await;
        entry.revoke().await.unwrap();
        put(&staged, &staged.switch.after);
        if leaves {
            // The guests of the daemon that has left it have gone on, and it is theirs.
            entry.leaves(&[0], &[]).await.unwrap();
        } else {
            lab.recover_refused(is_of_header).await;
        }
        drop(entry);
        is_used(&lab.path("a"));
        let report = lab.recover().await;
        let (expected, header) = match leaves {
            true => (ImageResult::SwitchedBack, &staged.switch.before),
            false => (ImageResult::Changed, &staged.switch.after),
        };
        assert_eq!(results(&report), [expected]);
        let bytes = fs::read(&staged.path).unwrap();
        assert!(bytes.starts_with(header), "{leaves}");
    }
}

/// An action of the kind on a disk whose image this is.
fn action(kind: ActionKind, image: &Path, filename: Option<PathBuf>) -> JournaledAction {
    JournaledAction {
        image: Some(image.to_owned()),
        filename,
        ..JournaledAction::new(kind, "d".to_owned())
    }
}

#[tokio::test]
async fn a_report_says_what_has_become_of_each_action() {
    use ActionResult::{CutOff, Done, Unclear, Undone};
    for (commits, fails, expected) in [
        (true, false, [Done, Done, CutOff]),
        (true, true, [Unclear, Done, CutOff]),
        (false, false, [Undone, Undone, Undone]),
    ] {
        let lab = Lab::new();
        let staged = lab.stage("a").await;
        let files = ["overlay", "target"].map(|name| lab.path(name));
        let actions = vec![
            action(ActionKind::Create, &staged.path, None),
            action(
                ActionKind::OverlayFile,
                &lab.path("b"),
                Some(files[0].clone()),
            ),
            action(
                ActionKind::BackupToFile,
                &lab.path("b"),
                Some(files[1].clone()),
            ),
        ];
        let mut entry = lab.journal().begin(actions.clone()).await.unwrap();
        for file in &files {
            make(&mut entry, file, Making::Made).await;
        }
        let image = StagedImage {
            path: staged.path.clone(),
            file: Identity::of(&fs::metadata(&staged.path).unwrap()),
            offset: 0,
        };
        entry.stages(vec![image]).await.unwrap();
        if commits {
            let switches = vec![(0, staged.switch.clone())];
            entry.commit(switches).await.unwrap();
        }
        drop(entry);
        if fails {
            let mut header = staged.switch.before.clone();
            header[511] ^= 1;
            put(&staged, &header);
        }
        let report = lab.recover().await;
        let results = report.actions.iter().map(|each| each.result);
        let results: Vec<ActionResult> = results.collect();
        assert_eq!(results, expected, "{report:?}");
        let is: Vec<&JournaledAction> = report.actions.iter().map(|each| &each.action).collect();
        assert_eq!(is, Vec::from_iter(&actions));
        let overlays = report.overlays().count();
        assert_eq!(overlays, usize::from(commits));
    }
}
