//! New images over nothing, over empty files and over others' content, kept and not kept.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::io::{Deed, Verdict, Witness};

const SIZE: u64 = 1 << 20;

fn image(path: &Path, content: NewContent) -> NewImage {
    NewImage {
        filename: path.to_str().unwrap().to_owned(),
        content,
    }
}

fn qcow2() -> NewContent {
    NewContent::of_format("qcow2", SIZE, BackingFile::default()).unwrap()
}

fn raw() -> NewContent {
    NewContent::of_format("raw", SIZE, BackingFile::default()).unwrap()
}

async fn make(path: &Path, content: NewContent) -> Result<Created> {
    create_image(&IoContext::new(), &image(path, content), Existing::Replace).await
}

/// The names in a folder, and what is in them.
fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, fs::read(path).unwrap())
        })
        .collect();
    files.sort();
    files
}

#[tokio::test]
async fn what_is_not_kept_leaves_no_trace() {
    for former in [None, Some(""), Some("former content")] {
        for content in [qcow2(), raw()] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.img");
            if let Some(former) = former {
                fs::write(&path, former).unwrap();
            }
            let before = files(folder.path());
            let created = make(&path, content).await.unwrap();
            assert!(created.is_new());
            assert_ne!(files(folder.path()), before);
            drop(created);
            assert_eq!(files(folder.path()), before, "{former:?}");
        }
    }
}

#[tokio::test]
async fn many_at_once_go_or_stay_and_what_is_left_of_them_is_the_callers() {
    let folder = tempfile::tempdir().unwrap();
    let path = |number: usize| folder.path().join(format!("{number}.img"));
    fs::write(path(0), "former content").unwrap();
    fs::write(path(1), "former content").unwrap();
    let before = files(folder.path());
    for stay in [false, true] {
        let mut created = Vec::new();
        for number in 0..4 {
            created.push(make(&path(number), qcow2()).await.unwrap());
        }
        if stay {
            let remains = Created::keep_all(created);
            assert_eq!(remains.len(), 2, "what two of them have replaced");
            assert_eq!(files(folder.path()).len(), 4);
        } else {
            let TakenBack { are_back, remains } = Created::take_back(created);
            assert!(are_back);
            assert_eq!(remains.len(), 4);
            assert_eq!(files(folder.path()), before);
        }
    }
}

#[tokio::test]
async fn what_is_kept_is_all_that_is_left() {
    for former in [None, Some(""), Some("former content")] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.img");
        if let Some(former) = former {
            fs::write(&path, former).unwrap();
        }
        make(&path, qcow2()).await.unwrap().keep();
        let files = files(folder.path());
        let [(name, content)] = &files[..] else {
            panic!("{files:?}");
        };
        assert_eq!((name.as_str(), &content[..4]), ("a.img", &b"QFI\xfb"[..]));
    }
}

#[tokio::test]
async fn links_lead_to_where_the_image_is_made() {
    use std::os::unix::fs::symlink;
    for existing in [Existing::Keep, Existing::Replace] {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("b")).unwrap();
        symlink("b/second", at("first")).unwrap();
        symlink("../made", at("b/second")).unwrap();
        let image = image(&at("first"), qcow2());
        let io = IoContext::new();
        let made = || create_image(&io, &image, existing);
        let created = made().await.unwrap();
        let path = fs::canonicalize(folder.path()).unwrap().join("made");
        assert_eq!(created.path(), path);
        assert!(created.is_new());
        // Not kept, it is gone, and the links are as they were.
        drop(created);
        assert!(!path.exists());
        made().await.unwrap().keep();
        assert!(path.is_file());
        assert!(at("first").is_symlink() && at("b/second").is_symlink());
        assert_eq!(final_path(at("first")).unwrap(), path);
    }
}

#[test]
fn a_place_is_where_links_end() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().unwrap();
    let root = fs::canonicalize(folder.path()).unwrap();
    let at = |name: &str| root.join(name);
    assert_eq!(final_path(at("new")).unwrap(), at("new"));
    symlink(at("new"), at("link")).unwrap();
    symlink("missing/new", at("nowhere")).unwrap();
    symlink("circle", at("circle")).unwrap();
    assert_eq!(final_path(at("link")).unwrap(), at("new"));
    fs::write(at("new"), "").unwrap();
    assert_eq!(final_path(at("link")).unwrap(), at("new"));
    let kind = |name: &str| final_path(at(name)).unwrap_err().kind();
    assert_eq!(kind("nowhere"), io::ErrorKind::NotFound);
    assert!(final_path(at("circle")).is_err());
}

#[tokio::test]
async fn errors_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.img");
    let message = |result: Result<Created>| result.unwrap_err().message().to_owned();
    let odd = NewContent::of_format("qcow2", SIZE + 1, BackingFile::default()).unwrap();
    assert_eq!(
        message(make(&path, odd).await),
        "Image size must be a multiple of 512 bytes"
    );
    let huge = NewContent::Raw {
        size: u64::MAX,
        preallocation: Preallocation::Off,
    };
    let text = message(make(&path, huge.clone()).await);
    assert!(text.starts_with("Could not resize '"), "{text}");
    assert!(text.ends_with("File too large"), "{text}");
    assert_eq!(files(folder.path()), []);
    fs::write(&path, "content").unwrap();
    assert!(make(&path, huge).await.is_err());
    let elsewhere = folder.path().join("missing/a.img");
    assert_eq!(
        message(make(&elsewhere, qcow2()).await),
        format!(
            "Could not create '{}': No such file or directory",
            elsewhere.display()
        )
    );
    let text = message(make(folder.path(), qcow2()).await);
    assert!(text.ends_with("Is a directory"), "{text}");
    let content = b"content".to_vec();
    assert_eq!(files(folder.path()), [("a.img".to_owned(), content)]);
}

#[tokio::test]
async fn an_image_that_somebody_uses_is_not_replaced() {
    for former in ["", "content"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.img");
        fs::write(&path, former).unwrap();
        let user = open_file(&IoContext::new(), &path).await.unwrap();
        let error = make(&path, qcow2()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        assert_eq!(
            files(folder.path()),
            [("a.img".to_owned(), former.as_bytes().to_vec())]
        );
        user.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_link_stays_one_and_permissions_stay() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let (path, link) = (folder.path().join("a.img"), folder.path().join("link"));
    fs::write(&path, "content").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let created = make(&link, raw()).await.unwrap();
    let target = path.canonicalize().unwrap();
    assert_eq!(created.path(), target);
    assert_eq!(fs::read(created.former().unwrap()).unwrap(), b"content");
    created.keep();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.len(), SIZE);
    assert_eq!(metadata.permissions().mode() & 0o777, 0o640);
}

#[tokio::test]
async fn an_image_that_is_there_can_stay() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.img");
    fs::write(&path, "content").unwrap();
    let image = image(&path, qcow2());
    let created = create_image(&IoContext::new(), &image, Existing::Keep)
        .await
        .unwrap();
    assert!(!created.is_new());
    drop(created);
    assert_eq!(fs::read(&path).unwrap(), b"content");
}

#[test]
fn formats_have_qemus_names() {
    let backing = BackingFile {
        name: Some("base".to_owned()),
        format: None,
    };
    let message = |format, backing| {
        let content = NewContent::of_format(format, SIZE, backing);
        content.unwrap_err().message().to_owned()
    };
    assert_eq!(
        message("vmdk", BackingFile::default()),
        "Unknown file format 'vmdk'"
    );
    assert_eq!(
        message("raw", backing),
        "Backing file not supported for file format 'raw'"
    );
}

#[tokio::test]
async fn what_a_killed_process_has_left_beside_is_in_nobodys_way() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().canonicalize().unwrap();
    for name in ["a.img".to_owned(), "\u{e4}".repeat(127)] {
        let path = folder.join(&name);
        fs::write(&path, "content").unwrap();
        let left = beside(&path);
        fs::write(&left, "left").unwrap();
        make(&path, raw()).await.unwrap().keep();
        assert_eq!(fs::metadata(&path).unwrap().len(), SIZE);
        assert_eq!(fs::read(left).unwrap(), b"left");
        assert_ne!(beside(&path), path);
    }
}

/// Treats all files as block devices, and fails the change that comes behind `passing` others.
#[derive(Debug)]
struct Devices {
    passing: AtomicU64,
}

impl Devices {
    fn io(passing: u64) -> IoContext {
        let passing = AtomicU64::new(passing);
        IoContext::witnessed(Arc::new(Devices { passing }))
    }
}

impl Witness for Devices {
    fn begins(&self, deed: &Deed) -> (u64, Verdict) {
        if !matches!(deed, Deed::Change { .. }) {
            return (0, Verdict::Do);
        }
        let verdict = match self.passing.fetch_sub(1, Ordering::Relaxed) {
            0 => Verdict::Fail(io::Error::other("broken")),
            _ => Verdict::Do,
        };
        (0, verdict)
    }

    fn ends(&self, _: u64, _: &Deed) {}

    fn pause(&self) -> u32 {
        0
    }

    fn is_device(&self, _: FileIdentity) -> bool {
        true
    }
}

/// A disk with something of somebody's in front, and somewhere behind it.
fn device(folder: &Path) -> (PathBuf, Vec<u8>) {
    let path = folder.canonicalize().unwrap().join("device");
    let mut content = b"somebody's".repeat(50_000);
    content.resize(2 << 20, 7);
    fs::write(&path, &content).unwrap();
    (path, content)
}

#[tokio::test]
async fn what_a_device_held_comes_back_unless_the_image_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (path, content) = device(folder.path());
    let wanted = image(&path, qcow2());
    let mut passing = 0;
    while let Err(error) = create_image(&Devices::io(passing), &wanted, Existing::Replace).await {
        assert!(error.message().contains("broken"), "{error}");
        assert!(fs::read(&path).unwrap() == content, "{passing}");
        passing += 1;
    }
    assert!(passing > 3, "clearing it, two tables, the header");
    fs::write(&path, &content).unwrap();
    let made = create_image(&Devices::io(u64::MAX), &wanted, Existing::Replace).await;
    let made = made.unwrap();
    assert!(made.is_new());
    assert_eq!(fs::read(&path).unwrap()[..4], *b"QFI\xfb");
    drop(made);
    assert!(fs::read(&path).unwrap() == content);
    let over = OverDevice::find(&Devices::io(u64::MAX), &wanted).await;
    let over = over.unwrap().unwrap();
    let overwritten = over.overwritten().clone();
    let len = overwritten.before.len();
    assert!(overwritten.before == content[..len]);
    over.make(&Devices::io(u64::MAX), &wanted)
        .await
        .unwrap()
        .keep();
    let made = fs::read(&path).unwrap();
    assert!(made[..len] == overwritten.after, "as it was said");
    assert!(made[len..] == content[len..], "what is behind it stays");
}

#[tokio::test]
async fn behind_a_crash_only_what_the_creation_left_is_put_back() {
    let folder = tempfile::tempdir().unwrap();
    let (path, content) = device(folder.path());
    let io = Devices::io(u64::MAX);
    let over = OverDevice::find(&io, &image(&path, qcow2())).await;
    let over = over.unwrap().unwrap();
    let overwritten = over.overwritten().clone();
    drop(over);
    let put_back = |is: &[u8]| {
        fs::write(&path, is).unwrap();
        let done = overwritten.put_back_after_crash(&io.names(), &path);
        (done.unwrap(), fs::read(&path).unwrap() == content)
    };
    assert_eq!(put_back(&content), (PutBack::WasThere, true));
    let mut half = content.clone();
    half[512..1024].fill(0);
    half[65536..65536 + 512].copy_from_slice(&overwritten.after[65536..65536 + 512]);
    assert_eq!(put_back(&half), (PutBack::Done, true));
    half[2000] ^= 1;
    assert_eq!(put_back(&half), (PutBack::Changed, false));
}

#[tokio::test]
async fn a_device_that_is_used_or_too_small_is_not_touched() {
    let folder = tempfile::tempdir().unwrap();
    let (path, content) = device(folder.path());
    let io = Devices::io(u64::MAX);
    let user = open_file(&io, &path).await.unwrap();
    let made = create_image(&io, &image(&path, qcow2()), Existing::Replace).await;
    assert_eq!(made.unwrap_err().kind(), ErrorKind::InUse);
    user.close().await.unwrap();
    fs::write(&path, &content[..8192]).unwrap();
    let made = create_image(&io, &image(&path, qcow2()), Existing::Replace).await;
    assert_eq!(made.unwrap_err().kind(), ErrorKind::NoSpace);
    let raw = create_image(&io, &image(&path, raw()), Existing::Replace).await;
    assert_eq!(raw.unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(fs::read(&path).unwrap(), content[..8192]);
}
